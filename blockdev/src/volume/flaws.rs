//! Looking at every copy of label and chunk table on every member, for a check.
//!
//! What a power cut leaves is no flaw. A label's content fits one sector, so a label that a power
//! cut interrupted is the old one or the new one, each whole. A chunk table that is longer than a
//! sector may be torn, in the slot that is not in force. Everything else was damaged otherwise.

use super::Volume;
use super::elect::{read_labels, read_tables};
use crate::label::{LABEL_OFFSETS, Label, TABLE_OFFSETS, slot_of};
use crate::table::TableError;
use serde::Serialize;

/// The longest piece that a power cut writes whole or not at all.
const SECTOR: usize = 512;

/// A copy of a label or chunk table that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LabelFlaw {
    /// The device's name.
    pub device: String,
    /// Where the copy lies on it, in bytes.
    pub offset: u64,
    /// What is wrong, in words that continue the device's name.
    pub message: String,
}

impl Volume {
    /// Reads all copies of labels and tables, and names those that are damaged. Taking the volume
    /// for writing and closing it writes all of them again.
    pub fn label_flaws(&self) -> Vec<LabelFlaw> {
        let durable = self.durable.lock();
        let generation = durable.generation;
        let mut flaws = Vec::new();
        let mut add = |dev: usize, offset: u64, message: String| {
            flaws.push(LabelFlaw {
                device: self.devices[dev].name().to_owned(),
                offset,
                message,
            });
        };
        for (dev, copies) in read_labels(&self.devices).into_iter().enumerate() {
            for (copy, offset) in copies.into_iter().zip(LABEL_OFFSETS) {
                match copy {
                    Err(error) => add(dev, offset, error.to_string()),
                    Ok(label) if !self.is_ours(dev, &label) => {
                        add(dev, offset, "label is another device's".to_owned());
                    }
                    Ok(_) => {}
                }
            }
        }
        let uuid = &self.identity.fs_uuid;
        let tables =
            |generation| read_tables(&self.devices, uuid, generation, &self.identity.sizes);
        let offset = TABLE_OFFSETS[slot_of(generation)];
        for (dev, table) in tables(generation).into_iter().enumerate() {
            if let Err(error) = table {
                add(dev, offset, error.to_string());
            }
        }
        if durable.table.encoded_len() > SECTOR || generation < 2 {
            return flaws;
        }
        let offset = TABLE_OFFSETS[slot_of(generation + 1)];
        let (former, next) = (tables(generation - 1), tables(generation + 1));
        for (dev, (former, next)) in former.into_iter().zip(next).enumerate() {
            if let (Err(error), Err(other)) = (former, next) {
                // Of two that do not fit, the one that tells more.
                let error = if error == TableError::Foreign {
                    other
                } else {
                    error
                };
                add(dev, offset, error.to_string());
            }
        }
        flaws
    }

    fn is_ours(&self, dev: usize, label: &Label) -> bool {
        (label.fs_uuid, label.device_uuid)
            == (self.identity.fs_uuid, self.identity.device_uuids[dev])
            && usize::from(label.device_index) == dev
    }
}
