//! Device reads: private frames are filled, verified, and put in place.
//!
//! A fill covers consecutive pages that are marked reading. Its frames are reachable by nobody
//! until every kiobuf has ended and each block's checksum holds; then one step under the lock puts
//! them into the folios, makes the pages uptodate and hands them to the requests that wait. A
//! completion never waits: what needs the devices again (another copy of a block that failed its
//! checksum) goes to the helper thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use braidfs_blockdev::{
    AlignedBuf, BlockError, Class, Completion, ErrorKind, Kiobuf, Op, PAGE_SIZE, VolBlock,
};
use parking_lot::Mutex;

use crate::arena::Frame;
use crate::folio::{Bit, inside};
use crate::frame_vec::{FrameVec, Frames, Lender};
use crate::space::{SpaceInner, part_of};
use crate::units::{PAGE, mem};
use crate::{AddressSpace, CacheError, MapOut, PageRange, SegmentKind};

/// Largest fill: so that long readahead completes, and is verified, piece by piece.
const FILL_PAGES_MAX: u64 = 512;

/// Pages to be read, with a private frame for each of their folios.
pub(crate) struct Plan {
    /// First page of the first frame.
    base: u64,
    frames: Vec<Frame>,
    /// The pages to read; the frames may reach further at both ends.
    pub pages: PageRange,
}

impl Plan {
    /// Adds `pages`, to be read into `frame`, the frame of the folio at `start`.
    pub fn add(plans: &mut Vec<Plan>, start: u64, frame: Frame, pages: PageRange) {
        if let Some(last) = plans.last_mut()
            && last.pages.end == pages.start
            && last.frames_end() == start
            && last.pages.count() + pages.count() <= FILL_PAGES_MAX
        {
            last.frames.push(frame);
            last.pages.end = pages.end;
            return;
        }
        plans.push(Plan {
            base: start,
            frames: vec![frame],
            pages,
        });
    }

    fn frames_end(&self) -> u64 {
        self.base
            + self
                .frames
                .iter()
                .map(|frame| 1 << frame.order())
                .sum::<u64>()
    }
}

/// Consecutive blocks that hold consecutive pages.
#[derive(Clone, Copy)]
struct Extent {
    pages: PageRange,
    block: VolBlock,
    crc_index: Option<usize>,
}

struct Fill {
    space: Arc<AddressSpace>,
    base: u64,
    pages: PageRange,
    extents: Vec<Extent>,
    crcs: Vec<u32>,
    lender: Mutex<Option<Lender>>,
    failed: Mutex<Vec<(PageRange, CacheError)>>,
    /// Kiobufs under way, and one more until all are submitted.
    pending: AtomicU32,
}

/// A fill and the kiobufs that it waits for.
type Prepared = (Arc<Fill>, Vec<(VolBlock, Kiobuf)>);

impl AddressSpace {
    /// Asks where the planned pages live and reads them.
    pub(crate) fn start_fills(self: &Arc<Self>, plans: Vec<Plan>, class: Class) {
        let mut fills = Vec::with_capacity(plans.len());
        for plan in plans {
            let mut out = MapOut::default();
            let mapped = self.backing.map(self.id, plan.pages, &mut out);
            match mapped.and_then(|()| extents_of(plan.pages, &out)) {
                Ok(extents) => fills.extend(self.prepare(plan, extents, out.crcs)),
                Err(error) => {
                    let all = [(plan.pages, error)];
                    self.put_in_place(plan.base, plan.frames.into(), plan.pages, &all);
                }
            }
        }
        if fills.is_empty() {
            return;
        }
        let mut plug = self.cache.volume.plug();
        for (fill, kiobufs) in fills {
            for (block, kiobuf) in kiobufs {
                plug.read(block, kiobuf, None, class);
            }
            fill.end_one();
        }
        plug.finish();
    }

