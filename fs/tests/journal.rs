//! The journal: what fsync makes durable between two whole commits, without a mount.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use braidfs::fsck::{Class, Mode};
use braidfs::{FileSystem, MountError, MountOptions, ROOT_INO};
use braidfs_blockdev::device::sim::SimEffect;
use braidfs_blockdev::{BlockDevice, ErrorKind, Op, SimDevice, Volume};
use common::damage::fsck;
use common::*;

/// Where the copies of a block of the journal lie on two members, as FORMAT.md has it.
fn places(at: usize) -> [(usize, u64); 2] {
    let slot = (at / 2) as u64 * 4096;
    [(at % 2, 4096 + slot), ((at + 1) % 2, (516 << 10) + slot)]
}

/// A volume on two devices with a file "f" that says "old", which is committed whole.
fn volume() -> (Vec<Arc<SimDevice>>, Arc<FileSystem>) {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, &pattern(1, 8192));
    fs.sync().expect("sync");
    (devices, fs)
}

fn fsync(fs: &FileSystem, name: &str) {
    fs.fsync(&open(fs, name), false).expect("fsync");
}

fn rewrite(fs: &FileSystem, seed: u64) {
    write(fs, &open(fs, "f"), 0, &pattern(seed, 8192));
}

fn content(fs: &FileSystem) -> Vec<u8> {
    let ino = fs.lookup(ROOT_INO, b"f").expect("look up").ino;
    let file = fs.open(ino, libc::O_RDONLY).expect("open");
    read(fs, &file, 0, 16384)
}

fn images(devices: &[Arc<SimDevice>]) -> Vec<Vec<u8>> {
    devices.iter().map(|device| device.image()).collect()
}

#[test]
fn fsync_is_durable_without_a_whole_commit() {
    let (devices, fs) = volume();
    let before = fs.stats();
    rewrite(&fs, 2);
    fsync(&fs, "f");
    create(&fs, ROOT_INO, "g");
    fs.fsync_dir(ROOT_INO).expect("fsync of a directory");
    let after = fs.stats();
    assert_eq!(after.txg.journaled - before.txg.journaled, 2);
    assert_eq!(after.txg.commits - before.txg.commits, 2);
    let flushes = |stats: &braidfs::FsStats| -> u64 {
        stats
            .volume
            .devices
            .iter()
            .map(|device| device.flushes)
            .sum()
    };
    let members = devices.len() as u64;
    assert!(flushes(&after) - flushes(&before) <= 2 * members);
    // It can be seen, and changed, beside what is in the journal.
    assert_eq!(content(&fs), pattern(2, 8192));
    assert_eq!(names(&fs, ROOT_INO), ["f", "g"]);
    fs.unlink(ROOT_INO, b"g").expect("unlink");
    assert_eq!(names(&fs, ROOT_INO), ["f"]);
    fs.abandon();

    check(&devices);
    let untouched = images(&devices);
    let read_only = MountOptions {
        read_only: true,
        ..options()
    };
    let fs = mount_with(&devices, read_only);
    assert_eq!(content(&fs), pattern(2, 8192));
    assert_eq!(names(&fs, ROOT_INO), ["f", "g"]);
    fs.unmount().expect("unmount");
    assert!(
        images(&devices) == untouched,
        "a read-only mount has written"
    );

    // Again and again, with more behind it each time.
    for seed in 3..6 {
        let fs = mount(&devices);
        assert_eq!(content(&fs), pattern(seed - 1, 8192));
        rewrite(&fs, seed);
        fsync(&fs, "f");
        fs.abandon();
        check(&devices);
    }
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(5, 8192));
    fs.unmount().expect("unmount");
    check(&devices);
}

#[test]
fn a_read_only_mount_that_is_made_writable_goes_on_from_the_journal() {
    let (devices, fs) = volume();
    rewrite(&fs, 2);
    fsync(&fs, "f");
    fs.abandon();
    let read_only = MountOptions {
        read_only: true,
        ..options()
    };
    let fs = mount_with(&devices, read_only);
    fs.make_writable().expect("remount");
    assert_eq!(content(&fs), pattern(2, 8192));
    rewrite(&fs, 3);
    fsync(&fs, "f");
    fs.abandon();
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(3, 8192));
    fs.unmount().expect("unmount");
    check(&devices);
}

#[test]
fn a_full_journal_makes_room_by_a_whole_commit() {
    let (devices, fs) = volume();
    for seed in 2..100 {
        rewrite(&fs, seed);
        fsync(&fs, "f");
    }
    let txg = fs.stats().txg;
    assert!(txg.journaled > 80 && txg.journaled < 98, "{txg:?}");
    // What was freed is used again, so the volume has not grown.
    assert_eq!(fs.stats().space.pending_blocks % 2, 0);
    fs.abandon();
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(99, 8192));
    fs.unmount().expect("unmount");
    check(&devices);
}

