//! Where bytes really lie: 1, 2, 3, 4 and 7 devices, equal and unequal, three stripe units; the raw
//! images are read back beside the volume.

mod common;

use braidfs_blockdev::{
    BLOCK_SIZE, Chunk, ChunkKind, Profile, SimDevice, VolBlock, Volume, VolumeErrorKind,
};
use common::{KIB, MIB, as_devices, options, sims, tagged};
use std::sync::Arc;

/// Every block of the chunk lies where round robin by stripe unit says, computed here by itself.
fn check_striped(sims: &[Arc<SimDevice>], chunk: &Chunk, unit: u64) {
    let members = chunk.members.len() as u64;
    for block in 0..chunk.len_blocks {
        let byte = block * BLOCK_SIZE;
        let (row, column) = (byte / unit / members, byte / unit % members);
        let member = match chunk.profile {
            Profile::Stripe => chunk.members[usize::try_from(column).unwrap()],
            _ => chunk.members[0],
        };
        let offset = match chunk.profile {
            Profile::Stripe => row * unit + byte % unit,
            _ => byte,
        };
        let raw = sims[usize::from(member.dev)].peek(member.offset_bytes + offset, 16);
        let logical = chunk.start.0 + block;
        assert_eq!(
            raw[..8],
            logical.to_le_bytes(),
            "block {block} of chunk {}",
            chunk.id
        );
    }
}

fn fill(volume: &Volume, chunk: &Chunk) {
    // An odd length, so that writes straddle stripe units.
    let step = 37;
    let mut at = chunk.start;
    while at < chunk.end() {
        let blocks = step.min(chunk.end().0 - at.0);
        volume
            .write_wait(at, tagged(at, blocks * BLOCK_SIZE, 0))
            .unwrap();
        at = at.plus(blocks);
    }
}

#[test]
fn bytes_lie_as_the_chunk_table_says_and_devices_are_used_to_the_end() {
    let layouts: [&[u64]; 8] = [
        &[24],
        &[24; 2],
        &[24; 3],
        &[24; 4],
        &[24; 7],
        &[16, 40],
        &[16, 24, 33],
        &[17, 40, 16, 23, 31, 16, 29],
    ];
    for sizes in layouts {
        for unit in [64 * KIB, 256 * KIB, MIB] {
            let bytes: Vec<u64> = sizes.iter().map(|size| size * MIB).collect();
            let sims = sims(&bytes);
            let volume = Volume::format(as_devices(&sims), &options(unit)).unwrap();
            while let Ok(chunk) = volume.allocate_chunk(ChunkKind::Data, 0) {
                fill(&volume, &chunk);
                check_striped(&sims, &chunk, unit);
            }
            assert!(volume.unallocated_bytes() < MIB * sizes.len() as u64);
            for device in volume.info().devices {
                let unused = device.size_bytes - MIB - device.allocated_bytes;
                assert!(unused < MIB, "{unused} bytes of {} unused", device.name);
            }
            let chunks = volume.chunks();
            let ends = chunks.windows(2).all(|pair| pair[0].end() == pair[1].start);
            assert!(ends, "logical space has gaps");
            volume.close().unwrap();
            assert_eq!(
                Volume::assemble(as_devices(&sims), true).unwrap().chunks(),
                chunks
            );
        }
    }
}

#[test]
fn equal_devices_get_equal_shares() {
    for count in [2usize, 3, 4, 7] {
        let sims = sims(&vec![64 * MIB; count]);
        let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
        let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
        assert_eq!(
            (chunk.profile, chunk.members.len()),
            (Profile::Stripe, count)
        );
        fill(&volume, &chunk);
        let written: Vec<u64> = volume
            .stats()
            .devices
            .iter()
            .map(|device| device.write.bytes)
            .collect();
        assert!(
            written.iter().all(|&bytes| bytes == chunk.member_len_bytes),
            "{written:?}"
        );
    }
}

