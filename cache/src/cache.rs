//! The cache of one volume: arena, queues, limits and threads, and the spaces made from it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use braidfs_blockdev::Volume;
use parking_lot::Mutex;

use crate::arena::{Arena, Frame};
use crate::flusher::{self, DirtyList, FlushSignal};
use crate::helper::Helper;
use crate::prefault;
use crate::queues::Queues;
use crate::stats::Counters;
use crate::throttle::Throttle;
use crate::units::PAGE;
use crate::{AddressSpace, Backing, CacheStats};

/// Flusher threads beyond this are of no use.
const FLUSHERS_MAX: usize = 16;

/// A cache that is not larger is not touched ahead: checks and tests use few of its pages, and a
/// load has touched all of them within a fraction of a second.
const PREFAULT_ABOVE_BYTES: u64 = 64 << 20;

/// How large the cache is and when it writes back.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Memory of the arena; at least 4 MiB are used.
    pub size_bytes: u64,
    /// Percent of the arena that may be dirty before the flushers start.
    pub dirty_background_percent: u8,
    /// Percent of the arena that may be dirty before writers wait.
    pub dirty_hard_percent: u8,
    /// Age at which dirty pages are written back anyway.
    pub dirty_expire: Duration,
    /// Largest readahead window; 0 for no readahead.
    pub readahead_max_bytes: u32,
    /// Threads that write back in the background.
    pub flusher_threads: usize,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            size_bytes: 256 << 20,
            dirty_background_percent: 10,
            dirty_hard_percent: 40,
            dirty_expire: Duration::from_secs(5),
            readahead_max_bytes: 4 << 20,
            flusher_threads: 2,
        }
    }
}

impl CacheConfig {
    fn readahead_pages_max(&self, arena_pages: u32) -> u64 {
        (u64::from(self.readahead_max_bytes) / PAGE).min(u64::from(arena_pages) / 8)
    }
}

/// What kind of pages an address space holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceClass {
    /// File content.
    Data,
    /// The metadata store: may dip into the reserve, and is flushed by its owner.
    Meta,
}

/// The page cache of one volume.
pub struct Cache {
    pub(crate) config: CacheConfig,
    pub(crate) arena: Arc<Arena>,
    pub(crate) volume: Arc<Volume>,
    pub(crate) queues: Queues,
    pub(crate) counters: Counters,
    pub(crate) throttle: Throttle,
    readahead_pages_max: AtomicU64,
    /// Frames that are not to be used: their memory is the system's.
    pub(crate) held: Mutex<Vec<Frame>>,
    pub(crate) flush_signal: Arc<FlushSignal>,
    pub(crate) helper: Arc<Helper>,
    pub(crate) stopped: Arc<AtomicBool>,
    lists: [DirtyList; 2],
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Cache {
    /// Maps the arena, shows it to the volume's devices and starts the threads.
    pub fn new(config: CacheConfig, volume: Arc<Volume>) -> io::Result<Arc<Cache>> {
        let arena = Arena::new(config.size_bytes)?;
        volume.register_memory(arena.run());
        let pages = arena.pages();
        let cache = Arc::new(Cache {
            queues: Queues::new(pages),
            counters: Counters::default(),
            throttle: Throttle::new(&config, pages),
            readahead_pages_max: AtomicU64::new(config.readahead_pages_max(pages)),
            held: Mutex::default(),
            flush_signal: Arc::new(FlushSignal::new()),
            helper: Arc::default(),
            stopped: Arc::default(),
            lists: Default::default(),
            threads: Mutex::default(),
            config,
            arena,
            volume,
        });
        cache.start_threads()?;
        Ok(cache)
    }

    pub(crate) fn readahead_pages_max(&self) -> u64 {
        self.readahead_pages_max.load(Ordering::Relaxed)
    }

    /// Limits go by so many pages.
    pub(crate) fn set_usable_pages(&self, pages: u32) {
        self.arena.set_usable_pages(pages);
        self.throttle.set_pages(pages);
        self.queues.set_pages(pages);
        let readahead = self.config.readahead_pages_max(pages);
        self.readahead_pages_max.store(readahead, Ordering::Relaxed);
    }

    fn start_threads(self: &Arc<Self>) -> io::Result<()> {
        let mut threads = self.threads.lock();
        let named = |name: &str| thread::Builder::new().name(name.into());
        if self.config.size_bytes > PREFAULT_ABOVE_BYTES {
            let (arena, stop) = (Arc::clone(&self.arena), Arc::clone(&self.stopped));
            threads.push(named("prefault").spawn(move || prefault::run(&arena, &stop))?);
        }
        let helper = Arc::clone(&self.helper);
        threads.push(named("cache-helper").spawn(move || helper.work())?);
        for _ in 0..self.config.flusher_threads.clamp(1, FLUSHERS_MAX) {
            let cache = Arc::downgrade(self);
            let signal = Arc::clone(&self.flush_signal);
            let expire = self.config.dirty_expire;
            let flusher = named("flusher").spawn(move || flusher::run(&cache, &signal, expire))?;
            threads.push(flusher);
        }
        Ok(())
    }

    /// A new, empty address space. `id` is what the backing is called with.
    pub fn new_space(
        self: &Arc<Self>,
        id: u64,
        class: SpaceClass,
        backing: Arc<dyn Backing>,
    ) -> Arc<AddressSpace> {
        AddressSpace::new(id, class, Arc::clone(self), backing)
    }

    pub(crate) fn dirty_list(&self, class: SpaceClass) -> &DirtyList {
        &self.lists[class as usize]
    }

    /// Dirty bytes of Data spaces; those in writeback do not count.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_list(SpaceClass::Data).dirty.value() * PAGE
    }

    /// Bytes of Data spaces in writeback.
    pub fn writeback_bytes(&self) -> u64 {
        self.dirty_list(SpaceClass::Data).writeback.value() * PAGE
    }

    /// Drops every clean folio that is not in use.
    pub fn drop_clean(&self) {
        self.evict_all();
    }

    /// The counters.
    pub fn stats(&self) -> CacheStats {
        let [small_queue_pages, main_queue_pages] = self.queues.pages();
        CacheStats {
            size_bytes: self.size_bytes(),
            size_bytes_max: self.size_bytes_max(),
            free_bytes: u64::from(self.arena.free_pages()) * PAGE,
            reserve_bytes: u64::from(self.arena.reserve_pages()) * PAGE,
            dirty_bytes: self.dirty_bytes(),
            writeback_bytes: self.writeback_bytes(),
            meta_dirty_bytes: self.dirty_list(SpaceClass::Meta).dirty.value() * PAGE,
            small_queue_pages,
            main_queue_pages,
            writeback_rate: self.throttle.rate(),
            ..self.counters.snapshot()
        }
    }

    /// Stops the threads; whoever waits for memory or is throttled is let go. The owner has
    /// flushed before. Idempotent.
    pub fn shutdown(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.flush_signal.stop();
        self.helper.stop();
        self.arena.freed.notify();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // The last reference may be dropped by one of the threads itself.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                log::error!("a thread of the cache panicked");
            }
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shutdown();
    }
}
