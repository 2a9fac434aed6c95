//! What a POSIX file system should do, in memory and as simply as possible.

use std::collections::BTreeMap;

use braidfs::{Cred, Errno, FILE_SIZE_MAX, Ino, ROOT_INO, Timestamp};

pub const PAGE: u64 = 4096;

/// A small seeded generator.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// Bytes, none of them zero, so that a lost byte shows.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            let word = self.next() | 0x0101_0101_0101_0101;
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// The bytes of a file. A page that is absent is zero.
#[derive(Clone, Default)]
pub struct Content {
    pub size: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Content {
    fn each_part(offset: u64, len: u64, mut each: impl FnMut(u64, usize, usize, usize)) {
        let mut at = 0;
        while at < len {
            let within = (offset + at) % PAGE;
            let part = (PAGE - within).min(len - at);
            each(
                (offset + at) / PAGE,
                within as usize,
                at as usize,
                part as usize,
            );
            at += part;
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        Self::each_part(offset, data.len() as u64, |page, within, at, len| {
            let page = self.pages.entry(page);
            let page = page.or_insert_with(|| vec![0; PAGE as usize]);
            page[within..within + len].copy_from_slice(&data[at..at + len]);
        });
        if !data.is_empty() {
            self.size = self.size.max(offset + data.len() as u64);
        }
    }

    pub fn zero(&mut self, from: u64, to: u64) {
        let (first, last) = (from / PAGE, to.div_ceil(PAGE));
        let touched: Vec<u64> = self.pages.range(first..last).map(|(&at, _)| at).collect();
        for at in touched {
            let (low, high) = (from.max(at * PAGE), to.min((at + 1) * PAGE));
            if high - low == PAGE {
                self.pages.remove(&at);
            } else if let Some(page) = self.pages.get_mut(&at) {
                page[(low - at * PAGE) as usize..(high - at * PAGE) as usize].fill(0);
            }
        }
    }

    pub fn truncate(&mut self, size: u64) {
        if size < self.size {
            let end = self.size.next_multiple_of(PAGE);
            self.zero(size, end);
        }
        self.size = size;
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let len = (len as u64).min(self.size.saturating_sub(offset));
        let mut out = vec![0; len as usize];
        Self::each_part(offset, len, |page, within, at, len| {
            if let Some(page) = self.pages.get(&page) {
                out[at..at + len].copy_from_slice(&page[within..within + len]);
            }
        });
        out
    }

    /// Pages that are not all zero.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let filled = |page: &[u8]| page.iter().any(|&byte| byte != 0);
        self.pages
            .iter()
            .map(|(&at, page)| (at, page.as_slice()))
            .filter(move |(_, page)| filled(page))
    }

    pub fn is_zero(&self, from: u64, to: u64) -> bool {
        let mut copy = self.pages.range(from / PAGE..to.div_ceil(PAGE));
        copy.all(|(&at, page)| {
            let (low, high) = (from.max(at * PAGE), to.min((at + 1) * PAGE));
            page[(low - at * PAGE) as usize..(high - at * PAGE) as usize]
                .iter()
                .all(|&byte| byte == 0)
        })
    }

    pub fn bytes_kept(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }
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
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u32,
    pub mtime: Option<Timestamp>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub body: Body,
    pub opens: u32,
    pub lookups: u64,
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
}

#[derive(Clone)]
pub struct Model {
    pub nodes: BTreeMap<Ino, Node>,
    /// Number of the operation under way.
    pub now: u64,
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
    pub fn new(root: &braidfs::Attr) -> Self {
        let entries = BTreeMap::new();
        let root = Node {
            mode: root.mode,
            uid: root.uid,
            gid: root.gid,
            nlink: 2,
            rdev: 0,
            mtime: None,
            xattrs: BTreeMap::new(),
            body: Body::Dir {
                entries,
                parent: ROOT_INO,
            },
            opens: 0,
            lookups: 1,
            changed: 0,
        };
        Self {
            nodes: BTreeMap::from([(ROOT_INO, root)]),
            now: 0,
        }
    }

    pub fn node(&mut self, ino: Ino) -> &mut Node {
        self.nodes.get_mut(&ino).expect("the model knows the inode")
    }

    pub fn content(&mut self, ino: Ino) -> &mut Content {
        self.node(ino).file().expect("a file")
    }

