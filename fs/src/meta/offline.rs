//! The tables as a check of an unmounted volume needs them: read in order from one durable
//! snapshot, and mended in one commit.
//!
//! Nothing else uses the store meanwhile, so there are no groups: a [`Reader`] sees the durable
//! state alone, and [`Offline::mend`] makes a set of changes durable, all or none.
//!
//! Where pages cannot be read, the reader goes by [`Salvage`]. A table that has lost records is
//! then built anew in the same commit: the old one gets another name, and once that is durable its
//! pages are given back ([`Offline::drop_lost`]). After a power cut in between it lies there unused
//! until the next repair.

use std::ops::Bound;
use std::sync::Arc;

use braidfs_blockdev::Volume;
use redb::{
    Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTableMetadata, StorageBackend,
    Table as RedbTable, TableDefinition, TableHandle, WriteTransaction,
};

use super::contain::{Contained, Guarded, disorder, next_pair};
use super::journal::{self, Replayed};
use super::salvage::{Loss, Salvage};
use super::store::{
    Base, Changes, DEFINITION_NAMES, DEFINITIONS, FREE, FREE_NAME, REDB_CACHE_BYTES, Store,
    TABLE_COUNT, Table, write_changes,
};

/// Changes of all tables but that of free space.
pub(crate) type TableChanges = [Changes; TABLE_COUNT];

/// The table of free space inside a transaction.
pub(crate) type FreeTable<'a> = RedbTable<'a, u64, u64>;

/// What the names of tables that were replaced begin with.
const LOST: &str = "lost-";

/// Is called for each record.
pub(crate) type Each<'a, E> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<(), E>;

/// A snapshot by redb, all of it readable so far.
pub(crate) struct Whole {
    base: Guarded<Base>,
    free: Guarded<ReadOnlyTable<u64, u64>>,
}

/// One durable snapshot.
pub(crate) enum Reader {
    /// By redb.
    Whole(Box<Whole>),
    /// What is left of it.
    Salvaged(Salvage),
}

/// The number of the table of free space for [`Salvage`].
const FREE_NUMBER: usize = TABLE_COUNT;

impl Reader {
    /// Records of a table.
    pub(crate) fn len(&self, table: Table) -> Result<u64, redb::Error> {
        match self {
            Reader::Whole(whole) => whole.base.read(|base| Ok(base[table as usize].len()?)),
            Reader::Salvaged(salvage) => Ok(salvage.len(table as usize)),
        }
    }

    /// Runs of free blocks.
    pub(crate) fn free_len(&self) -> Result<u64, redb::Error> {
        match self {
            Reader::Whole(whole) => whole.free.read(|free| Ok(free.len()?)),
            Reader::Salvaged(salvage) => Ok(salvage.len(FREE_NUMBER)),
        }
    }

    /// The value of `key`.
    pub(crate) fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, redb::Error> {
        match self {
            Reader::Whole(whole) => whole.base.read(|base| {
                let found = base[table as usize].get(key)?;
                Ok(found.map(|guard| guard.value().to_vec()))
            }),
            Reader::Salvaged(salvage) => {
                let mut value = None;
                salvage.scan::<redb::Error>(table as usize, key, &mut |found, bytes| {
                    value = (found == key).then(|| bytes.to_vec());
                    Ok(false)
                })?;
                Ok(value)
            }
        }
    }

    /// Hands the records with `from <= key`, and a key that begins with `prefix`, to `each`, in
    /// order.
    pub(crate) fn scan<E: From<redb::Error>>(
        &self,
        table: Table,
        from: &[u8],
        prefix: &[u8],
        each: Each<'_, E>,
    ) -> Result<(), E> {
        let base = match self {
            Reader::Whole(whole) => &whole.base,
            Reader::Salvaged(salvage) => {
                return salvage.scan(table as usize, from, &mut |key, value| {
                    if !key.starts_with(prefix) {
                        return Ok(false);
                    }
                    each(key, value).map(|()| true)
                });
            }
        };
        let bounds = (Bound::Included(from), Bound::Unbounded);
        let mut range = base.read(|base| Ok(base[table as usize].range::<&[u8]>(bounds)?))?;
        let mut pending = next_pair(&mut range, None)?;
        while let Some((key, value)) = &pending {
            if key.value() < from {
                return Err(disorder().into());
            }
            if !key.value().starts_with(prefix) {
                break;
            }
            each(key.value(), value.value())?;
            pending = next_pair(&mut range, pending.as_ref())?;
        }
        Ok(())
    }

    /// Hands every row of the table of free space to `each`, in order.
    pub(crate) fn scan_free<E: From<redb::Error>>(
        &self,
        each: &mut dyn FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let free = match self {
            Reader::Whole(whole) => &whole.free,
            Reader::Salvaged(salvage) => {
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
                return salvage.scan(FREE_NUMBER, &[], &mut |start, len| {
                    each(number(start), number(len)).map(|()| true)
                });
            }
        };
        let mut range = free.read(|free| Ok(free.range::<u64>(..)?))?;
        let mut pending = next_pair(&mut range, None)?;
        while let Some((start, len)) = &pending {
            each(start.value(), len.value())?;
            pending = next_pair(&mut range, pending.as_ref())?;
        }
        Ok(())
    }

