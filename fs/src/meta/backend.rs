//! redb's file: one address space of the page cache, on mirrored chunks of the volume.
//!
//! The file's bytes are the payloads of the metadata chunks, one after the other, written in
//! place: redb is itself copy on write and never rewrites a page of the durable state but its
//! header, whose two commit slots it changes by turns. So this file adds no journal.
//!
//! A chunk is made when a write first needs it, not when redb asks for a longer file: redb
//! doubles its file, and most of that may never be written.
//!
//! `sync_data` is the barrier that every durability promise rests on. In this order: write back
//! all pages, then the checksum blocks that changed, then the head if the length changed; then
//! one flush of all devices, which also covers all data written before.
//!
//! Head: blocks 0 and 1 of the first metadata chunk, written by turns: magic, sequence, length of
//! the file in bytes, number of chunks in use, CRC32C. The valid one with the higher sequence
//! counts.
//!
//! Locks: `state` is held for look-ups in memory and, when a chunk's checksum area is loaded or a
//! chunk is made, for that device I/O; nothing else is taken under it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use braidfs_blockdev::{
    AlignedBuf, BlockError, Chunk, ChunkKind, Class, Completion, Kiobuf, PAGE_SIZE, VolBlock,
    Volume,
};
use braidfs_cache::{
    AddressSpace, Backing, Cache, CacheError, MapOut, PageRange, Placement, Segment, SegmentKind,
    SpaceClass,
};
use parking_lot::Mutex;

use crate::latch::Latch;

use super::checksums::{self, Area, HEAD_BLOCKS, Known};

const HEAD_MAGIC: [u8; 8] = *b"BRAIDMET";
const HEAD_LEN: usize = 36;

/// Id of the metadata address space: no inode has it.
const META_SPACE_ID: u64 = 0;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    sequence: u64,
    len_bytes: u64,
    chunk_count: u32,
}

impl Head {
    fn encode(&self) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(PAGE_SIZE);
        buf[..8].copy_from_slice(&HEAD_MAGIC);
        buf[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        buf[16..24].copy_from_slice(&self.len_bytes.to_le_bytes());
        buf[24..28].copy_from_slice(&self.chunk_count.to_le_bytes());
        let crc = crc32c::crc32c(&buf[..HEAD_LEN - 4]);
        buf[HEAD_LEN - 4..HEAD_LEN].copy_from_slice(&crc.to_le_bytes());
        buf
    }

    fn decode(raw: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(raw.get(at..at + 8)?.try_into().ok()?));
        let half = |at: usize| Some(u32::from_le_bytes(raw.get(at..at + 4)?.try_into().ok()?));
        if raw.get(..8)? != HEAD_MAGIC
            || half(HEAD_LEN - 4)? != crc32c::crc32c(raw.get(..HEAD_LEN - 4)?)
        {
            return None;
        }
        Some(Self {
            sequence: word(8)?,
            len_bytes: word(16)?,
            chunk_count: half(24)?,
        })
    }
}

/// One metadata chunk.
struct MetaChunk {
    start: VolBlock,
    area_blocks: u64,
    payload_blocks: u64,
    /// First page of the file that lives here.
    first_page: u64,
    /// The checksum area; `None` until first needed.
    area: Option<Area>,
}

impl MetaChunk {
    fn new(chunk: &Chunk, first_page: u64) -> Self {
        let (area_blocks, payload_blocks) = checksums::divide(chunk.len_blocks);
        Self {
            start: chunk.start,
            area_blocks,
            payload_blocks,
            first_page,
            area: None,
        }
    }

    fn area_block(&self, at: u64) -> VolBlock {
        VolBlock(self.start.0 + HEAD_BLOCKS + at)
    }

    fn payload_block(&self, index: u64) -> VolBlock {
        VolBlock(self.start.0 + HEAD_BLOCKS + self.area_blocks + index)
    }

    fn end_page(&self) -> u64 {
        self.first_page + self.payload_blocks
    }