    /// Zeros the holes and builds a kiobuf for each extent; a fill of holes alone ends at once.
    fn prepare(
        self: &Arc<Self>,
        plan: Plan,
        extents: Vec<Extent>,
        crcs: Vec<u32>,
    ) -> Option<Prepared> {
        let bytes = plan.frames.iter().map(Frame::len).sum();
        let mut frames = FrameVec::new(plan.frames, bytes);
        let mut at = plan.pages.start;
        let ends = extents
            .iter()
            .map(|extent| (extent.pages.start, extent.pages.end));
        let mut holes = 0;
        for (start, end) in ends.chain([(plan.pages.end, plan.pages.end)]) {
            if at < start {
                frames.zero_pages(inside(at, plan.base), mem(start - at));
                holes += start - at;
            }
            at = end;
        }
        let counters = &self.cache.counters;
        counters.hole_pages.add(holes);
        if extents.is_empty() {
            self.put_in_place(plan.base, frames.into_frames(), plan.pages, &[]);
            return None;
        }
        counters.read_pages.add(plan.pages.count() - holes);
        let mut lender = frames.lend();
        let mut at = plan.base;
        let memory: Vec<_> = extents
            .iter()
            .map(|extent| {
                lender.skip(mem(extent.pages.start - at));
                at = extent.pages.end;
                lender.take(mem(extent.pages.count()))
            })
            .collect();
        let kiobufs_count = u32::try_from(extents.len()).expect("at most one per page");
        let fill = Arc::new(Fill {
            space: Arc::clone(self),
            base: plan.base,
            pages: plan.pages,
            extents,
            crcs,
            lender: Mutex::new(Some(lender)),
            failed: Mutex::default(),
            pending: AtomicU32::new(kiobufs_count + 1),
        });
        let kiobufs = memory
            .into_iter()
            .zip(&fill.extents)
            .map(|(pages, &extent)| {
                let to = Arc::clone(&fill);
                let len = mem(extent.pages.count()) * PAGE_SIZE;
                let end_io = Box::new(move |completion| to.end_io(extent, completion));
                let kiobuf = Kiobuf::new(pages, 0, len, end_io);
                let offset = extent.pages.start * PAGE;
                (extent.block, kiobuf.of_file(self.id, offset))
            })
            .collect();
        Some((fill, kiobufs))
    }

    /// The frames have the content of `pages`, but for `failed`: the one step in which pages
    /// become uptodate. May run on a completion thread.
    fn put_in_place(
        &self,
        base: u64,
        frames: Frames,
        pages: PageRange,
        failed: &[(PageRange, CacheError)],
    ) {
        let mut gone = Vec::new();
        let mut ended = Vec::new();
        {
            let mut inner = self.inner.write();
            let mut start = base;
            for frame in frames {
                let count = 1 << frame.order();
                install(&mut inner, start, frame, pages, &mut gone);
                start += count;
            }
            let mut void = Vec::new();
            for (&start, folio) in inner.folios.range_mut(base..pages.end) {
                let Some((first, count)) = part_of(start, folio, pages) else {
                    continue;
                };
                folio.clear(Bit::Reading, first, count);
                folio.set(Bit::Uptodate, first, count);
                for &(bad, _) in failed {
                    if let Some((first, count)) = part_of(start, folio, bad) {
                        folio.clear(Bit::Uptodate, first, count);
                    }
                }
                if folio.is_void() {
                    void.push(start);
                } else if folio.is_idle_clean() {
                    self.cache.queues.settle(folio.slot, self.id);
                }
            }
            let used = inner.serve_waiters(pages, failed, &mut ended);
            self.cache.counters.readahead_used.add(used);
            for start in void {
                gone.extend(self.remove(&mut inner, start).and_then(|folio| folio.frame));
            }
        }
        drop(gone);
        if !failed.is_empty() {
            self.cache.counters.read_errors.add(1);
        }
        self.event.notify();
        for (waiter, error) in ended {
            waiter.finish(error);
        }
    }
}

