//! What changes besides what was asked for: set-id bits, capabilities, access lists, times, link
//! counts. The core without a mount, on simulated devices.
#![allow(missing_docs)]

mod common;

use std::sync::mpsc::sync_channel;

use braidfs::{
    AtimeMode, Attr, Errno, FLAG_APPEND, FLAG_IMMUTABLE, FileSystem, Ino, MountOptions, ROOT_INO,
    SetAttr, SetTime, Timestamp, WriteFlags,
};
use common::*;

const SUID: u32 = libc::S_ISUID;
const SGID: u32 = libc::S_ISGID;
const CAPABILITY: &[u8] = b"security.capability";
const LONG_AGO: Timestamp = Timestamp { secs: 1, nanos: 2 };

fn write_as(fs: &FileSystem, file: &std::sync::Arc<braidfs::OpenFile>, flags: WriteFlags) {
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result| sender.send(result).expect("the test waits"));
    fs.write(file, 0, &b"bytes"[..], false, flags, done);
    assert_eq!(receiver.recv().expect("the write ends"), Ok(5));
}

fn set_mode(fs: &FileSystem, ino: Ino, mode: u32) {
    let set = SetAttr {
        mode: Some(mode),
        ..SetAttr::default()
    };
    fs.setattr(ino, &set, &CRED).expect("chmod");
}

fn mode(fs: &FileSystem, ino: Ino) -> u32 {
    fs.getattr(ino).expect("getattr").mode & 0o7777
}

/// Sets mtime and ctime far back, so that the next change of either shows.
fn age(fs: &FileSystem, inos: &[Ino]) {
    for &ino in inos {
        let set = SetAttr {
            mtime: Some(SetTime::At(LONG_AGO)),
            ..SetAttr::default()
        };
        fs.setattr(ino, &set, &CRED).expect("utimens");
    }
    common::next_tick();
}

/// Which of mtime and ctime an operation changes, for each of the inodes.
fn touched(fs: &FileSystem, inos: &[Ino], operation: impl FnOnce()) -> Vec<(bool, bool)> {
    age(fs, inos);
    let before: Vec<Attr> = inos.iter().map(|&ino| fs.getattr(ino).unwrap()).collect();
    operation();
    let differs = |before: &Attr| {
        let after = fs.getattr(before.ino).unwrap();
        (after.mtime != before.mtime, after.ctime != before.ctime)
    };
    before.iter().map(differs).collect()
}

#[test]
fn set_id_bits_go_as_the_kernel_asks() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let ino = file.ino();
    let kill = SetAttr {
        kill_suidgid: true,
        ..SetAttr::default()
    };
    let truncate = SetAttr {
        size: Some(2),
        ..kill
    };
    let chown = SetAttr {
        gid: Some(9),
        ..kill
    };
    let killing = WriteFlags {
        kill_suidgid: true,
        ..WriteFlags::default()
    };
    let cases = [
        (SUID | SGID | 0o755, 0o755),
        // Without group execute permission the set-group-id bit means something else.
        (SUID | SGID | 0o745, SGID | 0o745),
        (SUID | 0o600, 0o600),
    ];
    for (before, after) in cases {
        for set in [kill, truncate, chown] {
            set_mode(&fs, ino, before);
            fs.setattr(ino, &set, &CRED).unwrap();
            assert_eq!(mode(&fs, ino), after, "{set:?}");
        }
        set_mode(&fs, ino, before);
        write_as(&fs, &file, WriteFlags::default());
        assert_eq!(mode(&fs, ino), before, "the writer may keep them");
        write_as(&fs, &file, killing);
        assert_eq!(mode(&fs, ino), after);
    }
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    set_mode(&fs, dir, SUID | SGID | 0o777);
    fs.setattr(dir, &chown, &CRED).unwrap();
    assert_eq!(mode(&fs, dir), SUID | SGID | 0o777);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn file_capabilities_go_with_every_change_of_content_or_owner() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let ino = file.ino();
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    let grant = |ino| fs.setxattr(ino, CAPABILITY, b"cap", 0, false).unwrap();
    let has = |ino| fs.getxattr(ino, CAPABILITY).is_ok();
    let set = |ino, set: SetAttr| fs.setattr(ino, &set, &CRED).map(|_| ()).unwrap();
    let chown = SetAttr {
        uid: Some(5),
        ..SetAttr::default()
    };
    let cached = WriteFlags {
        from_kernel_cache: true,
        ..WriteFlags::default()
    };
    for _ in 0..2 {
        grant(ino);
        // Written before the capabilities were granted, or the kernel has taken them away itself.
        write_as(&fs, &file, cached);
        assert!(has(ino));
        write_as(&fs, &file, WriteFlags::default());
        assert!(!has(ino));
    }
    grant(ino);
    set_mode(&fs, ino, 0o700);
    fs.setxattr(ino, b"user.x", b"", 0, false).unwrap();
    assert!(has(ino), "neither content nor owner");
    set(ino, chown);
    assert!(!has(ino));
    grant(ino);
    set(
        ino,
        SetAttr {
            size: Some(1),
            ..SetAttr::default()
        },
    );
    assert!(!has(ino));
    grant(ino);
    fs.fallocate(&file, 0, 0, 10).unwrap();
    assert!(!has(ino));
    grant(ino);
    let bytes = vec![7; 128 << 10];
    assert_eq!(try_write(&fs, &file, 0, &bytes, true), Ok(128 << 10));
    assert!(!has(ino), "direct");
    grant(dir);
    set(dir, chown);
    assert!(has(dir), "directories have none to lose");
    // An inode that was not in memory.
    grant(ino);
    fs.unmount().unwrap();
    let fs = mount(&devices);
    let file = open(&fs, "f");
    assert_eq!(fs.getxattr(ino, CAPABILITY), Ok(b"cap".to_vec()));
    write_as(&fs, &file, WriteFlags::default());
    assert_eq!(fs.getxattr(ino, CAPABILITY), Err(Errno::NODATA));
    fs.unmount().unwrap();
    check(&devices);
}

