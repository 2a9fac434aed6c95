//! Names, flags and files without a name: the core without a mount, on simulated devices.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use braidfs::{
    Cred, Errno, FLAG_APPEND, FLAG_DIRSYNC, FLAG_IMMUTABLE, FLAG_NOATIME, FLAG_NODUMP, FLAG_SYNC,
    FileSystem, Ino, OpenFile, ROOT_INO, SetAttr, SetTime, Timestamp,
};
use braidfs_blockdev::device::sim::SimPower;
use braidfs_blockdev::{BlockDevice, SimDevice};
use common::*;

const RDWR: i32 = libc::O_RDWR;

fn set_size(size: u64) -> SetAttr {
    SetAttr {
        size: Some(size),
        ..SetAttr::default()
    }
}

fn set_mode(mode: u32) -> SetAttr {
    SetAttr {
        mode: Some(mode),
        ..SetAttr::default()
    }
}

fn set_times(time: SetTime) -> SetAttr {
    SetAttr {
        atime: Some(time),
        mtime: Some(time),
        ..SetAttr::default()
    }
}

const LONG_AGO: SetTime = SetTime::At(Timestamp { secs: 1, nanos: 2 });

fn file_with(fs: &FileSystem, dir: Ino, name: &str, bytes: &[u8]) -> Arc<OpenFile> {
    let file = create(fs, dir, name);
    write(fs, &file, 0, bytes);
    file
}

