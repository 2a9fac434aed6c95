//! The cache.
use std::io;
use std::sync::Arc;
use std::time::Duration;

use braidfs_blockdev::Volume;

use crate::{AddressSpace, Backing, CacheStats, FrameVec};

/// How large the cache is and when it writes back.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    /// Memory of the arena.
    pub size_bytes: u64,
    /// Percent of the arena that may be dirty before the flushers start.
    pub dirty_background_percent: u8,
    /// Percent of the arena that may be dirty before writers wait.
    pub dirty_hard_percent: u8,
    /// Age at which dirty pages are written back anyway.
    pub dirty_expire: Duration,
    /// Largest readahead window.
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

/// What kind of pages an address space holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpaceClass {
    /// File content.
    Data,
    /// The metadata store: may dip into the reserve, is flushed by its owner.
    Meta,
}

/// The page cache of one volume.
pub struct Cache {}

impl Cache {
    /// Makes the arena and starts the threads.
    pub fn new(_config: CacheConfig, _volume: Arc<Volume>) -> io::Result<Arc<Cache>> {
        unimplemented!()
    }
    /// A new, empty address space.
    pub fn new_space(
        self: &Arc<Self>,
        _id: u64,
        _class: SpaceClass,
        _backing: Arc<dyn Backing>,
    ) -> Arc<AddressSpace> {
        unimplemented!()
    }
    /// Writes back and waits until no page of that class that was dirty at the call is dirty or in
    /// writeback. Pages whose write failed stay dirty and count as done.
    pub fn flush_all(&self, _class: SpaceClass) {
        unimplemented!()
    }
    /// Dirty bytes of Data spaces.
    pub fn dirty_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Bytes of Data spaces in writeback.
    pub fn writeback_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Called by writers before a write, no locks held.
    pub fn balance_dirty(&self) {
        unimplemented!()
    }
    /// Private pages for direct I/O; waits, with a bound, for memory.
    pub fn alloc_private(&self, _len: usize) -> Option<FrameVec> {
        unimplemented!()
    }
    /// Drops every clean folio.
    pub fn drop_clean(&self) {
        unimplemented!()
    }
    /// The counters.
    pub fn stats(&self) -> CacheStats {
        unimplemented!()
    }
    /// Stops the threads. Idempotent.
    pub fn shutdown(&self) {
        unimplemented!()
    }
}
