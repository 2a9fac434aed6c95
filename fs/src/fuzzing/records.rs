//! Records put into a sound store, whatever they are, to be met by mounts and by fsck.

use std::sync::Arc;

use braidfs_blockdev::Volume;
use braidfs_cache::{Cache, CacheConfig};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::meta::backend::MetaFile;
use crate::meta::records as decoders;

use super::tree::try_everything;
use super::{Input, tree, volume};

pub(super) type Bytes = &'static [u8];

/// The tables of FORMAT.md, in its order; the last one has numbers as keys and values.
pub(super) const NAMES: [&str; 7] = [
    "inodes", "dentries", "cookies", "extents", "xattrs", "orphans", "settings",
];
pub(super) const FREE: TableDefinition<'static, u64, u64> = TableDefinition::new("free");
const RECORDS_MAX: usize = 200;
/// In place of a value's length: the record goes.
const REMOVED: u64 = 0xffff;

struct Record<'a> {
    table: usize,
    key: &'a [u8],
    value: Option<&'a [u8]>,
}

/// Input: records: table, length and bytes of the key, length and bytes of the value.
fn decode(input: &[u8]) -> Vec<Record<'_>> {
    let mut input = Input(input);
    let mut records = Vec::new();
    while !input.is_empty() && records.len() < RECORDS_MAX {
        let table = usize::try_from(input.number(1) % 8).unwrap_or(0);
        let len = usize::try_from(input.number(1)).unwrap_or(0);
        let key = input.bytes(len);
        let len = input.number(2);
        let value = usize::try_from(len % 2048).map(|len| input.bytes(len));
        let value = value.ok().filter(|_| len != REMOVED);
        records.push(Record { table, key, value });
    }
    records
}

pub(super) fn with_database<R>(
    volume: Arc<Volume>,
    work: impl FnOnce(&Database) -> Result<R, redb::Error>,
) -> Result<R, redb::Error> {
    let config = CacheConfig {
        size_bytes: tree::options(false).cache_bytes,
        ..CacheConfig::default()
    };
    let cache = Cache::new(config, Arc::clone(&volume))?;
    let meta = MetaFile::open(Arc::clone(&volume), &cache, false, false)?;
    let database = Database::builder().create_with_backend(meta.storage())?;
    let done = work(&database);
    database.close()?;
    meta.close()?;
    cache.shutdown();
    volume.close().map_err(std::io::Error::other)?;
    done
}

fn put(database: &Database, records: &[Record<'_>]) -> Result<(), redb::Error> {
    let mut write = database.begin_write()?;
    write.set_quick_repair(true);
    for record in records {
        match NAMES.get(record.table) {
            Some(name) => {
                let definition = TableDefinition::<Bytes, Bytes>::new(name);
                let mut table = write.open_table(definition)?;
                match record.value {
                    Some(value) => drop(table.insert(record.key, value)?),
                    None => drop(table.remove(record.key)?),
                }
            }
            None => {
                let mut table = write.open_table(FREE)?;
                let key = Input(record.key).number(8);
                match record.value {
                    Some(value) => drop(table.insert(key, Input(value).number(8))?),
                    None => drop(table.remove(key)?),
                }
            }
        }
    }
    write.commit()?;
    Ok(())
}

pub(super) fn records(input: &[u8]) {
    let records = decode(input);
    for record in &records {
        let (Some(bytes), key) = (record.value, record.key) else {
            continue;
        };
        let _inode = decoders::InodeRecord::decode(1, bytes);
        let _entry = decoders::DentryRecord::decode(bytes);
        let _listed = decoders::decode_cookie_entry(bytes);
        let _extent = decoders::Extent::decode(Input(key).number(8), bytes);
        let _orphan = decoders::Orphan::decode(bytes);
    }
    let devices = volume::single();
    let volume = volume::assemble(&devices, false).expect("a sound volume");
    with_database(volume, |database| put(database, &records)).expect("a sound store");
    try_everything(&devices);
}

fn encode(out: &mut Vec<u8>, table: u8, key: &[u8], value: &[u8]) {
    out.push(table);
    out.push(u8::try_from(key.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(&key[..key.len().min(255)]);
    let len = u16::try_from(value.len().min(2000)).unwrap_or(0);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&value[..usize::from(len)]);
}

/// The records that are there, one input for each table.
pub(super) fn seeds() -> Vec<(String, Vec<u8>)> {
    let volume = volume::assemble(&volume::single(), false).expect("a sound volume");
    let read = |database: &Database| {
        let read = database.begin_read()?;
        let mut seeds = Vec::new();
        for (number, name) in (0..).zip(NAMES) {
            let table = read.open_table(TableDefinition::<Bytes, Bytes>::new(name))?;
            let mut bytes = Vec::new();
            for entry in table.iter()? {
                let (key, value) = entry?;
                encode(&mut bytes, number, key.value(), value.value());
            }
            seeds.push((name.to_owned(), bytes));
        }
        let mut bytes = Vec::new();
        for entry in read.open_table(FREE)?.iter()? {
            let (key, value) = entry?;
            let words = [key.value(), value.value()].map(u64::to_le_bytes);
            encode(&mut bytes, 7, &words[0], &words[1]);
        }
        seeds.push(("free".to_owned(), bytes));
        Ok(seeds)
    };
    with_database(volume, read).expect("a sound store")
}
