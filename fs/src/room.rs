//! Room on the volume: reserving blocks for data, room for metadata, and what statfs shows.
//!
//! New blocks of files are reserved until the volume is full. Rewriting pages that have a block
//! may go on after that, from the float (see [`crate::alloc`]): it is given back by writing the
//! pages back, or by a commit. So what was preallocated can be written on a full volume, and what
//! has data can be overwritten there.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use braidfs_blockdev::BLOCK_SIZE;
use braidfs_cache::{PageRange, SpaceClass};

use crate::alloc::Room;
use crate::commit::GROUP_BYTES_MAX;
use crate::file::may_write;
use crate::filesystem::FileSystem;
use crate::inode::Inode;
use crate::{Errno, OpenFile, StatFs};

/// Metadata room that only deletions may use; half of it is left to rewriting, too.
const META_ROOM_MIN_BYTES: u64 = 1 << 20;

/// Memory of an inode's record in a group, and of what one dirty page adds to it, in bytes.
const INODE_RECORD_BYTES: u64 = 256;
const PAGE_RECORD_BYTES: u64 = 128;

/// Bytes of pages that a commit writes for one changed record in a large tree: its leaf, and a
/// share of the branches above and of a split.
const TOUCHED_BYTES: u64 = 8 << 10;

/// For statfs: an empty file costs a few hundred bytes of metadata.
const INODES_PER_BLOCK: u64 = 8;

/// How often a reservation is tried, with a write-back or a commit before each but the first:
/// others may take what came free.
const TRIES_MAX: u32 = 8;

/// After how many commits the room of what was deleted can be used again at the latest.
const SETTLE_COMMITS: u32 = 2;

/// How long a file whose cached write found no room is not tried again.
const NO_ROOM: Duration = Duration::from_secs(1);

impl FileSystem {
    /// Sets blocks aside for data, after a commit if that may free some. Call it without a pass
    /// and without locks.
    pub(crate) fn reserve(&self, blocks: u64, room: Room) -> Result<(), Errno> {
        for attempt in 0..TRIES_MAX {
            match self.space.reserve(blocks, room) {
                Err(Errno::NOSPC) => {
                    if !self.make_room(attempt)? {
                        break;
                    }
                }
                done => return done,
            }
        }
        self.space.reserve(blocks, room)
    }

    /// Sets a block aside for each page that is about to be dirtied; the pages may be fewer than
    /// asked for when the volume is full. Gives how many, and what they were reserved as: for
    /// [`Room::Rewrite`] the caller looks with [`FileSystem::is_mapped`] again once it has the
    /// range locked. Call it without a pass and without locks.
    pub(crate) fn reserve_pages(
        &self,
        inode: &Inode,
        pages: PageRange,
        short: bool,
    ) -> Result<(u64, Room), Errno> {
        let part = |count: u64| PageRange {
            start: pages.start,
            end: pages.start + count,
        };
        let mut gained = true;
        for attempt in 0..TRIES_MAX {
            if let Some(room) = self.try_reserve(inode, pages)? {
                return Ok((pages.count(), room));
            }
            // All of it, as long as there may be more to be had.
            if short && (attempt > 0 || !gained) {
                let mut count = pages.count() / 2;
                while count > 0 {
                    if let Some(room) = self.try_reserve(inode, part(count))? {
                        return Ok((count, room));
                    }
                    count /= 2;
                }
            }
            if !gained {
                break;
            }
            gained = self.make_room(attempt)?;
        }
        Err(Errno::NOSPC)
    }

    fn try_reserve(&self, inode: &Inode, pages: PageRange) -> Result<Option<Room>, Errno> {
        match self.space.reserve(pages.count(), Room::Growth) {
            Err(Errno::NOSPC) => {}
            done => return done.map(|()| Some(Room::Growth)),
        }
        if !self.is_mapped(inode, pages)? {
            return Ok(None);
        }
        match self.space.reserve(pages.count(), Room::Rewrite) {
            Err(Errno::NOSPC) => Ok(None),
            done => done.map(|()| Some(Room::Rewrite)),
        }
    }

