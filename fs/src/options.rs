//! What a mount can be told, independent of how it was spelt on a command line.

use std::time::Duration;

/// When reading updates a file's access time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtimeMode {
    /// Only when it would get newer than mtime or ctime, or is older than a day.
    Relatime,
    /// Never.
    Noatime,
    /// At every read.
    Strictatime,
}

/// Options of a mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// Change nothing on the devices.
    pub read_only: bool,
    /// Longest time between two commits of dirty state.
    pub commit_interval: Duration,
    /// Size of the page cache in bytes.
    pub cache_bytes: u64,
    /// Access times.
    pub atime: AtimeMode,
    /// Reading directories does not change their access times.
    pub nodiratime: bool,
    /// Every write is durable before it returns.
    pub sync: bool,
    /// Give freed blocks back to the devices (punch holes in image files, discard).
    pub discard: bool,
}

/// Smallest cache that works: a few largest folios and the metadata reserve.
pub const CACHE_BYTES_MIN: u64 = 16 << 20;

/// Default interval between commits.
pub const COMMIT_INTERVAL_DEFAULT: Duration = Duration::from_secs(5);

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            commit_interval: COMMIT_INTERVAL_DEFAULT,
            cache_bytes: 256 << 20,
            atime: AtimeMode::Relatime,
            nodiratime: false,
            sync: false,
            discard: false,
        }
    }
}
