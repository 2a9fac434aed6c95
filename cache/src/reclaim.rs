//! Memory for whoever needs it: evicts, wakes the flushers, waits with a bound.
//!
//! Called with no lock held. Nobody waits here while holding claimed pages or frames in a plan, and
//! the flushers need no data frame to make progress, so a wait ends as soon as a device write does.

use std::time::{Duration, Instant};

use braidfs_blockdev::PAGE_SIZE;

use crate::arena::Frame;
use crate::buddy::ORDER_MAX;
use crate::cache::Cache;
use crate::event::Ticket;
use crate::folio::order_at;
use crate::read::MEMORY_WAIT_MAX;
use crate::{CacheError, FrameVec, SpaceClass};

/// Free pages beyond what is asked for, so that the next one need not evict.
const ROOM_EXTRA: u64 = 256;
/// A waiter for memory looks again after this, told or not.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Tries for a large frame before smaller ones will do.
const LARGE_TRIES: u32 = 3;
/// Length of what [`Cache::alloc_landing`] gives, in bytes: the largest folio.
pub const LANDING_BYTES: usize = PAGE_SIZE << ORDER_MAX;
/// Part of the arena that direct I/O may have.
const PRIVATE_SHARE: u64 = 2;

impl Cache {
    /// Evicts clean folios until about `pages` pages are free again; gives how many it evicted.
    pub(crate) fn evict(&self, pages: u64) -> u64 {
        let mut evicted = 0;
        while evicted < pages {
            let Some(candidate) = self.queues.take_oldest() else {
                break;
            };
            // A space that cannot be upgraded is being dropped, and its folios with it.
            if let Some(space) = candidate.space.upgrade() {
                evicted += space.evict(&candidate);
            }
        }
        evicted
    }

    /// Sees to it that `pages` pages are free for the class, if eviction alone can do that.
    pub(crate) fn make_room(&self, pages: u64, class: SpaceClass) {
        let keep = if class == SpaceClass::Meta {
            0
        } else {
            self.arena.reserve_pages()
        };
        let free = u64::from(self.arena.free_pages().saturating_sub(keep));
        if free < pages {
            self.evict(pages - free + ROOM_EXTRA.min(u64::from(self.arena.usable_pages()) / 32));
        }
    }

    /// A frame of 2^`order` pages, or a smaller one. Waits, with a bound.
    pub(crate) fn alloc_upto(&self, order: u8, class: SpaceClass) -> Result<Frame, CacheError> {
        if let Some(frame) = self.arena.try_alloc(order, class) {
            return Ok(frame);
        }
        let deadline = Instant::now() + MEMORY_WAIT_MAX;
        let mut tries = 0;
        loop {
            let ticket = self.arena.freed.ticket();
            let evicted = self.evict(1 << order);
            if let Some(frame) = self.arena.try_alloc(order, class) {
                return Ok(frame);
            }
            tries += 1;
            if evicted > 0 && tries < LARGE_TRIES {
                continue;
            }
            if let Some(frame) = self.arena.try_alloc_upto(order, class) {
                return Ok(frame);
            }
            if evicted == 0 {
                self.wait_for_frames(1, ticket, deadline)?;
            }
        }
    }

    /// After an allocation failed: evicts, or wakes the flushers and waits a little. An error once
    /// `deadline` has passed.
    pub(crate) fn wait_for_frames(
        &self,
        pages: u64,
        ticket: Ticket,
        deadline: Instant,
    ) -> Result<(), CacheError> {
        if self.is_stopped() {
            return Err(CacheError::ShutDown);
        }
        if self.evict(pages) > 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            log::error!("no free page in the cache for {MEMORY_WAIT_MAX:?}");
            return Err(CacheError::NoFrames);
        }
        self.counters.frame_waits.add(1);
        self.flush_signal.want_memory();
        self.arena.freed.wait(ticket, LOOK_AGAIN);
        Ok(())
    }

    /// Evicts every clean folio once.
    pub(crate) fn evict_all(&self) {
        // A folio used lately goes round a few times before it leaves.
        const ROUNDS: u32 = 5;
        for _ in 0..ROUNDS {
            let [small, main] = self.queues.pages();
            self.evict(small + main);
        }
    }

    /// Page-aligned private pages for direct I/O. Waits, with a bound, for memory.
    pub fn alloc_private(&self, len: usize) -> Option<FrameVec> {
        self.alloc_private_at(0, len)
    }

    /// As [`Cache::alloc_private`], in pieces that [`AddressSpace::adopt`] can take over as the
    /// pages from `page` on.
    ///
    /// [`AddressSpace::adopt`]: crate::AddressSpace::adopt
    pub fn alloc_private_at(&self, page: u64, len: usize) -> Option<FrameVec> {
        let pages = len.div_ceil(PAGE_SIZE) as u64;
        if pages == 0 || pages > u64::from(self.arena.usable_pages()) / PRIVATE_SHARE {
            return None;
        }
        let deadline = Instant::now() + MEMORY_WAIT_MAX;
        loop {
            let ticket = self.arena.freed.ticket();
            self.make_room(pages, SpaceClass::Data);
            if let Some(frames) = self.try_private(page, pages) {
                return Some(FrameVec::new(frames, len));
            }
            // What was got is given back before waiting, so that two cannot starve each other.
            self.wait_for_frames(pages, ticket, deadline).ok()?;
        }
    }

    /// One private piece of `LANDING_BYTES`, for something to come to lie in that
    /// [`AddressSpace::adopt`] may take over. Never waits; `None` if memory is short.
    ///
    /// [`AddressSpace::adopt`]: crate::AddressSpace::adopt
    pub fn alloc_landing(&self) -> Option<FrameVec> {
        let class = SpaceClass::Data;
        let frame = self.arena.try_alloc(ORDER_MAX, class).or_else(|| {
            self.evict(1 << ORDER_MAX);
            self.arena.try_alloc(ORDER_MAX, class)
        })?;
        Some(FrameVec::new([frame], LANDING_BYTES))
    }

    fn try_private(&self, first: u64, pages: u64) -> Option<Vec<Frame>> {
        let mut frames = Vec::new();
        let (mut at, end) = (first, first + pages);
        while at < end {
            let order = order_at(at, end - at, ORDER_MAX);
            let frame = self.arena.try_alloc_upto(order, SpaceClass::Data)?;
            at += 1 << frame.order();
            frames.push(frame);
        }
        Some(frames)
    }
}
