//! Damaged, torn, stale, missing, foreign, doubled and truncated members. Whatever is refused is
//! refused with a message that names the device, and leaves every device as it was.

mod common;

use braidfs_blockdev::device::sim::{SimEffect, SimPower};
use braidfs_blockdev::{
    AlignedBuf, BlockDevice, ChunkKind, ErrorKind, LabelError, Op, SimDevice, VolBlock, Volume,
    VolumeError, VolumeErrorKind, read_label,
};
use common::{KIB, MIB, as_devices, options, sims, tagged};
use std::sync::Arc;

const LABEL_PLACES: [u64; 2] = [0, 512 * KIB];
const TABLE_PLACES: [u64; 2] = [64 * KIB, 576 * KIB];

struct Rig {
    sims: Vec<Arc<SimDevice>>,
    at: VolBlock,
}

impl Rig {
    /// A closed volume of `count` members with a data chunk that holds something.
    fn new(count: usize) -> Rig {
        let sims = sims(&vec![16 * MIB; count]);
        let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
        let at = volume.allocate_chunk(ChunkKind::Data, 0).unwrap().start;
        volume.write_wait(at, tagged(at, 256 * KIB, 1)).unwrap();
        volume.close().unwrap();
        Rig { sims, at }
    }

    fn generation(&self) -> u64 {
        Volume::assemble(as_devices(&self.sims), true)
            .unwrap()
            .info()
            .generation
    }

    /// The refusal of these devices; it must not have changed any of them.
    fn refused(&self, devices: Vec<Arc<dyn BlockDevice>>) -> VolumeError {
        let before: Vec<_> = self.sims.iter().map(|sim| sim.image()).collect();
        let Err(error) = Volume::assemble(devices, false) else {
            panic!("was assembled")
        };
        let after: Vec<_> = self.sims.iter().map(|sim| sim.image()).collect();
        assert!(before == after, "a refused assembly wrote something");
        error
    }

    /// It assembles, to read and then to write, and the content is there.
    fn works(&self) {
        for read_only in [true, false] {
            let volume = Volume::assemble(as_devices(&self.sims), read_only).unwrap();
            let back = volume
                .read_wait(self.at, AlignedBuf::zeroed(256 << 10), None)
                .unwrap();
            assert!(back[..] == tagged(self.at, 256 * KIB, 1)[..]);
            volume.close().unwrap();
        }
    }
}

fn assert_names(error: &VolumeError, device: &str) {
    assert!(
        error.to_string().contains(device),
        "{error} should name {device}"
    );
}

#[test]
fn one_damaged_label_copy_is_repaired() {
    for count in [1, 3] {
        for slot in 0..2 {
            for member in 0..count {
                let rig = Rig::new(count);
                rig.sims[member].poke(LABEL_PLACES[slot] + 100, &[0xff; 8]);
                rig.works();
                // After that assembly both copies are whole again: the other one may go.
                rig.sims[member].poke(LABEL_PLACES[1 - slot], &[0; 4096]);
                rig.works();
            }
        }
    }
}

/// The repair comes before the update that overwrites the member's only good copy: if that write
/// goes wrong, the repaired copy is there.
#[test]
fn a_repair_is_done_before_the_next_update() {
    let rig = Rig::new(3);
    let slot = usize::try_from(rig.generation() % 2).unwrap();
    rig.sims[1].poke(LABEL_PLACES[slot], &[0xee; 512]);
    drop(Volume::assemble(as_devices(&rig.sims), false).unwrap());
    rig.sims[1].poke(LABEL_PLACES[1 - slot], &[0xee; 512]);
    rig.works();
}

/// A single member whose newest label copy is lost still has its newest chunk table in force.
#[test]
fn a_lost_label_copy_does_not_roll_the_chunk_table_back() {
    let sim = SimDevice::new("sim0", 32 * MIB);
    let volume = Volume::format(vec![sim.clone()], &options(64 * KIB)).unwrap();
    for _ in 0..3 {
        volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
        let (generation, chunks) = (volume.info().generation, volume.chunks());
        let slot = usize::try_from(generation % 2).unwrap();
        let image = sim.image();
        let copy = SimDevice::from_image("copy", image, &SimPower::new());
        copy.poke(LABEL_PLACES[slot], &[0xee; 512]);
        let rolled = Volume::assemble(vec![copy.clone()], false).unwrap();
        assert_eq!(rolled.chunks(), chunks);
        assert_eq!(rolled.info().generation, generation + 1);
    }
}

