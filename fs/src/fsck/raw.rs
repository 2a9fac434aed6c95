//! Raw records, for tests: reading and damaging what a volume holds, by the bytes of FORMAT.md.
#![doc(hidden)]

use std::sync::Arc;

use braidfs_blockdev::Volume;

use super::progress::FsckError;
use super::session::Session;
use crate::MountError;
use crate::meta::offline::TableChanges;
use crate::meta::store::Table;

/// A table by its name in FORMAT.md; `free` has keys and values of 8 bytes, little endian.
pub type Name = &'static str;

/// A record: table, key, value (`None`: there shall be none).
pub type Record = (Name, Vec<u8>, Option<Vec<u8>>);

const TABLES: [(Name, Table); 7] = [
    ("inodes", Table::Inodes),
    ("dentries", Table::Dentries),
    ("cookies", Table::Cookies),
    ("extents", Table::Extents),
    ("xattrs", Table::Xattrs),
    ("orphans", Table::Orphans),
    ("settings", Table::Settings),
];

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
}

/// All records of all tables, in order.
pub fn read(volume: Arc<Volume>) -> Result<Vec<Record>, MountError> {
    let session = Session::open(volume)?;
    let mut records = Vec::new();
    let read = session.store()?.reader()?;
    for (name, table) in TABLES {
        read.scan::<redb::Error>(table, &[], &[], &mut |key, value| {
            records.push((name, key.to_vec(), Some(value.to_vec())));
            Ok(())
        })?;
    }
    read.scan_free::<redb::Error>(&mut |start, len| {
        let (key, value) = (start.to_le_bytes(), len.to_le_bytes());
        records.push(("free", key.to_vec(), Some(value.to_vec())));
        Ok(())
    })?;
    drop(read);
    session.close()?;
    Ok(records)
}

/// Sets and removes records, whatever that makes of the volume.
pub fn write(volume: Arc<Volume>, records: &[Record]) -> Result<(), FsckError> {
    let session = Session::open(volume)?;
    let mut changes = TableChanges::default();
    for (name, key, value) in records {
        if let Some((_, table)) = TABLES.iter().find(|(known, _)| known == name) {
            changes[*table as usize].insert(key.clone(), value.clone());
        }
    }
    let of_free = |record: &&Record| record.0 == "free";
    let free: Vec<Record> = records.iter().filter(of_free).cloned().collect();
    session
        .store()?
        .mend(&session.volume, None, changes, move |table| {
            for (_, key, value) in &free {
                match value {
                    Some(value) => drop(table.insert(number(key), number(value))?),
                    None => drop(table.remove(number(key))?),
                }
            }
            Ok(())
        })?;
    Ok(session.close()?)
}
