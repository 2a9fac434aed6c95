//! Devices that fail, and the edges of deletion and truncation, without a mount.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use braidfs::{Errno, FileSystem, MountOptions, ROOT_INO, SetAttr};
use braidfs_blockdev::device::sim::{SimEffect, SimHistory, SimLoss, SimReplay};
use braidfs_blockdev::{ChunkKind, ErrorKind, Op, SimDevice};
use common::*;

const MIB: usize = 1 << 20;
const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;

fn fail(devices: &[Arc<SimDevice>], op: Op, times: Option<u32>) {
    for device in devices {
        let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
        device.inject(op, 0..u64::MAX, effect, times);
    }
}

fn heal(devices: &[Arc<SimDevice>]) {
    devices.iter().for_each(|device| device.heal());
}

fn size(size: u64) -> SetAttr {
    SetAttr {
        size: Some(size),
        ..SetAttr::default()
    }
}

/// The devices as a power cut now leaves them, if everything not flushed is lost.
fn cut(history: &SimHistory, base: &SimReplay) -> Vec<Arc<SimDevice>> {
    let mut replay = base.clone();
    let events = history.events();
    events.iter().for_each(|event| replay.step(event));
    replay.wreck(SimLoss::All)
}

#[test]
fn a_failed_commit_makes_it_read_only_and_loses_nothing_durable() {
    for op in [Op::Flush, Op::Write] {
        let devices = devices(2, 32 << 20);
        format(&devices);
        let fs = mount(&devices);
        let file = create(&fs, ROOT_INO, "kept");
        let bytes = pattern(1, MIB);
        write(&fs, &file, 0, &bytes);
        fs.fsync(&file, false).unwrap();
        let lost = create(&fs, ROOT_INO, "lost");
        fail(&devices, op, None);
        assert_eq!(fs.fsync(&lost, false), Err(Errno::IO), "{op:?}");
        assert_eq!(fs.sync(), Err(Errno::IO), "{op:?}");
        heal(&devices);
        // Healed or not: it stays read-only.
        assert_eq!(fs.sync(), Err(Errno::IO), "{op:?}");
        assert_eq!(fs.mkdir(ROOT_INO, b"d", 0o755, &CRED), Err(Errno::ROFS));
        assert_eq!(
            try_write(&fs, &file, 0, b"new", false),
            Err(Errno::ROFS),
            "{op:?}"
        );
        assert_eq!(fs.unlink(ROOT_INO, b"kept"), Err(Errno::ROFS));
        assert_eq!(
            fs.setattr(file.ino(), &size(0), &CRED),
            Err(Errno::ROFS),
            "{op:?}"
        );
        assert_eq!(read(&fs, &file, 0, MIB), bytes);
        assert_eq!(fs.unmount(), Err(Errno::IO), "{op:?}");
        check(&devices);
        let fs = mount(&devices);
        assert_eq!(read(&fs, &open(&fs, "kept"), 0, MIB), bytes);
        create(&fs, ROOT_INO, "new");
        fs.unmount().unwrap();
        check(&devices);
    }
}

/// Fails writes of data, `times` on each device and chunk, but not of metadata.
fn fail_data(fs: &FileSystem, devices: &[Arc<SimDevice>], times: Option<u32>) {
    for chunk in fs.volume().chunks() {
        for member in &chunk.members {
            let end = member.offset_bytes + chunk.member_len_bytes;
            if chunk.kind == ChunkKind::Data {
                let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
                let device = &devices[usize::from(member.dev)];
                device.inject(Op::Write, member.offset_bytes..end, effect, times);
            }
        }
    }
}

#[test]
fn a_write_error_is_told_to_each_open_file_once_and_the_page_is_kept() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let old = pattern(1, MIB);
    write(&fs, &file, 0, &old);
    fs.fsync(&file, false).unwrap();
    let other = open(&fs, "f");
    let bytes = pattern(2, MIB);
    fail_data(&fs, &devices, None);
    write(&fs, &file, 0, &bytes);
    assert_eq!(fs.fsync(&file, false), Err(Errno::IO));
    assert_eq!(fs.fsync(&other, false), Err(Errno::IO));
    assert!(read(&fs, &file, 0, MIB) == bytes);
    let reserved = fs.stats().space.reserved_blocks;
    assert_eq!(reserved, 256, "each dirty page has a block");
    heal(&devices);
    // Errors of the tries meanwhile are told once, then it succeeds.
    let told = fs.fsync(&file, false);
    assert!(told.is_ok() || fs.fsync(&file, false).is_ok());
    let told = fs.flush(&other);
    assert!(told.is_ok() || fs.flush(&other).is_ok());
    assert_eq!(fs.stats().space.reserved_blocks, 0);
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    assert!(read(&fs, &open(&fs, "f"), 0, MIB) == bytes);
    fs.unmount().unwrap();
}