#[test]
fn a_large_group_is_committed_whole() {
    let (devices, fs) = volume();
    let before = fs.stats().txg;
    let value = vec![7; 60_000];
    for name in ["a", "b"] {
        let file = create(&fs, ROOT_INO, name);
        let set = fs.setxattr(file.ino(), b"user.large", &value, 0, false);
        set.expect("setxattr");
    }
    fsync(&fs, "a");
    let after = fs.stats().txg;
    assert_eq!(after.journaled, before.journaled);
    assert_eq!(after.commits, before.commits + 1);
    fs.abandon();
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(names(&fs, ROOT_INO), ["f", "a", "b"]);
    fs.unmount().expect("unmount");
}

/// The power failed before the flush: the record is there, its data is not.
#[test]
fn a_record_that_came_without_its_data_does_not_count() {
    let (devices, fs) = volume();
    rewrite(&fs, 2);
    fsync(&fs, "f");
    rewrite(&fs, 3);
    fsync(&fs, "f");
    fs.abandon();
    let data = pattern(3, 4096);
    let mut lost = 0;
    for device in &devices {
        let image = device.image();
        for (nth, block) in image.chunks_exact(4096).enumerate() {
            if block == data {
                device.poke(nth as u64 * 4096, &[0; 4096]);
                lost += 1;
            }
        }
    }
    assert_eq!(lost, 1, "the block was written once");
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(2, 8192));
    // What replaces it is not taken for it.
    rewrite(&fs, 4);
    fsync(&fs, "f");
    fs.abandon();
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(4, 8192));
    fs.unmount().expect("unmount");
    check(&devices);
}

#[test]
fn one_copy_of_a_block_is_enough() {
    let (devices, fs) = volume();
    for seed in [2, 3, 4] {
        rewrite(&fs, seed);
        fsync(&fs, "f");
    }
    fs.abandon();
    for (at, copy) in [(0, 0), (1, 1), (2, 0)] {
        let (member, offset) = places(at)[copy];
        devices[member].flip_bit(offset + 100, 3);
    }
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(4, 8192));
    fs.unmount().expect("unmount");
}

fn mount_error(devices: &[Arc<SimDevice>]) -> String {
    let members = devices
        .iter()
        .map(|device| Arc::clone(device) as Arc<dyn BlockDevice>);
    let volume = Volume::assemble(members.collect(), false).expect("assemble");
    match FileSystem::mount(volume, options()) {
        Err(error @ MountError::Metadata(_)) => error.to_string(),
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("mounted"),
    }
}

#[test]
fn damage_in_the_middle_is_told_and_what_is_before_it_is_kept() {
    let (devices, fs) = volume();
    for seed in [2, 3, 4] {
        rewrite(&fs, seed);
        fsync(&fs, "f");
    }
    fs.abandon();
    for (member, offset) in places(1) {
        devices[member].flip_bit(offset + 100, 3);
    }
    let told = mount_error(&devices);
    for words in [
        "block 1 of the journal",
        "sim1 at byte 4096",
        "braidfs fsck",
    ] {
        assert!(told.contains(words), "{told}");
    }
    let found = fsck(&devices, Mode::Preen);
    assert!(!found.is_clean(), "nobody is asked at boot");
    let outcome = fsck(&devices, Mode::Repair);
    let classes: Vec<_> = outcome
        .found
        .classes()
        .filter(|(_, count)| *count > 0)
        .collect();
    assert_eq!(classes, [(Class::Journal, 1)]);
    assert!(outcome.is_clean());
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(2, 8192));
    fs.unmount().expect("unmount");
}

/// The last record is torn as a power cut may leave it: that is no damage.
#[test]
fn a_torn_last_record_does_not_count() {
    let (devices, fs) = volume();
    for seed in [2, 3] {
        rewrite(&fs, seed);
        fsync(&fs, "f");
    }
    fs.abandon();
    for (member, offset) in places(1) {
        devices[member].poke(offset + 512, &[0; 3584]);
        devices[member].flip_bit(offset + 100, 1);
    }
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(2, 8192));
    fs.unmount().expect("unmount");
}

/// Of two members each has a sector that cannot be read.
#[test]
fn sectors_that_cannot_be_read_hide_no_more_than_themselves() {
    let (devices, fs) = volume();
    for seed in [2, 3, 4] {
        rewrite(&fs, seed);
        fsync(&fs, "f");
    }
    fs.abandon();
    for (device, at) in devices.iter().zip([0, 1]) {
        let (_, offset) = places(at)[0];
        let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
        device.inject(Op::Read, offset..offset + 512, effect, None);
    }
    let fs = mount(&devices);
    assert_eq!(content(&fs), pattern(4, 8192));
    fs.unmount().expect("unmount");
}
