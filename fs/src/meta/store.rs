//! The metadata tables: get, put, scan; and transaction groups.
//!
//! A read looks, in this order, into the *open* group (what operations change now), the
//! *committing* group (frozen, on its way to the devices), the *journaled* groups (durable, but not
//! in redb yet; all of them in one) and the *base* (redb's last durable snapshot). A write goes
//! into the open group alone. So operations never wait for a commit, and a commit applies one
//! frozen, consistent set.
//!
//! Several puts of one operation need no batch: an operation holds the gate of its transaction
//! group (see [`crate::txg`]), and a group is frozen only while nobody does.
//!
//! Locks: `state` is taken for the length of one look-up or put; nothing else is taken under it
//! but what redb needs to read.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use braidfs_blockdev::Volume;
use parking_lot::{Mutex, RwLock};
use redb::{
    AccessGuard, Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable,
    StorageBackend, TableDefinition,
};

use crate::Errno;
use crate::alloc::SpaceLog;

use super::contain::{Contained, Guarded, Pair, disorder, next_pair};
use super::journal::{self, Replayed};

/// The tables. redb knows them by name, the journal by these numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    /// ino -> inode record
    Inodes,
    /// (directory, name) -> entry
    Dentries,
    /// (directory, cookie) -> entry with its name
    Cookies,
    /// (ino, file block) -> extent
    Extents,
    /// (ino, name) -> value
    Xattrs,
    /// ino -> why
    Orphans,
    /// name -> value
    Settings,
}

/// How many there are, but for the one of free space.
pub(super) const TABLE_COUNT: usize = 7;

type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// Their names on the devices.
pub(super) const DEFINITION_NAMES: [&str; TABLE_COUNT] = [
    "inodes", "dentries", "cookies", "extents", "xattrs", "orphans", "settings",
];

pub(super) const DEFINITIONS: [Definition; TABLE_COUNT] = {
    let [a, b, c, d, e, f, g] = DEFINITION_NAMES;
    [
        TableDefinition::new(a),
        TableDefinition::new(b),
        TableDefinition::new(c),
        TableDefinition::new(d),
        TableDefinition::new(e),
        TableDefinition::new(f),
        TableDefinition::new(g),
    ]
};

/// Name of the table of free space.
pub(super) const FREE_NAME: &str = "free";

/// Free space: first block -> blocks. Only commits touch it; see [`crate::alloc`].
pub(super) const FREE: TableDefinition<'static, u64, u64> = TableDefinition::new(FREE_NAME);

/// Rough cost in memory of one entry of a group, over its key and value.
const ENTRY_OVERHEAD_BYTES: usize = 96;

/// A key and its value.
pub(crate) type Entry = (Vec<u8>, Vec<u8>);

/// Keys with their new values; `None` where the record goes.
pub(crate) type Changes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// What one transaction group changed.
#[derive(Clone, Default)]
struct Group {
    changes: [Changes; TABLE_COUNT],
    bytes: usize,
}

impl Group {
    fn is_empty(&self) -> bool {
        self.changes.iter().all(BTreeMap::is_empty)
    }

    fn records(&self) -> u64 {
        self.changes
            .iter()
            .map(|changes| changes.len() as u64)
            .sum()
    }

    /// Puts what the next group changed over this.
    fn append(&mut self, mut next: Group) {
        for (changes, next) in self.changes.iter_mut().zip(&mut next.changes) {
            changes.append(next);
        }
        self.bytes += next.bytes;
    }

    fn set(&mut self, table: Table, key: &[u8], value: Option<Vec<u8>>) {
        let cost = |value: &Option<Vec<u8>>| value.as_ref().map_or(0, Vec::len);
        let added = cost(&value);
        let changes = &mut self.changes[table as usize];
        if let Some(slot) = changes.get_mut(key) {
            self.bytes = self.bytes + added - cost(slot);
            *slot = value;
        } else {
            self.bytes += added + key.len() + ENTRY_OVERHEAD_BYTES;
            changes.insert(key.to_vec(), value);
        }
    }
}

/// Changes that redb does not have yet.
#[derive(Clone, Copy, Default)]
pub(crate) struct Unwritten {
    /// Memory that they take.
    pub bytes: u64,
    /// How many records they set or remove.
    pub records: u64,
}

