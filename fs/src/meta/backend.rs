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
//! all pages, then the checksum blocks that changed, redb's header if it changed (see
//! [`super::header`]: page 0 is not in the cache) and the head if the length changed (see
//! [`super::head`]); then one flush of all devices, which also covers all data written before.
//!
//! A page that is read from a bad copy is taken from the other one, and the bad copy is mended by
//! the committing thread, which holds off writeback of the file meanwhile.
//!
//! redb gets no page that makes no sense by itself, whatever its checksum; see [`super::page`].
//!
//! Locks: `state` is held for look-ups in memory and, when a chunk's checksum area is loaded or a
//! chunk is made, for that device I/O; nothing else is taken under it.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use braidfs_blockdev::{
    AlignedBuf, BlockError, ChunkKind, Class, Completion, Kiobuf, PAGE_SIZE, VolBlock, Volume,
};
use braidfs_cache::{
    AddressSpace, Backing, Cache, CacheError, MapOut, PageRange, Placement, Segment, SegmentKind,
    SpaceClass,
};
use parking_lot::Mutex;

use crate::latch::Latch;

use super::checksums::{Area, Known};
use super::contain::outside;
use super::mirrors::{MetaStats, Mirrors};
use super::page::fault;
use super::state::{MetaChunk, State};

/// Id of the metadata address space: no inode has it.
const META_SPACE_ID: u64 = 0;

/// Checksums take less than this share of a chunk.
const CHECKSUM_SHARE: u64 = 64;

/// redb's file. Shared by redb (as its storage) and the page cache (as its backing).
pub(crate) struct MetaFile {
    pub(super) mirrors: Mirrors,
    pub(super) state: Mutex<State>,
    space: OnceLock<Arc<AddressSpace>>,
    /// Pages with a bad copy and a good one.
    pub(super) to_mend: Mutex<BTreeSet<u64>>,
    pub(super) mending_held: AtomicBool,
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
        let mirrors = Mirrors::new(volume, read_only);
        let state = State::load(&mirrors, fresh)?;
        let file = Arc::new(Self {
            mirrors,
            state: Mutex::new(state),
            space: OnceLock::new(),
            to_mend: Mutex::default(),
            mending_held: AtomicBool::new(false),
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

    pub(super) fn is_read_only(&self) -> bool {
        self.mirrors.is_read_only()
    }

    /// What became of its copies since the mount.
    pub(crate) fn stats(&self) -> MetaStats {
        self.mirrors.stats()
    }

    /// What recovery did in memory is forgotten; it is for redb to do again, and be written. Nobody
    /// uses the file meanwhile.
    pub(crate) fn begin_again_to_write(&self) -> io::Result<()> {
        self.space().discard(PageRange::ALL);
        self.mirrors.set_writable();
        *self.state.lock() = State::load(&self.mirrors, false)?;
        Ok(())
    }

    pub(super) fn space(&self) -> &Arc<AddressSpace> {
        self.space.get().expect("set in open")
    }

    /// Bytes that the chunks of the file hold.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.state.lock().end_page() * PAGE_SIZE as u64
    }

    /// Bytes up to the highest page ever written.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.state.lock().high_page * PAGE_SIZE as u64
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
        self.reachable_bytes(growth)
            .saturating_sub(self.written_bytes())
    }

    /// Makes chunks until page `end - 1` has a home.
    fn grow_to(&self, state: &mut State, end: u64) -> Result<(), CacheError> {
        while state.end_page() < end {
            let chunk = self
                .mirrors
                .volume
                .allocate_chunk(ChunkKind::Meta, 0)
                .map_err(|error| {
                    log::error!("metadata cannot grow: {error}");
                    CacheError::Backing(libc::ENOSPC)
                })?;
            let first_page = state.end_page();
            state.chunks.push(MetaChunk::fresh(&chunk, first_page));
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
                    .area(&self.mirrors)
                    .map_err(block_error)?
                    .set(index, None);
            }
        }
        Ok(())
    }

    /// Writes the checksum blocks that changed, and header and head if they did, all at once.
    fn write_areas_and_heads(&self) -> Result<(), BlockError> {
        let mut state = self.state.lock();
        let mut writes = Vec::new();
        let mut taken = Vec::new();
        for (nth, chunk) in state.chunks.iter_mut().enumerate() {
            let dirty = chunk.area.as_mut().map(Area::take_dirty);
            let Some(area) = &chunk.area else { continue };
            for at in dirty.unwrap_or_default() {
                let mut buf = AlignedBuf::zeroed(PAGE_SIZE);
                area.encode_block(at, &mut buf);
                writes.push((chunk.area_block(at), buf));
                taken.push((nth, at));
            }
        }
        let fixed = state.fixed_blocks();
        let mut head = state.head;
        head.chunk_count = u32::try_from(state.chunks.len()).unwrap_or(u32::MAX);
        if state.head_dirty || state.head.chunk_count != head.chunk_count {
            head.sequence += 1;
            writes.push((fixed[usize::from(head.slot() > 0)], head.encode()));
        }
        let header_written = state.header.is_dirty();
        if header_written {
            // The new head is not durable yet.
            let durable = state.head.sequence;
            writes.push((fixed[2], state.header.seal(durable)));
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
            if header_written {
                state.header.set_dirty();
            }
        }
        written
    }

    fn write_all(&self, writes: Vec<(VolBlock, AlignedBuf)>) -> Result<(), BlockError> {
        let latch = Arc::new(Latch::new(writes.len()));
        let mut plug = self.mirrors.volume.plug();
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
        let written = try_again(|| self.write_areas_and_heads(), BlockError::may_pass);
        written.map_err(|error| self.named_error(error))?;
        let flushed = self.mirrors.volume.flush_wait();
        flushed.map_err(|error| self.named_error(error))
    }

    /// The error of a page that makes no sense.
    fn senseless(&self, offset: u64, why: &str) -> io::Error {
        let page = offset / PAGE_SIZE as u64;
        let block = {
            let mut state = self.state.lock();
            let chunk = state.chunk_of(page);
            chunk.map(|chunk| chunk.payload_block(page - chunk.first_page))
        };
        let places = block.map_or_else(String::new, |block| self.mirrors.places(block));
        let what = format!(
            "metadata page {page} ({places}) has a right checksum and makes no sense: {why}; run \
             'braidfs fsck -n'"
        );
        io::Error::new(io::ErrorKind::InvalidData, what)
    }

    /// An error for people, with the name of the device.
    fn named_error(&self, error: BlockError) -> io::Error {
        let BlockError { kind, op, dev, at } = error;
        let name = self.mirrors.volume.device_name(dev);
        io::Error::other(format!("{op} on {name} at byte {at}: {kind}"))
    }
}

