//! Writeback: dirty pages, in file order, to new homes.
//!
//! A [`Pass`] is the right to write back one address space; there is one at a time, so batches of
//! a space are allocated and reported in order. A [`Writer`] takes dirty runs from the spaces of
//! its passes into *groups*: each run is pinned (a writer that meets it gets another frame, so its
//! bytes stand still), the backing gives homes, checksums are taken, and one plug submits a kiobuf
//! per placement, over whole folios. Two groups are under way while the next is collected. When a
//! group has ended, the backing is told, and then the pages leave writeback.
//!
//! No lock is held and no plug is open while the backing is called. Passes never wait for each
//! other in a circle: a `Writer` drains what it has under way before it waits for a pass.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use braidfs_blockdev::trace::{self, Kind};
use braidfs_blockdev::{BlockError, Class, Completion, InDoubt, Kiobuf};
use parking_lot::{Condvar, Mutex};

use crate::arena::Frame;
use crate::cache::Cache;
use crate::folio::Bit;
use crate::frame_vec::PinnedPages;
use crate::space::{SpaceInner, part_of};
use crate::units::{PAGE, mem};
use crate::{AddressSpace, CacheError, PageRange, Placement, SpaceClass};

/// Largest group: what one plug gets to merge.
const GROUP_PAGES_MAX: u64 = (16 << 20) / PAGE;
/// Batches (small files) in a group.
const GROUP_BATCHES_MAX: usize = 1024;
/// Groups under way while the next is collected.
const GROUPS_FLYING_MAX: usize = 2;
/// Back-off of background writeback after an error: doubles up to the maximum.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The right to write back a space; ends when dropped.
pub(crate) struct Pass {
    space: Arc<AddressSpace>,
    error: Mutex<Option<CacheError>>,
}

impl Pass {
    fn fail(&self, error: CacheError) {
        self.error.lock().get_or_insert(error);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let space = &self.space;
        let mut inner = space.inner.write();
        inner.in_pass = false;
        if let Some(key) = inner.dirty_key.take() {
            space.cache.dirty_list(space.class).remove(key);
        }
        if self.error.get_mut().is_some() {
            inner.retry_delay = (inner.retry_delay * 2).clamp(RETRY_FIRST, RETRY_MAX);
            inner.retry_at = Some(Instant::now() + inner.retry_delay);
        } else {
            inner.retry_delay = Duration::ZERO;
            inner.retry_at = None;
        }
        if !inner.dirty_folios.is_empty() {
            space.enlist(&mut inner);
        }
        drop(inner);
        space.event.notify();
    }
}

/// Holds off writeback of a space until it is dropped: what its pages have on the devices does not
/// change meanwhile, though they may become dirty.
pub struct WritebackHold {
    _pass: Arc<Pass>,
}

/// Pages of a dirty run, pinned.
struct Pin {
    frame: Frame,
    first: usize,
    count: usize,
}

/// What one space gave to a group.
struct Batch {
    pass: Arc<Pass>,
    pins: Vec<Pin>,
    placements: Vec<Placement>,
    /// One per page, in order.
    crcs: Vec<u32>,
    traced: Traced,
}

/// A batch as who traces sees it.
#[derive(Clone, Copy)]
struct Traced {
    context: u64,
    /// File, offset, length to the end of the last page, pages.
    values: [u64; 5],
}

impl Traced {
    fn begin(file: u64, taken: &TakenDirty) -> Self {
        let ends = (taken.runs.first(), taken.runs.last());
        let (start, end) = match ends {
            (Some(first), Some(last)) => (first.start, last.end),
            _ => (0, 0),
        };
        let values = [file, start * PAGE, (end - start) * PAGE, taken.pages, 0];
        let context = trace::background(file);
        trace::background_step(context, Kind::Writeback, values);
        Self { context, values }
    }

    fn end(self) {
        trace::background_step(self.context, Kind::WritebackEnd, self.values);
    }
}

/// Counts a group's kiobufs down.
#[derive(Default)]
struct GroupIo {
    state: Mutex<GroupState>,
    ended: Condvar,
}