#[test]
fn nothing_changes_an_immutable_file() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = file_with(&fs, ROOT_INO, "f", b"kept");
    let ino = file.ino();
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    fs.set_flags(ino, FLAG_IMMUTABLE, &CRED).unwrap();
    let before = fs.getattr(ino).unwrap();
    let no = Err(Errno::PERM);
    // Also not through a descriptor that was open before.
    assert_eq!(try_write(&fs, &file, 0, b"new", false), no.map(|()| 0));
    assert_eq!(fs.fallocate(&file, 0, 0, 10), no);
    assert_eq!(fs.open(ino, RDWR).map(|_| ()), no);
    assert_eq!(fs.open(ino, libc::O_TRUNC).map(|_| ()), no);
    for set in [
        set_size(0),
        set_mode(0o600),
        set_times(SetTime::Now),
        set_times(LONG_AGO),
    ] {
        assert_eq!(fs.setattr(ino, &set, &CRED).map(|_| ()), no, "{set:?}");
    }
    assert_eq!(fs.setxattr(ino, b"user.x", b"1", 0, false), no);
    assert_eq!(fs.removexattr(ino, b"user.x"), no);
    assert_eq!(fs.link(ino, dir, b"g").map(|_| ()), no);
    assert_eq!(fs.unlink(ROOT_INO, b"f"), no);
    assert_eq!(fs.rename(ROOT_INO, b"f", dir, b"g", 0, &CRED), no);
    create(&fs, dir, "g");
    assert_eq!(fs.rename(dir, b"g", ROOT_INO, b"f", 0, &CRED), no);
    let exchange = libc::RENAME_EXCHANGE;
    assert_eq!(fs.rename(dir, b"g", ROOT_INO, b"f", exchange, &CRED), no);
    assert_eq!(fs.set_flags(ino, FLAG_IMMUTABLE | FLAG_NODUMP, &CRED), no);
    assert_eq!(fs.getattr(ino).unwrap(), before);
    fs.unmount().unwrap();
    check(&devices);

    let fs = mount(&devices);
    assert_eq!(fs.flags(ino), Ok(FLAG_IMMUTABLE));
    let file = fs.open(ino, libc::O_RDONLY).unwrap();
    assert_eq!(read(&fs, &file, 0, 10), b"kept");
    fs.set_flags(ino, 0, &CRED).unwrap();
    fs.unlink(ROOT_INO, b"f").unwrap();
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn an_append_only_file_grows_and_does_no_more() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let before = file_with(&fs, ROOT_INO, "f", b"one");
    let ino = before.ino();
    fs.set_flags(ino, FLAG_APPEND, &CRED).unwrap();
    let no = Err(Errno::PERM);
    let append = libc::O_WRONLY | libc::O_APPEND;
    let file = fs.open(ino, append).unwrap();
    write(&fs, &file, 3, b"two");
    assert_eq!(fs.open(ino, RDWR).map(|_| ()), no);
    assert_eq!(fs.open(ino, append | libc::O_TRUNC).map(|_| ()), no);
    for set in [set_size(0), set_size(100), set_mode(0o600)] {
        assert_eq!(fs.setattr(ino, &set, &CRED).map(|_| ()), no, "{set:?}");
    }
    assert_eq!(fs.setattr(ino, &set_times(LONG_AGO), &CRED).map(|_| ()), no);
    fs.setattr(ino, &set_times(SetTime::Now), &CRED).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fs.fallocate(&file, punch, 0, 3), no);
    fs.fallocate(&file, 0, 0, 10).unwrap();
    assert_eq!(fs.setxattr(ino, b"user.x", b"1", 0, false), no);
    assert_eq!(fs.link(ino, ROOT_INO, b"g").map(|_| ()), no);
    assert_eq!(fs.unlink(ROOT_INO, b"f"), no);
    assert_eq!(fs.rename(ROOT_INO, b"f", ROOT_INO, b"g", 0, &CRED), no);
    // Who had it open before goes on.
    write(&fs, &before, 0, b"ONE");
    assert_eq!(read(&fs, &file, 0, 6), b"ONEtwo");
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn directories_that_are_immutable_or_append_only() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    for name in ["f", "g"] {
        create(&fs, dir, name);
    }
    fs.mkdir(dir, b"sub", 0o755, &CRED).unwrap();
    let other = create(&fs, ROOT_INO, "other");
    let no = Err(Errno::PERM);
    for flag in [FLAG_IMMUTABLE, FLAG_APPEND] {
        fs.set_flags(dir, flag, &CRED).unwrap();
        assert_eq!(fs.unlink(dir, b"f"), no);
        assert_eq!(fs.rmdir(dir, b"sub"), no);
        assert_eq!(fs.rename(dir, b"f", dir, b"h", 0, &CRED), no);
        assert_eq!(fs.rename(dir, b"f", ROOT_INO, b"h", 0, &CRED), no);
        assert_eq!(fs.rename(ROOT_INO, b"other", dir, b"f", 0, &CRED), no);
        assert_eq!(fs.rmdir(ROOT_INO, b"d"), no);
        assert_eq!(fs.rename(ROOT_INO, b"d", ROOT_INO, b"e", 0, &CRED), no);
        let may_add = if flag == FLAG_APPEND { Ok(()) } else { no };
        let flags = libc::O_CREAT | RDWR;
        assert_eq!(
            fs.create(dir, b"f", 0o644, flags, &CRED).map(|_| ()),
            Err(Errno::EXIST)
        );
        assert_eq!(
            fs.create(dir, b"new", 0o644, flags, &CRED).map(|_| ()),
            may_add
        );
        assert_eq!(fs.mkdir(dir, b"newdir", 0o755, &CRED).map(|_| ()), may_add);
        assert_eq!(
            fs.symlink(dir, b"newlink", b"x", &CRED).map(|_| ()),
            may_add
        );
        assert_eq!(fs.link(other.ino(), dir, b"link").map(|_| ()), may_add);
        assert_eq!(fs.tmpfile(dir, 0o600, RDWR, &CRED).map(|_| ()), may_add);
    }
    fs.rename(ROOT_INO, b"other", dir, b"moved", 0, &CRED)
        .unwrap();
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn who_may_set_which_flags_and_who_inherits_them() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let plain = Cred {
        capable_immutable: false,
        ..CRED
    };
    let stranger = Cred { uid: 7, ..CRED };
    let root = Cred { uid: 0, ..plain };
    let file = create(&fs, ROOT_INO, "f").ino();
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    assert_eq!(fs.set_flags(file, FLAG_APPEND, &plain), Err(Errno::PERM));
    assert_eq!(fs.set_flags(file, FLAG_APPEND, &root), Err(Errno::PERM));
    assert_eq!(fs.set_flags(file, FLAG_NODUMP, &stranger), Err(Errno::PERM));
    for unknown in [1, 4, 0x800, 0x8_0000, 0x80_0000, FLAG_DIRSYNC] {
        assert_eq!(fs.set_flags(file, unknown, &CRED), Err(Errno::NOTSUP));
    }
    let ctime = fs.getattr(file).unwrap().ctime;
    common::next_tick();
    fs.set_flags(file, FLAG_NODUMP, &plain).unwrap();
    let attr = fs.getattr(file).unwrap();
    assert!(attr.ctime > ctime && attr.flags == FLAG_NODUMP);
    let all = FLAG_SYNC | FLAG_DIRSYNC | FLAG_NODUMP | FLAG_NOATIME | 0x8000;
    fs.set_flags(dir, all | FLAG_APPEND, &CRED).unwrap();
    let sub = fs.mkdir(dir, b"sub", 0o755, &CRED).unwrap().ino;
    assert_eq!(fs.flags(sub), Ok(all));
    let file = create(&fs, dir, "f");
    assert_eq!(fs.flags(file.ino()), Ok(all & !FLAG_DIRSYNC));
    let link = fs.symlink(dir, b"l", b"x", &CRED).unwrap();
    assert_eq!(link.flags, FLAG_NODUMP | FLAG_NOATIME);
    fs.unmount().unwrap();
    check(&devices);
}

/// The file system as a power cut now would leave it.
fn cut(devices: &[Arc<SimDevice>]) -> Arc<FileSystem> {
    let power = SimPower::new();
    let wrecks: Vec<_> = (1..)
        .zip(devices)
        .map(|(nth, device)| SimDevice::from_image(device.name(), device.crash(nth), &power))
        .collect();
    mount(&wrecks)
}

