//! What stays, what is read ahead, when it is written, and who waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use braidfs_cache::{AddressSpace, CacheConfig, PageRange, ReadaheadState};

use crate::harness::*;

fn filled(rig: &Rig, id: u64, mib: u64) -> Arc<AddressSpace> {
    let space = rig.space(id);
    for at in 0..mib {
        space
            .write(at * MIB, &vec![id as u8; MIB as usize])
            .unwrap();
        space.flush(PageRange::ALL).unwrap();
    }
    space.discard(PageRange::ALL);
    space
}

#[test]
fn a_working_set_survives_a_stream_four_times_the_cache() {
    for piece in [PAGE, 32 * PAGE, MIB] {
        let mut options = RigOptions {
            device_bytes: 100 * MIB,
            ..RigOptions::default()
        };
        options.cache.size_bytes = 32 * MIB;
        let rig = Rig::new(options);
        let hot = filled(&rig, 1, 12);
        let stream = filled(&rig, 2, 128);
        let ra = ReadaheadState::new();
        for _ in 0..3 {
            for at in (0..12 * MIB).step_by(16 * PAGE as usize) {
                read_async(&hot, &ra, at, 16 * PAGE as usize, 12 * MIB).unwrap();
            }
        }
        let before = hot.page_count();
        assert!(before >= 3000, "{before}");
        let ra = ReadaheadState::new();
        for at in (0..128 * MIB).step_by(piece as usize) {
            read_async(&stream, &ra, at, piece as usize, 128 * MIB).unwrap();
        }
        let left = hot.page_count();
        assert!(
            left * 10 >= before * 9,
            "pieces of {piece}: {left} of {before} pages left"
        );
    }
}

#[test]
fn a_working_set_read_through_a_ghost_comes_to_stay() {
    let mut options = RigOptions {
        device_bytes: 100 * MIB,
        ..RigOptions::default()
    };
    options.cache.size_bytes = 32 * MIB;
    let rig = Rig::new(options);
    let hot = filled(&rig, 1, 8);
    let stream = filled(&rig, 2, 120);
    let ra = ReadaheadState::new();
    let mut at = 0;
    for _ in 0..6 {
        for page in 0..8 * 256 {
            read_async(&hot, &ReadaheadState::new(), page * PAGE + 1, 100, 8 * MIB).unwrap();
        }
        for _ in 0..20 {
            read_async(&stream, &ra, at, MIB as usize, 120 * MIB).unwrap();
            at += MIB;
        }
    }
    let left = hot.page_count();
    assert!(left >= 1900, "{left} of 2048");
}

#[test]
fn readahead_runs_before_a_sequential_reader_and_is_counted() {
    let mut options = RigOptions {
        is_async: true,
        ..RigOptions::default()
    };
    options.cache.size_bytes = 64 * MIB;
    let rig = Rig::new(options);
    let space = filled(&rig, 1, 24);
    let base = rig.cache.stats();
    let ra = ReadaheadState::new();
    for at in (0..24 * MIB).step_by(32 * PAGE as usize) {
        let got = read_async(&space, &ra, at, 32 * PAGE as usize, 24 * MIB).unwrap();
        assert!(got.iter().all(|&byte| byte == 1));
    }
    let stats = rig.cache.stats();
    let issued = stats.readahead_issued_pages - base.readahead_issued_pages;
    let used = stats.readahead_used_pages - base.readahead_used_pages;
    assert!((6000..=6144).contains(&issued), "{issued}");
    assert_eq!(issued, used);
    assert_eq!(
        stats.read_pages - base.read_pages,
        24 * 256,
        "nothing is read twice"
    );
    assert!(
        stats.folios_by_order[8] - base.folios_by_order[8] >= 16,
        "{stats:?}"
    );
    // What nobody used counts as wasted when it is evicted.
    rig.cache.drop_clean();
    let ra = ReadaheadState::new();
    read_async(&space, &ra, 0, PAGE as usize, 24 * MIB).unwrap();
    until("readahead", || space.page_count() > 16);
    let ahead = rig.cache.stats().readahead_issued_pages - stats.readahead_issued_pages;
    until("readahead to end", || space.page_count() == ahead + 1);
    rig.cache.drop_clean();
    let wasted = rig.cache.stats().readahead_wasted_pages - stats.readahead_wasted_pages;
    assert_eq!(wasted, ahead);
}

