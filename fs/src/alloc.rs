//! Free space of the volume: reservation, allocation, and giving back after commit.
//!
//! A write *reserves* its blocks before it dirties pages, so that the volume being full is the
//! writer's error and never a later surprise. Writeback *allocates* against the reservation.
//! Blocks that a transaction group frees are *pending* until the group is durable: until then a
//! crash would bring their old owner back.
//!
//! The map in memory says what may be handed out now; the table on disk says what is free in the
//! durable state. A [`SpaceLog`] carries the difference that one group makes from the first to
//! the second, so the commit needs no copy of the map.
//!
//! Accounting, in blocks, all under one lock: `free` is handed out or reserved and never lent
//! twice, `reserved <= free` always.
//!
//! The *float* is a number of free blocks that only rewriting may reserve: pages whose file block
//! is mapped already, be it with data or set aside. What such a page takes comes back: at once when
//! it is written in place to a block that was set aside, at the next commit when it replaces an
//! older block, and when it is dropped. So `free - reserved + pages being rewritten + pending` does
//! not go below the float, after a commit all of it is there again, and a rewrite on a full volume
//! succeeds, if need be after a commit. New blocks of files never touch it.
//!
//! What a device failed to write, or may still write, is kept back, see [`parked`].
//!
//! A block with data that was turned into one set aside (ZERO_RANGE) is still named as data by the
//! durable state. It is *converted* until that changes, and not written in place so long.

mod parked;
mod space_log;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use braidfs_blockdev::{BLOCK_SIZE, Chunk, ChunkKind, InDoubt, Volume, VolumeErrorKind};
use parking_lot::{Condvar, Mutex};

use crate::Errno;
use parked::Parked;

use space_log::corrupted;
pub(crate) use space_log::{FREE_KNOWN_CHUNK_KEY, SpaceLog};

/// Runs of blocks: start -> length, disjoint, never adjacent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RunSet {
    runs: BTreeMap<u64, u64>,
    /// (length, start) of each run.
    by_len: BTreeSet<(u64, u64)>,
    blocks: u64,
}

impl RunSet {
    fn add_run(&mut self, start: u64, len: u64) {
        self.runs.insert(start, len);
        self.by_len.insert((len, start));
    }

    fn remove_run(&mut self, start: u64, len: u64) {
        self.runs.remove(&start);
        self.by_len.remove(&(len, start));
    }

    /// The longest run: start and length.
    fn longest(&self) -> Option<(u64, u64)> {
        self.by_len.last().map(|&(len, start)| (start, len))
    }

    /// Adds a run that overlaps none; joins it with its neighbours. Returns false, and changes
    /// nothing, if it does overlap.
    pub(crate) fn insert(&mut self, start: u64, len: u64) -> bool {
        let (mut from, mut to) = (start, start + len);
        let entry = |(&start, &len): (&u64, &u64)| (start, len);
        let before = self.runs.range(..start).next_back().map(entry);
        let after = self.runs.range(start..).next().map(entry);
        if before.is_some_and(|(run, run_len)| run + run_len > start)
            || after.is_some_and(|(run, _)| run < to)
        {
            return false;
        }
        if let Some((run, run_len)) = before.filter(|(run, run_len)| run + run_len == start) {
            self.remove_run(run, run_len);
            from = run;
        }
        if let Some((run, run_len)) = after.filter(|&(run, _)| run == to) {
            self.remove_run(run, run_len);
            to = run + run_len;
        }
        self.add_run(from, to - from);
        self.blocks += len;
        true
    }

    /// Takes `len` blocks at `start`, which must lie inside one run.
    fn take(&mut self, start: u64, len: u64) {
        let inside = self.runs.range(..=start).next_back();
        let (run, run_len) = inside.map(|(&run, &len)| (run, len)).expect("inside a run");
        debug_assert!(run <= start && start + len <= run + run_len, "inside a run");
        self.remove_run(run, run_len);
        if run < start {
            self.add_run(run, start - run);
        }
        if start + len < run + run_len {
            self.add_run(start + len, run + run_len - start - len);
        }
        self.blocks -= len;
    }