    /// `NOSPC` if the holes among file blocks `from..to` are more than the volume has room for.
    pub(crate) fn check_growth(&self, inode: &Inode, from: u64, to: u64) -> Result<(), Errno> {
        for attempt in 0..TRIES_MAX {
            let holes = {
                let _map = inode.map.read();
                self.extents(inode.ino).holes(from, to)?
            };
            if holes <= self.space.available() {
                return Ok(());
            }
            if !self.make_room(attempt)? {
                break;
            }
        }
        Err(Errno::NOSPC)
    }

    /// Tries to get free blocks; false if there is nothing to be got.
    fn make_room(&self, attempt: u32) -> Result<bool, Errno> {
        if attempt == 0 && self.cache.dirty_bytes() > 0 {
            // Pages with a block of their own give their reservation back when they are written.
            self.cache.flush_all(SpaceClass::Data);
            return Ok(true);
        }
        self.reclaim_all();
        if self.space.pending() == 0 && self.space.open_is_empty() {
            return Ok(false);
        }
        self.commit_now()?;
        Ok(true)
    }

    /// Whether each of the pages has a block.
    pub(crate) fn is_mapped(&self, inode: &Inode, pages: PageRange) -> Result<bool, Errno> {
        let _map = inode.map.read();
        let holes = self.extents(inode.ino).holes(pages.start, pages.end)?;
        Ok(holes == 0)
    }

    /// `NOSPC` when metadata has no room to grow, so that what is left serves deletion. A commit,
    /// after which the open group needs nothing, is tried first. Call it without a pass.
    pub(crate) fn check_meta_room(&self) -> Result<(), Errno> {
        self.check_meta_room_for(META_ROOM_MIN_BYTES)
    }

    /// As [`FileSystem::check_meta_room`], for a change of pages; those that have a block may use
    /// some of the room that is kept for deletion.
    pub(crate) fn check_meta_room_of(&self, inode: &Inode, pages: PageRange) -> Result<(), Errno> {
        match self.check_meta_room() {
            Err(Errno::NOSPC) if self.is_mapped(inode, pages)? => {
                self.check_meta_room_for(META_ROOM_MIN_BYTES / 2)
            }
            done => done,
        }
    }

    fn check_meta_room_for(&self, least_bytes: u64) -> Result<(), Errno> {
        if self.has_ample_meta_room() || self.has_meta_room(least_bytes)? {
            return Ok(());
        }
        self.reclaim_all();
        if self.is_changed() || self.store.has_journaled() {
            self.commit_now()?;
            if self.has_meta_room(least_bytes)? {
                return Ok(());
            }
        }
        // redb gives back what a commit freed with one of the next.
        let deletions = self.store.deletions();
        if self.settled_deletions.load(Ordering::SeqCst) != deletions {
            for _ in 0..SETTLE_COMMITS {
                self.commit_settings()?;
                if self.has_meta_room(least_bytes)? {
                    return Ok(());
                }
            }
            self.settled_deletions.store(deletions, Ordering::SeqCst);
        }
        Err(Errno::NOSPC)
    }

    /// Commits when the open group would soon need more room than metadata has. Every change asks
    /// here, deletions too, so the group never gets there.
    pub(crate) fn balance_meta_room(&self) -> Result<(), Errno> {
        let has_more = || self.is_changed() || self.store.has_journaled();
        if !self.has_ample_meta_room() && has_more() && !self.has_meta_room(0)? {
            self.commit_now()?;
        }
        Ok(())
    }

    /// Whether there is room for the largest group, without looking closer.
    fn has_ample_meta_room(&self) -> bool {
        let room = self.meta.room_bytes(self.volume.meta_growth_bytes());
        let pages = self.options.cache_bytes / BLOCK_SIZE;
        let most = 2 * (GROUP_BYTES_MAX as u64 + pages * PAGE_RECORD_BYTES);
        room >= META_ROOM_MIN_BYTES + 2 * most + self.meta.capacity_bytes()
    }