    /// The pages that cannot be read, with the names of their tables.
    pub(crate) fn losses(&self) -> Vec<(&'static str, Loss)> {
        let Reader::Salvaged(salvage) = self else {
            return Vec::new();
        };
        let names: Vec<&str> = DEFINITION_NAMES.into_iter().chain([FREE_NAME]).collect();
        let named = |(table, loss): (usize, Loss)| (names[table], loss);
        salvage.all_losses().map(named).collect()
    }
}

/// Gives a table another name, under which none is yet.
fn rename_lost(write: &WriteTransaction, name: &str) -> Result<(), redb::Error> {
    let taken: Vec<String> = write
        .list_tables()?
        .map(|table| table.name().to_owned())
        .collect();
    let mut lost = format!("{LOST}{name}");
    while taken.contains(&lost) {
        lost.push('-');
    }
    let old: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new(name);
    let new: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new(&lost);
    Ok(write.rename_table(old, new)?)
}

/// Builds the tables with losses anew from what is readable.
fn rebuild(write: &WriteTransaction, salvage: &Salvage) -> Result<(), redb::Error> {
    for (number, definition) in DEFINITIONS.into_iter().enumerate() {
        if salvage.losses(number).is_empty() {
            continue;
        }
        rename_lost(write, DEFINITION_NAMES[number])?;
        let mut table = write.open_table(definition)?;
        salvage.scan::<redb::Error>(number, &[], &mut |key, value| {
            table.insert(key, value)?;
            Ok(true)
        })?;
    }
    if !salvage.losses(FREE_NUMBER).is_empty() {
        rename_lost(write, FREE_NAME)?;
        let mut table = write.open_table(FREE)?;
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
        salvage.scan::<redb::Error>(FREE_NUMBER, &[], &mut |start, len| {
            table.insert(number(start), number(len))?;
            Ok(true)
        })?;
    }
    Ok(())
}

/// The store, without the groups of a mounted one. Opening it reads the list of tables at the most.
pub(crate) struct Offline(Contained);

fn begin(db: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut write = db.begin_write()?;
    write.set_durability(Durability::Immediate)?;
    write.set_quick_repair(true);
    Ok(write)
}

impl Offline {
    /// Opens what is there.
    pub(crate) fn open(backend: impl StorageBackend) -> Result<Self, redb::Error> {
        Contained::open(backend, REDB_CACHE_BYTES).map(Self)
    }

    /// Takes over what the journal of the volume holds, up to where it is damaged. Call it before
    /// anything else is done with a store that was just opened.
    pub(crate) fn replay(&self, volume: &Arc<Volume>) -> Result<Replayed, redb::Error> {
        journal::replay(&self.0, volume, true)
    }

    /// The durable state as it is now.
    pub(crate) fn reader(&self) -> Result<Reader, redb::Error> {
        let (base, free) = self
            .0
            .run(|db| Ok((Store::snapshot(db)?, db.begin_read()?.open_table(FREE)?)))?;
        Ok(Reader::Whole(Box::new(Whole {
            base: self.0.guard(base),
            free: self.0.guard(free),
        })))
    }

    /// Makes changes durable in one commit, with what `space` does to the table of free space.
    /// Tables that have lost pages, going by `salvage`, are built anew first. What the journal held
    /// is void afterwards.
    pub(crate) fn mend(
        &self,
        volume: &Arc<Volume>,
        salvage: Option<Salvage>,
        changes: TableChanges,
        space: impl FnOnce(&mut FreeTable<'_>) -> Result<(), redb::Error> + Send + 'static,
    ) -> Result<(), redb::Error> {
        let base = journal::unused_base(volume);
        self.0.run(move |db| {
            let write = begin(db)?;
            if let Some(salvage) = salvage {
                rebuild(&write, &salvage)?;
            }
            write_changes(&write, &changes)?;
            {
                let mut free = write.open_table(FREE)?;
                space(&mut free)?;
            }
            journal::name_base(&write, base)?;
            Ok(write.commit()?)
        })
    }

    /// Deletes the tables that were replaced, with all pages that they still lead to.
    pub(crate) fn drop_lost(&self) -> Result<(), redb::Error> {
        self.0.run(|db| {
            let write = begin(db)?;
            let tables: Vec<_> = write.list_tables()?.collect();
            for table in tables.into_iter().filter(|t| t.name().starts_with(LOST)) {
                write.delete_table(table)?;
            }
            Ok(write.commit()?)
        })
    }

    /// Ends its use. Nobody reads any more.
    pub(crate) fn close(self) -> Result<(), redb::Error> {
        self.0.close()
    }
}
