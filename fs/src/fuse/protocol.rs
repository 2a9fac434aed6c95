//! The FUSE protocol as braidfs speaks it: numbers, and how requests and replies are laid out.
//!
//! Source: the kernel's interface, `include/uapi/linux/fuse.h`, version 7.45. Requests are read
//! with a cursor and replies built field by field, in the order in which that header lists them:
//! so nothing rests on the layout of a Rust structure, and no byte is read that is not there.
//! Fields have the machine's byte order, as between any program and its kernel.

#![expect(
    clippy::host_endian_bytes,
    reason = "the kernel speaks the machine's byte order"
)]

use smallvec::SmallVec;

/// Version of the protocol that is offered.
pub(super) const MAJOR: u32 = 7;
/// See [`MAJOR`].
pub(super) const MINOR: u32 = 45;
/// Oldest minor version that has all that is relied on (Linux 5.4).
pub(super) const MINOR_MIN: u32 = 31;

/// Bytes of the header of a request.
pub(super) const IN_HEADER: usize = 40;
/// Bytes in front of the payload of a WRITE.
pub(super) const WRITE_HEADERS: usize = IN_HEADER + 40;
/// Bytes of the header of a reply.
pub(super) const OUT_HEADER: usize = 16;
/// Largest READ and WRITE, in bytes: 256 pages, the kernel's default limit
/// (fs.fuse.max_pages_limit).
pub const REQUEST_BYTES_MAX: usize = 1 << 20;

