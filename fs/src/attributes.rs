//! Attributes: stat, chmod, chown, utimes and truncation.
//!
//! A shrinking truncation of a huge file goes down in bounded steps, each a whole truncation of
//! its own, with a row in the orphan table that names the goal: a crash in between leaves a file
//! of a size in between, and the next mount completes it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::alloc::Room;
use crate::filesystem::FileSystem;
use crate::flags;
use crate::inode::{Inode, PAGE};
use crate::meta::records::{Orphan, ino_key};
use crate::meta::store::Table;
use crate::{Attr, Cred, Errno, FILE_SIZE_MAX, Ino, SetAttr, SetTime, Timestamp};

/// Extents that one transaction group removes at the most in one step.
const EXTENTS_PER_STEP: usize = 4096;

/// The mode after a write by somebody who may not keep set-id bits.
pub(crate) fn without_set_ids(mode: u32) -> u32 {
    let mode = mode & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        mode & !libc::S_ISGID
    } else {
        mode
    }
}

fn time_of(set: SetTime, now: Timestamp) -> Timestamp {
    match set {
        SetTime::Now => now,
        SetTime::At(time) => time,
    }
}

impl FileSystem {
    /// Attributes of an inode.
    pub fn getattr(&self, ino: Ino) -> Result<Attr, Errno> {
        Ok(self.inode(ino)?.attr())
    }

    /// Changes attributes; returns them as they are then.
    pub fn setattr(&self, ino: Ino, set: &SetAttr, _cred: &Cred) -> Result<Attr, Errno> {
        self.check_writable()?;
        let inode = self.inode(ino)?;
        flags::check_setattr(&inode.state.lock().attr, set)?;
        match set.size {
            Some(size) => self.truncate(&inode, size)?,
            None => self.balance_group()?,
        }
        let pass = self.gate.enter();
        // Mode and access list change together.
        let map = set.mode.map(|_| inode.map.write());
        let is_dir = {
            let mut state = inode.state.lock();
            let attr = &mut state.attr;
            let now = Timestamp::now();
            // On a directory these bits are no privileges.
            if set.kill_suidgid && !attr.is_dir() {
                attr.mode = without_set_ids(attr.mode);
            }
            if let Some(mode) = set.mode {
                attr.mode = attr.mode & libc::S_IFMT | mode & !libc::S_IFMT;
            }
            if let Some(uid) = set.uid {
                attr.uid = uid;
            }
            if let Some(gid) = set.gid {
                attr.gid = gid;
            }
            if let Some(time) = set.atime {
                attr.atime = time_of(time, now);
            }
            if let Some(time) = set.mtime {
                attr.mtime = time_of(time, now);
            }
            // The kernel's may be older than a change that it does not know of.
            let least = *inode.flags_set.lock();
            attr.ctime = set.ctime.map_or(now, |ctime| ctime.max(least));
            attr.is_dir()
        };
        if set.mode.is_some() {
            let mode = inode.state.lock().attr.mode;
            self.acl_follow_mode(ino, mode)?;
        }
        drop(map);
        let owner = set.uid.is_some() || set.gid.is_some();
        if !is_dir && (owner || set.size.is_some() || set.kill_suidgid) {
            self.drop_capabilities(&inode);
        }
        self.mark_dirty(&inode);
        drop(pass);
        self.end_change(&inode)?;
        Ok(inode.attr())
    }

    /// Sets the size of a file.
    pub(crate) fn truncate(&self, inode: &Arc<Inode>, size: u64) -> Result<(), Errno> {
        let attr = inode.state.lock().attr;
        if attr.is_dir() {
            return Err(Errno::ISDIR);
        }
        if !attr.is_file() {
            return Err(Errno::INVAL);
        }
        if size > FILE_SIZE_MAX {
            return Err(Errno::FBIG);
        }
        let mut stepped = false;
        loop {
            // The tail of the last page that stays is zeroed, which may need a block: if the page
            // has none yet, then it is a hole, and zero, or dirty, with a block reserved.
            let tail = u64::from(!size.is_multiple_of(PAGE));
            self.balance_group()?;
            self.reserve(tail, Room::Rewrite)?;
            let pass = self.gate.enter();
            let now = inode.state.lock().attr.size;
            let step = if size <= now {
                self.step_size(inode, size)
            } else {
                Ok(size)
            };
            let mut tail_used = 0;
            let done = step.and_then(|step| {
                if step > size && !stepped {
                    self.note_truncation(inode, Some(size));
                    stepped = true;
                }
                if step > size && step > now {
                    // Only what is set aside behind the end of file, for now.
                    let _range = inode.ranges.exclusive(now / PAGE * PAGE, u64::MAX);
                    self.remove_blocks(inode, step / PAGE, u64::MAX >> 12)?;
                    self.mark_dirty(inode);
                    return Ok(false);
                }
                self.set_size(inode, step, &mut tail_used)?;
                if step == size && stepped {
                    self.note_truncation(inode, None);
                }
                Ok(step == size)
            });
            drop(pass);
            self.space.unreserve(tail - tail_used.min(tail));
            if done? {
                return Ok(());
            }
        }
    }

