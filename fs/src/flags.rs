//! Inode flags (chattr, lsattr): what may be set, who may set it, what it forbids.
//!
//! Nothing may change an *immutable* inode; an *append-only* one may grow at its end and, if it is
//! a directory, get entries. Both hold for everybody, root included, until the flag is taken away.
//! Descriptors that were open before lose the right to write to an immutable file, too; one that
//! was open before a file became append-only keeps writing anywhere, as on ext4.

use std::sync::Arc;

use crate::filesystem::FileSystem;
use crate::inode::Inode;
use crate::{Attr, Cred, Errno, Ino, SetAttr, SetTime, Timestamp};

/// Every write is durable before it returns (chattr S).
pub const FLAG_SYNC: u32 = 0x0000_0008;
/// Nothing about the inode may change (chattr i).
pub const FLAG_IMMUTABLE: u32 = 0x0000_0010;
/// It may only grow (chattr a).
pub const FLAG_APPEND: u32 = 0x0000_0020;
/// Programs that make backups may leave it out (chattr d). braidfs keeps the bit, no more.
pub const FLAG_NODUMP: u32 = 0x0000_0040;
/// Reading does not change its access time (chattr A).
pub const FLAG_NOATIME: u32 = 0x0000_0080;
/// No tail packing (chattr t). braidfs never packs tails; it keeps the bit, no more.
pub const FLAG_NOTAIL: u32 = 0x0000_8000;
/// Changes of a directory's entries are durable before they return (chattr D).
pub const FLAG_DIRSYNC: u32 = 0x0001_0000;

/// All flags that an inode may have.
pub const FLAGS_KNOWN: u32 = FLAG_SYNC
    | FLAG_IMMUTABLE
    | FLAG_APPEND
    | FLAG_NODUMP
    | FLAG_NOATIME
    | FLAG_NOTAIL
    | FLAG_DIRSYNC;

/// Flags that only a privileged caller changes.
const PRIVILEGED: u32 = FLAG_IMMUTABLE | FLAG_APPEND;

/// Flags that a new inode takes from its directory.
const INHERITED: u32 = FLAG_SYNC | FLAG_NODUMP | FLAG_NOATIME | FLAG_NOTAIL | FLAG_DIRSYNC;

/// The flags that make sense for this type of inode.
pub(crate) fn flags_of_type(mode: u32) -> u32 {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FLAGS_KNOWN,
        libc::S_IFREG => FLAGS_KNOWN & !FLAG_DIRSYNC,
        _ => FLAG_NODUMP | FLAG_NOATIME,
    }
}

/// The flags of a new inode with `mode` in a directory with `dir_flags`.
pub(crate) fn inherited(dir_flags: u32, mode: u32) -> u32 {
    dir_flags & INHERITED & flags_of_type(mode)
}

