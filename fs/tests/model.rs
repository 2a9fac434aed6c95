//! The core against a simple model of what a file system should do: random operations, no mount,
//! simulated devices.
//!
//! `SEED=n` repeats one run, `OPS=n` sets its length, `TRACE=1` shows every operation.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use braidfs::{Errno, FileSystem, MountOptions, ROOT_INO};
use common::model::Rng;
use common::watchdog::Watchdog;
use common::world::{Limits, World};
use common::*;

const MIB: usize = 1 << 20;

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().expect("SEED and OPS are numbers"))
}

/// Says which seed it was when a test fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was SEED={}", self.0);
        }
    }
}

fn small_cache() -> MountOptions {
    MountOptions {
        cache_bytes: braidfs::CACHE_BYTES_MIN,
        ..options()
    }
}

/// Nothing is dirty: nothing may be reserved.
fn check_accounts(fs: &FileSystem) {
    fs.sync().expect("sync");
    let space = fs.stats().space;
    assert_eq!(space.reserved_blocks, 0, "{space:?}");
}

fn remove_all(world: &mut World) {
    for file in std::mem::take(&mut world.handles) {
        world.fs.release(&file);
    }
    let fs = Arc::clone(&world.fs);
    fn clear(fs: &FileSystem, dir: u64) {
        for (name, ino) in common::dump::entries(fs, dir, 1000) {
            if fs.getattr(ino).expect("getattr").is_dir() {
                clear(fs, ino);
                fs.rmdir(dir, &name).expect("rmdir");
            } else {
                fs.unlink(dir, &name).expect("unlink");
            }
        }
    }
    clear(&fs, ROOT_INO);
    fs.unmount().expect("unmount");
}

/// Writes until the volume is full, looks around, and makes room again.
fn fill(world: &mut World) {
    let name = b"filler";
    let Ok((attr, file)) = world.fs.create(ROOT_INO, name, 0o600, libc::O_RDWR, &CRED) else {
        return;
    };
    let bytes = world.rng.bytes(MIB);
    let mut size = 0;
    let error = loop {
        match try_write(&world.fs, &file, size, &bytes, world.rng.one_in(4)) {
            Ok(count) => size += u64::from(count),
            Err(error) => break error,
        }
    };
    assert_eq!(error, Errno::NOSPC);
    for _ in 0..60 {
        // The model does not know the filler: listings of the root would show it.
        world.model.now += 1;
        world.write_or_remove();
    }
    world.fs.unlink(ROOT_INO, name).expect("unlink");
    world.model.touch(ROOT_INO, true);
    world.fs.release(&file);
    world.fs.forget(attr.ino, 1);
}

fn run(seed: u64, ops: u64) -> u64 {
    let said = Seed(seed);
    let mut rng = Rng(seed);
    let devices = devices(1 + rng.below(3) as usize, 64 << 20);
    format(&devices);
    let fs = mount_with(&devices, small_cache());
    let free = fs.statfs().bfree;
    let limits = Limits {
        size: if rng.one_in(2) { 3 << 20 } else { 200 << 10 },
        io: 1 << 20,
        total: 24 << 20,
        names: 3 + rng.below(8),
        wide: true,
        sync_every: 5 + rng.below(100),
    };
    let mut world = World::new(fs, seed, limits);
    for nth in 1..=ops {
        world.step();
        if nth % 1500 == 700 {
            fill(&mut world);
        }
        if nth % 400 == 0 {
            world.check_tree();
        }
        if nth % 800 == 0 {
            check_accounts(&world.fs);
            world.unmount();
            let report = check(&devices);
            assert_eq!(report.orphans, 0);
            assert_eq!(report.inodes, world.model.nodes.len() as u64);
            world.go_on(mount_with(&devices, small_cache()));
            world.check_tree();
        }
    }
    let full = world.full;
    remove_all(&mut world);
    assert_eq!(check(&devices).data_blocks, 0);
    let fs = mount_with(&devices, small_cache());
    let left = fs.statfs().bfree;
    // Metadata may have grown by a chunk or two.
    assert!(
        left + 4096 >= free && left <= free,
        "{left} free, {free} at first"
    );
    fs.unmount().expect("unmount");
    drop(said);
    full
}

#[test]
fn random_operations_agree_with_the_model() {
    if let Some(seed) = number("SEED") {
        run(seed, number("OPS").unwrap_or(3000));
        return;
    }
    let began = Instant::now();
    let first = number("FIRST").unwrap_or(1);
    let (mut runs, mut full) = (0, 0);
    while runs < 8 || number("SECONDS").is_some_and(|s| began.elapsed() < Duration::from_secs(s)) {
        full += run(first + runs, number("OPS").unwrap_or(3000));
        runs += 1;
    }
    println!(
        "{runs} runs, {full} operations found the volume full, {:?}",
        began.elapsed()
    );
}