pub(super) type Base = [ReadOnlyTable<&'static [u8], &'static [u8]>; TABLE_COUNT];

struct State {
    open: Group,
    committing: Option<Arc<Group>>,
    journaled: Group,
    base: Guarded<Base>,
}

impl State {
    /// The groups over the base, the newest first.
    fn groups(&self) -> [Option<&Group>; 3] {
        [
            Some(&self.open),
            self.committing.as_deref(),
            Some(&self.journaled),
        ]
    }

    /// What they changed in a table.
    fn changes(&self, table: Table) -> [&Changes; 3] {
        static NONE: Changes = Changes::new();
        self.groups()
            .map(|group| group.map_or(&NONE, |group| &group.changes[table as usize]))
    }
}

/// The metadata store.
pub(crate) struct Store {
    /// `None` once closed. Only commits lock it for long.
    db: Mutex<Option<Contained>>,
    /// Bytes of the pages in use, if counted since the last commit.
    used: Mutex<Option<u64>>,
    /// The tables were seen to be trees, which changes keep.
    proven: AtomicBool,
    /// How often a row was removed.
    deletions: AtomicU64,
    state: RwLock<State>,
}

fn failed(what: &str, error: impl std::fmt::Display) -> Errno {
    log::error!("metadata {what}: {error}");
    Errno::IO
}

/// Carries changes over into the tables of a transaction.
pub(super) fn write_changes(
    write: &redb::WriteTransaction,
    changes: &[Changes; TABLE_COUNT],
) -> Result<(), redb::Error> {
    for (definition, changes) in DEFINITIONS.into_iter().zip(changes) {
        if changes.is_empty() {
            continue;
        }
        let mut table = write.open_table(definition)?;
        for (key, value) in changes {
            // A look-up gives up where a tree is too deep; a change would go on.
            table.get(key.as_slice())?;
            match value {
                Some(value) => drop(table.insert(key.as_slice(), value.as_slice())?),
                None => drop(table.remove(key.as_slice())?),
            }
        }
    }
    Ok(())
}

/// Reads a range to its end.
fn read_all<K: redb::Key + 'static, V: redb::Value + 'static>(
    mut range: redb::Range<'_, K, V>,
) -> Result<(), redb::Error> {
    let mut pending = next_pair(&mut range, None)?;
    while pending.is_some() {
        pending = next_pair(&mut range, pending.as_ref())?;
    }
    Ok(())
}

/// redb's own cache, beside the page cache that it reads through.
pub(super) const REDB_CACHE_BYTES: usize = 32 << 20;

/// The same of a store that only walks.
const WALK_CACHE_BYTES: usize = 4 << 20;

impl Store {
    /// Opens the store, or makes it if `backend` is empty.
    pub(crate) fn open(backend: impl redb::StorageBackend) -> Result<Self, redb::Error> {
        let db = Contained::open(backend, REDB_CACHE_BYTES)?;
        db.run(Self::make_missing)?;
        let base = db.guard(db.run(Self::snapshot)?);
        let state = State {
            open: Group::default(),
            committing: None,
            journaled: Group::default(),
            base,
        };
        Ok(Self {
            db: Mutex::new(Some(db)),
            used: Mutex::new(None),
            proven: AtomicBool::new(false),
            deletions: AtomicU64::new(0),
            state: RwLock::new(state),
        })
    }

    /// Makes the tables, if there are none.
    fn make_missing(db: &Database) -> Result<(), redb::Error> {
        if db.begin_read()?.open_table(FREE).is_ok() {
            return Ok(());
        }
        let mut write = db.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        write.set_quick_repair(true);
        for definition in DEFINITIONS {
            write.open_table(definition)?;
        }
        write.open_table(FREE)?;
        Ok(write.commit()?)
    }

    /// Opens the same store anew, between closing it and using what `prepare` gives; look-ups wait.
    /// Nothing has been changed since it was opened.
    pub(crate) fn reopen<B: redb::StorageBackend>(
        &self,
        prepare: impl FnOnce() -> std::io::Result<B>,
    ) -> Result<(), redb::Error> {
        let mut db = self.db.lock();
        let mut state = self.state.write();
        if let Some(db) = db.take() {
            db.close()?;
        }
        let opened = Contained::open(prepare()?, REDB_CACHE_BYTES)?;
        state.base = opened.guard(opened.run(Self::snapshot)?);
        *db = Some(opened);
        Ok(())
    }

