//! Volumes that are full: of data, of names, of both.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use braidfs::{
    AtimeMode, Errno, FileSystem, Ino, MountOptions, OpenFile, ROOT_INO, SetAttr, SetTime,
};
use common::acl;
use common::dump::{dump, dump_below, entries};
use common::rng::Rng;
use common::watchdog::Watchdog;
use common::*;

/// Creates and writes files of a few KiB until nothing goes any more; returns how many. Nothing
/// but ENOSPC may come.
fn fill(fs: &FileSystem, dir: u64, salt: usize) -> usize {
    let bytes = vec![7; 12 << 10];
    let (mut refused, mut count) = (0, 0);
    while refused < 20 {
        let name = format!("{:x}-{salt}", count * 7919 % 100_003);
        count += 1;
        let flags = libc::O_RDWR | libc::O_CREAT;
        let made = fs.create(dir, name.as_bytes(), 0o644, flags, &CRED);
        let file = match made {
            Ok((_, file)) => file,
            Err(error) => {
                assert_eq!(error, Errno::NOSPC, "create {count}");
                refused += 1;
                continue;
            }
        };
        match try_write(fs, &file, 0, &bytes[..count % bytes.len()], false) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, Errno::NOSPC, "write {count}");
                refused += 1;
            }
        }
        fs.release(&file);
        fs.forget(file.ino(), 1);
    }
    count
}

fn names_of(fs: &FileSystem, dir: u64) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    fs.readdir(dir, 0, &mut |entry| {
        names.push(entry.name.to_vec());
        true
    })
    .unwrap();
    names.split_off(2)
}

