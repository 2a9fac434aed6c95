//! Writing into the cache.
//!
//! A write goes folio by folio. Where there is no folio a private frame is filled without the lock
//! and put in place; where there is one whose frame is ours alone, the bytes are copied in under
//! the lock; where it is pinned (in writeback, or being sent to a reader) the folio gets a new
//! frame: a copy of it if it is small, or if all of it is overwritten; a large one is cut first,
//! so that a small write never copies much. Pages that are being read are waited for; a page
//! written in part is read first.

use std::sync::Arc;
use std::time::Instant;

use braidfs_blockdev::PAGE_SIZE;
use braidfs_blockdev::trace::{self, Kind};

use crate::arena::Frame;
use crate::folio::{Bit, Folio, order_at};
use crate::read::{ClaimOptions, MEMORY_WAIT_MAX};
use crate::space::SpaceInner;
use crate::units::{PAGE, mem};
use crate::{AddressSpace, CacheError, FrameVec, PageRange, WriteOutcome, WriteResult};

/// Largest folio that is copied because a small write meets it pinned: 64 KiB.
const COW_ORDER_MAX: u8 = 4;
/// Largest folio that small sequential writes make: 256 KiB.
const GROW_ORDER_MAX: u8 = 6;

/// Where the bytes come from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Bytes(&'a [u8]),
    Zeros,
}

impl Source<'_> {
    fn copy_to(self, at: usize, out: &mut [u8]) {
        match self {
            Source::Bytes(bytes) => out.copy_from_slice(&bytes[at..at + out.len()]),
            Source::Zeros => out.fill(0),
        }
    }
}

/// What the look under the lock found to be done.
enum Step {
    /// So many bytes are in.
    Wrote(usize),
    /// A folio of this order is to be made here, or to get a new frame, from whole pages.
    Fresh { order: u8, replace: bool },
    /// The page is written in part and not there: it is to be read, with room for more.
    Fill { room: u64 },
    /// Somebody reads the page.
    Wait,
    /// No memory for a copy.
    NoFrames(u8),
}

impl AddressSpace {
    /// Copies `data` into the cache, reading partial pages first where needed. Gives how many
    /// pages became dirty that were not.
    pub fn write(self: &Arc<Self>, offset: u64, data: &[u8]) -> WriteResult {
        let len = data.len() as u64;
        self.traced(
            offset,
            len,
            self.write_from(offset, len, Source::Bytes(data)),
        )
    }

    /// Tells who traces what a write did.
    fn traced(&self, offset: u64, len: u64, result: WriteResult) -> WriteResult {
        let outcome = match &result {
            Ok(outcome) | Err((_, outcome)) => outcome,
        };
        let dirtied = [self.id, offset, len, outcome.newly_dirty_pages, 0];
        trace::step(Kind::Dirtied, dirtied);
        result
    }

    /// Sets bytes to zero, as a write would. What is zero already does not become dirty.
    pub fn zero(self: &Arc<Self>, offset: u64, len: u64) -> WriteResult {
        self.write_from(offset, len, Source::Zeros)
    }

    /// Takes private pages over as the pages from `page` on: no byte is copied where none of them
    /// is cached, or a whole folio of them is. `frames` are whole pages, from
    /// [`Cache::alloc_private_at`] for this page.
    ///
    /// [`Cache::alloc_private_at`]: crate::Cache::alloc_private_at
    pub fn adopt(self: &Arc<Self>, page: u64, frames: FrameVec) -> WriteResult {
        let (offset, len) = (page * PAGE, frames.len() as u64);
        self.traced(offset, len, self.adopt_all(page, frames))
    }

    fn adopt_all(self: &Arc<Self>, page: u64, frames: FrameVec) -> WriteResult {
        let mut outcome = WriteOutcome::default();
        let (mut at, end) = (page, page + (frames.len() / PAGE_SIZE) as u64);
        for frame in frames.into_frames() {
            let count = (end - at).min(1 << frame.order());
            let left = match self.adopt_whole(at, count, frame) {
                Ok(new) => {
                    outcome.newly_dirty_pages += new;
                    None
                }
                Err(frame) => Some(frame),
            };
            // Something else is cached there.
            if let Some(frame) = left {
                let bytes = Source::Bytes(&frame.bytes()[..mem(count * PAGE)]);
                match self.write_from(at * PAGE, count * PAGE, bytes) {
                    Ok(more) => outcome.newly_dirty_pages += more.newly_dirty_pages,
                    Err((error, more)) => {
                        outcome.newly_dirty_pages += more.newly_dirty_pages;
                        return Err((error, outcome));
                    }
                }
            }
            at += count;
        }
        Ok(outcome)
    }

