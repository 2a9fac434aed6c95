//! Checking an unmounted volume, without changing it.
//!
//! Three passes over the metadata tables: inodes and what hangs on them; names against inodes;
//! extents and free space against the data chunks. Labels and chunk table have been checked when
//! the volume was assembled. Data blocks are not read: that is a scrub's work.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;

use braidfs_blockdev::{ChunkKind, Volume};

use crate::alloc::{FREE_KNOWN_CHUNK_KEY, RunSet};
use crate::filesystem::FileSystem;
use crate::inode::PAGE;
use crate::meta::records::{
    DentryRecord, Extent, InodeRecord, Orphan, decode_cookie_entry, dt_of_mode, key_u64,
};
use crate::meta::store::Table;
use crate::{Attr, Errno, Ino, MountError, MountOptions, ROOT_INO};

/// One thing that is wrong.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Problem {
    /// What kind of thing: a short, stable word.
    pub kind: &'static str,
    /// Which one: "inode 12", "block 4711".
    pub object: String,
    /// What was expected and what was found.
    pub message: String,
}

/// The outcome of a check.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Inodes seen.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Directory entries.
    pub entries: u64,
    /// Extents.
    pub extents: u64,
    /// Blocks of data in extents.
    pub data_blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Blocks of all data chunks.
    pub chunk_blocks: u64,
    /// Inodes that wait for deletion.
    pub orphans: u64,
    /// What is wrong; empty for a sound volume.
    pub problems: Vec<Problem>,
}

/// More problems than this are counted no further.
const PROBLEMS_MAX: usize = 10_000;

/// Page cache of a check, in bytes.
const CHECK_CACHE_BYTES: u64 = 64 << 20;

/// Checks a volume that was assembled read-only.
pub fn check(volume: Arc<Volume>) -> Result<Report, MountError> {
    let options = MountOptions {
        read_only: true,
        cache_bytes: CHECK_CACHE_BYTES,
        ..MountOptions::default()
    };
    let fs = FileSystem::start(volume, options, false)?;
    let check = Check {
        fs: &fs,
        report: Report::default(),
        inodes: HashMap::new(),
        listed: HashMap::new(),
    };
    let report = check.run();
    let closed = fs.unmount();
    let report = report?;
    closed?;
    Ok(report)
}

/// What the passes gather about an inode.
struct Seen {
    attr: Attr,
    parent: Ino,
    orphan: bool,
    names: u32,
    subdirs: u32,
    name_bytes: u64,
    blocks: u64,
}

struct Check<'a> {
    fs: &'a FileSystem,
    report: Report,
    inodes: HashMap<Ino, Seen>,
    /// (directory, cookie) -> (inode, hash of the name), of entries not yet found by name.
    listed: HashMap<(Ino, u64), (Ino, u64)>,
}

fn hash_of(name: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(name);
    hasher.finish()
}

const FIRST: [u8; 0] = [];
const LAST: [u8; 9] = [0xff; 9];

