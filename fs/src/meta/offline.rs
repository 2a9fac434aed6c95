//! The tables as a check of an unmounted volume needs them: read in order from one durable
//! snapshot, and mended in one commit.
//!
//! Nothing else uses the store meanwhile, so there are no groups: a [`Reader`] sees the durable
//! state alone, and [`Store::mend`] makes a set of changes durable, all or none.

use std::ops::Bound;

use redb::{
    Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    Table as RedbTable,
};

use super::store::{Base, Changes, FREE, Store, TABLE_COUNT, Table, write_changes};

/// Changes of all tables but that of free space.
pub(crate) type TableChanges = [Changes; TABLE_COUNT];

/// The table of free space inside a transaction.
pub(crate) type FreeTable<'a> = RedbTable<'a, u64, u64>;

/// One durable snapshot.
pub(crate) struct Reader {
    base: Base,
    free: ReadOnlyTable<u64, u64>,
}

impl Reader {
    /// Records of a table.
    pub(crate) fn len(&self, table: Table) -> Result<u64, redb::Error> {
        Ok(self.base[table as usize].len()?)
    }

    /// Runs of free blocks.
    pub(crate) fn free_len(&self) -> Result<u64, redb::Error> {
        Ok(self.free.len()?)
    }

    /// The value of `key`.
    pub(crate) fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, redb::Error> {
        let found = self.base[table as usize].get(key)?;
        Ok(found.map(|guard| guard.value().to_vec()))
    }

    /// Hands the records with `from <= key`, and a key that begins with `prefix`, to `each`, in
    /// order.
    pub(crate) fn scan<E: From<redb::Error>>(
        &self,
        table: Table,
        from: &[u8],
        prefix: &[u8],
        each: &mut dyn FnMut(&[u8], &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let bounds = (Bound::Included(from), Bound::Unbounded);
        let range = self.base[table as usize].range::<&[u8]>(bounds);
        for entry in range.map_err(redb::Error::from)? {
            let (key, value) = entry.map_err(redb::Error::from)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            each(key.value(), value.value())?;
        }
        Ok(())
    }

    /// Hands every row of the table of free space to `each`, in order.
    pub(crate) fn scan_free<E: From<redb::Error>>(
        &self,
        each: &mut dyn FnMut(u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        for entry in self.free.iter().map_err(redb::Error::from)? {
            let (start, len) = entry.map_err(redb::Error::from)?;
            each(start.value(), len.value())?;
        }
        Ok(())
    }
}

impl Store {
    /// The durable state as it is now.
    pub(crate) fn reader(&self) -> Result<Reader, redb::Error> {
        let db = self.db.lock();
        let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let base = Self::snapshot(db)?;
        let free = db.begin_read()?.open_table(FREE)?;
        Ok(Reader { base, free })
    }

    /// Makes changes durable in one commit, with what `space` does to the table of free space.
    pub(crate) fn mend(
        &self,
        changes: &TableChanges,
        space: impl FnOnce(&mut FreeTable<'_>) -> Result<(), redb::Error>,
    ) -> Result<(), redb::Error> {
        let db = self.db.lock();
        let db = db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let mut write = db.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        write.set_quick_repair(true);
        write_changes(&write, changes)?;
        {
            let mut free = write.open_table(FREE)?;
            space(&mut free)?;
        }
        Ok(write.commit()?)
    }
}