#[test]
fn a_direct_write_that_fails_loses_no_older_bytes() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let old = pattern(1, MIB);
    write(&fs, &file, 0, &old);
    fail_data(&fs, &devices, None);
    let direct = try_write(&fs, &file, 0, &pattern(2, MIB), true);
    assert_eq!(direct, Err(Errno::IO));
    assert!(read(&fs, &file, 0, MIB) == old);
    heal(&devices);
    fs.fsync(&file, false).unwrap();
    assert_eq!(fs.stats().space.reserved_blocks, 0);
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    assert!(read(&fs, &open(&fs, "f"), 0, MIB) == old);
    fs.unmount().unwrap();
}

#[test]
fn unmount_tells_of_data_that_could_not_be_written() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let old = pattern(1, MIB);
    write(&fs, &file, 0, &old);
    fs.fsync(&file, false).unwrap();
    fail_data(&fs, &devices, None);
    write(&fs, &file, 0, &pattern(2, MIB));
    assert_eq!(fs.unmount(), Err(Errno::IO));
    heal(&devices);
    check(&devices);
    let fs = mount(&devices);
    assert!(read(&fs, &open(&fs, "f"), 0, MIB) == old);
    fs.unmount().unwrap();
}

#[test]
fn writes_repeated_in_the_background_keep_the_accounts_through_commits() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let files: Vec<_> = (0..20)
        .map(|nth| create(&fs, ROOT_INO, &format!("f{nth}")))
        .collect();
    fs.sync().unwrap();
    for round in 0..30 {
        fail_data(&fs, &devices, Some(3));
        for file in &files {
            write(&fs, file, round % 3 * 5000, &pattern(round, 50_000));
        }
        fs.sync().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        fs.sync().unwrap();
    }
    heal(&devices);
    fs.sync().unwrap();
    fs.sync().unwrap();
    assert_eq!(fs.stats().space.reserved_blocks, 0);
    for file in &files {
        assert!(read(&fs, file, 10_000, 50_000) == pattern(29, 50_000));
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// A write that a device did not answer lands late, after everything else took its turn.
#[test]
fn blocks_of_a_write_that_was_given_up_are_not_used_before_it_is_over() {
    for set_aside in [false, true] {
        let devices = devices(2, 24 << 20);
        format(&devices);
        let members = timed::members(&devices, Duration::from_millis(200));
        let fs = mount_members(members, options());
        let file = create(&fs, ROOT_INO, "f");
        if set_aside {
            fs.fallocate(&file, 0, 0, MIB as u64).unwrap();
        }
        // So that there is a chunk to write to.
        let first = create(&fs, ROOT_INO, "first");
        write(&fs, &first, 0, &pattern(1, MIB));
        fs.fsync(&file, false).unwrap();
        devices.iter().for_each(|device| device.hold(true));
        write(&fs, &file, 0, &pattern(2, MIB));
        assert_eq!(fs.fsync(&file, false), Err(Errno::IO));
        let held: usize = devices.iter().map(|device| device.held().len()).sum();
        assert!(held > 0);
        devices.iter().for_each(|device| device.hold(false));
        let until = Instant::now() + Duration::from_secs(20);
        while fs.volume().silent_device().is_some() {
            assert!(Instant::now() < until, "the devices answer now");
            std::thread::sleep(Duration::from_millis(5));
        }
        let bytes = pattern(3, MIB);
        write(&fs, &file, 0, &bytes);
        let told = fs.fsync(&file, false);
        assert!(told.is_ok() || fs.fsync(&file, false).is_ok());
        let mut others = Vec::new();
        for nth in 0.. {
            let other = create(&fs, ROOT_INO, &format!("other{nth}"));
            let taken = try_write(&fs, &other, 0, &pattern(100 + nth, MIB), false);
            if taken != Ok(MIB as u32) || fs.fsync(&other, false).is_err() {
                fs.unlink(ROOT_INO, format!("other{nth}").as_bytes())
                    .unwrap();
                fs.release(&other);
                break;
            }
            others.push(other);
        }
        assert!(others.len() > 3);
        devices.iter().for_each(|device| device.release_all());
        fs.sync().unwrap();
        fs.unmount().unwrap();
        check(&devices);
        let fs = mount(&devices);
        assert!(read(&fs, &open(&fs, "f"), 0, MIB) == bytes, "{set_aside}");
        for nth in 0..others.len() as u64 {
            let other = open(&fs, &format!("other{nth}"));
            assert!(read(&fs, &other, 0, MIB) == pattern(100 + nth, MIB));
        }
        fs.unmount().unwrap();
    }
}

/// While a device does not answer nothing is committed, and nothing is lost.
#[test]
fn a_silence_ends_without_a_trace() {
    let devices = devices(2, 24 << 20);
    format(&devices);
    let members = timed::members(&devices, Duration::from_millis(200));
    let fs = mount_members(members, options());
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, &pattern(1, MIB));
    fs.sync().unwrap();
    devices[0].hold(true);
    devices[1].hold(true);
    write(&fs, &file, 0, &pattern(2, MIB));
    assert_eq!(fs.fsync(&file, false), Err(Errno::IO));
    let begun = Instant::now();
    create(&fs, ROOT_INO, "g");
    assert_eq!(fs.sync(), Err(Errno::IO));
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert!(fs.stats().txg.refusals > 0);
    assert!(read(&fs, &file, 0, MIB) == pattern(2, MIB));
    for device in &devices {
        device.hold(false);
        device.release_all();
    }
    fs.sync().unwrap();
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    assert_eq!(names(&fs, ROOT_INO), ["f", "g"]);
    assert!(read(&fs, &open(&fs, "f"), 0, MIB) == pattern(2, MIB));
    fs.unmount().unwrap();
}

