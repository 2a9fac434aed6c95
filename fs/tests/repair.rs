//! What a repair must be whatever is broken: random damage to many records at once, metadata pages
//! that cannot be read, and a power cut at any point of it.
//!
//! `SEED=n` repeats one round of the random damage, `ROUNDS=n` sets how many there are.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use braidfs::fsck::raw::{self, Record};
use braidfs::fsck::{Class, Mode};
use braidfs::{Ino, ROOT_INO};
use braidfs_blockdev::device::sim::{SimHistory, SimLoss, SimReplay};
use braidfs_blockdev::{ChunkKind, SimDevice, Volume};
use common::damage::*;
use common::rng::Rng;
use common::*;

/// Some damage of all kinds, by lot; the inodes that it touches go to `touched`.
fn random_damage(rng: &mut Rng, touched: &mut BTreeSet<Ino>) -> Vec<Record> {
    let records = &sample().records;
    (0..1 + rng.below(12))
        .map(|_| {
            let (table, key, value) = rng.pick(records).clone();
            let mut value = value.expect("records have values");
            if matches!(table, "inodes" | "extents" | "xattrs") {
                touched.insert(Ino::from_be_bytes(key[..8].try_into().unwrap()));
            }
            match rng.below(5) {
                0 => (table, key, None),
                1 if table != "free" => {
                    let (_, _, other) =
                        rng.pick(&records.iter().filter(|r| r.0 == table).collect::<Vec<_>>());
                    (table, key, other.clone())
                }
                2 if table != "free" => {
                    value.truncate(rng.below(value.len() as u64 + 1) as usize);
                    (table, key, Some(value))
                }
                _ => {
                    for _ in 0..1 + rng.below(3) {
                        let at = rng.below(value.len() as u64) as usize;
                        if let Some(byte) = value.get_mut(at) {
                            *byte = rng.next() as u8;
                        }
                    }
                    (table, key, Some(value))
                }
            }
        })
        .collect()
}

#[test]
fn random_damage_is_repaired_and_other_files_keep_their_data() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|n| n.parse().expect("a number"))
    };
    let (first, rounds) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (1, number("ROUNDS").unwrap_or(40)),
    };
    for seed in first..first + rounds {
        println!("SEED={seed}");
        let mut touched = BTreeSet::new();
        let records = random_damage(&mut Rng::of(seed, 0), &mut touched);
        let devices = sample().damaged(&records);
        let outcome = fsck(&devices, Mode::Repair);
        let left = outcome.left.as_ref().unwrap_or(&outcome.found);
        assert!(
            left.is_clean(),
            "SEED={seed}: {:#?} left {:#?}",
            outcome.found.problems,
            left.problems
        );
        check(&devices);
        let fs = mount(&devices);
        for (ino, node) in &sample().tree.0 {
            if touched.contains(ino) || node.attr[0] & libc::S_IFMT != libc::S_IFREG {
                continue;
            }
            let attr = fs
                .getattr(*ino)
                .unwrap_or_else(|e| panic!("SEED={seed}: {ino}: {e:?}"));
            assert_eq!(attr.size, node.size, "SEED={seed}: inode {ino}");
            let file = fs.open(*ino, libc::O_RDONLY).expect("open");
            let bytes = read(&fs, &file, 0, attr.size as usize);
            fs.release(&file);
            for (&at, &crc) in &node.pages {
                let from = at as usize * 4096;
                let mut page = bytes[from..bytes.len().min(from + 4096)].to_vec();
                page.resize(4096, 0);
                assert_eq!(
                    crc32c::crc32c(&page),
                    crc,
                    "SEED={seed}: inode {ino}, page {at}"
                );
            }
        }
        fs.unmount().expect("unmount");
        check(&devices);
    }
}

