//! What a POSIX file system should do, in memory and as simply as possible. Where POSIX is silent
//! it does what ext4 does.
//!
//! Every inode that an operation looks at or changes is noted, and so is every range of bytes that
//! it changes: these are compared afterwards.

use std::collections::{BTreeMap, BTreeSet};

use braidfs::{
    AtimeMode, Cred, Errno, FILE_SIZE_MAX, FLAG_APPEND, FLAG_DIRSYNC, FLAG_IMMUTABLE, FLAG_NOATIME,
    FLAG_NODUMP, FLAG_NOTAIL, FLAG_SYNC, FLAGS_KNOWN, Ino, ROOT_INO, Timestamp,
};

use super::acl::{self, List};
use super::content::Content;

/// What every write takes away.
pub const CAPABILITY: &[u8] = b"security.capability";

/// Flags that keep an inode from being changed.
pub const LOCKS: u32 = FLAG_IMMUTABLE | FLAG_APPEND;

const INHERITED: u32 = FLAG_SYNC | FLAG_NODUMP | FLAG_NOATIME | FLAG_NOTAIL | FLAG_DIRSYNC;

const DAY_SECS: i64 = 24 * 60 * 60;

/// What is known of one time of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamp {
    Unknown,
    At(Timestamp),
    /// The step under way set it to the current time.
    Set,
    /// The step under way may have done so.
    Maybe(Timestamp),
}

#[derive(Clone)]
pub enum Body {
    Dir {
        entries: BTreeMap<Vec<u8>, Ino>,
        parent: Ino,
    },
    File(Content),
    Link(Vec<u8>),
    Special,
}

#[derive(Clone)]
pub struct Node {
    /// Names the inode by the step that made it: the same whatever other steps there are.
    pub label: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u32,
    pub flags: u32,
    pub atime: Stamp,
    pub mtime: Stamp,
    pub ctime: Stamp,
    pub btime: Stamp,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub body: Body,
    pub opens: u32,
    pub lookups: u64,
    /// Has no name and may get its first one.
    pub linkable: bool,
    /// The last operation that changed it.
    pub changed: u64,
}

impl Node {
    pub fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir { .. })
    }

    pub fn file(&mut self) -> Option<&mut Content> {
        match &mut self.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    /// `PERM` if one of these flags is set.
    pub fn check_flags(&self, flags: u32) -> Result<(), Errno> {
        if self.flags & flags == 0 {
            Ok(())
        } else {
            Err(Errno::PERM)
        }
    }

    /// The flags that an inode of its type may have.
    pub fn flags_allowed(&self) -> u32 {
        match &self.body {
            Body::Dir { .. } => FLAGS_KNOWN,
            Body::File(_) => FLAGS_KNOWN & !FLAG_DIRSYNC,
            _ => FLAG_NODUMP | FLAG_NOATIME,
        }
    }

    /// What a write by somebody without the privilege to keep them does to set-id bits.
    pub fn kill_set_ids(&mut self) {
        self.mode &= !libc::S_ISUID;
        if self.mode & libc::S_IXGRP != 0 {
            self.mode &= !libc::S_ISGID;
        }
    }
}

#[derive(Clone)]
pub struct Model {
    pub nodes: BTreeMap<Ino, Node>,
    /// Number of the operation under way.
    pub now: u64,
    births: u64,
    pub atime: AtimeMode,
    pub nodiratime: bool,
    /// What is to be compared after the step.
    pub touched: BTreeSet<Ino>,
    pub ranges: Vec<(Ino, u64, u64)>,
}

/// What `Model::can_rename` found.
pub struct RenamePlan {
    source: Ino,
    target: Option<Ino>,
}

fn check_new(name: &[u8]) -> Result<(), Errno> {
    if name.len() > 255 {
        Err(Errno::NAMETOOLONG)
    } else if name == b"." || name == b".." {
        Err(Errno::EXIST)
    } else {
        Ok(())
    }
}

