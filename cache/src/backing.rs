//! What the cache asks of the owner of pages: where they live, where they shall live, and the
//! news that they got there.

use braidfs_blockdev::{BlockError, InDoubt, VolBlock};

use crate::{CacheError, PageRange};

/// Owner of the pages of one or more address spaces. Called without any cache lock held, from
/// flusher, reader and helper threads.
pub trait Backing: Send + Sync {
    /// Where `pages` live now. Pushes segments in order that cover the range exactly.
    fn map(&self, space: u64, pages: PageRange, out: &mut MapOut) -> Result<(), CacheError>;

    /// Homes for dirty pages about to be written. `runs` are disjoint and in file order; the
    /// placements pushed must cover them exactly, in file order, none reaching over a run's end.
    fn allocate(
        &self,
        space: u64,
        runs: &[PageRange],
        out: &mut Vec<Placement>,
    ) -> Result<(), CacheError>;

    /// The pages of one placement are on the devices now (not flushed), or failed. Called once per
    /// placement, never on a completion thread, before the pages leave the writeback state. When
    /// `result` is an error the pages become dirty again after the call. `crcs` has one CRC32C for
    /// each block of the placement.
    fn written(
        &self,
        space: u64,
        placement: Placement,
        crcs: &[u32],
        result: Result<(), BlockError>,
    );

    /// The write of this placement is about to be reported as failed because a device did not
    /// answer: it may still be carried out, until `in_doubt` says that it is over.
    fn in_doubt(&self, _space: u64, _placement: Placement, _in_doubt: InDoubt) {}

    /// `pages` pages whose writeback failed had been dirtied again meanwhile: they were counted
    /// as newly dirty by that write and are one dirty page each now, not two. Called after
    /// [`Backing::written`] (or after a failed [`Backing::allocate`]).
    fn dirty_merged(&self, _space: u64, _pages: u64) {}

    /// Copy `copy` of `block` did not match its checksum.
    fn corrupt(&self, _space: u64, _page: u64, _block: VolBlock, _copy: u8) {}
}

/// A run of pages that live in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The pages.
    pub pages: PageRange,
    /// Where they live.
    pub kind: SegmentKind,
}

/// Where the pages of a segment live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// Nowhere: they read as zeros (a hole, or allocated and never written).
    Hole,
    /// In consecutive blocks from `block` on.
    Data {
        /// Home of the first page.
        block: VolBlock,
        /// Where in [`MapOut::crcs`] the checksum of the first page is, one per page from there
        /// on; `None` if the pages have none to verify.
        crc_index: Option<usize>,
    },
}

/// What [`Backing::map`] fills.
#[derive(Default, Debug)]
pub struct MapOut {
    /// Segments in order.
    pub segments: Vec<Segment>,
    /// CRC32C of the blocks of Data segments.
    pub crcs: Vec<u32>,
}

/// Dirty pages and their new home: consecutive blocks from `block` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The pages.
    pub pages: PageRange,
    /// Home of the first one.
    pub block: VolBlock,
}
