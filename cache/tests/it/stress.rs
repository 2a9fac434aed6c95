//! Threads against each other: nothing torn, nothing lost, nobody stuck.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use braidfs_blockdev::device::sim::SimEffect;
use braidfs_blockdev::{ErrorKind, Op};
use braidfs_cache::{AddressSpace, CacheConfig, PageRange, ReadaheadState};

use crate::harness::*;

/// Pages of one writer's own region.
const REGION: u64 = 1024;
/// A cell is written whole, with one stamp in each of its words: a reader sees one stamp.
const CELL: u64 = 512;

struct Shared {
    rig: Rig,
    space: Arc<AddressSpace>,
    stop: AtomicBool,
    newly_dirty: AtomicU64,
    dropped: AtomicU64,
    /// As a file system has it: no read begins between discarding pages and forgetting homes.
    truncating: RwLock<()>,
}

fn stamp(cell: u64, version: u64) -> u64 {
    cell << 32 | version
}

fn check_cells(bytes: &[u8], first_cell: u64) {
    for (cell, bytes) in (first_cell..).zip(bytes.chunks_exact(CELL as usize)) {
        let words = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert!(words.clone().all(|word| word == first), "torn cell {cell}");
        assert!(
            first == 0 || first >> 32 == cell,
            "cell {cell} holds {first:#x}"
        );
    }
}

/// Owns a region: writes, discards and verifies it against versions that only it changes.
fn writer(shared: &Shared, index: u64, rounds: u64) -> Vec<u64> {
    let mut rng = Rng::new(index + 100);
    let cells = REGION * PAGE / CELL;
    let base = index * cells;
    let mut versions = vec![0u64; cells as usize];
    let ra = ReadaheadState::new();
    for round in 1..=rounds {
        shared.rig.cache.balance_dirty();
        let page = rng.below(REGION);
        let count = match rng.below(8) {
            0 => 256,
            1..4 => 1 + rng.below(32),
            _ => 1,
        }
        .min(REGION - page);
        let (mut first, mut len) = (page * PAGE / CELL, count * PAGE / CELL);
        if rng.below(3) == 0 {
            first += rng.below(len);
            len = 1 + rng.below(8.min(cells - first));
        }
        let span = first as usize..(first + len) as usize;
        match rng.below(10) {
            0 => {
                let pages = PageRange {
                    start: page,
                    end: page + count,
                };
                let (start, end) = (index * REGION + pages.start, index * REGION + pages.end);
                let pages = PageRange { start, end };
                let _no_reads = shared.truncating.write().unwrap();
                let dropped = shared.space.discard(pages);
                shared.dropped.fetch_add(dropped, Ordering::SeqCst);
                shared.rig.store.forget(1, pages);
                let cells = PAGE / CELL;
                versions[(page * cells) as usize..((page + count) * cells) as usize].fill(0);
            }
            1..6 => {
                let bytes: Vec<u8> = (first..first + len)
                    .flat_map(|cell| {
                        stamp(base + cell, round)
                            .to_le_bytes()
                            .repeat(CELL as usize / 8)
                    })
                    .collect();
                let done = shared.space.write((base + first) * CELL, &bytes).unwrap();
                shared
                    .newly_dirty
                    .fetch_add(done.newly_dirty_pages, Ordering::SeqCst);
                versions[span].fill(round);
            }
            6 => {
                let done = shared
                    .space
                    .zero((base + first) * CELL, len * CELL)
                    .unwrap();
                shared
                    .newly_dirty
                    .fetch_add(done.newly_dirty_pages, Ordering::SeqCst);
                versions[span].fill(0);
            }
            _ => {
                let len = (len * CELL) as usize;
                let eof = 4 * REGION * PAGE;
                let _no_truncate = shared.truncating.read().unwrap();
                let got = read_async(&shared.space, &ra, (base + first) * CELL, len, eof).unwrap();
                check_versions(&got, base + first, &versions[span]);
            }
        }
    }
    versions
}

fn check_versions(bytes: &[u8], first_cell: u64, versions: &[u64]) {
    let cells = bytes.chunks_exact(CELL as usize);
    for ((cell, bytes), &version) in (first_cell..).zip(cells).zip(versions) {
        let want = if version == 0 {
            0
        } else {
            stamp(cell, version)
        };
        for word in bytes.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            assert_eq!(word, want, "cell {cell}: lost or stale");
        }
    }
}

