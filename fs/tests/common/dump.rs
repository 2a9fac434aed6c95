//! What a file system holds, read back for comparison.

use std::collections::BTreeMap;
use std::sync::Arc;

use braidfs::{Errno, FileSystem, Ino, ROOT_INO};

use super::content::{PAGE, is_zero};
use super::model::{Body, Model};
use super::try_read;

/// Everything that can be seen of an inode, to be compared. Pages by their checksum.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct DumpNode {
    pub attr: [u32; 6],
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

impl Model {
    pub fn dump(&self) -> Dump {
        let named = self.nodes.iter().filter(|(_, node)| node.nlink > 0);
        let nodes = named.map(|(&ino, node)| {
            let mut dumped = DumpNode {
                attr: [
                    node.mode, node.nlink, node.uid, node.gid, node.rdev, node.flags,
                ],
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

/// Names, and the inode number and type that a listing shows with each; listed in batches.
pub fn listing(fs: &FileSystem, dir: Ino, batch: u64) -> BTreeMap<Vec<u8>, (Ino, u8)> {
    let mut found = BTreeMap::new();
    let mut cookie = 0;
    loop {
        let mut count = 0;
        fs.readdir(dir, cookie, &mut |entry| {
            cookie = entry.cookie;
            count += 1;
            let former = found.insert(entry.name.to_vec(), (entry.ino, entry.kind));
            assert!(former.is_none(), "a name is listed twice");
            count < batch
        })
        .expect("readdir");
        if count == 0 {
            return found;
        }
    }
}

/// The entries of a directory; "." and ".." are checked and left out.
pub fn entries(fs: &FileSystem, dir: Ino, batch: u64) -> BTreeMap<Vec<u8>, Ino> {
    let mut found = listing(fs, dir, batch);
    let dots = [&b"."[..], b".."].map(|name| found.remove(name));
    assert!(dots.iter().all(Option::is_some));
    let found = found.into_iter();
    found.map(|(name, (ino, _))| (name, ino)).collect()
}

/// Everything that can be seen from the root.
pub fn dump(fs: &Arc<FileSystem>) -> Dump {
    dump_below(fs, ROOT_INO)
}

/// Everything that can be seen from a directory.
pub fn dump_below(fs: &Arc<FileSystem>, dir: Ino) -> Dump {
    let mut out = BTreeMap::new();
    let mut todo = vec![dir];
    while let Some(ino) = todo.pop() {
        let attr = fs.getattr(ino).expect("getattr");
        let mut node = DumpNode {
            attr: [
                attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, attr.flags,
            ],
            ..DumpNode::default()
        };
        let names = fs.listxattr(ino).expect("listxattr");
        for name in names
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
        {
            let value = fs.getxattr(ino, name).expect("getxattr");
            node.xattrs.insert(name.to_vec(), value);
        }
        match attr.mode & libc::S_IFMT {
            libc::S_IFDIR => {
                node.entries = entries(fs, ino, 100);
                todo.extend(node.entries.values().filter(|ino| !out.contains_key(*ino)));
            }
            libc::S_IFLNK => node.target = fs.readlink(ino).expect("readlink"),
            libc::S_IFREG => {
                node.size = attr.size;
                node.pages = pages_of(fs, ino, attr.size);
            }
            _ => {}
        }
        out.insert(ino, node);
    }
    Dump(out)
}

/// Checksums of the pages of a file that are not zero.
fn pages_of(fs: &Arc<FileSystem>, ino: Ino, size: u64) -> BTreeMap<u64, u32> {
    const STEP: u64 = 1 << 20;
    let file = fs.open(ino, libc::O_RDONLY).expect("open");
    let mut pages = BTreeMap::new();
    let mut at = 0;
    while at < size {
        match fs.lseek(&file, at, libc::SEEK_DATA) {
            Ok(data) => at = data / PAGE * PAGE,
            Err(error) => {
                assert_eq!(error, Errno::NXIO);
                break;
            }
        }
        let mut bytes = try_read(fs, &file, at, STEP as usize, false).expect("read");
        bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
        for (nth, page) in bytes.chunks(PAGE as usize).enumerate() {
            if !is_zero(page) {
                pages.insert(at / PAGE + nth as u64, crc32c::crc32c(page));
            }
        }
        at += STEP;
    }
    fs.release(&file);
    pages
}