fn refuse(attr: &Attr, flags: u32) -> Result<(), Errno> {
    if attr.flags & flags == 0 {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

/// May an entry be added to this directory? May bytes of this file be written?
pub(crate) fn check_grow(attr: &Attr) -> Result<(), Errno> {
    refuse(attr, FLAG_IMMUTABLE)
}

/// May it be linked, may its extended attributes change, may bytes inside it go?
pub(crate) fn check_change(attr: &Attr) -> Result<(), Errno> {
    refuse(attr, FLAG_IMMUTABLE | FLAG_APPEND)
}

/// May the entry of `inode` be taken out of `dir`?
pub(crate) fn check_removal(dir: &Inode, inode: &Inode) -> Result<(), Errno> {
    check_change(&dir.state.lock().attr)?;
    check_change(&inode.state.lock().attr)
}

/// May it be opened like this?
pub(crate) fn check_open(attr: &Attr, open_flags: i32) -> Result<(), Errno> {
    let writes = open_flags & libc::O_ACCMODE != libc::O_RDONLY;
    if writes || open_flags & libc::O_TRUNC != 0 {
        refuse(attr, FLAG_IMMUTABLE)?;
    }
    if writes && open_flags & libc::O_APPEND == 0 || open_flags & libc::O_TRUNC != 0 {
        refuse(attr, FLAG_APPEND)?;
    }
    Ok(())
}

/// May these attributes be set?
pub(crate) fn check_setattr(attr: &Attr, set: &SetAttr) -> Result<(), Errno> {
    let owner = set.uid.is_some() || set.gid.is_some();
    let more_than_times = set.size.is_some() || set.mode.is_some() || owner || set.kill_suidgid;
    let kept = times_kept_by_kernel(set).filter(|_| !more_than_times);
    // Times of a write that the kernel took: by a descriptor that is still open, or from before the
    // flag was set, which changed ctime. They may come late.
    if kept.is_some_and(|ctime| set.from_kernel_cache || ctime <= attr.ctime) {
        return Ok(());
    }
    refuse(attr, FLAG_IMMUTABLE)?;
    // touch(1) is allowed. A kernel that keeps times itself sends it as the access time "now" and
    // a modification time of its own.
    let touched = kept.is_some() || matches!(set.atime, Some(SetTime::Now));
    let times = matches!(set.atime, Some(SetTime::At(_)))
        || matches!(set.mtime, Some(SetTime::At(_))) && !touched;
    if set.size.is_some() || set.mode.is_some() || owner || times {
        refuse(attr, FLAG_APPEND)?;
    }
    Ok(())
}

/// The change time, if this is how a kernel with a write-back cache sends the times of writes: an
/// mtime and a ctime, no atime. utimensat(2) with UTIME_OMIT for atime looks the same; so such a
/// kernel may set the mtime alone of an append-only file.
fn times_kept_by_kernel(set: &SetAttr) -> Option<Timestamp> {
    match (set.atime, set.mtime) {
        (None, Some(SetTime::At(_))) => set.ctime,
        _ => None,
    }
}

impl FileSystem {
    /// The flags of an inode (`FLAG_*`, the bits of FS_IOC_GETFLAGS).
    pub fn flags(&self, ino: Ino) -> Result<u32, Errno> {
        Ok(self.inode(ino)?.state.lock().attr.flags)
    }

    /// Sets all flags of an inode.
    pub fn set_flags(&self, ino: Ino, flags: u32, cred: &Cred) -> Result<(), Errno> {
        self.check_writable()?;
        self.balance_group()?;
        let inode = self.inode(ino)?;
        {
            let _pass = self.gate.enter();
            let mut state = inode.state.lock();
            let attr = &mut state.attr;
            if flags & !flags_of_type(attr.mode) != 0 {
                return Err(Errno::NOTSUP);
            }
            if cred.uid != attr.uid && cred.uid != 0 {
                return Err(Errno::PERM);
            }
            let changed = attr.flags ^ flags;
            if changed & PRIVILEGED != 0 && !cred.capable_immutable {
                return Err(Errno::PERM);
            }
            // What stays immutable keeps its other flags.
            if attr.flags & flags & FLAG_IMMUTABLE != 0 && changed != 0 {
                return Err(Errno::PERM);
            }
            attr.flags = flags;
            attr.ctime = Timestamp::now();
            *inode.flags_set.lock() = attr.ctime;
            drop(state);
            self.mark_dirty(&inode);
        }
        self.end_change(&inode)
    }

    /// After a change of one of these directories' entries: durable where that was asked for.
    /// Call it without a pass.
    pub(crate) fn end_names(&self, dirs: &[&Arc<Inode>]) -> Result<(), Errno> {
        const DURABLE: u32 = FLAG_SYNC | FLAG_DIRSYNC;
        let asked = |dir: &&Arc<Inode>| dir.state.lock().attr.flags & DURABLE != 0;
        if self.options.sync || dirs.iter().any(asked) {
            self.commit_durably()?;
        }
        Ok(())
    }

    /// After a change of an inode: durable where that was asked for. Call it without a pass.
    pub(crate) fn end_change(&self, inode: &Inode) -> Result<(), Errno> {
        if self.options.sync || inode.is_sync() {
            self.commit_durably()?;
        }
        Ok(())
    }
}
