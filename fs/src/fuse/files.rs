//! Requests about open files: translate, call the core, answer. READ and WRITE are answered by
//! whichever thread completes them in the core; what waits for a commit or copies much goes to
//! the `blocking` threads.

use std::sync::Arc;

use braidfs_blockdev::trace::{self, Kind};

use super::attr::cred;
use super::channel::TO_THE_END;
use super::dispatch::{Parsed, Request};
use super::protocol::{
    Args, FSYNC_DATA, Malformed, Out, REQUEST_BYTES_MAX, WRITE_CACHE, WRITE_KILL_SUIDGID,
    open_reply,
};
use super::{CacheMode, Shared};
use crate::{AccessTime, Attr, Cred, Errno, FLAG_SYNC, OpenFile, SetAttr, WriteData, WriteFlags};

/// Largest piece of a copy_file_range in one request: the caller is to be interruptible between
/// pieces.
const COPY_BYTES_MAX: u64 = 256 << 20;

/// Owner of a request whose privileged side effects the kernel would not suppress.
const ROOT_UID: u32 = 0;

impl Shared {
    /// How an open file is to be treated by the kernel.
    fn open_reply(&self, file: &OpenFile, flags: i32) -> u32 {
        const PAST_CACHE: u32 = open_reply::DIRECT_IO | open_reply::PARALLEL_DIRECT_WRITES;
        let only_reads = flags & libc::O_ACCMODE == libc::O_RDONLY;
        let mut reply = match self.options.cache_mode {
            CacheMode::Direct => PAST_CACHE,
            CacheMode::Auto => match self.fs.access_time_due(file) {
                // Pages that stay in the cache are read without our seeing it.
                AccessTime::EachRead => PAST_CACHE,
                _ if !only_reads => PAST_CACHE | open_reply::KEEP_CACHE,
                AccessTime::NextRead => 0,
                AccessTime::NotYet => open_reply::KEEP_CACHE,
            },
            // The kernel does not know of the flag, and would tell the writer before it tells us.
            CacheMode::Kernel if self.is_sync(file) => open_reply::DIRECT_IO,
            CacheMode::Kernel => open_reply::KEEP_CACHE,
        };
        // Only writers have errors to hear about when they close.
        if only_reads {
            reply |= open_reply::NOFLUSH;
        }
        reply
    }

    fn is_sync(&self, file: &OpenFile) -> bool {
        self.fs
            .flags(file.ino())
            .is_ok_and(|flags| flags & FLAG_SYNC != 0)
    }

    pub(super) fn file(&self, handle: u64) -> Result<Arc<OpenFile>, Errno> {
        self.handles.get(handle).ok_or(Errno::BADF)
    }

    /// Whether a file has set-id bits, which most changes of its content take away.
    fn has_set_ids(&self, file: &OpenFile) -> bool {
        const SET_IDS: u32 = libc::S_ISUID | libc::S_ISGID;
        self.fs
            .getattr(file.ino())
            .is_ok_and(|attr| attr.mode & SET_IDS != 0)
    }

    /// Changes of content that are no WRITE carry no flag for it: an ordinary user's clear the
    /// set-id bits. The set-group-id bit of a file that its group may not run goes only if the
    /// caller is not in that group.
    fn drop_set_ids(&self, cred: &Cred, file: &OpenFile) -> Result<(), Errno> {
        if cred.uid == ROOT_UID || !self.has_set_ids(file) {
            return Ok(());
        }
        let attr = self.fs.getattr(file.ino())?;
        let lone_sgid = attr.mode & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID;
        let strip = lone_sgid && !in_group(cred, attr.gid);
        let set = SetAttr {
            kill_suidgid: true,
            mode: strip.then_some(attr.mode & 0o7777 & !(libc::S_ISUID | libc::S_ISGID)),
            ..SetAttr::default()
        };
        self.fs.setattr(file.ino(), &set, &Cred::default())?;
        self.forget_attributes(file.ino());
        Ok(())
    }
}

/// Whether the caller is in a group: by its own group id, or by the others of its process, which
/// requests do not carry.
fn in_group(cred: &Cred, gid: u32) -> bool {
    if cred.gid == gid {
        return true;
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", cred.pid)).unwrap_or_default();
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    groups.is_some_and(|all| all.split_whitespace().any(|one| one.parse() == Ok(gid)))
}

/// `struct fuse_create_in` and the name behind it.
struct CreateIn<'a> {
    flags: i32,
    mode: u32,
    umask: u32,
    name: &'a [u8],
}

impl<'a> CreateIn<'a> {
    fn parse(args: &mut Args<'a>) -> Result<Self, Malformed> {
        let flags = args.u32()?.cast_signed();
        let (mode, umask) = (args.u32()?, args.u32()?);
        args.skip(4)?;
        let name = args.name()?;
        Ok(Self {
            flags,
            mode,
            umask,
            name,
        })
    }
}