#[test]
fn random_readers_cause_no_readahead() {
    let rig = Rig::new(RigOptions {
        device_bytes: 64 * MIB,
        ..RigOptions::default()
    });
    let space = filled(&rig, 1, 48);
    let ra = ReadaheadState::new();
    let mut rng = Rng::new(1);
    for _ in 0..500 {
        let page = 1 + rng.below(12_000);
        read_async(&space, &ra, page * PAGE, PAGE as usize, 48 * MIB).unwrap();
    }
    let issued = rig.cache.stats().readahead_issued_pages;
    assert!(issued < 500, "{issued}");
}

#[test]
fn old_pages_are_written_in_the_background() {
    let mut options = RigOptions::default();
    options.cache.dirty_expire = Duration::from_millis(100);
    let rig = Rig::new(options);
    let space = rig.space(1);
    space.write(0, &[1; 5 * PAGE as usize]).unwrap();
    until("background writeback", || space.dirty_page_count() == 0);
    until("the end of writeback", || rig.cache.writeback_bytes() == 0);
    rig.check_books(5, 0, 0);
}

#[test]
fn a_background_writer_tries_again_after_an_error() {
    let mut options = RigOptions::default();
    options.cache.dirty_expire = Duration::from_millis(50);
    let rig = Rig::new(options);
    let space = rig.space(1);
    *rig.store.fail_allocate.lock().unwrap() = Some(libc::ENOSPC);
    space.write(0, &[1; 5 * PAGE as usize]).unwrap();
    until("two errors", || space.write_error_seq() >= 2);
    assert!(space.write_error_seq() < 10, "it backs off");
    *rig.store.fail_allocate.lock().unwrap() = None;
    until("background writeback", || space.dirty_page_count() == 0);
}

#[test]
fn writers_are_slowed_and_dirty_memory_is_bounded() {
    within(Duration::from_secs(60), || {
        let mut options = RigOptions {
            is_async: true,
            ..RigOptions::default()
        };
        options.cache = CacheConfig {
            size_bytes: 16 * MIB,
            ..CacheConfig::default()
        };
        let rig = Rig::new(options);
        let space = rig.space(1);
        let hard = 16 * MIB * 40 / 100;
        let mut most = 0;
        let mut longest = Duration::ZERO;
        for step in 0..1500u64 {
            let began = Instant::now();
            rig.cache.balance_dirty();
            longest = longest.max(began.elapsed());
            space
                .write(step % 1000 * 16 * PAGE, &[1; 16 * PAGE as usize])
                .unwrap();
            most = most.max(rig.cache.dirty_bytes() + rig.cache.writeback_bytes());
        }
        println!("at most {most} of {hard} dirty, longest pause {longest:?}");
        assert!(most <= hard + 32 * PAGE, "{most}");
        assert!(longest < Duration::from_secs(2), "{longest:?}");
        assert!(rig.cache.stats().throttled_ns > 0);
        space.flush(PageRange::ALL).unwrap();
    });
}

#[test]
fn shutdown_lets_a_throttled_writer_go() {
    within(Duration::from_secs(30), || {
        let cache = CacheConfig {
            size_bytes: 8 * MIB,
            ..CacheConfig::default()
        };
        let options = RigOptions {
            cache,
            ..RigOptions::default()
        };
        let rig = Rig::new(options);
        let space = rig.space(1);
        rig.store.gate.shut();
        space.write(0, &vec![1; 4 * MIB as usize]).unwrap();
        let (cache, store) = (Arc::clone(&rig.cache), Arc::clone(&rig.store));
        let writer = std::thread::spawn(move || cache.balance_dirty());
        std::thread::sleep(Duration::from_millis(300));
        assert!(!writer.is_finished());
        let cache = Arc::clone(&rig.cache);
        let stopper = std::thread::spawn(move || cache.shutdown());
        writer.join().unwrap();
        store.gate.open();
        stopper.join().unwrap();
        space.discard(PageRange::ALL);
    });
}

#[test]
fn reading_and_writing_far_more_than_memory_stays_inside_the_arena() {
    within(Duration::from_secs(60), || {
        let mut options = RigOptions {
            is_async: true,
            ..RigOptions::default()
        };
        options.device_bytes = 100 * MIB;
        options.cache = CacheConfig {
            size_bytes: 8 * MIB,
            ..CacheConfig::default()
        };
        let rig = Rig::new(options);
        // Without balance_dirty: memory alone is the bound, and nothing fails.
        let space = rig.space(1);
        for at in 0..96 {
            space
                .write(at * MIB, &vec![at as u8; MIB as usize])
                .unwrap();
        }
        let ra = ReadaheadState::new();
        for at in 0..96 {
            let got = read_async(&space, &ra, at * MIB, MIB as usize, 96 * MIB).unwrap();
            assert!(got.iter().all(|&byte| byte == at as u8));
        }
        space.flush(PageRange::ALL).unwrap();
    });
}
