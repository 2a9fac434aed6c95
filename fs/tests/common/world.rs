//! Random operations, done to a file system and to the model, and compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use braidfs::{
    Attr, Errno, FILE_SIZE_MAX, FileSystem, Ino, OpenFile, ROOT_INO, SetAttr, SetTime, Timestamp,
};

use super::dump::{dump, entries};
use super::model::{Body, Content, Model, PAGE, Rng};
use super::{CRED, try_read, try_write};

/// How wild it gets.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Files are mostly shorter than this.
    pub size: u64,
    /// Longest read or write.
    pub io: u64,
    /// Bytes of all files together, roughly.
    pub total: u64,
    /// Different names in a directory.
    pub names: u64,
    /// Also operations that are made of several transaction groups' worth of steps, and offsets
    /// far out.
    pub wide: bool,
    /// One in so many operations makes things durable.
    pub sync_every: u64,
}

/// What an operation promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Plain,
    /// All that was done before is durable.
    Synced,
    /// What was done to this file is.
    FileSynced(Ino),
}

pub struct World {
    pub fs: Arc<FileSystem>,
    pub model: Model,
    pub rng: Rng,
    pub limits: Limits,
    pub handles: Vec<Arc<OpenFile>>,
    /// Operations that ran out of space.
    pub full: u64,
    last: String,
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, expected: &T) {
    assert!(
        found == expected,
        "{what}: found {found:?}, expected {expected:?}"
    );
}

impl World {
    pub fn new(fs: Arc<FileSystem>, seed: u64, limits: Limits) -> Self {
        let root = fs.lookup(ROOT_INO, b".").expect("the root");
        Self {
            fs,
            model: Model::new(&root),
            rng: Rng(seed),
            limits,
            handles: Vec::new(),
            full: 0,
            last: String::new(),
        }
    }

    /// The last operation, for the message of a failed test.
    pub fn last(&self) -> &str {
        &self.last
    }

    fn say(&mut self, what: std::fmt::Arguments<'_>) {
        self.last = format!("{}: {what}", self.model.now);
        if std::env::var_os("TRACE").is_some() {
            eprintln!("{}", self.last);
        }
    }

    fn name(&mut self) -> Vec<u8> {
        if self.rng.one_in(200) {
            return vec![b'x'; 254 + self.rng.below(3) as usize];
        }
        format!("n{}", self.rng.below(self.limits.names)).into_bytes()
    }

    /// An inode of which there is a reference, so that the kernel might use it.
    fn ino(&mut self) -> Ino {
        let known = self.model.nodes.iter();
        let known: Vec<Ino> = known
            .filter(|(_, node)| node.lookups > 0 || node.opens > 0)
            .map(|(&ino, _)| ino)
            .collect();
        *self.rng.pick(&known)
    }

    fn dir(&mut self) -> Ino {
        for _ in 0..6 {
            let ino = self.ino();
            if self.model.node(ino).is_dir() {
                return ino;
            }
        }
        // Sometimes something that is none.
        if self.rng.one_in(4) {
            self.ino()
        } else {
            ROOT_INO
        }
    }

    fn offset(&mut self) -> u64 {
        let limit = self.limits.size;
        let at = match self.rng.below(10) {
            0..4 => self.rng.below(limit),
            4..7 => self.rng.below(limit / PAGE) * PAGE,
            7 => (self.rng.below(limit / PAGE) * PAGE).saturating_sub(self.rng.below(3)),
            8 if self.limits.wide => self.rng.below(1 << 40),
            _ => self.rng.below(2 * PAGE),
        };
        at.min(FILE_SIZE_MAX / 2)
    }

    fn len(&mut self) -> u64 {
        let most = self.limits.io;
        match self.rng.below(10) {
            0..5 => 1 + self.rng.below(9000),
            5..8 => (1 + self.rng.below(most / PAGE)) * PAGE,
            8 => 1 + self.rng.below(most),
            _ => 1 + self.rng.below(100),
        }
    }

    /// Compares an outcome with the model's; true if the model is to follow.
    fn agrees<T>(&mut self, found: &Result<T, Errno>, expected: Result<(), Errno>) -> bool {
        let found = found.as_ref().map(|_| ()).map_err(|&error| error);
        if found == Err(Errno::NOSPC) && expected.is_ok() {
            self.full += 1;
            return false;
        }
        assert_eq!(found, expected, "operation {}", self.last);
        found.is_ok()
    }