/// One thread of many: its own files in directories that all share, and some of everybody's.
fn busy(fs: &FileSystem, me: u64, dirs: &[u64], until: Instant) -> Vec<(u64, String, Vec<u8>)> {
    let mut rng = Rng(me);
    // Directory, name, bytes; no two threads use a name.
    let mut mine: Vec<(u64, String, Vec<u8>)> = Vec::new();
    let mut next = 0;
    while Instant::now() < until {
        if mine.len() < 6 {
            let (dir, name) = (*rng.pick(dirs), format!("{me}-{next}"));
            let file = create(fs, dir, &name);
            fs.release(&file);
            fs.forget(file.ino(), 1);
            mine.push((dir, name, Vec::new()));
            next += 1;
        }
        let at = rng.below(mine.len() as u64) as usize;
        let (dir, name, bytes) = &mut mine[at];
        let attr = fs.lookup(*dir, name.as_bytes()).expect("my file");
        let file = fs.open(attr.ino, libc::O_RDWR).expect("open");
        match rng.below(12) {
            0..4 => {
                let len = 1 + rng.below(200_000) as usize;
                let data = rng.bytes(len);
                let offset = rng.below(300_000) as usize;
                let written = try_write(fs, &file, offset as u64, &data, false);
                let stats = fs.stats();
                assert_eq!(written, Ok(len as u32), "{:?} {:?}", stats.space, stats.txg);
                bytes.resize(bytes.len().max(offset + len), 0);
                bytes[offset..offset + len].copy_from_slice(&data);
            }
            4 => {
                let len = (1 + rng.below(4) as usize) << 16;
                let data = rng.bytes(len);
                assert_eq!(try_write(fs, &file, 65_536, &data, true), Ok(len as u32));
                bytes.resize(bytes.len().max(65_536 + len), 0);
                bytes[65_536..65_536 + len].copy_from_slice(&data);
            }
            5 => {
                let size = rng.below(300_000);
                let set = braidfs::SetAttr {
                    size: Some(size),
                    ..braidfs::SetAttr::default()
                };
                fs.setattr(attr.ino, &set, &CRED).expect("truncate");
                bytes.resize(size as usize, 0);
            }
            6 => {
                let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (from, len) = (rng.below(200_000), 1 + rng.below(100_000));
                fs.fallocate(&file, punch, from, len).expect("punch");
                let end = (from + len).min(bytes.len() as u64) as usize;
                if (from as usize) < end {
                    bytes[from as usize..end].fill(0);
                }
            }
            7 => {
                let (to, new) = (*rng.pick(dirs), format!("{me}-{next}"));
                next += 1;
                fs.rename(*dir, name.as_bytes(), to, new.as_bytes(), 0, &CRED)
                    .expect("rename");
                (*dir, *name) = (to, new);
            }
            8 => {
                fs.unlink(*dir, name.as_bytes()).expect("unlink");
                // It goes on for who has it open.
                let found = try_read(fs, &file, 0, bytes.len(), false).expect("read");
                assert!(found == *bytes, "an unlinked file changed");
                mine.swap_remove(at);
            }
            9 => fs.fsync(&file, false).expect("fsync"),
            10 => {
                // Names that all threads fight for: any outcome is good that leaves it sound.
                let (dir, to) = (*rng.pick(dirs), *rng.pick(dirs));
                let shared = format!("shared{}", rng.below(3));
                let other = format!("shared{}", rng.below(3));
                let _any = match rng.below(6) {
                    0 => fs.link(attr.ino, dir, shared.as_bytes()).map(|attr| {
                        fs.forget(attr.ino, 1);
                    }),
                    1 => fs.unlink(dir, shared.as_bytes()),
                    2 => fs
                        .mkdir(dir, shared.as_bytes(), 0o755, &CRED)
                        .map(|attr| fs.forget(attr.ino, 1)),
                    3 => fs.rmdir(dir, shared.as_bytes()),
                    4 => {
                        let flags = *rng.pick(&[0, libc::RENAME_EXCHANGE]);
                        let (from, new) = (shared.as_bytes(), other.as_bytes());
                        fs.rename(dir, from, to, new, flags, &CRED)
                    }
                    _ => fs.readdir(dir, 0, &mut |_| true),
                };
            }
            _ => {
                let direct = rng.one_in(3);
                let found = read_all(fs, &file, bytes.len(), direct);
                assert!(found == *bytes, "{} bytes read wrong", bytes.len());
            }
        }
        fs.release(&file);
        fs.forget(attr.ino, 1);
    }
    mine
}

fn read_all(fs: &FileSystem, file: &Arc<braidfs::OpenFile>, len: usize, direct: bool) -> Vec<u8> {
    try_read(fs, file, 0, len + 1, direct).expect("read")
}

#[test]
fn many_threads_and_commits_leave_each_with_its_own_files() {
    let seconds = number("SECONDS").unwrap_or(4);
    let _dog = Watchdog::start(Duration::from_secs(seconds + 60));
    let devices = devices(3, 128 << 20);
    format(&devices);
    let fs = mount_with(&devices, small_cache());
    let mut dirs = vec![ROOT_INO];
    for nth in 0..3 {
        let parent = dirs[nth / 2];
        let name = format!("d{nth}");
        let attr = fs.mkdir(parent, name.as_bytes(), 0o755, &CRED).unwrap();
        dirs.push(attr.ino);
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let files: Vec<_> = std::thread::scope(|scope| {
        let (fs, dirs) = (&fs, &dirs);
        let workers: Vec<_> = (1..=6)
            .map(|me| scope.spawn(move || busy(fs, me, dirs, until)))
            .collect();
        scope.spawn(|| {
            while Instant::now() < until {
                fs.sync().expect("sync");
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a worker"))
            .collect()
    });
    let check_files = |fs: &Arc<FileSystem>| {
        for (dir, name, bytes) in &files {
            let attr = fs.lookup(*dir, name.as_bytes()).expect("it is there");
            let file = fs.open(attr.ino, libc::O_RDONLY).expect("open");
            assert!(read_all(fs, &file, bytes.len(), false) == *bytes, "{name}");
            fs.release(&file);
        }
    };
    check_files(&fs);
    check_accounts(&fs);
    fs.unmount().expect("unmount");
    assert_eq!(check(&devices).orphans, 0);
    let fs = mount_with(&devices, small_cache());
    check_files(&fs);
    fs.unmount().expect("unmount");
}
