//! How far a check is, and being told to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::MountError;

/// The passes, in their order.
pub const PASSES: [&str; 6] = ["inodes", "names", "tree", "extents", "space", "counts"];

/// How far a pass is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Number of the pass, from 1, of [`PASSES`].
    pub pass: usize,
    /// Records done.
    pub done: u64,
    /// Records in all.
    pub total: u64,
}

/// Why a check ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    /// Somebody asked for it. Nothing was changed.
    #[error("stopped; nothing was changed")]
    Cancelled,
    /// The volume cannot be read, or not be written.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The metadata store cannot be read, or not be written.
    #[error("metadata store: {0}; what it holds was left as it is")]
    Store(#[from] redb::Error),
}

impl From<braidfs_blockdev::VolumeError> for FsckError {
    fn from(error: braidfs_blockdev::VolumeError) -> Self {
        Self::Mount(error.into())
    }
}

/// Records between two looks at the clock of whoever shows the progress.
const STEP: u64 = 1024;

/// Tells how far a check is.
pub(super) struct Ticker<'a> {
    cancel: &'a AtomicBool,
    show: &'a mut dyn FnMut(Progress),
    at: Progress,
}

impl<'a> Ticker<'a> {
    /// Before the first pass.
    pub(super) fn new(cancel: &'a AtomicBool, show: &'a mut dyn FnMut(Progress)) -> Self {
        let at = Progress {
            pass: 0,
            done: 0,
            total: 0,
        };
        Self { cancel, show, at }
    }

    /// The next pass begins, over `total` records.
    pub(super) fn begin(&mut self, total: u64) -> Result<(), FsckError> {
        self.at = Progress {
            pass: self.at.pass + 1,
            done: 0,
            total,
        };
        (self.show)(self.at);
        self.check()
    }

    /// Whether to go on.
    pub(super) fn check(&self) -> Result<(), FsckError> {
        if self.cancel.load(Ordering::Relaxed) {
            return Err(FsckError::Cancelled);
        }
        Ok(())
    }

    /// One record is done.
    pub(super) fn step(&mut self) -> Result<(), FsckError> {
        self.at.done += 1;
        if self.at.done.is_multiple_of(STEP) {
            (self.show)(self.at);
            return self.check();
        }
        Ok(())
    }

    /// The pass is done.
    pub(super) fn end(&mut self) {
        self.at.done = self.at.total;
        (self.show)(self.at);
    }
}
