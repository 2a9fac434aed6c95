//! A record of the journal, as its bytes come from the devices, to be met by mounts and by fsck.

use std::sync::OnceLock;

use redb::{ReadableDatabase, ReadableTable, TableDefinition};

use crate::meta::journal::{Journal, RECORD_BYTES_MAX, Record, encode, named_base};

use super::records::{Bytes, FREE, NAMES, with_database};
use super::tree::try_everything;
use super::volume;

/// The base of the journal of [`volume::single`].
fn base() -> u64 {
    static BASE: OnceLock<u64> = OnceLock::new();
    *BASE.get_or_init(|| {
        let volume = volume::assemble(&volume::single(), false).expect("a sound volume");
        with_database(volume, named_base).expect("a sound store")
    })
}

/// Input: the payload of a record.
pub(super) fn journal(input: &[u8]) {
    let devices = volume::single();
    let volume = volume::assemble(&devices, false).expect("a sound volume");
    let payload = &input[..input.len().min(RECORD_BYTES_MAX)];
    let journal = Journal::new(volume.clone(), base());
    journal.append(payload).expect("a sound device");
    volume.close().expect("a sound device");
    try_everything(&devices);
}

/// The rows that are there, one input for each table, which change nothing; and a chunk, all of it
/// free, that is not there or is there already.
pub(super) fn seeds() -> Vec<(String, Vec<u8>)> {
    let volume = volume::assemble(&volume::single(), false).expect("a sound volume");
    let read = |database: &redb::Database| {
        let read = database.begin_read()?;
        let mut seeds = Vec::new();
        for (number, name) in NAMES.into_iter().enumerate() {
            let mut record = Record::default();
            let table = read.open_table(TableDefinition::<Bytes, Bytes>::new(name))?;
            for entry in table.iter()? {
                let (key, value) = entry?;
                let (key, value) = (key.value().to_vec(), value.value().to_vec());
                record.changes[number].insert(key, Some(value));
            }
            let bytes = encode(&record.changes, &record.space);
            seeds.extend(bytes.map(|bytes| (name.to_owned(), bytes)));
        }
        let mut free = 0u32.to_le_bytes().to_vec();
        free.extend_from_slice(&7u32.to_le_bytes());
        if let Some(entry) = read.open_table(FREE)?.iter()?.next() {
            let (start, len) = entry?;
            free.extend_from_slice(&1u32.to_le_bytes());
            free.extend_from_slice(&start.value().to_le_bytes());
            free.extend_from_slice(&len.value().to_le_bytes());
            free.resize(free.len() + 12, 0);
            seeds.push(("free".to_owned(), free));
        }
        Ok(seeds)
    };
    with_database(volume, read).expect("a sound store")
}
