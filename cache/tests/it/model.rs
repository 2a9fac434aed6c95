//! Random operations against a vector, with a cache far smaller than the file.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use braidfs_blockdev::device::sim::SimEffect;
use braidfs_blockdev::{ErrorKind, Op};
use braidfs_cache::{AddressSpace, PageRange, ReadaheadState};

use crate::harness::*;

struct Model {
    rig: Rig,
    space: Arc<AddressSpace>,
    ra: ReadaheadState,
    bytes: Vec<u8>,
    newly_dirty: u64,
    dropped: u64,
    rng: Rng,
}

impl Model {
    /// A range somewhere: mostly small, sometimes aligned, sometimes a megabyte and more.
    fn range(&mut self) -> (u64, usize) {
        let size = self.bytes.len() as u64;
        let rng = &mut self.rng;
        let len = match rng.below(10) {
            0 => MIB + rng.below(MIB),
            1 => MIB,
            2..5 => PAGE * (1 + rng.below(40)),
            5..8 => PAGE,
            _ => 1 + rng.below(3 * PAGE),
        };
        let len = len.min(size);
        let mut at = rng.below(size - len + 1);
        if rng.below(3) > 0 {
            at = at / PAGE * PAGE;
            if len >= MIB && rng.below(2) == 0 {
                at = at / MIB * MIB;
            }
        }
        (at, usize::try_from(len).unwrap())
    }

    fn step(&mut self) {
        let (at, len) = self.range();
        let span = usize::try_from(at).unwrap()..usize::try_from(at).unwrap() + len;
        let pages = PageRange::covering(at, len as u64).unwrap();
        match self.rng.below(20) {
            0..7 => {
                let data = self.rng.bytes(len);
                let done = self.space.write(at, &data).unwrap();
                self.newly_dirty += done.newly_dirty_pages;
                self.bytes[span].copy_from_slice(&data);
            }
            7..12 => {
                let eof = self.bytes.len() as u64;
                let got = read_async(&self.space, &self.ra, at, len, eof).unwrap();
                assert!(got == self.bytes[span], "read of {at}+{len}");
            }
            12 => {
                let done = self.space.zero(at, len as u64).unwrap();
                self.newly_dirty += done.newly_dirty_pages;
                self.bytes[span].fill(0);
            }
            13 => {
                self.dropped += self.space.discard(pages);
                self.rig.store.forget(1, pages);
                let size = self.bytes.len() as u64;
                let (start, end) = (pages.start * PAGE, (pages.end * PAGE).min(size));
                self.bytes[start as usize..end as usize].fill(0);
            }
            14..16 => self.space.flush(pages).unwrap_or_default(),
            16 => self.space.flush(PageRange::ALL).unwrap_or_default(),
            17 => self.rig.cache.drop_clean(),
            18 => {
                let mut out = vec![0; len];
                self.space.read_wait(at, &mut out).unwrap();
                assert!(out == self.bytes[span], "read_wait of {at}+{len}");
            }
            _ => self.rig.cache.balance_dirty(),
        }
    }

    /// With the flushers idle the books must balance to the page.
    fn check(&self) {
        until("writeback to end", || self.rig.cache.writeback_bytes() == 0);
        let dirty = self.space.dirty_page_count();
        assert_eq!(self.rig.cache.dirty_bytes(), dirty * PAGE);
        self.rig.check_books(self.newly_dirty, self.dropped, dirty);
    }

    fn finish(&mut self) {
        self.space.flush(PageRange::ALL).unwrap();
        self.check();
        assert_eq!(self.space.dirty_page_count(), 0);
        self.rig.cache.drop_clean();
        assert_eq!(self.space.page_count(), 0);
        let mut out = vec![0; self.bytes.len()];
        self.space.read_wait(0, &mut out).unwrap();
        assert!(out == self.bytes);
        self.rig.cache.drop_clean();
        let stats = self.rig.cache.stats();
        assert_eq!(
            stats.free_bytes, stats.size_bytes,
            "memory was lost: {stats:?}"
        );
        assert_eq!(stats.crc_errors, 0);
    }
}

fn model(file_mib: u64, options: RigOptions, seed: u64) -> Model {
    let rig = Rig::new(options);
    let space = rig.space(1);
    Model {
        space,
        rig,
        ra: ReadaheadState::new(),
        bytes: vec![0; (file_mib * MIB) as usize + 1500],
        newly_dirty: 0,
        dropped: 0,
        rng: Rng::new(seed),
    }
}

/// Seeds at which to run: one given, or a fixed few and one of the clock.
fn seeds() -> Vec<u64> {
    match std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        Some(seed) => vec![seed],
        None => {
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap();
            vec![1, 2, 3, now.as_nanos() as u64 % 1_000_000]
        }
    }
}

#[test]
fn random_operations_match_a_vector() {
    for seed in seeds() {
        println!("SEED={seed}");
        within(Duration::from_secs(120), move || {
            let mut model = model(24, RigOptions::default(), seed);
            for step in 0..600 {
                model.step();
                if step % 50 == 0 {
                    model.check();
                }
            }
            model.finish();
        });
    }
}

#[test]
fn random_operations_with_busy_flushers_and_an_asynchronous_device() {
    for seed in seeds() {
        println!("SEED={seed}");
        within(Duration::from_secs(120), move || {
            let mut options = RigOptions {
                is_async: true,
                ..RigOptions::default()
            };
            options.cache.dirty_background_percent = 5;
            options.cache.dirty_hard_percent = 30;
            options.cache.dirty_expire = Duration::from_millis(50);
            let mut model = model(24, options, seed);
            for _ in 0..600 {
                model.step();
            }
            model.finish();
        });
    }
}

/// Writes that fail now and then cost nothing but a retry, and the books still balance.
#[test]
fn random_operations_with_write_errors() {
    for seed in seeds() {
        println!("SEED={seed}");
        within(Duration::from_secs(120), move || {
            let mut options = RigOptions {
                is_async: true,
                ..RigOptions::default()
            };
            options.cache = quiet(32 * MIB);
            let mut model = model(16, options, seed);
            for step in 0..400 {
                if step % 7 == 0 {
                    let sim = &model.rig.sims[step / 7 % 2];
                    let at = 2 * MIB + model.rng.below(40) * MIB;
                    let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
                    sim.inject(Op::Write, at..at + 4 * MIB, effect, Some(3));
                }
                if step % 13 == 0 {
                    model.rig.sims.iter().for_each(|sim| sim.heal());
                }
                let full = (step % 29 == 0).then_some(libc::ENOSPC);
                *model.rig.store.fail_allocate.lock().unwrap() = full;
                model.step();
            }
            *model.rig.store.fail_allocate.lock().unwrap() = None;
            model.rig.sims.iter().for_each(|sim| sim.heal());
            println!(
                "failed pages: {}",
                model.rig.store.failed.load(Ordering::Relaxed)
            );
            model.finish();
        });
    }
}
