//! The pass over the tree: every directory hangs on the root, every inode has a name or waits for
//! deletion. What has lost its name gets one in /lost+found: `#` and its number.

use std::collections::BTreeSet;

use super::Check;
use super::inodes::{Reach, Seen};
use super::progress::FsckError;
use super::records::new_directory;
use super::report::Class;
use crate::meta::records::{DentryRecord, decode_u64, ino_key, key_u64, name_key};
use crate::meta::store::Table;
use crate::{Ino, ROOT_INO};

/// Where it goes, in the root directory.
const LOST_FOUND: &str = "lost+found";
const LOST_FOUND_MODE: u32 = 0o700;

impl Check<'_> {
    pub(super) fn pass_tree(&mut self) -> Result<(), FsckError> {
        self.ticker.begin(self.inodes.count())?;
        self.check_orphans();
        let mut lost: BTreeSet<Ino> = BTreeSet::new();
        let dirs: Vec<Ino> = self
            .inodes
            .iter()
            .filter(|s| s.is_dir())
            .map(|s| s.ino)
            .collect();
        for dir in dirs {
            self.ticker.step()?;
            if let Some(ino) = self.find_loop(dir)
                && self.cut_loop(ino)?
            {
                lost.insert(ino);
            }
        }
        let nameless = |seen: &&Seen| seen.names == 0 && !seen.orphan && seen.ino != ROOT_INO;
        let rest: Vec<Ino> = self.inodes.iter().filter(nameless).map(|s| s.ino).collect();
        for ino in rest {
            if lost.contains(&ino) {
                continue;
            }
            let message = "no name leads to it".to_owned();
            if self.problem(Class::Lost, format!("inode {ino}"), message) {
                lost.insert(ino);
            }
        }
        for ino in lost {
            self.adopt(ino)?;
        }
        self.ticker.end();
        Ok(())
    }

    /// What has a name is not to be deleted.
    fn check_orphans(&mut self) {
        let named = |seen: &&Seen| seen.orphan && seen.names > 0;
        let named: Vec<Ino> = self.inodes.iter().filter(named).map(|s| s.ino).collect();
        for ino in named {
            let message = "is to be deleted, but has a name".to_owned();
            if self.problem(Class::Orphan, format!("inode {ino}"), message) {
                self.edits.delete(Table::Orphans, &ino_key(ino));
                if let Some(seen) = self.inodes.get_mut(ino) {
                    seen.orphan = false;
                }
            }
        }
    }

    /// Walks from a directory towards the root. If it comes back to where it was, gives the lowest
    /// number of the loop.
    fn find_loop(&mut self, dir: Ino) -> Option<Ino> {
        let mut way = Vec::new();
        let mut at = dir;
        let found = loop {
            let Some(seen) = self.inodes.dir_mut(at) else {
                break None;
            };
            match seen.reach {
                Reach::Settled => break None,
                Reach::OnTheWay => {
                    let from = way.iter().position(|&ino| ino == at).unwrap_or(0);
                    break way[from..].iter().copied().min();
                }
                Reach::Unknown => {}
            }
            seen.reach = Reach::OnTheWay;
            way.push(at);
            if at == ROOT_INO || seen.names == 0 {
                break None;
            }
            at = seen.named_in;
        };
        for ino in way {
            if let Some(seen) = self.inodes.get_mut(ino) {
                seen.reach = Reach::Settled;
            }
        }
        found
    }

    /// Takes the directory out of the loop; returns whether it did.
    fn cut_loop(&mut self, ino: Ino) -> Result<bool, FsckError> {
        let message = "is in a loop of directories that does not lead to the root".to_owned();
        if !self.problem(Class::Lost, format!("inode {ino}"), message) {
            return Ok(false);
        }
        let parent = self.inodes.get(ino).map_or(0, |seen| seen.named_in);
        let prefix = ino_key(parent);
        let mut found = None;
        let reader = self.reader;
        reader.scan::<FsckError>(Table::Dentries, &prefix, &prefix, &mut |key, value| {
            let value = self.edits.get(Table::Dentries, key).unwrap_or(Some(value));
            if let Some(entry) = value.and_then(DentryRecord::decode)
                && entry.ino == ino
            {
                found = Some((key.get(8..).unwrap_or_default().to_vec(), entry));
            }
            Ok(())
        })?;
        // An entry that this repair makes.
        let made = self.edits.puts(Table::Dentries).find_map(|(key, value)| {
            let entry = DentryRecord::decode(value).filter(|entry| entry.ino == ino)?;
            (key_u64(key, 0)? == parent).then(|| (key[8..].to_vec(), entry))
        });
        let Some((name, entry)) = found.or(made) else {
            return Ok(false);
        };
        self.drop_entry(parent, &name, &entry)?;
        Ok(true)
    }

    /// Gives an inode without a name one in lost+found.
    fn adopt(&mut self, ino: Ino) -> Result<(), FsckError> {
        let Some(kind) = self.inodes.get(ino).map(|seen| seen.kind) else {
            return Ok(());
        };
        let dir = self.lost_found()?;
        let name = self.free_name(dir, &format!("#{ino}"))?;
        if let Some(seen) = self.inodes.get_mut(ino) {
            seen.named_in = 0;
        }
        self.add_entry(dir, name.as_bytes(), ino, kind);
        Ok(())
    }

    fn add_entry(&mut self, dir: Ino, name: &[u8], ino: Ino, kind: u8) {
        let cookie = self.next_cookie(dir);
        let entry = DentryRecord { ino, cookie, kind };
        self.put_rows(dir, name, &entry);
        self.count_entry(dir, name, &entry);
    }

    /// `wanted`, or with a number if there is such an entry.
    fn free_name(&self, dir: Ino, wanted: &str) -> Result<String, FsckError> {
        let mut name = wanted.to_owned();
        for number in 1u64.. {
            let key = name_key(dir, name.as_bytes());
            if self.current(Table::Dentries, &key)?.is_none() {
                break;
            }
            name = format!("{wanted}.{number}");
        }
        Ok(name)
    }

    /// The directory, made if the root has none.
    fn lost_found(&mut self) -> Result<Ino, FsckError> {
        if let Some(ino) = self.lost_found {
            return Ok(ino);
        }
        let key = name_key(ROOT_INO, LOST_FOUND.as_bytes());
        let value = self.current(Table::Dentries, &key)?;
        let entry = value.as_deref().and_then(DentryRecord::decode);
        let there = entry.and_then(|entry| self.inodes.get(entry.ino));
        let ino = match there.filter(|seen| seen.is_dir() && !seen.orphan) {
            Some(seen) => seen.ino,
            None => {
                let next = self
                    .reader
                    .get(Table::Settings, crate::filesystem::SETTING_NEXT_INO)?;
                let next = next.as_deref().and_then(decode_u64).unwrap_or(0);
                // A number as high as can be counts for nothing.
                let next = if next > u64::MAX / 2 { 0 } else { next };
                let ino = next.max(self.inodes.last_ino() + 1);
                let record = new_directory(ino, LOST_FOUND_MODE);
                self.edits
                    .put(Table::Inodes, &ino_key(ino), &record.encode());
                self.made.push(ino);
                self.inodes.push(Seen::new(ino, libc::DT_DIR, 0, ROOT_INO));
                let name = self.free_name(ROOT_INO, LOST_FOUND)?;
                self.add_entry(ROOT_INO, name.as_bytes(), ino, libc::DT_DIR);
                ino
            }
        };
        self.lost_found = Some(ino);
        Ok(ino)
    }
}
