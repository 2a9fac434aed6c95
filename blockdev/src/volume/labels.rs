//! Verifying the labels and chunk tables of all members, both copies of each.
//!
//! The copies of the generation in force are known, and written again as they were. What the other
//! copies held is not needed any more: a new generation takes their place.

use super::elect::{read_labels, read_tables};
use super::store::State;
use super::{Durable, Volume};
use crate::error::BlockError;
use crate::label::{LABEL_LEN, LABEL_OFFSETS, TABLE_LEN_MAX, TABLE_OFFSETS, slot_of};
use crate::table::{Table, TableError};
use crate::units::dev_len;
use std::fmt;

/// A copy of a label or of a chunk table that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelFault {
    /// Index of the member.
    pub dev: u16,
    /// Where the copy lies on it, in bytes.
    pub offset: u64,
    /// It is a chunk table, not a label.
    pub is_table: bool,
    /// The generation that is to be there.
    pub generation: u64,
    /// What was seen.
    pub why: String,
}

impl fmt::Display for LabelFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_table {
            "chunk table"
        } else {
            "label"
        };
        write!(f, "{what} of generation {}: {}", self.generation, self.why)
    }
}

impl Volume {
    /// Bytes that [`Volume::check_labels`] reads.
    pub fn label_bytes(&self) -> u64 {
        let member = 2 * dev_len(LABEL_LEN + TABLE_LEN_MAX);
        dev_len(self.devices.len()) * member
    }

    /// Reads both copies of label and chunk table on every member; returns those that are damaged
    /// or of another generation. Waits for a change of them that is under way.
    pub fn check_labels(&self) -> Vec<LabelFault> {
        self.faults(&self.durable.lock())
    }

    /// After a power cut, until the volume is written to, members may lag; a label fits a sector,
    /// so that a copy of it is whole all the same. A chunk table not in force may be what a mount
    /// that was cut off began to write, even after a clean end: see
    /// [`Volume::spare_table_fault`].
    pub(super) fn faults(&self, durable: &Durable) -> Vec<LabelFault> {
        let (identity, devices) = (&self.identity, &self.devices);
        let is_settled = self.was_clean || !self.is_read_only();
        let labels = read_labels(devices);
        let mut faults = Vec::new();
        for generation in [durable.generation, durable.generation.saturating_sub(1)] {
            let in_force = generation == durable.generation;
            let slot = slot_of(generation);
            let tables = read_tables(devices, &identity.fs_uuid, generation, &identity.sizes);
            let later = (!in_force && self.is_read_only()).then(|| {
                let next = durable.generation + 1;
                read_tables(devices, &identity.fs_uuid, next, &identity.sizes)
            });
            for (index, (labels, table)) in labels.iter().zip(tables).enumerate() {
                let dev = u16::try_from(index).unwrap_or(BlockError::NO_DEVICE);
                let mut fault = |is_table: bool, why: String| {
                    let offset = match is_table {
                        true => TABLE_OFFSETS[slot],
                        false => LABEL_OFFSETS[slot],
                    };
                    faults.push(LabelFault {
                        dev,
                        offset,
                        is_table,
                        generation,
                        why,
                    });
                };
                let crc = table.as_ref().map(|(_, crc)| *crc).ok();
                if let Err(error) = table {
                    let error = match &later {
                        Some(later) => self.spare_table_fault(durable, error, &later[index]),
                        None => Some(error),
                    };
                    if let Some(error) = error {
                        fault(true, error.to_string());
                    }
                }
                match &labels[slot] {
                    Err(error) => fault(false, error.to_string()),
                    Ok(label) if label.generation != generation && is_settled => {
                        fault(false, format!("has generation {}", label.generation));
                    }
                    Ok(label)
                        if label.fs_uuid != identity.fs_uuid
                            || label.device_uuid != identity.device_uuids[index] =>
                    {
                        fault(false, "is another device's".to_owned());
                    }
                    Ok(label) if is_settled && crc.is_some_and(|crc| label.table_crc != crc) => {
                        fault(false, "names another chunk table".to_owned());
                    }
                    Ok(_) => {}
                }
            }
        }
        faults
    }

    /// What to say of a chunk table that is not in force on a volume that is not being written,
    /// where it is not that of the former generation. It may be that of the next one, or be torn
    /// where that is longer than a sector; a damaged one shows as neither.
    fn spare_table_fault(
        &self,
        durable: &Durable,
        former: TableError,
        next: &Result<(Table, u32), TableError>,
    ) -> Option<TableError> {
        let is_short = durable
            .table
            .is_in_one_sector_with_another_chunk(self.devices.len());
        match next {
            Err(error) if durable.generation > 1 && is_short => {
                // Of two that do not fit, the one that tells more.
                Some(match former {
                    TableError::Foreign => *error,
                    former => former,
                })
            }
            _ => None,
        }
    }

    /// The copies that [`Volume::make_writable`] found bad and wrote again.
    pub fn mended_labels(&self) -> Vec<LabelFault> {
        self.mended_labels.lock().clone()
    }

    /// Writes the copies again that [`Volume::check_labels`] complains about; returns what it
    /// complains about afterwards. Does nothing to a read-only volume.
    pub fn mend_labels(&self) -> Result<Vec<LabelFault>, BlockError> {
        let mut durable = self.durable.lock();
        let faults = self.faults(&durable);
        if faults.is_empty() || self.is_read_only() {
            return Ok(faults);
        }
        if let Some(error) = durable.failed {
            return Err(error);
        }
        for fault in &faults {
            let name = self.devices[usize::from(fault.dev)].name();
            log::warn!("{name} at byte {}: {fault}; written again", fault.offset);
        }
        let generation = durable.generation;
        let of = |is_table: bool| -> Vec<usize> {
            let now = faults.iter().filter(|fault| fault.generation == generation);
            let now = now.filter(|fault| fault.is_table == is_table);
            now.map(|fault| usize::from(fault.dev)).collect()
        };
        let (tables, labels) = (of(true), of(false));
        if !tables.is_empty() || !labels.is_empty() {
            let state = State::new(&self.identity, &durable.table, generation, false);
            self.identity
                .write(&self.devices, &state, &tables, &labels)?;
        }
        if faults.iter().any(|fault| fault.generation != generation) {
            let table = durable.table.clone();
            self.update(&mut durable, table, false)?;
        }
        Ok(self.faults(&durable))
    }
}
