//! Freezing: nothing on the devices changes, reading goes on, and it always ends.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use braidfs::{Errno, FileSystem, FreezeError, MountOptions, ROOT_INO};
use braidfs_blockdev::device::sim::{SimEffect, SimPower};
use braidfs_blockdev::{ErrorKind, Op, SimDevice};
use common::*;

const LONG: Duration = Duration::from_secs(600);

/// A change on a thread of its own, and whether it is done.
fn change(fs: &Arc<FileSystem>, name: &str) -> (thread::JoinHandle<()>, Arc<AtomicBool>) {
    let done = Arc::new(AtomicBool::new(false));
    let (fs, name, told) = (Arc::clone(fs), name.to_owned(), Arc::clone(&done));
    let changer = thread::spawn(move || {
        create(&fs, ROOT_INO, &name);
        told.store(true, Ordering::SeqCst);
    });
    (changer, done)
}

fn images(devices: &[Arc<SimDevice>]) -> Vec<Vec<u8>> {
    devices.iter().map(|device| device.image()).collect()
}

#[test]
fn nothing_changes_while_it_is_frozen_and_reading_goes_on() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let options = MountOptions {
        commit_interval: Duration::from_millis(20),
        ..options()
    };
    let fs = mount_with(&devices, options);
    let file = create(&fs, ROOT_INO, "file");
    let bytes = pattern(1, 3 << 20);
    write(&fs, &file, 0, &bytes);
    fs.freeze(LONG).unwrap();
    assert!(fs.frozen_for().is_some_and(|left| left > LONG / 2));
    assert_eq!(fs.freeze(LONG), Err(FreezeError::Already));
    let before = images(&devices);
    let (changer, changed) = change(&fs, "new");
    let (writer, written) = {
        let (fs, file, done) = (
            Arc::clone(&fs),
            Arc::clone(&file),
            Arc::new(AtomicBool::new(false)),
        );
        let told = Arc::clone(&done);
        let writer = thread::spawn(move || {
            write(&fs, &file, 0, b"changed");
            told.store(true, Ordering::SeqCst);
        });
        (writer, done)
    };
    // Several commit intervals; and who wants something durable has it.
    for _ in 0..10 {
        assert!(read(&fs, &file, 0, bytes.len()) == bytes);
        assert_eq!(names(&fs, ROOT_INO), ["file"]);
        assert_eq!(fs.fsync(&file, false), Ok(()));
        assert_eq!(fs.sync(), Ok(()));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!changed.load(Ordering::SeqCst) && !written.load(Ordering::SeqCst));
    assert!(images(&devices) == before, "a frozen volume was written to");
    assert!(fs.thaw());
    assert!(!fs.thaw() && fs.frozen_for().is_none());
    changer.join().unwrap();
    writer.join().unwrap();
    fs.unmount().unwrap();
    check(&devices);
    // What was on the devices while it was frozen is a file system with everything up to then.
    let copies: Vec<_> = before
        .into_iter()
        .enumerate()
        .map(|(nth, image)| SimDevice::from_image(&format!("copy{nth}"), image, &SimPower::new()))
        .collect();
    let copy = mount(&copies);
    assert_eq!(names(&copy, ROOT_INO), ["file"]);
    assert!(read(&copy, &open(&copy, "file"), 0, bytes.len()) == bytes);
    copy.unmount().unwrap();
    check(&copies);
}

#[test]
fn a_freeze_ends_by_its_limit() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let began = Instant::now();
    fs.freeze(Duration::from_millis(300)).unwrap();
    let (changer, _) = change(&fs, "new");
    changer.join().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(250));
    assert!(fs.frozen_for().is_none());
    // The limit of one freeze does not end the next.
    fs.freeze(Duration::from_millis(100)).unwrap();
    assert!(fs.thaw());
    fs.freeze(LONG).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(fs.frozen_for().is_some());
    fs.thaw();
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn unmounting_ends_it() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    create(&fs, ROOT_INO, "file");
    fs.freeze(LONG).unwrap();
    let (changer, _) = change(&fs, "late");
    thread::sleep(Duration::from_millis(50));
    let began = Instant::now();
    fs.thaw_at_end();
    changer.join().unwrap();
    fs.freeze(LONG).unwrap();
    fs.unmount().unwrap();
    assert!(began.elapsed() < Duration::from_secs(20));
    check(&devices);
    assert_eq!(names(&mount(&devices), ROOT_INO).len(), 2);
}

#[test]
fn what_is_left_for_the_thaw_is_begun_then() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let (to, begun) = channel();
    let leave = |bytes: usize, number: i32| {
        let to = to.clone();
        fs.leave_until_thaw(bytes, || Box::new(move || to.send(number).unwrap()))
    };
    assert!(!leave(1, 1), "nothing waits");
    fs.freeze(LONG).unwrap();
    assert!(leave(60 << 20, 2));
    assert!(!leave(60 << 20, 3), "there is no room for so much");
    assert!(leave(1 << 20, 4));
    assert!(begun.try_recv().is_err());
    fs.thaw();
    assert_eq!(begun.try_iter().collect::<Vec<_>>(), [2, 4]);
    // At the end of a mount nobody waits for it any more.
    fs.freeze(LONG).unwrap();
    assert!(leave(60 << 20, 5), "the room is there again");
    fs.unmount().unwrap();
    assert!(begun.try_recv().is_err());
}

/// Operations under way, by several threads, while it is frozen again and again: all of them end,
/// and each freeze has them whole.
#[test]
fn freezes_beside_writers() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let stop = Arc::new(AtomicBool::new(false));
    let worker = |number: u64| {
        let (fs, stop) = (Arc::clone(&fs), Arc::clone(&stop));
        thread::spawn(move || {
            let mut round = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                let name = format!("{number}-{}", round % 7);
                let file = create(&fs, ROOT_INO, &name);
                write(&fs, &file, 0, &pattern(round, 100_000));
                fs.unlink(ROOT_INO, name.as_bytes()).unwrap();
                fs.release(&file);
                fs.forget(file.ino(), 1);
                round += 1;
            }
            round
        })
    };
    let workers: Vec<_> = (0..3).map(worker).collect();
    for _ in 0..20 {
        fs.freeze(LONG).unwrap();
        let before = images(&devices);
        thread::sleep(Duration::from_millis(20));
        assert!(images(&devices) == before);
        fs.thaw();
        thread::sleep(Duration::from_millis(5));
    }
    stop.store(true, Ordering::SeqCst);
    let rounds: Vec<u64> = workers
        .into_iter()
        .map(|worker| worker.join().unwrap())
        .collect();
    assert!(rounds.iter().all(|&count| count > 0), "{rounds:?}");
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn what_cannot_be_made_durable_is_not_frozen() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "file");
    write(&fs, &file, 0, b"bytes");
    let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
    devices[0].inject(Op::Write, 0..64 << 20, effect, None);
    assert_eq!(fs.freeze(LONG), Err(FreezeError::Unwritten(Errno::IO)));
    assert!(fs.frozen_for().is_none());
}