/// An error of a metadata write that passes is not seen.
#[test]
fn a_commit_survives_errors_that_pass() {
    let devices = devices(2, 32 << 20);
    format(&devices);
    let fs = mount(&devices);
    for nth in 0..5 {
        let file = create(&fs, ROOT_INO, &format!("f{nth}"));
        fail(&devices, Op::Write, Some(2));
        fs.fsync(&file, false).unwrap();
        heal(&devices);
        fs.release(&file);
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// A file with more extents than one step of a truncation takes.
fn splintered(fs: &FileSystem, name: &str) -> Arc<braidfs::OpenFile> {
    let file = create(fs, ROOT_INO, name);
    for nth in 0..4500 {
        write(fs, &file, nth * 8192, b"x");
    }
    fs.sync().unwrap();
    file
}

#[test]
fn an_unlinked_file_that_is_truncated_in_steps_is_still_deleted_after_a_power_cut() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let base = SimReplay::new(&devices);
    let history = SimHistory::of(&devices);
    let fs = mount_with(&devices, options());
    let file = splintered(&fs, "f");
    fs.unlink(ROOT_INO, b"f").unwrap();
    fs.sync().unwrap();
    fs.setattr(file.ino(), &size(5000), &CRED).unwrap();
    fs.sync().unwrap();
    let wrecks = cut(&history, &base);
    let report = check(&wrecks);
    assert_eq!((report.inodes, report.orphans), (2, 1));
    let after = mount(&wrecks);
    after.unmount().unwrap();
    let report = check(&wrecks);
    assert_eq!((report.inodes, report.data_blocks), (1, 0));
    fs.release(&file);
    fs.unmount().unwrap();
}

#[test]
fn truncation_passes_thousands_of_blocks_set_aside_behind_the_end() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, &pattern(1, 10_000));
    for nth in 0..4500 {
        fs.fallocate(&file, KEEP, (1 << 20) + nth * 8192, 1)
            .unwrap();
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let worker = {
        let (fs, file) = (Arc::clone(&fs), Arc::clone(&file));
        std::thread::spawn(move || {
            fs.setattr(file.ino(), &size(100), &CRED).unwrap();
            sender.send(()).unwrap();
        })
    };
    let ended = receiver.recv_timeout(Duration::from_secs(30));
    assert!(ended.is_ok(), "the truncation ends");
    worker.join().unwrap();
    fs.sync().unwrap();
    assert_eq!(fs.getattr(file.ino()).unwrap().blocks, 8);
    assert_eq!(read(&fs, &file, 0, 200), pattern(1, 10_000)[..100]);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn blocks_set_aside_behind_the_end_go_with_the_file() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let free = fs.statfs().bfree;
    let file = create(&fs, ROOT_INO, "f");
    fs.fallocate(&file, KEEP, 0, 10 << 20).unwrap();
    assert_eq!(fs.getattr(file.ino()).unwrap().blocks, 20 << 10);
    fs.unlink(ROOT_INO, b"f").unwrap();
    fs.release(&file);
    fs.forget(file.ino(), 1);
    fs.unmount().unwrap();
    assert_eq!(check(&devices).data_blocks, 0);
    let fs = mount(&devices);
    assert_eq!(fs.statfs().bfree, free);
    fs.unmount().unwrap();
}