impl Request<'_> {
    pub(super) fn open(mut self) -> Parsed {
        let flags = self.args.u32()?.cast_signed();
        self.args.skip(4)?; // whether set-id bits go: never without O_TRUNC
        let shared = self.shared;
        let opened = shared.fs.open(self.header.nodeid, flags);
        self.reply.opened(opened.map(|file| {
            let how = shared.open_reply(&file, flags);
            (file, how)
        }));
        Ok(())
    }

    pub(super) fn create(mut self) -> Parsed {
        let new = CreateIn::parse(&mut self.args)?;
        let cred = cred(&self.header, new.umask);
        let parent = self.header.nodeid;
        let fs = &self.shared.fs;
        let created = fs.create(parent, new.name, new.mode, new.flags, &cred);
        self.created(created, new.flags)
    }

    pub(super) fn tmpfile(mut self) -> Parsed {
        let new = CreateIn::parse(&mut self.args)?;
        let cred = cred(&self.header, new.umask);
        let fs = &self.shared.fs;
        let created = fs.tmpfile(self.header.nodeid, new.mode, new.flags, &cred);
        self.created(created, new.flags)
    }

    fn created(self, created: Result<(Attr, Arc<OpenFile>), Errno>, flags: i32) -> Parsed {
        let shared = self.shared;
        self.reply.created(created.map(|(attr, file)| {
            let how = shared.open_reply(&file, flags);
            (attr, file, how)
        }));
        Ok(())
    }

    /// Directories need no state of their own: a listing goes on from the cookie it is given.
    pub(super) fn opendir(self) -> Parsed {
        self.reply.out(Ok(Out::default().zeros(16)));
        Ok(())
    }

    pub(super) fn read(mut self) -> Parsed {
        let (handle, offset, size) = (self.args.u64()?, self.args.u64()?, self.args.u32()?);
        self.args.skip(4 + 8)?; // read flags, lock owner
        let direct = self.args.u32()?.cast_signed() & libc::O_DIRECT != 0;
        let file = match self.shared.file(handle) {
            Ok(file) => file,
            Err(error) => {
                self.reply.empty(Err(error));
                return Ok(());
            }
        };
        if !direct && self.shared.options.cache_mode != CacheMode::Direct {
            file.note_cached_in_front();
        }
        // The kernel never asks for more, and a reply has room for no more pieces.
        let size = (size as usize).min(REQUEST_BYTES_MAX);
        let reply = self.reply;
        let done = Box::new(move |result| reply.pages(result));
        self.shared.fs.read(&file, offset, size, direct, done);
        Ok(())
    }

    pub(super) fn write(mut self) -> Parsed {
        let (handle, offset) = (self.args.u64()?, self.args.u64()?);
        let (size, write_flags) = (self.args.u32()?, self.args.u32()?);
        self.args.skip(8)?; // lock owner
        let open_flags = self.args.u32()?.cast_signed();
        self.args.skip(4)?;
        let data = match self.landed {
            Some(landed) if landed.len == size as usize => {
                WriteData::Landed(landed.pages, landed.len)
            }
            Some(_) => return Err(Malformed),
            None => WriteData::Bytes(self.args.bytes(size as usize)?),
        };
        let file = match self.shared.file(handle) {
            Ok(file) => file,
            Err(error) => {
                self.reply.empty(Err(error));
                return Ok(());
            }
        };
        let shared = self.shared;
        let cached = write_flags & WRITE_CACHE != 0;
        let direct = !cached && open_flags & libc::O_DIRECT != 0;
        let flags = WriteFlags {
            kill_suidgid: write_flags & WRITE_KILL_SUIDGID != 0,
            // Pages of a shared mapping come with this flag in either mode, but only with its
            // write-back cache does the kernel keep size and times itself.
            from_kernel_cache: cached && shared.options.cache_mode == CacheMode::Kernel,
            // O_SYNC includes this bit; the kernel sets it for a single write, too.
            durable: open_flags & libc::O_DSYNC != 0,
        };
        // Nobody looks at attributes on this way unless set-id bits are to go.
        let forget = (flags.kill_suidgid && shared.has_set_ids(&file))
            .then(|| (Arc::clone(shared), file.ino()));
        // A buffered read may fetch old bytes into the kernel's cache while an asynchronous direct
        // write is under way; the kernel itself drops them only before such a write. To be asked
        // when the write has been done: a read that comes later has the new bytes.
        let stale = (direct && shared.options.cache_mode != CacheMode::Direct)
            .then(|| (Arc::clone(shared), self.blocking.clone(), Arc::clone(&file)));
        // The kernel took bytes that have no room: it is to ask before it takes more.
        let filling = flags
            .from_kernel_cache
            .then(|| (Arc::clone(shared), Arc::clone(&file)));
        let reply = self.reply;
        let done = Box::new(move |result| {
            if let Some((shared, ino)) = forget {
                shared.forget_attributes(ino);
            }
            if let (Err(Errno::NOSPC), Some((shared, file))) = (&result, filling) {
                shared.fs.note_no_room(&file);
                shared.forget_attributes(file.ino());
            }
            match stale {
                Some((shared, blocking, file)) if file.is_cached_in_front() => {
                    blocking.run(move || {
                        let ino = file.ino();
                        let forgot = shared.channel.forget_pages(ino, offset, u64::from(size));
                        log::trace!("inode {ino}: {forgot:?}");
                        reply.written(result);
                    });
                }
                _ => reply.written(result),
            }
        });
        shared.fs.write(&file, offset, data, direct, flags, done);
        Ok(())
    }

    pub(super) fn flush(mut self) -> Parsed {
        let file = self.shared.file(self.args.u64()?);
        self.reply
            .empty(file.and_then(|file| self.shared.fs.flush(&file)));
        Ok(())
    }

    pub(super) fn release(mut self) -> Parsed {
        let file = self.shared.handles.remove(self.args.u64()?);
        let released = file.map(|file| self.shared.fs.release(&file));
        self.reply.empty(released.ok_or(Errno::BADF));
        Ok(())
    }

    pub(super) fn fsync(mut self) -> Parsed {
        let (handle, flags) = (self.args.u64()?, self.args.u32()?);
        let (shared, reply) = (Arc::clone(self.shared), self.reply);
        self.blocking.run(move || {
            let file = shared.file(handle);
            let datasync = flags & FSYNC_DATA != 0;
            reply.empty(file.and_then(|file| shared.fs.fsync(&file, datasync)));
        });
        Ok(())
    }

    pub(super) fn fsyncdir(self) -> Parsed {
        let (shared, reply, ino) = (Arc::clone(self.shared), self.reply, self.header.nodeid);
        self.blocking
            .run(move || reply.empty(shared.fs.fsync_dir(ino)));
        Ok(())
    }

    /// syncfs(2), where the kernel passes it on.
    pub(super) fn syncfs(self) -> Parsed {
        let (shared, reply) = (Arc::clone(self.shared), self.reply);
        self.blocking.run(move || {
            let since = trace::now();
            let synced = shared.fs.sync();
            trace::waited(Kind::Durable, since);
            reply.empty(synced);
        });
        Ok(())
    }

    pub(super) fn fallocate(mut self) -> Parsed {
        let (handle, offset, length) = (self.args.u64()?, self.args.u64()?, self.args.u64()?);
        let mode = self.args.u32()?.cast_signed();
        let cred = cred(&self.header, 0);
        let (shared, reply) = (Arc::clone(self.shared), self.reply);
        self.blocking.run(move || {
            let result = shared.file(handle).and_then(|file| {
                shared.drop_set_ids(&cred, &file)?;
                shared.fs.fallocate(&file, mode, offset, length)
            });
            reply.empty(result);
        });
        Ok(())
    }

    pub(super) fn lseek(mut self) -> Parsed {
        let (handle, offset) = (self.args.u64()?, self.args.u64()?);
        let whence = self.args.u32()?.cast_signed();
        let (shared, reply) = (Arc::clone(self.shared), self.reply);
        let in_range = offset <= i64::MAX.cast_unsigned();
        let file = match shared.file(handle) {
            Ok(file) if in_range => file,
            other => {
                reply.out(Err(other.err().unwrap_or(Errno::NXIO)));
                return Ok(());
            }
        };
        let kernel_may_be_ahead = file.has_writers();
        let seek = move || {
            if kernel_may_be_ahead {
                // What is written to the kernel's cache, or through a mapping, comes to us first.
                let sent = shared.channel.forget_pages(file.ino(), 0, TO_THE_END);
                log::trace!("inode {}: {sent:?}", file.ino());
            }
            let result = shared.fs.lseek(&file, offset, whence);
            reply.out(result.map(|at| Out::default().u64(at)));
        };
        if kernel_may_be_ahead {
            self.blocking.run(seek);
        } else {
            seek();
        }
        Ok(())
    }

    /// COPY_FILE_RANGE; `wide`: with a reply of 64 bits.
    pub(super) fn copy_file_range(mut self, wide: bool) -> Parsed {
        let (handle_in, offset_in) = (self.args.u64()?, self.args.u64()?);
        self.args.skip(8)?; // inode to write to
        let (handle_out, offset_out) = (self.args.u64()?, self.args.u64()?);
        let len = self.args.u64()?.min(COPY_BYTES_MAX);
        let cred = cred(&self.header, 0);
        let (shared, reply) = (Arc::clone(self.shared), self.reply);
        self.blocking.run(move || {
            let copied = shared.file(handle_in).and_then(|from| {
                let to = shared.file(handle_out)?;
                shared.drop_set_ids(&cred, &to)?;
                shared
                    .fs
                    .copy_file_range(&from, offset_in, &to, offset_out, len)
            });
            reply.out(copied.map(|copied| {
                if wide {
                    return Out::default().u64(copied);
                }
                let copied = u32::try_from(copied).unwrap_or(u32::MAX);
                Out::default().u32(copied).u32(0)
            }));
        });
        Ok(())
    }
}
