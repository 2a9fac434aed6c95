//! The page cache of braidfs.

#![deny(unsafe_code)]

mod backing;
mod cache;
mod error;
mod frame_vec;
mod read_data;
mod readahead;
mod space;
mod stats;
mod units;

pub use backing::{Backing, MapOut, Placement, Segment, SegmentKind};
pub use cache::{Cache, CacheConfig, SpaceClass};
pub use error::CacheError;
pub use frame_vec::FrameVec;
pub use read_data::ReadData;
pub use readahead::ReadaheadState;
pub use space::{AddressSpace, ReadDone, WriteOutcome, WriteResult};
pub use stats::CacheStats;
pub use units::PageRange;