    /// Whether all of `len` blocks at `start` are in the set.
    fn contains(&self, start: u64, len: u64) -> bool {
        let run = self.runs.range(..=start).next_back();
        run.is_some_and(|(run, run_len)| start + len <= run + run_len)
    }

    /// Whether any of `len` blocks at `start` is in the set.
    pub(crate) fn overlaps(&self, start: u64, len: u64) -> bool {
        let run = self.runs.range(..start + len).next_back();
        run.is_some_and(|(run, run_len)| run + run_len > start)
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.runs.iter().map(|(&start, &len)| (start, len))
    }

    fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// What blocks are reserved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// File blocks that are not mapped yet, or may not be.
    Growth,
    /// Pages whose file blocks are mapped, and stay so until the pages are dirty.
    Rewrite,
}

struct Inner {
    free: RunSet,
    reserved: u64,
    /// Free, but with the devices to be discarded: counted as free, and handed out after that.
    trimming: u64,
    /// Freed in the open or the committing group.
    pending: u64,
    /// Where the last allocation ended: the next one goes on from there.
    cursor: u64,
    parked: Parked,
    log: SpaceLog,
    /// See the module's description: of the open and the committing group.
    converted: RunSet,
    /// All blocks of data chunks.
    chunk_blocks: u64,
}

impl Inner {
    /// Free and not reserved.
    fn unused(&self) -> u64 {
        self.free_blocks().saturating_sub(self.reserved)
    }

    fn free_blocks(&self) -> u64 {
        self.free.blocks() + self.trimming + self.parked.suspect_blocks()
    }

    fn sweep(&mut self) {
        self.parked.sweep(&mut self.free);
    }

    fn trust_all(&mut self) {
        self.parked.trust_all(&mut self.free);
    }

    /// Nothing owns these blocks any more; false if nothing did before.
    fn put_free(&mut self, start: u64, len: u64) -> bool {
        self.parked.put(&mut self.free, start, len)
    }
}

/// Space counters, in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SpaceStats {
    /// Blocks of all data chunks.
    pub chunk_blocks: u64,
    /// Free, including what is reserved and the float.
    pub free_blocks: u64,
    /// Kept for rewriting what is mapped.
    pub float_blocks: u64,
    /// Promised to dirty pages.
    pub reserved_blocks: u64,
    /// Freed, usable after the next commit.
    pub pending_blocks: u64,
    /// Not yet in any chunk, and not kept for metadata.
    pub unallocated_blocks: u64,
    /// Runs of free blocks.
    pub free_runs: u64,
}

/// The allocator of data blocks.
pub(crate) struct Allocator {
    volume: Arc<Volume>,
    inner: Mutex<Inner>,
    /// Bytes of unallocated device space that data may not take.
    meta_reserve_bytes: u64,
    float_blocks: u64,
    /// One chunk is made at a time.
    growing: Mutex<()>,
    /// Blocks that were with the devices are back.
    trimmed: Condvar,
}

/// Share of the volume kept for metadata to grow into: 1/64, but at least two metadata chunks.
const META_RESERVE_SHARE: u64 = 64;

/// Share of the volume that is the float, in blocks, and its bounds: little against the volume, and
/// enough to rewrite in sizeable pieces.
const FLOAT_SHARE: u64 = 256;
const FLOAT_BLOCKS_MIN: u64 = 64;
const FLOAT_BLOCKS_MAX: u64 = 1024;

/// A run shorter than this is passed over while there are longer ones: what is written together
/// shall lie together, in requests of 1 MiB.
const RUN_BLOCKS_WANTED: u64 = 256;

/// How many runs from the cursor on are looked at before the longest of all is taken.
const RUNS_LOOKED_AT_MAX: usize = 16;

/// When no run is as long as this (1 MiB) and the volume has room, a new chunk is made rather than
/// writing into the splinters that copy on write leaves.
const LONGEST_BLOCKS_MIN: u64 = 256;

