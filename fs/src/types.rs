//! The vocabulary of the core: inode numbers, attributes, credentials, errors.
//!
//! Nothing here knows FUSE. A front end translates between these types and its protocol.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Inode number. The root directory is [`ROOT_INO`]; 0 is never used.
pub type Ino = u64;

/// Inode number of the root directory.
pub const ROOT_INO: Ino = 1;

/// Longest name of a directory entry, in bytes.
pub const NAME_MAX: usize = 255;

/// Longest target of a symbolic link, in bytes (PATH_MAX less the terminating zero).
pub const SYMLINK_MAX: usize = 4095;

/// Most hard links that one inode may have.
pub const LINK_MAX: u32 = 65_000;

/// Largest extended attribute value, in bytes (the kernel's XATTR_SIZE_MAX).
pub const XATTR_SIZE_MAX: usize = 65_536;

/// Largest file size, in bytes: the kernel's MAX_LFS_FILESIZE on 64 bit.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;

/// An errno value as the kernel knows it, always positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $value:ident;)*) => {
        impl Errno {
            $($(#[$doc])* pub const $name: Errno = Errno(libc::$value);)*
        }
    };
}

errnos! {
    /// Operation not permitted.
    PERM = EPERM;
    /// No such file or directory.
    NOENT = ENOENT;
    /// Input/output error.
    IO = EIO;
    /// Bad file descriptor.
    BADF = EBADF;
    /// Out of memory.
    NOMEM = ENOMEM;
    /// Permission denied.
    ACCES = EACCES;
    /// Device or resource busy.
    BUSY = EBUSY;
    /// File exists.
    EXIST = EEXIST;
    /// Not a directory.
    NOTDIR = ENOTDIR;
    /// Is a directory.
    ISDIR = EISDIR;
    /// Invalid argument.
    INVAL = EINVAL;
    /// File too large.
    FBIG = EFBIG;
    /// No space left on device.
    NOSPC = ENOSPC;
    /// Read-only file system.
    ROFS = EROFS;
    /// Too many links.
    MLINK = EMLINK;
    /// Result too large for the caller's buffer.
    RANGE = ERANGE;
    /// Name too long.
    NAMETOOLONG = ENAMETOOLONG;
    /// Directory not empty.
    NOTEMPTY = ENOTEMPTY;
    /// No such attribute.
    NODATA = ENODATA;
    /// Operation not supported.
    NOTSUP = EOPNOTSUPP;
    /// Function not implemented.
    NOSYS = ENOSYS;
    /// No such device or address.
    NXIO = ENXIO;
    /// Argument list too long (attribute value).
    TOOBIG = E2BIG;
    /// Stale inode.
    STALE = ESTALE;
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Errno({}: {})",
            self.0,
            nix::errno::Errno::from_raw(self.0).desc()
        )
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(nix::errno::Errno::from_raw(self.0).desc())
    }
}

impl std::error::Error for Errno {}

/// A point in time: seconds since 1970 (may be negative) and nanoseconds 0..1e9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Whole seconds since 1970-01-01 00:00:00 UTC.
    pub secs: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

impl Timestamp {
    /// The current time, by the clock from which the kernel stamps files: with its write-back cache
    /// some times of a file come from there and some from here, and must not be out of order.
    pub fn now() -> Self {
        use nix::time::{ClockId, clock_gettime};
        match clock_gettime(ClockId::CLOCK_REALTIME_COARSE) {
            Ok(time) => Self {
                secs: time.tv_sec(),
                nanos: u32::try_from(time.tv_nsec()).unwrap_or(0),
            },
            Err(_) => Self::from(SystemTime::now()),
        }
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self {
                secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                nanos: after.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                let secs = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                match before.subsec_nanos() {
                    0 => Self {
                        secs: -secs,
                        nanos: 0,
                    },
                    nanos => Self {
                        secs: -secs - 1,
                        nanos: 1_000_000_000 - nanos,
                    },
                }
            }
        }
    }
}

/// What stat(2) shows of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Size in bytes.
    pub size: u64,
    /// Allocated space in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last modification of the content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Birth.
    pub btime: Timestamp,
    /// Type and permission bits, as `st_mode`.
    pub mode: u32,
    /// Number of hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node, as the kernel encodes it in 32 bits.
    pub rdev: u32,
    /// Inode flags, see [`crate::FLAGS_KNOWN`].
    pub flags: u32,
    /// Tells a reused inode number from its former life.
    pub generation: u64,
}

impl Attr {
    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    /// Whether this is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// Who asks. Permissions are the kernel's business (default_permissions); the core uses this for
/// ownership of new inodes and for set-id clearing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cred {
    /// File-system user id.
    pub uid: u32,
    /// File-system group id.
    pub gid: u32,
    /// Mode creation mask, where the kernel left it to us to apply; 0 otherwise.
    pub umask: u32,
    /// Process id, for log lines.
    pub pid: u32,
    /// May change the flags "immutable" and "append-only" (CAP_LINUX_IMMUTABLE).
    pub capable_immutable: bool,
}

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// The time at which the operation runs.
    Now,
    /// This time.
    At(Timestamp),
}

/// Attributes to change; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// New permission bits (the type cannot change).
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size in bytes.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
    /// New change time, from a kernel that keeps times itself (write-back cache).
    pub ctime: Option<Timestamp>,
    /// Clear set-id bits as a side effect (truncate by a caller without CAP_FSETID).
    pub kill_suidgid: bool,
    /// Times of writes that a kernel with a write-back cache has taken already.
    pub from_kernel_cache: bool,
}

/// One entry of a directory listing.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: Ino,
    /// DT_* type.
    pub kind: u8,
    /// Name in bytes, without a terminating zero.
    pub name: &'a [u8],
    /// Resume after this entry by passing this value; stable while others come and go.
    pub cookie: u64,
}

/// How a write arrived.
#[derive(Clone, Copy, Debug, Default)]
pub struct WriteFlags {
    /// Clear set-id bits (the kernel's FUSE_WRITE_KILL_SUIDGID).
    pub kill_suidgid: bool,
    /// The pages come from the kernel's write-back cache (no append, times kept by the kernel).
    pub from_kernel_cache: bool,
    /// Durable when it returns, whatever the file was opened with (RWF_DSYNC).
    pub durable: bool,
}

/// What statfs(2) shows. Units of `bsize` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// All blocks that data may use.
    pub blocks: u64,
    /// Free blocks.
    pub bfree: u64,
    /// Free blocks for everybody (the same: nothing is kept back for root).
    pub bavail: u64,
    /// Inodes that could exist.
    pub files: u64,
    /// Inodes that could still be made.
    pub ffree: u64,
    /// Block size in bytes.
    pub bsize: u32,
    /// Longest name in bytes.
    pub namelen: u32,
}
