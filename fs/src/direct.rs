//! O_DIRECT: large aligned reads and writes past the cache, kiobufs over private pages.
//!
//! Coherence with the cache: a direct write holds its range exclusively, writes, drops the cached
//! pages of the range, maps, and drops again what a readahead may have fetched through the old map.
//! A direct read is only begun where no page of its range is cached.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use braidfs_blockdev::{BlockError, Class, Kiobuf, VolBlock};
use braidfs_cache::{FrameVec, MapOut, PageRange, Placement, SegmentKind};
use parking_lot::Mutex;

use crate::alloc::Room;
use crate::file::{OpenFile, ReadDone, ReadReply};
use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};
use crate::latch::{Failed, Latch};
use crate::meta::records::Extent;
use crate::range_lock::RangeGuard;
use crate::txg::ReadPass;
use crate::{Errno, Ino, WriteFlags};

impl FileSystem {
    /// Reads `pages` past the cache into `frames`. The reply is sent from the last completion.
    pub(crate) fn read_direct(
        &self,
        inode: &Arc<Inode>,
        len: usize,
        pages: PageRange,
        mut frames: FrameVec,
        done: ReadDone,
    ) {
        let epoch = self.epoch.enter();
        let range = inode.ranges.shared(pages.start * PAGE, pages.end * PAGE);
        let mut map = MapOut::default();
        let mapped = {
            let _map = inode.map.read();
            self.extents(inode.ino).map(pages, &mut map)
        };
        if let Err(error) = mapped {
            return done(Err(error));
        }
        if map
            .segments
            .iter()
            .any(|segment| segment.kind == SegmentKind::Hole)
        {
            frames.slices_mut().for_each(|slice| slice.fill(0));
        }
        let mut lender = frames.lend();
        let mut pieces = Vec::with_capacity(map.segments.len());
        for segment in &map.segments {
            let count = usize::try_from(segment.pages.count()).expect("bounded");
            match segment.kind {
                SegmentKind::Hole => lender.skip(count),
                SegmentKind::Data { block, .. } => {
                    let offset = segment.pages.start * PAGE;
                    pieces.push((block, offset, count, lender.take(count)));
                }
            }
        }
        let read = Arc::new(DirectRead {
            left: AtomicUsize::new(pieces.len() + 1),
            error: Mutex::new(None),
            rest: Mutex::new(Some(DirectRest {
                lender,
                map,
                len,
                volume: Arc::clone(&self.volume),
                ino: inode.ino,
                done,
                _range: range,
                _epoch: epoch,
            })),
        });
        let mut plug = self.volume.plug();
        for (block, offset, count, lent) in pieces {
            let read = Arc::clone(&read);
            let end_io = Box::new(move |completion: braidfs_blockdev::Completion| {
                drop(completion.pages);
                read.end(completion.error);
            });
            let bytes = count * usize::try_from(PAGE).expect("a page is small");
            let kiobuf = Kiobuf::new(lent, 0, bytes, end_io).of_file(inode.ino, offset);
            plug.read(block, kiobuf, None, Class::Sync);
        }
        plug.finish();
        read.end(None);
    }

    /// Page-aligned private pages for [`FileSystem::write_pages`].
    pub fn alloc_pages(&self, len: usize) -> Result<FrameVec, Errno> {
        self.cache.alloc_private(len).ok_or(Errno::NOMEM)
    }

    /// Writes the caller's own pages, past the cache: no byte is copied on the way to the
    /// devices. `offset` and the length are multiples of the page size. Waits for the devices.
    pub fn write_pages(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        frames: FrameVec,
        flags: WriteFlags,
    ) -> Result<u32, Errno> {
        let len = frames.len();
        self.check_write(file, offset, len, flags)?;
        if !offset.is_multiple_of(PAGE) || !(len as u64).is_multiple_of(PAGE) {
            return Err(Errno::INVAL);
        }
        let Some(pages) = PageRange::covering(offset, len as u64) else {
            return Ok(0);
        };
        let inode = &file.inode;
        self.balance_group()?;
        self.check_meta_room_of(inode, pages)?;
        let (count, room) = match self.reserve_pages(inode, pages, false) {
            Err(Errno::NOSPC) if pages.count() > 1 => {
                // The cache takes what there is room for.
                return self.write_slices(file, offset, &frames, flags);
            }
            reserved => reserved?,
        };
        let crcs = checksums(&frames);
        let pass = self.gate.enter();
        let range = inode.ranges.exclusive(offset, offset + len as u64);
        let homes = self.direct_homes(inode, pages, room);
        let homes = homes.inspect_err(|_| self.space.unreserve(count))?;
        let written = self
            .write_homes(inode.ino, frames, &homes)
            .map_err(|failed| {
                let error = failed.error;
                log::error!("inode {}: direct write at {offset}: {error}", inode.ino);
                for in_doubt in failed.in_doubt {
                    for home in &homes {
                        let (start, len) = (home.block.0, home.pages.count());
                        self.space.doubt(start, len, in_doubt.clone());
                    }
                }
                Errno(error.errno())
            });
        let mapped = match written {
            Ok(()) => {
                // Not before the new bytes are there: a write that fails loses no older one.
                self.discard_pages(inode, pages.start, pages.end);
                let mapped = self.map_homes(inode, &homes, &crcs);
                self.discard_pages(inode, pages.start, pages.end);
                mapped
            }
            Err(error) => {
                for home in &homes {
                    if !self.is_set_aside(inode, home.pages.start, home.block) {
                        self.space.unallocate(home.block.0, home.pages.count());
                    }
                }
                self.space.unreserve(count);
                Err(error)
            }
        };
        mapped?;
        self.note_written(inode, offset + len as u64, flags);
        drop((range, pass));
        Ok(u32::try_from(len).expect("bounded by IO_BYTES_MAX"))
    }