impl Check<'_> {
    fn problem(&mut self, kind: &'static str, object: String, message: String) {
        if self.report.problems.len() < PROBLEMS_MAX {
            self.report.problems.push(Problem {
                kind,
                object,
                message,
            });
        }
    }

    fn scan(&mut self, table: Table, each: fn(&mut Self, &[u8], &[u8])) -> Result<(), Errno> {
        let fs = self.fs;
        fs.store.scan(table, &FIRST, &LAST, &mut |key, value| {
            each(self, key, value);
            true
        })
    }

    fn run(mut self) -> Result<Report, MountError> {
        self.scan(Table::Inodes, Self::inode)?;
        self.scan(Table::Orphans, Self::orphan)?;
        self.scan(Table::Cookies, Self::cookie)?;
        self.scan(Table::Dentries, Self::dentry)?;
        self.scan(Table::Xattrs, Self::xattr)?;
        self.check_listing();
        self.check_space()?;
        self.check_inodes();
        Ok(self.report)
    }

    fn inode(&mut self, key: &[u8], value: &[u8]) {
        self.report.inodes += 1;
        let Some(ino) = key_u64(key, 0).filter(|_| key.len() == 8) else {
            return self.problem("inode", format!("key {key:?}"), "is no inode number".into());
        };
        let Some(record) = InodeRecord::decode(ino, value) else {
            return self.problem("inode", format!("inode {ino}"), "damaged record".into());
        };
        self.report.directories += u64::from(record.attr.is_dir());
        let seen = Seen {
            attr: record.attr,
            parent: record.parent,
            orphan: false,
            names: 0,
            subdirs: 0,
            name_bytes: 0,
            blocks: 0,
        };
        self.inodes.insert(ino, seen);
    }

    fn orphan(&mut self, key: &[u8], value: &[u8]) {
        self.report.orphans += 1;
        let ino = key_u64(key, 0).unwrap_or(0);
        match (self.inodes.get_mut(&ino), Orphan::decode(value)) {
            (Some(seen), Some(orphan)) => seen.orphan = orphan == Orphan::Delete,
            (None, _) => {
                self.problem("orphan", format!("inode {ino}"), "does not exist".into());
            }
            (_, None) => {
                self.problem("orphan", format!("inode {ino}"), "damaged record".into());
            }
        }
    }

    fn cookie(&mut self, key: &[u8], value: &[u8]) {
        let dir = key_u64(key, 0).unwrap_or(0);
        let Some((ino, _, name)) = decode_cookie_entry(value) else {
            return self.problem(
                "listing",
                format!("directory {dir}"),
                "damaged record".into(),
            );
        };
        self.listed
            .insert((dir, key_u64(key, 8).unwrap_or(0)), (ino, hash_of(name)));
    }

    fn dentry(&mut self, key: &[u8], value: &[u8]) {
        self.report.entries += 1;
        let dir = key_u64(key, 0).unwrap_or(0);
        let name = key.get(8..).unwrap_or_default();
        let object = format!(
            "entry '{}' of directory {dir}",
            String::from_utf8_lossy(name)
        );
        let Some(record) = DentryRecord::decode(value) else {
            return self.problem("entry", object, "damaged record".into());
        };
        let Some(seen) = self.inodes.get_mut(&record.ino) else {
            let message = format!("names inode {}, which does not exist", record.ino);
            return self.problem("entry", object, message);
        };
        seen.names += 1;
        if self.listed.remove(&(dir, record.cookie)) != Some((record.ino, hash_of(name))) {
            self.problem(
                "listing",
                object,
                "is not listed, or as something else".into(),
            );
            return;
        }
        let Some(seen) = self.inodes.get_mut(&record.ino) else {
            return;
        };
        let (is_dir, kind) = (seen.attr.is_dir(), dt_of_mode(seen.attr.mode));
        let parent = seen.parent;
        if kind != record.kind {
            let message = format!("has type {}, its inode has {kind}", record.kind);
            self.problem("entry", object.clone(), message);
        }
        if is_dir && parent != dir {
            let message = format!("is a directory whose parent says {parent}");
            self.problem("entry", object.clone(), message);
        }
        match self.inodes.get_mut(&dir) {
            Some(seen) if seen.attr.is_dir() => {
                seen.name_bytes += name.len() as u64;
                seen.subdirs += u32::from(is_dir);
            }
            _ => self.problem("entry", object, "its directory does not exist".into()),
        }
    }

    fn xattr(&mut self, key: &[u8], _value: &[u8]) {
        let ino = key_u64(key, 0).unwrap_or(0);
        if !self.inodes.contains_key(&ino) {
            self.problem("xattr", format!("inode {ino}"), "does not exist".into());
        }
    }

    /// Every listed name is found by name, too.
    fn check_listing(&mut self) {
        let mut rest: Vec<_> = std::mem::take(&mut self.listed).into_iter().collect();
        rest.sort_unstable();
        for ((dir, cookie), (ino, _)) in rest {
            let message = format!("lists inode {ino} (cookie {cookie}), which no name finds");
            self.problem("listing", format!("directory {dir}"), message);
        }
    }

    fn extent(&mut self, key: &[u8], value: &[u8], used: &mut RunSet) {
        self.report.extents += 1;
        let (ino, start) = (key_u64(key, 0).unwrap_or(0), key_u64(key, 8).unwrap_or(0));
        let object = format!("inode {ino}, file block {start}");
        let Some(extent) = Extent::decode(start, value) else {
            return self.problem("extent", object, "damaged record".into());
        };
        self.report.data_blocks += extent.len;
        match self.inodes.get_mut(&ino) {
            Some(seen) if seen.attr.is_file() => {
                seen.blocks += extent.len;
                let size_blocks = seen.attr.size.div_ceil(PAGE);
                if !extent.unwritten() && extent.end() > size_blocks {
                    let message = format!(
                        "data up to block {}, file ends at {size_blocks}",
                        extent.end()
                    );
                    self.problem("extent", object.clone(), message);
                }
            }
            _ => self.problem("extent", object.clone(), "belongs to no file".into()),
        }
        if !used.insert(extent.block, extent.len) {
            let message = format!("blocks {}+{} are used twice", extent.block, extent.len);
            self.problem("extent", object, message);
        }
    }

    /// Extents and free space tile the data chunks: no block twice, none missing, none outside.
    fn check_space(&mut self) -> Result<(), MountError> {
        let mut used = RunSet::default();
        let mut last = (0, 0);
        let fs = self.fs;
        fs.store
            .scan(Table::Extents, &FIRST, &LAST, &mut |key, value| {
                self.extent(key, value, &mut used);
                let at = (key_u64(key, 0).unwrap_or(0), key_u64(key, 8).unwrap_or(0));
                if at.0 == last.0 && at.1 < last.1 {
                    let object = format!("inode {}, file block {}", at.0, at.1);
                    self.problem("extent", object, "overlaps the extent before it".into());
                }
                let end = Extent::decode(at.1, value).map_or(at.1, |extent| extent.end());
                last = (at.0, end);
                true
            })?;
        let (mut free, mut known) = (Vec::new(), None);
        fs.store.scan_free(&mut |start, len| {
            if start == FREE_KNOWN_CHUNK_KEY {
                known = Some(len);
            } else {
                free.push((start, len));
            }
        })?;
        let chunks = fs.volume.chunks();
        let data = chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Data);
        let (mut all, mut chunk_blocks) = (RunSet::default(), 0);
        for chunk in data {
            chunk_blocks += chunk.len_blocks;
            all.insert(chunk.start.0, chunk.len_blocks);
            if known.is_none_or(|known| u64::from(chunk.id) > known) {
                free.push((chunk.start.0, chunk.len_blocks));
            }
        }
        self.report.chunk_blocks = chunk_blocks;
        for (start, len) in free {
            self.report.free_blocks += len;
            if !used.insert(start, len) {
                let object = format!("blocks {start}+{len}");
                self.problem("space", object, "are free and used, or free twice".into());
            }
        }
        if self.report.problems.is_empty() && used != all {
            let message = format!(
                "{} used and {} free blocks do not make up the {chunk_blocks} blocks of the chunks",
                self.report.data_blocks, self.report.free_blocks
            );
            self.problem("space", "data chunks".into(), message);
        }
        Ok(())
    }

    fn check_inodes(&mut self) {
        let mut found = Vec::new();
        for (&ino, seen) in &self.inodes {
            let mut wrong = |message: String| found.push((ino, message));
            let attr = &seen.attr;
            let links = if attr.is_dir() {
                if seen.orphan { 0 } else { 2 + seen.subdirs }
            } else {
                seen.names
            };
            if attr.nlink != links {
                wrong(format!("has link count {}, should be {links}", attr.nlink));
            }
            let names = match (attr.is_dir(), ino == ROOT_INO || seen.orphan) {
                (true, true) => 0..=0,
                (true, false) => 1..=1,
                (false, true) => 0..=0,
                (false, false) => 1..=u32::MAX,
            };
            if !names.contains(&seen.names) {
                wrong(format!("has {} names, expected {names:?}", seen.names));
            }
            if attr.is_dir() && attr.size != 2 * seen.name_bytes {
                wrong(format!(
                    "directory size {}, should be {}",
                    attr.size,
                    2 * seen.name_bytes
                ));
            }
            let unknown = attr.flags & !crate::flags::flags_of_type(attr.mode);
            if unknown != 0 {
                wrong(format!(
                    "has flags {unknown:#x}, which its type cannot have"
                ));
            }
            if attr.is_file() && attr.blocks != seen.blocks * (PAGE / 512) {
                let blocks = seen.blocks * (PAGE / 512);
                wrong(format!(
                    "has block count {}, should be {blocks}",
                    attr.blocks
                ));
            }
            if attr.is_dir() && !seen.orphan && !self.reaches_root(ino) {
                wrong("directory does not lead to the root".into());
            }
        }
        if !self.inodes.contains_key(&ROOT_INO) {
            found.push((ROOT_INO, "the root directory is missing".into()));
        }
        found.sort();
        for (ino, message) in found {
            self.problem("inode", format!("inode {ino}"), message);
        }
    }

    fn reaches_root(&self, ino: Ino) -> bool {
        let mut at = ino;
        for _ in 0..self.inodes.len() {
            if at == ROOT_INO {
                return true;
            }
            match self.inodes.get(&at) {
                Some(seen) if seen.attr.is_dir() => at = seen.parent,
                _ => return false,
            }
        }
        at == ROOT_INO
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::records::ino_key;

    #[test]
    fn the_scan_covers_every_key() {
        assert!(ino_key(u64::MAX).as_slice() < LAST.as_slice());
        assert!(FIRST.as_slice() < ino_key(0).as_slice());
    }
}
