//! A lock on ranges of a file: many readers or one writer of each byte.
//!
//! Buffered writes take it shared (pages have their own locks), direct reads shared until their
//! device I/O ends, direct writes, truncation and hole punching exclusively. The guards can be
//! dropped on any thread, because a direct read ends on a completion thread.
//!
//! The list is short (one entry per operation in flight on one file), so it is searched linearly.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

#[derive(Clone, Copy, PartialEq, Eq)]
struct Held {
    id: u64,
    start: u64,
    end: u64,
    exclusive: bool,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    next_id: u64,
}

/// Range locks of one file. Units are whatever the callers agree on; here bytes.
#[derive(Default)]
pub(crate) struct RangeLock {
    state: Mutex<State>,
    released: Condvar,
}

/// A held range.
pub(crate) struct RangeGuard {
    lock: Arc<RangeLock>,
    id: u64,
}

impl RangeLock {
    fn acquire(self: &Arc<Self>, start: u64, end: u64, exclusive: bool) -> RangeGuard {
        let mut state = self.state.lock();
        let conflicts =
            |held: &Held| held.start < end && start < held.end && (exclusive || held.exclusive);
        while state.held.iter().any(conflicts) {
            self.released.wait(&mut state);
        }
        let id = state.next_id;
        state.next_id += 1;
        state.held.push(Held {
            id,
            start,
            end,
            exclusive,
        });
        RangeGuard {
            lock: Arc::clone(self),
            id,
        }
    }

    /// Waits for exclusive holders of any part of `start..end`.
    pub(crate) fn shared(self: &Arc<Self>, start: u64, end: u64) -> RangeGuard {
        self.acquire(start, end, false)
    }

    /// Waits for all holders of any part of `start..end`.
    pub(crate) fn exclusive(self: &Arc<Self>, start: u64, end: u64) -> RangeGuard {
        self.acquire(start, end, true)
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock();
        if let Some(at) = state.held.iter().position(|held| held.id == self.id) {
            state.held.swap_remove(at);
        }
        drop(state);
        self.lock.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn disjoint_ranges_do_not_wait_and_overlapping_do() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.exclusive(0, 10);
        let _apart = lock.exclusive(10, 20);
        let waiter = {
            let lock = Arc::clone(&lock);
            thread::spawn(move || drop(lock.shared(5, 6)))
        };
        thread::sleep(Duration::from_millis(20));
        assert!(!waiter.is_finished());
        drop(first);
        waiter.join().unwrap();
        let _one = lock.shared(0, 5);
        let _two = lock.shared(0, 5);
    }
}
