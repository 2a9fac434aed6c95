//! An address space: the cached pages of one file, and the state that its lock guards.
//!
//! The lock is held for look-ups, state changes and small copies, never while calling a backing
//! or a device, and never while waiting. Under it only leaf locks are taken: the replacement
//! queues, the arena, the list of dirty spaces.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use crate::arena::Frame;
use crate::cache::Cache;
use crate::event::{Event, Ticket};
use crate::folio::{Bit, Folio, inside};
use crate::queues::{Candidate, Queue};
use crate::read::Waiter;
use crate::units::mem;
use crate::{Backing, CacheError, PageRange, SpaceClass};

/// What a write did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOutcome {
    /// Pages that became dirty and were not. One under writeback that is dirtied again counts.
    pub newly_dirty_pages: u64,
}

/// A failed write tells what it had dirtied by then.
pub type WriteResult = Result<WriteOutcome, (CacheError, WriteOutcome)>;

/// The cached pages of one file.
pub struct AddressSpace {
    pub(crate) id: u64,
    pub(crate) class: SpaceClass,
    pub(crate) cache: Arc<Cache>,
    pub(crate) backing: Arc<dyn Backing>,
    pub(crate) me: Weak<AddressSpace>,
    pub(crate) inner: RwLock<SpaceInner>,
    /// Told when a page leaves reading or writeback, a frame is put in place, or a pass ends.
    pub(crate) event: Event,
    pub(crate) dirty_pages: AtomicU64,
    /// Pages in writeback; changed with the lock held.
    pub(crate) writeback_pages: AtomicU64,
    error_seq: AtomicU32,
}

#[derive(Default)]
pub(crate) struct SpaceInner {
    /// By first page; never overlapping.
    pub folios: BTreeMap<u64, Folio>,
    /// First pages of the folios with a dirty page.
    pub dirty_folios: BTreeSet<u64>,
    /// Reads that wait for pages.
    pub waiters: Vec<Waiter>,
    pub next_waiter: u64,
    /// Where the last write ended, and how many pages came in sequence by then.
    pub write_end: u64,
    pub write_run: u64,
    /// A flush pass is under way; others that want one.
    pub in_pass: bool,
    pub pass_waiting: u32,
    /// Place in the list of dirty spaces, and since when it has dirty pages.
    pub dirty_key: Option<u64>,
    pub dirty_since: Option<Instant>,
    /// After a failed write: not before then, in the background.
    pub retry_at: Option<Instant>,
    pub retry_delay: Duration,
    pub last_error: Option<CacheError>,
}

impl SpaceInner {
    /// The folio that holds `page`.
    pub fn find(&self, page: u64) -> Option<(u64, &Folio)> {
        let (&start, folio) = self.folios.range(..=page).next_back()?;
        (page - start < 1 << folio.order).then_some((start, folio))
    }

    pub fn find_mut(&mut self, page: u64) -> Option<(u64, &mut Folio)> {
        let (&start, folio) = self.folios.range_mut(..=page).next_back()?;
        (page - start < 1 << folio.order).then_some((start, folio))
    }

    /// First page of the folio that holds `page`, else `page`: where a walk of keys begins.
    pub fn first_key(&self, page: u64) -> u64 {
        self.find(page).map_or(page, |(start, _)| start)
    }

    /// Where the room ends that begins at `page`, which no folio holds.
    pub fn room_end(&self, page: u64) -> u64 {
        self.folios
            .range(page..)
            .next()
            .map_or(u64::MAX, |(&start, _)| start)
    }

    pub fn is_room(&self, pages: PageRange) -> bool {
        self.find(pages.start).is_none() && self.room_end(pages.start) >= pages.end
    }
}

