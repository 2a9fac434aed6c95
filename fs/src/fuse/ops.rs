//! One short method per request: translate, call the core, translate back.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags,
    PollNotifier, RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
};

use super::attr::{bare_attr, cred, errno, set_time, timestamp};
use super::stats::{Opcode, Timer};
use super::{ACL_SUPPORTED, CacheMode, FrontEnd, Shared, data, dir, init};
use crate::{Attr, Errno, OpenFile, SetAttr, WriteFlags};

/// Largest piece of a copy_file_range in one request: its reply counts bytes in 32 bits, and the
/// caller is to be interruptible between pieces.
const COPY_BYTES_MAX: u64 = 256 << 20;

/// Owner of a request whose privileged side effects the kernel would not suppress.
const ROOT_UID: u32 = 0;

impl Shared {
    fn begin(&self, opcode: Opcode) -> Timer {
        self.stats.begin(opcode)
    }

    fn end_entry(&self, timer: Timer, result: Result<Attr, Errno>, reply: ReplyEntry) {
        let ok = result.is_ok();
        match result {
            Ok(attr) => {
                let generation = Generation(attr.generation);
                reply.entry(&self.options.timeout, &self.file_attr(&attr), generation);
            }
            Err(error) => reply.error(errno(error)),
        }
        self.stats.end(timer, ok);
    }

    fn end_attr(&self, timer: Timer, result: Result<Attr, Errno>, reply: ReplyAttr) {
        let ok = result.is_ok();
        match result {
            Ok(attr) => reply.attr(&self.options.timeout, &self.file_attr(&attr)),
            Err(error) => reply.error(errno(error)),
        }
        self.stats.end(timer, ok);
    }

    fn end_empty(&self, timer: Timer, result: Result<(), Errno>, reply: ReplyEmpty) {
        let ok = result.is_ok();
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
        self.stats.end(timer, ok);
    }

    fn end_xattr(
        &self,
        timer: Timer,
        result: Result<Vec<u8>, Errno>,
        size: u32,
        reply: ReplyXattr,
    ) {
        let ok = result.is_ok();
        match result {
            Ok(value) => match u32::try_from(value.len()) {
                Ok(len) if size == 0 => reply.size(len),
                Ok(len) if len <= size => reply.data(&value),
                _ => reply.error(errno(Errno::RANGE)),
            },
            Err(error) => reply.error(errno(error)),
        }
        self.stats.end(timer, ok);
    }

    /// The mode creation mask, where the kernel leaves it to us.
    fn umask(&self, umask: u32) -> u32 {
        if ACL_SUPPORTED { umask } else { 0 }
    }

    /// How an open file is to be treated by the kernel.
    fn open_flags(&self, flags: i32) -> FopenFlags {
        let mut open = match self.options.cache_mode {
            CacheMode::Direct => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            CacheMode::Kernel => FopenFlags::FOPEN_KEEP_CACHE,
        };
        // Only writers have errors to hear about when they close.
        if OpenFlags(flags).acc_mode() == OpenAccMode::O_RDONLY {
            open |= FopenFlags::FOPEN_NOFLUSH;
        }
        open
    }

    fn file(&self, fh: FileHandle) -> Result<Arc<OpenFile>, Errno> {
        self.handles.get(fh.0).ok_or(Errno::BADF)
    }

    /// open(2), with O_TRUNC, which the kernel leaves to us (ATOMIC_O_TRUNC).
    fn open(&self, request: &Request, ino: u64, flags: i32) -> Result<FileHandle, Errno> {
        let file = self.fs.open(ino, flags & !libc::O_TRUNC)?;
        if flags & libc::O_TRUNC != 0 {
            let kill_suidgid = request.uid() != ROOT_UID;
            let set = SetAttr {
                size: Some(0),
                kill_suidgid,
                ..SetAttr::default()
            };
            if let Err(error) = self.fs.setattr(ino, &set, &cred(request, 0)) {
                self.fs.release(&file);
                return Err(error);
            }
        }
        Ok(FileHandle(self.handles.insert(file)))
    }

