//! lseek(2) with SEEK_DATA and SEEK_HOLE, exact to the block, without writing anything back.
//!
//! Data is what has a written extent, and every page that is dirty or on its way to the devices.
//! A page gets its extent before it becomes clean, so looking at the pages first and at the map
//! afterwards misses none.

use braidfs_cache::PageRange;

use crate::Errno;
use crate::file::OpenFile;
use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};

/// Extents that one step of a search looks at.
const BATCH: usize = 64;

impl FileSystem {
    /// lseek(2) with SEEK_DATA or SEEK_HOLE.
    pub fn lseek(&self, file: &OpenFile, offset: u64, whence: i32) -> Result<u64, Errno> {
        let inode = &file.inode;
        if whence != libc::SEEK_DATA && whence != libc::SEEK_HOLE {
            return Err(Errno::INVAL);
        }
        let size = inode.state.lock().attr.size;
        if offset >= size {
            return Err(Errno::NXIO);
        }
        let (from, end) = (offset / PAGE, size.div_ceil(PAGE));
        let found = if whence == libc::SEEK_DATA {
            self.next_data(inode, from, end)?
        } else {
            Some(self.next_hole(inode, from, end)?)
        };
        let found = found.ok_or(Errno::NXIO)?;
        Ok((found * PAGE).max(offset).min(size))
    }

    fn unclean(inode: &Inode, from: u64, end: u64) -> Option<PageRange> {
        let runs = inode.space()?.unclean_runs(PageRange::new(from, end)?, 1)?;
        runs.into_iter().next()
    }

    /// The first file block with data among `from..end`.
    pub(crate) fn next_data(
        &self,
        inode: &Inode,
        from: u64,
        end: u64,
    ) -> Result<Option<u64>, Errno> {
        let mut at = from;
        let mut unclean = Self::unclean(inode, from, end).map_or(end, |run| run.start);
        loop {
            let batch = {
                let _map = inode.map.read();
                let extents = self.extents(inode.ino);
                extents.first_overlapping(at, unclean, BATCH)?
            };
            if let Some(data) = batch.iter().find(|extent| !extent.unwritten()) {
                return Ok(Some(data.start.max(at)));
            }
            match batch.last() {
                Some(extent) if batch.len() == BATCH => at = extent.end(),
                _ => break,
            }
            // Pages that were holes and clean before may be dirty now, and are no hole any more.
            unclean = Self::unclean(inode, at, end).map_or(end, |run| run.start);
        }
        Ok(Some(unclean).filter(|&page| page < end))
    }

    /// The first file block without data among `from..end`; `end` if there is none.
    pub(crate) fn next_hole(&self, inode: &Inode, from: u64, end: u64) -> Result<u64, Errno> {
        let mut at = from;
        while at < end {
            let before = at;
            let unclean = Self::unclean(inode, at, end);
            let pass_unclean = |at: u64| match unclean {
                Some(run) if run.contains(at) => run.end,
                _ => at,
            };
            at = pass_unclean(at);
            let batch = {
                let _map = inode.map.read();
                let extents = self.extents(inode.ino);
                extents.first_overlapping(at, end, BATCH)?
            };
            for extent in &batch {
                if extent.start > at || extent.unwritten() {
                    break;
                }
                at = pass_unclean(extent.end());
            }
            if at == before {
                break;
            }
        }
        Ok(at.min(end))
    }
}
