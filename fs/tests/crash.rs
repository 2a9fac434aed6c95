//! Power cuts and failing devices, without a mount, on simulated devices.
//!
//! A random workload runs on devices that record every write and flush. Then, for points of that
//! record, the devices are made as a power cut there may have left them, and mounted. What is
//! found must be the state after some operation of the history, whole: names, attributes and
//! every byte; not older than what fsync or sync promised; and sound.
//!
//! `SEED=n` repeats one workload, `OPS=n` sets its length, `STATES=n` the number of power cuts.
#![allow(missing_docs)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use braidfs::{FileSystem, MountOptions, ROOT_INO};
use braidfs_blockdev::SimDevice;
use braidfs_blockdev::device::sim::{SimEvent, SimHistory, SimLoss, SimReplay};
use common::dump::{Dump, dump};
use common::rng::Rng;
use common::world::{Done, Journal, Limits, World};
use common::*;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

fn small_cache() -> MountOptions {
    MountOptions {
        cache_bytes: braidfs::CACHE_BYTES_MIN,
        ..options()
    }
}

/// A workload that ran: what reached the devices in which order, and what the tree was after
/// each operation.
struct History {
    base: SimReplay,
    events: Vec<SimEvent>,
    /// After operation n, from 0.
    dumps: Vec<Dump>,
    /// No state older than this may be found once operation n had ended.
    durable: Vec<u64>,
}

fn record(seed: u64, ops: u64) -> History {
    let count = 1 + seed % 3;
    let devices = devices(count as usize, (60 << 20) / count);
    format(&devices);
    let base = SimReplay::new(&devices);
    let recorder = SimHistory::of(&devices);
    let fs = mount_with(&devices, small_cache());
    let limits = Limits {
        size: 150 << 10,
        io: 100 << 10,
        total: 3 << 20,
        names: 6,
        inodes: 150,
        wide: false,
        sync_every: 12,
        compare: false,
    };
    let journal = Journal::new(false, std::env::var_os("TRACE").is_some());
    let mut world = World::new(fs, seed, limits, &journal);
    let mut history = History {
        base,
        events: Vec::new(),
        dumps: vec![world.model.dump()],
        durable: vec![0],
    };
    recorder.mark(0);
    for now in 1..=ops {
        let done = world.step(now);
        let former = history.durable.last().copied().unwrap_or(0);
        history.durable.push(match done {
            Done::Plain => former,
            Done::Synced => now,
            Done::FileSynced(ino) => former.max(world.model.node(ino).changed),
        });
        history.dumps.push(world.model.dump());
        recorder.mark(now);
    }
    world.handles.clear();
    world.fs.unmount().expect("unmount");
    history.events = recorder.events();
    history
}

/// The devices after a power cut, and what may be found on them.
struct State {
    wrecks: Vec<Arc<SimDevice>>,
    /// The oldest and the youngest state that may be found.
    range: (u64, u64),
    /// For the message.
    what: String,
    /// Some are also checked as they are, some worked on afterwards.
    number: u64,
}

fn check_state(history: &History, state: &State) {
    let (oldest, youngest) = state.range;
    if state.number.is_multiple_of(2) {
        check(&state.wrecks);
    }
    let recorder = SimHistory::of(&state.wrecks);
    let thorough = state.number.is_multiple_of(8);
    let base = thorough.then(|| SimReplay::new(&state.wrecks));
    let fs = mount_with(&state.wrecks, small_cache());
    let found = dump(&fs);
    let is_found = |n: &u64| history.dumps[*n as usize] == found;
    let Some(at) = (oldest..=youngest).rev().find(is_found) else {
        let elsewhere = (0..history.dumps.len() as u64).find(is_found);
        let differences: Vec<_> = (oldest..=youngest)
            .rev()
            .take(3)
            .map(|n| (n, history.dumps[n as usize].differences(&found)))
            .collect();
        panic!(
            "{}: no state of operations {oldest}..={youngest} was found (but that of \
             {elsewhere:?}); against the youngest: {differences:#?}",
            state.what
        );
    };
    if let Some(mut base) = base {
        let file = create(&fs, ROOT_INO, "after");
        let bytes = Rng(at).bytes(70_000);
        write(&fs, &file, 0, &bytes);
        fs.fsync(&file, false).expect("fsync");
        assert_eq!(read(&fs, &file, 0, bytes.len() + 1), bytes);
        fs.unlink(ROOT_INO, b"after").expect("unlink");
        fs.release(&file);
        fs.forget(file.ino(), 1);
        fs.unmount().expect("unmount");
        assert_eq!(check(&state.wrecks).orphans, 0);
        // The power fails once more, while the mount after the first cut is at work.
        let events = recorder.events();
        let mut rng = Rng(at);
        let end = rng.below(events.len() as u64 + 1) as usize;
        for event in &events[..end] {
            base.step(event);
        }
        let again = base.wreck(SimLoss::draw(rng.next(), base.pending(), base.devices()));
        check(&again);
        let fs = mount_with(&again, small_cache());
        let mut now = dump(&fs);
        now.0.remove(&file.ino());
        if let Some(root) = now.0.get_mut(&ROOT_INO) {
            root.entries.remove(&b"after"[..]);
        }
        let differences = found.differences(&now);
        assert!(differences.is_empty(), "{}: {differences:#?}", state.what);
        fs.unmount().expect("unmount");
        check(&again);
    } else {
        fs.unmount().expect("unmount");
    }
}