    /// The area, read from the devices if need be; a damaged sector is taken from the other copy.
    fn area(&mut self, volume: &Volume) -> Result<&mut Area, BlockError> {
        if self.area.is_none() {
            let mut area = Area::new(self.area_blocks);
            for at in 0..self.area_blocks {
                let block = self.area_block(at);
                let mut sound = false;
                for copy in 0..volume.copies(block) {
                    let buf = AlignedBuf::zeroed(PAGE_SIZE);
                    let raw = match volume.read_wait(block, buf, Some(copy)) {
                        Ok(raw) => raw,
                        Err(error) if copy + 1 == volume.copies(block) && copy == 0 => {
                            return Err(error);
                        }
                        Err(_) => continue,
                    };
                    sound = area.load_block(at, &raw, copy == 0);
                    if sound {
                        break;
                    }
                    log::error!(
                        "metadata checksums at block {} copy {copy} are damaged",
                        block.0
                    );
                }
                if !sound {
                    log::error!(
                        "metadata checksums at block {} are lost in all copies",
                        block.0
                    );
                }
            }
            self.area = Some(area);
        }
        Ok(self.area.as_mut().expect("loaded above"))
    }
}

/// Checksums take less than this share of a chunk.
const CHECKSUM_SHARE: u64 = 64;

struct State {
    chunks: Vec<MetaChunk>,
    head: Head,
    head_dirty: bool,
    /// One past the highest page that was ever written.
    high_page: u64,
}

impl State {
    /// What the devices say.
    fn load(volume: &Volume, fresh: bool) -> io::Result<Self> {
        let chunks: Vec<Chunk> = volume
            .chunks()
            .into_iter()
            .filter(|chunk| chunk.kind == ChunkKind::Meta)
            .collect();
        let first = chunks.first().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "the chunk table has no metadata chunk",
            )
        })?;
        let mut head = Head::default();
        if fresh {
            for slot in 0..HEAD_BLOCKS {
                let block = VolBlock(first.start.0 + slot);
                let zeros = AlignedBuf::zeroed(PAGE_SIZE);
                volume.write_wait(block, zeros).map_err(block_error)?;
            }
            volume.flush_wait().map_err(block_error)?;
        }
        for slot in 0..HEAD_BLOCKS {
            let block = VolBlock(first.start.0 + slot);
            for copy in 0..volume.copies(block) {
                let buf = AlignedBuf::zeroed(PAGE_SIZE);
                if let Ok(raw) = volume.read_wait(block, buf, Some(copy))
                    && let Some(found) = Head::decode(&raw)
                    && found.sequence > head.sequence
                {
                    head = found;
                }
            }
        }
        if head == Head::default() && !fresh {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "there is no valid head: it is damaged, or formatting did not come to its end",
            ));
        }
        if head.chunk_count as usize > chunks.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the metadata head names {} chunks, the chunk table has {}",
                    head.chunk_count,
                    chunks.len()
                ),
            ));
        }
        let mut state = State {
            chunks: Vec::new(),
            head,
            head_dirty: false,
            high_page: 0,
        };
        for chunk in &chunks {
            let first_page = state.chunks.last().map_or(0, MetaChunk::end_page);
            let mut chunk = MetaChunk::new(chunk, first_page);
            if state.chunks.len() >= head.chunk_count as usize {
                // Made just before a crash, or by formatting: nothing in it counts yet.
                chunk.area = Some(Area::new(chunk.area_blocks));
            }
            state.chunks.push(chunk);
        }
        state.high_page = highest_page(&mut state.chunks, volume);
        Ok(state)
    }
}

/// One past the highest page that the checksum areas know of. Looks at the last chunks only, until
/// one has been written to.
fn highest_page(chunks: &mut [MetaChunk], volume: &Volume) -> u64 {
    for chunk in chunks.iter_mut().rev() {
        let (first, end) = (chunk.first_page, chunk.end_page());
        let payload = chunk.payload_blocks;
        match chunk.area(volume) {
            Ok(area) => {
                let known = |&index: &u64| area.known(index) != Known::Nothing;
                if let Some(index) = (0..payload).rev().find(known) {
                    return first + index + 1;
                }
            }
            // Not to be seen now: take it for full.
            Err(_) => return end,
        }
    }
    0
}

/// redb's file. Shared by redb (as its storage) and the page cache (as its backing).
pub(crate) struct MetaFile {
    volume: Arc<Volume>,
    state: Mutex<State>,
    space: OnceLock<Arc<AddressSpace>>,
    read_only: AtomicBool,
}

impl std::fmt::Debug for MetaFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MetaFile")
    }
}

fn io_error(error: CacheError) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