impl Allocator {
    /// Builds the map from the durable table; chunks that the table does not know yet (a crash
    /// came between making one and the next commit) are added.
    pub(crate) fn load(
        volume: Arc<Volume>,
        scan: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<(), redb::Error>,
    ) -> Result<Self, redb::Error> {
        let mut free = RunSet::default();
        let mut known = None;
        let mut damaged = None;
        scan(&mut |start, len| {
            if start == FREE_KNOWN_CHUNK_KEY {
                known = Some(len);
            } else if len == 0 || start.checked_add(len).is_none() || !free.insert(start, len) {
                damaged = Some((start, len));
            }
        })?;
        if let Some((start, len)) = damaged {
            return Err(corrupted("overlapping or impossible free", start, len));
        }
        let mut log = SpaceLog::default();
        let mut data = RunSet::default();
        let chunks = volume.chunks();
        for chunk in chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Data) {
            data.insert(chunk.start.0, chunk.len_blocks);
            if known.is_none_or(|known| u64::from(chunk.id) > known) {
                if !free.insert(chunk.start.0, chunk.len_blocks) {
                    return Err(corrupted(
                        "chunk is free twice:",
                        chunk.start.0,
                        chunk.len_blocks,
                    ));
                }
                log.added.push((chunk.start.0, chunk.len_blocks));
                log.known_chunk = log.known_chunk.max(Some(chunk.id));
            }
        }
        if let Some((start, len)) = free.iter().find(|&(start, len)| !data.contains(start, len)) {
            return Err(corrupted("free but in no data chunk:", start, len));
        }
        let total: u64 = volume.unallocated_bytes()
            + chunks
                .iter()
                .map(|chunk| chunk.len_blocks * BLOCK_SIZE)
                .sum::<u64>();
        let meta_reserve_bytes = (total / META_RESERVE_SHARE).max(2 * volume.meta_chunk_bytes());
        let inner = Inner {
            free,
            reserved: 0,
            trimming: 0,
            pending: 0,
            cursor: 0,
            parked: Parked::default(),
            log,
            converted: RunSet::default(),
            chunk_blocks: data.blocks(),
        };
        let float_blocks =
            (total / BLOCK_SIZE / FLOAT_SHARE).clamp(FLOAT_BLOCKS_MIN, FLOAT_BLOCKS_MAX);
        Ok(Self {
            volume,
            inner: Mutex::new(inner),
            meta_reserve_bytes,
            float_blocks,
            growing: Mutex::new(()),
            trimmed: Condvar::new(),
        })
    }

    /// Sets `blocks` aside. Makes a new chunk where needed, which may take device I/O: call it
    /// with no lock held. `NOSPC` when the volume is full; a commit may then free some.
    pub(crate) fn reserve(&self, blocks: u64, room: Room) -> Result<(), Errno> {
        let kept = match room {
            Room::Growth => self.float_blocks,
            Room::Rewrite => 0,
        };
        let wanted = blocks.saturating_add(kept);
        let has_room = |inner: &Inner| inner.unused() >= wanted;
        loop {
            {
                let mut inner = self.inner.lock();
                if blocks == 0 || has_room(&inner) {
                    inner.reserved += blocks;
                    return Ok(());
                }
            }
            let _one = self.growing.lock();
            let enough = has_room(&self.inner.lock());
            if !enough {
                self.add_chunk()?;
            }
        }
    }

    /// Blocks that [`Room::Growth`] could still have, without a commit.
    pub(crate) fn available(&self) -> u64 {
        let stats = self.stats();
        (stats.free_blocks + stats.unallocated_blocks)
            .saturating_sub(stats.reserved_blocks + self.float_blocks)
    }

    fn add_chunk(&self) -> Result<(), Errno> {
        let chunk: Chunk = self
            .volume
            .allocate_chunk(ChunkKind::Data, self.meta_reserve_bytes)
            .map_err(|error| match error.kind() {
                VolumeErrorKind::Block(_) => {
                    log::error!("no new chunk: {error}");
                    Errno::IO
                }
                _ => Errno::NOSPC,
            })?;
        let mut inner = self.inner.lock();
        if !inner.free.insert(chunk.start.0, chunk.len_blocks) {
            log::error!(
                "free space overlaps the new chunk {}; run 'braidfs fsck -n'",
                chunk.id
            );
            return Err(Errno::IO);
        }
        inner.chunk_blocks += chunk.len_blocks;
        inner.log.added.push((chunk.start.0, chunk.len_blocks));
        inner.log.known_chunk = inner.log.known_chunk.max(Some(chunk.id));
        Ok(())
    }

    /// Gives a reservation back.
    pub(crate) fn unreserve(&self, blocks: u64) {
        let mut inner = self.inner.lock();
        debug_assert!(
            inner.reserved >= blocks,
            "more given back than was reserved"
        );
        inner.reserved = inner.reserved.saturating_sub(blocks);
    }

    /// Turns `blocks` of the reservation into runs of blocks, as few and as near to each other
    /// as free space allows, pushed to `out`.
    pub(crate) fn allocate(&self, mut blocks: u64, out: &mut Vec<(u64, u64)>) -> Result<(), Errno> {
        self.keep_a_long_run();
        let mut inner = self.inner.lock();
        inner.sweep();
        while inner.free.blocks() < blocks && inner.trimming > 0 {
            // Device I/O ends in bounded time, and so does this.
            self.trimmed.wait(&mut inner);
        }
        if inner.free.blocks() < blocks {
            inner.trust_all();
        }
        if inner.free.blocks() < blocks {
            let held = inner.parked.held_blocks();
            if held > 0 {
                log::error!("{held} blocks cannot be used until a device answers");
                return Err(Errno::IO);
            }
            log::error!("allocator: {blocks} reserved blocks are not there");
            return Err(Errno::NOSPC);
        }
        inner.reserved = inner.reserved.saturating_sub(blocks);
        while blocks > 0 {
            let cursor = inner.cursor;
            let wanted = blocks.min(RUN_BLOCKS_WANTED);
            let (start, len) = find_run(&inner.free, cursor, wanted);
            let len = len.min(blocks);
            inner.free.take(start, len);
            inner.cursor = start + len;
            blocks -= len;
            out.push((start, len));
        }
        Ok(())
    }

    fn keep_a_long_run(&self) {
        let is_short = || {
            let longest = self.inner.lock().free.longest();
            longest.is_none_or(|(_, len)| len < LONGEST_BLOCKS_MIN)
        };
        if is_short() {
            let _one = self.growing.lock();
            if is_short() && self.add_chunk().is_err() {
                log::trace!("no room for another data chunk");
            }
        }
    }

    /// Frees blocks of the durable or the open state; usable after the next commit.
    pub(crate) fn free(&self, start: u64, len: u64) {
        let mut inner = self.inner.lock();
        inner.pending += len;
        inner.log.freed.push((start, len));
    }

    /// A device that did not answer may still write, or discard, these blocks: until it is done
    /// they are not handed out, nor written in place.
    pub(crate) fn doubt(&self, start: u64, len: u64, in_doubt: InDoubt) {
        self.inner.lock().parked.doubt(start, len, in_doubt);
    }

    /// Takes an allocation back that never got mapped (its write failed) and reserves it again.
    pub(crate) fn unallocate(&self, start: u64, len: u64) {
        let mut inner = self.inner.lock();
        let Inner { free, parked, .. } = &mut *inner;
        let is_new = match parked.first_doubt(start, len) {
            Some(_) => parked.put(free, start, len),
            None => parked.put_suspect(free, start, len),
        };
        if is_new {
            inner.reserved += len;
        } else {
            log::error!("blocks {start}+{len} were handed out while they were free");
        }
    }

    /// Blocks that were handed out are in an extent now, in the open group. Until then the durable
    /// state has them as free, whatever becomes of the write.
    pub(crate) fn note_mapped(&self, start: u64, len: u64) {
        let fresh = self.inner.lock().log.allocated.insert(start, len);
        assert!(fresh, "a block is handed out once between two commits");
    }

    /// Blocks that were set aside have data now, in the open group.
    pub(crate) fn note_filled(&self, start: u64, len: u64) {
        self.inner.lock().log.filled.push((start, len));
    }

    /// Blocks with data are only set aside now, in the open group.
    pub(crate) fn note_converted(&self, start: u64, len: u64) {
        let mut inner = self.inner.lock();
        if inner.converted.insert(start, len) {
            inner.log.converted.push((start, len));
        } else {
            log::error!("blocks {start}+{len} were converted twice");
        }
    }

    /// How many blocks from `start` on, `len` at the most, are alike in that they must not be
    /// written in place, because they are converted or in doubt; and whether they are.
    pub(crate) fn fixed_run(&self, start: u64, len: u64) -> (bool, u64) {
        let inner = self.inner.lock();
        let len = match inner.parked.first_doubt(start, len) {
            Some((from, count)) if from == start => return (true, count),
            Some((from, _)) => from - start,
            None => len,
        };
        let runs = &inner.converted.runs;
        if let Some((&run, &run_len)) = runs.range(..=start).next_back()
            && start < run + run_len
        {
            return (true, len.min(run + run_len - start));
        }
        let next = runs.range(start..).next();
        (false, next.map_or(len, |(&run, _)| len.min(run - start)))
    }

    /// Ends the group: what follows belongs to the next one.
    pub(crate) fn freeze(&self) -> SpaceLog {
        std::mem::take(&mut self.inner.lock().log)
    }

    /// Whether the open group changed nothing.
    pub(crate) fn open_is_empty(&self) -> bool {
        self.inner.lock().log.is_empty()
    }

    /// The group is durable and nobody reads its freed blocks any more: hand them out again.
    pub(crate) fn release(&self, log: &SpaceLog) {
        let mut inner = self.inner.lock();
        inner.sweep();
        for &(start, len) in log.freed() {
            if !inner.put_free(start, len) {
                log::error!("blocks {start}+{len} were freed twice; run 'braidfs fsck -n'");
            }
            inner.pending -= len;
        }
        for &(start, len) in &log.converted {
            inner.converted.take(start, len);
        }
    }

    /// Takes free blocks out to be discarded: of the first run of at least `least` blocks in
    /// `from..to`, up to `most`. [`Allocator::end_trim`] puts them back.
    pub(crate) fn begin_trim(
        &self,
        from: u64,
        to: u64,
        least: u64,
        most: u64,
    ) -> Option<(u64, u64)> {
        let mut inner = self.inner.lock();
        let inside = inner.free.runs.range(..from).next_back();
        let onward = inner.free.runs.range(from..to);
        let (start, len) = inside
            .into_iter()
            .chain(onward)
            .map(|(&start, &len)| (start.max(from), (start + len).min(to)))
            .find(|&(start, end)| end.saturating_sub(start) >= least.max(1))
            .map(|(start, end)| (start, (end - start).min(most)))?;
        inner.free.take(start, len);
        inner.trimming += len;
        Some((start, len))
    }

    /// The devices know: the blocks may be used.
    pub(crate) fn end_trim(&self, start: u64, len: u64) {
        let mut inner = self.inner.lock();
        inner.trimming -= len;
        if !inner.put_free(start, len) {
            log::error!("blocks {start}+{len} were handed out while they were discarded");
        }
        drop(inner);
        self.trimmed.notify_all();
    }

    /// One past the last block of any chunk.
    pub(crate) fn end(&self) -> u64 {
        let chunks = self.volume.chunks();
        let ends = chunks.iter().map(|chunk| chunk.start.0 + chunk.len_blocks);
        ends.max().unwrap_or(0)
    }

    /// Blocks freed but not yet usable: a commit would bring them back.
    pub(crate) fn pending(&self) -> u64 {
        self.inner.lock().pending
    }

    /// Counters.
    pub(crate) fn stats(&self) -> SpaceStats {
        let unallocated = self
            .volume
            .unallocated_bytes()
            .saturating_sub(self.meta_reserve_bytes);
        let inner = self.inner.lock();
        SpaceStats {
            chunk_blocks: inner.chunk_blocks,
            free_blocks: inner.free_blocks(),
            float_blocks: self.float_blocks,
            reserved_blocks: inner.reserved,
            pending_blocks: inner.pending,
            unallocated_blocks: unallocated / BLOCK_SIZE,
            free_runs: inner.free.runs.len() as u64,
        }
    }
}