    /// Sets or removes the row that names the goal of a truncation in steps. An inode without a
    /// name has another row there, which says that it is to be deleted, and which stays (until it
    /// gets its first name: then that row takes the goal).
    fn note_truncation(&self, inode: &Inode, goal: Option<u64>) {
        let state = inode.state.lock();
        inode
            .truncating
            .store(goal.unwrap_or(u64::MAX), Ordering::SeqCst);
        if state.attr.nlink == 0 {
            return;
        }
        let key = ino_key(inode.ino);
        match goal {
            Some(size) => {
                let row = Orphan::Truncate(size).encode();
                self.store.put(Table::Orphans, &key, &row);
            }
            None => self.store.delete(Table::Orphans, &key),
        }
    }

    /// The size that the next step of a truncation to `size` may go down to.
    fn step_size(&self, inode: &Inode, size: u64) -> Result<u64, Errno> {
        let goal = size.div_ceil(PAGE);
        let mut at = u64::MAX >> 12;
        let _map = inode.map.read();
        for _ in 0..EXTENTS_PER_STEP {
            match self.extents(inode.ino).last_at_most(at)? {
                Some(extent) if extent.start > goal => at = extent.start - 1,
                _ => return Ok(size),
            }
        }
        Ok((at + 1) * PAGE)
    }

    /// Sets the size in one go. Counts in `used` how many blocks of the caller's reservation dirty
    /// pages now hold. The caller holds a pass.
    fn set_size(&self, inode: &Arc<Inode>, size: u64, used: &mut u64) -> Result<(), Errno> {
        let _range = inode.ranges.exclusive(size / PAGE * PAGE, u64::MAX);
        let old = inode.state.lock().attr.size;
        if size < old {
            if !size.is_multiple_of(PAGE) {
                self.zero(inode, size, PAGE - size % PAGE, used)?;
            }
            inode.state.lock().attr.size = size;
        }
        if size <= old {
            // Also what is set aside behind the end.
            self.remove_blocks(inode, size.div_ceil(PAGE), u64::MAX >> 12)?;
        }
        {
            let mut state = inode.state.lock();
            let now = Timestamp::now();
            state.attr.size = size;
            state.attr.mtime = now;
            state.attr.ctime = now;
        }
        self.mark_dirty(inode);
        Ok(())
    }

    /// Sets bytes to zero in the cache. Counts in `used` the pages that became dirty.
    pub(crate) fn zero(
        &self,
        inode: &Arc<Inode>,
        offset: u64,
        len: u64,
        used: &mut u64,
    ) -> Result<(), Errno> {
        let (outcome, error) = match self.pages(inode).zero(offset, len) {
            Ok(outcome) => (outcome, None),
            Err((error, outcome)) => (outcome, Some(error)),
        };
        *used += outcome.newly_dirty_pages;
        error.map_or(Ok(()), |error| Err(crate::file::errno(error)))
    }

    /// Unmaps file blocks `from..to` and drops their pages. The caller holds a pass and the range
    /// exclusively.
    pub(crate) fn remove_blocks(
        &self,
        inode: &Arc<Inode>,
        from: u64,
        to: u64,
    ) -> Result<(), Errno> {
        if from >= to {
            return Ok(());
        }
        self.discard_pages(inode, from, to);
        {
            let _map = inode.map.write();
            let removed = self.extents(inode.ino).remove(from, to)?;
            let mut state = inode.state.lock();
            state.attr.blocks = state.attr.blocks.saturating_sub(removed * (PAGE / 512));
        }
        // A readahead may have fetched pages through the old map.
        self.discard_pages(inode, from, to);
        Ok(())
    }

    /// Drops the pages of file blocks `from..to` and gives their reservation back.
    pub(crate) fn discard_pages(&self, inode: &Inode, from: u64, to: u64) {
        if let Some(space) = inode.space()
            && let Some(pages) = braidfs_cache::PageRange::new(from, to)
        {
            self.space.unreserve(space.discard(pages));
        }
    }
}