#[test]
fn both_label_copies_damaged_is_refused_by_name() {
    let rig = Rig::new(3);
    for place in LABEL_PLACES {
        rig.sims[1].poke(place + 100, &[0xff; 8]);
    }
    let error = rig.refused(as_devices(&rig.sims));
    assert_names(&error, "sim1");
    assert!(
        matches!(
            error.kind(),
            VolumeErrorKind::Label(LabelError::Checksum { .. })
        ),
        "{error}"
    );
    for place in LABEL_PLACES {
        rig.sims[1].poke(place, &[0; 4096]);
    }
    let error = rig.refused(as_devices(&rig.sims));
    assert_names(&error, "sim1");
    assert_eq!(error.kind(), &VolumeErrorKind::Label(LabelError::Missing));
}

#[test]
fn damaged_tables_are_taken_from_another_member_or_refused() {
    let rig = Rig::new(3);
    for member in 0..2 {
        for place in TABLE_PLACES {
            rig.sims[member].poke(place + 80, &[0xff; 8]);
        }
    }
    rig.works();
    for sim in &rig.sims {
        for place in TABLE_PLACES {
            sim.poke(place + 80, &[0xff; 8]);
        }
    }
    let error = rig.refused(as_devices(&rig.sims));
    assert_names(&error, "sim0");
    assert!(matches!(error.kind(), VolumeErrorKind::Table(_)), "{error}");
}

/// Power is cut at every write and flush of a mount, an allocation and a close; then the volume
/// always assembles, with the chunk table of before or after, and its content.
#[test]
fn an_update_cut_anywhere_leaves_a_volume_that_assembles() {
    let rig = Rig::new(3);
    let images: Vec<_> = rig.sims.iter().map(|sim| sim.image()).collect();
    let mut seen_lengths = Vec::new();
    for cut_at in 0.. {
        let power = SimPower::new();
        power.cut_at(cut_at);
        let named = |(index, image): (usize, &Vec<u8>)| {
            SimDevice::from_image(&format!("sim{index}"), image.clone(), &power)
        };
        let sims: Vec<_> = images.iter().enumerate().map(named).collect();
        let survived = Volume::assemble(as_devices(&sims), false).is_ok_and(|volume| {
            let grown = volume.allocate_chunk(ChunkKind::Data, 0).is_ok();
            grown && volume.close().is_ok()
        });
        for seed in 0..4 {
            let wreck = |(index, sim): (usize, &Arc<SimDevice>)| {
                SimDevice::from_image(&format!("sim{index}"), sim.crash(seed), &SimPower::new())
            };
            let sims = sims.iter().enumerate().map(wreck).collect();
            let after = Rig { sims, at: rig.at };
            seen_lengths.push(
                Volume::assemble(as_devices(&after.sims), true)
                    .unwrap()
                    .chunks()
                    .len(),
            );
            after.works();
        }
        if survived {
            assert!(cut_at > 30, "only {cut_at} operations");
            break;
        }
    }
    seen_lengths.sort_unstable();
    seen_lengths.dedup();
    assert_eq!(seen_lengths, [2, 3], "both outcomes were met");
}

#[test]
fn a_stale_member_is_refused_by_name() {
    let rig = Rig::new(3);
    let old = rig.sims[2].image();
    Volume::assemble(as_devices(&rig.sims), false)
        .unwrap()
        .close()
        .unwrap();
    let newest = rig.generation();
    let stale = SimDevice::from_image("old2", old, &SimPower::new());
    let mut devices = as_devices(&rig.sims);
    devices[2] = stale;
    let error = rig.refused(devices);
    assert_names(&error, "old2");
    assert_eq!(
        error.kind(),
        &VolumeErrorKind::Stale {
            found: newest - 2,
            newest
        }
    );
}