fn block_error(error: BlockError) -> io::Error {
    io::Error::other(error)
}

/// Repeats a write that failed, a few times and for less than a second: what did not get better by
/// then fails the commit.
fn try_again<E>(
    mut write: impl FnMut() -> Result<(), E>,
    may_pass: impl Fn(&E) -> bool,
) -> Result<(), E> {
    const PAUSES_MS: [u64; 4] = [20, 60, 180, 540];
    for pause in PAUSES_MS {
        match write() {
            Err(error) if may_pass(&error) => {
                std::thread::sleep(std::time::Duration::from_millis(pause));
            }
            ended => return ended,
        }
    }
    write()
}

impl MetaFile {
    /// Opens the file as its head says. With `fresh`, makes it empty first, whatever the devices
    /// held before.
    pub(crate) fn open(
        volume: Arc<Volume>,
        cache: &Arc<Cache>,
        read_only: bool,
        fresh: bool,
    ) -> io::Result<Arc<Self>> {
        let state = State::load(&volume, fresh)?;
        let file = Arc::new(Self {
            volume,
            state: Mutex::new(state),
            space: OnceLock::new(),
            read_only: AtomicBool::new(read_only),
        });
        let backing: Arc<dyn Backing> = Arc::new(MetaBacking(Arc::downgrade(&file)));
        let space = cache.new_space(META_SPACE_ID, SpaceClass::Meta, backing);
        let set = file.space.set(space);
        debug_assert!(set.is_ok(), "set once");
        Ok(file)
    }

    /// redb's view of the file.
    pub(crate) fn storage(self: &Arc<Self>) -> MetaStorage {
        MetaStorage(Arc::clone(self))
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// What recovery did in memory is forgotten; it is for redb to do again, and be written. Nobody
    /// uses the file meanwhile.
    pub(crate) fn begin_again_to_write(&self) -> io::Result<()> {
        self.space().discard(PageRange::ALL);
        *self.state.lock() = State::load(&self.volume, false)?;
        self.read_only.store(false, Ordering::Release);
        Ok(())
    }

    fn space(&self) -> &Arc<AddressSpace> {
        self.space.get().expect("set in open")
    }

    /// Bytes that the chunks of the file hold.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        let state = self.state.lock();
        state.chunks.last().map_or(0, MetaChunk::end_page) * PAGE_SIZE as u64
    }

    /// How long the file may become when its chunks may grow by `growth` bytes. redb makes its file
    /// twice as long when it is full, and uses the new part from both ends; so growing counts only
    /// where all of that has a home.
    pub(crate) fn reachable_bytes(&self, growth: u64) -> u64 {
        /// Where its file has whole regions, redb adds one at a time.
        const STEP_BYTES_MAX: u64 = 4 << 30;
        /// What it may add for one large value, and for its own headers.
        const EXTRA_BYTES: u64 = 256 << 10;
        let most = self.capacity_bytes() + growth - growth / CHECKSUM_SHARE;
        let mut len = self.state.lock().head.len_bytes.max(PAGE_SIZE as u64);
        loop {
            let next = len + len.min(STEP_BYTES_MAX) + EXTRA_BYTES;
            if next > most {
                return len.min(most);
            }
            len = next;
        }
    }

    /// Bytes of that which lie behind the highest page ever written, so are surely free.
    pub(crate) fn room_bytes(&self, growth: u64) -> u64 {
        let written = self.state.lock().high_page * PAGE_SIZE as u64;
        self.reachable_bytes(growth).saturating_sub(written)
    }

    /// Makes chunks until page `end - 1` has a home.
    fn grow_to(&self, state: &mut State, end: u64) -> Result<(), CacheError> {
        while state.chunks.last().map_or(0, MetaChunk::end_page) < end {
            let chunk = self
                .volume
                .allocate_chunk(ChunkKind::Meta, 0)
                .map_err(|error| {
                    log::error!("metadata cannot grow: {error}");
                    CacheError::Backing(libc::ENOSPC)
                })?;
            let first_page = state.chunks.last().map_or(0, MetaChunk::end_page);
            let mut chunk = MetaChunk::new(&chunk, first_page);
            chunk.area = Some(Area::new(chunk.area_blocks));
            state.chunks.push(chunk);
        }
        Ok(())
    }

