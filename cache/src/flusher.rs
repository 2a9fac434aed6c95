//! The threads that write back in the background, and the list of spaces that need it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::cache::Cache;
use crate::event::Event;
use crate::stats::Counter;
use crate::units::PAGE;
use crate::writeback::Writer;
use crate::{AddressSpace, PageRange, SpaceClass};

/// How much of one space a background pass writes before others have their turn.
const PASS_PAGES_MAX: u64 = (64 << 20) / PAGE;
/// A flusher looks for old pages this often at least.
const TICK_MAX: Duration = Duration::from_secs(1);
/// A flusher that made no progress (all spaces busy or backing off) looks again after this.
const IDLE: Duration = Duration::from_millis(20);

/// Spaces with dirty pages, oldest first, and their sums. Its lock is a leaf.
#[derive(Default)]
pub(crate) struct DirtyList {
    spaces: Mutex<(u64, BTreeMap<u64, Weak<AddressSpace>>)>,
    pub dirty: Counter,
    pub writeback: Counter,
}

impl DirtyList {
    pub fn add(&self, space: &Weak<AddressSpace>) -> u64 {
        let mut list = self.spaces.lock();
        list.0 += 1;
        let key = list.0;
        list.1.insert(key, Weak::clone(space));
        key
    }

    pub fn remove(&self, key: u64) {
        self.spaces.lock().1.remove(&key);
    }

    /// All of them, oldest first.
    pub fn spaces(&self) -> Vec<Arc<AddressSpace>> {
        let list: Vec<_> = self.spaces.lock().1.values().cloned().collect();
        list.iter().filter_map(Weak::upgrade).collect()
    }
}

/// What wakes the flushers, and what tells others that they got on.
pub(crate) struct FlushSignal {
    wanted: Mutex<Wanted>,
    wake: Condvar,
    kicked: AtomicBool,
    /// Told when a group of pages has been written.
    pub progress: Event,
}

#[derive(Default)]
struct Wanted {
    kicks: u64,
    memory: bool,
    stop: bool,
}

impl FlushSignal {
    pub fn new() -> Self {
        Self {
            wanted: Mutex::default(),
            wake: Condvar::new(),
            kicked: AtomicBool::new(false),
            progress: Event::new(),
        }
    }

    /// Cheap when somebody has kicked and no flusher has looked since.
    pub fn kick(&self) {
        if !self.kicked.swap(true, Ordering::AcqRel) {
            self.wanted.lock().kicks += 1;
            self.wake.notify_one();
        }
    }

    pub fn want_memory(&self) {
        let mut wanted = self.wanted.lock();
        wanted.kicks += 1;
        wanted.memory = true;
        self.wake.notify_all();
    }

    pub fn stop(&self) {
        self.wanted.lock().stop = true;
        self.wake.notify_all();
        self.progress.notify();
    }

    /// Sleeps until somebody wants something; whether memory is short, or `None` to stop.
    fn wait(&self, limit: Duration) -> Option<bool> {
        let mut wanted = self.wanted.lock();
        if wanted.kicks == 0 && !wanted.stop {
            self.wake.wait_for(&mut wanted, limit);
        }
        wanted.kicks = 0;
        self.kicked.store(false, Ordering::Release);
        let memory = std::mem::take(&mut wanted.memory);
        (!wanted.stop).then_some(memory)
    }
}

/// A flusher thread. Holds the cache only while it works, so that the cache can go away.
pub(crate) fn run(cache: &Weak<Cache>, signal: &FlushSignal, expire: Duration) {
    let tick = (expire / 4).clamp(IDLE, TICK_MAX);
    let mut limit = tick;
    while let Some(memory_short) = signal.wait(limit) {
        let Some(cache) = cache.upgrade() else { return };
        let wrote = cache.flush_background(memory_short);
        let more = cache.is_over_background();
        limit = if more && wrote == 0 { IDLE } else { tick };
        if more && wrote > 0 {
            signal.kick();
        }
    }
}

impl Cache {
    pub(crate) fn is_over_background(&self) -> bool {
        self.dirty_list(SpaceClass::Data).dirty.value() > self.throttle.background_pages()
    }

    /// One round of background writeback; gives pages written.
    fn flush_background(&self, memory_short: bool) -> u64 {
        let mut wrote = 0;
        {
            let mut writer = Writer::new(self);
            for space in self.dirty_list(SpaceClass::Data).spaces() {
                let enough = !memory_short && !self.is_over_background();
                if self.is_stopped() || (enough && !space.is_expired(self.config.dirty_expire)) {
                    continue;
                }
                let Some(pass) = space.try_begin_pass(true) else {
                    continue;
                };
                wrote += writer.write_back(&pass, PageRange::ALL, PASS_PAGES_MAX);
            }
        }
        // Metadata is flushed by its owner, unless memory cannot be had otherwise.
        if memory_short && wrote == 0 {
            let mut writer = Writer::new(self);
            for space in self.dirty_list(SpaceClass::Meta).spaces() {
                let Some(pass) = space.try_begin_pass(true) else {
                    continue;
                };
                wrote += writer.write_back(&pass, PageRange::ALL, PASS_PAGES_MAX);
            }
        }
        wrote
    }
}

impl AddressSpace {
    fn is_expired(&self, expire: Duration) -> bool {
        let inner = self.inner.read();
        inner
            .dirty_since
            .is_some_and(|since| Instant::now() - since >= expire)
    }
}
