//! The pass over names: entries by name against inodes, and against the listings.
//!
//! An entry has a row by name and a row by cookie. The row by name decides; a row by cookie without
//! one is what is left of an entry, which is made again where that is possible. Each row by name
//! looks for its row by cookie; where a directory has more rows by cookie than were found so, each
//! of its rows is looked at from that side, too. So nothing is kept in memory for a name.

use std::collections::BTreeMap;

use super::Check;
use super::progress::FsckError;
use super::report::Class;
use crate::listing::COOKIE_FIRST;
use crate::meta::records::{
    COUNT_MAX, DentryRecord, decode_cookie_entry, encode_cookie_entry, ino_key, key_u64, name_key,
    pair_key,
};
use crate::meta::store::Table;
use crate::{Ino, NAME_MAX, ROOT_INO};

/// Whether a directory may have such an entry.
fn is_name(name: &[u8]) -> bool {
    let impossible = name.is_empty() || name == b"." || name == b"..";
    !impossible && name.len() <= NAME_MAX && !name.iter().any(|&byte| byte == b'/' || byte == 0)
}

fn entry_object(dir: Ino, name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    format!("entry '{name}' of directory {dir}")
}

fn is_cookie(cookie: u64) -> bool {
    // Leaves room for those that a repair hands out.
    (COOKIE_FIRST..=COUNT_MAX / 2).contains(&cookie)
}