    fn check_attr(&mut self, attr: &Attr) {
        let node = self.model.node(attr.ino);
        let found = [attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev];
        let expected = [node.mode, node.nlink, node.uid, node.gid, node.rdev];
        same("attributes", &found, &expected);
        if let Some(mtime) = node.mtime {
            same("mtime", &attr.mtime, &mtime);
        }
        let size = match &node.body {
            Body::File(content) => content.size,
            Body::Link(target) => target.len() as u64,
            Body::Dir { entries, .. } => 2 * entries.keys().map(|n| n.len() as u64).sum::<u64>(),
            Body::Special => 0,
        };
        same("size", &attr.size, &size);
    }

    /// One random operation.
    pub fn step(&mut self) -> Done {
        self.model.now += 1;
        if self.rng.one_in(self.limits.sync_every) {
            return self.sync();
        }
        match self.rng.below(100) {
            0..12 => self.make(),
            12..16 => self.link(),
            16..24 => self.remove(),
            24..32 => self.rename(),
            32..38 => self.lookup_or_forget(),
            38..43 => self.open_or_close(),
            43..66 => self.write(),
            66..78 => self.read(),
            78..83 => self.resize(),
            83..88 => self.fallocate(),
            88..91 => self.attributes(),
            91..95 => self.xattr(),
            95..97 => self.list(),
            97 => self.seek(),
            98 => self.copy(),
            _ => self.replace_content(),
        }
        Done::Plain
    }

    /// One of the operations that make sense while the volume is full and the root has an entry
    /// that the model does not know.
    pub fn write_or_remove(&mut self) {
        match self.rng.below(6) {
            0 => self.remove(),
            1 => self.resize(),
            2 => self.fallocate(),
            3 => self.read(),
            4 => self.make(),
            _ => self.write(),
        }
    }

    fn sync(&mut self) -> Done {
        if self.handles.is_empty() || self.rng.one_in(3) {
            self.say(format_args!("sync"));
            self.fs.sync().expect("sync");
            return Done::Synced;
        }
        let file = Arc::clone(self.rng.pick(&self.handles));
        self.say(format_args!("fsync {}", file.ino()));
        self.fs.fsync(&file, self.rng.one_in(2)).expect("fsync");
        Done::FileSynced(file.ino())
    }

    fn make(&mut self) {
        let (dir, name) = (self.dir(), self.name());
        let shown = String::from_utf8_lossy(&name[..name.len().min(9)]).into_owned();
        let kind = self.rng.below(10);
        let mode = self.rng.below(0o10000) as u32;
        self.say(format_args!("make {kind} {shown} in {dir}"));
        let expected = self.model.can_make(dir, &name);
        let (found, mode, body) = match kind {
            0..3 => {
                let entries = BTreeMap::new();
                let body = Body::Dir {
                    entries,
                    parent: dir,
                };
                let found = self.fs.mkdir(dir, &name, mode, &CRED);
                (found, libc::S_IFDIR | mode, body)
            }
            3 => {
                let target = vec![b't'; 1 + self.rng.below(300) as usize];
                let found = self.fs.symlink(dir, &name, &target, &CRED);
                (found, libc::S_IFLNK | 0o777, Body::Link(target))
            }
            4 => {
                let kinds = [libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK];
                let mode = mode | self.rng.pick(&kinds);
                let found = self.fs.mknod(dir, &name, mode, 0, &CRED);
                (found, mode, Body::Special)
            }
            _ => {
                let flags = libc::O_RDWR | libc::O_CREAT;
                let body = Body::File(Content::default());
                let made = self.fs.create(dir, &name, mode, flags, &CRED);
                let found = made.map(|(attr, file)| {
                    self.handles.push(file);
                    attr
                });
                (found, libc::S_IFREG | mode, body)
            }
        };
        if self.agrees(&found, expected) {
            let attr = found.expect("it agrees");
            let is_file = matches!(body, Body::File(_));
            self.model.make(dir, &name, attr.ino, mode, body, &CRED);
            self.model.node(attr.ino).opens = u32::from(is_file);
            self.check_attr(&attr);
        }
    }

    fn link(&mut self) {
        let (ino, dir, name) = (self.ino(), self.dir(), self.name());
        self.say(format_args!("link {ino} into {dir}"));
        let expected = self.model.can_link(ino, dir, &name);
        let found = self.fs.link(ino, dir, &name);
        if self.agrees(&found, expected) {
            self.model.link(ino, dir, &name);
        }
    }

