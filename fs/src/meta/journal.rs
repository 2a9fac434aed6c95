//! The journal: transaction groups that are durable before redb has them.
//!
//! A small group is written as one *record*: its table changes and what it did to the free space.
//! Then one flush makes it durable, with its data, which had been written before. redb gets it with
//! the next whole commit, which also gives the journal a new *base*: records of another base are
//! void, and the next one is written to the first block again. So a record counts if it and all
//! before it are whole and of the base that redb names in the setting `journal`.
//!
//! Whoever opens the store replays what counts, in one redb transaction, before anything else looks
//! at the tables. A read-only mount and a check do so in memory.
//!
//! The record that was being written when the power failed may be there whole while data of it is
//! not, since both wait for the same flush. So the data of the last record is read and compared
//! with the checksums in its extents; if it is not there, that record is void: nobody was told that
//! it is durable. An earlier one was flushed before the next was begun. Hence a block that makes no
//! sense and has a later record behind it is damage, and an error.
//!
//! Each block of the journal is written twice (see `read_journal` of the volume), with a seal of
//! its own. FORMAT.md has the layout.

use std::sync::Arc;

use braidfs_blockdev::{
    BLOCK_SIZE, BlockError, Completion, InDoubt, JournalCopies, VolBlock, Volume,
};
use parking_lot::Mutex;
use redb::{Database, Durability, ReadableDatabase};

use crate::alloc::{RunSet, SpaceLog};
use crate::latch::{Failed, Latch};

use super::contain::Contained;
use super::records::{Extent, SETTING_JOURNAL, decode_u64, key_u64};
use super::store::{Changes, DEFINITIONS, FREE, TABLE_COUNT, Table, write_changes};

const MAGIC: [u8; 8] = *b"BRAIDJNL";
const BLOCK_LEN: usize = BLOCK_SIZE as usize;
/// Magic (8), CRC32C of the block with this field zero (4), bytes of payload (4), UUID of the file
/// system (16), base (8), number of this block (8), first block of the record (8), blocks of the
/// record (4), zero (4).
const HEADER_LEN: usize = 64;
const CRC_AT: usize = 8;
const PAYLOAD_MAX: usize = BLOCK_LEN - HEADER_LEN;
/// A larger record is not worth it: a whole commit writes little more.
const RECORD_BLOCKS_MAX: usize = 8;
/// The most bytes of a record.
pub(crate) const RECORD_BYTES_MAX: usize = RECORD_BLOCKS_MAX * PAYLOAD_MAX;
/// Stands for the length of a value where the key is removed.
const REMOVED: u32 = u32::MAX;
/// Commits take one base after the other; no volume comes to this one, and what names a higher one
/// was made up.
const BASE_MAX: u64 = 1 << 62;
/// As many blocks of data are read at a time.
const CHECK_BLOCKS_MAX: u64 = 256;

/// A transaction group, as a record has it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub changes: [Changes; TABLE_COUNT],
    pub space: SpaceLog,
}

/// The bytes of a record; `None` if they are too many for one.
pub(crate) fn encode(changes: &[Changes; TABLE_COUNT], space: &SpaceLog) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(PAYLOAD_MAX);
    let count: usize = changes.iter().map(Changes::len).sum();
    out.extend_from_slice(&u32::try_from(count).ok()?.to_le_bytes());
    for (table, changes) in (0u8..).zip(changes) {
        for (key, value) in changes {
            if out.len() > RECORD_BYTES_MAX {
                return None;
            }
            out.push(table);
            out.extend_from_slice(&u16::try_from(key.len()).ok()?.to_le_bytes());
            let len = value.as_ref().map_or(Some(REMOVED), |value| {
                u32::try_from(value.len()).ok().filter(|&len| len < REMOVED)
            });
            out.extend_from_slice(&len?.to_le_bytes());
            out.extend_from_slice(key);
            out.extend_from_slice(value.as_deref().unwrap_or_default());
        }
    }
    space.encode(&mut out, RECORD_BYTES_MAX)?;
    (out.len() <= RECORD_BYTES_MAX).then_some(out)
}

/// Takes bytes off the front.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.bytes(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.bytes(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.bytes(2)?.try_into().ok().map(u16::from_le_bytes)
    }
}

