//! Operations on ranges of a file: preallocation, holes, SEEK_DATA and SEEK_HOLE, copying.

use std::sync::Arc;

use braidfs_cache::PageRange;

use crate::file::{IO_BYTES_MAX, OpenFile, ReadReply, errno};
use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};
use crate::meta::records::Extent;
use crate::{Errno, FILE_SIZE_MAX, WriteFlags};

/// Longest unwritten extent, in blocks (128 GiB).
const UNWRITTEN_BLOCKS_MAX: u64 = 1 << 25;

/// Extents that one step of a seek looks at.
const SEEK_BATCH: usize = 64;

/// Blocks that one step of a preallocation reserves.
const STEP_BLOCKS: u64 = 1 << 16;

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
        let attr = inode.state.lock().attr;
        if !attr.is_file() {
            return Err(Errno::NOTSUP);
        }
        if mode & !libc::FALLOC_FL_KEEP_SIZE == 0 {
            crate::flags::check_grow(&attr)?;
        } else {
            crate::flags::check_change(&attr)?;
        }
        let end = offset.checked_add(len).filter(|&end| end <= FILE_SIZE_MAX);
        let end = end.ok_or(Errno::FBIG)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            0 => self.preallocate(inode, offset, end)?,
            libc::FALLOC_FL_PUNCH_HOLE if keep_size => self.punch(inode, offset, end)?,
            libc::FALLOC_FL_ZERO_RANGE => {
                self.punch(inode, offset, end)?;
                self.preallocate(inode, offset, end)?;
            }
            _ => return Err(Errno::NOTSUP),
        }
        let pass = self.gate.enter();
        if !keep_size {
            let mut state = inode.state.lock();
            state.attr.size = state.attr.size.max(end);
        }
        inode.touch_modified();
        self.mark_dirty(inode);
        drop(pass);
        self.end_change(inode)
    }

    /// Sets blocks aside for the holes of a range, in bounded steps.
    fn preallocate(&self, inode: &Arc<Inode>, offset: u64, end: u64) -> Result<(), Errno> {
        let (mut at, end) = (offset / PAGE, end.div_ceil(PAGE));
        while at < end {
            let upto = end.min(at + STEP_BLOCKS);
            self.balance_group()?;
            self.check_meta_room()?;
            self.reserve(upto - at)?;
            let used = {
                let _pass = self.gate.enter();
                let _range = inode.ranges.exclusive(at * PAGE, upto * PAGE);
                self.preallocate_step(inode, at, upto)
            };
            self.space
                .unreserve(upto - at - used.as_ref().copied().unwrap_or(0));
            used?;
            at = upto;
        }
        Ok(())
    }

    fn preallocate_step(&self, inode: &Arc<Inode>, from: u64, to: u64) -> Result<u64, Errno> {
        let _map = inode.map.write();
        let extents = self.extents(inode.ino);
        let mut holes = Vec::new();
        let mut at = from;
        for extent in extents.overlapping(from, to)? {
            if at < extent.start {
                holes.push((at, extent.start));
            }
            at = extent.end();
        }
        if at < to {
            holes.push((at, to));
        }
        let mut used = 0;
        for (mut start, end) in holes {
            let mut runs = Vec::new();
            self.space.allocate(end - start, &mut runs)?;
            used += end - start;
            for (mut block, mut left) in runs {
                while left > 0 {
                    let len = left.min(UNWRITTEN_BLOCKS_MAX);
                    extents.replace(&Extent {
                        start,
                        len,
                        block,
                        crcs: Vec::new(),
                    })?;
                    self.space.note_mapped(block, len);
                    (start, block, left) = (start + len, block + len, left - len);
                }
            }
        }
        inode.state.lock().attr.blocks += used * (PAGE / 512);
        Ok(used)
    }

    /// Makes a range read as zeros and frees its whole blocks.
    fn punch(&self, inode: &Arc<Inode>, offset: u64, end: u64) -> Result<(), Errno> {
        const EDGES: u64 = 2;
        self.balance_group()?;
        self.reserve(EDGES)?;
        let mut used = 0;
        let punched = {
            let _pass = self.gate.enter();
            let _range = inode
                .ranges
                .exclusive(offset / PAGE * PAGE, end.next_multiple_of(PAGE));
            self.punch_locked(inode, offset, end, &mut used)
        };
        self.space.unreserve(EDGES - used.min(EDGES));
        punched
    }

    fn punch_locked(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        end: u64,
        used: &mut u64,
    ) -> Result<(), Errno> {
        let size = inode.state.lock().attr.size;
        let mut zero = |from: u64, to: u64| {
            // Behind the end of file everything is zero already.
            if from >= to || from >= size {
                return Ok(());
            }
            self.zero(inode, from, to - from, used)
        };
        let (first, last) = (offset.next_multiple_of(PAGE), end / PAGE * PAGE);
        if first > last {
            return zero(offset, end);
        }
        zero(offset, first)?;
        zero(last, end)?;
        self.remove_blocks(inode, first / PAGE, last / PAGE)?;
        self.mark_dirty(inode);
        Ok(())
    }

    /// lseek(2) with SEEK_DATA or SEEK_HOLE, exact to the block.
    pub fn lseek(&self, file: &OpenFile, offset: u64, whence: i32) -> Result<u64, Errno> {
        let inode = &file.inode;
        let size = inode.state.lock().attr.size;
        if offset >= size {
            return Err(Errno::NXIO);
        }
        if let Some(space) = inode.space() {
            // Neither dirty pages nor those under writeback have extents yet: wait for both.
            space.flush(PageRange::ALL).map_err(errno)?;
        }
        let want_data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Err(Errno::INVAL),
        };
        let (mut at, end) = (offset / PAGE, size.div_ceil(PAGE));
        let place = |at: u64| (at * PAGE).max(offset);
        let _map = inode.map.read();
        let extents = self.extents(inode.ino);
        while at < end {
            let batch = extents.first_overlapping(at, end, SEEK_BATCH)?;
            for extent in &batch {
                let is_hole = extent.start > at || extent.unwritten();
                match (want_data, is_hole) {
                    (false, true) => return Ok(place(at)),
                    (true, _) if !extent.unwritten() => return Ok(place(extent.start.max(at))),
                    _ => at = extent.end(),
                }
            }
            if batch.len() < SEEK_BATCH {
                break;
            }
        }
        match (want_data, at < end) {
            (true, _) => Err(Errno::NXIO),
            (false, true) => Ok(place(at)),
            (false, false) => Ok(size),
        }
    }

    /// Copies up to `len` bytes from one file to another inside the file system. Returns how many.
    pub fn copy_file_range(
        &self,
        from: &Arc<OpenFile>,
        from_offset: u64,
        to: &Arc<OpenFile>,
        to_offset: u64,
        len: u64,
    ) -> Result<u64, Errno> {
        const STEP: u64 = 1 << 20;
        let mut copied = 0;
        while copied < len {
            let step = usize::try_from(STEP.min(len - copied)).unwrap_or(IO_BYTES_MAX);
            let reply = self.read_wait(from, from_offset + copied, step)?;
            if reply.is_empty() {
                break;
            }
            for slice in reply.slices() {
                let (sender, receiver) = std::sync::mpsc::sync_channel(1);
                let done = Box::new(move |result| sender.send(result).unwrap_or_default());
                let at = to_offset + copied;
                self.write(to, at, slice, false, WriteFlags::default(), done);
                match receiver.recv().unwrap_or(Err(Errno::IO)) {
                    Ok(count) => copied += u64::from(count),
                    Err(_) if copied > 0 => return Ok(copied),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(copied)
    }

    /// A read that waits.
    pub fn read_wait(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        len: usize,
    ) -> Result<ReadReply, Errno> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let done = Box::new(move |result| sender.send(result).unwrap_or_default());
        self.read(file, offset, len, false, done);
        receiver.recv().unwrap_or(Err(Errno::IO))
    }
}
