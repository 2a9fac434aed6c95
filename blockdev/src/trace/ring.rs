//! A bounded queue of events: any number of threads put in, one takes out, nobody waits.
//!
//! Each slot has a turn. In lap `n` of the ring it is `2n` while the slot is free, `2n + 1` while
//! it has an event. A thread that puts in first makes the slot its own by moving `next` past it.
//! All words are atomics, so that a slot that is read while it is written is no data race; the
//! turn, released and acquired, says when its words are whole.

use std::cmp::Ordering::{Equal, Greater, Less};
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Words of an event.
pub(super) const WORDS: usize = 8;

/// Events of a ring: 40 ms of 200,000 a second.
pub(super) const EVENTS: usize = 8192;
const LAP: u64 = EVENTS as u64;

#[derive(Default)]
struct Slot {
    turn: AtomicU64,
    words: [AtomicU64; WORDS],
}

pub(super) struct Ring {
    slots: Box<[Slot]>,
    next: AtomicU64,
    /// Moved by the one who takes out.
    taken: AtomicU64,
    dropped: AtomicU64,
}

impl Ring {
    pub(super) fn new() -> Ring {
        Ring {
            slots: (0..EVENTS).map(|_| Slot::default()).collect(),
            next: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    fn slot(&self, at: u64) -> &Slot {
        let index = usize::try_from(at % LAP).expect("below EVENTS");
        &self.slots[index]
    }

    /// Puts an event in, or drops and counts it.
    pub(super) fn push(&self, words: [u64; WORDS]) {
        let mut at = self.next.load(Relaxed);
        loop {
            let slot = self.slot(at);
            let free = at / LAP * 2;
            match slot.turn.load(Acquire).cmp(&free) {
                // It still has its event of the lap before.
                Less => {
                    self.dropped.fetch_add(1, Relaxed);
                    return;
                }
                // Somebody else was first.
                Greater => at = self.next.load(Relaxed),
                Equal => match self
                    .next
                    .compare_exchange_weak(at, at + 1, Relaxed, Relaxed)
                {
                    Err(now) => at = now,
                    Ok(_) => {
                        for (to, word) in slot.words.iter().zip(words) {
                            to.store(word, Relaxed);
                        }
                        slot.turn.store(free + 1, Release);
                        return;
                    }
                },
            }
        }
    }

    /// The oldest event. For one thread at a time.
    pub(super) fn pop(&self) -> Option<[u64; WORDS]> {
        let at = self.taken.load(Relaxed);
        let slot = self.slot(at);
        let full = at / LAP * 2 + 1;
        if slot.turn.load(Acquire) != full {
            return None;
        }
        let words = std::array::from_fn(|index| slot.words[index].load(Relaxed));
        slot.turn.store(full + 1, Release);
        self.taken.store(at + 1, Relaxed);
        Some(words)
    }

    /// Events that were dropped since the last call.
    pub(super) fn take_dropped(&self) -> u64 {
        self.dropped.swap(0, Relaxed)
    }
}