    /// Whether a file has set-id bits, which most changes of its content take away.
    fn has_set_ids(&self, file: &OpenFile) -> bool {
        const SET_IDS: u32 = libc::S_ISUID | libc::S_ISGID;
        self.fs
            .getattr(file.ino())
            .is_ok_and(|attr| attr.mode & SET_IDS != 0)
    }

    /// Changes of content that are no WRITE carry no flag for it: an ordinary user's clear the
    /// set-id bits.
    fn drop_set_ids(&self, uid: u32, file: &OpenFile) -> Result<(), Errno> {
        if uid == ROOT_UID || !self.has_set_ids(file) {
            return Ok(());
        }
        let set = SetAttr {
            kill_suidgid: true,
            ..SetAttr::default()
        };
        self.fs.setattr(file.ino(), &set, &crate::Cred::default())?;
        self.forget_attributes(file.ino());
        Ok(())
    }
}

impl Filesystem for FrontEnd {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        init::negotiate(config, self.shared.options.cache_mode);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Lookup));
        let result = match name.as_bytes() {
            // Asked for by export operations (name_to_handle_at) for a directory itself.
            b"." => shared.fs.lookup_ino(parent.0),
            name => shared.fs.lookup(parent.0, name),
        };
        if result == Err(Errno::NOENT) && name != "." && name != ".." {
            // A name that does not exist, with a time for which that may be believed.
            let nothing = bare_attr(0, fuser::FileType::RegularFile);
            reply.entry(&shared.options.timeout, &nothing, Generation(0));
            return shared.stats.end(timer, true);
        }
        shared.end_entry(timer, result, reply);
    }

    fn forget(&self, _request: &Request, ino: INodeNo, count: u64) {
        let timer = self.shared.begin(Opcode::Forget);
        self.shared.fs.forget(ino.0, count);
        self.shared.stats.end(timer, true);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let timer = self.shared.begin(Opcode::Getattr);
        self.shared
            .end_attr(timer, self.shared.fs.getattr(ino.0), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let timer = self.shared.begin(Opcode::Setattr);
        // With HANDLE_KILLPRIV_V2 a change of owner always clears set-id bits, a change of size
        // that of a caller without CAP_FSETID (fuser does not pass the kernel's flag for it).
        let truncates = size.is_some() && request.uid() != ROOT_UID;
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            ctime: ctime.map(timestamp),
            kill_suidgid: truncates || uid.is_some() || gid.is_some(),
        };
        let result = self.shared.fs.setattr(ino.0, &set, &cred(request, 0));
        self.shared.end_attr(timer, result, reply);
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let timer = self.shared.begin(Opcode::Readlink);
        let result = self.shared.fs.readlink(ino.0);
        let ok = result.is_ok();
        match result {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        }
        self.shared.stats.end(timer, ok);
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Mknod));
        let cred = cred(request, shared.umask(umask));
        let result = shared
            .fs
            .mknod(parent.0, name.as_bytes(), mode, rdev, &cred);
        shared.end_entry(timer, result, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Mkdir));
        let cred = cred(request, shared.umask(umask));
        let result = shared.fs.mkdir(parent.0, name.as_bytes(), mode, &cred);
        shared.end_entry(timer, result, reply);
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let timer = self.shared.begin(Opcode::Unlink);
        let result = self.shared.fs.unlink(parent.0, name.as_bytes());
        self.shared.end_empty(timer, result, reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let timer = self.shared.begin(Opcode::Rmdir);
        let result = self.shared.fs.rmdir(parent.0, name.as_bytes());
        self.shared.end_empty(timer, result, reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Symlink));
        let target = target.as_os_str().as_bytes();
        let result = shared
            .fs
            .symlink(parent.0, name.as_bytes(), target, &cred(request, 0));
        shared.end_entry(timer, result, reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let timer = self.shared.begin(Opcode::Rename);
        let (from, to) = (name.as_bytes(), newname.as_bytes());
        let cred = cred(request, 0);
        let fs = &self.shared.fs;
        let result = fs.rename(parent.0, from, newparent.0, to, flags.bits(), &cred);
        self.shared.end_empty(timer, result, reply);
    }

    fn link(
        &self,
        _request: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let timer = self.shared.begin(Opcode::Link);
        let result = self.shared.fs.link(ino.0, newparent.0, newname.as_bytes());
        self.shared.end_entry(timer, result, reply);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Open));
        let result = shared.open(request, ino.0, flags.0);
        let ok = result.is_ok();
        match result {
            Ok(handle) => reply.opened(handle, shared.open_flags(flags.0)),
            Err(error) => reply.error(errno(error)),
        }
        shared.stats.end(timer, ok);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Create));
        let cred = cred(request, shared.umask(umask));
        let result = shared
            .fs
            .create(parent.0, name.as_bytes(), mode, flags, &cred);
        let ok = result.is_ok();
        match result {
            Ok((attr, file)) => {
                let handle = FileHandle(shared.handles.insert(file));
                let generation = Generation(attr.generation);
                let (attr, open) = (shared.file_attr(&attr), shared.open_flags(flags));
                reply.created(&shared.options.timeout, &attr, generation, handle, open);
            }
            Err(error) => reply.error(errno(error)),
        }
        shared.stats.end(timer, ok);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let timer = self.shared.begin(Opcode::Read);
        let shared = Arc::clone(&self.shared);
        let file = match shared.file(fh) {
            Ok(file) => file,
            Err(error) => return data::answer_read(&shared, timer, Err(error), reply),
        };
        let direct = flags.0 & libc::O_DIRECT != 0;
        let done = move |result| data::answer_read(&shared, timer, result, reply);
        self.shared
            .fs
            .read(&file, offset, size as usize, direct, Box::new(done));
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: fuser::WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let timer = self.shared.begin(Opcode::Write);
        let shared = Arc::clone(&self.shared);
        let file = match shared.file(fh) {
            Ok(file) => file,
            Err(error) => return data::answer_write(&shared, timer, Err(error), reply),
        };
        let cached = write_flags.contains(fuser::WriteFlags::FUSE_WRITE_CACHE);
        let direct = !cached && flags.0 & libc::O_DIRECT != 0;
        let write_flags = WriteFlags {
            kill_suidgid: write_flags.contains(fuser::WriteFlags::FUSE_WRITE_KILL_SUIDGID),
            // Pages of a shared mapping come with this flag in either mode, but only with its
            // write-back cache does the kernel keep size and times itself.
            from_kernel_cache: cached && shared.options.cache_mode == CacheMode::Kernel,
        };
        let set_ids_go = write_flags.kill_suidgid && shared.has_set_ids(&file);
        let ino = file.ino();
        let done = move |result| {
            if set_ids_go {
                shared.forget_attributes(ino);
            }
            data::answer_write(&shared, timer, result, reply);
        };
        self.shared
            .fs
            .write(&file, offset, data, direct, write_flags, Box::new(done));
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Flush));
        let result = shared.file(fh).and_then(|file| shared.fs.flush(&file));
        shared.end_empty(timer, result, reply);
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Release));
        let file = shared.handles.remove(fh.0).ok_or(Errno::BADF);
        let result = file.map(|file| shared.fs.release(&file));
        shared.end_empty(timer, result, reply);
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let (shared, timer) = (Arc::clone(&self.shared), self.shared.begin(Opcode::Fsync));
        self.blocking.run(move || {
            let result = shared
                .file(fh)
                .and_then(|file| shared.fs.fsync(&file, datasync));
            shared.end_empty(timer, result, reply);
        });
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let (shared, timer) = (
            Arc::clone(&self.shared),
            self.shared.begin(Opcode::Fsyncdir),
        );
        self.blocking.run(move || {
            shared.end_empty(timer, shared.fs.fsync_dir(ino.0), reply);
        });
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let timer = self.shared.begin(Opcode::Readdir);
        let result = dir::list(&self.shared, ino.0, offset, &mut reply);
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
        self.shared.stats.end(timer, result.is_ok());
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let timer = self.shared.begin(Opcode::Readdirplus);
        let result = dir::list_plus(&self.shared, ino.0, offset, &mut reply);
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
        self.shared.stats.end(timer, result.is_ok());
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let timer = self.shared.begin(Opcode::Statfs);
        let s = self.shared.fs.statfs();
        reply.statfs(
            s.blocks, s.bfree, s.bavail, s.files, s.ffree, s.bsize, s.namelen, s.bsize,
        );
        self.shared.stats.end(timer, true);
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let timer = self.shared.begin(Opcode::Setxattr);
        // Without SETXATTR_EXT the kernel cannot ask for the set-group-id bit to be cleared.
        let result = self
            .shared
            .fs
            .setxattr(ino.0, name.as_bytes(), value, flags, false);
        self.shared.end_empty(timer, result, reply);
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let timer = self.shared.begin(Opcode::Getxattr);
        let result = self.shared.fs.getxattr(ino.0, name.as_bytes());
        self.shared.end_xattr(timer, result, size, reply);
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let timer = self.shared.begin(Opcode::Listxattr);
        self.shared
            .end_xattr(timer, self.shared.fs.listxattr(ino.0), size, reply);
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let timer = self.shared.begin(Opcode::Removexattr);
        let result = self.shared.fs.removexattr(ino.0, name.as_bytes());
        self.shared.end_empty(timer, result, reply);
    }

    fn fallocate(
        &self,
        request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (shared, timer) = (
            Arc::clone(&self.shared),
            self.shared.begin(Opcode::Fallocate),
        );
        let uid = request.uid();
        self.blocking.run(move || {
            let result = shared.file(fh).and_then(|file| {
                shared.drop_set_ids(uid, &file)?;
                shared.fs.fallocate(&file, mode, offset, length)
            });
            shared.end_empty(timer, result, reply);
        });
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (shared, timer) = (&self.shared, self.shared.begin(Opcode::Lseek));
        let result = shared.file(fh).and_then(|file| {
            let offset = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
            let found = shared.fs.lseek(&file, offset, whence)?;
            i64::try_from(found).map_err(|_| Errno::FBIG)
        });
        match result {
            Ok(found) => reply.offset(found),
            Err(error) => reply.error(errno(error)),
        }
        shared.stats.end(timer, result.is_ok());
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (shared, timer) = (
            Arc::clone(&self.shared),
            self.shared.begin(Opcode::CopyFileRange),
        );
        let uid = request.uid();
        self.blocking.run(move || {
            let result = shared.file(fh_in).and_then(|from| {
                let to = shared.file(fh_out)?;
                shared.drop_set_ids(uid, &to)?;
                let len = len.min(COPY_BYTES_MAX);
                let copied = shared
                    .fs
                    .copy_file_range(&from, offset_in, &to, offset_out, len)?;
                u32::try_from(copied).map_err(|_| Errno::IO)
            });
            match result {
                Ok(copied) => reply.written(copied),
                Err(error) => reply.error(errno(error)),
            }
            shared.stats.end(timer, result.is_ok());
        });
    }

    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        let timer = self.shared.begin(Opcode::Ioctl);
        reply.error(fuser::Errno::ENOTTY);
        self.shared.stats.end(timer, false);
    }

    // ENOSYS to these makes the kernel do without them from then on.

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _notifier: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn bmap(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _blocksize: u32,
        _idx: u64,
        reply: ReplyBmap,
    ) {
        reply.error(fuser::Errno::ENOSYS);
    }
}
