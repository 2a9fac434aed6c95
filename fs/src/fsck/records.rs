//! The first pass: inode records, extended attributes, the list of inodes to delete.

use super::Check;
use super::inodes::Seen;
use super::progress::FsckError;
use super::report::Class;
use crate::acl::{self, Acl};
use crate::listing::COOKIE_FIRST;
use crate::meta::records::{InodeRecord, Orphan, dt_of_mode, ino_key, key_u64};
use crate::meta::store::Table;
use crate::xattr::{check_xattr_name, is_acl};
use crate::{Attr, FILE_SIZE_MAX, Ino, ROOT_INO, SYMLINK_MAX, Timestamp, XATTR_SIZE_MAX};

/// A directory that a repair makes.
pub(super) fn new_directory(ino: Ino, mode: u32) -> InodeRecord {
    let now = Timestamp::now();
    InodeRecord {
        attr: Attr {
            ino,
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            mode: libc::S_IFDIR | mode,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            generation: 1,
        },
        next_cookie: COOKIE_FIRST,
        parent: ROOT_INO,
    }
}

impl Check<'_> {
    pub(super) fn pass_inodes(&mut self) -> Result<(), FsckError> {
        let reader = self.reader;
        let tables = [Table::Inodes, Table::Xattrs, Table::Orphans];
        let mut rows = 0;
        for table in tables {
            rows += reader.len(table)?;
        }
        self.ticker.begin(rows)?;
        reader.scan(Table::Inodes, &[], &[], &mut |key, value| {
            self.ticker.step()?;
            self.inode(key, value);
            Ok::<(), FsckError>(())
        })?;
        if self.inodes.last_ino() == 0 {
            self.make_root("is missing");
        }
        reader.scan(Table::Xattrs, &[], &[], &mut |key, value| {
            self.ticker.step()?;
            self.xattr(key, value);
            Ok::<(), FsckError>(())
        })?;
        self.check_targets()?;
        reader.scan(Table::Orphans, &[], &[], &mut |key, value| {
            self.ticker.step()?;
            self.orphan(key, value);
            Ok::<(), FsckError>(())
        })?;
        self.ticker.end();
        Ok(())
    }

    fn inode(&mut self, key: &[u8], value: &[u8]) {
        self.report.inodes += 1;
        let ino = key_u64(key, 0).filter(|&ino| key.len() == 8 && ino != 0);
        let Some(ino) = ino else {
            let object = format!("inode with key {}", key.escape_ascii());
            if self.problem(Class::Inode, object, "has an impossible number".into()) {
                self.edits.delete(Table::Inodes, key);
            }
            return;
        };
        if ino != ROOT_INO && self.inodes.last_ino() == 0 {
            self.make_root("is missing");
        }
        let object = format!("inode {ino}");
        let mut sized = true;
        let record = match InodeRecord::decode(ino, value) {
            Some(record) => record,
            None => match InodeRecord::mend(ino, value) {
                Some((record, has_size)) => {
                    if self.problem(Class::Inode, object, "has impossible values".into()) {
                        self.edits.put(Table::Inodes, key, &record.encode());
                    }
                    sized = has_size;
                    record
                }
                None => {
                    if ino == ROOT_INO {
                        return self.make_root("has a damaged record");
                    }
                    if self.problem(Class::Inode, object, "damaged record".into()) {
                        self.edits.delete(Table::Inodes, key);
                    }
                    return;
                }
            },
        };
        if ino == ROOT_INO && !record.attr.is_dir() {
            return self.make_root("is no directory");
        }
        self.report.directories += u64::from(record.attr.is_dir());
        let attr = &record.attr;
        let mut seen = Seen::new(ino, dt_of_mode(attr.mode), attr.size, record.parent);
        seen.unsized_file = !sized && attr.is_file();
        self.inodes.push(seen);
    }

    /// What is in the root directory stays: entries know their directory by its number.
    fn make_root(&mut self, what: &str) {
        let object = format!("inode {ROOT_INO}");
        let message = format!("the root directory {what}");
        if self.problem(Class::Inode, object, message) {
            let record = new_directory(ROOT_INO, 0o755);
            self.edits
                .put(Table::Inodes, &ino_key(ROOT_INO), &record.encode());
            self.made.push(ROOT_INO);
        }
        self.inodes
            .push(Seen::new(ROOT_INO, libc::DT_DIR, 0, ROOT_INO));
    }

    fn xattr(&mut self, key: &[u8], value: &[u8]) {
        let ino = key_u64(key, 0).unwrap_or(0);
        let name = key.get(8..).unwrap_or_default();
        if let Some(message) = self.xattr_fault(ino, name, value) {
            let object = format!("inode {ino}, attribute '{}'", name.escape_ascii());
            if self.problem(Class::Xattr, object, message.into()) {
                self.edits.delete(Table::Xattrs, key);
            }
        } else if name.is_empty()
            && let Some(seen) = self.inodes.get_mut(ino)
        {
            seen.target = true;
            seen.size = value.len() as u64;
        }
    }

    /// Why an attribute must go.
    fn xattr_fault(&self, ino: Ino, name: &[u8], value: &[u8]) -> Option<&'static str> {
        let Some(seen) = self.inodes.get(ino) else {
            return Some("belongs to no inode");
        };
        if name.is_empty() {
            let possible = 1..=SYMLINK_MAX;
            return match (seen.is_symlink(), possible.contains(&value.len())) {
                (false, _) => Some("is a link's target, the inode is no symbolic link"),
                (true, false) => Some("is an impossible target"),
                (true, true) => None,
            };
        }
        if check_xattr_name(name).is_err() {
            return Some("has an impossible name");
        }
        if value.len() > XATTR_SIZE_MAX {
            return Some("is too long");
        }
        if is_acl(name) {
            if name == acl::DEFAULT && !seen.is_dir() {
                return Some("is a default list of access, the inode is no directory");
            }
            if !matches!(Acl::decode(value), Ok(Some(_))) {
                return Some("is no list of access");
            }
        }
        None
    }

    /// A symbolic link without a target is nothing.
    fn check_targets(&mut self) -> Result<(), FsckError> {
        let links = self.inodes.iter().filter(|seen| seen.is_symlink());
        let bare: Vec<Ino> = links
            .filter(|seen| !seen.target)
            .map(|seen| seen.ino)
            .collect();
        for ino in bare {
            let message = "is a symbolic link without a target".to_owned();
            if self.problem(Class::Inode, format!("inode {ino}"), message) {
                self.remove_inode(ino)?;
            }
        }
        Ok(())
    }

    /// Removes an inode with its attributes. Its names, and what else hangs on it, are found later
    /// to belong to nothing.
    fn remove_inode(&mut self, ino: Ino) -> Result<(), FsckError> {
        let key = ino_key(ino);
        let reader = self.reader;
        reader.scan(Table::Xattrs, &key, &key, &mut |key, _| {
            self.edits.delete(Table::Xattrs, key);
            Ok::<(), FsckError>(())
        })?;
        self.edits.delete(Table::Inodes, &key);
        if let Some(seen) = self.inodes.get_mut(ino) {
            seen.removed = true;
        }
        Ok(())
    }

    fn orphan(&mut self, key: &[u8], value: &[u8]) {
        self.report.orphans += 1;
        let ino = key_u64(key, 0).filter(|_| key.len() == 8).unwrap_or(0);
        let fault = match (self.inodes.get_mut(ino), Orphan::decode(value)) {
            (None, _) => Some("is to be deleted or cut, and does not exist"),
            (_, None) => Some("damaged record of a deletion"),
            (Some(_), Some(Orphan::Delete)) if ino == ROOT_INO => {
                Some("the root directory is to be deleted")
            }
            (Some(seen), Some(Orphan::Delete)) => {
                seen.orphan = true;
                None
            }
            (Some(seen), Some(Orphan::Truncate(size))) => {
                (!seen.is_file() || size > FILE_SIZE_MAX).then_some("is to be cut, and cannot be")
            }
        };
        if let Some(message) = fault
            && self.problem(Class::Orphan, format!("inode {ino}"), message.into())
        {
            self.edits.delete(Table::Orphans, key);
        }
    }
}
