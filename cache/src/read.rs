//! Reading: hits, and requests that wait for pages.
//!
//! A request walks its range under the lock and *claims* it page by page: a page that is uptodate
//! is pinned at once, one that somebody reads is waited for, a missing one gets a private frame
//! and its reading bit, and goes into a [`Plan`] for a device read. What was claimed is submitted
//! before the walk waits for memory, so nobody waits while holding what others wait for. A fill
//! that ends hands its pages to every request that claimed them, in the same step that makes them
//! uptodate, so that no eviction can come between.

use std::sync::Arc;
use std::time::{Duration, Instant};

use braidfs_blockdev::trace::{self, Kind};
use braidfs_blockdev::{Class, ErrorKind, PAGE_SIZE};
use parking_lot::{Condvar, Mutex};
use smallvec::SmallVec;

use crate::arena::Frame;
use crate::fill::Plan;
use crate::folio::{Bit, Folio, inside, order_at};
use crate::readahead::ReadaheadState;
use crate::space::SpaceInner;
use crate::units::{PAGE, mem};
use crate::{AddressSpace, CacheError, PageRange, ReadData};

/// Called once with what was read.
pub type ReadDone = Box<dyn FnOnce(Result<ReadData, CacheError>) + Send>;

/// How long a request waits for memory before it fails.
pub(crate) const MEMORY_WAIT_MAX: Duration = Duration::from_secs(20);
/// Largest piece that `read_wait` asks for at once.
const READ_WAIT_PIECE: usize = 256 * PAGE_SIZE;

/// A request that waits for pages.
pub(crate) struct Waiter {
    id: u64,
    pages: PageRange,
    /// Claimed pages that others or we read: the fills that end bring them.
    awaited: Vec<PageRange>,
    /// Pages not pinned yet, claimed or not.
    missing: u64,
    parts: Vec<(u64, ReadData)>,
    offset: u64,
    len: usize,
    /// In a lock only to make it shareable.
    done: Mutex<Option<ReadDone>>,
    asked: Asked,
}

/// Who asked for pages, of which file, and when; for tracing.
#[derive(Clone, Copy)]
struct Asked {
    context: u64,
    file: u64,
    since: u64,
}

impl Waiter {
    fn new(file: u64, pages: PageRange, offset: u64, len: usize, done: ReadDone) -> Self {
        let missing = pages.count();
        let (awaited, parts, done) = (Vec::new(), Vec::new(), Mutex::new(Some(done)));
        Self {
            id: 0,
            pages,
            awaited,
            missing,
            parts,
            offset,
            len,
            done,
            asked: Asked {
                context: trace::current(),
                file,
                since: trace::now(),
            },
        }
    }

    /// `pages` are being read.
    fn await_pages(&mut self, pages: PageRange) {
        match self.awaited.last_mut() {
            Some(last) if last.abuts(pages) => last.end = pages.end,
            _ => self.awaited.push(pages),
        }
    }

    /// Takes what lies in `range` out of the awaited pages.
    fn take_awaited(&mut self, range: PageRange) -> Vec<PageRange> {
        let mut taken = Vec::new();
        let mut left = Vec::new();
        for &pages in &self.awaited {
            taken.extend(pages.intersect(range));
            left.extend(PageRange::new(pages.start, pages.end.min(range.start)));
            left.extend(PageRange::new(pages.start.max(range.end), pages.end));
        }
        if !taken.is_empty() {
            self.awaited = left;
        }
        taken
    }

    /// Pins pages `first..first + count` of `frame`, which are the pages from `page` on.
    fn collect(&mut self, page: u64, frame: &Frame, first: usize, count: usize) {
        self.missing -= count as u64;
        if let Some((start, data)) = self.parts.last_mut()
            && *start + (data.len() as u64) / PAGE == page
        {
            data.push_pages(frame.clone(), first, count);
        } else {
            let mut data = ReadData::default();
            data.push_pages(frame.clone(), first, count);
            self.parts.push((page, data));
        }
    }

    /// Ends the request. No lock is held.
    pub fn finish(mut self, error: Option<CacheError>) {
        let Some(done) = self.done.get_mut().take() else {
            return;
        };
        let Asked {
            context,
            file,
            since,
        } = self.asked;
        let arrived = [file, self.offset, self.len as u64, since, 0];
        trace::step_in(context, Kind::Arrived, arrived);
        if let Some(error) = error {
            return done(Err(error));
        }
        debug_assert_eq!(self.missing, 0);
        self.parts.sort_unstable_by_key(|&(page, _)| page);
        let mut all = ReadData::default();
        for (_, data) in self.parts.drain(..) {
            all.append(data);
        }
        all.trim(mem(self.offset - self.pages.start * PAGE), self.len);
        done(Ok(all));
    }
}