    /// Takes over what the journal of the volume holds; see [`journal::replay`]. Call it before
    /// anything else is done with a store that was just opened.
    pub(crate) fn replay(&self, volume: &Arc<Volume>) -> Result<Replayed, redb::Error> {
        let db = self.db.lock();
        let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let replayed = journal::replay(db, volume, false)?;
        let base = db.guard(db.run(Self::snapshot)?);
        let old = std::mem::replace(&mut self.state.write().base, base);
        drop(old);
        Ok(replayed)
    }

    pub(super) fn snapshot(db: &Database) -> Result<Base, redb::Error> {
        let read = db.begin_read()?;
        let [a, b, c, d, e, f, g] = DEFINITIONS;
        Ok([
            read.open_table(a)?,
            read.open_table(b)?,
            read.open_table(c)?,
            read.open_table(d)?,
            read.open_table(e)?,
            read.open_table(f)?,
            read.open_table(g)?,
        ])
    }

    /// Looks `key` up and hands its value, if any, to `use_value`.
    pub(crate) fn get<R>(
        &self,
        table: Table,
        key: &[u8],
        use_value: impl FnOnce(Option<&[u8]>) -> R,
    ) -> Result<R, Errno> {
        let state = self.state.read();
        for changes in state.changes(table) {
            if let Some(value) = changes.get(key) {
                return Ok(use_value(value.as_deref()));
            }
        }
        let found = state.base.read(|base| {
            let found = base[table as usize].get(key)?;
            // Looks at it where a panic does no harm.
            let _value = found.as_ref().map(AccessGuard::value);
            Ok(found)
        });
        let found = found.map_err(|e| failed("read", e))?;
        Ok(use_value(found.as_ref().map(|guard| guard.value())))
    }

    /// Whether a group that is not durable yet changed `key`.
    pub(crate) fn is_unwritten(&self, table: Table, key: &[u8]) -> bool {
        let state = self.state.read();
        let [open, committing, _] = state.changes(table);
        [open, committing]
            .iter()
            .any(|changes| changes.contains_key(key))
    }

    /// Sets `key` to `value` in the open group.
    pub(crate) fn put(&self, table: Table, key: &[u8], value: &[u8]) {
        self.state
            .write()
            .open
            .set(table, key, Some(value.to_vec()));
    }

    /// Removes `key` in the open group.
    pub(crate) fn delete(&self, table: Table, key: &[u8]) {
        self.deletions.fetch_add(1, Ordering::Relaxed);
        self.state.write().open.set(table, key, None);
    }

    /// How many rows were removed since it was opened: whether there is room to come back.
    pub(crate) fn deletions(&self) -> u64 {
        self.deletions.load(Ordering::Relaxed)
    }

    /// Memory that the open group takes, in bytes, roughly.
    pub(crate) fn open_bytes(&self) -> usize {
        self.state.read().open.bytes
    }

    /// Memory and number of the changes that redb does not have yet: those of the open group, of
    /// the one that is being committed and of those in the journal.
    pub(crate) fn unwritten(&self) -> Unwritten {
        let state = self.state.read();
        state
            .groups()
            .into_iter()
            .flatten()
            .fold(Unwritten::default(), |sum, group| Unwritten {
                bytes: sum.bytes + group.bytes as u64,
                records: sum.records + group.records(),
            })
    }

    /// Whether the open group changed nothing.
    pub(crate) fn open_is_empty(&self) -> bool {
        self.state.read().open.is_empty()
    }

    /// Whether there are groups in the journal that redb does not have.
    pub(crate) fn has_journaled(&self) -> bool {
        !self.state.read().journaled.is_empty()
    }

