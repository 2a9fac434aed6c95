//! Opening, reading and writing files.
//!
//! Reads and writes go through the page cache. A large aligned read or write for which the caller
//! asked O_DIRECT goes past it, see [`crate::direct`].
//!
//! Invariant: bytes behind the end of file are zero in the last page, in memory and on disk. So
//! growing a file needs no zeroing, and shrinking one zeroes the tail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use braidfs_blockdev::trace::{self, Kind};
use braidfs_cache::{CacheError, FrameVec, PageRange, ReadData, ReadaheadState};

use crate::alloc::Room;
use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};
use crate::{Errno, FILE_SIZE_MAX, Ino, Timestamp, WriteFlags};

/// Direct I/O smaller than this goes through the cache.
const DIRECT_BYTES_MIN: usize = 64 << 10;

/// Largest read or write in one call, in bytes.
pub const IO_BYTES_MAX: usize = 16 << 20;

/// One open of a file.
pub struct OpenFile {
    pub(crate) inode: Arc<Inode>,
    flags: i32,
    readahead: ReadaheadState,
    /// Write errors up to this point have been reported through this open file.
    seen_error: AtomicU32,
}

impl OpenFile {
    /// The inode that is open.
    pub fn ino(&self) -> Ino {
        self.inode.ino
    }

    /// Whether a write is durable when it returns.
    pub(crate) fn is_synchronous(&self) -> bool {
        self.flags & (libc::O_SYNC | libc::O_DSYNC) != 0
    }

    /// open(2) flags.
    pub fn flags(&self) -> i32 {
        self.flags
    }

    /// Notes that a cache in front of the core reads pages of the inode.
    pub fn note_cached_in_front(&self) {
        let noted = &self.inode.cached_in_front;
        if !noted.load(Ordering::Relaxed) {
            noted.store(true, Ordering::SeqCst);
        }
    }

    /// Whether a cache in front of the core may have pages that it read.
    pub fn is_cached_in_front(&self) -> bool {
        self.inode.cached_in_front.load(Ordering::SeqCst)
    }

    /// Whether anybody has the inode open for writing, so that a cache in front of the core may
    /// hold bytes that it does not know of.
    pub fn has_writers(&self) -> bool {
        self.inode.writers.load(Ordering::SeqCst) > 0
    }
}

pub(crate) fn may_write(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// What a read returns: pinned pages, in order.
pub struct ReadReply(Pages);

enum Pages {
    Nothing,
    Cached(ReadData),
    /// Pages past the cache, and how many bytes of them were asked for.
    Private(FrameVec, usize),
}

impl ReadReply {
    /// `len` bytes of private pages.
    pub(crate) fn private(frames: FrameVec, len: usize) -> Self {
        Self(Pages::Private(frames, len))
    }

    /// The private pages, if it is those.
    pub(crate) fn into_private(self) -> Option<FrameVec> {
        match self.0 {
            Pages::Private(frames, _) => Some(frames),
            _ => None,
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        match &self.0 {
            Pages::Nothing => 0,
            Pages::Cached(data) => data.len(),
            Pages::Private(_, len) => *len,
        }
    }

    /// Whether there is nothing (end of file).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pieces in file order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let (cached, private) = match &self.0 {
            Pages::Nothing => (None, None),
            Pages::Cached(data) => (Some(data.slices()), None),
            Pages::Private(frames, len) => (None, Some(clipped(frames, *len))),
        };
        cached
            .into_iter()
            .flatten()
            .chain(private.into_iter().flatten())
    }

    /// The whole as one piece, where it is one.
    pub fn as_single(&self) -> Option<&[u8]> {
        match &self.0 {
            Pages::Nothing => Some(&[]),
            Pages::Cached(data) => data.as_single(),
            Pages::Private(..) => {
                let mut slices = self.slices();
                let first = slices.next()?;
                slices.next().is_none().then_some(first)
            }
        }
    }
}

