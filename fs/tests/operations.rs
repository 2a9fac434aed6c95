//! Every operation of the core on a volume that is full of data, of metadata, or of both: it
//! succeeds, or there is no space and nothing has changed; and nothing is lost but room.

mod common;

use std::sync::Arc;
use std::time::Duration;

use braidfs::{Errno, FileSystem, Ino, OpenFile, ROOT_INO, SetAttr, SetTime};
use common::acl;
use common::dump::{dump, dump_below, entries};
use common::rng::Rng;
use common::watchdog::Watchdog;
use common::*;

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
