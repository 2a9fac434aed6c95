//! Dirty throttling: writers slow down smoothly to the pace of the devices.
//!
//! Up to the middle between the background and the hard limit nobody waits. From there on a
//! writer is charged the time the devices need for the bytes that were dirtied, times a factor
//! that grows from 0 to 2 at the hard limit: the pace settles where as much is written as is
//! dirtied. The charges of all writers go to one clock, so that many are slowed like one. At the
//! hard limit writers wait for writeback, with a bound.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use braidfs_blockdev::trace::{self, Kind};
use parking_lot::Mutex;

use crate::cache::{Cache, CacheConfig};
use crate::units::PAGE;

/// Longest pause below the hard limit.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Pauses shorter than this are saved up.
const PAUSE_MIN: Duration = Duration::from_micros(500);
/// Longest wait at the hard limit: beyond it memory itself is the bound.
const HARD_WAIT_MAX: Duration = Duration::from_secs(20);
/// Assumed speed until some was measured, and the least that is believed.
const RATE_FIRST: u64 = 500 << 20;
const RATE_MIN: u64 = 1 << 20;

pub(crate) struct Throttle {
    background_percent: u8,
    hard_percent: u8,
    background_pages: AtomicU64,
    hard_pages: AtomicU64,
    /// Bytes per second that writeback makes when it is busy.
    rate: AtomicU64,
    /// Pages dirtied up to the last charge, by the cache's total.
    charged: AtomicU64,
    dirtied: AtomicU64,
    /// Until when the charges of all writers reach.
    clock: Mutex<Instant>,
}

impl Throttle {
    pub fn new(config: &CacheConfig, arena_pages: u32) -> Self {
        let throttle = Self {
            background_percent: config.dirty_background_percent,
            hard_percent: config.dirty_hard_percent,
            background_pages: AtomicU64::new(0),
            hard_pages: AtomicU64::new(0),
            rate: AtomicU64::new(RATE_FIRST),
            charged: AtomicU64::new(0),
            dirtied: AtomicU64::new(0),
            clock: Mutex::new(Instant::now()),
        };
        throttle.set_pages(arena_pages);
        throttle
    }

    /// The limits are parts of so many pages.
    pub fn set_pages(&self, pages: u32) {
        let percent = |part: u8| u64::from(pages) * u64::from(part.min(90)) / 100;
        let background = percent(self.background_percent);
        let hard = percent(self.hard_percent).max(background + 2);
        self.background_pages.store(background, Ordering::Relaxed);
        self.hard_pages.store(hard, Ordering::Relaxed);
    }

    /// Dirty pages from which the flushers work.
    pub fn background_pages(&self) -> u64 {
        self.background_pages.load(Ordering::Relaxed)
    }

    /// Dirty pages at which writers wait.
    pub fn hard_pages(&self) -> u64 {
        self.hard_pages.load(Ordering::Relaxed)
    }

    pub fn rate(&self) -> u64 {
        self.rate.load(Ordering::Relaxed)
    }

    /// `bytes` were written in `busy` time: moves the rate an eighth of the way.
    pub fn note_written(&self, bytes: u64, busy: Duration) {
        // Little says nothing about speed.
        if bytes < 1 << 20 || busy.is_zero() {
            return;
        }
        let nanos = u64::try_from(busy.as_nanos()).unwrap_or(u64::MAX);
        let now = u128::from(bytes) * 1_000_000_000 / u128::from(nanos);
        let now = u64::try_from(now)
            .unwrap_or(u64::MAX / 16)
            .clamp(RATE_MIN, u64::MAX / 16);
        let old = self.rate();
        self.rate
            .store((old / 8 * 7 + now / 8).max(RATE_MIN), Ordering::Relaxed);
    }

    pub fn note_dirtied(&self, pages: u64) {
        self.dirtied.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages dirtied since the last call by anyone.
    fn take_dirtied(&self) -> u64 {
        let total = self.dirtied.load(Ordering::Relaxed);
        total.saturating_sub(self.charged.swap(total, Ordering::Relaxed))
    }

    /// How long a writer pauses with `unclean` pages dirty or in writeback, `dirtied` of them new.
    fn pause(&self, unclean: u64, dirtied: u64) -> Duration {
        let hard = self.hard_pages();
        let setpoint = (self.background_pages() + hard) / 2;
        let over = unclean.saturating_sub(setpoint);
        let span = hard.saturating_sub(setpoint).max(1);
        let nanos = u128::from(dirtied * PAGE) * 1_000_000_000 / u128::from(self.rate());
        let nanos = nanos * 2 * u128::from(over) / u128::from(span);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Charges `cost` to the clock that all writers share; gives how long this one sleeps.
    fn charge(&self, cost: Duration) -> Duration {
        let now = Instant::now();
        let mut clock = self.clock.lock();
        let until = ((*clock).max(now) + cost).min(now + PAUSE_MAX);
        *clock = until;
        until - now
    }
}

impl Cache {
    /// Called by writers before a write, no locks held. Costs a few loads while little is dirty;
    /// above that slows the caller down, and above the hard limit waits, with a bound.
    pub fn balance_dirty(&self) {
        let throttle = &self.throttle;
        let unclean = self.unclean_pages();
        if unclean <= throttle.background_pages() {
            return;
        }
        if self.is_over_background() {
            self.flush_signal.kick();
        }
        let dirtied = throttle.take_dirtied();
        let cost = throttle.pause(unclean.min(throttle.hard_pages()), dirtied);
        if cost.is_zero() {
            return;
        }
        let began = Instant::now();
        let since = trace::now();
        let pause = throttle.charge(cost);
        if pause >= PAUSE_MIN {
            std::thread::sleep(pause);
        }
        let deadline = began + HARD_WAIT_MAX;
        loop {
            let ticket = self.flush_signal.progress.ticket();
            let over = self.unclean_pages() >= throttle.hard_pages();
            if !over || self.is_stopped() || Instant::now() >= deadline {
                break;
            }
            self.flush_signal.kick();
            self.flush_signal
                .progress
                .wait(ticket, Duration::from_millis(100));
        }
        let held = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.throttled_ns.add(held);
        trace::waited(Kind::Held, since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle() -> Throttle {
        Throttle::new(&CacheConfig::default(), 100_000)
    }

    #[test]
    fn no_pause_up_to_the_middle_then_growing() {
        let throttle = throttle();
        assert_eq!(
            (throttle.background_pages(), throttle.hard_pages()),
            (10_000, 40_000)
        );
        assert!(throttle.pause(25_000, 256).is_zero());
        let middle = throttle.pause(32_500, 256);
        let hard = throttle.pause(40_000, 256);
        // Half way up, the charge is what the device needs for the bytes.
        assert_eq!(
            middle.as_nanos(),
            256 * 4096 * 1_000_000_000 / u128::from(RATE_FIRST)
        );
        assert!(hard.as_nanos().abs_diff(2 * middle.as_nanos()) < 10);
    }

    #[test]
    fn writers_share_one_clock() {
        let throttle = throttle();
        let cost = Duration::from_millis(20);
        let first = throttle.charge(cost);
        let second = throttle.charge(cost);
        assert!(second > first + Duration::from_millis(10));
        for _ in 0..100 {
            assert!(throttle.charge(cost) <= PAUSE_MAX);
        }
    }

    #[test]
    fn the_rate_follows_what_is_measured() {
        let throttle = throttle();
        for _ in 0..60 {
            throttle.note_written(100 << 20, Duration::from_secs(1));
        }
        let rate = throttle.rate() >> 20;
        assert!((95..=105).contains(&rate), "{rate}");
    }
}