impl Check<'_> {
    pub(super) fn pass_names(&mut self) -> Result<(), FsckError> {
        let reader = self.reader;
        let rows = [Table::Dentries, Table::Cookies].map(|table| reader.len(table));
        let [names, listed] = rows;
        self.ticker.begin(names? + listed?)?;
        reader.scan(Table::Dentries, &[], &[], &mut |key, value| {
            self.ticker.step()?;
            self.dentry(key, value)
        })?;
        if self.many_names {
            self.keep_one_name_each()?;
        }
        for dir in self.doubtful_listings()? {
            self.check_listing(dir)?;
        }
        for (dir, name) in std::mem::take(&mut self.unlisted) {
            self.list_anew(dir, &name)?;
        }
        self.ticker.end();
        Ok(())
    }

    fn dentry(&mut self, key: &[u8], value: &[u8]) -> Result<(), FsckError> {
        self.report.entries += 1;
        let name = key.get(8..).unwrap_or_default();
        let Some(dir) = key_u64(key, 0).filter(|_| is_name(name)) else {
            let object = format!("entry with key {}", key.escape_ascii());
            if self.problem(Class::Entry, object, "has an impossible name".into()) {
                self.edits.delete(Table::Dentries, key);
            }
            return Ok(());
        };
        let Some(mut entry) = DentryRecord::decode(value) else {
            let object = entry_object(dir, name);
            if self.problem(Class::Entry, object, "damaged record".into()) {
                self.edits.delete(Table::Dentries, key);
            }
            return Ok(());
        };
        if let Some(message) = self.entry_fault(dir, &entry) {
            if self.problem(Class::Entry, entry_object(dir, name), message) {
                return self.remove_rows(dir, name, &entry);
            }
        } else {
            self.check_kind(dir, name, &mut entry)?;
            self.check_listed(dir, name, &entry)?;
        }
        self.count_entry(dir, name, &entry);
        Ok(())
    }

    /// Why an entry must go.
    fn entry_fault(&self, dir: Ino, entry: &DentryRecord) -> Option<String> {
        let ino = entry.ino;
        match self.inodes.get(dir) {
            None => return Some("its directory does not exist".into()),
            Some(seen) if !seen.is_dir() => {
                return Some("what it is in is no directory".into());
            }
            Some(seen) if seen.orphan => return Some("its directory is to be deleted".into()),
            Some(_) => {}
        }
        if ino == ROOT_INO {
            return Some("names the root directory".into());
        }
        match self.inodes.get(ino) {
            None => Some(format!("names inode {ino}, which does not exist")),
            Some(_) => None,
        }
    }

    fn check_kind(
        &mut self,
        dir: Ino,
        name: &[u8],
        entry: &mut DentryRecord,
    ) -> Result<(), FsckError> {
        let kind = self
            .inodes
            .get(entry.ino)
            .map_or(entry.kind, |seen| seen.kind);
        if kind == entry.kind {
            return Ok(());
        }
        let message = format!("has type {}, its inode has {kind}", entry.kind);
        if self.problem(Class::Entry, entry_object(dir, name), message) {
            entry.kind = kind;
            let key = name_key(dir, name);
            self.edits.put(Table::Dentries, &key, &entry.encode());
            let (row, name_there) = self.listed_name(dir, entry.cookie)?;
            if name_there.as_deref() == Some(name) {
                let value = encode_cookie_entry(entry.ino, kind, name);
                self.edits.put(Table::Cookies, &row, &value);
            }
        }
        Ok(())
    }

    /// The key of a row by cookie, and the name that it has on the devices.
    fn listed_name(&self, dir: Ino, cookie: u64) -> Result<([u8; 16], Option<Vec<u8>>), FsckError> {
        let key = pair_key(dir, cookie);
        let row = self.reader.get(Table::Cookies, &key)?;
        let name = row.as_deref().and_then(decode_cookie_entry);
        Ok((key, name.map(|(_, _, name)| name.to_vec())))
    }

    /// Looks for the row by cookie of an entry.
    fn check_listed(
        &mut self,
        dir: Ino,
        name: &[u8],
        entry: &DentryRecord,
    ) -> Result<(), FsckError> {
        let key = pair_key(dir, entry.cookie);
        let value = encode_cookie_entry(entry.ino, entry.kind, name);
        let row = self.reader.get(Table::Cookies, &key)?;
        let there = row.as_deref().and_then(decode_cookie_entry);
        let same_name = there.is_some_and(|(_, _, other)| other == name);
        if same_name && let Some(seen) = self.inodes.dir_mut(dir) {
            seen.listed += 1;
        }
        let mended = self.edits.get(Table::Cookies, &key).flatten() == Some(&value[..]);
        if is_cookie(entry.cookie) && (row.as_deref() == Some(&value[..]) || mended) {
            return Ok(());
        }
        let message = "is not listed, or as something else".to_owned();
        if !self.problem(Class::Listing, entry_object(dir, name), message) {
            return Ok(());
        }
        let taken = match there {
            Some((_, _, other)) if !same_name => self.owns(dir, other, entry.cookie)?,
            _ => false,
        };
        let taken = taken || self.edits.get(Table::Cookies, &key).flatten().is_some();
        if taken || !is_cookie(entry.cookie) {
            if same_name {
                self.edits.delete(Table::Cookies, &key);
            }
            self.unlisted.push((dir, name.to_vec()));
        } else {
            self.edits.put(Table::Cookies, &key, &value);
        }
        Ok(())
    }

    /// Whether the entry of this name has this cookie.
    fn owns(&self, dir: Ino, name: &[u8], cookie: u64) -> Result<bool, FsckError> {
        let value = self.current(Table::Dentries, &name_key(dir, name))?;
        let entry = value.as_deref().and_then(DentryRecord::decode);
        Ok(entry.is_some_and(|entry| entry.cookie == cookie))
    }

    /// Takes an entry into what is known of its directory and its inode.
    pub(super) fn count_entry(&mut self, dir: Ino, name: &[u8], entry: &DentryRecord) {
        let is_dir = self
            .inodes
            .get(entry.ino)
            .is_some_and(super::inodes::Seen::is_dir);
        if let Some(seen) = self.inodes.dir_mut(dir) {
            seen.name_bytes += name.len() as u64;
            seen.subdirs += u32::from(is_dir);
            if is_cookie(entry.cookie) {
                seen.cookie_max = seen.cookie_max.max(entry.cookie);
            }
        }
        if let Some(seen) = self.inodes.get_mut(entry.ino) {
            seen.names = seen.names.saturating_add(1);
            if is_dir && seen.named_in != 0 {
                seen.many = true;
                self.many_names = true;
            } else if is_dir {
                seen.named_in = dir;
            }
        }
    }

    /// Removes an entry that was counted.
    pub(super) fn drop_entry(
        &mut self,
        dir: Ino,
        name: &[u8],
        entry: &DentryRecord,
    ) -> Result<(), FsckError> {
        let is_dir = self
            .inodes
            .get(entry.ino)
            .is_some_and(super::inodes::Seen::is_dir);
        if let Some(seen) = self.inodes.dir_mut(dir) {
            seen.name_bytes = seen.name_bytes.saturating_sub(name.len() as u64);
            seen.subdirs = seen.subdirs.saturating_sub(u32::from(is_dir));
        }
        if let Some(seen) = self.inodes.get_mut(entry.ino) {
            seen.names = seen.names.saturating_sub(1);
        }
        self.remove_rows(dir, name, entry)
    }

    fn remove_rows(
        &mut self,
        dir: Ino,
        name: &[u8],
        entry: &DentryRecord,
    ) -> Result<(), FsckError> {
        self.edits.delete(Table::Dentries, &name_key(dir, name));
        let key = pair_key(dir, entry.cookie);
        let row = self.current(Table::Cookies, &key)?;
        let there = row.as_deref().and_then(decode_cookie_entry);
        if there.is_some_and(|(_, _, other)| other == name) {
            self.edits.delete(Table::Cookies, &key);
        }
        Ok(())
    }

    /// A directory has one name: of several, one in the directory that its own record calls its
    /// parent stays, else the first.
    fn keep_one_name_each(&mut self) -> Result<(), FsckError> {
        let mut names: BTreeMap<Ino, Vec<(Ino, Vec<u8>, DentryRecord)>> = BTreeMap::new();
        let reader = self.reader;
        reader.scan::<FsckError>(Table::Dentries, &[], &[], &mut |key, value| {
            let value = self.edits.get(Table::Dentries, key).unwrap_or(Some(value));
            let Some(entry) = value.and_then(DentryRecord::decode) else {
                return Ok(());
            };
            if self.inodes.get(entry.ino).is_some_and(|seen| seen.many) {
                let dir = key_u64(key, 0).unwrap_or(0);
                let name = key.get(8..).unwrap_or_default().to_vec();
                names.entry(entry.ino).or_default().push((dir, name, entry));
            }
            Ok(())
        })?;
        for (ino, names) in names {
            let parent = self.inodes.get(ino).map_or(0, |seen| seen.parent);
            let kept = names.iter().position(|name| name.0 == parent).unwrap_or(0);
            if let (Some(seen), Some(name)) = (self.inodes.get_mut(ino), names.get(kept)) {
                seen.named_in = name.0;
            }
            for (index, (dir, name, entry)) in names.iter().enumerate() {
                let message = || format!("is one of {} names of directory {ino}", names.len());
                if index != kept && self.problem(Class::Entry, entry_object(*dir, name), message())
                {
                    self.drop_entry(*dir, name, entry)?;
                }
            }
        }
        Ok(())
    }

    /// Directories with more rows by cookie than their names led to.
    fn doubtful_listings(&mut self) -> Result<Vec<Ino>, FsckError> {
        let mut doubtful = Vec::new();
        let (mut dir, mut rows) = (0, 0);
        let reader = self.reader;
        reader.scan::<FsckError>(Table::Cookies, &[], &[], &mut |key, _| {
            self.ticker.step()?;
            let at = key_u64(key, 0).filter(|_| key.len() == 16);
            let Some(at) = at else {
                let object = format!("row with key {}", key.escape_ascii());
                if self.problem(Class::Listing, object, "belongs to no directory".into()) {
                    self.edits.delete(Table::Cookies, key);
                }
                return Ok(());
            };
            if at != dir {
                self.end_listing(dir, rows, &mut doubtful);
                (dir, rows) = (at, 0);
            }
            rows += 1;
            Ok(())
        })?;
        self.end_listing(dir, rows, &mut doubtful);
        Ok(doubtful)
    }

    fn end_listing(&self, dir: Ino, rows: u64, doubtful: &mut Vec<Ino>) {
        let listed = self.inodes.get(dir).map_or(0, |seen| seen.listed);
        if rows > u64::from(listed) {
            doubtful.push(dir);
        }
    }

    /// Looks at each row by cookie of a directory.
    fn check_listing(&mut self, dir: Ino) -> Result<(), FsckError> {
        let reader = self.reader;
        let prefix = ino_key(dir);
        reader.scan(Table::Cookies, &prefix, &prefix, &mut |key, value| {
            if key.len() != 16 || self.edits.get(Table::Cookies, key).is_some() {
                return Ok(());
            }
            let cookie = key_u64(key, 8).unwrap_or(0);
            let object = format!("directory {dir}, cookie {cookie}");
            let Some((ino, kind, name)) = decode_cookie_entry(value) else {
                if self.problem(Class::Listing, object, "damaged record".into()) {
                    self.edits.delete(Table::Cookies, key);
                }
                return Ok(());
            };
            let entry = DentryRecord { ino, cookie, kind };
            let found = self.current(Table::Dentries, &name_key(dir, name))?;
            let message = match found.as_deref().map(DentryRecord::decode) {
                // Its own entry has been looked at.
                Some(None) => return Ok(()),
                Some(Some(other)) if other.cookie == cookie => return Ok(()),
                Some(Some(_)) => "lists a name that is listed elsewhere".to_owned(),
                None => format!("lists inode {ino}, which no name finds"),
            };
            if !self.problem(Class::Listing, object, message) {
                return Ok(());
            }
            if found.is_none() && self.may_return(dir, name, &entry) {
                let key = name_key(dir, name);
                self.edits.put(Table::Dentries, &key, &entry.encode());
                self.count_entry(dir, name, &entry);
            } else {
                self.edits.delete(Table::Cookies, key);
            }
            Ok(())
        })
    }

    /// Whether what is listed can be an entry.
    fn may_return(&self, dir: Ino, name: &[u8], entry: &DentryRecord) -> bool {
        let Some(seen) = self.inodes.get(entry.ino) else {
            return false;
        };
        let named = seen.is_dir() && seen.names > 0;
        is_name(name)
            && is_cookie(entry.cookie)
            && seen.kind == entry.kind
            && !seen.orphan
            && !named
            && self.entry_fault(dir, entry).is_none()
    }

    /// Gives an entry that stays a new place in the listing.
    fn list_anew(&mut self, dir: Ino, name: &[u8]) -> Result<(), FsckError> {
        let key = name_key(dir, name);
        let value = self.current(Table::Dentries, &key)?;
        let Some(entry) = value.as_deref().and_then(DentryRecord::decode) else {
            return Ok(());
        };
        let cookie = self.next_cookie(dir);
        let entry = DentryRecord { cookie, ..entry };
        self.put_rows(dir, name, &entry);
        Ok(())
    }

    /// A cookie that nothing in the directory has.
    pub(super) fn next_cookie(&mut self, dir: Ino) -> u64 {
        let Some(seen) = self.inodes.dir_mut(dir) else {
            return COOKIE_FIRST;
        };
        seen.cookie_max = (seen.cookie_max + 1).max(COOKIE_FIRST);
        seen.cookie_max
    }

    pub(super) fn put_rows(&mut self, dir: Ino, name: &[u8], entry: &DentryRecord) {
        let row = encode_cookie_entry(entry.ino, entry.kind, name);
        let key = pair_key(dir, entry.cookie);
        self.edits.put(Table::Cookies, &key, &row);
        let key = name_key(dir, name);
        self.edits.put(Table::Dentries, &key, &entry.encode());
    }
}
