//! Another size while the cache is used.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use braidfs_cache::{PageRange, ReadaheadState, ResizeError};

use crate::harness::*;

fn rig(cache_mib: u64) -> Rig {
    let mut options = RigOptions {
        device_bytes: 100 * MIB,
        ..RigOptions::default()
    };
    options.cache.size_bytes = cache_mib * MIB;
    Rig::new(options)
}

#[test]
fn a_smaller_cache_holds_less_and_a_larger_one_more_again() {
    let rig = rig(32);
    let space = rig.space(1);
    for at in 0..24 {
        space
            .write(at * MIB, &vec![at as u8; MIB as usize])
            .unwrap();
        space.flush(PageRange::ALL).unwrap();
    }
    assert!(space.page_count() * PAGE > 20 * MIB);
    rig.cache.resize(8 * MIB + 5).unwrap();
    let stats = rig.cache.stats();
    assert_eq!(
        (stats.size_bytes, stats.size_bytes_max),
        (8 * MIB, 32 * MIB)
    );
    assert!(space.page_count() * PAGE <= 8 * MIB);
    assert!(stats.free_bytes <= 8 * MIB && stats.reserve_bytes < 8 * MIB);
    let ra = ReadaheadState::new();
    let check = || {
        for at in 0..24 {
            let read = read_async(&space, &ra, at * MIB, MIB as usize, 24 * MIB).unwrap();
            assert!(read.iter().all(|&byte| byte == at as u8), "{at}");
        }
    };
    check();
    assert!(space.page_count() * PAGE <= 8 * MIB);
    rig.cache.resize(32 * MIB).unwrap();
    assert_eq!(rig.cache.stats().size_bytes, 32 * MIB);
    check();
    assert!(space.page_count() * PAGE > 20 * MIB, "it is used again");
    let max = 32 * MIB;
    assert_eq!(
        rig.cache.resize(33 * MIB),
        Err(ResizeError::TooLarge { max })
    );
    assert_eq!(rig.cache.stats().size_bytes, max);
}

#[test]
fn dirty_pages_are_written_to_become_smaller() {
    let rig = rig(32);
    let space = rig.space(1);
    for at in 0..10 {
        space
            .write(at * MIB, &vec![at as u8; MIB as usize])
            .unwrap();
    }
    assert!(rig.cache.dirty_bytes() > 4 * MIB);
    rig.cache.resize(4 * MIB).unwrap();
    assert!(rig.cache.dirty_bytes() <= 4 * MIB);
    let ra = ReadaheadState::new();
    for at in 0..10 {
        let read = read_async(&space, &ra, at * MIB, MIB as usize, 10 * MIB).unwrap();
        assert!(read.iter().all(|&byte| byte == at as u8), "{at}");
    }
}

/// Readers and writers go on, and see what was written.
#[test]
fn sizes_change_under_load() {
    within(Duration::from_secs(120), || {
        let rig = Arc::new(rig(24));
        let stop = Arc::new(AtomicBool::new(false));
        let worker = |id: u64| {
            let (rig, stop) = (Arc::clone(&rig), Arc::clone(&stop));
            std::thread::spawn(move || {
                let space = rig.space(id);
                let ra = ReadaheadState::new();
                let mut round = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    for at in 0..6 {
                        let byte = (round + at) as u8;
                        rig.cache.balance_dirty();
                        space.write(at * MIB, &vec![byte; MIB as usize]).unwrap();
                    }
                    for at in 0..6 {
                        let byte = (round + at) as u8;
                        let read = read_async(&space, &ra, at * MIB, MIB as usize, 6 * MIB);
                        assert!(read.unwrap().iter().all(|&read| read == byte));
                    }
                    round += 1;
                }
                round
            })
        };
        let workers: Vec<_> = (1..4).map(worker).collect();
        for size in [8, 24, 5, 16, 8, 24] {
            rig.cache.resize(size * MIB).unwrap();
            assert_eq!(rig.cache.stats().size_bytes, size * MIB);
            std::thread::sleep(Duration::from_millis(200));
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
    });
}