/// Makes wrecks with `make`, which hands each to the sender, and checks them on two threads;
/// returns how many. After the first that is not as it should be the others are passed over.
fn check_all<T: Send>(make: impl FnOnce(&mut dyn FnMut(T)), check_one: impl Fn(T) + Sync) -> usize {
    let (sender, receiver) = sync_channel(4);
    let receiver = Mutex::new(receiver);
    let (failed, total) = (AtomicBool::new(false), AtomicUsize::new(0));
    let worker = || {
        let mut outcome = Ok(());
        loop {
            let next = receiver.lock().expect("nobody panics with it").recv();
            let Ok(state) = next else { break };
            if failed.load(Ordering::SeqCst) {
                continue;
            }
            outcome = catch_unwind(AssertUnwindSafe(|| check_one(state)));
            failed.fetch_or(outcome.is_err(), Ordering::SeqCst);
            if outcome.is_err() {
                // The other one takes the rest.
                break;
            }
            total.fetch_add(1, Ordering::SeqCst);
        }
        while failed.load(Ordering::SeqCst) {
            let next = receiver.lock().expect("nobody panics with it").recv();
            if next.is_err() {
                break;
            }
        }
        outcome
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(worker), scope.spawn(worker)];
        make(&mut |state| sender.send(state).expect("the workers live"));
        drop(sender);
        for worker in workers {
            if let Err(panic) = worker.join().expect("it catches") {
                resume_unwind(panic);
            }
        }
    });
    total.load(Ordering::SeqCst)
}

fn cut_everywhere(seed: u64, ops: u64, states_wanted: u64) -> usize {
    let history = record(seed, ops);
    let points = history.events.iter();
    let points = points.filter(|event| !matches!(event, SimEvent::Mark(_)));
    let points = points.count() as u64;
    let make = |send: &mut dyn FnMut(State)| {
        let mut rng = Rng(seed);
        let mut replay = history.base.clone();
        let (mut ended, mut made) = (0, 0);
        for (nth, event) in history.events.iter().enumerate() {
            replay.step(event);
            if let SimEvent::Mark(number) = event {
                ended = *number;
                continue;
            }
            // At a few points several kinds of loss, at the others one of them or none.
            let losses = match rng.below(points) {
                drawn if drawn < states_wanted / 10 => 6,
                drawn if drawn < states_wanted => 1,
                _ => 0,
            };
            for _ in 0..losses {
                let loss = SimLoss::draw(rng.next(), replay.pending(), replay.devices());
                send(State {
                    wrecks: replay.wreck(loss),
                    range: (history.durable[ended as usize], (ended + 1).min(ops)),
                    what: format!("SEED={seed}: cut after event {nth}, {loss}"),
                    number: made,
                });
                made += 1;
            }
        }
    };
    check_all(make, |state| check_state(&history, &state))
}

#[test]
fn after_a_power_cut_anywhere_a_prefix_of_the_history_is_there() {
    let began = Instant::now();
    let (ops, states) = (
        number("OPS").unwrap_or(400),
        number("STATES").unwrap_or(250),
    );
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..1 + number("RUNS").unwrap_or(6),
    };
    let runs = seeds.end - seeds.start;
    let total: usize = seeds.map(|seed| cut_everywhere(seed, ops, states)).sum();
    println!(
        "{total} power cuts in {runs} workloads, {:?}",
        began.elapsed()
    );
}

/// Bytes of version `version` of the file that thread `thread` replaces again and again.
fn version_bytes(thread: u64, version: u64) -> Vec<u8> {
    let mut rng = Rng(thread << 32 | version);
    let len = 20_000 + rng.below(60_000) as usize;
    rng.bytes(len)
}

/// Writes a new file in two pieces and renames it over the old one, without fsync.
fn replace_forever(fs: &FileSystem, thread: u64, ended: &AtomicU64, until: Instant) {
    let (name, new) = (format!("f{thread}"), format!("new{thread}"));
    for version in 1.. {
        if Instant::now() > until {
            return;
        }
        let file = create(fs, ROOT_INO, &new);
        let bytes = version_bytes(thread, version);
        let (one, two) = bytes.split_at(9000);
        write(fs, &file, 0, one);
        write(fs, &file, 9000, two);
        fs.release(&file);
        fs.forget(file.ino(), 1);
        fs.rename(
            ROOT_INO,
            new.as_bytes(),
            ROOT_INO,
            name.as_bytes(),
            0,
            &CRED,
        )
        .expect("rename");
        ended.store(version, Ordering::SeqCst);
    }
}