/// A volume with a file of these bytes after a power cut, with an orphan, and after a clean end.
fn after_a_power_cut_and_clean(bytes: &[u8]) -> [Vec<Arc<SimDevice>>; 2] {
    let devices = devices(2, 32 << 20);
    format(&devices);
    let base = SimReplay::new(&devices);
    let history = SimHistory::of(&devices);
    let fs = mount_with(&devices, options());
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, bytes);
    fs.fsync(&file, false).unwrap();
    create(&fs, ROOT_INO, "open");
    fs.unlink(ROOT_INO, b"open").unwrap();
    fs.sync().unwrap();
    let wrecks = cut(&history, &base);
    fs.unmount().unwrap();
    [wrecks, devices]
}

#[test]
fn a_read_only_mount_goes_on_writing_when_told() {
    let bytes = pattern(1, MIB);
    for devices in after_a_power_cut_and_clean(&bytes) {
        let read_only = MountOptions {
            read_only: true,
            ..options()
        };
        let fs = mount_with(&devices, read_only);
        let attr = fs.lookup(ROOT_INO, b"f").unwrap();
        let file = fs.open(attr.ino, libc::O_RDONLY).unwrap();
        assert!(read(&fs, &file, 0, MIB) == bytes);
        assert_eq!(fs.open(attr.ino, libc::O_RDWR).err(), Some(Errno::ROFS));
        fs.make_writable().unwrap();
        fs.make_writable().unwrap();
        assert!(read(&fs, &file, 0, MIB) == bytes, "an open file goes on");
        let again = fs.open(attr.ino, libc::O_RDWR).unwrap();
        write(&fs, &again, 100, b"new");
        fs.fsync(&again, false).unwrap();
        fs.release(&again);
        fs.release(&file);
        create(&fs, ROOT_INO, "g");
        fs.unmount().unwrap();
        let report = check(&devices);
        assert_eq!(report.orphans, 0);
        let fs = mount(&devices);
        assert_eq!(names(&fs, ROOT_INO), ["f", "g"]);
        assert_eq!(read(&fs, &open(&fs, "f"), 99, 5)[1..4], *b"new");
        fs.unmount().unwrap();
    }
}

#[test]
fn a_read_only_mount_writes_nothing_even_after_a_power_cut() {
    let bytes = pattern(1, MIB);
    for devices in after_a_power_cut_and_clean(&bytes) {
        let before: Vec<_> = devices.iter().map(|device| device.image()).collect();
        devices.iter().for_each(|device| device.clear_log());
        let read_only = MountOptions {
            read_only: true,
            atime: braidfs::AtimeMode::Strictatime,
            commit_interval: Duration::from_millis(20),
            ..options()
        };
        let fs = mount_with(&devices, read_only);
        let attr = fs.lookup(ROOT_INO, b"f").unwrap();
        let file = fs.open(attr.ino, libc::O_RDONLY).unwrap();
        assert!(read(&fs, &file, 0, MIB) == bytes);
        assert_eq!(fs.open(attr.ino, libc::O_RDWR).err(), Some(Errno::ROFS));
        assert_eq!(fs.unlink(ROOT_INO, b"f"), Err(Errno::ROFS));
        assert_eq!(fs.removexattr(attr.ino, b"user.x"), Err(Errno::ROFS));
        assert_eq!(fs.fallocate(&file, 0, 0, 1), Err(Errno::ROFS));
        std::thread::sleep(Duration::from_millis(100));
        fs.sync().unwrap();
        fs.unmount().unwrap();
        for (device, before) in devices.iter().zip(before) {
            assert!(
                device.image() == before,
                "{} changed",
                braidfs_blockdev::BlockDevice::name(&**device)
            );
            assert!(device.log().iter().all(|record| record.op == Op::Read));
        }
    }
}
