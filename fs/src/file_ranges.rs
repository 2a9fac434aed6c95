//! fallocate(2): preallocation, holes, zeroing.
//!
//! Each works in bounded steps; a commit may come between two of them. Readers see no difference
//! between a hole and a block that is set aside, so preallocation shows as a whole.

use std::sync::Arc;

use crate::alloc::Room;
use crate::file::OpenFile;
use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};
use crate::meta::records::Extent;
use crate::{Errno, FILE_SIZE_MAX};

/// Blocks that one step of a preallocation reserves: 1 GiB.
const STEP_BLOCKS: u64 = 1 << 18;

/// Extents that one step looks at, or changes.
const STEP_EXTENTS: usize = 2048;

/// What becomes of the whole blocks of a range that is to read as zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clear {
    /// They are freed.
    Punch,
    /// They stay, set aside.
    Zero,
}

/// A range in bytes, and the size that the file has at least afterwards.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    pub offset: u64,
    pub end: u64,
    pub size_min: u64,
}

impl FileSystem {
    /// fallocate(2): modes 0, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE.
    pub fn fallocate(
        &self,
        file: &Arc<OpenFile>,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> Result<(), Errno> {
        self.check_writable()?;
        let inode = &file.inode;
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let clear = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => None,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => Some(Clear::Punch),
            libc::FALLOC_FL_ZERO_RANGE => Some(Clear::Zero),
            _ => return Err(Errno::NOTSUP),
        };
        let attr = inode.state.lock().attr;
        if !attr.is_file() {
            return Err(Errno::NOTSUP);
        }
        if clear.is_none() {
            crate::flags::check_grow(&attr)?;
        } else {
            crate::flags::check_change(&attr)?;
        }
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let end = offset.checked_add(len).filter(|&end| end <= FILE_SIZE_MAX);
        let end = end.ok_or(Errno::FBIG)?;
        let size_min = if keep_size { 0 } else { end };
        let span = Span {
            offset,
            end,
            size_min,
        };
        if clear != Some(Clear::Punch) {
            self.preallocate(inode, offset / PAGE, end.div_ceil(PAGE))?;
        }
        match clear {
            Some(clear) => self.clear(inode, span, clear)?,
            None => {
                let _pass = self.gate.enter();
                self.note_range(inode, span);
            }
        }
        self.end_change(inode)
    }

    /// Size, times and capabilities. The caller holds a pass.
    fn note_range(&self, inode: &Arc<Inode>, span: Span) {
        self.drop_capabilities(inode);
        {
            let mut state = inode.state.lock();
            state.attr.size = state.attr.size.max(span.size_min);
        }
        inode.touch_modified();
        self.mark_dirty(inode);
    }

    /// Sets blocks aside for the holes among file blocks `from..to`. `NOSPC` comes before anything
    /// is done, unless others take the space meanwhile.
    fn preallocate(&self, inode: &Arc<Inode>, from: u64, to: u64) -> Result<(), Errno> {
        self.check_growth(inode, from, to)?;
        let mut at = from;
        while at < to {
            let (upto, holes) = self.next_holes(inode, at, to)?;
            if holes == 0 {
                at = upto;
                continue;
            }
            self.balance_group()?;
            self.check_meta_room()?;
            self.reserve(holes, Room::Growth)?;
            let done = {
                let _pass = self.gate.enter();
                let _range = inode.ranges.exclusive(at * PAGE, upto * PAGE);
                let done = self.fill_holes(inode, at, upto, holes);
                self.mark_dirty(inode);
                done
            };
            let (used, reached) = match done {
                Ok(done) => done,
                Err(error) => {
                    self.space.unreserve(holes);
                    return Err(error);
                }
            };
            self.space.unreserve(holes - used);
            at = reached;
        }
        Ok(())
    }

    /// From `at` on, where a step ends that has not too many holes or extents; and its holes.
    fn next_holes(&self, inode: &Inode, at: u64, end: u64) -> Result<(u64, u64), Errno> {
        let batch = {
            let _map = inode.map.read();
            let extents = self.extents(inode.ino);
            extents.first_overlapping(at, end, STEP_EXTENTS)?
        };
        let (mut reached, mut holes) = (at, 0);
        let whole = (batch.len() < STEP_EXTENTS).then_some(end);
        let borders = batch.iter().map(|extent| (extent.start, extent.end()));
        for (start, next) in borders.chain(whole.map(|end| (end, end))) {
            let gap = start.saturating_sub(reached);
            if holes + gap > STEP_BLOCKS {
                return Ok((reached + (STEP_BLOCKS - holes), STEP_BLOCKS));
            }
            holes += gap;
            reached = next.min(end);
        }
        Ok((reached, holes))
    }

