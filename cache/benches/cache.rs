//! Micro-benchmarks of the cache: frames of the arena, lookups, writes, dirty runs, and writeback
//! with the kiobufs that it builds, on devices that do nothing.
//!
//! `cargo bench -p braidfs-cache`. `examples/speed.rs` measures whole paths, in several threads.

mod rig;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use braidfs_cache::{AddressSpace, CacheConfig, PageRange, ReadaheadState};
use criterion::{Criterion, criterion_group, criterion_main};
use rig::{MIB, PAGE, Rig, rig_with};

/// Pages of a file that is looked up in.
const PAGES: u64 = 16_384;

/// A cache whose memory was touched, and that writes nothing back by itself.
fn touched(bytes: u64) -> Rig {
    let rig = rig_with(CacheConfig {
        size_bytes: bytes,
        dirty_background_percent: 80,
        dirty_hard_percent: 90,
        dirty_expire: Duration::from_secs(3600),
        ..CacheConfig::default()
    });
    std::thread::sleep(Duration::from_secs(1));
    rig
}

/// A file of that many pages, written in pieces; every `skip`th piece is left out.
fn file(rig: &Rig, id: u64, piece: u64, skip: Option<u64>) -> Arc<AddressSpace> {
    let (space, block) = (rig.space(id), vec![1; piece as usize]);
    for number in 0..PAGES * PAGE / piece {
        if skip.is_none_or(|skip| number % skip != 0) {
            space.write(number * piece, &block).expect("write");
        }
    }
    space
}

fn scattered(round: &mut u64) -> u64 {
    *round += 1;
    (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % PAGES * PAGE
}

fn arena(criterion: &mut Criterion) {
    let rig = touched(256 * MIB);
    for (name, len) in [
        ("4 KiB", PAGE),
        ("1 MiB", MIB),
        ("1 MiB less a page", MIB - PAGE),
    ] {
        criterion.bench_function(&format!("arena, take and give back {name}"), |bencher| {
            bencher.iter(|| drop(black_box(rig.cache.alloc_private(len as usize))));
        });
    }
}

fn lookup(criterion: &mut Criterion) {
    let rig = touched(512 * MIB);
    let (state, mut round) = (ReadaheadState::new(), 0);
    let mut bench = |name: &str, space: &Arc<AddressSpace>| {
        criterion.bench_function(&format!("lookup of 4 KiB, {name}"), |bencher| {
            bencher.iter(|| {
                let at = scattered(&mut round);
                black_box(space.read_cached(at, PAGE as usize, &state).expect("a hit"))
            });
        });
    };
    bench("folios of 1 MiB", &file(&rig, 1, MIB, None));
    let single = rig.space(2);
    for number in 0..PAGES {
        // In an order in which no folio can grow.
        let page = number * 7919 % PAGES;
        single
            .write(page * PAGE, &[1; PAGE as usize])
            .expect("write");
    }
    bench("folios of 4 KiB", &single);
}

fn write(criterion: &mut Criterion) {
    let rig = touched(512 * MIB);
    let (space, mut round) = (file(&rig, 1, MIB, None), 0);
    criterion.bench_function("write of 4 KiB into a dirty folio", |bencher| {
        let page = [2; PAGE as usize];
        bencher.iter(|| space.write(scattered(&mut round), &page).expect("write"));
    });
}

fn dirty_runs(criterion: &mut Criterion) {
    let rig = touched(512 * MIB);
    for (name, count, space) in [
        ("one", 1, file(&rig, 1, MIB, None)),
        ("2048 of 7 pages", 2048, file(&rig, 2, PAGE, Some(8))),
    ] {
        let runs = space.unclean_runs(PageRange::ALL, usize::MAX);
        assert_eq!(runs.map_or(0, |runs| runs.len()), count, "dirty runs");
        criterion.bench_function(&format!("dirty runs of 64 MiB: {name}"), |bencher| {
            bencher.iter(|| black_box(space.unclean_runs(PageRange::ALL, usize::MAX)));
        });
    }
}

fn writeback(criterion: &mut Criterion) {
    let rig = touched(512 * MIB);
    for (name, piece) in [("in order", 1), ("every other page", 2)] {
        let (space, page) = (rig.space(piece), [3; PAGE as usize]);
        criterion.bench_function(
            &format!("256 pages written and written back, {name}"),
            |bencher| {
                bencher.iter(|| {
                    for number in 0..256 {
                        space.write(number * piece * PAGE, &page).expect("write");
                    }
                    space.flush(PageRange::ALL).expect("flush");
                });
            },
        );
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(2));
    targets = arena, lookup, write, dirty_runs, writeback
}
criterion_main!(benches);
