//! The last pass: what an inode's record counts (links, size, blocks, cookies), its parent and its
//! flags, against what the other passes found; and the counters of the volume.

use super::Check;
use super::inodes::Seen;
use super::progress::FsckError;
use super::report::Class;
use crate::filesystem::{SETTING_INODE_COUNT, SETTING_NEXT_INO};
use crate::flags::flags_of_type;
use crate::inode::PAGE;
use crate::listing::COOKIE_FIRST;
use crate::meta::records::{InodeRecord, decode_u64, ino_key, key_u64};
use crate::meta::store::Table;
use crate::{FILE_SIZE_MAX, ROOT_INO};

/// 512-byte units of a block.
const UNITS: u64 = PAGE / 512;

/// The record as it should be.
fn wanted(record: &InodeRecord, seen: &Seen) -> InodeRecord {
    let mut wanted = *record;
    let attr = &mut wanted.attr;
    let nameless = seen.names == 0 && seen.ino != ROOT_INO;
    if seen.orphan {
        attr.nlink = 0;
    } else if nameless {
        // It was to be found a name, and that was not wanted.
    } else if seen.is_dir() {
        attr.nlink = seen.subdirs.saturating_add(2);
    } else {
        attr.nlink = seen.names;
    }
    attr.blocks = seen.blocks * UNITS;
    attr.flags &= flags_of_type(attr.mode);
    if seen.is_symlink() && seen.target {
        attr.size = seen.size;
    }
    if seen.unsized_file {
        attr.size = (seen.cookie_max * PAGE).min(FILE_SIZE_MAX);
    }
    if seen.is_dir() {
        attr.size = 2 * seen.name_bytes;
        wanted.next_cookie = wanted
            .next_cookie
            .max(seen.cookie_max + 1)
            .max(COOKIE_FIRST);
        wanted.parent = match seen.named_in {
            _ if seen.ino == ROOT_INO => ROOT_INO,
            0 => record.parent,
            dir => dir,
        };
    }
    wanted
}

/// What differs, in words.
fn differences(record: &InodeRecord, wanted: &InodeRecord) -> Vec<String> {
    let (is, should) = (&record.attr, &wanted.attr);
    let mut found = Vec::new();
    let mut compare = |what: &str, is: u64, should: u64| {
        if is != should {
            found.push(format!("has {what} {is}, should be {should}"));
        }
    };
    compare("link count", u64::from(is.nlink), u64::from(should.nlink));
    compare("size", is.size, should.size);
    compare("block count", is.blocks, should.blocks);
    compare("parent", record.parent, wanted.parent);
    compare("next cookie", record.next_cookie, wanted.next_cookie);
    if is.flags != should.flags {
        let unknown = is.flags & !should.flags;
        found.push(format!(
            "has flags {unknown:#x}, which its type cannot have"
        ));
    }
    found
}

impl Check<'_> {
    pub(super) fn pass_counts(&mut self) -> Result<(), FsckError> {
        let reader = self.reader;
        self.ticker.begin(reader.len(Table::Inodes)?)?;
        reader.scan(Table::Inodes, &[], &[], &mut |key, value| {
            self.ticker.step()?;
            self.check_counts(key, value);
            Ok::<(), FsckError>(())
        })?;
        for ino in std::mem::take(&mut self.made) {
            let key = ino_key(ino);
            let record = self.edits.get(Table::Inodes, &key).flatten();
            let record = record.and_then(|value| InodeRecord::decode(ino, value));
            if let (Some(record), Some(seen)) = (record, self.inodes.get(ino)) {
                let value = wanted(&record, seen).encode();
                self.edits.put(Table::Inodes, &key, &value);
            }
        }
        self.check_settings()?;
        self.ticker.end();
        Ok(())
    }

    fn check_counts(&mut self, key: &[u8], value: &[u8]) {
        let value = self.edits.get(Table::Inodes, key).unwrap_or(Some(value));
        let ino = key_u64(key, 0).unwrap_or(0);
        let record = value.and_then(|value| InodeRecord::decode(ino, value));
        let (Some(record), Some(seen)) = (record, self.inodes.get(ino)) else {
            return;
        };
        if self.made.contains(&ino) {
            return;
        }
        let wanted = wanted(&record, seen);
        if wanted == record {
            return;
        }
        let mut repair = true;
        for message in differences(&record, &wanted) {
            repair &= self.problem(Class::Count, format!("inode {ino}"), message);
        }
        if repair {
            self.edits.put(Table::Inodes, key, &wanted.encode());
        }
    }

    fn check_settings(&mut self) -> Result<(), FsckError> {
        let least = self.inodes.last_ino() + 1;
        let next = self.setting(SETTING_NEXT_INO)?;
        if next.is_none_or(|next| next < least) {
            let made = self.lost_found.is_some() && next == Some(least - 1);
            let message = format!("is {}, should be {least}", shown(next));
            if made || self.problem(Class::Setting, "next inode number".into(), message) {
                let value = least.to_le_bytes();
                self.edits.put(Table::Settings, SETTING_NEXT_INO, &value);
            }
        }
        // What the repair adds and removes is no problem of the counter's.
        let (rows, count) = (self.report.inodes, self.inodes.count());
        let is = self.setting(SETTING_INODE_COUNT)?;
        let sound = is == Some(rows);
        let message = format!("is {}, should be {rows}", shown(is));
        let repair = sound || self.problem(Class::Setting, "number of inodes".into(), message);
        if repair && is != Some(count) {
            let value = count.to_le_bytes();
            self.edits.put(Table::Settings, SETTING_INODE_COUNT, &value);
        }
        Ok(())
    }

    fn setting(&self, name: &[u8]) -> Result<Option<u64>, FsckError> {
        let value = self.reader.get(Table::Settings, name)?;
        Ok(value.as_deref().and_then(decode_u64))
    }
}

fn shown(number: Option<u64>) -> String {
    number.map_or("missing".to_owned(), |number| number.to_string())
}
