//! What a file system holds, read back as a whole: every name, attribute and byte.

use std::collections::BTreeMap;

use braidfs::{Errno, FileSystem, Ino, ROOT_INO};

use crate::session::read;

const PAGE: usize = 4096;

/// Bytes read at a time.
const STEP: usize = 1 << 20;

/// Everything of an inode that can be seen and does not depend on the clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Mode, links, user, group, device, flags.
    pub attr: [u32; 6],
    pub size: u64,
    /// Checksums of the pages that are not zero.
    pub pages: BTreeMap<u64, u32>,
    pub target: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub entries: BTreeMap<Vec<u8>, Ino>,
}

/// All that can be reached from the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree(pub BTreeMap<Ino, Node>);

/// What could not be read, and why.
pub type Unreadable = String;

impl Tree {
    /// Reads everything.
    pub fn of(fs: &std::sync::Arc<FileSystem>) -> Result<Tree, Unreadable> {
        let mut tree = BTreeMap::new();
        let mut todo = vec![ROOT_INO];
        while let Some(ino) = todo.pop() {
            let node = node_of(fs, ino).map_err(|error| format!("inode {ino}: {error}"))?;
            todo.extend(node.entries.values().filter(|ino| !tree.contains_key(*ino)));
            tree.insert(ino, node);
        }
        Ok(Tree(tree))
    }

    /// Whether an inode, or the names that lead to it, differ between the two.
    pub fn changed(&self, other: &Tree, ino: Ino) -> bool {
        let names = |tree: &Tree| -> Vec<(Ino, Vec<u8>)> {
            let all = tree.0.iter();
            let all =
                all.flat_map(|(dir, node)| node.entries.iter().map(move |entry| (dir, entry)));
            let ours = all.filter(|(_, (_, target))| **target == ino);
            ours.map(|(dir, (name, _))| (*dir, name.clone())).collect()
        };
        self.0.get(&ino) != other.0.get(&ino) || names(self) != names(other)
    }

    /// The first few differences, for people.
    pub fn differences(&self, other: &Tree) -> Vec<String> {
        let mut all: Vec<Ino> = self.0.keys().chain(other.0.keys()).copied().collect();
        all.sort_unstable();
        all.dedup();
        let mut found = Vec::new();
        for ino in all {
            match (self.0.get(&ino), other.0.get(&ino)) {
                (Some(_), None) => found.push(format!("inode {ino} is missing")),
                (None, Some(_)) => found.push(format!("inode {ino} should not be there")),
                (Some(one), Some(two)) => one.differences(two, ino, &mut found),
                (None, None) => {}
            }
        }
        found.truncate(8);
        found
    }
}

impl Node {
    fn differences(&self, other: &Node, ino: Ino, found: &mut Vec<String>) {
        let mut compare = |what: &str, expected: String, got: String| {
            if expected != got {
                found.push(format!(
                    "inode {ino}: {what}: expected {expected}, found {got}"
                ));
            }
        };
        let attr = |node: &Node| format!("mode {:o}, {:?}", node.attr[0], &node.attr[1..]);
        compare(
            "mode, links, uid, gid, rdev, flags",
            attr(self),
            attr(other),
        );
        compare("size", self.size.to_string(), other.size.to_string());
        let pages = |node: &Node| format!("{:x?}", node.pages);
        compare("checksums of pages", pages(self), pages(other));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        compare("target", text(&self.target), text(&other.target));
        let entries = |node: &Node| {
            let entries = node.entries.iter();
            let entries = entries.map(|(name, ino)| format!("{} -> {ino}", text(name)));
            format!("{:?}", entries.collect::<Vec<_>>())
        };
        compare("entries", entries(self), entries(other));
        let xattrs = |node: &Node| {
            let xattrs = node.xattrs.iter();
            let crc = |value: &[u8]| crc32c::crc32c(value);
            let xattrs = xattrs.map(|(name, value)| (text(name), value.len(), crc(value)));
            format!("{:x?}", xattrs.collect::<Vec<_>>())
        };
        compare("extended attributes", xattrs(self), xattrs(other));
    }
}

fn node_of(fs: &std::sync::Arc<FileSystem>, ino: Ino) -> Result<Node, Errno> {
    let attr = fs.getattr(ino)?;
    let mut node = Node {
        attr: [
            attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, attr.flags,
        ],
        ..Node::default()
    };
    let names = fs.listxattr(ino)?;
    for name in names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        node.xattrs.insert(name.to_vec(), fs.getxattr(ino, name)?);
    }
    match attr.mode & libc::S_IFMT {
        libc::S_IFDIR => node.entries = entries_of(fs, ino)?,
        libc::S_IFLNK => node.target = fs.readlink(ino)?,
        libc::S_IFREG => {
            node.size = attr.size;
            node.pages = pages_of(fs, ino, attr.size)?;
        }
        _ => {}
    }
    Ok(node)
}

/// The names of a directory; each must be there by look-up, too.
fn entries_of(fs: &FileSystem, dir: Ino) -> Result<BTreeMap<Vec<u8>, Ino>, Errno> {
    let mut entries = BTreeMap::new();
    fs.readdir(dir, 0, &mut |entry| {
        if entry.name != b"." && entry.name != b".." {
            entries.insert(entry.name.to_vec(), entry.ino);
        }
        true
    })?;
    for (name, ino) in &entries {
        let found = fs.lookup(dir, name)?.ino;
        fs.forget(found, 1);
        if found != *ino {
            return Err(Errno::IO);
        }
    }
    Ok(entries)
}

fn pages_of(
    fs: &std::sync::Arc<FileSystem>,
    ino: Ino,
    size: u64,
) -> Result<BTreeMap<u64, u32>, Errno> {
    let file = fs.open(ino, libc::O_RDONLY)?;
    let mut pages = BTreeMap::new();
    let mut at = 0;
    while at < size {
        let mut bytes = read(fs, &file, at, STEP)?;
        if bytes.is_empty() {
            return Err(Errno::IO);
        }
        let len = bytes.len() as u64;
        bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        for (nth, page) in bytes.chunks(PAGE).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                pages.insert(at / PAGE as u64 + nth as u64, crc32c::crc32c(page));
            }
        }
        at += len;
    }
    fs.release(&file);
    Ok(pages)
}
