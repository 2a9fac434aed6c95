//! kiobufs, request queues and the striped volume of braidfs.
//!
//! The crate knows bytes and devices; nothing of files or of the page cache.
//!
//! | module | what |
//! | --- | --- |
//! | [`units`], [`error`] | block addresses, one `Copy` error |
//! | [`pages`] | who owns the memory a device reads or writes |
//! | [`kiobuf`] | a page vector with its own completion; the fan-in of its pieces |
//! | [`chain`] | linked views of kiobufs: O(1) merge, split without copying a page vector |
//! | [`request`] | one contiguous device range and the chain that fills it |
//! | `queue` | per-device queue: merge, order, depth, retry, flush |
//! | [`stripe`] | pure geometry: a range of a chunk to device pieces and back |
//! | [`label`], `table` | the on-disk label and chunk table |
//! | [`volume`] | assembled members: map, cut, submit, flush all |
//! | [`device`] | the `BlockDevice` seam; io_uring, thread pool and simulated backends |
//! | [`signature`] | what else may live on a device: asked before formatting |
//! | [`stats`] | counters and histograms |
//! | [`trace`] | single requests on their way, for who looks |
//!
//! Lock order: the table lock of a volume, then one queue's lock; a backend's own locks are leaves.
//! No lock is held while an `end_io` runs or a backend is called.
#![deny(unsafe_code)]

pub mod chain;
mod codec;
mod completion;
pub mod device;
pub mod error;
pub mod kiobuf;
pub mod label;
pub mod pages;
mod queue;
pub mod request;
pub mod signature;
pub mod stats;
pub mod stripe;
mod sync;
mod table;
pub mod trace;
pub mod units;
pub mod volume;

pub use chain::Chain;
pub use completion::FlushDone;
pub use device::BlockDevice;
pub use device::open::{
    ANSWER_TIME_DEFAULT, Backend, OpenError, OpenMode, backed_loop_device, open_device,
    write_protected,
};
pub use device::sim::SimDevice;
pub use error::{BlockError, ErrorKind, Op};
pub use kiobuf::{Completion, EndIo, InDoubt, Kiobuf};
pub use label::{LabelError, LabelInfo, read_label};
pub use pages::{AlignedBuf, PageRun, PageVector};
pub use request::{DeviceRequest, Flight};
pub use signature::foreign_signature;
pub use stats::{DirectionStats, Histogram, QueueStats, VolumeStats};
pub use table::TableError;
pub use units::{BLOCK_SIZE, PAGE_SIZE, VolBlock};
pub use volume::{
    Chunk, ChunkKind, ChunkMember, Class, DeviceInfo, DiscardError, FormatOptions, JournalCopies,
    LabelFault, Plug, Profile, Volume, VolumeError, VolumeErrorKind, VolumeInfo,
};