    /// Forgets all pages from `page` on, so that they read as zeros when the file grows again.
    fn forget_from(&self, page: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        for chunk in &mut state.chunks {
            for at in page.max(chunk.first_page)..chunk.end_page() {
                let index = at - chunk.first_page;
                chunk
                    .area(&self.volume)
                    .map_err(block_error)?
                    .set(index, None);
            }
        }
        Ok(())
    }

    /// Writes the checksum blocks that changed, and the head if it did, all at once.
    fn write_areas_and_head(&self) -> Result<(), BlockError> {
        let mut state = self.state.lock();
        let mut writes = Vec::new();
        let mut taken = Vec::new();
        for (nth, chunk) in state.chunks.iter_mut().enumerate() {
            let Some(area) = chunk.area.as_mut() else {
                continue;
            };
            for at in area.take_dirty() {
                let mut buf = AlignedBuf::zeroed(PAGE_SIZE);
                area.encode_block(at, &mut buf);
                writes.push((VolBlock(chunk.start.0 + HEAD_BLOCKS + at), buf));
                taken.push((nth, at));
            }
        }
        let mut head = state.head;
        head.chunk_count = u32::try_from(state.chunks.len()).unwrap_or(u32::MAX);
        if state.head_dirty || state.head.chunk_count != head.chunk_count {
            head.sequence += 1;
            let block = VolBlock(state.chunks[0].start.0 + head.sequence % HEAD_BLOCKS);
            writes.push((block, head.encode()));
        }
        let written = self.write_all(writes);
        if written.is_ok() {
            state.head = head;
            state.head_dirty = false;
        } else {
            for (nth, at) in taken {
                if let Some(area) = state.chunks[nth].area.as_mut() {
                    area.set_dirty(at);
                }
            }
        }
        written
    }

    fn write_all(&self, writes: Vec<(VolBlock, AlignedBuf)>) -> Result<(), BlockError> {
        let latch = Arc::new(Latch::new(writes.len()));
        let mut plug = self.volume.plug();
        for (block, buf) in writes {
            let ended = Arc::clone(&latch);
            let end_io = Box::new(move |done: Completion| ended.end(done));
            let kiobuf = Kiobuf::new(Box::new(buf), 0, PAGE_SIZE, end_io);
            plug.write(block, kiobuf, Class::Sync);
        }
        plug.finish();
        latch.wait().map_err(|failed| failed.error)
    }

    /// The last call: what is in memory and may not be written (a read-only mount's recovery) is
    /// forgotten, anything else is made durable.
    pub(crate) fn close(&self) -> io::Result<()> {
        if self.is_read_only() {
            self.space().discard(PageRange::ALL);
            return Ok(());
        }
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        if self.is_read_only() {
            return Ok(());
        }
        let may_pass = |error: &CacheError| matches!(error, CacheError::Block(e) if e.may_pass());
        let flushed = try_again(|| self.space().flush(PageRange::ALL), may_pass);
        flushed.map_err(|error| match error {
            CacheError::Block(error) => self.named_error(error),
            other => io_error(other),
        })?;
        let written = try_again(|| self.write_areas_and_head(), BlockError::may_pass);
        written.map_err(|error| self.named_error(error))?;
        let flushed = self.volume.flush_wait();
        flushed.map_err(|error| self.named_error(error))
    }

    /// An error for people, with the name of the device.
    fn named_error(&self, error: BlockError) -> io::Error {
        let BlockError { kind, op, dev, at } = error;
        let name = self.volume.device_name(dev);
        io::Error::other(format!("{op} on {name} at byte {at}: {kind}"))
    }
}

/// What redb holds.
#[derive(Debug)]
pub(crate) struct MetaStorage(Arc<MetaFile>);

impl redb::StorageBackend for MetaStorage {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.state.lock().head.len_bytes)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.0.state.lock().head.len_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "read beyond the end of the metadata file",
            ));
        }
        self.0.space().read_wait(offset, out).map_err(io_error)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let old = {
            let mut state = self.0.state.lock();
            // Every page has a home before redb uses it, whichever it uses first.
            let end = len.div_ceil(PAGE_SIZE as u64);
            self.0.grow_to(&mut state, end).map_err(io_error)?;
            state.head_dirty |= state.head.len_bytes != len;
            std::mem::replace(&mut state.head.len_bytes, len)
        };
        if len < old {
            let page = len.div_ceil(PAGE_SIZE as u64);
            self.0.space().discard(PageRange {
                start: page,
                end: u64::MAX / PAGE_SIZE as u64,
            });
            self.0.forget_from(page)?;
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0
            .space()
            .write(offset, data)
            .map_err(|(error, _)| io_error(error))?;
        Ok(())
    }
}

