//! copy_file_range(2).
//!
//! Where both sides lie alike in their pages, the source is read into private pages, and these
//! become the destination's dirty pages: a byte is moved once, by a device, or out of the cache if
//! the source is cached. What is a hole in the source becomes one in the destination. The rest,
//! edges and sides that lie differently, is written from the source's cached pages.
//!
//! Each step takes its locks for itself: the source's while it is read, then the destination's.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use braidfs_cache::{FrameVec, PageRange};

use crate::alloc::Room;
use crate::file::{OpenFile, ReadReply, errno};
use crate::file_ranges::{Clear, Span};
use crate::filesystem::FileSystem;
use crate::inode::PAGE;
use crate::{Errno, FILE_SIZE_MAX, WriteFlags};

/// Bytes that one step copies.
const STEP_BYTES: u64 = 1 << 20;

/// A file, and where in it.
struct Side<'a> {
    file: &'a Arc<OpenFile>,
    offset: u64,
}

impl FileSystem {
    /// Copies up to `len` bytes from one file to another inside the file system. Returns how many:
    /// fewer at the end of the source, or when the volume is full.
    pub fn copy_file_range(
        &self,
        from: &Arc<OpenFile>,
        from_offset: u64,
        to: &Arc<OpenFile>,
        to_offset: u64,
        len: u64,
    ) -> Result<u64, Errno> {
        self.check_writable()?;
        let source = from.inode.state.lock().attr;
        let target = to.inode.state.lock().attr;
        if source.is_dir() || target.is_dir() {
            return Err(Errno::ISDIR);
        }
        if !source.is_file() || !target.is_file() {
            return Err(Errno::INVAL);
        }
        crate::flags::check_grow(&target)?;
        let len = len.min(source.size.saturating_sub(from_offset));
        if len == 0 {
            return Ok(0);
        }
        if to_offset >= FILE_SIZE_MAX {
            return Err(Errno::FBIG);
        }
        let len = len.min(FILE_SIZE_MAX - to_offset);
        let apart = from_offset + len <= to_offset || to_offset + len <= from_offset;
        if Arc::ptr_eq(&from.inode, &to.inode) && !apart {
            return Err(Errno::INVAL);
        }
        self.touch_accessed(&from.inode, &source);
        let mut copied = 0;
        while copied < len {
            let side = |file, offset: u64| Side {
                file,
                offset: offset + copied,
            };
            let step = self.copy_step(&side(from, from_offset), &side(to, to_offset), len - copied);
            match step {
                Ok(0) => break,
                Ok(count) => copied += count,
                Err(_) if copied > 0 => break,
                Err(error) => return Err(error),
            }
        }
        if copied > 0 && (self.options.sync || to.is_synchronous() || to.inode.is_sync()) {
            self.fsync(to, true)?;
        }
        Ok(copied)
    }

    /// Copies a part from the start of the range on; 0 if the source ends there now.
    fn copy_step(&self, from: &Side<'_>, to: &Side<'_>, len: u64) -> Result<u64, Errno> {
        let source = &from.file.inode;
        let (first, end) = (from.offset / PAGE, (from.offset + len).div_ceil(PAGE));
        let data = self.next_data(source, first, end)?.unwrap_or(end);
        if data > first {
            let len = len.min(data * PAGE - from.offset);
            if from.offset + len > source.state.lock().attr.size {
                return Ok(0);
            }
            let span = Span {
                offset: to.offset,
                end: to.offset + len,
                size_min: to.offset + len,
            };
            self.clear(&to.file.inode, span, Clear::Punch)?;
            return Ok(len);
        }
        let hole = self.next_hole(source, first, end.min(first + STEP_BYTES / PAGE + 1))?;
        let len = len.min(hole * PAGE - from.offset).min(STEP_BYTES);
        let within = from.offset % PAGE;
        if within != to.offset % PAGE {
            return self.copy_bytes(from, to, len);
        }
        if within > 0 || len < PAGE {
            return self.copy_bytes(from, to, len.min(PAGE - within));
        }
        match self.copy_pages(from, to, len / PAGE) {
            // Too much for a small cache, or for what a full volume keeps for rewriting.
            Err(Errno::NOMEM | Errno::NOSPC) => self.copy_bytes(from, to, len.min(PAGE)),
            done => done,
        }
    }

