//! Events: what they are, and how they are laid out on their way to who looks.
//!
//! An event is eight words of 64 bits, little-endian on the way: its time in nanoseconds; kind (8
//! bits), operation (8), member (16), thread (32); its context; and five values:
//!
//! | kind | values |
//! | --- | --- |
//! | `Begin` (op: of requests) | inode, offset, length, process |
//! | `Served` | since when the thread worked for the request |
//! | `Reply` | bytes or negated errno, when it began to be sent |
//! | `Hit`, `Miss` | file, offset, length |
//! | `Arrived` | file, offset, length, since when it was waited for |
//! | `Ahead` | file, offset, length, context of what is read ahead |
//! | `Dirtied` | file, offset, length, pages that were clean before |
//! | `Held`, `Durable` | since when the writer was slowed down; the commit was waited for |
//! | `Writeback`, `WritebackEnd` | file, offset, length to the end of the last page, pages |
//! | `Commit` | since when |
//! | `Kiobuf` (op: of devices) | number, file, offset in it, address in the volume, length |
//! | `Part` (member) | number of the kiobuf, start and length in it, offset on the member |
//! | `Dispatch` (op, member) | number of the request, offset, length, kiobufs, views |
//! | `Carry` (member) | number of the request, kiobuf, start and length in it |
//! | `Done` (op, member) | number of the request, bytes, errno, when it was dispatched |
//! | `KiobufEnd` | number, bytes, errno |
//! | `Tick` | events that were dropped |
//! | `Thread` | its name, 16 bytes |
//! | `Over` | 1 if the file system is being unmounted |
//!
//! The last three are told by who drains the rings. Offsets and lengths are bytes. Device requests
//! are numbered for each member by itself.

use super::ring::WORDS;

/// Bytes of an event on the way.
pub const EVENT_BYTES: usize = WORDS * 8;

macro_rules! kinds {
    ($($name:ident = $number:literal,)*) => {
        /// What happened; the table is at the head of this file.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[expect(missing_docs, reason = "a table explains them")]
        pub enum Kind { #[default] $($name = $number,)* }

        impl Kind {
            fn from_number(number: u64) -> Option<Kind> {
                match number {
                    $($number => Some(Kind::$name),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    Tick = 1,
    Thread = 2,
    Over = 3,
    Begin = 4,
    Served = 5,
    Reply = 6,
    Hit = 7,
    Miss = 8,
    Arrived = 9,
    Ahead = 10,
    Dirtied = 11,
    Held = 12,
    Durable = 13,
    Writeback = 14,
    WritebackEnd = 15,
    Commit = 16,
    Kiobuf = 17,
    Part = 18,
    Dispatch = 19,
    Carry = 20,
    Done = 21,
    KiobufEnd = 22,
}

/// One event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds.
    pub at: u64,
    /// What happened.
    pub kind: Kind,
    /// The operation, for kinds that have one.
    pub op: u8,
    /// Index of the member, likewise.
    pub dev: u16,
    /// The thread it happened on.
    pub thread: u32,
    /// In whose interest.
    pub context: u64,
    /// By kind.
    pub values: [u64; 5],
}

impl Event {
    pub(super) fn to_words(self) -> [u64; WORDS] {
        let head = self.kind as u64
            | u64::from(self.op) << 8
            | u64::from(self.dev) << 16
            | u64::from(self.thread) << 32;
        let [a, b, c, d, e] = self.values;
        [self.at, head, self.context, a, b, c, d, e]
    }

    /// `None` if the kind is not known.
    pub(super) fn from_words(words: [u64; WORDS]) -> Option<Event> {
        let [at, head, context, a, b, c, d, e] = words;
        let [kind, op, dev_low, dev_high, thread @ ..] = head.to_le_bytes();
        Some(Event {
            at,
            kind: Kind::from_number(u64::from(kind))?,
            op,
            dev: u16::from_le_bytes([dev_low, dev_high]),
            thread: u32::from_le_bytes(thread),
            context,
            values: [a, b, c, d, e],
        })
    }

    /// As it is sent.
    pub fn encode(self) -> [u8; EVENT_BYTES] {
        let mut bytes = [0; EVENT_BYTES];
        for (to, word) in bytes.chunks_exact_mut(8).zip(self.to_words()) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// `None` if the kind is not known.
    pub fn decode(bytes: &[u8; EVENT_BYTES]) -> Option<Event> {
        let mut words = [0; WORDS];
        for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(from.try_into().ok()?);
        }
        Event::from_words(words)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_comes_is_an_event_or_none_and_comes_back(bytes: [u8; EVENT_BYTES]) {
            match Event::decode(&bytes) {
                Some(event) => prop_assert_eq!(event.encode(), bytes),
                None => prop_assert!(!(1..=22).contains(&bytes[8])),
            }
        }
    }
}
