//! Labels and chunk tables on the devices: format, update.
//!
//! An update to generation g writes the table to slot g % 2 of every member, flushes all, writes
//! the
//! label to slot g % 2 of every member, flushes all. So a label of generation g on *any* member
//! means
//! that the table of generation g is durable on *every* member, and generation g - 1 is untouched
//! everywhere until the next update. Hence after a cut anywhere in between, members differ by at
//! most one generation, and rolling those that lag forward is right: see [`super::elect`].

use super::transfer::{Devices, flush_all, write_all};
use crate::error::{BlockError, ErrorKind, Op};
use crate::label::{LABEL_LEN, LABEL_OFFSETS, Label, TABLE_OFFSETS, slot_of};
use crate::pages::AlignedBuf;
use crate::table::Table;
use crate::units::{BLOCK_SIZE, dev_len};
use parking_lot::RwLock;

/// What all labels of a volume have in common, and each member's own part, by index.
#[derive(Debug)]
pub(super) struct Identity {
    pub fs_uuid: [u8; 16],
    /// What the user calls the file system. Changes under the lock of what is durable.
    pub text: RwLock<String>,
    pub stripe_unit_bytes: u32,
    pub ro_compat: u64,
    pub incompat: u64,
    pub device_uuids: Vec<[u8; 16]>,
    pub sizes: Vec<u64>,
}

impl Identity {
    fn device_count(&self) -> u16 {
        u16::try_from(self.sizes.len()).expect("bounded by DEVICES_MAX")
    }

    fn label(&self, dev: usize, state: &State) -> Label {
        Label {
            generation: state.generation,
            ro_compat: self.ro_compat,
            incompat: self.incompat,
            fs_uuid: self.fs_uuid,
            device_uuid: self.device_uuids[dev],
            device_index: u16::try_from(dev).expect("bounded by DEVICES_MAX"),
            device_count: self.device_count(),
            stripe_unit_bytes: self.stripe_unit_bytes,
            size_bytes: self.sizes[dev],
            is_clean: state.is_clean,
            table_len: u32::try_from(state.table_bytes.len()).expect("bounded by TABLE_LEN_MAX"),
            table_crc: state.table_crc,
            text: self.text.read().clone(),
        }
    }

    /// Writes a generation to members, `tables` and `labels` (all of them but for a repair).
    pub(super) fn write(
        &self,
        devices: &Devices,
        state: &State,
        tables: &[usize],
        labels: &[usize],
    ) -> Result<(), BlockError> {
        let slot = slot_of(state.generation);
        let table = |&dev: &usize| {
            (
                dev,
                TABLE_OFFSETS[slot],
                AlignedBuf::from_slice(&state.table_bytes),
            )
        };
        write_all(devices, tables.iter().map(table).collect())?;
        flush_all(devices)?;
        let label = |&dev: &usize| {
            let block = self.label(dev, state).encode(slot);
            (dev, LABEL_OFFSETS[slot], AlignedBuf::from_slice(&block))
        };
        write_all(devices, labels.iter().map(label).collect())?;
        flush_all(devices)
    }

    /// Makes `table` the one in force, durably on all members.
    pub(super) fn update(
        &self,
        devices: &Devices,
        table: &Table,
        generation: u64,
        is_clean: bool,
    ) -> Result<(), BlockError> {
        let all: Vec<usize> = (0..devices.len()).collect();
        self.write(
            devices,
            &State::new(self, table, generation, is_clean),
            &all,
            &all,
        )
    }

    /// First write to new members: removes what was there, then two updates, so that both copies
    /// are whole. Returns the generation.
    pub(super) fn format(&self, devices: &Devices, table: &Table) -> Result<u64, BlockError> {
        /// Both label areas, and at the end the backup structures of other formats.
        const WIPED: usize = 1 << 20;
        let wipe = |dev: usize| {
            let end = self.sizes[dev] - dev_len(WIPED);
            [0, end].map(|offset| (dev, offset, AlignedBuf::zeroed(WIPED)))
        };
        write_all(devices, (0..devices.len()).flat_map(wipe).collect())?;
        flush_all(devices)?;
        for generation in [1, 2] {
            self.update(devices, table, generation, false)?;
        }
        Ok(2)
    }
}

/// One generation, encoded.
pub(super) struct State {
    generation: u64,
    is_clean: bool,
    table_bytes: Vec<u8>,
    table_crc: u32,
}

impl State {
    pub(super) fn new(
        identity: &Identity,
        table: &Table,
        generation: u64,
        is_clean: bool,
    ) -> State {
        let devices = identity.device_count();
        let (table_bytes, table_crc) = table.encode(&identity.fs_uuid, generation, devices);
        State {
            generation,
            is_clean,
            table_bytes,
            table_crc,
        }
    }
}

/// A random UUID (version 4).
pub(super) fn new_uuid() -> Result<[u8; 16], BlockError> {
    use std::io::Read;
    let mut uuid = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut from| from.read_exact(&mut uuid));
    read.map_err(|error| BlockError {
        kind: ErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO)),
        op: Op::Read,
        dev: BlockError::NO_DEVICE,
        at: 0,
    })?;
    uuid[6] = (uuid[6] & 0x0f) | 0x40;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    Ok(uuid)
}

const _: () = assert!((LABEL_LEN as u64).is_multiple_of(BLOCK_SIZE));