    fn remove(&mut self) {
        let (dir, name) = (self.dir(), self.name());
        let is_dir = match self.model.find(dir, &name) {
            Ok(Some(ino)) => self.model.node(ino).is_dir(),
            _ => false,
        };
        let as_dir = is_dir != self.rng.one_in(10);
        let shown = String::from_utf8_lossy(&name[..name.len().min(9)]).into_owned();
        self.say(format_args!("remove {shown} of {dir}, rmdir: {as_dir}"));
        let found = if as_dir {
            self.fs.rmdir(dir, &name)
        } else {
            self.fs.unlink(dir, &name)
        };
        let expected = self.model.remove(dir, &name, as_dir);
        assert_eq!(found, expected, "operation {}", self.last);
    }

    fn rename(&mut self) {
        let (dir, name) = (self.dir(), self.name());
        let (to, new) = (self.dir(), self.name());
        let flags = *self.rng.pick(&[
            0,
            0,
            0,
            libc::RENAME_NOREPLACE,
            libc::RENAME_EXCHANGE,
            libc::RENAME_EXCHANGE,
            libc::RENAME_WHITEOUT,
            libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE,
        ]);
        let texts = [&name, &new].map(|n| String::from_utf8_lossy(n).into_owned());
        self.say(format_args!(
            "rename {} of {dir} to {} of {to}, flags {flags}",
            texts[0], texts[1]
        ));
        let plan = if name.len().max(new.len()) > 255 {
            Err(Errno::NAMETOOLONG)
        } else {
            self.model.can_rename((dir, &name), (to, &new), flags)
        };
        let found = self.fs.rename(dir, &name, to, &new, flags, &CRED);
        let expected = plan.as_ref().map(|_| ()).map_err(|&error| error);
        if !self.agrees(&found, expected) {
            return;
        }
        let Ok(plan) = plan else { return };
        let swap = flags & libc::RENAME_EXCHANGE != 0;
        let moved = self.model.rename(&plan, (dir, &name), (to, &new), swap);
        if moved && flags & libc::RENAME_WHITEOUT != 0 {
            let attr = self.fs.lookup(dir, &name).expect("the whiteout");
            let mode = libc::S_IFCHR;
            let body = Body::Special;
            self.model.make(dir, &name, attr.ino, mode, body, &CRED);
            self.check_attr(&attr);
        }
    }

    fn lookup_or_forget(&mut self) {
        if self.rng.one_in(2) {
            let (dir, name) = (self.dir(), self.name());
            self.say(format_args!("lookup in {dir}"));
            let expected = if name.len() > 255 && self.model.node(dir).is_dir() {
                Err(Errno::NAMETOOLONG)
            } else {
                let found = self.model.find(dir, &name);
                found.and_then(|found| found.ok_or(Errno::NOENT))
            };
            let found = self.fs.lookup(dir, &name);
            let inos = found.as_ref().map(|attr| attr.ino).map_err(|&e| e);
            assert_eq!(inos, expected, "operation {}", self.last);
            if let Ok(attr) = found {
                self.model.node(attr.ino).lookups += 1;
                self.check_attr(&attr);
            }
            return;
        }
        let ino = self.ino();
        let lookups = self.model.node(ino).lookups;
        if ino != ROOT_INO && lookups > 0 {
            self.say(format_args!("forget {ino}, {lookups} times"));
            self.fs.forget(ino, lookups);
            self.model.node(ino).lookups = 0;
            self.model.let_go(ino);
        }
    }

    fn open_or_close(&mut self) {
        let ino = self.ino();
        if self.handles.len() < 12 && self.model.node(ino).file().is_some() {
            self.say(format_args!("open {ino}"));
            let file = self.fs.open(ino, libc::O_RDWR).expect("open");
            self.model.node(ino).opens += 1;
            self.handles.push(file);
        } else if !self.handles.is_empty() {
            let at = self.rng.below(self.handles.len() as u64) as usize;
            let file = self.handles.swap_remove(at);
            self.close(&file);
        }
    }

    fn close(&mut self, file: &Arc<OpenFile>) {
        let ino = file.ino();
        self.say(format_args!("release {ino}"));
        assert_eq!(self.fs.flush(file), Ok(()));
        self.fs.release(file);
        self.model.node(ino).opens -= 1;
        self.model.let_go(ino);
    }

