//! Waiting for several completions.

use braidfs_blockdev::BlockError;
use parking_lot::{Condvar, Mutex};

/// Waits for a number of completions; keeps the first error.
pub(crate) struct Latch {
    state: Mutex<(usize, Option<BlockError>)>,
    ended: Condvar,
}

impl Latch {
    pub(crate) fn new(count: usize) -> Self {
        Self {
            state: Mutex::new((count, None)),
            ended: Condvar::new(),
        }
    }

    pub(crate) fn end(&self, error: Option<BlockError>) {
        let mut state = self.state.lock();
        state.0 -= 1;
        state.1 = state.1.or(error);
        if state.0 == 0 {
            self.ended.notify_all();
        }
    }

    /// Device I/O ends in bounded time, and so does this.
    pub(crate) fn wait(&self) -> Result<(), BlockError> {
        let mut state = self.state.lock();
        while state.0 > 0 {
            self.ended.wait(&mut state);
        }
        state.1.map_or(Ok(()), Err)
    }
}