#[test]
fn a_volume_full_of_small_files_is_full_and_nothing_worse() {
    let devices = devices(3, 40 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    for round in 0..2 {
        let made = fill(&fs, dir, round);
        assert!(made > 2000, "{made}");
        fs.sync().unwrap();
        // Every third first, so that deletion itself has to touch all of the tables.
        for step in [3, 1] {
            for name in names_of(&fs, dir).iter().step_by(step) {
                fs.unlink(dir, name).unwrap();
            }
            fs.sync().unwrap();
        }
        assert!(!fs.stats().read_only);
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Where metadata has little room each change counts what is not durable yet, late access times
/// too, while commits take those over.
#[test]
fn readers_writers_and_commits_do_not_block_each_other_where_room_is_short() {
    let _dog = Watchdog::start(Duration::from_secs(60), "a busy full volume".to_owned());
    let devices = devices(2, 40 << 20);
    format(&devices);
    let options = MountOptions {
        atime: AtimeMode::Strictatime,
        ..options()
    };
    let fs = mount_with(&devices, options);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    let until = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|scope| {
        for me in 0..4 {
            let fs = &fs;
            scope.spawn(move || {
                let name = format!("{me}");
                let file = create(fs, dir, &name);
                while Instant::now() < until {
                    try_write(fs, &file, 0, b"some bytes", false).unwrap();
                    try_read(fs, &file, 0, 10, false).unwrap();
                    fs.readdir(dir, 0, &mut |_| true).unwrap();
                }
                fs.release(&file);
            });
        }
        scope.spawn(|| {
            while Instant::now() < until {
                fs.sync().unwrap();
            }
        });
    });
    fs.unmount().unwrap();
    check(&devices);
}

/// As soon as the last user lets go, whoever asks sees the space, though deletion is another
/// thread's work.
#[test]
fn the_space_of_a_deleted_file_is_free_at_once() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let before = fs.statfs().bfree;
    for written_back in [true, false] {
        let file = create(&fs, ROOT_INO, "f");
        write(&fs, &file, 0, &pattern(1, 12 << 20));
        if written_back {
            fs.fsync(&file, false).unwrap();
        }
        let full = fs.statfs().bfree;
        assert!(full + 3000 < before, "{full} of {before}");
        fs.release(&file);
        fs.unlink(ROOT_INO, b"f").unwrap();
        fs.forget(file.ino(), 1);
        let after = fs.statfs().bfree;
        assert!(after + 32 >= before, "{after} of {before}");
        for _ in 0..200 {
            let now = fs.statfs().bfree;
            assert!(
                (before - 32..=before + 32).contains(&now),
                "{now} of {before}"
            );
            std::thread::yield_now();
        }
        fs.sync().unwrap();
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// What one operation is done to; made anew for each before the volume is filled.
struct Place {
    dir: Ino,
    /// 16 blocks of data and some bytes, with attributes.
    data: Arc<OpenFile>,
    /// Two blocks of data in a MiB.
    sparse: Arc<OpenFile>,
    /// 16 blocks that are set aside.
    aside: Arc<OpenFile>,
}

const BLOCK: u64 = 4096;
const DATA_LEN: u64 = 16 * BLOCK + 100;

impl Place {
    fn new(fs: &FileSystem, name: &str) -> Self {
        let dir = fs.mkdir(ROOT_INO, name.as_bytes(), 0o755, &CRED).unwrap();
        let file = |name: &str| create(fs, dir.ino, name);
        let place = Self {
            dir: dir.ino,
            data: file("data"),
            sparse: file("sparse"),
            aside: file("aside"),
        };
        write(fs, &place.data, 0, &pattern(1, DATA_LEN as usize));
        for at in [0, 512 << 10] {
            write(fs, &place.sparse, at, &pattern(at, BLOCK as usize));
        }
        assert_eq!(resize(fs, &place.sparse, 1 << 20), Ok(()));
        fs.fallocate(&place.aside, 0, 0, 16 * BLOCK).unwrap();
        let ino = place.data.ino();
        for (name, len) in [("user.small", 100), ("user.large", 20_000)] {
            let value = pattern(len, len as usize);
            fs.setxattr(ino, name.as_bytes(), &value, 0, false).unwrap();
        }
        for name in ["gone", "full"] {
            fs.mkdir(place.dir, name.as_bytes(), 0o755, &CRED).unwrap();
        }
        let full = place.find(fs, "full");
        fs.mkdir(full, b"inner", 0o755, &CRED).unwrap();
        fs.symlink(place.dir, b"link", b"data", &CRED).unwrap();
        fs.setxattr(full, acl::DEFAULT, &some_list(), 0, false)
            .unwrap();
        place
    }

    fn find(&self, fs: &FileSystem, name: &str) -> Ino {
        fs.lookup(self.dir, name.as_bytes()).unwrap().ino
    }

    fn rename(&self, fs: &FileSystem, from: &str, to: &str, flags: u32) -> Result<(), Errno> {
        let (from, to) = (from.as_bytes(), to.as_bytes());
        fs.rename(self.dir, from, self.dir, to, flags, &CRED)
    }
}

fn some_list() -> Vec<u8> {
    let mut rng = Rng(4);
    loop {
        let list = acl::List::random(&mut rng);
        if list.is_extended() {
            return list.encode();
        }
    }
}

fn resize(fs: &FileSystem, file: &OpenFile, size: u64) -> Result<(), Errno> {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    fs.setattr(file.ino(), &set, &CRED).map(drop)
}

fn put(fs: &FileSystem, file: &Arc<OpenFile>, at: u64, len: u64) -> Result<(), Errno> {
    try_write(fs, file, at, &pattern(at + len, len as usize), false).map(drop)
}

fn put_direct(fs: &FileSystem, file: &Arc<OpenFile>, at: u64, len: u64) -> Result<(), Errno> {
    try_write(fs, file, at, &pattern(at + len, len as usize), true).map(drop)
}

fn change(fs: &FileSystem, place: &Place, set: SetAttr) -> Result<(), Errno> {
    fs.setattr(place.data.ino(), &set, &CRED).map(drop)
}

/// When an operation must succeed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// It needs new blocks or names.
    None,
    /// As `None`; when it fails, part of it may have been done.
    Part,
    /// While metadata has room.
    Rewrites,
    /// Always.
    Always,
}

type Operation = (
    &'static str,
    Promise,
    fn(&FileSystem, &Place) -> Result<(), Errno>,
);

const NAMES: &[Operation] = &[
    ("create", Promise::None, |fs, at| {
        let flags = libc::O_RDWR | libc::O_CREAT;
        let (_, file) = fs.create(at.dir, b"new", 0o644, flags, &CRED)?;
        fs.release(&file);
        Ok(())
    }),
    ("mkdir", Promise::None, |fs, at| {
        fs.mkdir(at.dir, b"new", 0o755, &CRED).map(drop)
    }),
    ("mkdir with inheritance", Promise::None, |fs, at| {
        fs.mkdir(at.find(fs, "full"), b"new", 0o755, &CRED)
            .map(drop)
    }),
    ("mknod", Promise::None, |fs, at| {
        fs.mknod(at.dir, b"new", libc::S_IFIFO | 0o600, 0, &CRED)
            .map(drop)
    }),
    ("symlink", Promise::None, |fs, at| {
        fs.symlink(at.dir, b"new", b"x", &CRED).map(drop)
    }),
    ("long symlink", Promise::None, |fs, at| {
        fs.symlink(at.dir, &[b'n'; 255], &[b'x'; 4000], &CRED)
            .map(drop)
    }),
    ("link", Promise::None, |fs, at| {
        fs.link(at.data.ino(), at.dir, &[b'l'; 255]).map(drop)
    }),
    ("O_TMPFILE", Promise::None, |fs, at| {
        let (attr, file) = fs.tmpfile(at.dir, 0o600, libc::O_RDWR, &CRED)?;
        let linked = fs.link(attr.ino, at.dir, b"named").map(drop);
        fs.release(&file);
        fs.forget(attr.ino, 1);
        linked
    }),
    ("rename", Promise::Rewrites, |fs, at| {
        at.rename(fs, "data", "b", 0)
    }),
    ("rename to a long name", Promise::None, |fs, at| {
        at.rename(fs, "data", &"b".repeat(255), 0)
    }),
    ("rename over a file", Promise::Rewrites, |fs, at| {
        at.rename(fs, "data", "sparse", 0)
    }),
    ("rename over a directory", Promise::Rewrites, |fs, at| {
        at.rename(fs, "full", "gone", 0)
    }),
    ("rename elsewhere", Promise::Rewrites, |fs, at| {
        fs.rename(at.dir, b"data", at.find(fs, "gone"), b"d", 0, &CRED)
    }),
    ("RENAME_NOREPLACE", Promise::Rewrites, |fs, at| {
        at.rename(fs, "data", "b", libc::RENAME_NOREPLACE)
    }),
    ("RENAME_EXCHANGE", Promise::Rewrites, |fs, at| {
        at.rename(fs, "data", "full", libc::RENAME_EXCHANGE)
    }),
    ("RENAME_WHITEOUT", Promise::None, |fs, at| {
        at.rename(fs, "data", "b", libc::RENAME_WHITEOUT)
    }),
    ("unlink", Promise::Always, |fs, at| {
        fs.unlink(at.dir, b"data")
    }),
    ("unlink of a closed file", Promise::Always, |fs, at| {
        for file in [&at.data, &at.sparse, &at.aside] {
            fs.release(file);
            fs.forget(file.ino(), 1);
        }
        fs.unlink(at.dir, b"sparse")
    }),
    ("unlink of a link", Promise::Always, |fs, at| {
        fs.unlink(at.dir, b"link")
    }),
    ("rmdir", Promise::Always, |fs, at| fs.rmdir(at.dir, b"gone")),
];

const BYTES: &[Operation] = &[
    ("write to a new file", Promise::Part, |fs, at| {
        let flags = libc::O_RDWR | libc::O_CREAT;
        let (_, file) = fs.create(at.dir, b"new", 0o644, flags, &CRED)?;
        let written = put(fs, &file, 0, 100);
        fs.release(&file);
        written
    }),
    ("append", Promise::None, |fs, at| {
        put(fs, &at.data, DATA_LEN, 10_000)
    }),
    ("append within the block", Promise::Rewrites, |fs, at| {
        put(fs, &at.data, DATA_LEN, 10)
    }),
    ("append a MiB", Promise::None, |fs, at| {
        put(fs, &at.data, DATA_LEN, 1 << 20)
    }),
    ("append directly", Promise::None, |fs, at| {
        put_direct(fs, &at.data, 17 * BLOCK, 64 << 10)
    }),
    ("write into a hole", Promise::None, |fs, at| {
        put(fs, &at.sparse, 10 * BLOCK, BLOCK)
    }),
    ("write far out", Promise::None, |fs, at| {
        put(fs, &at.sparse, 1 << 40, 1)
    }),
    ("overwrite", Promise::Rewrites, |fs, at| {
        put(fs, &at.data, 0, 16 * BLOCK)
    }),
    ("overwrite some bytes", Promise::Rewrites, |fs, at| {
        put(fs, &at.data, 3 * BLOCK + 17, 2 * BLOCK)
    }),
    ("overwrite directly", Promise::Rewrites, |fs, at| {
        put_direct(fs, &at.data, 0, 64 << 10)
    }),
    ("write what is set aside", Promise::Rewrites, |fs, at| {
        put(fs, &at.aside, 5, 16 * BLOCK - 5)
    }),
    ("truncate up", Promise::Rewrites, |fs, at| {
        resize(fs, &at.data, 1 << 33)
    }),
    (
        "truncate to a part of a block",
        Promise::Always,
        |fs, at| resize(fs, &at.data, 5 * BLOCK + 7),
    ),
    ("truncate to nothing", Promise::Always, |fs, at| {
        resize(fs, &at.data, 0)
    }),
    ("fallocate", Promise::None, |fs, at| {
        fs.fallocate(&at.sparse, 0, 0, 2 << 20)
    }),
    ("fallocate KEEP_SIZE", Promise::None, |fs, at| {
        fs.fallocate(&at.data, libc::FALLOC_FL_KEEP_SIZE, DATA_LEN, 1 << 20)
    }),
    ("PUNCH_HOLE of blocks", Promise::Always, |fs, at| {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fs.fallocate(&at.data, mode, BLOCK, 9 * BLOCK)
    }),
    ("PUNCH_HOLE of bytes", Promise::Always, |fs, at| {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fs.fallocate(&at.data, mode, 100, 5 * BLOCK)
    }),
    ("ZERO_RANGE of data", Promise::Rewrites, |fs, at| {
        fs.fallocate(&at.data, libc::FALLOC_FL_ZERO_RANGE, 100, 9 * BLOCK)
    }),
    ("ZERO_RANGE of a hole", Promise::Part, |fs, at| {
        fs.fallocate(&at.sparse, libc::FALLOC_FL_ZERO_RANGE, 100, 1 << 20)
    }),
    ("copy_file_range", Promise::Part, |fs, at| {
        fs.copy_file_range(&at.data, 0, &at.sparse, 100 << 10, DATA_LEN)
            .map(drop)
    }),
    ("copy_file_range over data", Promise::Rewrites, |fs, at| {
        fs.copy_file_range(&at.data, 0, &at.aside, 0, 8 * BLOCK)
            .map(drop)
    }),
    ("fsync", Promise::Always, |fs, at| fs.fsync(&at.data, false)),
    ("fsync of a directory", Promise::Always, |fs, at| {
        fs.fsync_dir(at.dir)
    }),
    ("sync", Promise::Always, |fs, _| fs.sync()),
    ("trim", Promise::Always, |fs, _| {
        fs.trim(0, u64::MAX, 0).map(drop)
    }),
    ("seek", Promise::Always, |fs, at| {
        fs.lseek(&at.sparse, BLOCK, libc::SEEK_DATA).map(drop)
    }),
    ("read", Promise::Always, |fs, at| {
        try_read(fs, &at.data, 0, 1 << 16, false).map(drop)
    }),
];

const ATTRIBUTES: &[Operation] = &[
    ("set an attribute", Promise::None, |fs, at| {
        fs.setxattr(at.data.ino(), b"user.new", b"value", 0, false)
    }),
    ("set a large attribute", Promise::None, |fs, at| {
        fs.setxattr(at.data.ino(), b"user.new", &[1; 60_000], 0, false)
    }),
    ("replace an attribute", Promise::Rewrites, |fs, at| {
        fs.setxattr(at.data.ino(), b"user.large", b"", 0, false)
    }),
    ("remove an attribute", Promise::Always, |fs, at| {
        fs.removexattr(at.data.ino(), b"user.large")
    }),
    ("set an access list", Promise::None, |fs, at| {
        fs.setxattr(at.data.ino(), acl::ACCESS, &some_list(), 0, false)
    }),
    ("remove an access list", Promise::Always, |fs, at| {
        fs.removexattr(at.find(fs, "full"), acl::DEFAULT)
    }),
    ("chmod", Promise::Always, |fs, at| {
        let mode = Some(0o4711);
        change(
            fs,
            at,
            SetAttr {
                mode,
                ..SetAttr::default()
            },
        )
    }),
    ("chown", Promise::Always, |fs, at| {
        let uid = Some(7);
        change(
            fs,
            at,
            SetAttr {
                uid,
                ..SetAttr::default()
            },
        )
    }),
    ("utimes", Promise::Always, |fs, at| {
        let mtime = Some(SetTime::Now);
        change(
            fs,
            at,
            SetAttr {
                mtime,
                ..SetAttr::default()
            },
        )
    }),
    ("chattr", Promise::Always, |fs, at| {
        fs.set_flags(at.data.ino(), braidfs::FLAG_NODUMP, &ROOT)
    }),
];

/// Fills metadata with names that have attributes of so many bytes.
fn fill_with_names(fs: &FileSystem, dir: Ino, salt: usize, len: usize) {
    let value = vec![7; len];
    let (mut refused, mut count) = (0, 0);
    while refused < 3 {
        let name = format!("{salt}-{len}-{count}");
        let flags = libc::O_RDWR | libc::O_CREAT;
        let made = fs.create(dir, name.as_bytes(), 0o644, flags, &CRED);
        let made = made.and_then(|(attr, file)| {
            fs.release(&file);
            let set = match len {
                0 => Ok(()),
                _ => fs.setxattr(attr.ino, b"user.filler", &value, 0, false),
            };
            fs.forget(attr.ino, 1);
            set
        });
        count += 1;
        if let Err(error) = made {
            assert_eq!(error, Errno::NOSPC, "file {count} with {len} bytes");
            refused += 1;
            fs.sync().unwrap();
        }
    }
}

/// What a volume is full of.
#[derive(Clone, Copy, Debug)]
struct Level {
    data: bool,
    names: bool,
}

impl Level {
    /// Takes what there is to be had, again and again: an operation may have given some back.
    fn fill(self, fs: &FileSystem, dir: Ino, salt: usize) {
        if self.data && salt == 0 {
            drop(fill_with_data(fs, dir));
        } else if self.data {
            let ino = fs.lookup(dir, b"fill4096").unwrap().ino;
            let file = fs.open(ino, libc::O_RDWR).unwrap();
            let mut at = fs.getattr(ino).unwrap().size;
            while let Ok(count) = try_write(fs, &file, at, &[7; BLOCK as usize], false) {
                at += u64::from(count);
            }
            fs.release(&file);
            fs.forget(ino, 1);
        }
        if self.names {
            let sizes: &[usize] = if salt == 0 { &[60_000, 3000, 0] } else { &[0] };
            sizes
                .iter()
                .for_each(|&len| fill_with_names(fs, dir, salt, len));
        }
    }
}

/// Tries every operation, each on files of its own: it succeeds, or there is no space, and then
/// nothing changed. What it may not refuse, it does not.
fn try_everything(
    fs: &Arc<FileSystem>,
    level: Level,
    fill: Ino,
    places: &[Place],
) -> Vec<&'static str> {
    let operations = [NAMES, BYTES, ATTRIBUTES].concat();
    let mut refused = Vec::new();
    for (nth, (name, promise, operation)) in operations.into_iter().enumerate() {
        let place = &places[nth];
        let before = dump_below(fs, place.dir);
        let found = operation(fs, place);
        match found {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, Errno::NOSPC, "{name} at {level:?}");
                let broken =
                    promise == Promise::Always || promise == Promise::Rewrites && !level.names;
                assert!(!broken, "{name} at {level:?} must not need space");
                let changes = before.differences(&dump_below(fs, place.dir));
                assert!(
                    changes.is_empty() || promise == Promise::Part,
                    "{name} at {level:?}: {changes:#?}"
                );
                refused.push(name);
            }
        }
        assert!(!fs.stats().read_only, "after {name} at {level:?}");
        level.fill(fs, fill, nth + 1);
    }
    refused
}