#[derive(Default)]
struct GroupState {
    left: usize,
    failed: Vec<Failed>,
}

/// A placement that was not written: its batch, its number there, and why.
struct Failed {
    batch: usize,
    number: usize,
    error: BlockError,
    in_doubt: Option<InDoubt>,
}

struct Group {
    batches: Vec<Batch>,
    pages: u64,
    io: Arc<GroupIo>,
    started: Instant,
}

impl Group {
    fn new() -> Self {
        Self {
            batches: Vec::new(),
            pages: 0,
            io: Arc::default(),
            started: Instant::now(),
        }
    }
}

/// Writes back, several groups at a time. Drains when dropped.
pub(crate) struct Writer<'a> {
    cache: &'a Cache,
    open: Group,
    flying: VecDeque<Group>,
    last_end: Instant,
}

impl<'a> Writer<'a> {
    pub fn new(cache: &'a Cache) -> Self {
        Self {
            cache,
            open: Group::new(),
            flying: VecDeque::new(),
            last_end: Instant::now(),
        }
    }

    /// Takes up to `pages_max` dirty pages of `range` under way; gives how many there were.
    pub fn write_back(&mut self, pass: &Arc<Pass>, range: PageRange, pages_max: u64) -> u64 {
        let group_max = GROUP_PAGES_MAX.min(u64::from(self.cache.arena.usable_pages()) / 16);
        let (mut from, mut total) = (range.start, 0);
        while total < pages_max {
            let room = (group_max - self.open.pages).min(pages_max - total);
            let rest = PageRange {
                start: from,
                end: range.end,
            };
            let Some(taken) = pass.space.take_dirty(rest, room) else {
                break;
            };
            from = taken.runs.last().map_or(range.end, |run| run.end);
            total += taken.pages;
            self.add(pass, taken);
        }
        total
    }

    fn add(&mut self, pass: &Arc<Pass>, taken: TakenDirty) {
        let space = &pass.space;
        let traced = Traced::begin(space.id, &taken);
        let mut placements = Vec::with_capacity(taken.runs.len());
        let result = space
            .backing
            .allocate(space.id, &taken.runs, &mut placements)
            .and_then(|()| check_placements(&taken.runs, &placements));
        if let Err(error) = result {
            log::error!(
                "no room to write {} pages of {}: {error}",
                taken.pages,
                space.id
            );
            pass.fail(error);
            drop(taken.pins);
            space.end_writeback(&taken.runs, Some(error));
            traced.end();
            return;
        }
        self.open.pages += taken.pages;
        let (pins, crcs) = (taken.pins, Vec::new());
        self.open.batches.push(Batch {
            pass: Arc::clone(pass),
            pins,
            placements,
            crcs,
            traced,
        });
        let group_max = GROUP_PAGES_MAX.min(u64::from(self.cache.arena.usable_pages()) / 16);
        if self.open.pages >= group_max || self.open.batches.len() >= GROUP_BATCHES_MAX {
            self.submit();
        }
    }

    fn submit(&mut self) {
        if self.open.batches.is_empty() {
            return;
        }
        let mut group = std::mem::replace(&mut self.open, Group::new());
        group.started = Instant::now();
        let kiobufs = group
            .batches
            .iter()
            .map(|batch| batch.placements.len())
            .sum();
        group.io.state.lock().left = kiobufs;
        let class = Class::Background;
        let mut plug = self.cache.volume.plug();
        for (index, batch) in group.batches.iter_mut().enumerate() {
            let _in = trace::enter(batch.traced.context);
            let file = batch.pass.space.id;
            let mut pins = std::mem::take(&mut batch.pins).into_iter();
            let mut current = None;
            for (number, &placement) in batch.placements.iter().enumerate() {
                let pages = pinned_pages(placement, &mut pins, &mut current, &mut batch.crcs);
                let len = pages.len();
                let io = Arc::clone(&group.io);
                let end_io = Box::new(move |done| io.end_io(index, number, done));
                let kiobuf = Kiobuf::new(Box::new(pages), 0, len, end_io);
                let offset = placement.pages.start * PAGE;
                plug.write(placement.block, kiobuf.of_file(file, offset), class);
            }
        }
        plug.finish();
        let counters = &self.cache.counters;
        counters.writeback_batches.add(group.batches.len() as u64);
        counters.writeback_kiobufs.add(kiobufs as u64);
        self.flying.push_back(group);
        while self.flying.len() > GROUPS_FLYING_MAX {
            self.finish_oldest();
        }
    }