/// What redb holds.
#[derive(Debug)]
pub(crate) struct MetaStorage(Arc<MetaFile>);

impl MetaStorage {
    /// Refuses a page of redb that makes no sense.
    pub(super) fn check(&self, offset: u64, page: &[u8]) -> io::Result<()> {
        if offset < PAGE_SIZE as u64 {
            return Ok(());
        }
        let geometry = self.0.state.lock().geometry();
        let why = geometry.map_or(Some("the header is not whole"), |geometry| {
            fault(page, offset, &geometry)
        });
        why.map_or(Ok(()), |why| Err(self.0.senseless(offset, why)))
    }

    /// Reads as `read` does, whatever the pages hold.
    pub(super) fn read_unchecked(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.0.state.lock().head.len_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "read beyond the end of the metadata file",
            ));
        }
        let (header, rest) = out.split_at_mut(header_part(offset, out.len()));
        if !header.is_empty() {
            let at = usize::try_from(offset).expect("inside page 0");
            self.0.state.lock().header.read(at, header);
        }
        let offset = offset + header.len() as u64;
        self.0.space().read_wait(offset, rest).map_err(io_error)
    }

    fn resize(&self, len: u64) -> io::Result<()> {
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

    fn overwrite(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (header, rest) = data.split_at(header_part(offset, data.len()));
        if !header.is_empty() {
            let at = usize::try_from(offset).expect("inside page 0");
            self.0.state.lock().header.write(at, header)?;
        }
        if rest.is_empty() {
            return Ok(());
        }
        self.0
            .space()
            .write(offset + header.len() as u64, rest)
            .map_err(|(error, _)| io_error(error))?;
        Ok(())
    }
}

impl redb::StorageBackend for MetaStorage {
    fn len(&self) -> io::Result<u64> {
        outside(|| Ok(self.0.state.lock().head.len_bytes))
    }

    /// A page that makes no sense is refused. Its other copy would be no better: both have the
    /// checksum of this one.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        outside(|| {
            self.read_unchecked(offset, out)?;
            self.check(offset, out)
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        outside(|| self.resize(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        outside(|| self.0.sync())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        outside(|| self.overwrite(offset, data))
    }
}

/// How many of `len` bytes from `offset` on lie in page 0.
fn header_part(offset: u64, len: usize) -> usize {
    let left = (PAGE_SIZE as u64).saturating_sub(offset);
    usize::try_from(left).map_or(len, |left| left.min(len))
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
            let Some(chunk) = state.chunk_of(page) else {
                out.segments.push(Segment {
                    pages: one,
                    kind: SegmentKind::Hole,
                });
                continue;
            };
            let index = page - chunk.first_page;
            let block = chunk.payload_block(index);
            let known = chunk
                .area(&file.mirrors)
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
                    chunk.area(&file.mirrors).map_err(CacheError::Block)?;
                }
            }
        }
        Ok(())
    }

    fn corrupt(&self, _space: u64, page: u64, block: VolBlock, copy: u8) {
        let Ok(file) = self.file() else { return };
        let what = format_args!("metadata page {page}");
        file.mirrors.note_bad(block, copy, what);
        file.mend_later(page);
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
        if let Some(chunk) = state.chunk_of(start)
            && let Some(area) = chunk.area.as_mut()
        {
            let first_page = chunk.first_page;
            for (index, &crc) in (start - first_page..).zip(crcs) {
                area.set(index, Some(crc));
            }
        }
    }
}
