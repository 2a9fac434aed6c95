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
        for (name, ino) in common::world::entries(fs, dir, 1000) {
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