    pub fn touch(&mut self, ino: Ino, modified: bool) {
        let now = self.now;
        let node = self.node(ino);
        node.changed = now;
        if modified {
            node.mtime = None;
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
        found.map_or(Ok(()), |_| Err(Errno::EXIST))
    }

    /// The file system made `ino` there.
    pub fn make(&mut self, dir: Ino, name: &[u8], ino: Ino, mode: u32, body: Body, cred: &Cred) {
        let (parent_mode, parent_gid) = (self.node(dir).mode, self.node(dir).gid);
        let inherits = parent_mode & libc::S_ISGID != 0;
        let is_dir = matches!(body, Body::Dir { .. });
        let mut mode = mode;
        if !matches!(body, Body::Link(_)) {
            mode &= !cred.umask;
        }
        if inherits && is_dir {
            mode |= libc::S_ISGID;
        }
        let node = Node {
            mode,
            uid: cred.uid,
            gid: if inherits { parent_gid } else { cred.gid },
            nlink: if is_dir { 2 } else { 1 },
            rdev: 0,
            mtime: None,
            xattrs: BTreeMap::new(),
            body,
            opens: 0,
            lookups: 1,
            changed: self.now,
        };
        let former = self.nodes.insert(ino, node);
        assert!(former.is_none(), "inode number {ino} was used before");
        self.add_entry(dir, name, ino);
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
        if self.node(ino).is_dir() {
            return Err(Errno::PERM);
        }
        if self.node(ino).nlink == 0 || self.node(dir).nlink == 0 {
            return Err(Errno::NOENT);
        }
        found.map_or(Ok(()), |_| Err(Errno::EXIST))
    }

    pub fn link(&mut self, ino: Ino, dir: Ino, name: &[u8]) {
        self.add_entry(dir, name, ino);
        self.node(ino).nlink += 1;
        self.node(ino).lookups += 1;
        self.touch(ino, false);
    }

    /// Removes one name; `as_dir` for rmdir.
    pub fn remove(&mut self, dir: Ino, name: &[u8], as_dir: bool) -> Result<(), Errno> {
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        let ino = self.find(dir, name)?.ok_or(Errno::NOENT)?;
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
            at = match &self.node(at).body {
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
            return if exchange {
                Err(Errno::NOENT)
            } else {
                Ok(plan)
            };
        };
        if flags & libc::RENAME_NOREPLACE != 0 {
            return Err(Errno::EXIST);
        }
        if target == source {
            return Ok(plan);
        }
        let empty = match &self.node(target).body {
            Body::Dir { entries, .. } => Some(entries.is_empty()),
            _ => None,
        };
        match (source_is_dir, empty) {
            _ if exchange && empty.is_some() && self.is_above(target, from.0) => {
                return Err(Errno::INVAL);
            }
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
        match &self.node(ino).body {
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

    pub fn bytes_kept(&self) -> u64 {
        let files = self.nodes.values().map(|node| match &node.body {
            Body::File(content) => content.bytes_kept(),
            _ => 0,
        });
        files.sum()
    }

    pub fn dump(&self) -> Dump {
        let named = self.nodes.iter().filter(|(_, node)| node.nlink > 0);
        let nodes = named.map(|(&ino, node)| {
            let mut dumped = DumpNode {
                attr: [node.mode, node.nlink, node.uid, node.gid, node.rdev],
                xattrs: node.xattrs.clone(),
                ..DumpNode::default()
            };
            match &node.body {
                Body::Dir { entries, .. } => dumped.entries = entries.clone(),
                Body::File(content) => {
                    dumped.size = content.size;
                    dumped.pages = content
                        .pages()
                        .map(|(at, page)| (at, crc32c::crc32c(page)))
                        .collect();
                }
                Body::Link(target) => dumped.target = target.clone(),
                Body::Special => {}
            }
            (ino, dumped)
        });
        Dump(nodes.collect())
    }
}

/// Everything that can be seen of an inode, to be compared. Pages by their checksum.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct DumpNode {
    pub attr: [u32; 5],
    pub size: u64,
    pub pages: BTreeMap<u64, u32>,
    pub target: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub entries: BTreeMap<Vec<u8>, Ino>,
}

/// A whole tree.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Dump(pub BTreeMap<Ino, DumpNode>);

impl Dump {
    /// The first few differences, for people.
    pub fn differences(&self, other: &Dump) -> Vec<String> {
        let mut all: Vec<Ino> = self.0.keys().chain(other.0.keys()).copied().collect();
        all.sort_unstable();
        all.dedup();
        let mut found = Vec::new();
        for ino in all {
            match (self.0.get(&ino), other.0.get(&ino)) {
                (Some(_), None) => found.push(format!("inode {ino} is missing")),
                (None, Some(_)) => found.push(format!("inode {ino} should not be there")),
                (Some(one), Some(two)) if one != two => {
                    let mut one = one.clone();
                    let mut two = two.clone();
                    let common = |at: &u64, crc: &u32, pages: &BTreeMap<u64, u32>| {
                        pages.get(at) != Some(crc)
                    };
                    let kept = one.pages.clone();
                    one.pages.retain(|at, crc| common(at, crc, &two.pages));
                    two.pages.retain(|at, crc| common(at, crc, &kept));
                    found.push(format!("inode {ino}: expected {one:?}, found {two:?}"));
                }
                _ => {}
            }
        }
        found.truncate(6);
        found
    }
}