/// What the page cache holds; weak, because the file holds the address space.
struct MetaBacking(std::sync::Weak<MetaFile>);

impl MetaBacking {
    fn file(&self) -> Result<Arc<MetaFile>, CacheError> {
        self.0.upgrade().ok_or(CacheError::ShutDown)
    }
}

impl Backing for MetaBacking {
    fn map(&self, _space: u64, pages: PageRange, out: &mut MapOut) -> Result<(), CacheError> {
        let file = self.file()?;
        let mut state = file.state.lock();
        for page in pages.start..pages.end {
            let one = PageRange {
                start: page,
                end: page + 1,
            };
            let chunk = state
                .chunks
                .iter_mut()
                .find(|chunk| page < chunk.end_page());
            let Some(chunk) = chunk else {
                out.segments.push(Segment {
                    pages: one,
                    kind: SegmentKind::Hole,
                });
                continue;
            };
            let index = page - chunk.first_page;
            let block = chunk.payload_block(index);
            let known = chunk
                .area(&file.volume)
                .map_err(CacheError::Block)?
                .known(index);
            let crc_index = match known {
                Known::Nothing => {
                    out.segments.push(Segment {
                        pages: one,
                        kind: SegmentKind::Hole,
                    });
                    continue;
                }
                Known::Lost => return Err(CacheError::Corrupt { block }),
                // redb rewrites its header in place and checks it itself.
                Known::Crc(_) if page == 0 => None,
                Known::Unchecked => None,
                Known::Crc(crc) => {
                    out.crcs.push(crc);
                    Some(out.crcs.len() - 1)
                }
            };
            out.segments.push(Segment {
                pages: one,
                kind: SegmentKind::Data { block, crc_index },
            });
        }
        Ok(())
    }

    fn allocate(
        &self,
        _space: u64,
        runs: &[PageRange],
        out: &mut Vec<Placement>,
    ) -> Result<(), CacheError> {
        let file = self.file()?;
        if file.is_read_only() {
            return Err(CacheError::Backing(libc::EROFS));
        }
        let mut state = file.state.lock();
        for run in runs {
            file.grow_to(&mut state, run.end)?;
            state.high_page = state.high_page.max(run.end);
            for chunk in &mut state.chunks {
                let (start, end) = (
                    run.start.max(chunk.first_page),
                    run.end.min(chunk.end_page()),
                );
                if start < end {
                    let block = chunk.payload_block(start - chunk.first_page);
                    out.push(Placement {
                        pages: PageRange { start, end },
                        block,
                    });
                    // Load it here: `written` must not wait for a device.
                    chunk.area(&file.volume).map_err(CacheError::Block)?;
                }
            }
        }
        Ok(())
    }

    fn written(
        &self,
        _space: u64,
        placement: Placement,
        crcs: &[u32],
        result: Result<(), BlockError>,
    ) {
        let (Ok(file), Ok(())) = (self.file(), result) else {
            return;
        };
        let mut state = file.state.lock();
        let start = placement.pages.start;
        let chunk = state
            .chunks
            .iter_mut()
            .find(|chunk| start < chunk.end_page());
        if let Some(chunk) = chunk
            && let Some(area) = chunk.area.as_mut()
        {
            let first_page = chunk.first_page;
            for (index, &crc) in (start - first_page..).zip(crcs) {
                // redb's header is written twice in a commit and not verified by us.
                let is_header = first_page + index == 0;
                if !is_header || area.known(index) == Known::Nothing {
                    area.set(index, Some(crc));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_round_trips_and_damage_is_noticed() {
        let head = Head {
            sequence: 9,
            len_bytes: 1 << 33,
            chunk_count: 3,
        };
        let mut raw = head.encode().to_vec();
        assert_eq!(Head::decode(&raw), Some(head));
        for at in 0..HEAD_LEN {
            raw[at] ^= 1;
            assert_eq!(Head::decode(&raw), None, "byte {at}");
            raw[at] ^= 1;
        }
    }
}
