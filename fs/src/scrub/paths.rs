//! From inodes to the names that they have, for messages.
//!
//! Directories know their parents, files do not: one walk over all names finds them. The store is
//! asked in pieces, so that nobody waits long for it.

use std::collections::{BTreeMap, BTreeSet};

use crate::filesystem::FileSystem;
use crate::meta::records::{DentryRecord, InodeRecord, ino_key, key_u64};
use crate::meta::store::Table;
use crate::{Errno, Ino, ROOT_INO};

/// Entries that are looked at in one piece.
const PIECE: usize = 4096;
/// Names of one inode that are told.
const NAMES_MAX: usize = 16;
/// Depth of directories that is followed.
const DEPTH_MAX: usize = 256;

impl FileSystem {
    /// The paths of inodes, from the root of the file system; those without a name are left out.
    /// Names may change meanwhile; then a path is what it was at some moment.
    pub(crate) fn paths_of(
        &self,
        inos: &BTreeSet<Ino>,
    ) -> Result<BTreeMap<Ino, Vec<String>>, Errno> {
        let mut names: BTreeMap<Ino, Vec<(Ino, Vec<u8>)>> = BTreeMap::new();
        self.each_name(&[], &[0xff; 9], &mut |dir, name, ino| {
            if inos.contains(&ino) {
                let names = names.entry(ino).or_default();
                if names.len() < NAMES_MAX {
                    names.push((dir, name.to_vec()));
                }
            }
            true
        })?;
        let mut paths = BTreeMap::new();
        for (ino, names) in names {
            let mut found = Vec::new();
            for (dir, name) in names {
                let mut path = self.directory_path(dir)?;
                path.push('/');
                path.push_str(&String::from_utf8_lossy(&name));
                found.push(path);
            }
            paths.insert(ino, found);
        }
        Ok(paths)
    }

    /// The path of a directory; empty for the root.
    fn directory_path(&self, dir: Ino) -> Result<String, Errno> {
        let mut parts = Vec::new();
        let mut at = dir;
        while at != ROOT_INO && parts.len() < DEPTH_MAX {
            let parent = self.store.get(Table::Inodes, &ino_key(at), |value| {
                Some(InodeRecord::decode(at, value?)?.parent)
            })?;
            let Some(parent) = parent else { break };
            let mut found = None;
            self.each_name(
                &ino_key(parent),
                &ino_key(parent + 1),
                &mut |_, name, ino| {
                    if ino == at {
                        found = Some(name.to_vec());
                    }
                    found.is_none()
                },
            )?;
            let Some(name) = found else { break };
            parts.push(String::from_utf8_lossy(&name).into_owned());
            at = parent;
        }
        parts.reverse();
        Ok(parts.iter().map(|part| format!("/{part}")).collect())
    }

    /// Hands directory, name and inode of the entries with keys in `from..to` to `each`, until it
    /// returns false.
    fn each_name(
        &self,
        from: &[u8],
        to: &[u8],
        each: &mut dyn FnMut(Ino, &[u8], Ino) -> bool,
    ) -> Result<(), Errno> {
        let mut from = from.to_vec();
        loop {
            let (mut count, mut goes_on, mut next) = (0, true, None);
            self.store
                .scan(Table::Dentries, &from, to, &mut |key, value| {
                    if count >= PIECE {
                        next = Some(key.to_vec());
                        return false;
                    }
                    count += 1;
                    let dir = key_u64(key, 0).unwrap_or(0);
                    if let (Some(name), Some(record)) = (key.get(8..), DentryRecord::decode(value))
                    {
                        goes_on = each(dir, name, record.ino);
                    }
                    goes_on
                })?;
            match next {
                Some(key) if goes_on => from = key,
                _ => return Ok(()),
            }
        }
    }
}