#[test]
fn files_replaced_by_many_threads_are_old_or_new_and_whole() {
    const THREADS: u64 = 4;
    let states = number("STATES").unwrap_or(300);
    let devices = devices(2, 48 << 20);
    format(&devices);
    let base = SimReplay::new(&devices);
    let recorder = SimHistory::of(&devices);
    let fs = mount_with(&devices, small_cache());
    let ended: Vec<_> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let versions = || -> Vec<u64> {
        let loaded = ended.iter().map(|ended| ended.load(Ordering::SeqCst));
        loaded.collect()
    };
    // What each sync promised.
    let mut promised = vec![vec![0; THREADS as usize]];
    let until = Instant::now() + Duration::from_millis(1500);
    std::thread::scope(|scope| {
        for (thread, ended) in (0..).zip(&ended) {
            let fs = &fs;
            scope.spawn(move || replace_forever(fs, thread, ended, until));
        }
        while Instant::now() < until {
            let before = versions();
            fs.sync().expect("sync");
            recorder.mark(promised.len() as u64);
            promised.push(before);
        }
    });
    fs.unmount().expect("unmount");
    let last = versions();
    let events = recorder.events();
    let points = events.len() as u64;
    let check_one = |(wrecks, least, what): (Vec<Arc<SimDevice>>, &Vec<u64>, String)| {
        let fs = mount_with(&wrecks, small_cache());
        for (thread, (&least, &last)) in (0..).zip(least.iter().zip(&last)) {
            let name = format!("f{thread}");
            let Ok(attr) = fs.lookup(ROOT_INO, name.as_bytes()) else {
                assert_eq!(least, 0, "{what}: {name} is missing");
                continue;
            };
            let file = fs.open(attr.ino, libc::O_RDONLY).expect("open");
            let found = read(&fs, &file, 0, 1 << 20);
            let is_whole = |version: &u64| version_bytes(thread, *version) == found;
            assert!(
                (least.max(1)..=last).any(|version| is_whole(&version)),
                "{what}: {name} has {} bytes, no version from {least} on is like that",
                found.len()
            );
        }
        fs.unmount().expect("unmount");
        check(&wrecks);
    };
    let make = |send: &mut dyn FnMut(_)| {
        let mut rng = Rng(1);
        let mut replay = base.clone();
        let mut synced = 0;
        for (nth, event) in events.iter().enumerate() {
            replay.step(event);
            if let SimEvent::Mark(number) = event {
                synced = *number as usize;
            } else if rng.below(points) < states {
                let loss = SimLoss::draw(rng.next(), replay.pending(), replay.devices());
                let what = format!("cut after event {nth}, {loss}");
                send((replay.wreck(loss), &promised[synced], what));
            }
        }
    };
    let total = check_all(make, check_one);
    println!(
        "{total} power cuts, {last:?} versions, {} syncs",
        promised.len()
    );
}

/// An inode may leave memory when its group is frozen, and come back while that is being written.
#[test]
fn fsync_of_an_inode_that_came_back_waits_for_the_commit_that_holds_it() {
    let devices = devices(2, 48 << 20);
    format(&devices);
    let fs = mount_with(&devices, small_cache());
    let dir = fs.mkdir(ROOT_INO, b"dir", 0o755, &CRED).expect("mkdir").ino;
    devices.iter().for_each(|device| device.hold(true));
    let waits = |path: fn(&FileSystem, u64)| {
        let (fs, (sender, receiver)) = (Arc::clone(&fs), sync_channel(1));
        std::thread::spawn(move || {
            path(&fs, dir);
            sender.send(()).expect("the test waits");
        });
        receiver
    };
    let synced = waits(|fs, _| fs.sync().expect("sync"));
    // What a commit writes comes after the freeze.
    while devices.iter().all(|device| device.held().is_empty()) {
        std::thread::sleep(Duration::from_millis(1));
    }
    fs.forget(dir, 1);
    let fsynced = waits(|fs, dir| fs.fsync_dir(dir).expect("fsync"));
    let early = fsynced.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err(), "fsync returned before the commit had ended");
    devices.iter().for_each(|device| device.hold(false));
    for ended in [synced, fsynced] {
        while ended.recv_timeout(Duration::from_millis(1)).is_err() {
            devices.iter().for_each(|device| device.release_all());
        }
    }
    fs.unmount().expect("unmount");
    assert_eq!(names(&mount(&devices), ROOT_INO), ["dir"]);
}
