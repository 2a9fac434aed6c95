//! The FUSE front end: requests of the kernel become calls of the core, and back. No policy here.
//!
//! | file | what |
//! | --- | --- |
//! | `protocol.rs` | numbers and layouts of the FUSE protocol |
//! | `channel.rs` | reading requests, sending replies and notifications |
//! | `reply.rs` | the answer to one request, from any thread |
//! | `init.rs` | what is negotiated with the kernel |
//! | `dispatch.rs` | which method serves which request |
//! | `names.rs`, `files.rs`, `dir.rs`, `ioctl.rs` | these methods, short |
//! | `attr.rs` | attributes and times |
//! | `handles.rs` | open files by handle |
//! | `interrupt.rs` | killed processes, and threads that all wait |
//! | `blocking.rs` | threads for requests that wait for the devices |
//! | `attach.rs` | mount(2) or fusermount3, and the way back |
//! | `mounts.rs` | what /proc/self/mountinfo says |
//! | `session.rs` | from a mounted core to a served mount point |
//! | `stats.rs` | what is counted |
//! | `transport.rs` | the transport without a file system |
//! | `null.rs` | a server on it that does nothing, to measure against |
//! | `bench.rs`, `fuzzing.rs` | for tests: a front end without a kernel, and a mad kernel |
//!
//! The transport is our own, because no library knows all requests that Linux sends (TMPFILE,
//! STATX, the longer SETXATTR), and because pages go out as they lie.
//!
//! Threads: a few read requests from the kernel, each from a file descriptor of its own. READ and
//! WRITE are answered by whichever thread completes them in the core. Requests that wait for a
//! commit go to the `blocking` pool. No lock is held over a call of the core.

mod attach;
mod attr;
#[cfg(any(test, feature = "fuzzing"))]
mod bench;
mod blocking;
mod channel;
mod dir;
mod dispatch;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzzing;
mod handles;
mod init;
mod interrupt;
mod ioctl;
pub mod mounts;
mod names;
pub mod null;
mod protocol;
mod reply;
mod session;
mod stats;
pub mod transport;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use braidfs_blockdev::trace;
use braidfs_cache::LANDING_BYTES;
use log::debug;
use serde_json::{Value, json};

pub use attach::{AttachError, MountSpec, Unmount, abort_connection, unmount, unmount_if_ours};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use fuzzing::{requests as fuzz_requests, seeds as fuzz_request_seeds};
pub use init::InitError;
pub use interrupt::SlowRequest;
pub use nix::mount::MsFlags;
pub use session::{MountHandle, Mounted, READ_AHEAD_KB, Sample, mount};
pub use stats::RequestStats;

use crate::{FileSystem, Ino};
use channel::Channel;
use handles::Handles;
use interrupt::Unanswered;
use stats::FuseStats;

/// Who keeps file data in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// Who only reads a file does so through the kernel's page cache, who may write it goes past
    /// that: large writes are not copied once more, small reads need no round trip, and errors,
    /// times and durability are as without that cache. The kernel drops the pages that a write
    /// hits.
    Auto,
    /// braidfs's own cache alone; files are opened FOPEN_DIRECT_IO, with mmap allowed.
    Direct,
    /// The kernel's page cache in front of it, with write-back.
    Kernel,
}

/// How the front end is run.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// Who caches data.
    pub cache_mode: CacheMode,
    /// Threads that read requests.
    pub threads: usize,
    /// How long the kernel may believe names and attributes. Nobody else changes the tree, so this
    /// can be long.
    pub timeout: Duration,
}

/// How long the kernel may believe names and attributes when nothing else was asked for.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(86_400);

/// Most threads that read requests.
pub const THREADS_MAX: usize = 256;

/// Fewest threads by default: writers that are throttled must leave some for readers.
const THREADS_DEFAULT_MIN: usize = 8;

/// What requests are called, by their numbers in traces.
pub fn op_names() -> &'static [&'static str] {
    protocol::Opcode::NAMES
}

/// Threads when nothing else was asked for: two for each processor.
pub fn threads_default() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (2 * cores).clamp(THREADS_DEFAULT_MIN, 64)
}

/// Threads may keep one part in so many of the cache for payloads to land in.
const LANDING_SHARE: u64 = 16;

/// The state that requests share.
struct Shared {
    fs: Arc<FileSystem>,
    handles: Handles,
    unanswered: Unanswered,
    stats: FuseStats,
    since: Instant,
    options: FuseOptions,
    /// The connection's first channel; notifications go through it.
    channel: Arc<Channel>,
    /// Others than root and this user are kept out.
    only: Option<u32>,
}

impl Shared {
    /// Has the kernel ask for the attributes of an inode again. It believes that no request but
    /// SETATTR changes a mode, so it must be told when set-id bits went with a write.
    fn forget_attributes(&self, ino: Ino) {
        if let Err(error) = self.channel.forget_attributes(ino) {
            debug!("inode {ino} is not in the kernel's cache: {error}");
        }
    }

    /// Bytes of the cache in which payloads may come to lie, one piece for each thread.
    fn landing_bytes(&self) -> u64 {
        self.options.threads as u64 * LANDING_BYTES as u64
    }

    /// Whether the cache is large enough for that.
    fn may_land(&self) -> bool {
        self.fs.cache().size_bytes() / LANDING_SHARE >= self.landing_bytes()
    }

    /// Whether a user is let in.
    fn admits(&self, uid: u32) -> bool {
        self.only.is_none_or(|owner| uid == 0 || uid == owner)
    }

    /// What `st_blksize` says.
    fn blksize(&self) -> u32 {
        match self.options.cache_mode {
            CacheMode::Auto | CacheMode::Direct => attr::BLKSIZE_DIRECT,
            CacheMode::Kernel => attr::BLKSIZE_CACHED,
        }
    }

    /// The section `fuse` of the statistics.
    fn stats_value(&self) -> Value {
        let stats = &self.stats;
        json!({
            "cache_mode": match self.options.cache_mode {
                CacheMode::Auto => "auto",
                CacheMode::Direct => "direct_io",
                CacheMode::Kernel => "writeback_cache",
            },
            "threads": self.options.threads,
            "open_files": self.handles.count(),
            "traced": trace::is_on(),
            "requests_in_flight": stats.in_flight.load(Relaxed),
            "read_bytes": stats.read_bytes.load(Relaxed),
            "write_bytes": stats.write_bytes.load(Relaxed),
            "requests": stats.requests(),
        })
    }
}
