//! "Something changed": what a thread sleeps on after it has looked at a state and let go its lock.
//!
//! Take a [`Event::ticket`] before looking (or while holding the lock of what is looked at), then
//! [`Event::wait`] with it: a change that came in between ends the wait at once. Notifying costs
//! one atomic add when nobody waits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

pub(crate) struct Event {
    changes: AtomicU64,
    waiting: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
pub(crate) struct Ticket(u64);

impl Event {
    pub fn new() -> Self {
        Self {
            changes: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    pub fn ticket(&self) -> Ticket {
        Ticket(self.changes.load(Ordering::SeqCst))
    }

    pub fn notify(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock());
            self.wake.notify_all();
        }
    }

    /// Sleeps until something changed since `ticket`; false if `limit` passed first.
    pub fn wait(&self, ticket: Ticket, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.lock.lock();
        let mut changed = true;
        while self.changes.load(Ordering::SeqCst) == ticket.0 {
            if self.wake.wait_until(&mut guard, until).timed_out() {
                changed = self.changes.load(Ordering::SeqCst) != ticket.0;
                break;
            }
        }
        drop(guard);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        changed
    }
}