/// The way in from the devices.
pub(crate) fn decode(bytes: &[u8]) -> Option<Record> {
    let mut from = Reader(bytes);
    let mut record = Record::default();
    for _ in 0..from.u32()? {
        let table = usize::from(*from.bytes(1)?.first()?);
        let key_len = usize::from(from.u16()?);
        let value_len = from.u32()?;
        let key = from.bytes(key_len)?.to_vec();
        let value = match value_len {
            REMOVED => None,
            len => Some(from.bytes(usize::try_from(len).ok()?)?.to_vec()),
        };
        record.changes.get_mut(table)?.insert(key, value);
    }
    record.space = SpaceLog::decode(&mut from)?;
    from.0.is_empty().then_some(record)
}

/// A block of the journal.
struct Block<'a> {
    base: u64,
    at: u64,
    first: u64,
    count: u64,
    payload: &'a [u8],
}

fn seal(block: &Block<'_>, uuid: &[u8; 16], out: &mut Vec<u8>) {
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[0; 4]);
    let len = u32::try_from(block.payload.len()).expect("fits a block");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(uuid);
    out.extend_from_slice(&block.base.to_le_bytes());
    out.extend_from_slice(&block.at.to_le_bytes());
    out.extend_from_slice(&block.first.to_le_bytes());
    let count = u32::try_from(block.count).expect("fits the journal");
    out.extend_from_slice(&count.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(block.payload);
    out.resize(start + BLOCK_LEN, 0);
    let crc = crc32c::crc32c(&out[start..]).to_le_bytes();
    out[start + CRC_AT..start + CRC_AT + 4].copy_from_slice(&crc);
}