/// What a write brings.
pub enum WriteData<'a> {
    /// Bytes, to be copied.
    Bytes(&'a [u8]),
    /// Bytes at the beginning of private pages, of [`FileSystem::alloc_landing`]. If they are all
    /// of these pages, the pages may be taken over, and nothing is left here.
    Landed(&'a mut Option<FrameVec>, usize),
}

impl<'a> From<&'a [u8]> for WriteData<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl WriteData<'_> {
    /// The bytes; none once the pages have been taken over.
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Landed(frames, len) => {
                let landed = frames.as_ref().and_then(FrameVec::as_single);
                landed.and_then(|bytes| bytes.get(..*len)).unwrap_or(&[])
            }
        }
    }

    /// Takes the pages over, if the bytes are all of them.
    fn take_pages(&mut self) -> Option<FrameVec> {
        match self {
            Self::Landed(frames, len) => frames.take_if(|frames| frames.len() == *len),
            Self::Bytes(_) => None,
        }
    }
}

/// Pages with these bytes in them, which are as many.
fn filled(mut frames: FrameVec, bytes: &[u8]) -> FrameVec {
    let mut rest = bytes;
    for slice in frames.slices_mut() {
        let (now, later) = rest.split_at(slice.len().min(rest.len()));
        slice[..now.len()].copy_from_slice(now);
        rest = later;
    }
    frames
}

/// The first `len` bytes.
fn clipped(frames: &FrameVec, len: usize) -> impl Iterator<Item = &[u8]> {
    let mut left = len;
    frames.slices().map_while(move |slice| {
        let take = slice.len().min(left);
        left -= take;
        (take > 0).then(|| &slice[..take])
    })
}

/// Called once with the outcome of a read, maybe before the call returns, maybe on another thread.
pub type ReadDone = Box<dyn FnOnce(Result<ReadReply, Errno>) + Send>;
/// Called once with the bytes written, maybe before the call returns, maybe on another thread.
pub type WriteDone = Box<dyn FnOnce(Result<u32, Errno>) + Send>;

pub(crate) fn errno(error: CacheError) -> Errno {
    Errno(error.errno())
}

impl FileSystem {
    /// Opens a file. Permission is the kernel's business.
    pub fn open(&self, ino: Ino, flags: i32) -> Result<Arc<OpenFile>, Errno> {
        let inode = self.inode(ino)?;
        crate::flags::check_open(&inode.state.lock().attr, flags)?;
        if may_write(flags) {
            self.check_may_write()?;
        }
        Ok(self.open_inode(&inode, flags))
    }

    pub(crate) fn open_inode(&self, inode: &Arc<Inode>, flags: i32) -> Arc<OpenFile> {
        inode.opens.fetch_add(1, Ordering::SeqCst);
        let seen = inode.space().map_or(0, |space| space.write_error_seq());
        let file = OpenFile {
            inode: Arc::clone(inode),
            flags,
            readahead: ReadaheadState::new(),
            seen_error: AtomicU32::new(seen),
        };
        if may_write(file.flags) {
            inode.writers.fetch_add(1, Ordering::SeqCst);
        }
        Arc::new(file)
    }

