//! Counts the threads that hold a device's file, so that closing waits until the file is closed and
//! its lock released, and the next open finds the device free.

use super::CLOSE_WAIT_MAX;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Instant;

#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    next: u64,
    inside: Vec<(u64, Option<ThreadId>)>,
}

/// One thread inside. It drops it last, after its share of the file.
pub(super) struct Inside {
    gate: Arc<Gate>,
    number: u64,
}

impl Gate {
    /// For a thread that is about to be started.
    pub(super) fn enter(self: &Arc<Self>) -> Inside {
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.inside.push((number, None));
        Inside {
            gate: self.clone(),
            number,
        }
    }

    /// Waits until all have left, except the calling thread: an `end_io` may drop the last handle
    /// of a device on the device's own thread, which cannot wait for itself.
    pub(super) fn wait_empty(&self, device: &str) {
        let own = Some(std::thread::current().id());
        let deadline = Instant::now() + CLOSE_WAIT_MAX;
        let mut state = self.state.lock();
        while state.inside.iter().any(|&(_, thread)| thread != own) {
            if self.left.wait_until(&mut state, deadline).timed_out() {
                log::warn!("{device}: device still busy at close");
                return;
            }
        }
    }
}

impl Inside {
    /// Called by the started thread, so that it never waits for itself.
    pub(super) fn adopt(&mut self) {
        let own = Some(std::thread::current().id());
        let mut state = self.gate.state.lock();
        for entry in state
            .inside
            .iter_mut()
            .filter(|entry| entry.0 == self.number)
        {
            entry.1 = own;
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.gate
            .state
            .lock()
            .inside
            .retain(|&(number, _)| number != self.number);
        self.gate.left.notify_all();
    }
}
