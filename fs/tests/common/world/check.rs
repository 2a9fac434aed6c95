//! Comparing the file system with the model: what a step touched, or all there is.
//!
//! Looking changes access times; the model follows.

use std::collections::BTreeMap;
use std::sync::Arc;

use braidfs::{Attr, Ino, OpenFile, Timestamp};

use super::World;
use crate::common::content::PAGE;
use crate::common::dump::{dump, listing};
use crate::common::model::{Body, Stamp};
use crate::common::try_read;

/// Of a long range both ends are read, and the pages of the model that lie between.
const RANGE_BYTES_MAX: u64 = 2 << 20;

const END_BYTES: u64 = 64 << 10;

#[track_caller]
fn same<T: PartialEq + std::fmt::Debug>(last: &str, what: &str, found: &T, expected: &T) {
    assert!(
        found == expected,
        "operation {last}: {what}: found {found:?}, expected {expected:?}"
    );
}

impl World {
    /// Compares everything that the step touched.
    pub fn compare(&mut self) {
        if !self.limits.compare {
            return;
        }
        let touched = std::mem::take(&mut self.model.touched);
        for ino in touched {
            if self.model.nodes.contains_key(&ino) {
                self.compare_inode(ino);
            }
        }
        for (ino, from, to) in std::mem::take(&mut self.model.ranges) {
            if self.model.nodes.contains_key(&ino) {
                self.compare_range(ino, from, to);
            }
        }
    }

    fn compare_inode(&mut self, ino: Ino) {
        self.check_attr_of(ino);
        self.check_xattrs(ino);
        match &self.model.node(ino).body {
            Body::Dir { .. } => self.check_listing(ino, 100),
            Body::Link(_) => self.check_target(ino),
            _ => return,
        }
        self.check_attr_of(ino);
    }

    /// The bytes of a range, a page on either side, and where data and holes begin there.
    fn compare_range(&mut self, ino: Ino, from: u64, to: u64) {
        let file = self.fs.open(ino, libc::O_RDONLY).expect("open to look");
        let from = from.saturating_sub(PAGE);
        let to = to.saturating_add(PAGE);
        self.check_seek(&file, from);
        let mut parts = BTreeMap::new();
        if to - from <= RANGE_BYTES_MAX {
            parts.insert(from, to - from);
        } else {
            parts.extend([(from, END_BYTES), (to - END_BYTES, END_BYTES)]);
            let pages = self.model.content(ino).pages();
            let pages = pages.map(|(at, _)| at * PAGE);
            parts.extend(
                pages
                    .filter(|at| (from..to).contains(at))
                    .map(|at| (at, PAGE)),
            );
        }
        for (at, len) in parts {
            let direct = at.is_multiple_of(PAGE) && self.rng.one_in(3);
            self.model.accessed(ino);
            let found = try_read(&self.fs, &file, at, len as usize, direct).expect("read");
            let expected = self.model.content(ino).read(at, len as usize);
            self.check_bytes(ino, at, &found, &expected);
            self.check_attr_of(ino);
        }
        self.fs.release(&file);
    }

    pub(super) fn check_seek(&mut self, file: &Arc<OpenFile>, offset: u64) {
        let content = self.model.content(file.ino());
        let (expected, is_vague) = (content.seek(offset), content.is_vague);
        let found = [libc::SEEK_DATA, libc::SEEK_HOLE]
            .map(|whence| self.fs.lseek(file, offset, whence).ok());
        if !is_vague {
            let what = format!("data and hole from {offset} of {}", file.ino());
            return same(&self.last(), &what, &found, &expected);
        }
        let content = self.model.content(file.ino());
        let size = content.size;
        let skipped = found[0].unwrap_or(size);
        assert!(content.is_zero(offset, skipped), "data was passed over");
        assert_eq!(found[1].is_some(), offset < size);
        if let Some(hole) = found[1].filter(|&hole| hole < size) {
            let end = (hole / PAGE + 1) * PAGE;
            assert!(
                content.is_zero(hole, end.min(size)),
                "data is called a hole"
            );
        }
    }

    pub(super) fn check_listing(&mut self, dir: Ino, batch: u64) {
        self.model.accessed(dir);
        let found = listing(&self.fs, dir, batch);
        let Body::Dir { entries, parent } = &self.model.nodes[&dir].body else {
            unreachable!("it is one")
        };
        let kind = |ino: &Ino| (self.model.nodes[ino].mode >> 12) as u8;
        let mut expected: BTreeMap<_, _> = entries
            .iter()
            .map(|(name, ino)| (name.clone(), (*ino, kind(ino))))
            .collect();
        expected.insert(b".".to_vec(), (dir, libc::DT_DIR));
        // A removed directory's may be gone.
        let parent = match self.model.nodes[&dir].nlink {
            0 => found.get(&b".."[..]).map_or(0, |(ino, _)| *ino),
            _ => *parent,
        };
        expected.insert(b"..".to_vec(), (parent, libc::DT_DIR));
        let named = |list: BTreeMap<Vec<u8>, (Ino, u8)>| -> Vec<_> {
            let text = |name: Vec<u8>| String::from_utf8_lossy(&name).into_owned();
            list.into_iter()
                .map(|(name, what)| (text(name), what))
                .collect()
        };
        let what = format!("names in {dir}");
        same(&self.last(), &what, &named(found), &named(expected));
    }

