//! The gate of the transaction groups, and counting who is inside.
//!
//! Every operation that changes something passes the gate and holds a [`Pass`] until its changes
//! are whole. A commit *closes* the gate for the short time in which it writes back what is still
//! dirty and freezes the group: then nobody is half way through, so the frozen group is a prefix
//! of the history. An operation must not wait for a commit while it holds a pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
struct GateState {
    closed: bool,
    inside: u64,
}

/// A gate that many may be inside of, and that one may close.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

/// Right to change things; given back when dropped, on any thread.
pub(crate) struct Pass(Arc<Gate>);

impl Gate {
    /// Waits until the gate is open and goes in.
    pub(crate) fn enter(self: &Arc<Self>) -> Pass {
        let mut state = self.state.lock();
        while state.closed {
            self.changed.wait(&mut state);
        }
        state.inside += 1;
        Pass(Arc::clone(self))
    }

    /// Lets nobody in any more and waits until all are out.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        while state.closed {
            self.changed.wait(&mut state);
        }
        state.closed = true;
        while state.inside > 0 {
            self.changed.wait(&mut state);
        }
    }

    /// Opens the gate again.
    pub(crate) fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.inside -= 1;
        if state.inside == 0 && state.closed {
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

/// Waits for readers of freed blocks without stopping new ones (the idea of SRCU: two counters, of
/// which new readers use one while the other drains).
#[derive(Default)]
pub(crate) struct ReadEpoch {
    current: AtomicU64,
    readers: Mutex<[u64; 2]>,
    drained: Condvar,
}

/// A reader of device blocks that it found through the extent map.
pub(crate) struct ReadPass {
    epoch: Arc<ReadEpoch>,
    side: usize,
}

impl ReadEpoch {
    /// Registers a reader; take it before looking at the extent map.
    pub(crate) fn enter(self: &Arc<Self>) -> ReadPass {
        let mut readers = self.readers.lock();
        let side = usize::from(self.current.load(Ordering::Relaxed) & 1 == 1);
        readers[side] += 1;
        ReadPass {
            epoch: Arc::clone(self),
            side,
        }
    }

    /// Waits until every reader that entered before the call has left. Device I/O ends in bounded
    /// time, and so does this. One caller at a time.
    pub(crate) fn synchronize(&self) {
        let mut readers = self.readers.lock();
        let old = usize::from(self.current.fetch_add(1, Ordering::Relaxed) & 1 == 1);
        while readers[old] > 0 {
            self.drained.wait(&mut readers);
        }
    }
}

impl Drop for ReadPass {
    fn drop(&mut self) {
        let mut readers = self.epoch.readers.lock();
        readers[self.side] -= 1;
        if readers[self.side] == 0 {
            self.epoch.drained.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn closing_waits_for_those_inside_and_holds_others_back() {
        let gate = Arc::new(Gate::default());
        let pass = gate.enter();
        let closed = Arc::new(AtomicBool::new(false));
        let closer = {
            let (gate, closed) = (Arc::clone(&gate), Arc::clone(&closed));
            thread::spawn(move || {
                gate.close();
                closed.store(true, Ordering::SeqCst);
            })
        };
        thread::sleep(Duration::from_millis(20));
        assert!(!closed.load(Ordering::SeqCst));
        drop(pass);
        closer.join().unwrap();
        let entered = Arc::new(AtomicBool::new(false));
        let enterer = {
            let (gate, entered) = (Arc::clone(&gate), Arc::clone(&entered));
            thread::spawn(move || {
                let _pass = gate.enter();
                entered.store(true, Ordering::SeqCst);
            })
        };
        thread::sleep(Duration::from_millis(20));
        assert!(!entered.load(Ordering::SeqCst));
        gate.open();
        enterer.join().unwrap();
        assert!(entered.load(Ordering::SeqCst));
    }

    #[test]
    fn synchronize_waits_for_old_readers_only() {
        let epoch = Arc::new(ReadEpoch::default());
        let old = epoch.enter();
        let waiter = {
            let epoch = Arc::clone(&epoch);
            thread::spawn(move || epoch.synchronize())
        };
        thread::sleep(Duration::from_millis(20));
        let young = epoch.enter();
        assert!(!waiter.is_finished());
        drop(old);
        waiter.join().unwrap();
        drop(young);
    }
}