impl Model {
    pub fn new(root: &braidfs::Attr, atime: AtimeMode, nodiratime: bool) -> Self {
        let entries = BTreeMap::new();
        let root = Node {
            label: 0,
            mode: root.mode,
            uid: root.uid,
            gid: root.gid,
            nlink: 2,
            rdev: 0,
            flags: 0,
            atime: Stamp::At(root.atime),
            mtime: Stamp::At(root.mtime),
            ctime: Stamp::At(root.ctime),
            btime: Stamp::At(root.btime),
            xattrs: BTreeMap::new(),
            body: Body::Dir {
                entries,
                parent: ROOT_INO,
            },
            opens: 0,
            lookups: 1,
            linkable: false,
            changed: 0,
        };
        Self {
            nodes: BTreeMap::from([(ROOT_INO, root)]),
            now: 0,
            births: 0,
            atime,
            nodiratime,
            touched: BTreeSet::new(),
            ranges: Vec::new(),
        }
    }

    /// A step begins.
    pub fn begin(&mut self, now: u64) {
        (self.now, self.births) = (now, 0);
        self.touched.clear();
        self.ranges.clear();
    }

    /// A name for what this step makes.
    pub fn label(&mut self) -> u64 {
        self.births += 1;
        self.now << 8 | self.births
    }

    pub fn node(&mut self, ino: Ino) -> &mut Node {
        self.touched.insert(ino);
        self.nodes.get_mut(&ino).expect("the model knows the inode")
    }

    pub fn content(&mut self, ino: Ino) -> &mut Content {
        self.node(ino).file().expect("a file")
    }

    pub fn touch(&mut self, ino: Ino, modified: bool) {
        let now = self.now;
        let node = self.node(ino);
        node.changed = now;
        node.ctime = Stamp::Set;
        if modified {
            node.mtime = Stamp::Set;
        }
    }

    /// Something was read: the access time follows the mount's options.
    pub fn accessed(&mut self, ino: Ino) {
        let (mode, nodiratime) = (self.atime, self.nodiratime);
        let node = self.node(ino);
        let never = mode == AtimeMode::Noatime || node.flags & FLAG_NOATIME != 0;
        if never || nodiratime && node.is_dir() {
            return;
        }
        node.atime = match (node.atime, node.mtime, node.ctime) {
            (Stamp::At(atime), Stamp::At(mtime), Stamp::At(ctime)) => {
                let age = Timestamp::now().secs.saturating_sub(atime.secs);
                let stale = atime <= mtime || atime <= ctime || age >= DAY_SECS;
                if stale || mode == AtimeMode::Strictatime {
                    Stamp::Set
                } else {
                    return;
                }
            }
            _ => Stamp::Unknown,
        };
    }

    /// Bytes of a file changed, by somebody who may keep set-id bits or not.
    pub fn note_bytes(&mut self, ino: Ino, from: u64, to: u64, kill: bool) {
        self.ranges.push((ino, from, to));
        self.touch(ino, true);
        let node = self.node(ino);
        node.xattrs.remove(CAPABILITY);
        if kill {
            node.kill_set_ids();
        }
    }

    fn entries(&mut self, dir: Ino) -> Result<&mut BTreeMap<Vec<u8>, Ino>, Errno> {
        match &mut self.node(dir).body {
            Body::Dir { entries, .. } => Ok(entries),
            _ => Err(Errno::NOTDIR),
        }
    }

    pub fn find(&mut self, dir: Ino, name: &[u8]) -> Result<Option<Ino>, Errno> {
        Ok(self.entries(dir)?.get(name).copied())
    }

    pub fn can_make(&mut self, dir: Ino, name: &[u8]) -> Result<(), Errno> {
        check_new(name)?;
        let found = self.find(dir, name)?;
        if self.node(dir).nlink == 0 {
            return Err(Errno::NOENT);
        }
        found.map_or(Ok(()), |_| Err(Errno::EXIST))?;
        self.node(dir).check_flags(FLAG_IMMUTABLE)
    }

    pub fn can_make_unnamed(&mut self, dir: Ino) -> Result<(), Errno> {
        self.entries(dir)?;
        let node = self.node(dir);
        if node.nlink == 0 {
            return Err(Errno::NOENT);
        }
        node.check_flags(FLAG_IMMUTABLE)
    }

