//! Address spaces.
use std::sync::Arc;

use crate::{CacheError, PageRange, ReadData, ReadaheadState};

/// Called once with what was read.
pub type ReadDone = Box<dyn FnOnce(Result<ReadData, CacheError>) + Send>;

/// What a write did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOutcome {
    /// Pages that became dirty and were not. One under writeback that is dirtied again counts.
    pub newly_dirty_pages: u64,
}

/// A failed write tells what it had dirtied by then.
pub type WriteResult = Result<WriteOutcome, (CacheError, WriteOutcome)>;

/// The cached pages of one file.
pub struct AddressSpace {}

impl AddressSpace {
    /// The number the owner gave it.
    pub fn id(&self) -> u64 {
        unimplemented!()
    }
    /// All of `offset..offset + len`, if it is uptodate, without waiting.
    pub fn read_cached(
        self: &Arc<Self>,
        _offset: u64,
        _len: usize,
        _ra: &ReadaheadState,
    ) -> Option<ReadData> {
        unimplemented!()
    }
    /// Reads what is missing and calls `done` exactly once, maybe before returning, else on a
    /// completion thread.
    pub fn read(
        self: &Arc<Self>,
        _offset: u64,
        _len: usize,
        _ra: &ReadaheadState,
        _eof_bytes: u64,
        _done: ReadDone,
    ) {
        unimplemented!()
    }
    /// Copies `offset..offset + out.len()` to `out`.
    pub fn read_wait(self: &Arc<Self>, _offset: u64, _out: &mut [u8]) -> Result<(), CacheError> {
        unimplemented!()
    }
    /// Copies `data` into the cache.
    pub fn write(self: &Arc<Self>, _offset: u64, _data: &[u8]) -> WriteResult {
        unimplemented!()
    }
    /// Writes zeros.
    pub fn zero(self: &Arc<Self>, _offset: u64, _len: u64) -> WriteResult {
        unimplemented!()
    }
    /// Removes pages, waiting for I/O on them; returns how many dirty ones were dropped.
    pub fn discard(&self, _pages: PageRange) -> u64 {
        unimplemented!()
    }
    /// Writes back dirty pages of the range and waits. The error is the first of this flush.
    pub fn flush(self: &Arc<Self>, _pages: PageRange) -> Result<(), CacheError> {
        unimplemented!()
    }
    /// Is any page of the range cached?
    pub fn has_pages(&self, _pages: PageRange) -> bool {
        unimplemented!()
    }
    /// Pages that are dirty (one in writeback is not, unless dirtied again).
    pub fn dirty_page_count(&self) -> u64 {
        unimplemented!()
    }
    /// Pages that are uptodate.
    pub fn page_count(&self) -> u64 {
        unimplemented!()
    }
    /// The first run of dirty or writeback pages that ends behind `from_page`, cut to start there.
    pub fn next_cached_dirty(&self, _from_page: u64) -> Option<PageRange> {
        unimplemented!()
    }
    /// Counts write errors; a caller remembers the value and compares.
    pub fn write_error_seq(&self) -> u32 {
        unimplemented!()
    }
    /// The latest write error.
    pub fn last_write_error(&self) -> Option<CacheError> {
        unimplemented!()
    }
}
