//! Requests about names, attributes and extended attributes: translate, call the core, answer.

use super::CacheMode;
use super::attr::{cred, setattr_in};
use super::dispatch::{Parsed, Request};
use super::protocol::{GETATTR_FH, Out, SETXATTR_ACL_KILL_SGID};
use crate::{Cred, Errno};

impl Request<'_> {
    fn cred(&self, umask: u32) -> Cred {
        cred(&self.header, umask)
    }

    pub(super) fn lookup(mut self) -> Parsed {
        let (parent, name) = (self.header.nodeid, self.args.name()?);
        let fs = &self.shared.fs;
        match name {
            // Asked for by export operations (name_to_handle_at) for a directory itself.
            // A file that lost its last name is not to be found again.
            b"." => self.reply.entry(match fs.getattr(parent) {
                Ok(attr) if attr.nlink == 0 => Err(Errno::STALE),
                _ => fs.lookup_ino(parent),
            }),
            b".." => self.reply.entry(fs.lookup(parent, name)),
            name => match fs.lookup(parent, name) {
                Err(Errno::NOENT) => self.reply.negative_entry(),
                result => self.reply.entry(result),
            },
        }
        Ok(())
    }

    pub(super) fn forget(mut self) -> Parsed {
        self.reply.none();
        self.shared.fs.forget(self.header.nodeid, self.args.u64()?);
        Ok(())
    }

    pub(super) fn batch_forget(mut self) -> Parsed {
        self.reply.none();
        let count = self.args.u32()?;
        self.args.skip(4)?;
        for _ in 0..count {
            let (ino, lookups) = (self.args.u64()?, self.args.u64()?);
            self.shared.fs.forget(ino, lookups);
        }
        Ok(())
    }

    pub(super) fn getattr(mut self) -> Parsed {
        let has_handle = self.args.u32()? & GETATTR_FH != 0;
        self.args.skip(4)?;
        let handle = self.args.u64()?;
        let shared = self.shared;
        // With its write-back cache, the kernel names the open file just before it takes bytes of
        // write(2), and only then; an error of ours is that call's error.
        let refused = (has_handle && shared.options.cache_mode == CacheMode::Kernel)
            .then(|| shared.file(handle).ok())
            .flatten()
            .and_then(|file| shared.fs.check_room(&file).err());
        let attr = match refused {
            Some(error) => Err(error),
            None => shared.fs.getattr(self.header.nodeid),
        };
        self.reply.attr(attr);
        Ok(())
    }

    pub(super) fn statx(self) -> Parsed {
        self.reply.statx(self.shared.fs.getattr(self.header.nodeid));
        Ok(())
    }

    pub(super) fn setattr(mut self) -> Parsed {
        let set = setattr_in(&mut self.args)?;
        let result = self
            .shared
            .fs
            .setattr(self.header.nodeid, &set, &self.cred(0));
        self.reply.attr(result);
        Ok(())
    }

    pub(super) fn readlink(self) -> Parsed {
        self.reply
            .bytes(self.shared.fs.readlink(self.header.nodeid));
        Ok(())
    }

    pub(super) fn symlink(mut self) -> Parsed {
        let (name, target) = (self.args.name()?, self.args.name()?);
        let result = self
            .shared
            .fs
            .symlink(self.header.nodeid, name, target, &self.cred(0));
        self.reply.entry(result);
        Ok(())
    }

    pub(super) fn mknod(mut self) -> Parsed {
        let (mode, rdev, umask) = (self.args.u32()?, self.args.u32()?, self.args.u32()?);
        self.args.skip(4)?;
        let name = self.args.name()?;
        let cred = self.cred(umask);
        let result = self
            .shared
            .fs
            .mknod(self.header.nodeid, name, mode, rdev, &cred);
        self.reply.entry(result);
        Ok(())
    }

    pub(super) fn mkdir(mut self) -> Parsed {
        let (mode, umask) = (self.args.u32()?, self.args.u32()?);
        let name = self.args.name()?;
        let cred = self.cred(umask);
        let result = self.shared.fs.mkdir(self.header.nodeid, name, mode, &cred);
        self.reply.entry(result);
        Ok(())
    }

    pub(super) fn unlink(mut self) -> Parsed {
        let name = self.args.name()?;
        self.reply
            .empty(self.shared.fs.unlink(self.header.nodeid, name));
        Ok(())
    }

    pub(super) fn rmdir(mut self) -> Parsed {
        let name = self.args.name()?;
        self.reply
            .empty(self.shared.fs.rmdir(self.header.nodeid, name));
        Ok(())
    }

    pub(super) fn rename(mut self) -> Parsed {
        let newdir = self.args.u64()?;
        self.rename_to(newdir, 0)
    }

    pub(super) fn rename2(mut self) -> Parsed {
        let (newdir, flags) = (self.args.u64()?, self.args.u32()?);
        self.args.skip(4)?;
        self.rename_to(newdir, flags)
    }

    fn rename_to(mut self, newdir: u64, flags: u32) -> Parsed {
        let (from, to) = (self.args.name()?, self.args.name()?);
        let cred = self.cred(0);
        let result = self
            .shared
            .fs
            .rename(self.header.nodeid, from, newdir, to, flags, &cred);
        self.reply.empty(result);
        Ok(())
    }

    pub(super) fn link(mut self) -> Parsed {
        let (old, name) = (self.args.u64()?, self.args.name()?);
        self.reply
            .entry(self.shared.fs.link(old, self.header.nodeid, name));
        Ok(())
    }

    pub(super) fn statfs(self) -> Parsed {
        let s = self.shared.fs.statfs();
        let out = Out::default()
            .u64(s.blocks)
            .u64(s.bfree)
            .u64(s.bavail)
            .u64(s.files)
            .u64(s.ffree)
            .u32(s.bsize)
            .u32(s.namelen)
            .u32(s.bsize)
            .zeros(28);
        self.reply.out(Ok(out));
        Ok(())
    }

    pub(super) fn setxattr(mut self) -> Parsed {
        let (size, flags, ext) = (self.args.u32()?, self.args.u32()?, self.args.u32()?);
        self.args.skip(4)?;
        let name = self.args.name()?;
        let value = self.args.bytes(size as usize)?;
        let kill_sgid = ext & SETXATTR_ACL_KILL_SGID != 0;
        let ino = self.header.nodeid;
        let fs = &self.shared.fs;
        let result = fs.setxattr(ino, name, value, flags.cast_signed(), kill_sgid);
        self.reply.empty(result);
        Ok(())
    }

    pub(super) fn getxattr(mut self) -> Parsed {
        let size = self.args.u32()?;
        self.args.skip(4)?;
        let name = self.args.name()?;
        self.reply
            .xattr(self.shared.fs.getxattr(self.header.nodeid, name), size);
        Ok(())
    }

    pub(super) fn listxattr(mut self) -> Parsed {
        let size = self.args.u32()?;
        self.reply
            .xattr(self.shared.fs.listxattr(self.header.nodeid), size);
        Ok(())
    }

    pub(super) fn removexattr(mut self) -> Parsed {
        let name = self.args.name()?;
        self.reply
            .empty(self.shared.fs.removexattr(self.header.nodeid, name));
        Ok(())
    }

    /// Nothing to do but to say so.
    pub(super) fn done(self) -> Parsed {
        self.reply.empty(Ok(()));
        Ok(())
    }
}
