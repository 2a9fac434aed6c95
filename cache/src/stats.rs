//! Counters: cheap to bump from any thread, read together.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Copies of a counter that every hit bumps: as many as keep threads from sharing a cache line.
const SHARDS: usize = 8;

#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn sub(&self, count: u64) {
        let old = self.0.fetch_sub(count, Ordering::Relaxed);
        debug_assert!(old >= count, "counter below zero");
    }

    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Default)]
#[repr(align(128))]
struct Shard(AtomicU64);

/// A counter that each thread bumps in a cache line of its own.
#[derive(Default)]
pub(crate) struct HotCounter([Shard; SHARDS]);

impl HotCounter {
    pub fn add(&self, count: u64) {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local!(static SHARD: Cell<Option<usize>> = const { Cell::new(None) });
        let shard = SHARD.get().unwrap_or_else(|| {
            let shard = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            SHARD.set(Some(shard));
            shard
        });
        self.0[shard].0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn value(&self) -> u64 {
        self.0
            .iter()
            .map(|shard| shard.0.load(Ordering::Relaxed))
            .sum()
    }
}

#[derive(Default)]
pub(crate) struct Counters {
    pub hits: HotCounter,
    pub hit_bytes: HotCounter,
    pub misses: Counter,
    pub evicted_folios: Counter,
    pub evicted_pages: Counter,
    pub readahead_issued: Counter,
    pub readahead_used: Counter,
    pub readahead_wasted: Counter,
    pub read_pages: Counter,
    pub hole_pages: Counter,
    pub written_pages: Counter,
    pub writeback_batches: Counter,
    pub writeback_kiobufs: Counter,
    pub folios_by_order: [Counter; 9],
    pub cow_pages: Counter,
    pub splits: Counter,
    pub io_waits: Counter,
    pub frame_waits: Counter,
    pub throttled_ns: Counter,
    pub crc_errors: Counter,
    pub crc_repaired: Counter,
    pub read_errors: Counter,
    pub write_errors: Counter,
}

/// What the cache has done since it was made, and what it holds now.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct CacheStats {
    /// Memory of the cache.
    pub size_bytes: u64,
    /// What it was made with, and the most that it can have.
    pub size_bytes_max: u64,
    /// Of it, free.
    pub free_bytes: u64,
    /// Of the free part, kept for metadata.
    pub reserve_bytes: u64,
    /// Dirty bytes of file content, not yet in writeback.
    pub dirty_bytes: u64,
    /// Bytes of file content on their way to the devices.
    pub writeback_bytes: u64,
    /// Dirty bytes of metadata.
    pub meta_dirty_bytes: u64,
    /// Clean pages in the queue of folios used once.
    pub small_queue_pages: u64,
    /// Clean pages in the queue of folios used again.
    pub main_queue_pages: u64,
    /// Reads answered from the cache alone.
    pub hits: u64,
    /// Bytes of these.
    pub hit_bytes: u64,
    /// Reads that had to wait for a device or another read.
    pub misses: u64,
    /// Folios evicted.
    pub evicted_folios: u64,
    /// Pages evicted.
    pub evicted_pages: u64,
    /// Pages that readahead asked the devices for.
    pub readahead_issued_pages: u64,
    /// Pages of folios that readahead brought and somebody used.
    pub readahead_used_pages: u64,
    /// Pages that readahead brought and that were evicted unused.
    pub readahead_wasted_pages: u64,
    /// Pages read from the devices.
    pub read_pages: u64,
    /// Pages that read as zeros.
    pub hole_pages: u64,
    /// Pages written to the devices.
    pub written_pages: u64,
    /// Batches of writeback.
    pub writeback_batches: u64,
    /// Kiobufs that writeback built.
    pub writeback_kiobufs: u64,
    /// Folios made, by order: 4 KiB, 8 KiB, .. 1 MiB.
    pub folios_by_order: [u64; 9],
    /// Pages copied because a write met a pinned folio.
    pub cow_pages: u64,
    /// Large folios cut because a small write met them pinned.
    pub folio_splits: u64,
    /// Times somebody waited for I/O on a page.
    pub io_waits: u64,
    /// Times somebody waited for free memory.
    pub frame_waits: u64,
    /// Time that writers were held back.
    pub throttled_ns: u64,
    /// Writeback speed that throttling goes by, bytes per second.
    pub writeback_rate: u64,
    /// Blocks that did not match their checksum.
    pub crc_errors: u64,
    /// Of these, blocks whose other copy did.
    pub crc_repaired: u64,
    /// Fills that failed.
    pub read_errors: u64,
    /// Placements whose write failed.
    pub write_errors: u64,
}

impl Counters {
    /// The part of the statistics that is counted here.
    pub fn snapshot(&self) -> CacheStats {
        CacheStats {
            hits: self.hits.value(),
            hit_bytes: self.hit_bytes.value(),
            misses: self.misses.value(),
            evicted_folios: self.evicted_folios.value(),
            evicted_pages: self.evicted_pages.value(),
            readahead_issued_pages: self.readahead_issued.value(),
            readahead_used_pages: self.readahead_used.value(),
            readahead_wasted_pages: self.readahead_wasted.value(),
            read_pages: self.read_pages.value(),
            hole_pages: self.hole_pages.value(),
            written_pages: self.written_pages.value(),
            writeback_batches: self.writeback_batches.value(),
            writeback_kiobufs: self.writeback_kiobufs.value(),
            folios_by_order: std::array::from_fn(|order| self.folios_by_order[order].value()),
            cow_pages: self.cow_pages.value(),
            folio_splits: self.splits.value(),
            io_waits: self.io_waits.value(),
            frame_waits: self.frame_waits.value(),
            throttled_ns: self.throttled_ns.value(),
            crc_errors: self.crc_errors.value(),
            crc_repaired: self.crc_repaired.value(),
            read_errors: self.read_errors.value(),
            write_errors: self.write_errors.value(),
            ..CacheStats::default()
        }
    }
}
