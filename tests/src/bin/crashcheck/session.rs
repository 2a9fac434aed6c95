//! Does steps to a file system, as a kernel would: looks names up, forgets inodes again.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use braidfs::{Cred, Errno, FileSystem, Ino, OpenFile, ROOT_INO, SetAttr, WriteFlags};

use crate::ops::Step;

pub const CRED: Cred = Cred {
    uid: 1000,
    gid: 1000,
    umask: 0o022,
    pid: 1,
    capable_immutable: true,
};

/// Nothing here may wait longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a step promised when it returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    Nothing,
    /// All that was done before is durable.
    All,
    /// What was done to this inode is.
    Inode(Ino),
}

/// One user of a file system. When it goes, the file system goes, too, as in a power cut.
pub struct Session {
    pub fs: Arc<FileSystem>,
    held: Vec<Arc<OpenFile>>,
    /// How many steps were done: each writes bytes of its own.
    done: u64,
}

/// Bytes that tell which step wrote them; none is zero, so that a lost byte shows.
pub fn bytes_of(step: u64, len: usize) -> Vec<u8> {
    let mut state = step;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (mixed ^ (mixed >> 32)) | 0x0101_0101_0101_0101;
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(len);
    out
}

pub fn write(
    fs: &FileSystem,
    file: &Arc<OpenFile>,
    offset: u64,
    data: &[u8],
    direct: bool,
    flags: WriteFlags,
) -> Result<(), Errno> {
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result| sender.send(result).expect("somebody waits"));
    fs.write(file, offset, data, direct, flags, done);
    let written = receiver.recv_timeout(PATIENCE).map_err(|_| Errno::IO)??;
    if written as usize == data.len() {
        Ok(())
    } else {
        Err(Errno::NOSPC)
    }
}

pub fn read(
    fs: &FileSystem,
    file: &Arc<OpenFile>,
    offset: u64,
    len: usize,
) -> Result<Vec<u8>, Errno> {
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result: Result<braidfs::ReadReply, Errno>| {
        let bytes = result.map(|reply| reply.slices().collect::<Vec<_>>().concat());
        sender.send(bytes).expect("somebody waits");
    });
    fs.read(file, offset, len, false, done);
    receiver.recv_timeout(PATIENCE).map_err(|_| Errno::IO)?
}

/// The inode of a path. What the look-up counted is taken back at once.
pub fn resolve(fs: &FileSystem, path: &str) -> Result<Ino, Errno> {
    let mut at = ROOT_INO;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        at = fs.lookup(at, name.as_bytes())?.ino;
        fs.forget(at, 1);
    }
    Ok(at)
}

/// The directory of a path, and its last name.
fn parent_of<'a>(fs: &FileSystem, path: &'a str) -> Result<(Ino, &'a [u8]), Errno> {
    let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
    Ok((resolve(fs, dir)?, name.as_bytes()))
}

impl Session {
    pub fn new(fs: Arc<FileSystem>) -> Session {
        Session {
            fs,
            held: Vec::new(),
            done: 0,
        }
    }

    fn with_file<R>(
        &self,
        path: &str,
        action: impl FnOnce(&Arc<OpenFile>) -> Result<R, Errno>,
    ) -> Result<R, Errno> {
        let file = self.fs.open(resolve(&self.fs, path)?, libc::O_RDWR)?;
        let result = action(&file);
        self.fs.release(&file);
        result
    }

    fn write(&self, path: &str, offset: u64, len: usize, direct: bool) -> Result<(), Errno> {
        let bytes = bytes_of(self.done, len);
        let flags = WriteFlags::default();
        self.with_file(path, |file| {
            write(&self.fs, file, offset, &bytes, direct, flags)
        })
    }

    fn last_held(&self) -> Result<&Arc<OpenFile>, Errno> {
        self.held.last().ok_or(Errno(libc::EBADF))
    }

