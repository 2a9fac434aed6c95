//! ioctl(2): inode flags (chattr, lsattr), generation numbers, and trimming.
//!
//! The kernel reads and writes flags through its own file-attribute calls, which send the same
//! commands; who may change which flag it has checked before (CAP_LINUX_IMMUTABLE, ownership).

use std::sync::Arc;

use nix::{request_code_read, request_code_readwrite, request_code_write};

use super::CacheMode;
use super::attr::cred;
use super::dispatch::{Parsed, Request};
use super::protocol::{Args, Malformed, Out};
use crate::{Errno, FLAG_SYNC, Ino};

const LONG: usize = size_of::<libc::c_long>();
/// Bytes of `struct fsxattr`.
const FSXATTR: usize = 28;
/// Bytes of `struct fstrim_range`.
const TRIM_RANGE: usize = 24;

/// A command, with the direction and size that its number carries.
const fn command(code: libc::c_ulong) -> u32 {
    // Numbers of commands have 32 bits.
    #[expect(clippy::cast_possible_truncation, reason = "see above")]
    let command = code as u32;
    command
}

const GETFLAGS: u32 = command(request_code_read!(b'f', 1, LONG));
const SETFLAGS: u32 = command(request_code_write!(b'f', 2, LONG));
const GETVERSION: u32 = command(request_code_read!(b'v', 1, LONG));
const FSGETXATTR: u32 = command(request_code_read!(b'X', 31, FSXATTR));
const FSSETXATTR: u32 = command(request_code_write!(b'X', 32, FSXATTR));
const FITRIM: u32 = command(request_code_readwrite!(b'X', 121, TRIM_RANGE));

/// The same flag in the older (FS_*_FL) and in the newer interface (FS_XFLAG_*).
const FLAGS: [(u32, u32); 5] = [
    (0x10, 1 << 3), // immutable
    (0x20, 1 << 4), // append only
    (0x08, 1 << 5), // synchronous
    (0x80, 1 << 6), // no access times
    (0x40, 1 << 7), // no dump
];

fn to_xflags(flags: u32) -> u32 {
    let set = FLAGS.iter().filter(|(old, _)| flags & old != 0);
    set.fold(0, |xflags, (_, new)| xflags | new)
}

/// Flags from the newer interface, which cannot say anything about the others.
fn from_xflags(xflags: u32, before: u32) -> Result<u32, Errno> {
    let known = FLAGS.iter().fold(0, |bits, (_, new)| bits | new);
    if xflags & !known != 0 {
        return Err(Errno::NOTSUP);
    }
    let unspoken = FLAGS.iter().fold(before, |bits, (old, _)| bits & !old);
    let set = FLAGS.iter().filter(|(_, new)| xflags & new != 0);
    Ok(set.fold(unspoken, |flags, (old, _)| flags | old))
}

impl Request<'_> {
    pub(super) fn ioctl(mut self) -> Parsed {
        self.args.skip(8 + 4)?; // handle, flags
        let command = self.args.u32()?;
        self.args.skip(8)?; // the caller's pointer
        let (in_size, _out_size) = (self.args.u32()?, self.args.u32()?);
        let mut data = self.args;
        let ino = self.header.nodeid;
        match command {
            GETFLAGS => {
                let flags = self.shared.fs.flags(ino);
                self.reply
                    .ioctl(flags.map(|flags| Out::default().u32(flags)));
            }
            SETFLAGS => {
                let result = self.set_flags(ino, data.u32()?);
                self.reply.ioctl(result.map(|()| Out::default()));
            }
            FSGETXATTR => {
                let flags = self.shared.fs.flags(ino);
                let out = flags.map(|flags| Out::default().u32(to_xflags(flags)));
                self.reply.ioctl(out.map(|out| out.zeros(FSXATTR - 4)));
            }
            FSSETXATTR => {
                let result = self.set_xflags(ino, &mut data)?;
                self.reply.ioctl(result.map(|()| Out::default()));
            }
            GETVERSION => {
                let attr = self.shared.fs.getattr(ino);
                // Its low half, which is all that the interface has room for.
                let low = attr.map(|attr| (attr.generation & u64::from(u32::MAX)) as u32);
                self.reply
                    .ioctl(low.map(|version| Out::default().u32(version)));
            }
            FITRIM => return self.trim(&mut data),
            _ => {
                log::debug!("no ioctl {command:#x} here, {in_size} bytes");
                self.reply.empty(Err(NOTTY));
            }
        }
        Ok(())
    }

    /// With the kernel's write-back cache, nobody can have synchronous files: the kernel takes the
    /// bytes, and answers, before we hear of them. Opened past that cache they would be durable,
    /// but the kernel would go on showing the mtime of before the write, and backups miss it.
    fn set_flags(&self, ino: Ino, flags: u32) -> Result<(), Errno> {
        let fs = &self.shared.fs;
        if self.shared.options.cache_mode == CacheMode::Kernel
            && flags & FLAG_SYNC != 0
            && fs.flags(ino)? & FLAG_SYNC == 0
        {
            return Err(Errno::NOTSUP);
        }
        fs.set_flags(ino, flags, &cred(&self.header, 0))?;
        // The kernel does not expect an ioctl to change the ctime.
        self.shared.forget_attributes(ino);
        Ok(())
    }

    fn set_xflags(&self, ino: Ino, data: &mut Args<'_>) -> Result<Result<(), Errno>, Malformed> {
        let xflags = data.u32()?;
        // Extent size hints, projects: not kept.
        let hints = [data.u32()?, data.u32()?, data.u32()?, data.u32()?];
        if [hints[0], hints[2], hints[3]] != [0; 3] {
            return Ok(Err(Errno::NOTSUP));
        }
        Ok(self
            .shared
            .fs
            .flags(ino)
            .and_then(|before| from_xflags(xflags, before))
            .and_then(|flags| self.set_flags(ino, flags)))
    }

    /// FITRIM (fstrim). For the superuser only, as everywhere.
    fn trim(self, data: &mut Args<'_>) -> Parsed {
        let (start, len, min_len) = (data.u64()?, data.u64()?, data.u64()?);
        if self.header.uid != 0 {
            self.reply.empty(Err(Errno::PERM));
            return Ok(());
        }
        let (shared, reply) = (Arc::clone(self.shared), self.reply);
        self.blocking.run(move || {
            let trimmed = shared.fs.trim(start, len, min_len);
            reply.ioctl(trimmed.map(|bytes| Out::default().u64(start).u64(bytes).u64(min_len)));
        });
        Ok(())
    }
}

/// What a file answers to an ioctl that it does not know.
const NOTTY: Errno = Errno(libc::ENOTTY);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_kernels_numbers() {
        assert_eq!((GETFLAGS, SETFLAGS), (0x8008_6601, 0x4008_6602));
        assert_eq!((FSGETXATTR, FSSETXATTR), (0x801c_581f, 0x401c_5820));
        assert_eq!((FITRIM, GETVERSION), (0xc018_5879, 0x8008_7601));
    }

    #[test]
    fn flags_go_through_both_interfaces() {
        for (old, new) in FLAGS {
            assert_eq!(to_xflags(old), new);
            assert_eq!(from_xflags(new, 0x10), Ok(old));
        }
        // No tail merging has no bit in the newer interface and stays.
        assert_eq!(from_xflags(1 << 3, 0x8000), Ok(0x8010));
        assert_eq!(from_xflags(1 << 30, 0), Err(Errno::NOTSUP));
    }
}