    pub(super) fn check_target(&mut self, ino: Ino) {
        self.model.accessed(ino);
        let found = self.fs.readlink(ino).expect("readlink");
        let Body::Link(target) = &self.model.nodes[&ino].body else {
            unreachable!("it is one")
        };
        same(&self.last(), "target", &found, target);
    }

    pub(super) fn check_xattrs(&mut self, ino: Ino) {
        let expected = &self.model.nodes[&ino].xattrs;
        let list: Vec<u8> = expected
            .keys()
            .flat_map(|name| name.iter().copied().chain([0]))
            .collect();
        same(
            &self.last(),
            "names of attributes",
            &self.fs.listxattr(ino),
            &Ok(list),
        );
        for (name, value) in expected {
            let found = self.fs.getxattr(ino, name);
            assert!(
                found.as_ref() == Ok(value),
                "operation {}: the value of {} of {ino} is another",
                self.last(),
                String::from_utf8_lossy(name)
            );
        }
    }

    pub(super) fn check_attr_of(&mut self, ino: Ino) {
        let attr = self.fs.getattr(ino).expect("getattr");
        self.check_attr(&attr);
    }

    pub(super) fn check_attr(&mut self, attr: &Attr) {
        let (last, began) = (self.last(), self.began);
        let compare = self.limits.compare;
        let node = self.model.node(attr.ino);
        let found = [
            attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, attr.flags,
        ];
        let expected = [
            node.mode, node.nlink, node.uid, node.gid, node.rdev, node.flags,
        ];
        same(
            &last,
            &format!("attributes of {}", attr.ino),
            &found,
            &expected,
        );
        let (size, blocks) = match &node.body {
            Body::File(content) => (content.size, (!content.is_vague).then(|| content.blocks())),
            Body::Link(target) => (target.len() as u64, Some(0)),
            Body::Dir { entries, .. } => (
                2 * entries.keys().map(|name| name.len() as u64).sum::<u64>(),
                Some(0),
            ),
            Body::Special => (0, Some(0)),
        };
        same(&last, &format!("size of {}", attr.ino), &attr.size, &size);
        if !compare {
            return;
        }
        if let Some(blocks) = blocks {
            let expected = blocks * PAGE / 512;
            same(
                &last,
                &format!("blocks of {}", attr.ino),
                &attr.blocks,
                &expected,
            );
        }
        let times = [
            ("atime", &mut node.atime, attr.atime),
            ("mtime", &mut node.mtime, attr.mtime),
            ("ctime", &mut node.ctime, attr.ctime),
            ("birth time", &mut node.btime, attr.btime),
        ];
        let now = began..=Timestamp::now();
        for (what, stamp, found) in times {
            let good = match *stamp {
                Stamp::At(time) => time == found,
                Stamp::Set => now.contains(&found),
                Stamp::Maybe(time) => time == found || now.contains(&found),
                Stamp::Unknown => true,
            };
            assert!(
                good,
                "operation {last}: {what} of {}: found {found:?}, expected {stamp:?} in {now:?}",
                attr.ino
            );
            *stamp = Stamp::At(found);
        }
    }

    /// The whole tree.
    pub fn check_tree(&mut self) {
        for ino in self.model.nodes.keys().copied().collect::<Vec<_>>() {
            self.check_attr_of(ino);
        }
        let found = dump(&self.fs);
        let expected = self.model.dump();
        let differences = expected.differences(&found);
        assert!(differences.is_empty(), "{}: {differences:#?}", self.last());
        for ino in self.model.nodes.keys().copied().collect::<Vec<_>>() {
            // It was read, maybe.
            let node = self.model.node(ino);
            if let Stamp::At(before) = node.atime {
                self.model.accessed(ino);
                let node = self.model.node(ino);
                if node.atime == Stamp::Set {
                    node.atime = Stamp::Maybe(before);
                }
            }
            self.check_attr_of(ino);
            if self.limits.compare {
                self.check_xattrs(ino);
            }
        }
        self.check_open();
    }

    /// What is open and has no name.
    fn check_open(&mut self) {
        for opened in self.handles.clone() {
            let content = self.model.content(opened.ino()).clone();
            for (at, page) in content.pages() {
                let len = (content.size - at * PAGE).min(PAGE) as usize;
                self.model.accessed(opened.ino());
                let found = try_read(&self.fs, &opened.file, at * PAGE, len, false).expect("read");
                self.check_bytes(opened.ino(), at * PAGE, &found, &page[..len]);
                if self.limits.compare {
                    self.check_attr_of(opened.ino());
                }
            }
        }
    }
}