#[test]
fn metadata_is_mirrored_on_two_devices_where_there_are_two() {
    for count in [1usize, 2, 3] {
        let sims = sims(&vec![32 * MIB; count]);
        let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
        let meta = volume.chunks()[0].clone();
        assert_eq!(
            (meta.kind, meta.profile),
            (ChunkKind::Meta, Profile::Mirror)
        );
        assert_eq!(meta.members[0].dev == meta.members[1].dev, count == 1);
        volume
            .write_wait(meta.start, tagged(meta.start, 64 * KIB, 4))
            .unwrap();
        for (member, copy) in meta.members.iter().zip(0u8..) {
            let raw = sims[usize::from(member.dev)].peek(member.offset_bytes, 64 << 10);
            assert!(raw == tagged(meta.start, 64 * KIB, 4)[..]);
            assert_eq!(
                volume.locate(meta.start, copy),
                Some((member.dev, member.offset_bytes))
            );
        }
        assert_eq!(
            (volume.copies(meta.start), volume.locate(meta.start, 2)),
            (2, None)
        );
    }
}

/// Data leaves the reserve, and metadata can use all of it, on two devices.
#[test]
fn data_leaves_a_reserve_that_metadata_can_use() {
    for sizes in [&[64][..], &[64; 2], &[64; 4], &[24, 96], &[16, 48, 96]] {
        let bytes: Vec<u64> = sizes.iter().map(|size| size * MIB).collect();
        let sims = sims(&bytes);
        let volume = Volume::format(as_devices(&sims), &options(256 * KIB)).unwrap();
        let reserve = 16 * MIB;
        let refused = loop {
            if let Err(error) = volume.allocate_chunk(ChunkKind::Data, reserve) {
                break error;
            }
        };
        assert_eq!(refused.kind(), &VolumeErrorKind::NoSpace);
        let left = volume.unallocated_bytes();
        assert!(
            (reserve..reserve + 2 * MIB).contains(&left),
            "{sizes:?}: {left} bytes left"
        );
        let mut used = 0;
        while used < reserve {
            let next = volume.meta_chunk_bytes();
            let chunk = volume.allocate_chunk(ChunkKind::Meta, 0).unwrap();
            assert_eq!(chunk.raw_bytes(), next);
            assert_eq!(
                chunk.members[0].dev != chunk.members[1].dev,
                sizes.len() > 1,
                "{sizes:?}"
            );
            used += next;
        }
    }
}

#[test]
fn a_discard_reaches_every_piece_and_unknown_blocks_are_nowhere() {
    let sims = sims(&[32 * MIB; 3]);
    let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
    let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
    sims.iter().for_each(|sim| sim.clear_log());
    volume.discard(chunk.start, 48);
    let lens: Vec<u64> = sims
        .iter()
        .flat_map(|sim| sim.log())
        .map(|record| record.len)
        .collect();
    assert_eq!(lens, [64 * KIB; 3]);
    sims.iter().for_each(|sim| sim.clear_log());
    let unallocated = volume.unallocated_bytes();
    let (half, end) = (unallocated / 2, unallocated + MIB);
    let first = volume.discard_unallocated(0, half).unwrap();
    let second = volume.discard_unallocated(half, end).unwrap();
    assert_eq!((first, first + second), (half, unallocated));
    let mut ranges: Vec<(usize, u64, u64)> = Vec::new();
    for (dev, sim) in sims.iter().enumerate() {
        let records = sim.log();
        ranges.extend(records.iter().map(|r| (dev, r.offset, r.offset + r.len)));
    }
    assert_eq!(ranges.iter().map(|r| r.2 - r.1).sum::<u64>(), unallocated);
    for chunk in volume.chunks() {
        for member in &chunk.members {
            let (from, to) = (
                member.offset_bytes,
                member.offset_bytes + chunk.member_len_bytes,
            );
            let touched =
                |r: &&(usize, u64, u64)| r.0 == usize::from(member.dev) && r.1 < to && from < r.2;
            assert_eq!(ranges.iter().find(touched), None, "in a chunk");
        }
    }
    let beyond = VolBlock(chunk.end().0);
    assert_eq!((volume.copies(beyond), volume.locate(beyond, 0)), (0, None));
}