    fn handle(&mut self) -> Option<Arc<OpenFile>> {
        if self.handles.is_empty() {
            return None;
        }
        Some(Arc::clone(self.rng.pick(&self.handles)))
    }

    fn write(&mut self) {
        let Some(file) = self.handle() else { return };
        let (ino, direct) = (file.ino(), self.rng.one_in(3));
        let (mut offset, mut len) = (self.offset(), self.len());
        if direct && self.rng.one_in(2) {
            offset = offset / PAGE * PAGE;
            len = len.next_multiple_of(PAGE).max(64 << 10).min(self.limits.io);
        }
        if self.model.bytes_kept() > self.limits.total {
            self.truncate(ino, 0);
            return;
        }
        self.say(format_args!(
            "write {ino} at {offset}+{len}, direct: {direct}"
        ));
        let data = self.rng.bytes(len as usize);
        let found = try_write(&self.fs, &file, offset, &data, direct);
        if self.agrees(&found, Ok(())) {
            let count = u64::from(found.unwrap_or(0));
            if count < len {
                // On a full volume a write is as long as there is room for.
                assert!(
                    count > 0 && self.fs.statfs().bfree * PAGE < len,
                    "{count} of {len}"
                );
                self.full += 1;
            }
            self.model
                .content(ino)
                .write(offset, &data[..count as usize]);
            self.model.touch(ino, true);
        }
    }

    fn read(&mut self) {
        let Some(file) = self.handle() else { return };
        let (ino, direct) = (file.ino(), self.rng.one_in(3));
        let (mut offset, mut len) = (self.offset(), self.len());
        if direct {
            offset = offset / PAGE * PAGE;
            len = len.next_multiple_of(PAGE).max(64 << 10);
        }
        self.say(format_args!(
            "read {ino} at {offset}+{len}, direct: {direct}"
        ));
        let found = try_read(&self.fs, &file, offset, len as usize, direct).expect("read");
        let expected = self.model.content(ino).read(offset, len as usize);
        self.check_bytes(ino, offset, &found, &expected);
    }

    fn check_bytes(&self, ino: Ino, offset: u64, found: &[u8], expected: &[u8]) {
        if found == expected {
            return;
        }
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!(
            "operation {}: inode {ino} from {offset}: {} bytes instead of {}, the first that \
             differs is at {:?}",
            self.last,
            found.len(),
            expected.len(),
            at.map(|at| offset + at as u64)
        );
    }

    fn truncate(&mut self, ino: Ino, size: u64) {
        self.say(format_args!("truncate {ino} to {size}"));
        let expected = self.model.can_resize(ino, size);
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        let found = self.fs.setattr(ino, &set, &CRED);
        if self.agrees(&found, expected) {
            self.model.content(ino).truncate(size);
            self.model.touch(ino, true);
            self.check_attr(&found.expect("it agrees"));
        }
    }

    fn resize(&mut self) {
        let ino = match self.handle() {
            Some(file) if !self.rng.one_in(4) => file.ino(),
            _ => self.ino(),
        };
        let size = match self.rng.below(20) {
            0 => FILE_SIZE_MAX + self.rng.below(2),
            1 => 0,
            _ => self.offset(),
        };
        self.truncate(ino, size);
    }

    fn fallocate(&mut self) {
        const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
        let Some(file) = self.handle() else { return };
        let mut modes = vec![0, KEEP, PUNCH | KEEP, PUNCH | KEEP, ZERO | KEEP];
        if self.limits.wide {
            modes.extend([ZERO, PUNCH]);
        }
        let (ino, mode) = (file.ino(), *self.rng.pick(&modes));
        let (offset, len) = (self.offset(), self.len());
        self.say(format_args!("fallocate {ino} mode {mode} {offset}+{len}"));
        let found = self.fs.fallocate(&file, mode, offset, len);
        if mode == PUNCH {
            assert_eq!(found, Err(Errno::NOTSUP));
            return;
        }
        let good = self.agrees(&found, Ok(()));
        let content = self.model.content(ino);
        let end = offset + len;
        if good && mode & (ZERO | PUNCH) != 0 {
            content.zero(offset, end);
        }
        if good && mode & KEEP == 0 {
            content.size = content.size.max(end);
        }
        if !good && mode & ZERO != 0 {
            // It may have got half way: the bytes are zero or what they were.
            let len = len as usize;
            let now = try_read(&self.fs, &file, offset, len, false).expect("read");
            if now.iter().all(|&byte| byte == 0) {
                self.model.content(ino).zero(offset, end);
            }
        }
        self.model.touch(ino, true);
    }