    /// Hands the entries with `from <= key < to` to `each`, in order, until it returns false.
    /// `each` must not call back into the store.
    pub(crate) fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Errno> {
        if from >= to {
            return Ok(());
        }
        let state = self.state.read();
        let bounds = (Bound::Included(from), Bound::Excluded(to));
        let mut groups = state
            .changes(table)
            .map(|changes| changes.range::<[u8], _>(bounds).peekable());
        let base = state
            .base
            .read(|base| Ok(base[table as usize].range::<&[u8]>(from..to)?));
        let mut base = base.map_err(|e| failed("scan", e))?;
        let mut next = |before: Option<&Pair<'static, _, _>>| {
            let pair: Option<Pair<'static, &[u8], &[u8]>> = next_pair(&mut base, before)?;
            match &pair {
                Some((key, _)) if !(from..to).contains(&key.value()) => Err(disorder()),
                _ => Ok(pair),
            }
        };
        let mut pending = next(None).map_err(|e| failed("scan", e))?;
        loop {
            let based = pending.as_ref().map(|(key, _)| key.value());
            let changed = groups
                .iter_mut()
                .filter_map(|group| Some(group.peek()?.0.as_slice()));
            let Some(least) = changed.chain(based).min() else {
                return Ok(());
            };
            // The newest layer that has the key decides; the older ones step past it.
            let is_based = based == Some(least);
            let mut decided = None;
            for group in &mut groups {
                let changed = group.next_if(|(key, _)| key.as_slice() == least);
                decided = decided.or(changed.map(|(_, value)| value.as_deref()));
            }
            let goes_on = match (decided, &pending) {
                (Some(value), _) => value.is_none_or(|value| each(least, value)),
                (None, Some((key, value))) => each(key.value(), value.value()),
                (None, None) => true,
            };
            if !goes_on {
                return Ok(());
            }
            if is_based {
                pending = next(pending.as_ref()).map_err(|e| failed("scan", e))?;
            }
        }
    }

    /// The last entry with `from <= key <= to`, as owned key and value.
    pub(crate) fn last_at_most(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
    ) -> Result<Option<Entry>, Errno> {
        let state = self.state.read();
        let mut upper = Bound::Included(to.to_vec());
        loop {
            let upto = match &upper {
                Bound::Included(key) => Bound::Included(key.as_slice()),
                Bound::Excluded(key) if key.as_slice() <= from => return Ok(None),
                Bound::Excluded(key) => Bound::Excluded(key.as_slice()),
                Bound::Unbounded => Bound::Unbounded,
            };
            let bounds = (Bound::Included(from), upto);
            let changed = state
                .changes(table)
                .map(|changes| changes.range::<[u8], _>(bounds).next_back());
            let based = state.base.read(|base| {
                let mut range = base[table as usize].range::<&[u8]>(bounds)?;
                let last = range.next_back().transpose()?;
                match &last {
                    Some((key, _)) if !bounds.contains(key.value()) => Err(disorder()),
                    _ => {
                        let _value = last.as_ref().map(|(_, value)| value.value());
                        Ok(last)
                    }
                }
            });
            let based = based.map_err(|e| failed("scan", e))?;
            let based_key = based.as_ref().map(|(key, _)| key.value());
            let keys = changed.iter().flatten().map(|(key, _)| key.as_slice());
            let greatest = keys.chain(based_key).max().map(<[u8]>::to_vec);
            let Some(key) = greatest else { return Ok(None) };
            let mut of_groups = changed.into_iter().flatten();
            let value = match of_groups.find(|(changed, _)| **changed == key) {
                Some((_, value)) => value.clone(),
                None => based.as_ref().map(|(_, value)| value.value().to_vec()),
            };
            match value {
                Some(value) => return Ok(Some((key, value))),
                None => upper = Bound::Excluded(key),
            }
        }
    }

    /// Closes the open group; what follows goes into a new one. The caller made sure that no
    /// operation is half way through, and that no group is committing.
    pub(crate) fn freeze(&self) {
        let mut state = self.state.write();
        debug_assert!(state.committing.is_none(), "one commit at a time");
        let frozen = std::mem::take(&mut state.open);
        state.committing = Some(Arc::new(frozen));
    }

    /// Lets go of a frozen group that changed nothing.
    pub(crate) fn forget_frozen(&self) {
        self.state.write().committing = None;
    }

    /// The frozen group as a record of the journal, with the changes of free space that belong to
    /// it; `None` if it is too large for that.
    pub(crate) fn encode_frozen(&self, space: &SpaceLog) -> Option<Vec<u8>> {
        let group = self.state.read().committing.clone()?;
        let cheap = group.bytes <= 2 * journal::RECORD_BYTES_MAX;
        cheap.then(|| journal::encode(&group.changes, space))?
    }

    /// The frozen group is durable in the journal.
    pub(crate) fn note_journaled(&self) {
        let mut state = self.state.write();
        if let Some(group) = state.committing.take() {
            state.journaled.append(Arc::unwrap_or_clone(group));
        }
    }

    /// Gives redb the groups in the journal and the frozen one, with the changes of free space that
    /// belong to them, and makes all durable. What was in the journal is void then: `journal` is
    /// its new base.
    pub(crate) fn commit(&self, space: &Arc<SpaceLog>, journal: u64) -> Result<(), redb::Error> {
        let group = {
            let mut state = self.state.write();
            let Some(frozen) = state.committing.take() else {
                return Ok(());
            };
            let mut all = std::mem::take(&mut state.journaled);
            let group = if all.is_empty() {
                frozen
            } else {
                all.append(Arc::unwrap_or_clone(frozen));
                Arc::new(all)
            };
            state.committing = Some(Arc::clone(&group));
            group
        };
        let db = self.db.lock();
        let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let space = Arc::clone(space);
        let base = db.run(move |db| {
            let mut write = db.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            write.set_quick_repair(true);
            write_changes(&write, &group.changes)?;
            {
                let mut free = write.open_table(FREE)?;
                space.apply(&mut free)?;
            }
            journal::name_base(&write, journal)?;
            write.commit()?;
            Self::snapshot(db)
        })?;
        let base = db.guard(base);
        *self.used.lock() = None;
        let mut state = self.state.write();
        let old = std::mem::replace(&mut state.base, base);
        state.committing = None;
        drop(state);
        drop(old);
        Ok(())
    }

    /// Has a store of its own, over what `probe` makes, read every page that the durable state
    /// refers to. Commits wait only while it is opened; what it reads stays in place until the end.
    pub(crate) fn walk<B: redb::StorageBackend>(
        &self,
        probe: impl FnOnce() -> B,
    ) -> Result<(), redb::Error> {
        let (_in_place, copy) = {
            let db = self.db.lock();
            let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
            let in_place = db.guard(db.run(|db| Ok(db.begin_read()?))?);
            (in_place, Contained::open(probe(), WALK_CACHE_BYTES)?)
        };
        copy.run(|copy| {
            let read = copy.begin_read()?;
            let mut result = Ok(());
            for definition in DEFINITIONS {
                let walked = read.open_table(definition).map_err(redb::Error::from);
                let walked = walked.and_then(|table| read_all(table.range::<&[u8]>(..)?));
                // Damage in one table keeps nobody from reading the others.
                result = result.and(walked);
            }
            result.and(read_all(read.open_table(FREE)?.range::<u64>(..)?))
        })
    }

    /// Bytes of redb's file that are in use in the durable state. Walks all tables, so it is for
    /// when space is short; counted once between two commits. `file` is what the store is in.
    /// Waits for a commit under way.
    pub(crate) fn used_bytes(&self, file: impl StorageBackend) -> Result<u64, redb::Error> {
        let db = self.db.lock();
        let counted = *self.used.lock();
        if let Some(used) = counted {
            return Ok(used);
        }
        let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let proven = self.proven.load(Ordering::Relaxed);
        let used = db.run(move |db| {
            if !proven {
                super::system::prove(&file)?;
            }
            let write = db.begin_write()?;
            let stats = write.stats()?;
            write.abort()?;
            Ok(stats.allocated_pages() * stats.page_size() as u64)
        })?;
        self.proven.store(true, Ordering::Relaxed);
        *self.used.lock() = Some(used);
        Ok(used)
    }

    /// Ends the use of the store: redb marks its file as closed. Look-ups fail from now on.
    pub(crate) fn close(&self) -> Result<(), redb::Error> {
        let db = self.db.lock().take();
        match db {
            Some(db) => db.close(),
            None => Ok(()),
        }
    }

    /// Hands every free extent of the durable state to `each`, in order.
    pub(crate) fn scan_free(&self, each: &mut dyn FnMut(u64, u64)) -> Result<(), redb::Error> {
        let free = {
            let db = self.db.lock();
            let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
            db.guard(db.run(|db| Ok(db.begin_read()?.open_table(FREE)?))?)
        };
        let mut range = free.read(|free| Ok(free.range::<u64>(..)?))?;
        let mut pending = next_pair(&mut range, None)?;
        while let Some((start, len)) = &pending {
            each(start.value(), len.value());
            pending = next_pair(&mut range, pending.as_ref())?;
        }
        Ok(())
    }
}