fn reader(shared: &Shared, seed: u64) {
    let mut rng = Rng::new(seed);
    let ra = ReadaheadState::new();
    let mut stream = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        let (page, count) = if rng.below(2) == 0 {
            (rng.below(4 * REGION - 64), 1 + rng.below(64))
        } else {
            stream = (stream + 32) % (4 * REGION - 32);
            (stream, 32)
        };
        let len = (count * PAGE) as usize;
        let _no_truncate = shared.truncating.read().unwrap();
        let got = read_async(&shared.space, &ra, page * PAGE, len, 4 * REGION * PAGE).unwrap();
        check_cells(&got, page * PAGE / CELL);
    }
}

fn disturber(shared: &Shared, seed: u64, errors: bool) {
    let mut rng = Rng::new(seed);
    while !shared.stop.load(Ordering::Relaxed) {
        match rng.below(8) {
            0 => shared.rig.cache.drop_clean(),
            1 => shared.space.flush(PageRange::ALL).unwrap_or_default(),
            2 => shared.rig.cache.flush_all(braidfs_cache::SpaceClass::Data),
            3 => drop(shared.rig.cache.alloc_private(1 + rng.below(MIB) as usize)),
            4 if errors => {
                let sim = &shared.rig.sims[rng.below(2) as usize];
                let at = 2 * MIB + rng.below(40) * MIB;
                let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
                sim.inject(Op::Write, at..at + 4 * MIB, effect, Some(4));
            }
            5 if errors => shared.rig.sims.iter().for_each(|sim| sim.heal()),
            _ => {
                let start = rng.below(4 * REGION - 1);
                let end = start + 1 + rng.below(200);
                shared
                    .space
                    .flush(PageRange { start, end })
                    .unwrap_or_default();
            }
        }
        shared.space.has_pages(PageRange::ALL);
        shared.space.next_cached_dirty(rng.below(4 * REGION));
        std::thread::sleep(Duration::from_micros(rng.below(2000)));
    }
}

fn run(errors: bool, rounds: u64, cache_mib: u64) {
    within(Duration::from_secs(200), move || {
        let mut options = RigOptions {
            is_async: true,
            ..RigOptions::default()
        };
        options.cache = CacheConfig {
            size_bytes: cache_mib * MIB,
            dirty_expire: Duration::from_millis(30),
            ..CacheConfig::default()
        };
        let rig = Rig::new(options);
        let space = rig.space(1);
        let shared = Arc::new(Shared {
            rig,
            space,
            stop: AtomicBool::new(false),
            newly_dirty: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            truncating: RwLock::default(),
        });
        let others: Vec<_> = (0..4u64)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || match index {
                    0..2 => reader(&shared, index + 1),
                    _ => disturber(&shared, index + 1, errors && index == 2),
                })
            })
            .collect();
        let writers: Vec<_> = (0..4)
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || writer(&shared, index, rounds))
            })
            .collect();
        let versions: Vec<_> = writers
            .into_iter()
            .map(|writer| writer.join().expect("a writer failed"))
            .collect();
        shared.stop.store(true, Ordering::Relaxed);
        for other in others {
            other.join().expect("a reader or disturber failed");
        }
        shared.rig.sims.iter().for_each(|sim| sim.heal());
        let space = &shared.space;
        space.flush(PageRange::ALL).unwrap();
        until("writeback to end", || {
            shared.rig.cache.writeback_bytes() == 0
        });
        assert_eq!(space.dirty_page_count(), 0);
        let load = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        shared
            .rig
            .check_books(load(&shared.newly_dirty), load(&shared.dropped), 0);
        shared.rig.cache.drop_clean();
        for (index, versions) in (0..).zip(&versions) {
            let mut out = vec![0; (REGION * PAGE) as usize];
            space.read_wait(index * REGION * PAGE, &mut out).unwrap();
            check_versions(&out, index * REGION * PAGE / CELL, versions);
        }
        shared.rig.cache.drop_clean();
        let stats = shared.rig.cache.stats();
        println!(
            "failed {} merged {} {}",
            load(&shared.rig.store.failed),
            load(&shared.rig.store.merged),
            format_args!("{stats:?}")
        );
        assert_eq!(stats.free_bytes, stats.size_bytes, "memory was lost");
        assert_eq!(stats.crc_errors, 0);
    });
}

#[test]
fn threads_in_a_cache_half_the_size_of_the_file() {
    run(false, 3000, 8);
}

#[test]
fn threads_with_write_errors_and_room_enough() {
    run(true, 3000, 32);
}