    /// Whether metadata has room for all changes that are not durable yet, and `least_bytes` more.
    fn has_meta_room(&self, least_bytes: u64) -> Result<bool, Errno> {
        let wanted = least_bytes + self.meta_need_bytes();
        let growth = self.volume.meta_growth_bytes();
        if self.meta.room_bytes(growth) >= wanted {
            return Ok(true);
        }
        // The end of the file is near: look how much is free inside it.
        let used = self
            .store
            .used_bytes(self.meta.storage())
            .map_err(|error| {
                log::error!("metadata: counting its pages: {error}");
                Errno::IO
            })?;
        let free = self.meta.reachable_bytes(growth).saturating_sub(used);
        Ok(free >= wanted)
    }

    /// At most how many bytes of new pages a commit of everything that is not durable yet takes:
    /// redb writes a page that it touches to another place, and gives the old one back only after
    /// the next commit. Inodes and the extents of dirty pages become records at the commit.
    fn meta_need_bytes(&self) -> u64 {
        let unwritten = self.store.unwritten();
        let inodes = self.dirty.lock().len() as u64;
        let pages = (self.cache.dirty_bytes() + self.cache.writeback_bytes()) / BLOCK_SIZE;
        let bytes = unwritten.bytes + inodes * INODE_RECORD_BYTES + pages * PAGE_RECORD_BYTES;
        let touched = (unwritten.records + inodes + pages) * TOUCHED_BYTES;
        2 * bytes + touched.min(self.meta.capacity_bytes())
    }

    /// For how many late access times the next commit has room, beside all else that is not durable
    /// yet and the room that is kept. Call it without a pass.
    pub(crate) fn room_for_atimes(&self) -> usize {
        const EACH_BYTES: u64 = 2 * INODE_RECORD_BYTES + TOUCHED_BYTES;
        let late = self.late_atimes_count();
        if late == 0 || self.has_ample_meta_room() {
            return usize::MAX;
        }
        let kept = META_ROOM_MIN_BYTES + self.meta_need_bytes();
        let count = |free: u64| {
            let count = free.saturating_sub(kept) / EACH_BYTES;
            usize::try_from(count).unwrap_or(usize::MAX)
        };
        let growth = self.volume.meta_growth_bytes();
        let at_end = count(self.meta.room_bytes(growth));
        if at_end >= late {
            return at_end;
        }
        match self.store.used_bytes(self.meta.storage()) {
            Ok(used) => count(self.meta.reachable_bytes(growth).saturating_sub(used)),
            // The commit itself will say so.
            Err(_) => 0,
        }
    }

    /// A write from a cache in front of the core found no room: whoever filled that cache was told
    /// that it was written.
    pub fn note_no_room(&self, file: &OpenFile) {
        *file.inode.no_room.lock() = Some((Instant::now(), self.statfs().bfree));
    }

    /// `NOSPC` for a moment after that, unless blocks have come free: a cache in front asks before
    /// it takes more for this file.
    /// Readers at the end of the file ask in the same way, so who cannot write is never refused.
    pub fn check_room(&self, file: &OpenFile) -> Result<(), Errno> {
        if !may_write(file.flags()) {
            return Ok(());
        }
        let mut no_room = file.inode.no_room.lock();
        match *no_room {
            Some((since, free)) if since.elapsed() < NO_ROOM && self.statfs().bfree <= free => {
                Err(Errno::NOSPC)
            }
            _ => {
                *no_room = None;
                Ok(())
            }
        }
    }

    /// Size and free space.
    pub fn statfs(&self) -> StatFs {
        let space = self.space.stats();
        let bfree = (space.free_blocks + space.unallocated_blocks)
            .saturating_sub(space.reserved_blocks + space.float_blocks)
            + space.pending_blocks
            + self.reclaimer.doomed_blocks();
        let blocks = space.chunk_blocks + space.unallocated_blocks;
        let used = self.inode_count.load(Ordering::Relaxed);
        let ffree = bfree.saturating_mul(INODES_PER_BLOCK);
        StatFs {
            blocks: blocks.saturating_sub(space.float_blocks).max(bfree),
            bfree,
            bavail: bfree,
            files: used + ffree,
            ffree,
            bsize: 4096,
            namelen: 255,
        }
    }
}