    fn attributes(&mut self) {
        let ino = self.ino();
        self.say(format_args!("setattr {ino}"));
        let mut set = SetAttr::default();
        let time = Timestamp {
            secs: self.rng.below(1 << 33) as i64 - (1 << 32),
            nanos: self.rng.below(1_000_000_000) as u32,
        };
        match self.rng.below(3) {
            0 => set.mode = Some(self.rng.below(0o10000) as u32),
            1 => (set.uid, set.gid) = (Some(self.rng.below(9) as u32), Some(7)),
            _ => set.mtime = Some(SetTime::At(time)),
        }
        let attr = self.fs.setattr(ino, &set, &CRED).expect("setattr");
        self.model.touch(ino, false);
        let node = self.model.node(ino);
        if let Some(mode) = set.mode {
            node.mode = node.mode & libc::S_IFMT | mode;
        }
        if let (Some(uid), Some(gid)) = (set.uid, set.gid) {
            (node.uid, node.gid) = (uid, gid);
        }
        if set.mtime.is_some() {
            node.mtime = Some(time);
        }
        self.check_attr(&attr);
    }

    fn xattr(&mut self) {
        let ino = self.ino();
        let name = match self.rng.below(40) {
            0 => Vec::new(),
            1 => vec![b'x'; 256],
            n => format!("user.{}", n % 5).into_bytes(),
        };
        let bad = match name.len() {
            0 => Err(Errno::INVAL),
            256 => Err(Errno::RANGE),
            _ => Ok(()),
        };
        let known = self.model.node(ino).xattrs.get(&name).cloned();
        let there = bad.and_then(|()| known.as_ref().map(|_| ()).ok_or(Errno::NODATA));
        self.say(format_args!("xattr of {ino}"));
        match self.rng.below(6) {
            0..3 => {
                let flags = *self
                    .rng
                    .pick(&[0, 0, libc::XATTR_CREATE, libc::XATTR_REPLACE]);
                let len = match self.rng.below(20) {
                    0 => 65_537,
                    1 => self.rng.below(65_537),
                    _ => self.rng.below(200),
                };
                let value = self.rng.bytes(len as usize);
                let expected = match (known.is_some(), flags) {
                    _ if bad.is_err() => bad,
                    _ if len > 65_536 => Err(Errno::TOOBIG),
                    (true, libc::XATTR_CREATE) => Err(Errno::EXIST),
                    (false, libc::XATTR_REPLACE) => Err(Errno::NODATA),
                    _ => Ok(()),
                };
                let found = self.fs.setxattr(ino, &name, &value, flags, false);
                if self.agrees(&found, expected) {
                    self.model.node(ino).xattrs.insert(name, value);
                    self.model.touch(ino, false);
                }
            }
            3 => {
                let found = self.fs.removexattr(ino, &name);
                if self.agrees(&found, there) {
                    self.model.node(ino).xattrs.remove(&name);
                    self.model.touch(ino, false);
                }
            }
            4 => {
                let expected = there.map(|()| known.unwrap_or_default());
                assert_eq!(self.fs.getxattr(ino, &name), expected);
            }
            _ => {
                let names = self.model.node(ino).xattrs.keys();
                let expected: Vec<u8> = names
                    .flat_map(|name| name.iter().copied().chain([0]))
                    .collect();
                assert_eq!(self.fs.listxattr(ino), Ok(expected));
            }
        }
    }

    fn list(&mut self) {
        let dir = self.dir();
        self.say(format_args!("list {dir}"));
        if !self.model.node(dir).is_dir() {
            let found = self.fs.readdir(dir, 0, &mut |_| true);
            assert_eq!(found, Err(Errno::NOTDIR));
            return;
        }
        let batch = 1 + self.rng.below(20);
        let found = entries(&self.fs, dir, batch);
        let Body::Dir { entries, .. } = &self.model.node(dir).body else {
            unreachable!("it is one")
        };
        assert_eq!(&found, entries, "operation {}", self.last);
    }

