//! What one transaction group did to the free space: for the table of it, and for the journal.

use redb::ReadableTable;

use super::RunSet;
use crate::meta::journal::Reader;
use crate::meta::records::BLOCKS_MAX;

/// Stands for no chunk.
const NO_CHUNK: u32 = u32::MAX;
/// Bytes of a run in the journal.
const RUN_LEN: usize = 16;

/// What one transaction group did to the free space.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SpaceLog {
    /// New chunks: start, length; and the highest chunk id among them.
    pub(super) added: Vec<(u64, u64)>,
    pub(super) known_chunk: Option<u32>,
    pub(super) allocated: RunSet,
    pub(super) freed: Vec<(u64, u64)>,
    /// Data in the durable state, set aside in this one.
    pub(super) converted: Vec<(u64, u64)>,
    /// Set aside in the durable state, data in this one.
    pub(super) filled: Vec<(u64, u64)>,
}

/// Key in the free table whose value is the highest data chunk id that the table accounts for.
pub(crate) const FREE_KNOWN_CHUNK_KEY: u64 = u64::MAX;

pub(super) fn corrupted(what: &str, start: u64, len: u64) -> redb::Error {
    redb::Error::Corrupted(format!("free space: {what} blocks {start}+{len}"))
}

fn remove_free(
    table: &mut redb::Table<'_, u64, u64>,
    start: u64,
    len: u64,
) -> Result<(), redb::Error> {
    let run = table.range(..=start)?.next_back().transpose()?;
    let Some((run, run_len)) = run.map(|(k, v)| (k.value(), v.value())) else {
        return Err(corrupted("allocated but not free:", start, len));
    };
    if run.checked_add(run_len).is_none_or(|end| end < start + len) {
        return Err(corrupted("allocated but not free:", start, len));
    }
    table.remove(run)?;
    if run < start {
        table.insert(run, start - run)?;
    }
    if start + len < run + run_len {
        table.insert(start + len, run + run_len - start - len)?;
    }
    Ok(())
}

fn insert_free(
    table: &mut redb::Table<'_, u64, u64>,
    start: u64,
    len: u64,
) -> Result<(), redb::Error> {
    let (mut from, mut to) = (start, start + len);
    let before = table.range(..start)?.next_back().transpose()?;
    let before = before.map(|(k, v)| (k.value(), v.value()));
    if let Some((run, run_len)) = before {
        if run + run_len > start {
            return Err(corrupted("freed twice:", start, len));
        }
        if run + run_len == start {
            from = run;
        }
    }
    let after = table
        .range(start..FREE_KNOWN_CHUNK_KEY)?
        .next()
        .transpose()?;
    let after = after.map(|(k, v)| (k.value(), v.value()));
    if let Some((run, run_len)) = after {
        if run < to {
            return Err(corrupted("freed twice:", start, len));
        }
        if run == to {
            to = run + run_len;
            table.remove(run)?;
        }
    }
    table.insert(from, to - from)?;
    Ok(())
}

impl SpaceLog {
    pub(crate) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.allocated.is_empty() && self.freed.is_empty()
    }

    /// Carries the changes over to the table of the durable state.
    pub(crate) fn apply(&self, table: &mut redb::Table<'_, u64, u64>) -> Result<(), redb::Error> {
        for &(start, len) in &self.added {
            insert_free(table, start, len)?;
        }
        for (start, len) in self.allocated.iter() {
            remove_free(table, start, len)?;
        }
        for &(start, len) in &self.freed {
            insert_free(table, start, len)?;
        }
        if let Some(id) = self.known_chunk {
            table.insert(FREE_KNOWN_CHUNK_KEY, u64::from(id))?;
        }
        Ok(())
    }

    /// Adds what the next group did.
    pub(crate) fn append(&mut self, next: SpaceLog) {
        self.added.extend(next.added);
        self.known_chunk = self.known_chunk.max(next.known_chunk);
        for (start, len) in next.allocated.iter() {
            let fresh = self.allocated.insert(start, len);
            debug_assert!(fresh, "a freed block waits for a whole commit");
        }
        self.freed.extend(next.freed);
        self.converted.extend(next.converted);
        self.filled.extend(next.filled);
    }

    /// Blocks that got data which is no older than the group.
    pub(crate) fn written(&self) -> RunSet {
        let mut written = self.allocated.clone();
        for &(start, len) in &self.filled {
            written.insert(start, len);
        }
        written
    }

    /// For the journal, which needs to bring the table of free space to where the group leaves it,
    /// and to know what was written. `None` if there is more than `len_max` bytes then.
    pub(crate) fn encode(&self, out: &mut Vec<u8>, len_max: usize) -> Option<()> {
        let known_chunk = self.known_chunk.unwrap_or(NO_CHUNK);
        out.extend_from_slice(&known_chunk.to_le_bytes());
        let allocated: Vec<_> = self.allocated.iter().collect();
        for runs in [&self.added, &allocated, &self.freed, &self.filled] {
            if out.len() + runs.len() * RUN_LEN > len_max {
                return None;
            }
            out.extend_from_slice(&u32::try_from(runs.len()).ok()?.to_le_bytes());
            for (start, len) in runs {
                out.extend_from_slice(&start.to_le_bytes());
                out.extend_from_slice(&len.to_le_bytes());
            }
        }
        Some(())
    }

    /// What [`SpaceLog::encode`] wrote; `None` if it makes no sense.
    pub(crate) fn decode(from: &mut Reader<'_>) -> Option<Self> {
        let known_chunk = Some(from.u32()?).filter(|&id| id != NO_CHUNK);
        let mut runs = || {
            let mut runs = Vec::new();
            for _ in 0..from.u32()? {
                let (start, len) = (from.u64()?, from.u64()?);
                let end = start.checked_add(len)?;
                if len == 0 || end > BLOCKS_MAX {
                    return None;
                }
                runs.push((start, len));
            }
            Some(runs)
        };
        let (added, allocated, freed, filled) = (runs()?, runs()?, runs()?, runs()?);
        let mut log = SpaceLog {
            added,
            known_chunk,
            freed,
            filled,
            ..SpaceLog::default()
        };
        let fresh = |(start, len)| log.allocated.insert(start, len);
        allocated.into_iter().all(fresh).then_some(log)
    }

    /// Blocks that become usable once the group is durable.
    pub(crate) fn freed(&self) -> &[(u64, u64)] {
        &self.freed
    }

    /// Whether blocks may be written again once the group is durable and its readers are gone.
    pub(crate) fn releases(&self) -> bool {
        !self.freed.is_empty() || !self.converted.is_empty()
    }
}