#[test]
fn a_power_cut_in_a_repair_leaves_the_old_state_or_the_repaired_one() {
    let s = sample();
    let (long, b, deep) = (s.ino("a/long"), s.ino("b"), s.ino("b/c/d/deep"));
    let (key, listed) = s.entry(b, "c");
    let (_, block, _) = extent("other");
    let records = [
        patched("inodes", inode(long), 4, &[7]),
        gone("dentries", key),
        gone("cookies", listed),
        patched("extents", extent("b/c/d/deep").0, 0, &le(block)),
        set("free", le(free_run().0).to_vec(), le(5).to_vec()),
    ];
    let devices = s.damaged(&records);
    let old = raw::read(assemble(&devices, true)).expect("read");
    let mut replay = SimReplay::new(&devices);
    let history = SimHistory::of(&devices);
    let outcome = fsck(&devices, Mode::Repair);
    assert!(outcome.left.is_some_and(|left| left.is_clean()));
    let new = raw::read(assemble(&devices, true)).expect("read");
    assert!(old != new && deep > 0);
    let (mut olds, mut news) = (0, 0);
    for (number, event) in history.events().iter().enumerate() {
        replay.step(event);
        let loss = SimLoss::draw(number as u64, replay.pending(), replay.devices());
        let wrecks = replay.wreck(loss);
        let volume = Volume::assemble(wrecks.iter().map(|w| w.clone() as _).collect(), true);
        let found = raw::read(volume.expect("assemble")).expect("read");
        if found == old {
            olds += 1;
            if number % 7 == 0 {
                let left = fsck(&wrecks, Mode::Repair).left;
                assert!(left.is_some_and(|left| left.is_clean()));
                check(&wrecks);
            }
        } else {
            assert!(
                found == new,
                "event {number}, {loss:?}: neither old nor new"
            );
            news += 1;
            check(&wrecks);
        }
    }
    println!("{olds} old, {news} new");
    assert!(olds > 0 && news > 0);
}

/// Whether a page is a leaf of redb's that has these bytes in a record, not in what is left of
/// another page.
fn leaf_has(page: &[u8], bytes: &[u8]) -> bool {
    let count = usize::from(u16::from_le_bytes([page[2], page[3]]));
    let last = 4 + 8 * count - 4 * usize::from(count > 0);
    let end = page
        .get(last..last + 4)
        .filter(|_| page[0] == 1 && count > 0);
    let end = end.map_or(0, |end| {
        u32::from_le_bytes(end.try_into().unwrap()) as usize
    });
    let live = page.get(..end).unwrap_or_default();
    live.windows(bytes.len()).any(|window| window == bytes)
}

/// Damages, in both copies, every page of the metadata that has these bytes; returns how many.
fn damage_pages(devices: &[Arc<SimDevice>], bytes: &[u8]) -> usize {
    let volume = assemble(devices, true);
    let chunks = volume.chunks();
    let meta = chunks.iter().filter(|c| c.kind == ChunkKind::Meta);
    let mut damaged = 0;
    for member in meta.flat_map(|chunk| chunk.members.iter().map(move |m| (chunk, m))) {
        let (chunk, member) = member;
        let device = &devices[usize::from(member.dev)];
        for offset in (0..chunk.member_len_bytes).step_by(4096) {
            let at = member.offset_bytes + offset;
            let page = device.peek(at, 4096);
            if leaf_has(&page, bytes) {
                device.flip_bit(at + 2000, 3);
                damaged += 1;
            }
        }
    }
    damaged
}

#[test]
fn tables_with_pages_that_cannot_be_read_are_built_anew_from_the_rest() {
    let s = sample();
    let c = s.ino("b/c");
    let long = s.ino("a/long");
    let needles = [
        name_key(c, "many7"),
        pair_key(long, 0),
        b"inode_count".to_vec(),
        b"user.note".to_vec(),
        pair_key(1, 2),
    ];
    for needle in &needles {
        let devices = s.devices();
        assert!(damage_pages(&devices, needle) > 0, "{needle:?}");
        let before: Vec<_> = devices.iter().map(|device| device.image()).collect();
        let found = fsck(&devices, Mode::Check);
        assert!(
            classes(&found).contains(&Class::Store),
            "{:#?}",
            found.found.problems
        );
        assert!(
            before
                .iter()
                .eq(&devices.iter().map(|d| d.image()).collect::<Vec<_>>())
        );
        let outcome = fsck(&devices, Mode::Repair);
        let left = outcome.left.expect("repaired");
        assert!(left.is_clean(), "{needle:?} left {:#?}", left.problems);
        check(&devices);
        let fs = mount(&devices);
        let file = create(&fs, ROOT_INO, "after the repair");
        write(&fs, &file, 0, &pattern(9, 100_000));
        fs.release(&file);
        fs.unmount().expect("unmount");
        check(&devices);
        println!(
            "{} problems, tree of {}",
            outcome.found.problem_count,
            tree(&devices).0.len()
        );
    }
    // Names that are lost in one table are still in the other.
    let devices = s.devices();
    damage_pages(&devices, &needles[0]);
    let differences = s.tree.differences(&repair(&devices));
    assert!(differences.is_empty(), "{differences:#?}");
}