    fn seek(&mut self) {
        let Some(file) = self.handle() else { return };
        let offset = self.offset();
        self.say(format_args!("seek {} from {offset}", file.ino()));
        let content = self.model.content(file.ino());
        let size = content.size;
        let data = self.fs.lseek(&file, offset, libc::SEEK_DATA);
        let hole = self.fs.lseek(&file, offset, libc::SEEK_HOLE);
        match data {
            Ok(at) => assert!(at >= offset && at < size && content.is_zero(offset, at)),
            Err(error) => {
                assert_eq!(error, Errno::NXIO);
                assert!(offset >= size || content.is_zero(offset, size));
            }
        }
        match hole {
            Ok(at) => {
                let page_end = (at / PAGE + 1) * PAGE;
                assert!(at >= offset && at <= size);
                assert!(at == size || content.is_zero(at, page_end.min(size)));
            }
            Err(error) => assert!(error == Errno::NXIO && offset >= size),
        }
    }

    fn copy(&mut self) {
        let (Some(from), Some(to)) = (self.handle(), self.handle()) else {
            return;
        };
        if from.ino() == to.ino() || !self.limits.wide {
            return;
        }
        let (offset, at, len) = (self.offset(), self.offset(), self.len());
        self.say(format_args!(
            "copy {} {offset}+{len} to {} at {at}",
            from.ino(),
            to.ino()
        ));
        let found = self.fs.copy_file_range(&from, offset, &to, at, len);
        if self.agrees(&found, Ok(())) {
            let count = found.expect("it agrees") as usize;
            let data = self.model.content(from.ino()).read(offset, len as usize);
            assert!(count == data.len() || self.full > 0, "copied {count} bytes");
            self.model.content(to.ino()).write(at, &data[..count]);
            if count > 0 {
                self.model.touch(to.ino(), true);
            }
        }
    }

    /// Writes a new file and renames it over another: what careful programs do.
    fn replace_content(&mut self) {
        let (temporary, name) = (b"temporary", b"n0");
        let found = self
            .model
            .find(ROOT_INO, name)
            .expect("the root is a directory");
        if found.is_some_and(|ino| self.model.node(ino).is_dir()) || self.handles.len() > 12 {
            return;
        }
        self.say(format_args!("write and rename"));
        if self.model.find(ROOT_INO, temporary) == Ok(None) {
            let flags = libc::O_RDWR | libc::O_CREAT;
            let made = self.fs.create(ROOT_INO, temporary, 0o644, flags, &CRED);
            if self.agrees(&made, Ok(())) {
                let (attr, file) = made.expect("it agrees");
                let (mode, body) = (attr.mode, Body::File(Content::default()));
                self.model
                    .make(ROOT_INO, temporary, attr.ino, mode, body, &CRED);
                self.model.node(attr.ino).opens = 1;
                self.handles.push(file);
            }
            return;
        }
        let found = self
            .fs
            .rename(ROOT_INO, temporary, ROOT_INO, name, 0, &CRED);
        if self.agrees(&found, Ok(())) {
            let (from, to) = ((ROOT_INO, &temporary[..]), (ROOT_INO, &name[..]));
            let plan = self.model.can_rename(from, to, 0).expect("as before");
            self.model.rename(&plan, from, to, false);
        }
    }

    /// The whole tree, against the model.
    pub fn check_tree(&mut self) {
        let found = dump(&self.fs);
        let expected = self.model.dump();
        let differences = expected.differences(&found);
        assert!(differences.is_empty(), "{}: {differences:#?}", self.last);
        for ino in self.model.nodes.keys().copied().collect::<Vec<_>>() {
            let attr = self.fs.getattr(ino).expect("getattr");
            self.check_attr(&attr);
        }
        for file in self.handles.clone() {
            let content = self.model.content(file.ino()).clone();
            for (at, page) in content.pages() {
                let len = (content.size - at * PAGE).min(PAGE) as usize;
                let found = try_read(&self.fs, &file, at * PAGE, len, false).expect("read");
                self.check_bytes(file.ino(), at * PAGE, &found, &page[..len]);
            }
        }
    }

    /// Unmounts, with or without closing what is open.
    pub fn unmount(&mut self) {
        if self.rng.one_in(2) {
            for file in std::mem::take(&mut self.handles) {
                self.close(&file);
            }
        }
        self.fs.unmount().expect("unmount");
        self.handles.clear();
        self.model.forget_users();
    }

    /// Goes on after a mount, with references to all there is.
    pub fn go_on(&mut self, fs: Arc<FileSystem>) {
        self.fs = fs;
        for (&ino, node) in &mut self.model.nodes {
            self.fs.lookup_ino(ino).expect("it is there");
            node.lookups = 1;
        }
    }
}
