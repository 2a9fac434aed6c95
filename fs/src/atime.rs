//! Access times: when reading changes one, and how it gets to the devices.
//!
//! An access time alone is no reason for a commit (ext4's `lazytime`): the inode waits in a list
//! of its own, which the next commit takes along, whatever its reason: another change, a sync, an
//! unmount, or the list having grown long. An inode on the list stays in memory. Access times need
//! no room that anything else needs: a commit takes along as many as metadata has room for.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::filesystem::FileSystem;
use crate::inode::Inode;
use crate::{AtimeMode, Attr, FLAG_NOATIME, OpenFile, Timestamp};

/// With `relatime`, an access time is changed once in this time.
const RELATIME_SECS: i64 = 24 * 60 * 60;

/// When so many inodes wait, or a multiple of it, a commit is asked for.
const LATE_MAX: usize = 4096;

/// Which reads change an access time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessTime {
    /// None, for now.
    NotYet,
    /// The next one.
    NextRead,
    /// Each.
    EachRead,
}

impl FileSystem {
    /// Which reads of an open file will change its access time.
    pub fn access_time_due(&self, file: &OpenFile) -> AccessTime {
        let attr = file.inode.state.lock().attr;
        self.access_time_due_at(&attr, Timestamp::now())
    }

    fn access_time_due_at(&self, attr: &Attr, now: Timestamp) -> AccessTime {
        let options = &self.options;
        if self.is_read_only()
            || options.atime == AtimeMode::Noatime
            || (options.nodiratime && attr.is_dir())
            || attr.flags & FLAG_NOATIME != 0
        {
            return AccessTime::NotYet;
        }
        if options.atime == AtimeMode::Strictatime {
            return AccessTime::EachRead;
        }
        let stale = attr.atime <= attr.mtime
            || attr.atime <= attr.ctime
            || now.secs.saturating_sub(attr.atime.secs) >= RELATIME_SECS;
        if stale {
            AccessTime::NextRead
        } else {
            AccessTime::NotYet
        }
    }

    /// An inode was read: its access time changes as the mount's options say. `attr` is what it
    /// was just before.
    pub(crate) fn touch_accessed(&self, inode: &Arc<Inode>, attr: &Attr) {
        let now = Timestamp::now();
        if self.access_time_due_at(attr, now) == AccessTime::NotYet || attr.atime == now {
            return;
        }
        inode.state.lock().attr.atime = now;
        if inode.atime_late.swap(true, Ordering::SeqCst) {
            return;
        }
        let count = {
            let mut late = self.late_atimes.lock();
            late.push(Arc::clone(inode));
            late.len()
        };
        if count.is_multiple_of(LATE_MAX) {
            self.committer.nudge();
        }
    }

    /// How many inodes have an access time that is not in their record.
    pub(crate) fn late_atimes_count(&self) -> usize {
        self.late_atimes.lock().len()
    }

    /// Puts at most `room` of them on the list of dirty inodes. The others wait for a commit with
    /// more room; of very many, some are let go: their access times last as long as their inodes
    /// stay in memory. The gate is closed.
    pub(crate) fn take_late_atimes(&self, room: usize) {
        let mut late = self.late_atimes.lock();
        let taken = room.min(late.len());
        let rest = late.split_off(taken);
        let taken = std::mem::replace(&mut *late, rest);
        let kept = late.len().min(LATE_MAX);
        let dropped = late.split_off(kept);
        drop(late);
        for inode in &dropped {
            inode.atime_late.store(false, Ordering::SeqCst);
        }
        for inode in taken {
            inode.atime_late.store(false, Ordering::SeqCst);
            self.mark_dirty(&inode);
        }
    }
}
