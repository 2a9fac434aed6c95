//! The page cache of braidfs: files-as-numbers in memory, between a file system and a volume.
//!
//! The cache asks the owner of pages, through the trait [`Backing`], where they live and where
//! they shall live; it knows nothing of names, inodes or the on-disk format.
//!
//! | file | what |
//! | --- | --- |
//! | `arena` `buddy` `refcount` | one mapping, cut into frames of 2^k pages, pinned by count |
//! | `frame_vec` `read_data` | frames lent to devices; pinned slices lent to readers |
//! | `folio` `space` | a run of cached pages with state bits; the folios of one file |
//! | `read` `fill` `readahead` | hits and requests; device reads, verified; reading ahead |
//! | `write` | writing into folios: in place, to a copy, or to a new folio |
//! | `writeback` `flusher` `throttle` | dirty runs to new homes; when; and how writers are slowed |
//! | `queues` `reclaim` | which folio to evict; memory for whoever needs it |
//! | `resize` | less memory, or what there was at first, while it is used |
//!
//! # Rules
//!
//! 1. *Bytes.* Whoever holds a frame's handle may read, whoever holds its only handle may write, a
//!    device reads into frames that nobody can reach. So a page under writeback keeps the bytes its
//!    checksum was taken from, and a reader's slice never changes.
//! 2. *Locks.* Address space, then one of: replacement queues, arena, list of dirty spaces. No two
//!    spaces at once. None is held while calling a backing, a volume or a completion callback, nor
//!    while waiting.
//! 3. *I/O.* A page is under at most one I/O: reading (owned by a fill) or writeback (owned by the
//!    space's one pass). Discard waits for both, a write waits for reading; I/O always ends.
//! 4. *Progress.* Waiting for memory holds nothing that others wait for: what a reader claimed is
//!    submitted first. Writeback needs no frame. What a backing reads to answer comes from Meta
//!    spaces, which have a reserve of frames to themselves.
//! 5. *Accounts.* Newly dirty (as writes report) - dropped dirty (as discard reports) - pages
//!    allocated + pages that failed - pages merged = dirty pages, always.

#![deny(unsafe_code)]

mod arena;
mod backing;
mod buddy;
mod cache;
mod error;
mod event;
mod fill;
mod flusher;
mod folio;
mod frame_vec;
mod helper;
mod prefault;
mod queues;
mod read;
mod read_data;
mod readahead;
mod reclaim;
mod refcount;
mod resize;
mod space;
mod stats;
mod sync;
mod throttle;
mod units;
mod write;
mod writeback;

pub use backing::{Backing, MapOut, Placement, Segment, SegmentKind};
pub use cache::{Cache, CacheConfig, SpaceClass};
pub use error::CacheError;
pub use frame_vec::{FrameVec, Lender};
pub use read::ReadDone;
pub use read_data::ReadData;
pub use readahead::ReadaheadState;
pub use reclaim::LANDING_BYTES;
pub use resize::ResizeError;
pub use space::{AddressSpace, WriteOutcome, WriteResult};
pub use stats::CacheStats;
pub use units::PageRange;
pub use writeback::WritebackHold;