    /// Makes a private frame the folio at `page`, or the new frame of the folio that is there, if
    /// all of its `count` pages are of use. Gives how many became dirty; else the frame.
    fn adopt_whole(&self, page: u64, count: u64, frame: Frame) -> Result<u64, Frame> {
        let whole = PageRange {
            start: page,
            end: page + (1 << frame.order()),
        };
        if count < whole.count() || !page.is_multiple_of(whole.count()) {
            return Err(frame);
        }
        // Dropped after the lock.
        let _old;
        let mut inner = self.inner.write();
        if let Some(folio) = inner.folios.get_mut(&page) {
            if folio.order != frame.order() || folio.any(Bit::Reading) || folio.frame.is_none() {
                return Err(frame);
            }
            _old = folio.frame.replace(frame);
            folio.touched(0, mem(count * PAGE));
        } else if inner.is_room(whole) {
            self.insert(&mut inner, page, frame.order(), Some(frame))
                .touched(0, mem(count * PAGE));
        } else {
            return Err(frame);
        }
        Ok(self.mark_dirty(&mut inner, page, 0, mem(count)))
    }

    fn write_from(self: &Arc<Self>, offset: u64, len: u64, source: Source<'_>) -> WriteResult {
        let mut outcome = WriteOutcome::default();
        let Some(end) = offset.checked_add(len) else {
            return Err((CacheError::Backing(libc::EFBIG), outcome));
        };
        let mut at = offset;
        let (mut deadline, mut is_noted) = (None, false);
        while at < end {
            let frames_ticket = self.cache.arena.freed.ticket();
            let ticket = self.event.ticket();
            let step = {
                let mut inner = self.inner.write();
                if !std::mem::replace(&mut is_noted, true) {
                    inner.note_write(offset, end);
                }
                self.step(
                    &mut inner,
                    at,
                    end,
                    mem_offset(at, offset),
                    source,
                    &mut outcome,
                )
            };
            let result = match step {
                Step::Wrote(bytes) => {
                    at += bytes as u64;
                    deadline = None;
                    Ok(())
                }
                Step::Wait => {
                    self.wait_io(ticket);
                    Ok(())
                }
                Step::Fill { room } => self.fill_page(at / PAGE, room),
                Step::Fresh { order, replace } => self
                    .put_fresh(at, end, order, replace, |from, out| {
                        source.copy_to(mem_offset(at, offset) + from, out);
                    })
                    .map(|(bytes, new)| {
                        at += bytes;
                        outcome.newly_dirty_pages += new;
                    }),
                Step::NoFrames(order) => {
                    let until = *deadline.get_or_insert_with(|| Instant::now() + MEMORY_WAIT_MAX);
                    self.cache.wait_for_frames(1 << order, frames_ticket, until)
                }
            };
            if let Err(error) = result {
                return Err((error, outcome));
            }
        }
        Ok(outcome)
    }

    /// Looks at the folio at byte `at`, and writes to it if that needs no more than a copy.
    fn step(
        &self,
        inner: &mut SpaceInner,
        at: u64,
        end: u64,
        from: usize,
        source: Source<'_>,
        outcome: &mut WriteOutcome,
    ) -> Step {
        let page = at / PAGE;
        let Some((start, folio)) = inner.find_mut(page) else {
            return inner.step_without_folio(at, end);
        };
        let Some(frame) = &folio.frame else {
            return Step::Wait;
        };
        let offset = mem(at - start * PAGE);
        let len = (frame.len() - offset).min(mem(end - at));
        let len = match writable(folio, offset, len) {
            Ok(len) => len,
            Err(step) => return step,
        };
        let Some(frame) = &folio.frame else {
            return Step::Wait;
        };
        if matches!(source, Source::Zeros) {
            let first = offset / PAGE_SIZE;
            let take = len.min((first + 1) * PAGE_SIZE - offset);
            let is_zero = frame.bytes()[offset..offset + take]
                .iter()
                .all(|&byte| byte == 0);
            if is_zero && folio.has(Bit::Uptodate, first) {
                return Step::Wrote(take);
            }
        }
        if folio
            .frame
            .as_mut()
            .is_some_and(|frame| frame.get_mut().is_none())
        {
            let order = folio.order;
            if len == PAGE_SIZE << order {
                return Step::Fresh {
                    order,
                    replace: true,
                };
            }
            if order > COW_ORDER_MAX {
                self.split(inner, start, COW_ORDER_MAX);
                return Step::Wrote(0);
            }
            let Some(mut copy) = self.cache.arena.try_alloc(order, self.class) else {
                if order > 0 && self.cache.arena.free_pages() > self.cache.arena.reserve_pages() {
                    self.split(inner, start, 0);
                    return Step::Wrote(0);
                }
                return Step::NoFrames(order);
            };
            folio.copy_uptodate(copy.get_mut().expect("a new frame is private"));
            self.cache.counters.cow_pages.add(folio.pages() as u64);
            folio.frame = Some(copy);
        }
        let frame = folio
            .frame
            .as_mut()
            .and_then(Frame::get_mut)
            .expect("private by now");
        source.copy_to(from, &mut frame[offset..offset + len]);
        folio.touched(offset, offset + len);
        let first = offset / PAGE_SIZE;
        let count = (offset + len).div_ceil(PAGE_SIZE) - first;
        outcome.newly_dirty_pages += self.mark_dirty(inner, start, first, count);
        Step::Wrote(len)
    }