/// An access list: version 2, then entries of tag, permissions and id.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&perm.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

#[test]
fn access_lists_mode_and_the_set_group_id_bit() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let ino = create(&fs, ROOT_INO, "f").ino();
    let name = b"system.posix_acl_access";
    let none = u32::MAX;
    let list = acl(&[
        (1, 7, none),
        (2, 6, 77),
        (4, 5, none),
        (16, 7, none),
        (32, 1, none),
    ]);
    set_mode(&fs, ino, SGID | 0o600);
    fs.setxattr(ino, name, &list, 0, false).unwrap();
    assert_eq!(mode(&fs, ino), SGID | 0o771);
    fs.setxattr(ino, name, &list, 0, true).unwrap();
    assert_eq!(mode(&fs, ino), 0o771);
    set_mode(&fs, ino, 0o640);
    let follows = acl(&[
        (1, 6, none),
        (2, 6, 77),
        (4, 5, none),
        (16, 4, none),
        (32, 0, none),
    ]);
    assert_eq!(fs.getxattr(ino, name), Ok(follows));
    fs.removexattr(ino, name).unwrap();
    assert_eq!(mode(&fs, ino), 0o640);
    // To have no list is what a second removal asks for.
    fs.removexattr(ino, name).unwrap();
    assert_eq!(fs.removexattr(ino, b"user.x"), Err(Errno::NODATA));

    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    set_mode(&fs, dir, SGID | 0o775);
    let chgrp = SetAttr {
        gid: Some(4242),
        ..SetAttr::default()
    };
    fs.setattr(dir, &chgrp, &CRED).unwrap();
    let sub = fs.mkdir(dir, b"sub", 0o777, &CRED).unwrap();
    assert_eq!((sub.mode & 0o7777, sub.gid), (SGID | 0o755, 4242));
    let file = fs.mknod(dir, b"f", 0o666, 0, &CRED).unwrap();
    assert_eq!((file.mode & 0o7777, file.gid), (0o644, 4242));
    let link = fs.symlink(dir, b"l", b"x", &CRED).unwrap();
    assert_eq!(link.gid, 4242);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn every_change_of_names_changes_the_right_times() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = |name: &[u8]| fs.mkdir(ROOT_INO, name, 0o755, &CRED).unwrap().ino;
    let (a, b) = (dir(b"a"), dir(b"b"));
    let file = create(&fs, a, "f").ino();
    let other = create(&fs, b, "g").ino();
    let all = [a, b, file, other];
    let (both, changed, none) = ((true, true), (false, true), (false, false));
    let rename = |from, name: &[u8], to, new: &[u8], flags| {
        fs.rename(from, name, to, new, flags, &CRED).unwrap();
    };
    let found = touched(&fs, &all, || rename(a, b"f", b, b"f", 0));
    assert_eq!(found, [both, both, changed, none]);
    let found = touched(&fs, &all, || rename(b, b"f", b, b"h", 0));
    assert_eq!(found, [none, both, changed, none]);
    let found = touched(&fs, &all, || {
        fs.link(file, a, b"l").unwrap();
    });
    assert_eq!(found, [both, none, changed, none]);
    let found = touched(&fs, &all, || rename(a, b"l", b, b"h", 0));
    assert_eq!(found, [none; 4], "two names of one inode stay");
    let found = touched(&fs, &all, || {
        rename(a, b"l", b, b"g", libc::RENAME_EXCHANGE);
    });
    assert_eq!(found, [both, both, changed, changed]);
    let found = touched(&fs, &all, || fs.unlink(b, b"h").unwrap());
    assert_eq!(found, [none, both, changed, none]);
    // Now a/l is `other`, b/g is `file`: replaced, and kept by a reference.
    let found = touched(&fs, &all, || rename(a, b"l", b, b"g", 0));
    assert_eq!(found, [both, both, changed, changed]);
    let found = touched(&fs, &all, || {
        rename(b, b"g", a, b"w", libc::RENAME_WHITEOUT)
    });
    assert_eq!(found, [both, both, none, changed]);
    let found = touched(&fs, &all, || {
        fs.setxattr(other, b"user.x", b"1", 0, false).unwrap();
    });
    assert_eq!(found, [none, none, none, changed]);
    let found = touched(&fs, &all, || fs.removexattr(other, b"user.x").unwrap());
    assert_eq!(found, [none, none, none, changed]);
    let found = touched(&fs, &all, || set_mode(&fs, other, 0o600));
    assert_eq!(found, [none, none, none, changed]);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn parents_and_link_counts_follow_directories() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = |parent, name: &[u8]| fs.mkdir(parent, name, 0o755, &CRED).unwrap().ino;
    let (a, b) = (dir(ROOT_INO, b"a"), dir(ROOT_INO, b"b"));
    let sub = dir(a, b"sub");
    let file = create(&fs, b, "f").ino();
    let links = |ino| fs.getattr(ino).unwrap().nlink;
    let parent = |ino| fs.lookup(ino, b"..").unwrap().ino;
    let rename =
        |from, name: &[u8], to, new: &[u8], flags| fs.rename(from, name, to, new, flags, &CRED);
    let exchange = libc::RENAME_EXCHANGE;
    assert_eq!((links(ROOT_INO), links(a), links(b)), (4, 3, 2));
    // A file and a directory change places.
    rename(a, b"sub", b, b"f", exchange).unwrap();
    assert_eq!((links(a), links(b), links(sub), links(file)), (2, 3, 2, 1));
    assert_eq!((parent(sub), parent(a)), (b, ROOT_INO));
    assert_eq!(fs.lookup(a, b"sub").unwrap().ino, file);
    // Two directories on different levels do.
    let deep = dir(sub, b"deep");
    rename(ROOT_INO, b"a", sub, b"deep", exchange).unwrap();
    assert_eq!((parent(a), parent(deep)), (sub, ROOT_INO));
    assert_eq!((links(ROOT_INO), links(sub)), (4, 3));
    // Over an empty directory.
    rename(ROOT_INO, b"a", b, b"f", 0).unwrap_err();
    assert_eq!(rename(ROOT_INO, b"a", b, b"f", 0), Err(Errno::NOTEMPTY));
    let empty = dir(b, b"empty");
    rename(ROOT_INO, b"a", b, b"empty", 0).unwrap();
    assert_eq!((links(ROOT_INO), links(b), links(empty)), (3, 4, 0));
    assert_eq!(parent(deep), b);
    // No directory below itself, neither way.
    assert_eq!(rename(ROOT_INO, b"b", sub, b"x", 0), Err(Errno::INVAL));
    assert_eq!(
        rename(ROOT_INO, b"b", sub, b"deep", exchange),
        Err(Errno::INVAL)
    );
    assert_eq!(
        rename(sub, b"deep", ROOT_INO, b"b", exchange),
        Err(Errno::INVAL)
    );
    assert_eq!(rename(sub, b"deep", b, b"f", 0), Err(Errno::NOTEMPTY));
    let noreplace = libc::RENAME_NOREPLACE;
    assert_eq!(rename(b, b"f", b, b"empty", noreplace), Err(Errno::EXIST));
    assert_eq!(rename(b, b"f", b, b"f", noreplace), Err(Errno::EXIST));
    assert_eq!(rename(b, b"f", b, b"nothing", exchange), Err(Errno::NOENT));
    assert_eq!(rename(b, b"nothing", b, b"f", 0), Err(Errno::NOENT));
    assert_eq!(
        rename(b, b"f", b, b"x", exchange | noreplace),
        Err(Errno::INVAL)
    );
    assert_eq!(rename(b, b"f", b, b"x", 1 << 9), Err(Errno::INVAL));
    create(&fs, b, "file");
    assert_eq!(rename(b, b"f", b, b"file", 0), Err(Errno::NOTDIR));
    assert_eq!(rename(b, b"file", b, b"f", 0), Err(Errno::ISDIR));
    assert_eq!(rename(empty, b"x", b, b"y", 0), Err(Errno::NOENT));
    assert_eq!(rename(b, b"file", empty, b"y", 0), Err(Errno::NOENT));
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn times_of_earlier_writes_may_come_after_a_flag_was_set() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let ino = file.ino();
    let flush = |time: Timestamp| SetAttr {
        mtime: Some(SetTime::At(time)),
        ctime: Some(time),
        ..SetAttr::default()
    };
    let written = Timestamp::now();
    common::next_tick();
    fs.set_flags(ino, FLAG_IMMUTABLE, &CRED).unwrap();
    let ctime = fs.getattr(ino).unwrap().ctime;
    let cached = WriteFlags {
        from_kernel_cache: true,
        ..WriteFlags::default()
    };
    write_as(&fs, &file, cached);
    let attr = fs.setattr(ino, &flush(written), &CRED).unwrap();
    assert_eq!((attr.mtime, attr.ctime), (written, ctime));
    // What comes later, or asks for more, is somebody's wish.
    let later = Timestamp {
        secs: ctime.secs + 1,
        ..ctime
    };
    let no = Err(Errno::PERM);
    let more = SetAttr {
        mode: Some(0o600),
        ..flush(written)
    };
    for set in [flush(later), more] {
        assert_eq!(fs.setattr(ino, &set, &CRED).map(|_| ()), no, "{set:?}");
    }
    // Unless a descriptor from before brings it: the kernel has taken the bytes.
    let open = SetAttr {
        from_kernel_cache: true,
        ..flush(later)
    };
    assert_eq!(fs.setattr(ino, &open, &CRED).unwrap().mtime, later);
    let more = SetAttr {
        from_kernel_cache: true,
        ..more
    };
    assert_eq!(fs.setattr(ino, &more, &CRED).map(|_| ()), no);
    // An append-only file is written to.
    fs.set_flags(ino, FLAG_APPEND, &CRED).unwrap();
    fs.setattr(ino, &flush(later), &CRED).unwrap();
    let touch = SetAttr {
        atime: Some(SetTime::Now),
        ..flush(later)
    };
    fs.setattr(ino, &touch, &CRED).unwrap();
    let back = SetAttr {
        atime: Some(SetTime::At(LONG_AGO)),
        ..flush(later)
    };
    assert_eq!(fs.setattr(ino, &back, &CRED).map(|_| ()), no);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn names_of_extended_attributes() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let ino = create(&fs, ROOT_INO, "f").ino();
    for name in [
        &b"user.a"[..],
        b"trusted.a",
        b"security.a",
        b"user.\xff\x01 ",
    ] {
        fs.setxattr(ino, name, b"", 0, false).unwrap();
        assert_eq!(fs.getxattr(ino, name), Ok(Vec::new()));
    }
    for name in [
        &b"user"[..],
        b"other.a",
        b"system.a",
        b"system.posix_acl",
        b"a",
    ] {
        let unknown = Errno::NOTSUP;
        assert_eq!(fs.setxattr(ino, name, b"", 0, false), Err(unknown));
        assert_eq!(fs.getxattr(ino, name), Err(unknown));
        assert_eq!(fs.removexattr(ino, name), Err(unknown));
    }
    assert_eq!(fs.setxattr(ino, b"user.", b"", 0, false), Err(Errno::INVAL));
    let long = |len: usize| [&b"user."[..], &vec![b'x'; len - 5]].concat();
    fs.setxattr(ino, &long(255), b"1", 0, false).unwrap();
    assert_eq!(
        fs.setxattr(ino, &long(256), b"1", 0, false),
        Err(Errno::RANGE)
    );
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn access_times_wait_for_a_commit_and_are_not_lost() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "file");
    write(&fs, &file, 0, b"bytes");
    let dir = fs.mkdir(ROOT_INO, b"dir", 0o755, &CRED).expect("mkdir").ino;
    let link = fs.symlink(ROOT_INO, b"link", b"file", &CRED);
    let inos = [file.ino(), dir, link.expect("symlink").ino];
    fs.sync().expect("sync");
    let (commits, before) = (fs.stats().txg.commits, times(&fs, &inos));
    next_tick();
    read(&fs, &file, 0, 5);
    names(&fs, dir);
    fs.readlink(inos[2]).expect("readlink");
    let read_once = times(&fs, &inos);
    for (before, after) in before.iter().zip(&read_once) {
        assert!(before < after);
    }
    next_tick();
    read(&fs, &file, 0, 5);
    names(&fs, dir);
    assert_eq!(times(&fs, &inos), read_once, "relatime: once");
    assert_eq!(
        fs.stats().txg.commits,
        commits,
        "no commit for an access time"
    );
    fs.release(&file);
    drop(file);
    fs.unmount().expect("unmount");
    drop(fs);

    let fs = mount(&devices);
    assert_eq!(times(&fs, &inos), read_once);
    fs.unmount().expect("unmount");
    drop(fs);
    let after_reading = |options: MountOptions, looked_at: &[Ino]| {
        let fs = mount_with(&devices, options);
        next_tick();
        let file = fs.open(inos[0], libc::O_RDONLY).expect("open");
        read(&fs, &file, 0, 5);
        fs.release(&file);
        names(&fs, dir);
        let after = times(&fs, looked_at);
        fs.unmount().expect("unmount");
        after
    };
    let strict = |read_only, nodiratime| MountOptions {
        atime: AtimeMode::Strictatime,
        read_only,
        nodiratime,
        ..options()
    };
    assert_eq!(after_reading(strict(true, false), &inos), read_once, "ro");
    assert_eq!(after_reading(strict(false, true), &[dir])[0], read_once[1]);
    assert!(after_reading(strict(false, false), &inos)[0] > read_once[0]);
    check(&devices);
}

