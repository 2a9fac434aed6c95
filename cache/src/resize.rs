//! Another size while the cache is used: memory is given back to the system, and taken again.
//!
//! The mapping and all tables were made for the first size, which stays the limit. What is given
//! back are frames that are allocated like any others, wherever they lie, and then *held*: their
//! memory is released, nobody uses them. A device that has the arena registered has its pages
//! pinned, and would go on to use the old ones; so devices are asked to do without first.
//!
//! One resize at a time: the lock of the held frames is kept, and no other is held while waiting.

use std::time::{Duration, Instant};

use braidfs_blockdev::PAGE_SIZE;

use crate::SpaceClass;
use crate::arena::Frame;
use crate::buddy::ORDER_MAX;
use crate::cache::Cache;
use crate::units::PAGE;

/// How long to wait for pages that are in use, and for devices.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often to look again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Why the cache stays as large as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// Larger than it was made.
    #[error("the cache cannot become larger than it was when it was made, {max} bytes")]
    TooLarge {
        /// Its limit, in bytes.
        max: u64,
    },
    /// Pages that are to be given back are in use.
    #[error("{left} bytes of the cache are in use and did not come free in {PATIENCE:?}")]
    Busy {
        /// What could not be given back, in bytes.
        left: u64,
    },
    /// A device does not answer, and may still use the memory.
    #[error("a device did not let go of the memory that it has registered in {PATIENCE:?}")]
    Devices,
    /// The cache is going away.
    #[error("the cache is shut down")]
    ShutDown,
}

impl Cache {
    /// Memory that the cache may use, in bytes.
    pub fn size_bytes(&self) -> u64 {
        u64::from(self.arena.usable_pages()) * PAGE
    }

    /// The largest that it can have.
    pub fn size_bytes_max(&self) -> u64 {
        u64::from(self.arena.pages()) * PAGE
    }

    /// Uses about `bytes` from now on (whole MiB, as at first). Memory that is not used any more is
    /// the system's when this returns well; on an error the size is what it was. Dirty pages are
    /// written back, for which it waits with a bound.
    pub fn resize(&self, bytes: u64) -> Result<(), ResizeError> {
        let largest = (PAGE_SIZE << ORDER_MAX) as u64;
        let max = self.size_bytes_max();
        if bytes > max {
            return Err(ResizeError::TooLarge { max });
        }
        let mut held = self.held.lock();
        let before = self.arena.usable_pages();
        let pages = u32::try_from(bytes / largest * largest / PAGE).expect("not above the limit");
        let idle = self.arena.pages() - pages;
        if pages < before {
            self.set_usable_pages(pages);
            if !self.volume.forget_memory(PATIENCE) {
                self.set_usable_pages(before);
                return Err(ResizeError::Devices);
            }
        }
        let done = self.hold(&mut held, idle);
        if done.is_err() {
            let former = self.hold(&mut held, self.arena.pages() - before);
            debug_assert!(former.is_ok(), "no more than before");
            self.set_usable_pages(before);
            return done;
        }
        self.set_usable_pages(pages);
        drop(held);
        self.arena.freed.notify();
        Ok(())
    }

    /// Holds `idle` pages, no more and no less.
    fn hold(&self, held: &mut Vec<Frame>, idle: u32) -> Result<(), ResizeError> {
        let until = Instant::now() + PATIENCE;
        let pages_of = |frame: &Frame| 1_u32 << frame.order();
        let mut now: u32 = held.iter().map(pages_of).sum();
        while now > idle
            && let Some(frame) = held.pop()
        {
            now -= pages_of(&frame);
        }
        while now < idle {
            let left = idle - now;
            let order = u8::try_from(left.ilog2()).unwrap_or(ORDER_MAX);
            let mut frame = self.take_idle(order.min(ORDER_MAX), left, until)?;
            if let Err(error) = frame.release() {
                log::warn!("memory of the cache stays in use: {error}");
            }
            now += pages_of(&frame);
            held.push(frame);
        }
        Ok(())
    }

    /// A frame of 2^`order` pages, or a smaller one. Whole MiB first: pages that are left over
    /// between others are taken only when nothing else can be had by evicting.
    fn take_idle(&self, order: u8, left: u32, until: Instant) -> Result<Frame, ResizeError> {
        let class = SpaceClass::Data;
        loop {
            let ticket = self.arena.freed.ticket();
            if let Some(frame) = self.arena.try_alloc(order, class) {
                return Ok(frame);
            }
            let evicted = self.evict(1 << order);
            if let Some(frame) = self.arena.try_alloc_upto(order, class) {
                return Ok(frame);
            }
            if self.is_stopped() {
                return Err(ResizeError::ShutDown);
            }
            if Instant::now() >= until {
                let left = u64::from(left) * PAGE;
                return Err(ResizeError::Busy { left });
            }
            if evicted == 0 {
                self.flush_signal.want_memory();
                self.arena.freed.wait(ticket, LOOK_AGAIN);
            }
        }
    }
}