    /// Does one step.
    pub fn apply(&mut self, step: Step) -> Result<Promise, Errno> {
        self.done += 1;
        let fs = Arc::clone(&self.fs);
        match step {
            Step::Fsync(path) => {
                let ino = resolve(&fs, path)?;
                if fs.getattr(ino)?.is_dir() {
                    fs.fsync_dir(ino)?;
                } else {
                    self.with_file(path, |file| fs.fsync(file, false))?;
                }
                return Ok(Promise::Inode(ino));
            }
            Step::FsyncHeld => {
                let file = self.last_held()?;
                fs.fsync(file, false)?;
                return Ok(Promise::Inode(file.ino()));
            }
            Step::Durable(path, at, len) => {
                let bytes = bytes_of(self.done, len);
                let flags = WriteFlags {
                    durable: true,
                    ..WriteFlags::default()
                };
                self.with_file(path, |file| write(&fs, file, at, &bytes, false, flags))?;
                return Ok(Promise::Inode(resolve(&fs, path)?));
            }
            Step::Sync => {
                fs.sync()?;
                return Ok(Promise::All);
            }
            Step::Commit => fs.sync()?,
            Step::Hold(path) => {
                let file = fs.open(resolve(&fs, path)?, libc::O_RDWR)?;
                self.held.push(file);
            }
            Step::Tmpfile(dir) => {
                let dir = resolve(&fs, dir)?;
                let (attr, file) = fs.tmpfile(dir, 0o600, libc::O_RDWR, &CRED)?;
                fs.forget(attr.ino, 1);
                self.held.push(file);
            }
            Step::WriteHeld(at, len) => {
                let bytes = bytes_of(self.done, len);
                write(
                    &fs,
                    self.last_held()?,
                    at,
                    &bytes,
                    false,
                    WriteFlags::default(),
                )?;
            }
            Step::LinkHeld(path) => {
                let (dir, name) = parent_of(&fs, path)?;
                let attr = fs.link(self.last_held()?.ino(), dir, name)?;
                fs.forget(attr.ino, 1);
            }
            Step::Write(path, at, len) => self.write(path, at, len, false)?,
            Step::Direct(path, at, len) => self.write(path, at, len, true)?,
            Step::Append(path, len) => {
                let size = fs.getattr(resolve(&fs, path)?)?.size;
                self.write(path, size, len, false)?;
            }
            Step::Truncate(path, size) => {
                let set = SetAttr {
                    size: Some(size),
                    ..SetAttr::default()
                };
                fs.setattr(resolve(&fs, path)?, &set, &CRED)?;
            }
            Step::Chmod(path, mode) => {
                let set = SetAttr {
                    mode: Some(mode),
                    ..SetAttr::default()
                };
                fs.setattr(resolve(&fs, path)?, &set, &CRED)?;
            }
            Step::Fallocate(path, mode, at, len) => {
                self.with_file(path, |file| fs.fallocate(file, mode, at, len))?;
            }
            Step::Copy(from, to, at, len) => self.copy(from, to, at, len)?,
            named => self.apply_to_names(named)?,
        }
        Ok(Promise::Nothing)
    }

    fn copy(&self, from: &str, to: &str, at: u64, len: u64) -> Result<(), Errno> {
        let copied = self.with_file(from, |from| {
            self.with_file(to, |to| self.fs.copy_file_range(from, 0, to, at, len))
        })?;
        // Nothing to copy: a workload that is the same without it.
        if copied == 0 {
            Err(Errno(libc::ENODATA))
        } else {
            Ok(())
        }
    }

    fn apply_to_names(&self, step: Step) -> Result<(), Errno> {
        let fs = &self.fs;
        let attr = match step {
            Step::Create(path) => {
                let (dir, name) = parent_of(fs, path)?;
                // As the kernel does before it creates.
                if fs
                    .lookup(dir, name)
                    .inspect(|attr| fs.forget(attr.ino, 1))
                    .is_ok()
                {
                    return Err(Errno::EXIST);
                }
                let flags = libc::O_RDWR | libc::O_CREAT;
                let (attr, file) = fs.create(dir, name, 0o644, flags, &CRED)?;
                fs.release(&file);
                attr
            }
            Step::Mkdir(path) => {
                let (dir, name) = parent_of(fs, path)?;
                fs.mkdir(dir, name, 0o755, &CRED)?
            }
            Step::Fifo(path) => {
                let (dir, name) = parent_of(fs, path)?;
                fs.mknod(dir, name, libc::S_IFIFO | 0o644, 0, &CRED)?
            }
            Step::Symlink(path) => {
                let (dir, name) = parent_of(fs, path)?;
                fs.symlink(dir, name, b"a/long/way/off", &CRED)?
            }
            Step::Link(from, to) => {
                let (dir, name) = parent_of(fs, to)?;
                fs.link(resolve(fs, from)?, dir, name)?
            }
            Step::Rename(from, to, flags) => {
                let ((dir, name), (new_dir, new)) = (parent_of(fs, from)?, parent_of(fs, to)?);
                return fs.rename(dir, name, new_dir, new, flags, &CRED);
            }
            Step::Unlink(path) => {
                let (dir, name) = parent_of(fs, path)?;
                return fs.unlink(dir, name);
            }
            Step::Rmdir(path) => {
                let (dir, name) = parent_of(fs, path)?;
                return fs.rmdir(dir, name);
            }
            Step::SetXattr(path, name, len) => {
                let (ino, value) = (resolve(fs, path)?, bytes_of(self.done, len));
                return fs.setxattr(ino, name.as_bytes(), &value, 0, false);
            }
            Step::RemoveXattr(path, name) => {
                return fs.removexattr(resolve(fs, path)?, name.as_bytes());
            }
            _ => unreachable!("`apply` does the others"),
        };
        fs.forget(attr.ino, 1);
        Ok(())
    }
}

/// A file system that is let go without being unmounted.
pub struct Abandoned(pub Arc<FileSystem>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.held.clear();
        self.fs.abandon();
    }
}