#[test]
fn flags_make_changes_durable_at_once() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    let file = create(&fs, ROOT_INO, "f");
    let lazy = create(&fs, ROOT_INO, "lazy");
    fs.set_flags(dir, FLAG_DIRSYNC, &CRED).unwrap();
    fs.set_flags(file.ino(), FLAG_SYNC, &CRED).unwrap();
    let commits = fs.stats().txg.commits;
    write(&fs, &lazy, 0, b"not yet");
    assert_eq!(fs.stats().txg.commits, commits);
    write(&fs, &file, 0, b"bytes");
    let after = cut(&devices);
    assert_eq!(read(&after, &open(&after, "f"), 0, 10), b"bytes");
    after.unmount().unwrap();
    create(&fs, dir, "entry");
    fs.rename(dir, b"entry", ROOT_INO, b"moved", 0, &CRED)
        .unwrap();
    let after = cut(&devices);
    assert!(after.lookup(ROOT_INO, b"moved").is_ok());
    after.unmount().unwrap();
    fs.unmount().unwrap();
}

#[test]
fn a_file_without_a_name_gets_one_or_goes() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o2775, &CRED).unwrap().ino;
    fs.setattr(
        dir,
        &SetAttr {
            gid: Some(77),
            ..SetAttr::default()
        },
        &CRED,
    )
    .unwrap();
    let (attr, file) = fs.tmpfile(dir, 0o666, RDWR, &CRED).unwrap();
    assert_eq!(
        (attr.nlink, attr.mode, attr.gid),
        (0, libc::S_IFREG | 0o644, 77)
    );
    assert!(names(&fs, dir).is_empty());
    let bytes = pattern(1, 300_000);
    write(&fs, &file, 0, &bytes);
    fs.sync().unwrap();
    let linked = fs.link(attr.ino, ROOT_INO, b"f").unwrap();
    assert_eq!((linked.nlink, linked.ino), (1, attr.ino));
    fs.unlink(ROOT_INO, b"f").unwrap();
    // Deleted is not the same as never named.
    assert_eq!(
        fs.link(attr.ino, ROOT_INO, b"f").map(|_| ()),
        Err(Errno::NOENT)
    );
    let (attr, other) = fs.tmpfile(dir, 0o600, RDWR | libc::O_EXCL, &CRED).unwrap();
    assert_eq!(
        fs.link(attr.ino, ROOT_INO, b"f").map(|_| ()),
        Err(Errno::NOENT)
    );
    fs.release(&other);
    fs.forget(attr.ino, 1);
    let (attr, file) = fs.tmpfile(ROOT_INO, 0o600, RDWR, &CRED).unwrap();
    write(&fs, &file, 0, &bytes);
    fs.sync().unwrap();
    // A crash takes it away.
    let after = cut(&devices);
    after.sync().unwrap();
    after.unmount().unwrap();
    fs.link(attr.ino, ROOT_INO, b"g").unwrap();
    fs.sync().unwrap();
    let after = cut(&devices);
    assert!(read(&after, &open(&after, "g"), 0, bytes.len() + 1) == bytes);
    after.unmount().unwrap();
    assert_eq!(
        fs.tmpfile(file.ino(), 0o600, RDWR, &CRED).map(|_| ()),
        Err(Errno::NOTDIR)
    );
    fs.unmount().unwrap();
    let report = check(&devices);
    assert_eq!((report.inodes, report.orphans), (3, 0));
}

#[test]
fn a_name_keeps_its_place_in_a_listing() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    for name in ["a", "b", "c", "d"] {
        create(&fs, ROOT_INO, name);
    }
    let exchange = libc::RENAME_EXCHANGE;
    fs.rename(ROOT_INO, b"a", ROOT_INO, b"c", exchange, &CRED)
        .unwrap();
    assert_eq!(names(&fs, ROOT_INO), ["a", "b", "c", "d"]);
    fs.rename(ROOT_INO, b"d", ROOT_INO, b"b", 0, &CRED).unwrap();
    assert_eq!(names(&fs, ROOT_INO), ["a", "b", "c"]);
    let whiteout = libc::RENAME_WHITEOUT;
    fs.rename(ROOT_INO, b"a", ROOT_INO, b"e", whiteout, &CRED)
        .unwrap();
    assert_eq!(names(&fs, ROOT_INO), ["a", "b", "c", "e"]);
    let attr = fs.lookup(ROOT_INO, b"a").unwrap();
    assert_eq!((attr.mode, attr.rdev), (libc::S_IFCHR, 0));
    fs.rename(ROOT_INO, b"b", ROOT_INO, b"z", 0, &CRED).unwrap();
    assert_eq!(names(&fs, ROOT_INO), ["a", "z", "c", "e"]);
    assert_eq!(fs.lookup(ROOT_INO, b"b"), Err(Errno::NOENT));
    fs.unmount().unwrap();
    check(&devices);
}