#[test]
fn reading_at_the_end_of_a_file_is_an_access() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "file");
    let inos = [file.ino()];
    for size in [0, 5] {
        write(&fs, &file, 0, &vec![1; size]);
        let before = times(&fs, &inos);
        next_tick();
        assert_eq!(try_read(&fs, &file, 9, 0, false), Ok(Vec::new()));
        assert_eq!(times(&fs, &inos), before, "no byte was asked for");
        assert_eq!(try_read(&fs, &file, 9, 1, false), Ok(Vec::new()));
        assert!(times(&fs, &inos) > before, "{size}");
    }
    fs.unmount().expect("unmount");
    check(&devices);
}

fn times(fs: &FileSystem, inos: &[Ino]) -> Vec<Timestamp> {
    let atime = |&ino: &Ino| fs.getattr(ino).expect("getattr").atime;
    inos.iter().map(atime).collect()
}

/// A kernel that keeps times stamps an operation before it sends it: its time counts, not ours.
#[test]
fn a_kernel_that_keeps_times_is_believed() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let stamped = Timestamp::now();
    common::next_tick();
    fs.fallocate(&file, 0, 0, 4096).unwrap();
    let set = SetAttr {
        mtime: Some(SetTime::At(stamped)),
        ctime: Some(stamped),
        ..SetAttr::default()
    };
    let attr = fs.setattr(file.ino(), &set, &CRED).unwrap();
    assert_eq!((attr.mtime, attr.ctime), (stamped, stamped));
    fs.unmount().unwrap();
}