fn remove_tree(fs: &FileSystem, dir: Ino) {
    for (name, ino) in entries(fs, dir, 1000) {
        if fs.getattr(ino).unwrap().is_dir() {
            remove_tree(fs, ino);
            fs.rmdir(dir, &name).expect("rmdir on a full volume");
        } else {
            fs.unlink(dir, &name).expect("unlink on a full volume");
        }
    }
}

/// Writes as many blocks as there are said to be.
fn write_what_is_free(fs: &FileSystem) {
    let free = fs.statfs().bfree;
    let file = create(fs, ROOT_INO, "all");
    let bytes = pattern(9, 1 << 20);
    // Not quite: the extents of what is written are metadata.
    let wanted = free * BLOCK / 100 * 99;
    let mut at = 0;
    while at < wanted {
        let len = (wanted - at).min(1 << 20);
        let written = try_write(fs, &file, at, &bytes[..len as usize], false);
        let written = written.unwrap_or_else(|error| panic!("{error:?} after {at} of {wanted}"));
        at += u64::from(written);
    }
    fs.fsync(&file, false).unwrap();
    fs.release(&file);
}

#[test]
fn every_operation_on_a_full_volume_works_or_changes_nothing() {
    let levels = [(true, false), (false, true), (true, true)];
    for (data, names) in levels {
        let level = Level { data, names };
        let _dog = Watchdog::start(Duration::from_secs(300), format!("{level:?}"));
        let devices = devices(2, 48 << 20);
        format(&devices);
        let fs = mount(&devices);
        let empty = fs.statfs().bfree;
        let count = NAMES.len() + BYTES.len() + ATTRIBUTES.len();
        let places: Vec<Place> = (0..count)
            .map(|nth| Place::new(&fs, &format!("{nth}")))
            .collect();
        fs.sync().unwrap();
        let dir = fs.mkdir(ROOT_INO, b"fill", 0o755, &CRED).unwrap().ino;
        level.fill(&fs, dir, 0);
        let refused = try_everything(&fs, level, dir, &places);
        println!(
            "{level:?}: no space for {} of {count}: {refused:?}",
            refused.len()
        );
        assert!(refused.len() >= 8, "{level:?}");
        fs.sync().unwrap();
        let before = dump(&fs);
        drop(places);
        fs.unmount().unwrap();
        check(&devices);
        let fs = mount(&devices);
        let changes = before.differences(&dump(&fs));
        assert!(changes.is_empty(), "{level:?}: {changes:#?}");
        remove_tree(&fs, ROOT_INO);
        fs.sync().unwrap();
        let left = fs.statfs().bfree;
        // What metadata took stays metadata's.
        assert!(level.names || left + 4096 >= empty, "{left} of {empty}");
        write_what_is_free(&fs);
        fs.unmount().unwrap();
        check(&devices);
    }
}

