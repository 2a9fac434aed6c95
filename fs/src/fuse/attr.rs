//! Translation of attributes, times and errors between the core and fuser.
//!
//! fuser carries times as `SystemTime`. Outgoing times are exact. Incoming ones before 1970 with a
//! fraction of a second arrive mirrored (it subtracts the nanoseconds, not adds them), which
//! [`timestamp`] undoes.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo, Request, TimeOrNow};

use crate::{Attr, Cred, Errno, SetTime, Timestamp};

/// What `st_blksize` says where the kernel caches: its page size.
pub(super) const BLKSIZE_CACHED: u32 = 4096;

/// What `st_blksize` says where every read(2) and write(2) is a request: programs that read and
/// write in such pieces (cmp, Python) then need fewer of them.
pub(super) const BLKSIZE_DIRECT: u32 = 65_536;

/// The errno edge: every error of the core leaves through here.
pub(super) fn errno(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.0)
}

/// Who asks.
pub(super) fn cred(request: &Request, umask: u32) -> Cred {
    Cred {
        uid: request.uid(),
        gid: request.gid(),
        umask,
        pid: request.pid(),
    }
}

/// The type of an inode from its mode; anything unknown shows as a regular file.
pub(super) fn file_type(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => FileType::Directory,
        libc::S_IFLNK => FileType::Symlink,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

/// The type of a directory entry from its `DT_*` value.
pub(super) fn dirent_type(kind: u8) -> FileType {
    file_type(u32::from(kind) << 12)
}

/// Attributes as fuser wants them.
pub(super) fn file_attr(attr: &Attr, blksize: u32) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: file_type(attr.mode),
        perm: u16::try_from(attr.mode & 0o7777).unwrap_or(0),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize,
        flags: 0,
    }
}

/// Attributes of which only inode number and type mean anything: a negative entry (inode 0), or an
/// entry of a listing that the kernel does not look up ("." and "..").
pub(super) fn bare_attr(ino: u64, kind: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLKSIZE_CACHED,
        flags: 0,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let whole = if time.secs >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.secs.unsigned_abs()))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs()))
    };
    whole
        .and_then(|at| at.checked_add(Duration::from_nanos(u64::from(time.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

/// A time from a request.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp {
            secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        // fuser built `EPOCH - Duration(-secs, nanos)` from the protocol's (secs, nanos).
        Err(before) => Timestamp {
            secs: 0_i64
                .checked_sub_unsigned(before.duration().as_secs())
                .unwrap_or(i64::MIN),
            nanos: before.duration().subsec_nanos(),
        },
    }
}

/// A time to set, from a request.
pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::At(timestamp(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fuser 0.18 makes of the protocol's seconds and nanoseconds.
    fn as_fuser_does(secs: i64, nanos: u32) -> SystemTime {
        if secs >= 0 {
            UNIX_EPOCH + Duration::new(secs.unsigned_abs(), nanos)
        } else {
            UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos)
        }
    }

    #[test]
    fn times_survive_the_way_in() {
        for secs in [
            i64::MIN + 1,
            -2_208_988_800,
            -2,
            -1,
            0,
            1,
            15_032_385_535,
            i64::MAX,
        ] {
            for nanos in [0, 1, 999_999_999] {
                assert_eq!(
                    timestamp(as_fuser_does(secs, nanos)),
                    Timestamp { secs, nanos }
                );
            }
        }
    }

    #[test]
    fn times_survive_the_way_out() {
        for secs in [i64::MIN, -2, -1, 0, 1, i64::MAX] {
            for nanos in [0, 1, 999_999_999] {
                let time = Timestamp { secs, nanos };
                assert_eq!(Timestamp::from(system_time(time)).nanos, nanos);
                if secs != i64::MIN {
                    assert_eq!(Timestamp::from(system_time(time)), time);
                }
            }
        }
    }

    #[test]
    fn types_of_modes_and_entries_agree() {
        for mode in [
            libc::S_IFDIR,
            libc::S_IFREG,
            libc::S_IFLNK,
            libc::S_IFIFO,
            libc::S_IFSOCK,
        ] {
            let kind = u8::try_from(mode >> 12).unwrap();
            assert_eq!(file_type(mode | 0o755), dirent_type(kind));
        }
    }
}