/// Puts a filled frame into the folio at `start`, or, where that has pages of its own, the two
/// together. `read` are the pages the fill brought. Frames left over go to `gone`.
fn install(
    inner: &mut SpaceInner,
    start: u64,
    mut frame: Frame,
    read: PageRange,
    gone: &mut Vec<Frame>,
) {
    let end = start + (1 << frame.order());
    if let Some(folio) = inner.folios.get_mut(&start)
        && folio.frame.is_none()
    {
        debug_assert_eq!(folio.order, frame.order());
        folio.frame = Some(frame);
        return;
    }
    // The folio had uptodate pages when the fill began, and may have been cut since. Where its
    // frame is ours alone the new pages are copied into it; where it is pinned, its pages are
    // copied to the new frame, which takes its place.
    let mut swap = Vec::new();
    for (&at, folio) in inner.folios.range_mut(start..end) {
        let Some((first, count)) = part_of(at, folio, read) else {
            continue;
        };
        let offset = inside(at, start) * PAGE_SIZE;
        let (from, to) = (first * PAGE_SIZE, (first + count) * PAGE_SIZE);
        if let Some(own) = folio.frame.as_mut().and_then(Frame::get_mut) {
            own[from..to].copy_from_slice(&frame.bytes()[offset + from..offset + to]);
        } else {
            let bytes = frame.get_mut().expect("a fill's frame is private");
            folio.copy_uptodate(&mut bytes[offset..offset + (PAGE_SIZE << folio.order)]);
            swap.push(at);
        }
    }
    for at in swap {
        let folio = inner.folios.get_mut(&at).expect("just seen");
        let index = (at - start) >> folio.order;
        let part = frame.part(u32::try_from(index).expect("inside a folio"), folio.order);
        gone.extend(folio.frame.replace(part));
    }
    gone.push(frame);
}

impl Fill {
    fn end_io(self: &Arc<Self>, extent: Extent, completion: Completion) {
        if let Some(error) = completion.error {
            self.failed
                .lock()
                .push((extent.pages, CacheError::Block(error)));
        }
        drop(completion.pages);
        self.end_one();
    }