    /// Fills a private frame with whole pages and puts it at byte `at`: as a new folio, or, with
    /// `replace`, in place of a folio's pinned frame. Gives bytes written and pages newly dirty;
    /// nothing if somebody came first.
    fn put_fresh(
        &self,
        at: u64,
        end: u64,
        order: u8,
        replace: bool,
        copy: impl Fn(usize, &mut [u8]),
    ) -> Result<(u64, u64), CacheError> {
        let page = at / PAGE;
        let mut frame = self.cache.alloc_upto(order, self.class)?;
        let bytes = frame.len().min(mem((end - at) / PAGE * PAGE));
        copy(
            0,
            &mut frame.get_mut().expect("a new frame is private")[..bytes],
        );
        let order = frame.order();
        let whole = PageRange {
            start: page,
            end: page + (1 << order),
        };
        let mut inner = self.inner.write();
        // Dropped after the lock.
        let _old;
        if replace {
            let Some(folio) = inner.folios.get_mut(&page) else {
                return Ok((0, 0));
            };
            if folio.order != order || folio.any(Bit::Reading) || folio.frame.is_none() {
                if folio.order > order && folio.frame.is_some() {
                    // No memory in one piece of that size: in smaller ones, then.
                    self.split(&mut inner, page, order);
                }
                return Ok((0, 0));
            }
            _old = folio.frame.replace(frame);
            folio.touched(0, bytes);
        } else {
            if !inner.is_room(whole) {
                return Ok((0, 0));
            }
            self.insert(&mut inner, page, order, Some(frame))
                .touched(0, bytes);
        }
        let new = self.mark_dirty(&mut inner, page, 0, bytes / PAGE_SIZE);
        drop(inner);
        Ok((bytes as u64, new))
    }

    /// Reads one page, in a folio with room for `room` pages if it has none yet.
    fn fill_page(self: &Arc<Self>, page: u64, room: u64) -> Result<(), CacheError> {
        let options = ClaimOptions {
            order_max: GROW_ORDER_MAX,
            readahead: false,
            room_min: room,
        };
        self.request_wait(page * PAGE, PAGE_SIZE, options).map(drop)
    }
}

/// How much of `len` bytes from `offset` of a folio can be written now: up to the first page that
/// is being read, or that is to be read first.
fn writable(folio: &Folio, offset: usize, len: usize) -> Result<usize, Step> {
    let first = offset / PAGE_SIZE;
    let last = (offset + len - 1) / PAGE_SIZE;
    let mut len = len;
    if let Some((reading, _)) = folio.runs(Bit::Reading, first, last + 1).next() {
        if reading == first {
            return Err(Step::Wait);
        }
        len = reading * PAGE_SIZE - offset;
    }
    let end = offset + len;
    let last = (end - 1) / PAGE_SIZE;
    let tail = end % PAGE_SIZE;
    let head_partial = !offset.is_multiple_of(PAGE_SIZE) || (first == last && tail != 0);
    if head_partial && !folio.has(Bit::Uptodate, first) {
        return Err(Step::Fill { room: 0 });
    }
    if first != last && tail != 0 && !folio.has(Bit::Uptodate, last) {
        len -= tail;
    }
    Ok(len)
}

fn mem_offset(at: u64, offset: u64) -> usize {
    usize::try_from(at - offset).unwrap_or(usize::MAX)
}

impl SpaceInner {
    /// Remembers where writes go on in sequence.
    fn note_write(&mut self, offset: u64, end: u64) {
        if offset != self.write_end {
            self.write_run = 0;
        }
        self.write_run += end - offset;
        self.write_end = end;
    }

    /// Pages to make room for at `page`: as many as came in sequence before.
    fn room_wanted(&self) -> u64 {
        (self.write_run / PAGE).clamp(1, 1 << GROW_ORDER_MAX)
    }

    fn step_without_folio(&self, at: u64, end: u64) -> Step {
        let page = at / PAGE;
        let room = self.room_end(page) - page;
        let whole = if at.is_multiple_of(PAGE) {
            (end - at) / PAGE
        } else {
            0
        };
        if whole == 0 {
            return Step::Fill {
                room: self.room_wanted(),
            };
        }
        let order = order_at(page, whole.min(room), 8);
        let grown = order_at(page, self.room_wanted().min(room), GROW_ORDER_MAX);
        Step::Fresh {
            order: order.max(grown),
            replace: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_pages_are_read_first() {
        let mut folio = Folio::new(2, None, 0);
        assert!(matches!(writable(&folio, 100, 50), Err(Step::Fill { .. })));
        assert!(matches!(writable(&folio, 0, 4096), Ok(4096)));
        assert!(matches!(writable(&folio, 0, 5000), Ok(4096)));
        assert!(matches!(writable(&folio, 0, 100), Err(Step::Fill { .. })));
        folio.set(Bit::Uptodate, 1, 1);
        assert!(matches!(writable(&folio, 0, 5000), Ok(5000)));
        folio.set(Bit::Reading, 3, 1);
        assert!(matches!(writable(&folio, 4096, 12288), Ok(8192)));
        assert!(matches!(writable(&folio, 12288, 1), Err(Step::Wait)));
    }
}