    /// The last close of an open file.
    pub fn release(&self, file: &Arc<OpenFile>) {
        let inode = &file.inode;
        if may_write(file.flags) {
            inode.writers.fetch_sub(1, Ordering::SeqCst);
        }
        if inode.opens.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.maybe_reclaim(inode);
        }
    }

    /// close(2): reports write errors not yet reported to this open file.
    pub fn flush(&self, file: &OpenFile) -> Result<(), Errno> {
        self.report_errors(file)
    }

    fn report_errors(&self, file: &OpenFile) -> Result<(), Errno> {
        let Some(space) = file.inode.space() else {
            return Ok(());
        };
        let now = space.write_error_seq();
        if file.seen_error.swap(now, Ordering::SeqCst) == now {
            return Ok(());
        }
        Err(space.last_write_error().map_or(Errno::IO, errno))
    }

    /// Waits until the file's data and metadata are durable; reports write errors once.
    pub fn fsync(&self, file: &OpenFile, _datasync: bool) -> Result<(), Errno> {
        let since = trace::now();
        let committed = self.make_durable(&file.inode);
        trace::waited(Kind::Durable, since);
        self.report_errors(file)?;
        committed
    }

    /// Waits until a directory's entries are durable.
    pub fn fsync_dir(&self, ino: Ino) -> Result<(), Errno> {
        let inode = self.inode(ino)?;
        let since = trace::now();
        let committed = self.make_durable(&inode);
        trace::waited(Kind::Durable, since);
        committed
    }

    fn make_durable(&self, inode: &Inode) -> Result<(), Errno> {
        if self.is_read_only() {
            return Ok(());
        }
        let clean = inode
            .space()
            .is_none_or(|space| space.dirty_page_count() == 0);
        if clean
            && self
                .committer
                .is_durable(inode.changed_in.load(Ordering::SeqCst))
            && !self.failed.load(Ordering::SeqCst)
        {
            return Ok(());
        }
        self.commit_durably()
    }

    /// Reads up to `len` bytes at `offset`. `direct`: the caller wants the device's bytes without
    /// filling the cache; taken as a hint.
    pub fn read(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        len: usize,
        direct: bool,
        done: ReadDone,
    ) {
        let inode = &file.inode;
        let attr = inode.state.lock().attr;
        if attr.is_dir() {
            return done(Err(Errno::ISDIR));
        }
        let size = attr.size;
        if len > 0 {
            // Also where there is nothing to be read.
            self.touch_accessed(inode, &attr);
        }
        if offset >= size || len == 0 {
            return done(Ok(ReadReply(Pages::Nothing)));
        }
        let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
        let len = len.min(left).min(IO_BYTES_MAX);
        let space = self.pages(inode);
        if direct && len >= DIRECT_BYTES_MIN && offset.is_multiple_of(PAGE) {
            let pages = PageRange::covering(offset, len as u64).expect("not empty");
            if !space.has_pages(pages) {
                let bytes = usize::try_from(pages.count() * PAGE).expect("bounded by IO_BYTES_MAX");
                return match self.cache.alloc_private(bytes) {
                    Some(frames) => self.read_direct(inode, len, pages, frames, done),
                    None => done(Err(Errno::NOMEM)),
                };
            }
        }
        if let Some(data) = space.read_cached(offset, len, &file.readahead) {
            return done(Ok(ReadReply(Pages::Cached(data))));
        }
        let done = move |result: Result<ReadData, CacheError>| {
            done(
                result
                    .map(|data| ReadReply(Pages::Cached(data)))
                    .map_err(errno),
            );
        };
        space.read(offset, len, &file.readahead, size, Box::new(done));
    }

    /// Pages of [`LANDING_BYTES`] for the data of a write to come to lie in; `None` if memory is
    /// short.
    ///
    /// [`LANDING_BYTES`]: braidfs_cache::LANDING_BYTES
    pub fn alloc_landing(&self) -> Option<FrameVec> {
        self.cache.alloc_landing()
    }

    /// Writes `data` at `offset`. Reserves space first, so that a full volume is this call's
    /// error.
    pub fn write<'a>(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        data: impl Into<WriteData<'a>>,
        direct: bool,
        flags: WriteFlags,
        done: WriteDone,
    ) {
        let mut data = data.into();
        let len = data.bytes().len();
        let written = if direct
            && len >= DIRECT_BYTES_MIN
            && offset.is_multiple_of(PAGE)
            && (len as u64).is_multiple_of(PAGE)
        {
            let pages = match data.take_pages() {
                Some(frames) => Ok(frames),
                None => self
                    .alloc_pages(len)
                    .map(|frames| filled(frames, data.bytes())),
            };
            pages.and_then(|frames| self.write_pages(file, offset, frames, flags))
        } else {
            self.write_cached(file, offset, data, flags)
        };
        let written = written.and_then(|count| {
            let asked = flags.durable || file.is_synchronous();
            let durable = self.options.sync || asked || file.inode.is_sync();
            if durable && !flags.from_kernel_cache {
                self.fsync(file, true)?;
            }
            Ok(count)
        });
        done(written);
    }

    pub(crate) fn check_write(
        &self,
        file: &OpenFile,
        offset: u64,
        len: usize,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        self.check_writable()?;
        let attr = file.inode.state.lock().attr;
        if attr.is_dir() {
            return Err(Errno::ISDIR);
        }
        // No kernel asks for that: it opens devices and pipes itself.
        if !attr.is_file() {
            return Err(Errno::INVAL);
        }
        // What the kernel has in its cache was written before.
        if !flags.from_kernel_cache {
            crate::flags::check_grow(&attr)?;
        }
        match offset.checked_add(len as u64) {
            Some(end) if end <= FILE_SIZE_MAX && len <= IO_BYTES_MAX => Ok(()),
            _ => Err(Errno::FBIG),
        }
    }

    /// Writes through the cache; less than all when the volume fills up, unless the kernel has
    /// the pages and could not tell anybody.
    pub(crate) fn write_cached(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        mut data: WriteData<'_>,
        flags: WriteFlags,
    ) -> Result<u32, Errno> {
        let len = data.bytes().len();
        self.check_write(file, offset, len, flags)?;
        let mut done = 0;
        while done < len {
            match self.write_piece(file, offset, &mut data, done, flags) {
                Ok(count) => done += count,
                Err(_) if done > 0 && !flags.from_kernel_cache => break,
                Err(error) => return Err(error),
            }
        }
        Ok(u32::try_from(done).expect("bounded by IO_BYTES_MAX"))
    }

    /// Writes as much of `data`, whose first `done` bytes are written, and not all, as blocks can
    /// be set aside for at once. `offset` is where the whole belongs.
    fn write_piece(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        data: &mut WriteData<'_>,
        done: usize,
        flags: WriteFlags,
    ) -> Result<usize, Errno> {
        let offset = offset + done as u64;
        let left = data.bytes().len() - done;
        let pages = PageRange::covering(offset, left as u64).ok_or(Errno::FBIG)?;
        let inode = &file.inode;
        self.cache.balance_dirty();
        self.balance_group()?;
        self.check_meta_room_of(inode, pages)?;
        let (count, room) = self.reserve_pages(inode, pages, true)?;
        let pages = PageRange {
            start: pages.start,
            end: pages.start + count,
        };
        let len = match usize::try_from(pages.end * PAGE - offset) {
            Ok(len) if len < left => len,
            _ => left,
        };
        let end = offset + len as u64;
        let pass = self.gate.enter();
        let range = inode.ranges.shared(offset, end);
        if room == Room::Rewrite && self.is_mapped(inode, pages) != Ok(true) {
            // Somebody punched a hole meanwhile.
            self.space.unreserve(count);
            return Ok(0);
        }
        let landed = if done == 0 && len == left && offset.is_multiple_of(PAGE) {
            data.take_pages()
        } else {
            None
        };
        let space = self.pages(inode);
        let result = match landed {
            Some(frames) => space.adopt(pages.start, frames),
            None => space.write(offset, &data.bytes()[done..done + len]),
        };
        let (outcome, error) = match result {
            Ok(outcome) => (outcome, None),
            Err((error, outcome)) => (outcome, Some(error)),
        };
        self.space.unreserve(count - outcome.newly_dirty_pages);
        if let Some(error) = error {
            return Err(errno(error));
        }
        self.note_written(inode, end, flags);
        drop((range, pass));
        Ok(len)
    }

    /// Size, times and set-id bits after a write that ended at `end`.
    pub(crate) fn note_written(&self, inode: &Arc<Inode>, end: u64, flags: WriteFlags) {
        // What comes from the kernel's cache was written, as far as rights go, when it got there.
        if !flags.from_kernel_cache {
            self.drop_capabilities(inode);
        }
        {
            let mut state = inode.state.lock();
            let attr = &mut state.attr;
            attr.size = attr.size.max(end);
            if !flags.from_kernel_cache {
                let now = Timestamp::now();
                attr.mtime = now;
                attr.ctime = now;
            }
            if flags.kill_suidgid {
                attr.mode = crate::attributes::without_set_ids(attr.mode);
            }
        }
        self.mark_dirty(inode);
    }
}