    fn write_slices(
        &self,
        file: &Arc<OpenFile>,
        offset: u64,
        frames: &FrameVec,
        flags: WriteFlags,
    ) -> Result<u32, Errno> {
        let mut done = 0;
        for slice in frames.slices() {
            match self.write_cached(file, offset + u64::from(done), slice.into(), flags) {
                Ok(count) => done += count,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Homes for pages that are written past the cache. The caller holds the range exclusively.
    fn direct_homes(
        &self,
        inode: &Arc<Inode>,
        pages: PageRange,
        room: Room,
    ) -> Result<Vec<Placement>, Errno> {
        if room == Room::Rewrite && !self.is_mapped(inode, pages)? {
            return Err(Errno::NOSPC);
        }
        // A page's write-back may be on its way to the very block that is set aside for it.
        let unclean = self.pages(inode).unclean_runs(pages, 1);
        let in_place = unclean.is_none_or(|runs| runs.is_empty());
        let mut homes = Vec::with_capacity(2);
        self.place(inode, &[pages], in_place, &mut homes)?;
        Ok(homes)
    }

    fn map_homes(
        &self,
        inode: &Arc<Inode>,
        homes: &[Placement],
        crcs: &[u32],
    ) -> Result<(), Errno> {
        let mut crcs = crcs;
        for home in homes {
            let len = home.pages.count();
            let (now, later) = crcs.split_at(usize::try_from(len).expect("bounded"));
            crcs = later;
            self.map_written(
                inode,
                &Extent {
                    start: home.pages.start,
                    len,
                    block: home.block.0,
                    crcs: now.to_vec(),
                },
            )?;
        }
        Ok(())
    }

    /// Writes private pages to their homes and waits for them.
    fn write_homes(&self, ino: Ino, frames: FrameVec, homes: &[Placement]) -> Result<(), Failed> {
        let latch = Arc::new(Latch::new(homes.len()));
        let mut lender = frames.lend();
        let mut plug = self.volume.plug();
        for home in homes {
            let count = usize::try_from(home.pages.count()).expect("bounded");
            let ended = Arc::clone(&latch);
            let end_io = Box::new(move |completion| ended.end(completion));
            let bytes = count * usize::try_from(PAGE).expect("a page is small");
            let offset = home.pages.start * PAGE;
            let kiobuf = Kiobuf::new(lender.take(count), 0, bytes, end_io).of_file(ino, offset);
            plug.write(home.block, kiobuf, Class::Sync);
        }
        plug.finish();
        latch.wait()
    }
}

/// CRC32C of each page.
fn checksums(frames: &FrameVec) -> Vec<u32> {
    let page = usize::try_from(PAGE).expect("a page is small");
    frames
        .slices()
        .flat_map(|slice| slice.chunks(page))
        .map(crc32c::crc32c)
        .collect()
}

/// A direct read under way.
struct DirectRead {
    left: AtomicUsize,
    error: Mutex<Option<BlockError>>,
    rest: Mutex<Option<DirectRest>>,
}

struct DirectRest {
    lender: braidfs_cache::Lender,
    map: MapOut,
    len: usize,
    volume: Arc<braidfs_blockdev::Volume>,
    ino: Ino,
    done: ReadDone,
    _range: RangeGuard,
    _epoch: ReadPass,
}

impl DirectRead {
    /// One piece ended (or the submission did). The last one verifies and replies.
    fn end(&self, error: Option<BlockError>) {
        if let Some(error) = error {
            self.error.lock().get_or_insert(error);
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let Some(rest) = self.rest.lock().take() else {
            return;
        };
        let error = *self.error.lock();
        rest.finish(error);
    }
}

impl DirectRest {
    fn finish(self, error: Option<BlockError>) {
        if let Some(error) = error {
            log::error!("inode {}: direct read: {error}", self.ino);
            return (self.done)(Err(Errno(error.errno())));
        }
        let Some(frames) = self.lender.finish() else {
            log::error!("inode {}: direct read: pages still lent out", self.ino);
            return (self.done)(Err(Errno::IO));
        };
        if let Some(block) = first_mismatch(&frames, &self.map) {
            let place = self.volume.locate(block, 0);
            let (device, at) = place.map_or((String::new(), 0), |(device, at)| {
                (self.volume.device_name(device), at)
            });
            log::error!(
                "inode {}: block {} on {device} at {at:#x} does not match its checksum",
                self.ino,
                block.0
            );
            return (self.done)(Err(Errno::IO));
        }
        (self.done)(Ok(ReadReply::private(frames, self.len)));
    }
}

/// The first block whose bytes do not match its checksum.
fn first_mismatch(frames: &FrameVec, map: &MapOut) -> Option<VolBlock> {
    let page = usize::try_from(PAGE).expect("a page is small");
    let mut pages = frames.slices().flat_map(|slice| slice.chunks(page));
    for segment in &map.segments {
        for nth in 0..segment.pages.count() {
            let bytes = pages.next()?;
            if let SegmentKind::Data {
                block,
                crc_index: Some(index),
            } = segment.kind
            {
                let at = index + usize::try_from(nth).expect("bounded");
                if map.crcs.get(at) != Some(&crc32c::crc32c(bytes)) {
                    return Some(VolBlock(block.0 + nth));
                }
            }
        }
    }
    None
}