    fn end_one(self: &Arc<Self>) {
        if self.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end();
        }
    }

    fn end(self: &Arc<Self>) {
        let mut failed = std::mem::take(&mut *self.failed.lock());
        let frames = self.lender.lock().take().and_then(Lender::finish);
        let Some(frames) = frames.map(FrameVec::into_frames) else {
            // A device did not answer and still has pages, so none can be had: all of them fail.
            let error = failed.first().map_or_else(|| self.lost_pages(), |f| f.1);
            failed.push((self.pages, error));
            return self
                .space
                .put_in_place(self.base, Frames::new(), self.pages, &failed);
        };
        let bad = self.mismatches(&frames, &failed);
        if bad.is_empty() {
            return self
                .space
                .put_in_place(self.base, frames, self.pages, &failed);
        }
        let fill = Arc::clone(self);
        self.space
            .cache
            .helper
            .run(Box::new(move || fill.repair(frames, bad, failed)));
    }

    /// The block layer kept pages of a kiobuf that it ended well: nothing here can be trusted.
    fn lost_pages(&self) -> CacheError {
        log::error!("pages of a finished read are still in use");
        CacheError::Block(BlockError {
            kind: ErrorKind::Aborted,
            op: Op::Read,
            dev: BlockError::NO_DEVICE,
            at: self.extents[0].block.bytes(),
        })
    }

    /// Pages whose content is not what the checksum says.
    fn mismatches(
        &self,
        frames: &[Frame],
        failed: &[(PageRange, CacheError)],
    ) -> Vec<(u64, VolBlock, u32)> {
        let mut bad = Vec::new();
        let mut page_bytes = frames
            .iter()
            .flat_map(|frame| (0..1 << frame.order()).map(|index| frame.page_bytes(index)))
            .zip(self.base..);
        for extent in &self.extents {
            let Some(crc_index) = extent.crc_index else {
                continue;
            };
            let skip = failed
                .iter()
                .any(|(pages, _)| pages.intersect(extent.pages).is_some());
            if skip {
                continue;
            }
            let crcs = &self.crcs[crc_index..];
            for (bytes, page) in page_bytes.by_ref() {
                let Some(index) = page.checked_sub(extent.pages.start) else {
                    continue;
                };
                let want = crcs[mem(index)];
                if crc32c::crc32c(bytes) != want {
                    bad.push((page, extent.block.plus(index), want));
                }
                if page + 1 == extent.pages.end {
                    break;
                }
            }
        }
        bad
    }

    /// On the helper thread: looks for a copy of each bad block that matches.
    fn repair(
        &self,
        mut frames: Frames,
        bad: Vec<(u64, VolBlock, u32)>,
        mut failed: Vec<(PageRange, CacheError)>,
    ) {
        let counters = &self.space.cache.counters;
        for (page, block, want) in bad {
            counters.crc_errors.add(1);
            let found = self.good_copy(page, block, want);
            if let Some(copy) = found {
                counters.crc_repaired.add(1);
                let mut at = inside(page, self.base);
                for frame in &mut frames {
                    if at < 1 << frame.order() {
                        let bytes = frame.get_mut().expect("a fill's frame is private");
                        bytes[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].copy_from_slice(&copy);
                        break;
                    }
                    at -= 1 << frame.order();
                }
            } else {
                failed.push((PageRange::single(page), CacheError::Corrupt { block }));
            }
        }
        self.space
            .put_in_place(self.base, frames, self.pages, &failed);
    }

    fn good_copy(&self, page: u64, block: VolBlock, want: u32) -> Option<AlignedBuf> {
        let volume = &self.space.cache.volume;
        let id = self.space.id;
        let mut good = None;
        for copy in 0..volume.copies(block).max(1) {
            match volume.read_wait(block, AlignedBuf::zeroed(PAGE_SIZE), Some(copy)) {
                Ok(buf) if crc32c::crc32c(&buf) == want => {
                    good = good.or(Some(buf));
                    continue;
                }
                Ok(_) => {}
                Err(error) => log::error!("page {page} of {id}: copy {copy}: {error}"),
            }
            if let Some((dev, at)) = volume.locate(block, copy) {
                let name = volume.device_name(dev);
                log::error!("checksum mismatch on {name} at byte {at} (page {page} of {id})");
            }
            self.space.backing.corrupt(id, page, block, copy);
        }
        good
    }
}

/// Checks that the segments cover `pages` exactly; gives the Data ones, neighbours joined.
fn extents_of(pages: PageRange, out: &MapOut) -> Result<Vec<Extent>, CacheError> {
    let fault = CacheError::Backing(libc::EIO);
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = pages.start;
    for segment in &out.segments {
        if segment.pages.start != at || segment.pages.end <= at || segment.pages.end > pages.end {
            log::error!("the mapping of {pages:?} does not tile it");
            return Err(fault);
        }
        at = segment.pages.end;
        let SegmentKind::Data { block, crc_index } = segment.kind else {
            continue;
        };
        let count = segment.pages.count();
        if crc_index.is_some_and(|index| (out.crcs.len() as u64) < index as u64 + count) {
            log::error!("the mapping of {pages:?} lacks checksums");
            return Err(fault);
        }
        if let Some(last) = extents.last_mut()
            && last.pages.abuts(segment.pages)
            && last.block.plus(last.pages.count()) == block
            && last.crc_index.map(|index| index + mem(last.pages.count())) == crc_index
        {
            last.pages.end = segment.pages.end;
        } else {
            extents.push(Extent {
                pages: segment.pages,
                block,
                crc_index,
            });
        }
    }
    if at == pages.end {
        Ok(extents)
    } else {
        Err(fault)
    }
}
