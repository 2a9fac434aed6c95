//! Waiting for several completions.

use braidfs_blockdev::{BlockError, Completion, InDoubt};
use parking_lot::{Condvar, Mutex};

/// Why not all of the transfers that were waited for were good.
#[derive(Debug)]
pub(crate) struct Failed {
    /// The first error.
    pub error: BlockError,
    /// Transfers that a device did not answer, and may still carry out.
    pub in_doubt: Vec<InDoubt>,
}

#[derive(Default)]
struct State {
    left: usize,
    error: Option<BlockError>,
    in_doubt: Vec<InDoubt>,
}

/// Waits for a number of completions; keeps the first error.
pub(crate) struct Latch {
    state: Mutex<State>,
    ended: Condvar,
}

impl Latch {
    pub(crate) fn new(left: usize) -> Self {
        Self {
            state: Mutex::new(State {
                left,
                ..State::default()
            }),
            ended: Condvar::new(),
        }
    }

    pub(crate) fn end(&self, completion: Completion) {
        let mut state = self.state.lock();
        state.left -= 1;
        state.error = state.error.or(completion.error);
        state.in_doubt.extend(completion.in_doubt);
        if state.left == 0 {
            self.ended.notify_all();
        }
    }

    /// Device I/O ends in bounded time, and so does this.
    pub(crate) fn wait(&self) -> Result<(), Failed> {
        let mut state = self.state.lock();
        while state.left > 0 {
            self.ended.wait(&mut state);
        }
        let in_doubt = std::mem::take(&mut state.in_doubt);
        state
            .error
            .map_or(Ok(()), |error| Err(Failed { error, in_doubt }))
    }
}