    /// Submits what is collected and waits until all of it is written.
    pub fn drain(&mut self) {
        self.submit();
        while !self.flying.is_empty() {
            self.finish_oldest();
        }
    }

    fn finish_oldest(&mut self) {
        let Some(group) = self.flying.pop_front() else {
            return;
        };
        let mut failed = group.io.wait();
        for (index, batch) in group.batches.into_iter().enumerate() {
            let own: Vec<_> = failed.extract_if(.., |f| f.batch == index).collect();
            end_batch(&batch, own);
        }
        let now = Instant::now();
        let busy = now - group.started.max(self.last_end);
        self.last_end = now;
        self.cache.throttle.note_written(group.pages * PAGE, busy);
        self.cache.flush_signal.progress.notify();
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.drain();
    }
}

/// Tells the backing, then lets the pages leave writeback.
fn end_batch(batch: &Batch, mut failed: Vec<Failed>) {
    let space = &batch.pass.space;
    let mut crcs = batch.crcs.as_slice();
    let mut good = Vec::with_capacity(batch.placements.len());
    let mut bad = Vec::new();
    for (number, &placement) in batch.placements.iter().enumerate() {
        let (own, rest) = crcs.split_at(mem(placement.pages.count()));
        crcs = rest;
        let at = failed.iter().position(|f| f.number == number);
        let failure = at.map(|at| failed.swap_remove(at));
        let error = failure.as_ref().map(|failure| failure.error);
        if let Some(in_doubt) = failure.and_then(|failure| failure.in_doubt) {
            space.backing.in_doubt(space.id, placement, in_doubt);
        }
        space
            .backing
            .written(space.id, placement, own, error.map_or(Ok(()), Err));
        match error {
            None => good.push(placement.pages),
            Some(error) => {
                log::error!(
                    "writing pages {:?} of {}: {error}",
                    placement.pages,
                    space.id
                );
                bad.push((placement.pages, CacheError::Block(error)));
            }
        }
    }
    space.end_writeback(&good, None);
    for (pages, error) in bad {
        batch.pass.fail(error);
        space.end_writeback(&[pages], Some(error));
    }
    batch.traced.end();
}

/// The pages of one placement, in order, from the batch's pins; takes their checksums.
fn pinned_pages(
    placement: Placement,
    pins: &mut impl Iterator<Item = Pin>,
    current: &mut Option<Pin>,
    crcs: &mut Vec<u32>,
) -> PinnedPages {
    let mut pages = PinnedPages::new();
    let mut left = mem(placement.pages.count());
    while left > 0 {
        let mut pin = current
            .take()
            .or_else(|| pins.next())
            .expect("the placements cover the runs, checked");
        let take = pin.count.min(left);
        for index in pin.first..pin.first + take {
            crcs.push(crc32c::crc32c(pin.frame.page_bytes(index)));
        }
        left -= take;
        if take == pin.count {
            pages.push(pin.frame, pin.first, take);
        } else {
            pages.push(pin.frame.clone(), pin.first, take);
            pin.first += take;
            pin.count -= take;
            *current = Some(pin);
        }
    }
    pages
}

fn check_placements(runs: &[PageRange], placements: &[Placement]) -> Result<(), CacheError> {
    let mut rest = placements.iter();
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            match rest.next() {
                Some(next)
                    if next.pages.start == at
                        && next.pages.end > at
                        && next.pages.end <= run.end =>
                {
                    at = next.pages.end;
                }
                _ => return Err(CacheError::Backing(libc::EIO)),
            }
        }
    }
    if rest.next().is_some() {
        Err(CacheError::Backing(libc::EIO))
    } else {
        Ok(())
    }
}