/// Changes of many inodes, one after another, without any that needs room.
#[test]
fn changes_of_every_inode_do_not_need_more_than_metadata_has() {
    let devices = devices(2, 16 << 20);
    format(&devices);
    let fs = mount_with(
        &devices,
        MountOptions {
            cache_bytes: 64 << 20,
            ..options()
        },
    );
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    fill_with_names(&fs, dir, 0, 1);
    fs.setxattr(dir, b"user.filler", b"", 0, false).unwrap_err();
    fs.sync().unwrap();
    let all = entries(&fs, dir, 1000);
    let changes: [(&str, fn(&FileSystem, Ino) -> Result<(), Errno>); 5] = [
        ("chmod", |fs, ino| {
            let mode = Some(0o600);
            let set = SetAttr {
                mode,
                ..SetAttr::default()
            };
            fs.setattr(ino, &set, &CRED).map(drop)
        }),
        ("chattr", |fs, ino| {
            fs.set_flags(ino, braidfs::FLAG_NODUMP, &ROOT)
        }),
        ("truncate up", |fs, ino| {
            let size = Some(1 << 20);
            let set = SetAttr {
                size,
                ..SetAttr::default()
            };
            fs.setattr(ino, &set, &CRED).map(drop)
        }),
        ("read", |fs, ino| {
            let file = fs.open(ino, libc::O_RDONLY)?;
            try_read(fs, &file, 0, 4096, false)?;
            fs.release(&file);
            Ok(())
        }),
        ("remove an attribute", |fs, ino| {
            fs.removexattr(ino, b"user.filler")
        }),
    ];
    for (name, change) in changes {
        let mut refused = 0;
        for &ino in all.values() {
            fs.lookup_ino(ino).unwrap();
            match change(&fs, ino) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => {
                    assert_eq!(error, Errno::NOSPC, "{name}");
                    refused += 1;
                }
            }
            fs.forget(ino, 1);
        }
        println!("{name}: {refused} of {} refused", all.len());
        fs.sync()
            .unwrap_or_else(|error| panic!("{error:?} after {name}"));
        assert_eq!(refused, 0, "{name}");
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Whoever deletes need not wait for anything before what was deleted can be made again.
#[test]
fn the_room_of_deleted_names_is_there_at_once() {
    let devices = devices(2, 16 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    fill_with_names(&fs, dir, 0, 3000);
    for round in 0..3 {
        let all = entries(&fs, dir, 1000);
        for name in all.keys().take(all.len() / 2) {
            fs.unlink(dir, name).unwrap();
        }
        if round == 1 {
            fs.sync().unwrap();
        }
        for nth in 0..all.len() / 3 {
            let file = create(&fs, dir, &format!("again-{round}-{nth}"));
            let set = fs.setxattr(file.ino(), b"user.filler", &[7; 3000], 0, false);
            assert_eq!(set, Ok(()), "{nth} of {} in round {round}", all.len());
            fs.release(&file);
            fs.forget(file.ino(), 1);
        }
        fill_with_names(&fs, dir, round + 1, 3000);
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Deleting what has very many attributes takes as many steps as it needs.
#[test]
fn a_file_that_fills_metadata_alone_can_be_deleted() {
    let devices = devices(2, 16 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let (mut refused, mut count) = (0, 0);
    while refused < 3 {
        let name = format!("user.{:x}", count * 7919 % 1_000_003);
        count += 1;
        match fs.setxattr(file.ino(), name.as_bytes(), &[7; 200], 0, false) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, Errno::NOSPC);
                refused += 1;
                fs.sync().unwrap();
            }
        }
    }
    println!("{count} attributes");
    fs.unlink(ROOT_INO, b"f").unwrap();
    fs.release(&file);
    fs.forget(file.ino(), 1);
    drop(file);
    // Waits for the deletion.
    fill_with_names(&fs, ROOT_INO, 0, 3000);
    fs.sync().unwrap();
    assert!(names_of(&fs, ROOT_INO).len() > 500);
    fs.unmount().unwrap();
    check(&devices);
}
