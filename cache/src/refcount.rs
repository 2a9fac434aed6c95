//! The pin count of a frame: the lock-free protocol that decides who may write its bytes.
//!
//! 1. Whoever holds a handle may read. 2. Whoever holds the *only* handle, by `&mut`, may write:
//!    nobody else can make another handle then, as a handle is only cloned from a handle.
//! 3. The last handle dropped gives the memory back. `drop_ref` releases and `is_unique` acquires,
//!    so that every access through a handle that is gone happens before the write or the reuse.

use crate::sync::{AtomicU32, Ordering, fence};

/// Far above any number of pins a machine can hold; beyond it the count would be a leak.
const PINS_MAX: u32 = u32::MAX / 2;

pub(crate) struct RefCount(AtomicU32);

impl RefCount {
    pub fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// A frame was taken from the allocator: one handle.
    pub fn begin(&self) {
        let old = self.0.swap(1, Ordering::Relaxed);
        assert_eq!(old, 0, "frame handed out while pinned");
    }

    pub fn add_ref(&self) {
        let old = self.0.fetch_add(1, Ordering::Relaxed);
        assert!(old > 0 && old < PINS_MAX, "pin count out of bounds");
    }

    /// True for the last one: the caller gives the memory back.
    #[must_use]
    pub fn drop_ref(&self) -> bool {
        if self.0.fetch_sub(1, Ordering::Release) != 1 {
            return false;
        }
        fence(Ordering::Acquire);
        true
    }

    /// Called with `&mut` on one handle: is it the only one?
    pub fn is_unique(&self) -> bool {
        self.0.load(Ordering::Acquire) == 1
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Shared {
        count: RefCount,
        bytes: UnsafeCell<u32>,
        freed: AtomicU32,
    }

    fn unpin(frame: &Shared) {
        if frame.count.drop_ref() {
            frame.bytes.with_mut(|_| ());
            frame.freed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A reader pins, reads and unpins while the owner tries to write: loom fails the test if a
    /// write can meet a read, and the memory is given back exactly once.
    #[test]
    fn unique_writer_never_meets_a_reader() {
        loom::model(|| {
            let frame = Arc::new(Shared {
                count: RefCount::new(),
                bytes: UnsafeCell::new(0),
                freed: AtomicU32::new(0),
            });
            frame.count.begin();
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    frame.count.add_ref();
                    let frame = Arc::clone(&frame);
                    thread::spawn(move || {
                        frame.count.add_ref();
                        frame.bytes.with(|_| ());
                        unpin(&frame);
                        frame.bytes.with(|_| ());
                        unpin(&frame);
                    })
                })
                .collect();
            if frame.count.is_unique() {
                frame.bytes.with_mut(|_| ());
            }
            unpin(&frame);
            for reader in readers {
                reader.join().unwrap();
            }
            assert_eq!(frame.freed.load(Ordering::Relaxed), 1);
        });
    }
}
