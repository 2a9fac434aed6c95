//! Attributes and times as the protocol has them.

use std::time::Duration;

use super::protocol::{Args, InHeader, Malformed, Out, setattr_valid};
use crate::{Attr, Cred, SetAttr, SetTime, Timestamp};

/// What `st_blksize` says where the kernel caches: its page size.
pub(super) const BLKSIZE_CACHED: u32 = 4096;

/// What `st_blksize` says where every read(2) and write(2) is a request: programs that read and
/// write in such pieces (cmp, Python) then need fewer of them.
pub(super) const BLKSIZE_DIRECT: u32 = 65_536;

/// Who asks.
pub(super) fn cred(header: &InHeader, umask: u32) -> Cred {
    Cred {
        uid: header.uid,
        gid: header.gid,
        umask,
        pid: header.pid,
        // Whoever may not change those flags was refused by the kernel before it asked.
        capable_immutable: true,
    }
}

/// `struct fuse_attr`.
fn attr(out: Out, attr: &Attr, blksize: u32) -> Out {
    out.u64(attr.ino)
        .u64(attr.size)
        .u64(attr.blocks)
        .i64(attr.atime.secs)
        .i64(attr.mtime.secs)
        .i64(attr.ctime.secs)
        .u32(attr.atime.nanos)
        .u32(attr.mtime.nanos)
        .u32(attr.ctime.nanos)
        .u32(attr.mode)
        .u32(attr.nlink)
        .u32(attr.uid)
        .u32(attr.gid)
        .u32(attr.rdev)
        .u32(blksize)
        .u32(0)
}

/// Bytes of `struct fuse_attr`.
const ATTR_BYTES: usize = 88;

/// Bytes of `struct fuse_entry_out`.
pub(super) const ENTRY_BYTES: usize = 40 + ATTR_BYTES;

/// `struct fuse_entry_out`: an inode that a name leads to.
pub(super) fn entry_out(entry: &Attr, timeout: Duration, blksize: u32) -> Out {
    let head = Out::default()
        .u64(entry.ino)
        .u64(entry.generation)
        .u64(timeout.as_secs())
        .u64(timeout.as_secs())
        .u32(timeout.subsec_nanos())
        .u32(timeout.subsec_nanos());
    attr(head, entry, blksize)
}

/// The same for a name that leads nowhere.
pub(super) fn negative_entry_out(timeout: Duration) -> Out {
    Out::default()
        .u64(0)
        .u64(0)
        .u64(timeout.as_secs())
        .u64(0)
        .u32(timeout.subsec_nanos())
        .u32(0)
        .zeros(ATTR_BYTES)
}

/// `struct fuse_attr_out`.
pub(super) fn attr_out(of: &Attr, timeout: Duration, blksize: u32) -> Out {
    let head = Out::default()
        .u64(timeout.as_secs())
        .u32(timeout.subsec_nanos())
        .u32(0);
    attr(head, of, blksize)
}

/// Flags that statx(2) shows (STATX_ATTR_*): immutable, append only, no dump. They have the bits
/// that they have for chattr.
const STATX_FLAGS: u32 = 0x10 | 0x20 | 0x40;

/// `struct fuse_statx_out`: as `attr_out`, with the time of birth.
pub(super) fn statx_out(of: &Attr, timeout: Duration, blksize: u32) -> Out {
    let time = |out: Out, time: Timestamp| out.i64(time.secs).u32(time.nanos).u32(0);
    let mask = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
    let out = Out::default()
        .u64(timeout.as_secs())
        .u32(timeout.subsec_nanos())
        .u32(0)
        .zeros(16)
        .u32(mask)
        .u32(blksize)
        .u64(u64::from(of.flags & STATX_FLAGS))
        .u32(of.nlink)
        .u32(of.uid)
        .u32(of.gid)
        .u16(u16::try_from(of.mode).unwrap_or(0))
        .u16(0)
        .u64(of.ino)
        .u64(of.size)
        .u64(of.blocks)
        .u64(u64::from(STATX_FLAGS));
    let out = time(out, of.atime);
    let out = time(out, of.btime);
    let out = time(out, of.ctime);
    let out = time(out, of.mtime);
    let rdev = libc::dev_t::from(of.rdev);
    out.u32(libc::major(rdev))
        .u32(libc::minor(rdev))
        .zeros(8 + 14 * 8)
}