/// What pages to claim, and how.
#[derive(Clone, Copy)]
pub(crate) struct ClaimOptions {
    pub order_max: u8,
    pub readahead: bool,
    /// A new folio may have room for this many pages, though only the range is read.
    pub room_min: u64,
}

pub(crate) enum ClaimEnd {
    Done,
    /// No memory for this page.
    NoFrames(u64),
    /// This page's folio waits for a frame: look again when something changed.
    Busy(u64),
}

impl AddressSpace {
    /// All of `offset..offset + len`, if it is uptodate, without waiting. Counts as a use, and
    /// feeds readahead, which may start reading on.
    pub fn read_cached(
        self: &Arc<Self>,
        offset: u64,
        len: usize,
        ra: &ReadaheadState,
    ) -> Option<ReadData> {
        let data = self.gather(offset, len)?;
        let counters = &self.cache.counters;
        counters.hits.add(1);
        counters.hit_bytes.add(len as u64);
        trace::step(Kind::Hit, [self.id, offset, len as u64, 0, 0]);
        if let Some(pages) = PageRange::covering(offset, len as u64)
            && let Some(ahead) = ra.access(pages, None, self.cache.readahead_pages_max())
        {
            self.read_ahead(ahead);
        }
        Some(data)
    }

    /// Pins the bytes if all of them are uptodate.
    fn gather(&self, offset: u64, len: usize) -> Option<ReadData> {
        let mut data = ReadData::default();
        let end = offset.checked_add(len as u64)?;
        let inner = self.inner.read();
        let mut used = SmallVec::<[(&Folio, usize, usize); 3]>::new();
        let mut at = offset;
        while at < end {
            let (start, folio) = inner.find(at / PAGE)?;
            let frame = folio.frame.as_ref()?;
            let from = mem(at - start * PAGE);
            let take = (frame.len() - from).min(mem(end - at));
            let (first, last) = (from / PAGE_SIZE, (from + take).div_ceil(PAGE_SIZE));
            if !folio.all_of(Bit::Uptodate, first, last - first) {
                return None;
            }
            used.push((folio, from, from + take));
            data.push(frame.clone(), from, take);
            at += take as u64;
        }
        // Only now: a read that misses comes again, and is one use.
        for (folio, from, to) in used {
            if folio.touched(from, to) {
                self.cache.counters.readahead_used.add(folio.pages() as u64);
            }
        }
        Some(data)
    }

    /// Starts device reads for what is missing and calls `done` exactly once, maybe before
    /// returning, else on a completion thread. Readahead stays below `eof_bytes`.
    pub fn read(
        self: &Arc<Self>,
        offset: u64,
        len: usize,
        ra: &ReadaheadState,
        eof_bytes: u64,
        done: ReadDone,
    ) {
        let Some(pages) = PageRange::covering(offset, len as u64) else {
            return done(Ok(ReadData::default()));
        };
        let options = ClaimOptions {
            order_max: 8,
            readahead: false,
            room_min: 0,
        };
        let ahead = ra.access(pages, Some(eof_bytes), self.cache.readahead_pages_max());
        self.request(pages, offset, len, options, done);
        if let Some(ahead) = ahead {
            self.read_ahead(ahead);
        }
    }