/// The next run from `cursor` on with at least `wanted` blocks, if it is near; else the longest of
/// all. `free` is not empty.
fn find_run(free: &RunSet, cursor: u64, wanted: u64) -> (u64, u64) {
    let before = free.runs.range(..cursor).next_back();
    let inside = before
        .filter(|&(&start, &len)| start + len > cursor)
        .map(|(&start, &len)| (cursor, start + len - cursor));
    let onward = free.runs.range(cursor..).map(|(&start, &len)| (start, len));
    let near = inside.into_iter().chain(onward).take(RUNS_LOOKED_AT_MAX);
    near.into_iter()
        .find(|&(_, len)| len >= wanted)
        .or_else(|| free.longest())
        .expect("the caller knows that there are free blocks")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_join_and_split() {
        let mut set = RunSet::default();
        assert!(set.insert(10, 5));
        assert!(set.insert(20, 5));
        assert!(set.insert(15, 5));
        assert_eq!(set.iter().collect::<Vec<_>>(), [(10, 15)]);
        assert!(!set.insert(24, 2));
        set.take(12, 3);
        assert_eq!(set.iter().collect::<Vec<_>>(), [(10, 2), (15, 10)]);
        assert_eq!(set.blocks(), 12);
    }

    #[test]
    fn a_long_run_is_preferred_to_a_near_splinter() {
        let mut set = RunSet::default();
        set.insert(0, 2);
        set.insert(10, 100);
        assert_eq!(find_run(&set, 0, 64), (10, 100));
        assert_eq!(find_run(&set, 0, 1), (0, 2));
        assert_eq!(find_run(&set, 50, 60), (50, 60));
        assert_eq!(find_run(&set, 90, 64), (10, 100));
        assert_eq!(find_run(&set, 90, 200), (10, 100));
    }

    proptest! {
        /// The log applied to the table gives the map in memory, whatever the history.
        #[test]
        fn the_log_brings_the_table_to_the_map(
            ops in proptest::collection::vec((0u8..4, 1u64..40), 1..60)
        ) {
            let db = redb::Database::builder()
                .create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
            const T: redb::TableDefinition<'static, u64, u64> = redb::TableDefinition::new("t");
            let mut map = RunSet::default();
            let mut log = SpaceLog::default();
            map.insert(100, 1000);
            log.added.push((100, 1000));
            let mut owned: Vec<(u64, u64)> = Vec::new();
            for (op, len) in ops {
                match op {
                    0 | 1 if map.blocks() > 0 => {
                        let (start, run) = find_run(&map, 100 + len * 7, len);
                        let len = len.min(run);
                        map.take(start, len);
                        prop_assert!(log.allocated.insert(start, len));
                        owned.push((start, len));
                    }
                    2 if !owned.is_empty() => {
                        let run = owned.swap_remove(usize::try_from(len).unwrap() % owned.len());
                        log.freed.push(run);
                    }
                    _ => {
                        let write = db.begin_write().unwrap();
                        log.apply(&mut write.open_table(T).unwrap()).unwrap();
                        write.commit().unwrap();
                        for (start, len) in std::mem::take(&mut log).freed {
                            prop_assert!(map.insert(start, len));
                        }
                        use redb::{ReadableDatabase, ReadableTable};
                        let read = db.begin_read().unwrap();
                        let table: Vec<_> = read.open_table(T).unwrap().iter().unwrap()
                            .map(|e| { let (k, v) = e.unwrap(); (k.value(), v.value()) }).collect();
                        prop_assert_eq!(table, map.iter().collect::<Vec<_>>());
                    }
                }
            }
        }
    }
}
