//! A small tree with something of everything, and looking at, and working on, whatever is found.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use braidfs_blockdev::SimDevice;

use crate::{
    Cred, Errno, FileSystem, Ino, MountOptions, OpenFile, ROOT_INO, SetAttr, WriteFlags, fsck,
};

use crate::scrub::ScrubOptions;

use super::volume::assemble;

pub(super) const CRED: Cred = Cred {
    uid: 0,
    gid: 0,
    umask: 0,
    pid: 1,
    capable_immutable: true,
};

/// Inodes that are looked at.
const INODES_MAX: usize = 300;
/// Entries that are looked at in one directory.
const ENTRIES_MAX: usize = 100;
/// Places that are read in one file.
const PLACES_MAX: usize = 20;
const READ_BYTES: usize = 64 << 10;
const SCRUB_TIME_MAX: Duration = Duration::from_secs(50);

pub(crate) fn options(read_only: bool) -> MountOptions {
    MountOptions {
        read_only,
        cache_bytes: crate::CACHE_BYTES_MIN,
        ..MountOptions::default()
    }
}

fn write(fs: &FileSystem, file: &Arc<OpenFile>, offset: u64, data: &[u8]) -> Result<u32, Errno> {
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result| sender.send(result).unwrap_or_default());
    fs.write(file, offset, data, false, WriteFlags::default(), done);
    receiver.recv().unwrap_or(Err(Errno::IO))
}

/// Makes the tree.
pub(super) fn make(fs: &FileSystem) -> Result<(), Errno> {
    let dir = fs.mkdir(ROOT_INO, b"dir", 0o755, &CRED)?.ino;
    let deep = fs.mkdir(dir, b"deep", 0o700, &CRED)?.ino;
    let (small, file) = fs.create(ROOT_INO, b"small", 0o644, libc::O_RDWR, &CRED)?;
    write(fs, &file, 0, b"hello, world")?;
    fs.link(small.ino, deep, b"other name")?;
    fs.setxattr(small.ino, b"user.short", b"value", 0, false)?;
    fs.setxattr(small.ino, b"user.long", &[7; 3000], 0, false)?;
    let (_, file) = fs.create(dir, b"big", 0o600, libc::O_RDWR, &CRED)?;
    for at in [0, 100_000, 1 << 30] {
        write(fs, &file, at, &[at.to_le_bytes()[1]; 50_000])?;
    }
    fs.fallocate(&file, 0, 2 << 20, 1 << 20)?;
    fs.symlink(dir, b"link", b"../small", &CRED)?;
    fs.mknod(dir, b"fifo", libc::S_IFIFO | 0o600, 0, &CRED)?;
    fs.mkdir(deep, b"empty", 0o755, &CRED)?;
    Ok(())
}

/// Looks at everything that can be reached, within bounds.
fn look(fs: &Arc<FileSystem>) -> Vec<(Ino, Vec<u8>)> {
    let mut entries = Vec::new();
    let mut seen = HashSet::from([ROOT_INO]);
    let mut todo = vec![ROOT_INO];
    while let Some(ino) = todo.pop() {
        let Ok(attr) = fs.getattr(ino) else { continue };
        let names = fs.listxattr(ino).unwrap_or_default();
        for name in names.split(|byte| *byte == 0).take(ENTRIES_MAX) {
            let _value = fs.getxattr(ino, name);
        }
        if attr.is_dir() {
            let mut found = Vec::new();
            let _listed = fs.readdir(ino, 0, &mut |entry| {
                found.push(entry.name.to_vec());
                found.len() < ENTRIES_MAX
            });
            for name in found {
                let Ok(child) = fs.lookup(ino, &name) else {
                    continue;
                };
                if seen.len() < INODES_MAX && seen.insert(child.ino) {
                    todo.push(child.ino);
                }
                entries.push((ino, name));
            }
        } else if attr.is_file() {
            read_places(fs, ino, attr.size);
        } else {
            let _target = fs.readlink(ino);
        }
    }
    entries
}

fn read_places(fs: &Arc<FileSystem>, ino: Ino, size: u64) {
    let Ok(file) = fs.open(ino, libc::O_RDONLY) else {
        return;
    };
    let _tail = fs.read_wait(&file, size.saturating_sub(1), READ_BYTES);
    let mut at = 0;
    for _ in 0..PLACES_MAX {
        let _bytes = fs.read_wait(&file, at, READ_BYTES);
        let Ok(hole) = fs.lseek(&file, at, libc::SEEK_HOLE) else {
            break;
        };
        let Ok(data) = fs.lseek(&file, hole, libc::SEEK_DATA) else {
            break;
        };
        at = data;
    }
    fs.release(&file);
}

/// Changes what was found: writes, truncates, renames, removes.
fn work(fs: &Arc<FileSystem>, entries: &[(Ino, Vec<u8>)]) {
    if let Ok((_, file)) = fs.create(ROOT_INO, b"fresh", 0o644, libc::O_RDWR, &CRED) {
        let _written = write(fs, &file, 0, &[1; 20_000]);
        fs.release(&file);
    }
    for (nth, (parent, name)) in entries.iter().enumerate() {
        let Ok(attr) = fs.lookup(*parent, name) else {
            continue;
        };
        if attr.is_file()
            && let Ok(file) = fs.open(attr.ino, libc::O_RDWR)
        {
            let _written = write(fs, &file, attr.size / 2, &[2; 9000]);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let _punched = fs.fallocate(&file, mode, 4096, 50_000);
            let set = SetAttr {
                size: Some(attr.size / 3),
                ..SetAttr::default()
            };
            let _cut = fs.setattr(attr.ino, &set, &CRED);
            fs.release(&file);
        }
        let _set = fs.setxattr(attr.ino, b"user.new", name, 0, false);
        let new_name = format!("moved-{nth}");
        let _moved = fs.rename(*parent, name, ROOT_INO, new_name.as_bytes(), 0, &CRED);
    }
    let _committed = fs.sync();
    for (nth, (parent, name)) in entries.iter().enumerate().rev() {
        let new_name = format!("moved-{nth}");
        for (parent, name) in [(*parent, &name[..]), (ROOT_INO, new_name.as_bytes())] {
            let _gone = fs.unlink(parent, name);
            let _gone = fs.rmdir(parent, name);
        }
    }
}

/// Checks a volume and looks at it, without writing.
fn try_reading(devices: &[Arc<SimDevice>]) {
    if let Ok(volume) = assemble(devices, true) {
        let _report = fsck::check(volume);
    }
    if let Ok(volume) = assemble(devices, true)
        && let Ok(fs) = FileSystem::mount(volume, options(true))
    {
        look(&fs);
        let _end = fs.unmount();
    }
}

/// Checks a volume, looks at it, works on it, and checks again, as far as it lets itself be.
pub(crate) fn try_everything(devices: &[Arc<SimDevice>]) {
    try_reading(devices);
    if let Ok(volume) = assemble(devices, false)
        && let Ok(fs) = FileSystem::mount(volume, options(false))
    {
        let entries = look(&fs);
        if fs.scrub_start(ScrubOptions::default()).is_ok() {
            assert!(
                fs.scrub_wait(SCRUB_TIME_MAX),
                "a small volume takes a scrub so long"
            );
        }
        work(&fs, &entries);
        let _end = fs.unmount();
    }
    if let Ok(volume) = assemble(devices, true) {
        let _report = fsck::check(volume);
    }
}
