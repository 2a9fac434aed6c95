//! What a repair will change: records, blocks to copy, and the free space that follows. It is
//! gathered in memory and made durable in one commit, so a power cut leaves the old state or the
//! repaired one.

use std::ops::Range;

use redb::ReadableTable;

use braidfs_blockdev::{AlignedBuf, PAGE_SIZE, VolBlock, Volume};

use super::bitmap::Bitmap;
use super::progress::FsckError;
use super::session::Session;
use crate::MountError;
use crate::alloc::FREE_KNOWN_CHUNK_KEY;
use crate::meta::offline::{FreeTable, Offline, TableChanges};
use crate::meta::salvage::Loss;
use crate::meta::store::Table;

/// The free space as it shall be: what the data chunks have and no extent names.
pub(super) struct SpacePlan {
    /// Blocks that extents name after the repair.
    pub used: Bitmap,
    /// The data chunks, joined where they touch.
    pub data: Vec<Range<u64>>,
    /// Highest id of a data chunk.
    pub known_chunk: Option<u64>,
}

/// The changes of a repair.
#[derive(Default)]
pub(super) struct Edits {
    tables: TableChanges,
    /// Blocks whose content is copied before the commit: from, to.
    pub clones: Vec<(u64, u64)>,
    /// `None`: the free space stays as it is.
    pub space: Option<SpacePlan>,
}

impl Edits {
    /// Sets a record.
    pub(super) fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.tables[table as usize].insert(key.to_vec(), Some(value.to_vec()));
    }

    /// Removes a record.
    pub(super) fn delete(&mut self, table: Table, key: &[u8]) {
        self.tables[table as usize].insert(key.to_vec(), None);
    }

    /// What a record shall be, if it changes.
    pub(super) fn get(&self, table: Table, key: &[u8]) -> Option<Option<&[u8]>> {
        let change = self.tables[table as usize].get(key)?;
        Some(change.as_deref())
    }

    /// The records that are set anew in a table, in order.
    pub(super) fn puts(&self, table: Table) -> impl Iterator<Item = (&[u8], &[u8])> {
        let changes = self.tables[table as usize].iter();
        changes.filter_map(|(key, value)| Some((key.as_slice(), value.as_deref()?)))
    }

    /// Whether a table changes.
    pub(super) fn has(&self, table: Table) -> bool {
        !self.tables[table as usize].is_empty()
    }

    /// Makes it all durable; with losses, the damaged tables are built anew.
    pub(super) fn apply(self, session: &Session, has_losses: bool) -> Result<(), FsckError> {
        self.copy_blocks(&session.volume)?;
        let salvage = match has_losses {
            true => Some(session.salvage().ok_or(redb::Error::PreviousIo)?),
            false => None,
        };
        let losses: Option<Vec<Loss>> = salvage
            .as_ref()
            .map(|salvage| salvage.all_losses().map(|(_, loss)| loss).collect());
        let space = self.space;
        session.store()?.mend(
            &session.volume,
            salvage,
            self.tables,
            move |table| match &space {
                Some(plan) => plan.apply(table),
                None => Ok(()),
            },
        )?;
        if let Some(losses) = losses {
            drop_lost(session, &losses);
        }
        Ok(())
    }

    /// The copies go to blocks that are free in the durable state. What cannot be read is replaced
    /// by zeros: the checksum in the extent says that these are not the data.
    fn copy_blocks(&self, volume: &Volume) -> Result<(), FsckError> {
        let failed = |error| FsckError::Mount(MountError::Metadata(Box::new(error)));
        for &(from, to) in &self.clones {
            let buf = AlignedBuf::zeroed(PAGE_SIZE);
            let data = volume
                .read_wait(VolBlock(from), buf, None)
                .unwrap_or_else(|_| AlignedBuf::zeroed(PAGE_SIZE));
            volume.write_wait(VolBlock(to), data).map_err(failed)?;
        }
        if self.clones.is_empty() {
            return Ok(());
        }
        volume.flush_wait().map_err(failed)
    }
}

/// Gives the pages of the tables that were replaced back. It is no harm if that fails.
fn drop_lost(session: &Session, losses: &[Loss]) {
    if !losses.iter().all(Loss::is_page) {
        log::warn!("metadata: pages of damaged tables stay in use: they may be another table's");
        return;
    }
    let blanked = session.blank(losses);
    let dropped = blanked.map_err(|error| error.to_string()).and_then(|()| {
        let dropped = session.store().and_then(Offline::drop_lost);
        dropped.map_err(|error| error.to_string())
    });
    if let Err(error) = dropped {
        log::warn!("metadata: pages of damaged tables stay in use: {error}");
    }
}

impl SpacePlan {
    /// Changes the rows that differ.
    fn apply(&self, table: &mut FreeTable<'_>) -> Result<(), redb::Error> {
        let wanted = |start: u64, len: u64| {
            let after = self.data.partition_point(|chunk| chunk.end <= start);
            let Some(chunk) = self.data.get(after).filter(|chunk| chunk.start <= start) else {
                return false;
            };
            let used = |block: u64| self.used.find(block..block + 1, true).is_some();
            let begins = start == chunk.start || used(start - 1);
            let run = self.used.runs(start..chunk.end, false).next();
            begins && run == Some(start..start.saturating_add(len))
        };
        table.retain(|start, len| start == FREE_KNOWN_CHUNK_KEY || wanted(start, len))?;
        for run in self
            .data
            .iter()
            .flat_map(|c| self.used.runs(c.clone(), false))
        {
            let len = run.end - run.start;
            if table.get(run.start)?.map(|there| there.value()) != Some(len) {
                table.insert(run.start, len)?;
            }
        }
        if let Some(id) = self.known_chunk {
            table.insert(FREE_KNOWN_CHUNK_KEY, id)?;
        }
        Ok(())
    }
}