/// `struct fuse_setattr_in`: which attributes are to change.
pub(super) fn setattr_in(args: &mut Args<'_>) -> Result<SetAttr, Malformed> {
    let valid = args.u32()?;
    args.skip(4 + 8)?; // padding, handle
    let size = args.u64()?;
    args.skip(8)?; // lock owner
    let seconds = [args.u64()?, args.u64()?, args.u64()?];
    let nanos = [args.u32()?, args.u32()?, args.u32()?];
    let mode = args.u32()?;
    args.skip(4)?;
    let (uid, gid) = (args.u32()?, args.u32()?);
    let has = |bit: u32| valid & bit != 0;
    let time = |index: usize| Timestamp {
        secs: seconds[index].cast_signed(),
        nanos: nanos[index].min(999_999_999),
    };
    let set_time = |index: usize, given: u32, now: u32| match (has(given), has(now)) {
        (_, true) => Some(SetTime::Now),
        (true, false) => Some(SetTime::At(time(index))),
        (false, false) => None,
    };
    use setattr_valid as v;
    // A change of owner always takes set-id bits away (HANDLE_KILLPRIV_V2); with one of size the
    // kernel says whether it does.
    let chown = has(v::UID) || has(v::GID);
    Ok(SetAttr {
        mode: has(v::MODE).then_some(mode & 0o7777),
        uid: has(v::UID).then_some(uid),
        gid: has(v::GID).then_some(gid),
        size: has(v::SIZE).then_some(size),
        atime: set_time(0, v::ATIME, v::ATIME_NOW),
        mtime: set_time(1, v::MTIME, v::MTIME_NOW),
        ctime: has(v::CTIME).then(|| time(2)),
        kill_suidgid: has(v::KILL_SUIDGID) || chown,
        // With a handle come truncations, and these; utimensat(2) never brings one.
        from_kernel_cache: has(v::FH) && has(v::MTIME) && has(v::CTIME) && !has(v::SIZE),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Attr {
        let time = |secs| Timestamp { secs, nanos: 7 };
        Attr {
            ino: 3,
            size: 4,
            blocks: 8,
            atime: time(-2),
            mtime: time(1),
            ctime: time(2),
            btime: time(3),
            mode: libc::S_IFREG | 0o644,
            nlink: 1,
            uid: 10,
            gid: 20,
            rdev: 0,
            flags: 0,
            generation: 5,
        }
    }

    #[test]
    fn structures_have_the_kernels_sizes() {
        let timeout = Duration::from_millis(1500);
        assert_eq!(attr_out(&sample(), timeout, 4096).as_slice().len(), 104);
        let entry = entry_out(&sample(), timeout, 4096);
        assert_eq!(entry.as_slice().len(), ENTRY_BYTES);
        assert_eq!(negative_entry_out(timeout).as_slice().len(), ENTRY_BYTES);
        assert_eq!(statx_out(&sample(), timeout, 4096).as_slice().len(), 288);
    }

    #[test]
    fn times_before_1970_come_in_as_they_are() {
        let fields = Out::default()
            .u32(setattr_valid::MTIME | setattr_valid::ATIME_NOW | setattr_valid::UID)
            .zeros(4 + 8 + 8 + 8)
            .i64(0)
            .i64(i64::MIN)
            .i64(0)
            .u32(0)
            .u32(999_999_999)
            .u32(0)
            .u32(0)
            .u32(0)
            .u32(55)
            .u32(0)
            .u32(0);
        let bytes = fields.as_slice();
        let request_len = u32::try_from(40 + bytes.len()).unwrap();
        let mut request = Out::default()
            .u32(request_len)
            .zeros(36)
            .as_slice()
            .to_vec();
        request.extend_from_slice(bytes);
        let (_, mut args) = InHeader::split(&request, 0).unwrap();
        let set = setattr_in(&mut args).unwrap();
        assert!(matches!(set.atime, Some(SetTime::Now)));
        let expected = Timestamp {
            secs: i64::MIN,
            nanos: 999_999_999,
        };
        assert!(matches!(set.mtime, Some(SetTime::At(time)) if time == expected));
        assert_eq!(
            (set.uid, set.gid, set.mode, set.size),
            (Some(55), None, None, None)
        );
        assert!(set.kill_suidgid);
    }
}
