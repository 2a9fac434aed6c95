//! The one error of the crate: `Copy`, because one failed I/O is reported to every waiter.

use braidfs_blockdev::{BlockError, VolBlock};

/// Why the cache could not do what it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// The device said no.
    #[error("{0}")]
    Block(BlockError),
    /// No copy of the block has the content its checksum says.
    #[error("block {} does not match its checksum", block.0)]
    Corrupt {
        /// The block, in the volume's logical space.
        block: VolBlock,
    },
    /// No memory became free in time.
    #[error("no free page in the cache")]
    NoFrames,
    /// The cache is going away.
    #[error("the cache is shut down")]
    ShutDown,
    /// The owner of the pages said no, with this errno.
    #[error("the owner of the pages failed with errno {0}")]
    Backing(i32),
}

impl CacheError {
    /// The errno a caller of the file system sees.
    pub fn errno(&self) -> i32 {
        match self {
            CacheError::Block(error) => error.errno(),
            CacheError::Corrupt { .. } | CacheError::ShutDown => libc::EIO,
            CacheError::NoFrames => libc::ENOMEM,
            CacheError::Backing(errno) => *errno,
        }
    }
}
