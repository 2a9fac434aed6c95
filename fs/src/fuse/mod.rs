//! The FUSE front end: requests of the kernel become calls of the core, and back. No policy here.
//!
//! | file | what |
//! | --- | --- |
//! | `ops.rs` | the `fuser::Filesystem` implementation, one short method per request |
//! | `data.rs` | replies to READ and WRITE, sent from the core's completions |
//! | `dir.rs` | READDIR and READDIRPLUS |
//! | `init.rs` | what is negotiated with the kernel |
//! | `attr.rs` | attributes, times, errors |
//! | `handles.rs` | open files by handle |
//! | `blocking.rs` | threads for requests that wait for the devices |
//! | `attach.rs` | mount(2) or fusermount3, and the way back |
//! | `mounts.rs` | what /proc/self/mountinfo says |
//! | `session.rs` | from a mounted core to a served mount point |
//! | `stats.rs` | what is counted |
//!
//! Threads: a few read requests from the kernel, each from a file descriptor of its own. READ and
//! WRITE are answered by whichever thread completes them in the core. Requests that wait for a
//! commit go to the `blocking` pool. No lock is held over a call of the core.

mod attach;
mod attr;
mod blocking;
mod data;
mod dir;
mod handles;
mod init;
pub mod mounts;
mod ops;
mod session;
mod stats;

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{FileAttr, INodeNo, Notifier};
use log::debug;
use serde_json::{Value, json};

pub use attach::{AttachError, MountSpec, Unmount, abort_connection, unmount, unmount_if_ours};
pub use nix::mount::MsFlags;
pub use session::{MountHandle, Mounted, mount};

use crate::{Attr, FileSystem, Ino};
use blocking::Blocking;
use handles::Handles;
use stats::FuseStats;

/// Who keeps file data in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
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

/// Threads when nothing else was asked for: two for each processor.
pub fn threads_default() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (2 * cores).clamp(THREADS_DEFAULT_MIN, 64)
}

/// Whether the core inherits default ACLs and keeps mode and ACL in step. Until it does, ACLs are
/// not offered to the kernel, which then applies the umask itself.
const ACL_SUPPORTED: bool = true;

/// The state that requests share.
struct Shared {
    fs: Arc<FileSystem>,
    handles: Handles,
    stats: FuseStats,
    options: FuseOptions,
    /// Set before the first request is read.
    notifier: OnceLock<Notifier>,
}

impl Shared {
    /// Has the kernel ask for the attributes of an inode again. It believes that no request but
    /// SETATTR changes a mode, so it must be told when set-id bits went with a write.
    fn forget_attributes(&self, ino: Ino) {
        const NO_PAGES: i64 = -1;
        if let Some(notifier) = self.notifier.get()
            && let Err(error) = notifier.inval_inode(INodeNo(ino), NO_PAGES, 0)
        {
            debug!("inode {ino} is not in the kernel's cache: {error}");
        }
    }

    /// Attributes as fuser wants them.
    fn file_attr(&self, attr: &Attr) -> FileAttr {
        let blksize = match self.options.cache_mode {
            CacheMode::Direct => attr::BLKSIZE_DIRECT,
            CacheMode::Kernel => attr::BLKSIZE_CACHED,
        };
        attr::file_attr(attr, blksize)
    }

    /// The section `fuse` of the statistics.
    fn stats_value(&self) -> Value {
        let stats = &self.stats;
        json!({
            "cache_mode": match self.options.cache_mode {
                CacheMode::Direct => "direct_io",
                CacheMode::Kernel => "writeback_cache",
            },
            "threads": self.options.threads,
            "open_files": self.handles.count(),
            "requests_in_flight": stats.in_flight.load(Relaxed),
            "read_bytes_zero_copy": stats.read_bytes_zero_copy.load(Relaxed),
            "read_bytes_bounced": stats.read_bytes_bounced.load(Relaxed),
            "write_bytes": stats.write_bytes.load(Relaxed),
            "requests": stats.requests(),
        })
    }
}

/// What fuser calls. Cheap to move around: everything is in `Shared`.
struct FrontEnd {
    shared: Arc<Shared>,
    blocking: Blocking,
}