impl GroupIo {
    fn end_io(&self, batch: usize, number: usize, completion: Completion) {
        drop(completion.pages);
        let mut state = self.state.lock();
        if let Some(error) = completion.error {
            let in_doubt = completion.in_doubt;
            state.failed.push(Failed {
                batch,
                number,
                error,
                in_doubt,
            });
        }
        state.left -= 1;
        if state.left == 0 {
            self.ended.notify_all();
        }
    }

    /// Bounded by the block layer: every kiobuf ends.
    fn wait(&self) -> Vec<Failed> {
        let mut state = self.state.lock();
        while state.left > 0 {
            self.ended.wait(&mut state);
        }
        std::mem::take(&mut state.failed)
    }
}

/// Dirty runs that went into writeback.
struct TakenDirty {
    runs: Vec<PageRange>,
    pins: Vec<Pin>,
    pages: u64,
}

impl AddressSpace {
    /// Writes back dirty pages of the range and waits. The error is the first of this flush.
    pub fn flush(self: &Arc<Self>, pages: PageRange) -> Result<(), CacheError> {
        let pass = self.begin_pass();
        let mut writer = Writer::new(&self.cache);
        writer.write_back(&pass, pages, u64::MAX);
        writer.drain();
        let error = *pass.error.lock();
        error.map_or(Ok(()), Err)
    }

    /// Waits for writeback of the space to end, and holds it off. Not for long: those who need
    /// clean pages wait. The caller neither writes back nor waits for who does meanwhile.
    pub fn hold_writeback(self: &Arc<Self>) -> WritebackHold {
        WritebackHold {
            _pass: self.begin_pass(),
        }
    }

    /// The right to write back, when its holder lets it go. The caller holds no other one.
    pub(crate) fn begin_pass(self: &Arc<Self>) -> Arc<Pass> {
        let mut is_waiting = false;
        loop {
            let ticket = self.event.ticket();
            {
                let mut inner = self.inner.write();
                if !inner.in_pass {
                    inner.pass_waiting -= u32::from(is_waiting);
                    inner.in_pass = true;
                    return Arc::new(Pass {
                        space: Arc::clone(self),
                        error: Mutex::default(),
                    });
                }
                inner.pass_waiting += u32::from(!is_waiting);
                is_waiting = true;
            }
            self.wait_io(ticket);
        }
    }

    /// The right to write back, if nobody has it. In the background, waiting threads go first and
    /// a space that failed is left alone for a while.
    pub(crate) fn try_begin_pass(self: &Arc<Self>, background: bool) -> Option<Arc<Pass>> {
        let mut inner = self.inner.write();
        let is_held_back =
            inner.pass_waiting > 0 || inner.retry_at.is_some_and(|at| at > Instant::now());
        if inner.in_pass || (background && is_held_back) {
            return None;
        }
        inner.in_pass = true;
        Some(Arc::new(Pass {
            space: Arc::clone(self),
            error: Mutex::default(),
        }))
    }

    /// Moves up to `pages_max` dirty pages of `range`, in file order, into writeback, pinned.
    fn take_dirty(&self, range: PageRange, pages_max: u64) -> Option<TakenDirty> {
        let mut taken = TakenDirty {
            runs: Vec::new(),
            pins: Vec::new(),
            pages: 0,
        };
        let mut inner = self.inner.write();
        let SpaceInner {
            folios,
            dirty_folios,
            ..
        } = &mut *inner;
        let from = folios
            .range(..=range.start)
            .next_back()
            .filter(|(start, folio)| range.start - **start < 1 << folio.order)
            .map_or(range.start, |(&start, _)| start);
        let mut clean = Vec::new();
        for &start in dirty_folios.range(from..range.end.max(from)) {
            let folio = folios.get_mut(&start).expect("dirty folios are in the map");
            let Some((first, count)) = part_of(start, folio, range) else {
                continue;
            };
            let runs: Vec<_> = folio.runs(Bit::Dirty, first, first + count).collect();
            for (first, count) in runs {
                let count = count.min(mem(pages_max - taken.pages));
                if count == 0 {
                    break;
                }
                debug_assert_eq!(folio.count(Bit::Writeback, first, count), 0);
                folio.clear(Bit::Dirty, first, count);
                folio.set(Bit::Writeback, first, count);
                let frame = folio.frame.clone().expect("dirty pages have a frame");
                taken.pins.push(Pin {
                    frame,
                    first,
                    count,
                });
                taken.pages += count as u64;
                let run_start = start + first as u64;
                let run = PageRange {
                    start: run_start,
                    end: run_start + count as u64,
                };
                match taken.runs.last_mut() {
                    Some(last) if last.abuts(run) => last.end = run.end,
                    _ => taken.runs.push(run),
                }
            }
            if !folio.any(Bit::Dirty) {
                clean.push(start);
            }
            if taken.pages == pages_max {
                break;
            }
        }
        for start in clean {
            dirty_folios.remove(&start);
        }
        if taken.pages == 0 {
            return None;
        }
        self.count_dirty(taken.pages, false);
        self.cache.dirty_list(self.class).writeback.add(taken.pages);
        self.writeback_pages
            .fetch_add(taken.pages, Ordering::Relaxed);
        Some(taken)
    }