    /// Copies through the cache.
    fn copy_bytes(&self, from: &Side<'_>, to: &Side<'_>, len: u64) -> Result<u64, Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let reply = self.read_wait(from.file, from.offset, len)?;
        let mut copied = 0;
        for slice in reply.slices() {
            let flags = WriteFlags::default();
            let count = match self.write_cached(to.file, to.offset + copied, slice.into(), flags) {
                Ok(count) => u64::from(count),
                Err(_) if copied > 0 => break,
                Err(error) => return Err(error),
            };
            copied += count;
            if count < slice.len() as u64 {
                break;
            }
        }
        Ok(copied)
    }

    /// Copies whole pages, of which the source has all.
    fn copy_pages(&self, from: &Side<'_>, to: &Side<'_>, count: u64) -> Result<u64, Errno> {
        let inode = &to.file.inode;
        let first = to.offset / PAGE;
        let wanted = PageRange {
            start: first,
            end: first + count,
        };
        self.cache.balance_dirty();
        self.balance_group()?;
        self.check_meta_room_of(inode, wanted)?;
        let Some(frames) = self.read_private(from, first, count)? else {
            return Ok(0);
        };
        let (reserved, room) = self.reserve_pages(inode, wanted, false)?;
        let pass = self.gate.enter();
        let range = inode.ranges.exclusive(first * PAGE, wanted.end * PAGE);
        if room == Room::Rewrite && self.is_mapped(inode, wanted) != Ok(true) {
            self.space.unreserve(reserved);
            return Err(Errno::NOSPC);
        }
        self.discard_pages(inode, wanted.start, wanted.end);
        let (outcome, error) = match self.pages(inode).adopt(first, frames) {
            Ok(outcome) => (outcome, None),
            Err((error, outcome)) => (outcome, Some(error)),
        };
        self.space.unreserve(reserved - outcome.newly_dirty_pages);
        if let Some(error) = error {
            return Err(errno(error));
        }
        self.note_written(inode, wanted.end * PAGE, WriteFlags::default());
        drop((range, pass));
        Ok(count * PAGE)
    }

    /// Reads whole pages into private ones that can become the pages from `page` on of another
    /// file; `None` if the source has become shorter.
    fn read_private(
        &self,
        from: &Side<'_>,
        page: u64,
        count: u64,
    ) -> Result<Option<FrameVec>, Errno> {
        let bytes = usize::try_from(count * PAGE).map_err(|_| Errno::INVAL)?;
        let frames = self.cache.alloc_private_at(page, bytes);
        let mut frames = frames.ok_or(Errno::NOMEM)?;
        let source = &from.file.inode;
        let first = from.offset / PAGE;
        let pages = PageRange {
            start: first,
            end: first + count,
        };
        if !self.pages(source).has_pages(pages) {
            let (sender, receiver) = sync_channel(1);
            let done = Box::new(move |result| sender.send(result).unwrap_or_default());
            self.read_direct(source, bytes, pages, frames, done);
            let reply: ReadReply = receiver.recv().unwrap_or(Err(Errno::IO))?;
            return Ok(reply.into_private());
        }
        let reply = self.read_wait(from.file, from.offset, bytes)?;
        if reply.len() < bytes {
            return Ok(None);
        }
        let mut slices = reply.slices();
        let mut rest: &[u8] = &[];
        for mut out in frames.slices_mut() {
            while !out.is_empty() {
                if rest.is_empty() {
                    rest = slices.next().expect("as long as was asked for");
                }
                let take = rest.len().min(out.len());
                let (now, later) = std::mem::take(&mut out).split_at_mut(take);
                now.copy_from_slice(&rest[..take]);
                (rest, out) = (&rest[take..], later);
            }
        }
        Ok(Some(frames))
    }

    /// A read that waits.
    pub fn read_wait(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        len: usize,
    ) -> Result<ReadReply, Errno> {
        let (sender, receiver) = sync_channel(1);
        let done = Box::new(move |result| sender.send(result).unwrap_or_default());
        self.read(file, offset, len, false, done);
        receiver.recv().unwrap_or(Err(Errno::IO))
    }
}