macro_rules! opcodes {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Opcode { $(#[doc = $text] $name,)* }

        impl Opcode {
            /// Names for people, in the order of the enumeration.
            pub(super) const NAMES: &[&str] = &[$($text,)*];

            /// The opcode of a request; `None` for one that braidfs does not know.
            pub(super) fn from_wire(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    Lookup = 1, "lookup";
    Forget = 2, "forget";
    Getattr = 3, "getattr";
    Setattr = 4, "setattr";
    Readlink = 5, "readlink";
    Symlink = 6, "symlink";
    Mknod = 8, "mknod";
    Mkdir = 9, "mkdir";
    Unlink = 10, "unlink";
    Rmdir = 11, "rmdir";
    Rename = 12, "rename";
    Link = 13, "link";
    Open = 14, "open";
    Read = 15, "read";
    Write = 16, "write";
    Statfs = 17, "statfs";
    Release = 18, "release";
    Fsync = 20, "fsync";
    Setxattr = 21, "setxattr";
    Getxattr = 22, "getxattr";
    Listxattr = 23, "listxattr";
    Removexattr = 24, "removexattr";
    Flush = 25, "flush";
    Init = 26, "init";
    Opendir = 27, "opendir";
    Readdir = 28, "readdir";
    Releasedir = 29, "releasedir";
    Fsyncdir = 30, "fsyncdir";
    Create = 35, "create";
    Interrupt = 36, "interrupt";
    Destroy = 38, "destroy";
    Ioctl = 39, "ioctl";
    BatchForget = 42, "batch_forget";
    Fallocate = 43, "fallocate";
    Readdirplus = 44, "readdirplus";
    Rename2 = 45, "rename2";
    Lseek = 46, "lseek";
    CopyFileRange = 47, "copy_file_range";
    Syncfs = 50, "syncfs";
    Tmpfile = 51, "tmpfile";
    Statx = 52, "statx";
    CopyFileRange64 = 53, "copy_file_range_64";
}

/// What both sides can do, negotiated by INIT (FUSE_* of the kernel's header).
pub(super) mod init_flags {
    pub(in crate::fuse) const ASYNC_READ: u64 = 1 << 0;
    pub(in crate::fuse) const EXPORT_SUPPORT: u64 = 1 << 4;
    pub(in crate::fuse) const BIG_WRITES: u64 = 1 << 5;
    pub(in crate::fuse) const DONT_MASK: u64 = 1 << 6;
    pub(in crate::fuse) const HAS_IOCTL_DIR: u64 = 1 << 11;
    pub(in crate::fuse) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(in crate::fuse) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(in crate::fuse) const ASYNC_DIO: u64 = 1 << 15;
    pub(in crate::fuse) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(in crate::fuse) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(in crate::fuse) const POSIX_ACL: u64 = 1 << 20;
    pub(in crate::fuse) const MAX_PAGES: u64 = 1 << 22;
    pub(in crate::fuse) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(in crate::fuse) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(in crate::fuse) const SETXATTR_EXT: u64 = 1 << 29;
    pub(in crate::fuse) const INIT_EXT: u64 = 1 << 30;
    pub(in crate::fuse) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
}

/// Which fields of a SETATTR are meant (FATTR_*).
pub(super) mod setattr_valid {
    pub(in crate::fuse) const MODE: u32 = 1 << 0;
    pub(in crate::fuse) const UID: u32 = 1 << 1;
    pub(in crate::fuse) const GID: u32 = 1 << 2;
    pub(in crate::fuse) const SIZE: u32 = 1 << 3;
    pub(in crate::fuse) const ATIME: u32 = 1 << 4;
    pub(in crate::fuse) const MTIME: u32 = 1 << 5;
    pub(in crate::fuse) const FH: u32 = 1 << 6;
    pub(in crate::fuse) const ATIME_NOW: u32 = 1 << 7;
    pub(in crate::fuse) const MTIME_NOW: u32 = 1 << 8;
    pub(in crate::fuse) const CTIME: u32 = 1 << 10;
    pub(in crate::fuse) const KILL_SUIDGID: u32 = 1 << 11;
}

/// How an open file is to be treated by the kernel (FOPEN_*).
pub mod open_reply {
    /// Reads and writes go past the kernel's page cache.
    pub const DIRECT_IO: u32 = 1 << 0;
    /// What the kernel has of the file stays valid.
    pub const KEEP_CACHE: u32 = 1 << 1;
    /// Closing it sends no FLUSH.
    pub const NOFLUSH: u32 = 1 << 5;
    /// Several writers at a time, with `DIRECT_IO`.
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// FSYNC: the data only (FUSE_FSYNC_FDATASYNC).
pub(super) const FSYNC_DATA: u32 = 1 << 0;
/// GETATTR: the request names an open file.
pub(super) const GETATTR_FH: u32 = 1 << 0;
/// WRITE: pages of the kernel's cache or of a mapping (FUSE_WRITE_CACHE).
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// WRITE: the caller may not keep set-id bits (FUSE_WRITE_KILL_SUIDGID).
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// SETXATTR of an ACL: the caller may not keep the set-group-id bit.
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// Notification: the kernel is to forget attributes and pages of an inode.
pub(super) const NOTIFY_INVAL_INODE: i32 = 2;

/// A request that is shorter than it must be, or has a name without an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InHeader {
    /// Bytes of the whole request.
    pub len: u32,
    /// What is asked for.
    pub opcode: u32,
    /// Names the request in its reply.
    pub unique: u64,
    /// The inode that it is about.
    pub nodeid: u64,
    /// Who asks: file-system user id.
    pub uid: u32,
    /// File-system group id.
    pub gid: u32,
    /// Process.
    pub pid: u32,
}

impl InHeader {
    /// Whether a request that begins with `head` is a WRITE.
    pub(super) fn is_write(head: &[u8]) -> bool {
        let mut args = Args(head);
        let opcode = args.skip(4).and_then(|()| args.u32());
        opcode.is_ok_and(|opcode| Opcode::from_wire(opcode) == Some(Opcode::Write))
    }

    /// Splits a request, of which `apart` bytes of payload lie elsewhere, into its header and its
    /// arguments.
    pub(super) fn split(request: &[u8], apart: usize) -> Result<(Self, Args<'_>), Malformed> {
        let mut args = Args(request);
        let header = Self {
            len: args.u32()?,
            opcode: args.u32()?,
            unique: args.u64()?,
            nodeid: args.u64()?,
            uid: args.u32()?,
            gid: args.u32()?,
            pid: args.u32()?,
        };
        // Extensions (total_extlen) are asked for by flags that braidfs does not set.
        args.skip(4)?;
        if header.len as usize != request.len() + apart {
            return Err(Malformed);
        }
        Ok((header, args))
    }
}

/// The arguments of a request, read from the front.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a>(&'a [u8]);

impl<'a> Args<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*head)
    }

    /// A field of 32 bits.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    /// A field of 64 bits.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }

    /// Fields that do not matter.
    pub fn skip(&mut self, bytes: usize) -> Result<(), Malformed> {
        self.0 = self.0.get(bytes..).ok_or(Malformed)?;
        Ok(())
    }

    /// A name that ends with a zero byte.
    pub fn name(&mut self) -> Result<&'a [u8], Malformed> {
        let end = self.0.iter().position(|&byte| byte == 0);
        let end = end.ok_or(Malformed)?;
        let (name, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(name)
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// The fixed part of a reply, built field by field.
#[derive(Clone, Debug, Default)]
pub(super) struct Out(SmallVec<[u8; OUT_BYTES]>);

/// The largest fixed part: a STATX reply, 288 bytes.
const OUT_BYTES: usize = 288;

impl Out {
    /// A field of 16 bits.
    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// A field of 32 bits.
    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// A field of 64 bits.
    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// A signed field of 64 bits.
    pub(super) fn i64(mut self, value: i64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Bytes of zero.
    pub(super) fn zeros(mut self, count: usize) -> Self {
        let len = self.0.len();
        self.0.resize(len + count, 0);
        self
    }

    /// What was built elsewhere.
    pub(super) fn append(mut self, other: &Out) -> Self {
        self.0.extend_from_slice(&other.0);
        self
    }

    /// What was built.
    pub(super) fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

/// The header of a reply with `payload` bytes behind it; `error` is an errno, 0 for success.
pub(super) fn out_header(unique: u64, error: i32, payload: usize) -> Out {
    let len = u32::try_from(OUT_HEADER + payload).unwrap_or(u32::MAX);
    let error = u32::from_ne_bytes(error.wrapping_neg().to_ne_bytes());
    Out::default().u32(len).u32(error).u64(unique)
}

/// The header of a notification.
pub(super) fn notify_header(code: i32, payload: usize) -> Out {
    out_header(0, -code, payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(arguments: &[u8]) -> Vec<u8> {
        let len = u32::try_from(IN_HEADER + arguments.len()).unwrap();
        let header = Out::default().u32(len).u32(1).u64(7).u64(1).u32(10).u32(20);
        let mut bytes = header.u32(30).u32(0).as_slice().to_vec();
        bytes.extend_from_slice(arguments);
        bytes
    }

    #[test]
    fn a_request_splits_into_its_fields() {
        let bytes = request(b"name\0rest");
        let (header, mut args) = InHeader::split(&bytes, 0).unwrap();
        assert_eq!((header.unique, header.nodeid), (7, 1));
        assert_eq!((header.uid, header.gid, header.pid), (10, 20, 30));
        assert_eq!(args.name(), Ok(&b"name"[..]));
        assert_eq!(args.bytes(4), Ok(&b"rest"[..]));
        assert_eq!(args.bytes(1), Err(Malformed));
    }

    #[test]
    fn a_request_that_is_cut_short_is_refused_at_every_length() {
        let bytes = request(b"name\0");
        for len in 0..bytes.len() {
            assert_eq!(
                InHeader::split(&bytes[..len], 0).err(),
                Some(Malformed),
                "{len}"
            );
        }
        let mut args = Args(b"no end");
        assert_eq!(args.name(), Err(Malformed));
        assert_eq!(args.u64(), Err(Malformed));
        assert_eq!(args.skip(7), Err(Malformed));
        assert!(args.u32().is_ok());
    }

    #[test]
    fn errors_go_out_negated() {
        let out = out_header(9, libc::ENOENT, 0);
        let mut args = Args(out.as_slice());
        assert_eq!(args.u32(), Ok(16));
        assert_eq!(args.u32(), Ok((-libc::ENOENT).cast_unsigned()));
        assert_eq!(args.u64(), Ok(9));
    }

    #[test]
    fn a_notification_has_its_code_where_the_error_is() {
        let out = notify_header(NOTIFY_INVAL_INODE, 24);
        let mut args = Args(out.as_slice());
        assert_eq!((args.u32(), args.u32(), args.u64()), (Ok(40), Ok(2), Ok(0)));
    }
}