    /// Gives the holes among `from..to` blocks, up to `budget`. Returns how many that took, and
    /// how far it came. The caller holds a pass and the range exclusively.
    fn fill_holes(
        &self,
        inode: &Arc<Inode>,
        from: u64,
        to: u64,
        budget: u64,
    ) -> Result<(u64, u64), Errno> {
        let _map = inode.map.write();
        let extents = self.extents(inode.ino);
        let mut holes = Vec::new();
        let (mut at, mut used) = (from, 0);
        let found = extents.overlapping(from, to)?;
        let borders = found.iter().map(|extent| (extent.start, extent.end()));
        for (start, next) in borders.chain([(to, to)]) {
            if at < start {
                let take = (start - at).min(budget - used);
                holes.push((at, at + take));
                used += take;
                if take < start - at {
                    at += take;
                    break;
                }
            }
            at = next.min(to);
        }
        let mut runs = Vec::new();
        if used > 0 {
            self.space.allocate(used, &mut runs)?;
        }
        let mut runs = runs.into_iter();
        let mut run = (0, 0);
        for (mut start, end) in holes {
            while start < end {
                if run.1 == 0 {
                    run = runs.next().expect("as many as were asked for");
                }
                let (block, len) = (run.0, run.1.min(end - start));
                extents.replace(&Extent {
                    start,
                    len,
                    block,
                    crcs: Vec::new(),
                })?;
                self.space.note_mapped(block, len);
                start += len;
                run = (block + len, run.1 - len);
            }
        }
        inode.state.lock().attr.blocks += used * (PAGE / 512);
        Ok((used, at))
    }

    /// Makes a range read as zeros.
    pub(crate) fn clear(&self, inode: &Arc<Inode>, span: Span, how: Clear) -> Result<(), Errno> {
        const EDGES: u64 = 2;
        let (first, last) = (span.offset.div_ceil(PAGE), span.end / PAGE);
        let mut at = first;
        loop {
            let edges = if at == first { EDGES } else { 0 };
            self.balance_group()?;
            // A page that is zeroed in part has a block, or is a hole and stays one.
            self.reserve(edges, Room::Rewrite)?;
            let mut used = 0;
            let done = {
                let _pass = self.gate.enter();
                let from = span.offset / PAGE * PAGE;
                let _range = inode
                    .ranges
                    .exclusive(from, span.end.next_multiple_of(PAGE));
                let zeroed = if edges > 0 {
                    self.zero_edges(inode, span, &mut used)
                } else {
                    Ok(())
                };
                let done = zeroed.and_then(|()| self.clear_blocks(inode, at, last, how));
                if done.as_ref().is_ok_and(|&reached| reached >= last) {
                    self.note_range(inode, span);
                }
                self.mark_dirty(inode);
                done
            };
            self.space.unreserve(edges - used.min(edges));
            at = done?;
            if at >= last {
                return Ok(());
            }
        }
    }

    /// Zeros the bytes of the range that do not make a whole block.
    fn zero_edges(&self, inode: &Arc<Inode>, span: Span, used: &mut u64) -> Result<(), Errno> {
        let size = inode.state.lock().attr.size;
        let (first, last) = (span.offset.next_multiple_of(PAGE), span.end / PAGE * PAGE);
        let edges = if first > last {
            [(span.offset, span.end), (0, 0)]
        } else {
            [(span.offset, first), (last, span.end)]
        };
        for (from, to) in edges {
            // Behind the end of file everything is zero already.
            if from < to && from < size {
                self.zero(inode, from, to - from, used)?;
            }
        }
        Ok(())
    }

    /// Clears blocks from `from` on, up to `to`; returns how far a step came. The caller holds a
    /// pass and the range exclusively.
    fn clear_blocks(
        &self,
        inode: &Arc<Inode>,
        from: u64,
        to: u64,
        how: Clear,
    ) -> Result<u64, Errno> {
        if from >= to {
            return Ok(to);
        }
        let upto = {
            let _map = inode.map.read();
            let extents = self.extents(inode.ino);
            let batch = extents.first_overlapping(from, to, STEP_EXTENTS)?;
            match batch.last() {
                Some(extent) if batch.len() == STEP_EXTENTS => extent.end().min(to),
                _ => to,
            }
        };
        match how {
            Clear::Punch => self.remove_blocks(inode, from, upto)?,
            Clear::Zero => {
                self.discard_pages(inode, from, upto);
                {
                    let _map = inode.map.write();
                    self.extents(inode.ino).unwrite(from, upto)?;
                }
                // A readahead may have fetched pages through the old map.
                self.discard_pages(inode, from, upto);
            }
        }
        Ok(upto)
    }
}