    /// The pages of `runs` leave writeback: clean, unless written again; or, after an error, dirty.
    fn end_writeback(&self, runs: &[PageRange], error: Option<CacheError>) {
        let (mut ended, mut merged) = (0, 0);
        {
            let mut inner = self.inner.write();
            if let Some(error) = error {
                self.note_write_error(&mut inner, error);
            }
            for &run in runs {
                let from = inner.first_key(run.start);
                let SpaceInner {
                    folios,
                    dirty_folios,
                    ..
                } = &mut *inner;
                for (&start, folio) in folios.range_mut(from..run.end) {
                    let Some((first, count)) = part_of(start, folio, run) else {
                        continue;
                    };
                    let here = folio.clear(Bit::Writeback, first, count);
                    debug_assert_eq!(here, count as u64, "page lost in writeback");
                    ended += here;
                    if error.is_some() {
                        let again = folio.set(Bit::Dirty, first, count);
                        folio.set(Bit::Uptodate, first, count);
                        dirty_folios.insert(start);
                        merged += here - again;
                        self.count_dirty(again, true);
                    } else if folio.is_idle_clean() {
                        self.cache.queues.settle(folio.slot, self.id);
                    }
                }
            }
            if error.is_some() {
                self.enlist(&mut inner);
            }
            self.writeback_pages.fetch_sub(ended, Ordering::Relaxed);
        }
        self.cache.dirty_list(self.class).writeback.sub(ended);
        if error.is_none() {
            self.cache.counters.written_pages.add(ended);
        }
        if merged > 0 {
            self.backing.dirty_merged(self.id, merged);
        }
        self.event.notify();
    }
}

impl Cache {
    /// Writes back and waits until no page of that class that was dirty at the call is dirty or in
    /// writeback. Pages whose write failed stay dirty and count as done; their spaces record the
    /// error.
    pub fn flush_all(&self, class: SpaceClass) {
        let mut writer = Writer::new(self);
        let mut busy = Vec::new();
        for space in self.dirty_list(class).spaces() {
            match space.try_begin_pass(false) {
                Some(pass) => {
                    writer.write_back(&pass, PageRange::ALL, u64::MAX);
                }
                None => busy.push(space),
            }
        }
        for space in busy {
            let pass = space.try_begin_pass(false).unwrap_or_else(|| {
                writer.drain();
                space.begin_pass()
            });
            writer.write_back(&pass, PageRange::ALL, u64::MAX);
        }
        writer.drain();
    }

    /// The owners' numbers of Data spaces that have dirty pages.
    pub fn dirty_spaces(&self) -> Vec<u64> {
        let spaces = self.dirty_list(SpaceClass::Data).spaces();
        spaces.iter().map(|space| space.id).collect()
    }

    /// Pages of Data spaces that are dirty or in writeback.
    pub(crate) fn unclean_pages(&self) -> u64 {
        let list = self.dirty_list(SpaceClass::Data);
        list.dirty.value() + list.writeback.value()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}
