//! Requests on their way from submitters to the one thread that owns a ring.
//!
//! The owner says that it will sleep and looks once more, under the lock that posters take; so
//! either it sees what was posted, or the poster sees that it sleeps and wakes it. While the owner
//! is awake, posting costs one short lock and no system call.

use crate::sync::Mutex;
use std::sync::PoisonError;

/// Items for one owner.
pub struct Mailbox<T> {
    state: Mutex<State<T>>,
}

struct State<T> {
    items: Vec<T>,
    asleep: bool,
    closed: bool,
}

/// What the owner may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// There are items.
    Work,
    /// Nothing to do: sleep until woken.
    Sleep,
    /// Nothing to do, and nothing will come.
    Closed,
}

impl<T> Mailbox<T> {
    pub fn new() -> Mailbox<T> {
        Mailbox {
            state: Mutex::new(State {
                items: Vec::new(),
                asleep: false,
                closed: false,
            }),
        }
    }

    fn with<R>(&self, action: impl FnOnce(&mut State<T>) -> R) -> R {
        action(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds items; true if the owner sleeps and must be woken by the caller.
    #[must_use]
    pub fn post(&self, items: impl Iterator<Item = T>) -> bool {
        self.with(|state| {
            state.items.extend(items);
            std::mem::take(&mut state.asleep)
        })
    }

    /// Says that nothing more will be posted; true if the owner must be woken.
    #[must_use]
    pub fn close(&self) -> bool {
        self.with(|state| {
            state.closed = true;
            std::mem::take(&mut state.asleep)
        })
    }

    /// The owner takes what is there.
    pub fn take(&self, put: impl FnOnce(std::vec::Drain<'_, T>)) {
        self.with(|state| put(state.items.drain(..)));
    }

    /// The owner has nothing to do: what next? After `Sleep` it must wait for a wake-up.
    pub fn next(&self) -> Next {
        self.with(|state| {
            if !state.items.is_empty() {
                return Next::Work;
            }
            if state.closed {
                return Next::Closed;
            }
            state.asleep = true;
            Next::Sleep
        })
    }

    /// The owner is awake for another reason.
    pub fn awake(&self) {
        self.with(|state| state.asleep = false);
    }
}