    /// The file system made `ino` for this directory.
    fn add_node(&mut self, dir: Ino, ino: Ino, mode: u32, body: Body, cred: &Cred) {
        let (label, changed) = (self.label(), self.now);
        let parent = self.node(dir);
        let (gid, parent_flags) = (parent.gid, parent.flags);
        let inherits = parent.mode & libc::S_ISGID != 0;
        let default = parent.xattrs.get(acl::DEFAULT).cloned();
        let is_dir = matches!(body, Body::Dir { .. });
        let mut mode = mode;
        let mut xattrs = BTreeMap::new();
        if inherits && is_dir {
            mode |= libc::S_ISGID;
        }
        match default {
            _ if matches!(body, Body::Link(_)) => {}
            Some(value) => {
                let mut list = List::decode(&value);
                list.limit_to(mode);
                mode = mode & !0o777 | list.bits();
                if list.is_extended() {
                    xattrs.insert(acl::ACCESS.to_vec(), list.encode());
                }
                if is_dir {
                    xattrs.insert(acl::DEFAULT.to_vec(), value);
                }
            }
            None => mode &= !cred.umask,
        }
        let mut node = Node {
            label,
            mode,
            uid: cred.uid,
            gid: if inherits { gid } else { cred.gid },
            nlink: if is_dir { 2 } else { 1 },
            rdev: 0,
            flags: 0,
            atime: Stamp::Set,
            mtime: Stamp::Set,
            ctime: Stamp::Set,
            btime: Stamp::Set,
            xattrs,
            body,
            opens: 0,
            lookups: 1,
            linkable: false,
            changed,
        };
        node.flags = parent_flags & INHERITED & node.flags_allowed();
        let former = self.nodes.insert(ino, node);
        assert!(former.is_none(), "inode number {ino} was used before");
        self.touched.insert(ino);
    }

    pub fn make(&mut self, dir: Ino, name: &[u8], ino: Ino, mode: u32, body: Body, cred: &Cred) {
        self.add_node(dir, ino, mode, body, cred);
        self.add_entry(dir, name, ino);
    }

    /// The file system made a file without a name.
    pub fn make_unnamed(&mut self, dir: Ino, ino: Ino, mode: u32, linkable: bool, cred: &Cred) {
        self.add_node(dir, ino, mode, Body::File(Content::default()), cred);
        let node = self.node(ino);
        (node.nlink, node.opens, node.linkable) = (0, 1, linkable);
    }

    fn add_entry(&mut self, dir: Ino, name: &[u8], ino: Ino) {
        let entries = self.entries(dir).expect("a directory");
        assert!(entries.insert(name.to_vec(), ino).is_none());
        self.touch(dir, true);
        if let Body::Dir { parent, .. } = &mut self.node(ino).body {
            *parent = dir;
            self.node(dir).nlink += 1;
        }
    }

    fn take_entry(&mut self, dir: Ino, name: &[u8]) -> Ino {
        let entries = self.entries(dir).expect("a directory");
        let ino = entries.remove(name).expect("it was found");
        self.touch(dir, true);
        if self.node(ino).is_dir() {
            self.node(dir).nlink -= 1;
        }
        ino
    }

    pub fn can_link(&mut self, ino: Ino, dir: Ino, name: &[u8]) -> Result<(), Errno> {
        check_new(name)?;
        let found = self.find(dir, name)?;
        let node = self.node(ino);
        if node.is_dir() {
            return Err(Errno::PERM);
        }
        let gone = node.nlink == 0 && !node.linkable;
        if gone || self.node(dir).nlink == 0 {
            return Err(Errno::NOENT);
        }
        found.map_or(Ok(()), |_| Err(Errno::EXIST))?;
        self.node(dir).check_flags(FLAG_IMMUTABLE)?;
        self.node(ino).check_flags(LOCKS)
    }

    pub fn link(&mut self, ino: Ino, dir: Ino, name: &[u8]) {
        self.add_entry(dir, name, ino);
        let node = self.node(ino);
        node.nlink += 1;
        node.lookups += 1;
        node.linkable = false;
        self.touch(ino, false);
    }

    /// May this entry be taken out?
    fn check_removal(&mut self, dir: Ino, ino: Ino) -> Result<(), Errno> {
        self.node(dir).check_flags(LOCKS)?;
        self.node(ino).check_flags(LOCKS)
    }

    /// Removes one name; `as_dir` for rmdir.
    pub fn remove(&mut self, dir: Ino, name: &[u8], as_dir: bool) -> Result<(), Errno> {
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        let ino = self.find(dir, name)?.ok_or(Errno::NOENT)?;
        self.check_removal(dir, ino)?;
        match (&self.node(ino).body, as_dir) {
            (Body::Dir { .. }, false) => return Err(Errno::ISDIR),
            (Body::Dir { entries, .. }, true) if !entries.is_empty() => {
                return Err(Errno::NOTEMPTY);
            }
            (Body::Dir { .. }, true) => {}
            (_, true) => return Err(Errno::NOTDIR),
            (_, false) => {}
        }
        self.take_entry(dir, name);
        self.drop_name(ino);
        Ok(())
    }