impl AddressSpace {
    pub(crate) fn new(
        id: u64,
        class: SpaceClass,
        cache: Arc<Cache>,
        backing: Arc<dyn Backing>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            id,
            class,
            cache,
            backing,
            me: Weak::clone(me),
            inner: RwLock::default(),
            event: Event::new(),
            dirty_pages: AtomicU64::new(0),
            writeback_pages: AtomicU64::new(0),
            error_seq: AtomicU32::new(0),
        })
    }

    /// The number the owner gave it.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Is any page of the range cached, or being read?
    pub fn has_pages(&self, pages: PageRange) -> bool {
        let inner = self.inner.read();
        let from = inner.first_key(pages.start);
        inner.folios.range(from..pages.end).any(|(&start, folio)| {
            let Some((first, count)) = part_of(start, folio, pages) else {
                return false;
            };
            folio.count(Bit::Uptodate, first, count) + folio.count(Bit::Reading, first, count) > 0
        })
    }

    /// Pages that are dirty (one in writeback is not, unless dirtied again).
    pub fn dirty_page_count(&self) -> u64 {
        self.dirty_pages.load(Ordering::Relaxed)
    }

    /// Pages that are uptodate.
    pub fn page_count(&self) -> u64 {
        let inner = self.inner.read();
        inner
            .folios
            .values()
            .map(|folio| folio.count(Bit::Uptodate, 0, folio.pages()))
            .sum()
    }

    /// The first run of dirty or writeback pages that ends behind `from_page`, cut to start there.
    pub fn next_cached_dirty(&self, from_page: u64) -> Option<PageRange> {
        let rest = PageRange::new(from_page, u64::MAX)?;
        self.unclean_runs(rest, 1)?.into_iter().next()
    }

    /// The runs of pages in `pages` that are dirty or in writeback, in order, `count_max` at the
    /// most; `None` if nothing of the space is.
    pub fn unclean_runs(&self, pages: PageRange, count_max: usize) -> Option<Vec<PageRange>> {
        let inner = self.inner.read();
        let unclean =
            self.dirty_pages.load(Ordering::Relaxed) + self.writeback_pages.load(Ordering::Relaxed);
        if unclean == 0 {
            return None;
        }
        let mut runs: Vec<PageRange> = Vec::new();
        let from = inner.first_key(pages.start);
        for (&start, folio) in inner.folios.range(from..pages.end) {
            let Some((first, count)) = part_of(start, folio, pages) else {
                continue;
            };
            if runs.len() == count_max && runs.last().is_some_and(|run| run.end < start) {
                break;
            }
            let (mut at, end) = (first, first + count);
            while at < end {
                let (dirty, length) = folio.run_of(Bit::Dirty, at, end);
                let (writeback, length) = if dirty {
                    (false, length)
                } else {
                    folio.run_of(Bit::Writeback, at, at + length)
                };
                let run = PageRange {
                    start: start + at as u64,
                    end: start + (at + length) as u64,
                };
                at += length;
                if !dirty && !writeback {
                    if runs.len() == count_max {
                        return Some(runs);
                    }
                    continue;
                }
                let count = runs.len();
                match runs.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ if count == count_max => return Some(runs),
                    _ => runs.push(run),
                }
            }
        }
        Some(runs)
    }

    /// Counts write errors; a caller remembers the value and compares.
    pub fn write_error_seq(&self) -> u32 {
        self.error_seq.load(Ordering::Acquire)
    }

    /// The latest write error.
    pub fn last_write_error(&self) -> Option<CacheError> {
        self.inner.read().last_error
    }

    /// Records a failed write. Called with the lock held, before its pages become dirty again.
    pub(crate) fn note_write_error(&self, inner: &mut SpaceInner, error: CacheError) {
        inner.last_error = Some(error);
        self.error_seq.fetch_add(1, Ordering::Release);
        self.cache.counters.write_errors.add(1);
    }

    /// Removes whole pages of the range, waiting for reads and writeback on them; gives how many
    /// dirty pages were dropped. Not to be called from the backing's callbacks.
    ///
    /// The owner lets no read or partial write of these pages begin between this call and the
    /// moment from which its `map` shows them gone: it would bring the old content back.
    pub fn discard(&self, pages: PageRange) -> u64 {
        let mut dropped = 0;
        loop {
            let mut gone = Vec::new();
            let ticket = self.event.ticket();
            let busy = {
                let mut inner = self.inner.write();
                let (dirty, busy) = self.discard_idle(&mut inner, pages, &mut gone);
                dropped += dirty;
                busy
            };
            drop(gone);
            if !busy {
                return dropped;
            }
            self.wait_io(ticket);
        }
    }

    /// Drops what is not under I/O; true if something was.
    fn discard_idle(
        &self,
        inner: &mut SpaceInner,
        pages: PageRange,
        gone: &mut Vec<Frame>,
    ) -> (u64, bool) {
        let (mut dirty, mut busy) = (0, false);
        let from = inner.first_key(pages.start);
        let mut void = Vec::new();
        for (&start, folio) in inner.folios.range_mut(from..pages.end) {
            let Some((first, count)) = part_of(start, folio, pages) else {
                continue;
            };
            if folio.count(Bit::Reading, first, count) > 0 {
                busy = true;
            }
            let stays: Vec<_> = folio.runs(Bit::Writeback, first, first + count).collect();
            busy |= !stays.is_empty();
            // Pages in writeback lose their dirty bit now, so that they are not written again,
            // and themselves when it ends.
            dirty += folio.clear(Bit::Dirty, first, count);
            folio.clear(Bit::Uptodate, first, count);
            for (first, count) in stays {
                folio.set(Bit::Uptodate, first, count);
            }
            if !folio.any(Bit::Dirty) {
                inner.dirty_folios.remove(&start);
            }
            if folio.is_void() {
                void.push(start);
            } else if folio.is_idle_clean() {
                self.cache.queues.settle(folio.slot, self.id);
            }
        }
        for start in void {
            gone.extend(self.remove(inner, start).and_then(|folio| folio.frame));
        }
        self.count_dirty(dirty, false);
        (dirty, busy)
    }

    /// Takes a folio out; its frame is to be dropped without the lock if it is many.
    pub(crate) fn remove(&self, inner: &mut SpaceInner, start: u64) -> Option<Folio> {
        let folio = inner.folios.remove(&start)?;
        inner.dirty_folios.remove(&start);
        self.cache.queues.end(folio.slot);
        Some(folio)
    }

    /// Puts a new folio of `1 << order` pages at `start`.
    pub(crate) fn insert<'a>(
        &self,
        inner: &'a mut SpaceInner,
        start: u64,
        order: u8,
        frame: Option<Frame>,
    ) -> &'a mut Folio {
        let slot = self.cache.queues.begin(&self.me, start, order);
        self.cache.counters.folios_by_order[usize::from(order)].add(1);
        let folio = Folio::new(order, frame, slot);
        inner.folios.entry(start).insert_entry(folio).into_mut()
    }

    /// Cuts a folio into parts of `order`, which share its frame until they are written.
    pub(crate) fn split(&self, inner: &mut SpaceInner, start: u64, order: u8) {
        let Some(folio) = self.remove(inner, start) else {
            return;
        };
        let Some(frame) = &folio.frame else {
            unreachable!("a folio without frame is not split")
        };
        self.cache.counters.splits.add(1);
        for index in 0..1u32 << (folio.order - order) {
            let from = mem(u64::from(index)) << order;
            let part_start = start + from as u64;
            let slot = self.cache.queues.begin(&self.me, part_start, order);
            let mut part = Folio::new(order, Some(frame.part(index, order)), slot);
            part.copy_states(&folio, from);
            if part.is_void() {
                self.cache.queues.end(slot);
                continue;
            }
            if part.any(Bit::Dirty) {
                inner.dirty_folios.insert(part_start);
            }
            if part.is_idle_clean() {
                self.cache.queues.put_back(slot, Queue::Small);
            }
            inner.folios.insert(part_start, part);
        }
    }

    /// Decides on a folio that replacement proposes; gives the pages evicted.
    pub(crate) fn evict(&self, candidate: &Candidate) -> u64 {
        let mut inner = self.inner.write();
        let queues = &self.cache.queues;
        let Some(folio) = inner.folios.get(&candidate.page) else {
            return 0;
        };
        if folio.slot != candidate.slot || !folio.is_idle_clean() {
            return 0;
        }
        if folio.freq() > 0 {
            folio.age();
            queues.put_back(candidate.slot, Queue::Main);
            return 0;
        }
        let Some(folio) = self.remove(&mut inner, candidate.page) else {
            return 0;
        };
        drop(inner);
        let pages = folio.pages() as u64;
        let counters = &self.cache.counters;
        if candidate.from == Queue::Small {
            queues.remember(self.id, candidate.page, pages);
        }
        if folio.is_unused_readahead() {
            counters.readahead_wasted.add(pages);
        }
        counters.evicted_folios.add(1);
        counters.evicted_pages.add(pages);
        pages
    }

    /// Books `pages` more (or fewer) dirty pages.
    pub(crate) fn count_dirty(&self, pages: u64, more: bool) {
        if pages == 0 {
            return;
        }
        let list = self.cache.dirty_list(self.class);
        if more {
            self.dirty_pages.fetch_add(pages, Ordering::Relaxed);
            list.dirty.add(pages);
            if self.class == SpaceClass::Data {
                self.cache.throttle.note_dirtied(pages);
            }
        } else {
            self.dirty_pages.fetch_sub(pages, Ordering::Relaxed);
            list.dirty.sub(pages);
        }
    }

    /// Pages `first..first + count` of the folio at `start` got new content; gives how many were
    /// not dirty.
    pub(crate) fn mark_dirty(
        &self,
        inner: &mut SpaceInner,
        start: u64,
        first: usize,
        count: usize,
    ) -> u64 {
        let folio = inner
            .folios
            .get_mut(&start)
            .expect("the caller just found it");
        folio.set(Bit::Uptodate, first, count);
        let new = folio.set(Bit::Dirty, first, count);
        if new > 0 {
            inner.dirty_folios.insert(start);
            self.count_dirty(new, true);
            self.enlist(inner);
        }
        new
    }

    /// Enters the list of dirty spaces.
    pub(crate) fn enlist(&self, inner: &mut SpaceInner) {
        if inner.dirty_key.is_none() {
            inner.dirty_key = Some(self.cache.dirty_list(self.class).add(&self.me));
            inner.dirty_since = Some(Instant::now());
        }
    }

    /// Waits for something to change that `ticket` was taken before. The I/O that ends it is
    /// bounded by the block layer; the caller looks again in any case.
    pub(crate) fn wait_io(&self, ticket: Ticket) {
        self.cache.counters.io_waits.add(1);
        self.event.wait(ticket, Duration::from_secs(1));
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        let inner = self.inner.get_mut();
        let folios = std::mem::take(&mut inner.folios);
        let key = inner.dirty_key.take();
        let dirty = self.dirty_pages.load(Ordering::Relaxed);
        if dirty > 0 {
            log::error!("address space {} dropped with {dirty} dirty pages", self.id);
            self.count_dirty(dirty, false);
        }
        if let Some(key) = key {
            self.cache.dirty_list(self.class).remove(key);
        }
        for folio in folios.into_values() {
            self.cache.queues.end(folio.slot);
        }
    }
}

/// The part of a folio at `start` that lies in `pages`: first page inside it, and count.
pub(crate) fn part_of(start: u64, folio: &Folio, pages: PageRange) -> Option<(usize, usize)> {
    let whole = PageRange {
        start,
        end: start + folio.pages() as u64,
    };
    let part = whole.intersect(pages)?;
    Some((inside(part.start, start), mem(part.count())))
}
