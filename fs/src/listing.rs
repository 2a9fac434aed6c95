//! Listing directories.
//!
//! A cookie names a place in a listing: what comes after it was entered later. An entry keeps its
//! cookie as long as its name is there, whatever the name stands for, so that a listing in steps
//! shows each name that stays exactly once.

use crate::filesystem::FileSystem;
use crate::meta::records::{decode_cookie_entry, ino_key, key_u64, pair_key};
use crate::meta::store::Table;
use crate::{DirEntry, Errno, Ino};

const COOKIE_DOT: u64 = 1;
const COOKIE_DOTDOT: u64 = 2;

/// The first entry of a directory has this cookie; "." and ".." stand before it.
pub(crate) const COOKIE_FIRST: u64 = 3;

/// Entries that one step of a listing fetches.
const LIST_BATCH: usize = 128;

impl FileSystem {
    /// Calls `each` for the entries after `after_cookie` (0: from the start, with "." and "..")
    /// until it returns false.
    pub fn readdir(
        &self,
        ino: Ino,
        after_cookie: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        let dir = self.inode(ino)?;
        dir.check_dir()?;
        let (parent, attr) = {
            let state = dir.state.lock();
            (state.parent, state.attr)
        };
        self.touch_accessed(&dir, &attr);
        let dots: [(u64, Ino, &[u8]); 2] =
            [(COOKIE_DOT, ino, b"."), (COOKIE_DOTDOT, parent, b"..")];
        for (cookie, ino, name) in dots {
            let entry = DirEntry {
                ino,
                kind: libc::DT_DIR,
                name,
                cookie,
            };
            if after_cookie < cookie && !each(entry) {
                return Ok(());
            }
        }
        let mut next = after_cookie.max(COOKIE_DOTDOT).saturating_add(1);
        loop {
            let mut batch: Vec<(u64, Vec<u8>)> = Vec::with_capacity(LIST_BATCH);
            let (from, to) = (pair_key(ino, next), ino_key(ino + 1));
            self.store
                .scan(Table::Cookies, &from, &to, &mut |key, value| {
                    batch.push((key_u64(key, 8).unwrap_or(u64::MAX), value.to_vec()));
                    batch.len() < LIST_BATCH
                })?;
            for (cookie, value) in &batch {
                let Some((ino, kind, name)) = decode_cookie_entry(value) else {
                    log::error!("directory {ino}: an entry is damaged; run 'braidfs fsck -n'");
                    return Err(Errno::IO);
                };
                if !each(DirEntry {
                    ino,
                    kind,
                    name,
                    cookie: *cookie,
                }) {
                    return Ok(());
                }
            }
            match batch.last() {
                Some((cookie, _)) if batch.len() == LIST_BATCH => next = cookie.saturating_add(1),
                _ => return Ok(()),
            }
        }
    }
}