#[test]
fn missing_foreign_and_doubled_members_are_refused_by_name() {
    let rig = Rig::new(3);
    let error = rig.refused(vec![rig.sims[0].clone(), rig.sims[2].clone()]);
    assert!(
        matches!(
            error.kind(),
            VolumeErrorKind::Missing {
                index: 1,
                count: 3,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("number 1 of 3"), "{error}");

    let other = SimDevice::new("alien", 16 * MIB);
    Volume::format(vec![other.clone()], &options(64 * KIB))
        .unwrap()
        .close()
        .unwrap();
    let mut devices = as_devices(&rig.sims);
    devices[1] = other;
    let error = rig.refused(devices);
    assert_names(&error, "alien");
    assert!(
        matches!(error.kind(), VolumeErrorKind::Foreign { .. }),
        "{error}"
    );

    let twin = SimDevice::from_image("twin", rig.sims[1].image(), &SimPower::new());
    let mut devices = as_devices(&rig.sims);
    devices[2] = twin;
    let error = rig.refused(devices);
    assert_names(&error, "twin");
    assert_names(&error, "sim1");
    assert!(
        matches!(error.kind(), VolumeErrorKind::Twice { index: 1, .. }),
        "{error}"
    );

    assert!(matches!(
        rig.refused(vec![]).kind(),
        VolumeErrorKind::DeviceCount { given: 0, .. }
    ));
}

#[test]
fn a_truncated_member_is_refused_by_name_and_a_grown_one_is_not() {
    let rig = Rig::new(2);
    let mut image = rig.sims[1].image();
    let grown = [&image[..], &[0; 1 << 20]].concat();
    image.truncate(15 << 20);
    let error = rig.refused(vec![
        rig.sims[0].clone(),
        SimDevice::from_image("short", image, &SimPower::new()),
    ]);
    assert_names(&error, "short");
    let (found, wanted) = (15 * MIB, 16 * MIB);
    assert_eq!(error.kind(), &VolumeErrorKind::Truncated { found, wanted });
    let grown = SimDevice::from_image("long", grown, &SimPower::new());
    Volume::assemble(vec![rig.sims[0].clone(), grown], true).unwrap();
}

#[test]
fn members_are_found_in_any_order() {
    let rig = Rig::new(3);
    let order = [2, 0, 1].map(|index| rig.sims[index].clone() as Arc<dyn BlockDevice>);
    let volume = Volume::assemble(order.to_vec(), true).unwrap();
    let names: Vec<_> = volume
        .info()
        .devices
        .into_iter()
        .map(|device| device.name)
        .collect();
    assert_eq!(names, ["sim0", "sim1", "sim2"]);
}

#[test]
fn a_device_that_cannot_be_read_or_written_is_named() {
    let rig = Rig::new(2);
    let eio = SimEffect::Fail(ErrorKind::Os(5));
    rig.sims[1].inject(Op::Read, 0..MIB, eio, None);
    assert_names(&rig.refused(as_devices(&rig.sims)), "sim1");
    rig.sims[1].heal();
    rig.sims[1].inject(Op::Write, 0..MIB, eio, None);
    let Err(error) = Volume::assemble(as_devices(&rig.sims), false) else {
        panic!("assembled")
    };
    assert_names(&error, "sim1");
    rig.sims[1].heal();
    rig.works();
}

/// After an update that failed half way no other is tried on top of it.
#[test]
fn a_failed_update_is_not_followed_by_another() {
    let sims = sims(&[16 * MIB; 2]);
    let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
    sims[1].inject(
        Op::Write,
        0..MIB,
        SimEffect::Fail(ErrorKind::Os(5)),
        Some(4),
    );
    assert!(volume.allocate_chunk(ChunkKind::Data, 0).is_err());
    assert!(volume.allocate_chunk(ChunkKind::Data, 0).is_err());
    assert!(volume.close().is_err());
    assert_eq!(volume.chunks().len(), 1);
    drop(volume);
    assert_eq!(
        Volume::assemble(as_devices(&sims), false)
            .unwrap()
            .chunks()
            .len(),
        1
    );
}

#[test]
fn a_transient_error_of_an_update_is_not_seen() {
    let sims = sims(&[16 * MIB; 2]);
    let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
    let eio = SimEffect::Fail(ErrorKind::Os(5));
    sims[1].inject(Op::Write, 0..MIB, eio, Some(3));
    volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
    volume.close().unwrap();
}

#[test]
fn format_refuses_what_makes_no_sense() {
    let small = sims(&[16 * MIB, 15 * MIB]);
    let Err(error) = Volume::format(as_devices(&small), &options(64 * KIB)) else {
        panic!()
    };
    assert_names(&error, "sim1");
    assert!(matches!(error.kind(), VolumeErrorKind::TooSmall { .. }));
    let good = sims(&[16 * MIB]);
    for unit in [0, 100, 2048, 96 * KIB, 32 * MIB] {
        let Err(error) = Volume::format(as_devices(&good), &options(unit)) else {
            panic!()
        };
        assert!(matches!(error.kind(), VolumeErrorKind::StripeUnit(_)));
    }
    let long = braidfs_blockdev::FormatOptions {
        label: "x".repeat(65),
        ..options(64 * KIB)
    };
    assert!(Volume::format(as_devices(&good), &long).is_err());
    assert!(
        good[0].log().iter().all(|record| record.op != Op::Write),
        "nothing was written"
    );
}

#[test]
fn read_label_tells_what_a_file_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    assert!(matches!(
        read_label(&path),
        Err(LabelError::Io(libc::ENOENT))
    ));
    std::fs::write(&path, b"short").unwrap();
    assert_eq!(read_label(&path), Err(LabelError::Missing));
    let rig = Rig::new(2);
    std::fs::write(&path, rig.sims[1].image()).unwrap();
    let info = read_label(&path).unwrap();
    assert_eq!(
        (info.device_index, info.device_count, info.clean),
        (1, 2, true)
    );
    assert_eq!(info.generation, rig.generation());
}