    fn drop_name(&mut self, ino: Ino) {
        let node = self.node(ino);
        node.nlink = if node.is_dir() { 0 } else { node.nlink - 1 };
        self.touch(ino, false);
        self.let_go(ino);
    }

    /// Forgets an inode that has neither name nor user.
    pub fn let_go(&mut self, ino: Ino) {
        let node = self.node(ino);
        if node.nlink == 0 && node.opens == 0 && node.lookups == 0 {
            self.nodes.remove(&ino);
        }
    }

    fn is_above(&mut self, above: Ino, dir: Ino) -> bool {
        let mut at = dir;
        while at != ROOT_INO && at != above {
            at = match &self.nodes[&at].body {
                Body::Dir { parent, .. } => *parent,
                _ => unreachable!("parents are directories"),
            };
        }
        at == above
    }

    pub fn can_rename(
        &mut self,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        flags: u32,
    ) -> Result<RenamePlan, Errno> {
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        if exchange && flags != libc::RENAME_EXCHANGE {
            return Err(Errno::INVAL);
        }
        self.entries(from.0)?;
        self.entries(to.0)?;
        let source = self.find(from.0, from.1)?.ok_or(Errno::NOENT)?;
        let target = self.find(to.0, to.1)?;
        if self.node(to.0).nlink == 0 {
            return Err(Errno::NOENT);
        }
        let source_is_dir = self.node(source).is_dir();
        if source_is_dir && self.is_above(source, to.0) {
            return Err(Errno::INVAL);
        }
        let plan = RenamePlan { source, target };
        let Some(target) = target else {
            if exchange {
                return Err(Errno::NOENT);
            }
            self.check_removal(from.0, source)?;
            self.node(to.0).check_flags(FLAG_IMMUTABLE)?;
            return Ok(plan);
        };
        if flags & libc::RENAME_NOREPLACE != 0 {
            return Err(Errno::EXIST);
        }
        if exchange && self.node(target).is_dir() && self.is_above(target, from.0) {
            return Err(Errno::INVAL);
        }
        if target == source {
            return Ok(plan);
        }
        self.check_removal(from.0, source)?;
        self.check_removal(to.0, target)?;
        let empty = match &self.node(target).body {
            Body::Dir { entries, .. } => Some(entries.is_empty()),
            _ => None,
        };
        match (source_is_dir, empty) {
            _ if exchange => {}
            (true, None) => return Err(Errno::NOTDIR),
            (false, Some(_)) => return Err(Errno::ISDIR),
            (true, Some(false)) => return Err(Errno::NOTEMPTY),
            _ => {}
        }
        Ok(plan)
    }

    /// Returns false if both names were the same inode, and nothing happened.
    pub fn rename(
        &mut self,
        plan: &RenamePlan,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        swap: bool,
    ) -> bool {
        if plan.target == Some(plan.source) {
            return false;
        }
        self.take_entry(from.0, from.1);
        if let Some(target) = plan.target {
            self.take_entry(to.0, to.1);
            if swap {
                self.add_entry(from.0, from.1, target);
                self.touch(target, false);
            } else {
                self.drop_name(target);
            }
        }
        self.add_entry(to.0, to.1, plan.source);
        self.touch(plan.source, false);
        true
    }

    pub fn can_resize(&mut self, ino: Ino, size: u64) -> Result<(), Errno> {
        let node = self.node(ino);
        node.check_flags(LOCKS)?;
        match &node.body {
            Body::Dir { .. } => Err(Errno::ISDIR),
            Body::File(_) if size > FILE_SIZE_MAX => Err(Errno::FBIG),
            Body::File(_) => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }

    /// After unmount: nobody uses anything.
    pub fn forget_users(&mut self) {
        self.nodes.retain(|_, node| node.nlink > 0);
        for node in self.nodes.values_mut() {
            (node.opens, node.lookups) = (0, 0);
        }
    }

    pub fn blocks(&self) -> u64 {
        let files = self.nodes.values().map(|node| match &node.body {
            Body::File(content) => content.blocks(),
            _ => 0,
        });
        files.sum()
    }
}