    /// Copies `offset..offset + out.len()` to `out`, waiting for the devices where needed.
    pub fn read_wait(self: &Arc<Self>, offset: u64, out: &mut [u8]) -> Result<(), CacheError> {
        let mut at = offset;
        for piece in out.chunks_mut(READ_WAIT_PIECE) {
            if let Some(data) = self.gather(at, piece.len()) {
                self.cache.counters.hits.add(1);
                self.cache.counters.hit_bytes.add(piece.len() as u64);
                data.copy_to(piece);
            } else {
                let options = ClaimOptions {
                    order_max: 8,
                    readahead: false,
                    room_min: 0,
                };
                let data = match self.request_wait(at, piece.len(), options) {
                    // Into other memory, and from another copy if there is one.
                    Err(CacheError::Block(error)) if error.kind == ErrorKind::TimedOut => {
                        self.request_wait(at, piece.len(), options)?
                    }
                    data => data?,
                };
                data.copy_to(piece);
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// `request`, and waits for it.
    pub(crate) fn request_wait(
        self: &Arc<Self>,
        offset: u64,
        len: usize,
        options: ClaimOptions,
    ) -> Result<ReadData, CacheError> {
        let Some(pages) = PageRange::covering(offset, len as u64) else {
            return Ok(ReadData::default());
        };
        let answer = Arc::new((Mutex::new(None), Condvar::new()));
        let to = Arc::clone(&answer);
        let done: ReadDone = Box::new(move |result| {
            *to.0.lock() = Some(result);
            to.1.notify_one();
        });
        self.request(pages, offset, len, options, done);
        let mut slot = answer.0.lock();
        loop {
            // Bounded by the block layer: every kiobuf ends.
            if let Some(result) = slot.take() {
                return result;
            }
            answer.1.wait(&mut slot);
        }
    }

    fn request(
        self: &Arc<Self>,
        pages: PageRange,
        offset: u64,
        len: usize,
        options: ClaimOptions,
        done: ReadDone,
    ) {
        self.cache.counters.misses.add(1);
        trace::step(Kind::Miss, [self.id, offset, len as u64, 0, 0]);
        let mut waiter = Some(Waiter::new(self.id, pages, offset, len, done));
        let mut id = None;
        let mut from = pages.start;
        let deadline = Instant::now() + MEMORY_WAIT_MAX;
        self.cache.make_room(pages.count(), self.class);
        loop {
            let mut plans = Vec::new();
            let frames_ticket = self.cache.arena.freed.ticket();
            let ticket = self.event.ticket();
            let mut finished = None;
            let end = {
                let mut inner = self.inner.write();
                let mut current = match id {
                    None => waiter.take().expect("taken once"),
                    Some(id) => match inner.take_waiter(id) {
                        Some(waiter) => waiter,
                        None => return, // A page of it failed meanwhile: it has ended.
                    },
                };
                let rest = PageRange {
                    start: from,
                    end: pages.end,
                };
                let end = self.claim(&mut inner, rest, options, &mut plans, Some(&mut current));
                from = match end {
                    ClaimEnd::Done => pages.end,
                    ClaimEnd::NoFrames(page) | ClaimEnd::Busy(page) => page,
                };
                if current.missing == 0 {
                    finished = Some(current);
                } else {
                    id = Some(inner.put_waiter(current));
                }
                end
            };
            self.start_fills(
                plans,
                if options.readahead {
                    Class::Background
                } else {
                    Class::Sync
                },
            );
            if let Some(waiter) = finished {
                return waiter.finish(None);
            }
            match end {
                ClaimEnd::Done => return,
                ClaimEnd::Busy(_) => self.wait_io(ticket),
                ClaimEnd::NoFrames(page) => {
                    if let Err(error) =
                        self.cache
                            .wait_for_frames(pages.end - page, frames_ticket, deadline)
                    {
                        let waiter = id.and_then(|id| self.inner.write().take_waiter(id));
                        if let Some(waiter) = waiter {
                            waiter.finish(Some(error));
                        }
                        return;
                    }
                }
            }
        }
    }

    /// Claims the pages of `range` in order, as far as memory goes.
    pub(crate) fn claim(
        &self,
        inner: &mut SpaceInner,
        range: PageRange,
        options: ClaimOptions,
        plans: &mut Vec<Plan>,
        mut waiter: Option<&mut Waiter>,
    ) -> ClaimEnd {
        let mut page = range.start;
        while page < range.end {
            let Some((start, folio)) = inner.find_mut(page) else {
                let room_end = inner.room_end(page);
                let room = (range.end.max(page + options.room_min)).min(room_end) - page;
                let order = order_at(page, room, options.order_max);
                let Some(frame) = self.cache.arena.try_alloc_upto(order, self.class) else {
                    return ClaimEnd::NoFrames(page);
                };
                let order = frame.order();
                let count = (range.end - page).min(1 << order);
                let pages = PageRange {
                    start: page,
                    end: page + count,
                };
                if let Some(waiter) = &mut waiter {
                    waiter.await_pages(pages);
                }
                let folio = self.insert(inner, page, order, None);
                folio.set(Bit::Reading, 0, mem(count));
                if options.readahead {
                    folio.mark_readahead();
                }
                Plan::add(plans, page, frame, pages);
                page += count;
                continue;
            };
            let at = inside(page, start);
            let end = folio.pages().min(inside(range.end, start));
            let (is_uptodate, count) = folio.run_of(Bit::Uptodate, at, end);
            if is_uptodate {
                if let (Some(waiter), Some(frame)) = (&mut waiter, &folio.frame) {
                    if folio.touched(at * PAGE_SIZE, (at + count) * PAGE_SIZE) {
                        self.cache.counters.readahead_used.add(folio.pages() as u64);
                    }
                    waiter.collect(page, frame, at, count);
                }
                page += count as u64;
                continue;
            }
            let (is_reading, count) = folio.run_of(Bit::Reading, at, at + count);
            let pages = PageRange {
                start: page,
                end: page + count as u64,
            };
            if !is_reading {
                if folio.frame.is_none() {
                    return ClaimEnd::Busy(page);
                }
                let order = folio.order;
                let Some(frame) = self.cache.arena.try_alloc(order, self.class) else {
                    if order == 0 {
                        return ClaimEnd::NoFrames(page);
                    }
                    self.split(inner, start, order.saturating_sub(4));
                    continue;
                };
                folio.set(Bit::Reading, at, count);
                Plan::add(plans, start, frame, pages);
            }
            if let Some(waiter) = &mut waiter {
                waiter.await_pages(pages);
            }
            page += count as u64;
        }
        ClaimEnd::Done
    }

    /// Reads `pages` in the background, as far as memory can be had without waiting.
    pub(crate) fn read_ahead(self: &Arc<Self>, pages: PageRange) {
        let context = trace::background(self.id);
        let (offset, len) = (pages.start * PAGE, pages.count() * PAGE);
        trace::step(Kind::Ahead, [self.id, offset, len, context, 0]);
        let _in = trace::enter(context);
        let options = ClaimOptions {
            order_max: 8,
            readahead: true,
            room_min: 0,
        };
        self.cache.make_room(pages.count(), self.class);
        let mut plans = Vec::new();
        {
            let mut inner = self.inner.write();
            // Whatever it could not claim is left to the reader.
            self.claim(&mut inner, pages, options, &mut plans, None);
        }
        let issued = plans.iter().map(|plan| plan.pages.count()).sum();
        self.cache.counters.readahead_issued.add(issued);
        self.start_fills(plans, Class::Background);
    }
}

impl SpaceInner {
    fn take_waiter(&mut self, id: u64) -> Option<Waiter> {
        let index = self.waiters.iter().position(|waiter| waiter.id == id)?;
        Some(self.waiters.swap_remove(index))
    }

    fn put_waiter(&mut self, mut waiter: Waiter) -> u64 {
        if waiter.id == 0 {
            self.next_waiter += 1;
            waiter.id = self.next_waiter;
        }
        let id = waiter.id;
        self.waiters.push(waiter);
        id
    }

    /// Pages `range` have been read, but for `failed`: hands them to the requests that claimed
    /// them, and takes out the requests that are complete or have failed. Gives the pages of the
    /// folios that readahead brought and that are used now.
    pub fn serve_waiters(
        &mut self,
        range: PageRange,
        failed: &[(PageRange, CacheError)],
        ended: &mut Vec<(Waiter, Option<CacheError>)>,
    ) -> u64 {
        let mut waiters = std::mem::take(&mut self.waiters);
        let mut used = 0;
        let mut index = 0;
        while index < waiters.len() {
            let waiter = &mut waiters[index];
            let parts = waiter.take_awaited(range);
            let hit = |pages: PageRange| parts.iter().any(|part| part.intersect(pages).is_some());
            let error = failed.iter().find(|f| hit(f.0)).map(|f| f.1);
            if error.is_none() {
                for part in parts {
                    used += self.collect_for(waiter, part);
                }
            }
            if error.is_some() || waiter.missing == 0 {
                ended.push((waiters.swap_remove(index), error));
            } else {
                index += 1;
            }
        }
        self.waiters = waiters;
        used
    }

    fn collect_for(&self, waiter: &mut Waiter, part: PageRange) -> u64 {
        let mut used = 0;
        let mut page = part.start;
        while page < part.end {
            let (start, folio) = self.find(page).expect("pages just read have a folio");
            let frame = folio.frame.as_ref().expect("and it has its frame");
            let at = inside(page, start);
            let count = folio.pages().min(inside(part.end, start)) - at;
            if folio.touched(at * PAGE_SIZE, (at + count) * PAGE_SIZE) {
                used += folio.pages() as u64;
            }
            waiter.collect(page, frame, at, count);
            page += count as u64;
        }
        used
    }
}
