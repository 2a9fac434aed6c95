//! How fast the cache is by itself: devices that do nothing, so that what is measured is the path
//! through arena, folios, checksums, kiobufs and queues.
//!
//! `cargo run --release -p braidfs-cache --example speed`

#[path = "../benches/rig/mod.rs"]
mod rig;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use braidfs_cache::{AddressSpace, PageRange, ReadaheadState};
use rig::{MIB, PAGE, rig};

/// Runs `work(thread, round)` in `threads` threads for a while; rounds per second in all.
fn rate(threads: u64, work: impl Fn(u64, u64) + Sync) -> f64 {
    let time = Duration::from_millis(1500);
    let (rounds, barrier) = (AtomicU64::new(0), Barrier::new(threads as usize));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (work, rounds, barrier) = (&work, &rounds, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let mut round = 0;
                while round % 64 != 0 || began.elapsed() < time {
                    work(thread, round);
                    round += 1;
                }
                rounds.fetch_add(round, Ordering::Relaxed);
            });
        }
    });
    rounds.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

fn scatter(round: u64, end: u64) -> u64 {
    (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % end
}

fn hits() {
    let rig = rig(512 * MIB);
    let block = vec![1u8; MIB as usize];
    let large = rig.space(1);
    let small: Vec<_> = (2..4).map(|id| rig.space(id)).collect();
    for at in 0..128 {
        large.write(at * MIB, &block).expect("write");
    }
    for space in &small {
        for round in 0..16384 {
            let page = (round * 7919) % 16384;
            space
                .write(page * PAGE, &block[..PAGE as usize])
                .expect("write");
        }
    }
    for threads in [1, 2] {
        let states: Vec<_> = (0..threads).map(|_| ReadaheadState::new()).collect();
        let hit = |space: &Arc<AddressSpace>, thread: u64, at: u64, len: u64| {
            let ra = &states[thread as usize];
            let data = space.read_cached(at, len as usize, ra).expect("a hit");
            assert_eq!(data.as_single().expect("one piece").len() as u64, len);
        };
        let one = rate(threads, |thread, round| {
            hit(&large, thread, scatter(round, 32768) * PAGE, PAGE);
        });
        let shared = rate(threads, |thread, round| {
            hit(&small[0], thread, scatter(round, 16384) * PAGE, PAGE);
        });
        let own = rate(threads, |thread, round| {
            hit(
                &small[thread as usize],
                thread,
                scatter(round, 16384) * PAGE,
                PAGE,
            );
        });
        let mib = rate(threads, |thread, round| {
            hit(&large, thread, round % 128 * MIB, MIB)
        });
        println!(
            "{threads} threads, hits/s: 4 KiB in 1 MiB folios {one:.0}, in 4 KiB folios of one \
             file {shared:.0}, of own files {own:.0}; 1 MiB {mib:.0}"
        );
    }
}

fn writes() {
    let rig = rig(1024 * MIB);
    // Until the arena is touched.
    std::thread::sleep(Duration::from_secs(2));
    let block = vec![1u8; MIB as usize];
    let space = rig.space(1);
    for round in 0..2 {
        let began = Instant::now();
        for at in 0..300 {
            space.write(at * MIB, &block).expect("write");
        }
        let (wrote, began) = (began.elapsed(), Instant::now());
        space.flush(PageRange::ALL).expect("flush");
        let flushed = began.elapsed();
        let speed = |time: Duration| 300.0 * MIB as f64 / time.as_secs_f64() / 1e9;
        println!(
            "round {round}: 1 MiB writes {:.2} GB/s, flush {:.2} GB/s",
            speed(wrote),
            speed(flushed)
        );
    }
    let sustained = |name: &str, len: u64, at: &(dyn Fn(u64, u64) -> u64 + Sync)| {
        let before = rig.volume.stats();
        for threads in [1, 2] {
            let spaces: Vec<_> = (0..threads).map(|thread| rig.space(10 + thread)).collect();
            let per_second = rate(threads, |thread, round| {
                rig.cache.balance_dirty();
                let at = at(thread, round);
                spaces[thread as usize]
                    .write(at, &block[..len as usize])
                    .expect("write");
            });
            let bytes = per_second * len as f64 / 1e9;
            println!("{name}, {threads} threads: {per_second:.0}/s, {bytes:.2} GB/s");
            for space in spaces {
                space.flush(PageRange::ALL).expect("flush");
                space.discard(PageRange::ALL);
            }
        }
        let (mut requests, mut bytes) = (0, 0);
        for (old, new) in before.devices.iter().zip(&rig.volume.stats().devices) {
            requests += new.write.requests - old.write.requests;
            bytes += new.write.bytes - old.write.bytes;
        }
        println!(
            "    mean device request {} KiB",
            (bytes / requests.max(1)) >> 10
        );
    };
    sustained("write and writeback, 1 MiB sequential", MIB, &|_, round| {
        round * MIB
    });
    sustained(
        "write and writeback, 4 KiB sequential",
        PAGE,
        &|_, round| round * PAGE,
    );
    sustained(
        "write and writeback, 4 KiB random in 4 GiB",
        PAGE,
        &|_, round| scatter(round, 1 << 20) * PAGE,
    );
}

fn misses() {
    let rig = rig(256 * MIB);
    std::thread::sleep(Duration::from_secs(1));
    let space = rig.space(1);
    let ra = ReadaheadState::new();
    for (name, len) in [("1 MiB", MIB), ("128 KiB", 32 * PAGE), ("4 KiB", PAGE)] {
        let per_second = rate(1, |_, round| {
            let at = round * len;
            if space.read_cached(at, len as usize, &ra).is_none() {
                space.read(
                    at,
                    len as usize,
                    &ra,
                    1 << 50,
                    Box::new(|got| drop(got.expect("read"))),
                );
            }
        });
        let bytes = per_second * len as f64 / 1e9;
        println!("cold sequential reads of {name}: {per_second:.0}/s, {bytes:.2} GB/s");
    }
    let per_second = rate(1, |_, round| {
        let at = scatter(round, 1 << 20) * PAGE;
        let ra = ReadaheadState::new();
        space.read(
            at,
            4096,
            &ra,
            1 << 50,
            Box::new(|got| drop(got.expect("read"))),
        );
    });
    println!("random 4 KiB reads, mostly misses: {per_second:.0}/s");
}

fn main() {
    hits();
    writes();
    misses();
}