/// What a copy says; `None` if it is none of this journal's blocks, or damaged.
fn unseal<'a>(raw: &'a [u8], uuid: &[u8; 16], at: u64) -> Option<Block<'a>> {
    let mut from = Reader(raw);
    if from.bytes(8)? != MAGIC {
        return None;
    }
    let stored = from.u32()?;
    let crc = crc32c::crc32c(&raw[..CRC_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    if crc32c::crc32c_append(crc, &raw[CRC_AT + 4..]) != stored {
        return None;
    }
    let len = usize::try_from(from.u32()?).ok()?;
    if from.bytes(16)? != uuid {
        return None;
    }
    let (base, home, first) = (from.u64()?, from.u64()?, from.u64()?);
    let (count, zero) = (u64::from(from.u32()?), from.u32()?);
    let block = Block {
        base,
        at,
        first,
        count,
        payload: from.bytes(len)?,
    };
    let last = first.checked_add(count)?;
    let is_sound = home == at && (first..last).contains(&at) && zero == 0 && base <= BASE_MAX;
    is_sound.then_some(block)
}

/// Where the next record goes.
struct Position {
    base: u64,
    next: u64,
    /// Writes that a device did not answer, and may still carry out.
    in_doubt: Vec<InDoubt>,
}

/// The journal of a volume that is mounted for writing. Only commits use it.
pub(crate) struct Journal {
    volume: Arc<Volume>,
    position: Mutex<Position>,
}

impl Journal {
    /// The journal behind the durable state that names `base`.
    pub(crate) fn new(volume: Arc<Volume>, base: u64) -> Self {
        let position = Position {
            base,
            next: 0,
            in_doubt: Vec::new(),
        };
        Self {
            volume,
            position: Mutex::new(position),
        }
    }

    /// What a whole commit names as the base of what follows.
    pub(crate) fn next_base(&self) -> u64 {
        self.position.lock().base + 1
    }

    /// A whole commit named `base`: what was there is void.
    pub(crate) fn restart(&self, base: u64) {
        let mut position = self.position.lock();
        (position.base, position.next) = (base, 0);
    }

    /// Writes a record and makes it durable, with all that was written before. False, and nothing
    /// is written, if it has no room.
    pub(crate) fn append(&self, record: &[u8]) -> Result<bool, BlockError> {
        let mut position = self.position.lock();
        position.in_doubt.retain(|in_doubt| !in_doubt.is_over());
        let (base, first) = (position.base, position.next);
        let count = record.len().div_ceil(PAYLOAD_MAX) as u64;
        if first + count > self.volume.journal_blocks() || !position.in_doubt.is_empty() {
            return Ok(false);
        }
        let uuid = self.volume.fs_uuid();
        let mut blocks = Vec::with_capacity(RECORD_BLOCKS_MAX * BLOCK_LEN);
        for (at, payload) in (first..).zip(record.chunks(PAYLOAD_MAX)) {
            let block = Block {
                base,
                at,
                first,
                count,
                payload,
            };
            seal(&block, &uuid, &mut blocks);
        }
        // A write that failed may be there all the same, so its place is used.
        position.next += count;
        let writes = Volume::journal_writes(blocks.len() / BLOCK_LEN);
        let latch = Arc::new(Latch::new(writes));
        self.volume.write_journal(first, &blocks, || {
            let ended = Arc::clone(&latch);
            Box::new(move |done: Completion| ended.end(done))
        });
        if let Err(Failed { error, in_doubt }) = latch.wait() {
            position.in_doubt.extend(in_doubt);
            return Err(error);
        }
        self.volume.flush_wait()?;
        Ok(true)
    }
}

/// What the journal holds.
#[derive(Debug, Default)]
struct Found {
    records: Vec<Record>,
    /// The highest base of any block.
    base_max: Option<u64>,
    /// Why what follows cannot be told.
    damage: Option<String>,
}

/// Reads the records that count behind `base`; whether the data of the last one is there remains to
/// be seen.
fn read(copies: &JournalCopies, volume: &Volume, base: u64) -> Found {
    let uuid = volume.fs_uuid();
    let mut found = Found::default();
    let mut lost = Vec::new();
    // By place; of blocks of this base one is as good as the other.
    let blocks: Vec<Option<Block<'_>>> = (0..copies.blocks())
        .map(|at| {
            let read: Vec<_> = copies.copies(at).filter_map(Result::ok).collect();
            if read.is_empty() {
                lost.push(at);
            }
            let sound = read.into_iter().filter_map(|raw| unseal(raw, &uuid, at));
            let sound = sound.inspect(|block| {
                found.base_max = found.base_max.max(Some(block.base));
            });
            // All are looked at.
            let sound: Vec<_> = sound.collect();
            sound.into_iter().find(|block| block.base == base)
        })
        .collect();
    let mut at = 0;
    while at < copies.blocks() {
        let count = blocks[usize_of(at)].as_ref().map_or(1, |block| block.count);
        let end = (at + count).min(copies.blocks());
        let parts: Option<Vec<&Block<'_>>> = blocks[usize_of(at)..usize_of(end)]
            .iter()
            .map(|block| {
                let block = block.as_ref();
                block.filter(|block| block.first == at && block.count == count)
            })
            .collect();
        let Some(parts) = parts.filter(|parts| parts.len() as u64 == count) else {
            let is_later = |block: &Block<'_>| block.first > at;
            if blocks.iter().flatten().any(is_later) {
                found.damage = Some("is damaged in both copies".to_owned());
            } else if lost.iter().any(|place| (at..end).contains(place)) {
                found.damage = Some("cannot be read in any copy".to_owned());
            }
            break;
        };
        let bytes: Vec<u8> = parts
            .iter()
            .flat_map(|block| block.payload)
            .copied()
            .collect();
        let Some(record) = decode(&bytes) else {
            found.damage = Some("makes no sense".to_owned());
            break;
        };
        found.records.push(record);
        at = end;
    }
    found.damage = found.damage.map(|what| {
        format!(
            "block {at} of the journal {what} ({}), so what was synced last cannot be told; run \
             'braidfs fsck'",
            volume.journal_places(at)
        )
    });
    found
}

fn usize_of(at: u64) -> usize {
    usize::try_from(at).expect("a journal fits in memory")
}

/// Whether the data that a group wrote is there. What cannot be read is taken for there: whoever
/// reads it will be told.
fn has_its_data(record: &Record, volume: &Volume) -> bool {
    let written: RunSet = record.space.written();
    let extents = &record.changes[Table::Extents as usize];
    extents.iter().all(|(key, value)| {
        let extent = key_u64(key, 8).zip(value.as_deref());
        let extent = extent.and_then(|(start, value)| Extent::decode(start, value));
        extent.is_none_or(|extent| extent.unwritten() || is_there(&extent, &written, volume))
    })
}

fn is_there(extent: &Extent, written: &RunSet, volume: &Volume) -> bool {
    let mut at = 0;
    while at < extent.len {
        let count = (extent.len - at).min(CHECK_BLOCKS_MAX);
        let block = extent.block + at;
        if written.overlaps(block, count) {
            let buf = braidfs_blockdev::AlignedBuf::zeroed(usize_of(count) * BLOCK_LEN);
            let Ok(buf) = volume.read_wait(VolBlock(block), buf, None) else {
                return true;
            };
            let crcs = &extent.crcs[usize_of(at)..usize_of(at + count)];
            let blocks = buf.chunks_exact(BLOCK_LEN).zip(crcs).zip(block..);
            for ((data, &crc), block) in blocks {
                if written.overlaps(block, 1) && crc32c::crc32c(data) != crc {
                    return false;
                }
            }
        }
        at += count;
    }
    true
}

/// What came of a replay.
#[derive(Debug, Default)]
pub(crate) struct Replayed {
    /// The base of what follows.
    pub base: u64,
    /// Why what follows in the journal is lost.
    pub damage: Option<String>,
}

/// Gives redb what the journal holds. Damage of the journal is an error, or, if `leniently`, what
/// it hides is dropped. Redb is not written if the journal holds nothing.
pub(super) fn replay(
    db: &Contained,
    volume: &Arc<Volume>,
    leniently: bool,
) -> Result<Replayed, redb::Error> {
    let base = db.run(named_base)?;
    let copies = volume.read_journal();
    let mut found = read(&copies, volume, base);
    if let Some(damage) = found.damage.take_if(|_| !leniently) {
        return Err(redb::Error::Corrupted(damage));
    }
    if found.damage.is_none() {
        let is_void = |record: &Record| !has_its_data(record, volume);
        if found.records.last().is_some_and(is_void) {
            log::warn!(
                "journal: the last record came without all of its data, so it does not count: the \
                 power failed before it was flushed, or a device lost a write"
            );
            found.records.pop();
        }
    }
    let (groups, damage) = (found.records, found.damage);
    let Some(used) = found.base_max.filter(|&used| used >= base) else {
        return Ok(Replayed { base, damage });
    };
    let (base, records) = (used + 1, groups.len());
    db.run(move |db| {
        let mut write = db.begin_write()?;
        write.set_durability(Durability::Immediate)?;
        write.set_quick_repair(true);
        for group in &groups {
            write_changes(&write, &group.changes)?;
            group.space.apply(&mut write.open_table(FREE)?)?;
        }
        name_base(&write, base)?;
        Ok(write.commit()?)
    })?;
    log::info!("journal: replayed {records} transaction groups");
    Ok(Replayed { base, damage })
}

/// The base that the durable state names.
pub(crate) fn named_base(db: &Database) -> Result<u64, redb::Error> {
    let settings = DEFINITIONS[Table::Settings as usize];
    let settings = db.begin_read()?.open_table(settings)?;
    let value = settings.get(SETTING_JOURNAL)?;
    Ok(value
        .and_then(|value| decode_u64(value.value()))
        .filter(|&base| base <= BASE_MAX)
        .unwrap_or(0))
}

/// A base that no block of the journal has.
pub(super) fn unused_base(volume: &Volume) -> u64 {
    let found = read(&volume.read_journal(), volume, 0);
    found.base_max.map_or(0, |base_max| base_max + 1)
}

/// Names the base of what follows a commit.
pub(super) fn name_base(write: &redb::WriteTransaction, base: u64) -> Result<(), redb::Error> {
    let mut settings = write.open_table(DEFINITIONS[Table::Settings as usize])?;
    settings.insert(SETTING_JOURNAL, base.to_le_bytes().as_slice())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::{assemble, options, single};
    use crate::{Cred, FileSystem, ROOT_INO};

    /// No base could follow it.
    #[test]
    fn the_highest_number_is_no_base() {
        let devices = single();
        let volume = assemble(&devices, false).expect("a sound volume");
        let record = encode(&Default::default(), &SpaceLog::default()).expect("a small record");
        let crafted = Journal::new(Arc::clone(&volume), u64::MAX);
        crafted.append(&record).expect("a sound device");
        volume.close().expect("a sound device");
        let volume = assemble(&devices, false).expect("a sound volume");
        let fs = FileSystem::mount(volume, options(false)).expect("mount");
        let cred = Cred {
            uid: 0,
            gid: 0,
            umask: 0,
            pid: 1,
            capable_immutable: false,
        };
        fs.mkdir(ROOT_INO, b"folder", 0o755, &cred).expect("mkdir");
        fs.sync().expect("a commit");
        fs.unmount().expect("unmount");
    }
}
