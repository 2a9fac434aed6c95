//! One pass: labels, metadata, data.
//!
//! A step reads a few MiB at the most and then looks for orders and at the rate. Of data, a step
//! enters the read epoch before it looks at the extents: blocks that are freed meanwhile are not
//! used again until it leaves, so what it reads is what the extents say, or it is damage.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use braidfs_blockdev::{
    AlignedBuf, BLOCK_SIZE, BlockError, Class, Completion, Kiobuf, LabelFault, PAGE_SIZE, VolBlock,
};
use parking_lot::Mutex;

use super::{Order, SAVE_INTERVAL, SCRUB_ERRORS_MAX, ScrubError};
use crate::filesystem::FileSystem;
use crate::meta::mirrors::BadBlock;
use crate::meta::records::{Extent, key_u64, pair_key};
use crate::meta::store::Table;
use crate::meta::verify::{Probe, STEP_PAGES, Seen, Trust};
use crate::{Errno, Ino};

/// Data that one step reads: it lies in memory at the same time.
const STEP_BLOCKS: u64 = (4 << 20) / BLOCK_SIZE;
/// Extents that one step looks at.
const STEP_EXTENTS: usize = 4096;
/// Pages that are looked into together when it is in doubt whether they are in use.
const SUSPECTS_MAX: usize = 1 << 16;
/// Behind all keys of extents.
const LAST: [u8; 17] = [0xff; 17];

/// A file with bad blocks: inode, and block of the file, by index of the error.
type BadData = BTreeMap<usize, (Ino, u64)>;

struct Pass<'a> {
    fs: &'a FileSystem,
    /// When the next step may begin, at the rate asked for.
    next: Instant,
    saved: Instant,
    bad_data: BadData,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl FileSystem {
    /// Bytes that a pass is to read, about.
    pub(super) fn scrub_total_bytes(&self) -> u64 {
        let space = self.space.stats();
        let used = space.chunk_blocks - space.free_blocks.min(space.chunk_blocks);
        used * BLOCK_SIZE + 2 * self.meta.written_bytes() + self.volume.label_bytes()
    }

    /// A pass from where the record says.
    pub(super) fn scrub_pass(&self, since_mount: bool) -> Result<Order, String> {
        let mut pass = Pass {
            fs: self,
            next: Instant::now(),
            saved: Instant::now(),
            bad_data: BadData::new(),
        };
        if since_mount {
            for fault in self.volume.mended_labels() {
                pass.note_label(&fault, true);
            }
            for bad in self.meta.mended_since_mount() {
                pass.note(bad);
            }
        }
        let order = pass.run();
        pass.name_files();
        order
    }
}

impl Pass<'_> {
    fn run(&mut self) -> Result<Order, String> {
        let fs = self.fs;
        if fs.scrub_summary().position.0 == 0 {
            // What the journal holds is in no table yet, and so out of reach.
            if !fs.is_read_only() && fs.store.has_journaled() {
                fs.commit_now().map_err(text)?;
            }
            self.labels().map_err(text)?;
            fs.meta.hold_mending(true);
            let order = self.metadata();
            fs.meta.hold_mending(false);
            match order? {
                Order::GoOn => self.move_to((1, 0)),
                order => return Ok(order),
            }
        }
        loop {
            let mut bytes = 0;
            let at = fs.scrub_summary().position;
            let next = self.data_step(at, &mut bytes).map_err(text)?;
            fs.scrubber
                .update(|status| status.summary.data_bytes += bytes);
            let Some(next) = next else {
                return Ok(Order::GoOn);
            };
            self.move_to(next);
            match self.pace(bytes) {
                Order::GoOn => {}
                order => return Ok(order),
            }
        }
    }

    fn move_to(&mut self, position: (u64, u64)) {
        let scrubber = &self.fs.scrubber;
        scrubber.update(|status| status.summary.position = position);
        if self.saved.elapsed() >= SAVE_INTERVAL {
            self.saved = Instant::now();
            self.fs.save_scrub();
        }
    }

    /// Waits as the rate demands after `bytes` were read; gives the order to follow.
    fn pace(&mut self, bytes: u64) -> Order {
        let rate = self.fs.scrub_summary().rate_bytes;
        if rate == 0 {
            return self.fs.scrubber.wait_until(Instant::now());
        }
        // Time not used is not made up for.
        let micros = u128::from(bytes) * 1_000_000 / u128::from(rate);
        let pause = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        self.next = self.next.max(Instant::now() - Duration::from_millis(100)) + pause;
        self.fs.scrubber.wait_until(self.next)
    }

    fn add(&mut self, error: ScrubError, data: Option<(Ino, u64)>) {
        let index = self.fs.scrubber.update(|status| {
            let summary = &mut status.summary;
            summary.found += 1;
            if error.repaired {
                summary.repaired += 1;
            } else {
                summary.left += 1;
            }
            let room = status.errors.len() < SCRUB_ERRORS_MAX;
            room.then(|| {
                status.errors.push(error);
                status.errors.len() - 1
            })
        });
        if let (Some(index), Some(data)) = (index, data) {
            self.bad_data.insert(index, data);
        }
    }

    fn error_at(&self, block: VolBlock, copy: u8, what: String, repaired: bool) -> ScrubError {
        let volume = &self.fs.volume;
        let (device, offset_bytes) = match volume.locate(block, copy) {
            Some((dev, at)) => (volume.device_name(dev), at),
            None => ("no device".to_owned(), block.bytes()),
        };
        ScrubError {
            device,
            offset_bytes,
            what,
            repaired,
            ino: None,
            file_offset_bytes: None,
            paths: Vec::new(),
        }
    }

    /// Bad copies of metadata, each an error of its own.
    fn note(&mut self, bad: BadBlock) {
        for (copy, repaired) in bad.copies {
            let error = self.error_at(bad.block, copy, bad.what.clone(), repaired);
            self.add(error, None);
        }
    }

    fn note_label(&mut self, fault: &LabelFault, repaired: bool) {
        let error = ScrubError {
            device: self.fs.volume.device_name(fault.dev),
            offset_bytes: fault.offset,
            what: fault.to_string(),
            repaired,
            ino: None,
            file_offset_bytes: None,
            paths: Vec::new(),
        };
        if !repaired {
            log::error!("{} at byte {}: {fault}", error.device, error.offset_bytes);
        }
        self.add(error, None);
    }

    fn labels(&mut self) -> Result<(), BlockError> {
        let volume = Arc::clone(&self.fs.volume);
        let faults = volume.check_labels();
        let left = if self.fs.scrub_summary().repair && !faults.is_empty() {
            volume.mend_labels()?
        } else {
            faults.clone()
        };
        let place = |fault: &LabelFault| (fault.dev, fault.offset);
        for fault in &faults {
            let repaired = left.iter().all(|other| place(other) != place(fault));
            self.note_label(fault, repaired);
        }
        let bytes = volume.label_bytes();
        let scrubber = &self.fs.scrubber;
        scrubber.update(|status| status.summary.metadata_bytes += bytes);
        Ok(())
    }

    /// Takes in what a step saw; gives the order to follow.
    fn take(&mut self, seen: Seen, suspects: &mut BTreeSet<u64>) -> Order {
        let scrubber = &self.fs.scrubber;
        scrubber.update(|status| status.summary.metadata_bytes += seen.bytes);
        for bad in seen.bad {
            self.note(bad);
        }
        suspects.extend(seen.suspects);
        self.pace(seen.bytes)
    }

    fn metadata(&mut self) -> Result<Order, String> {
        let meta = Arc::clone(&self.fs.meta);
        let repair = self.fs.scrub_summary().repair;
        let mut suspects = BTreeSet::new();
        let seen = meta.check_fixed(repair);
        self.take(seen, &mut suspects);
        let mut at = 0;
        while at < meta.area_blocks() {
            let seen = meta.check_area(at, repair).map_err(text)?;
            match self.take(seen, &mut suspects) {
                Order::GoOn => at += 1,
                order => return Ok(order),
            }
        }
        let mut page = 0;
        while page < meta.page_count() {
            let to = page + STEP_PAGES;
            let seen = meta
                .check_pages(page, to, Trust::Unknown, repair)
                .map_err(text)?;
            match self.take(seen, &mut suspects) {
                Order::GoOn => page = to,
                order => return Ok(order),
            }
            if suspects.len() >= SUSPECTS_MAX {
                self.settle(std::mem::take(&mut suspects), repair)?;
            }
        }
        self.settle(suspects, repair)?;
        if repair {
            self.fs.volume.flush_wait().map_err(text)?;
        }
        Ok(Order::GoOn)
    }

    /// Which of these pages are in use is found out by reading all that the durable state refers
    /// to. What is wrong with the others does not count; where it can, it is put right.
    fn settle(&mut self, suspects: BTreeSet<u64>, repair: bool) -> Result<(), String> {
        if suspects.is_empty() {
            return Ok(());
        }
        let meta = Arc::clone(&self.fs.meta);
        let met = Arc::new(Mutex::new(BTreeSet::new()));
        let walked = self
            .fs
            .store
            .walk(|| Probe::new(&meta, suspects.clone(), &met));
        if let Err(error) = walked {
            log::error!("metadata could not be read as a whole: {error}");
        }
        let met = std::mem::take(&mut *met.lock());
        for page in suspects {
            if met.contains(&page) {
                let seen = meta
                    .check_pages(page, page + 1, Trust::InUse, repair)
                    .map_err(text)?;
                self.take(seen, &mut BTreeSet::new());
            } else if repair {
                meta.make_alike(page).map_err(text)?;
            }
        }
        Ok(())
    }

    /// Verifies the extents from `at` on, a few MiB of them; gives where the next step begins.
    fn data_step(&mut self, at: (u64, u64), read: &mut u64) -> Result<Option<(u64, u64)>, Errno> {
        let fs = self.fs;
        let _reading = fs.epoch.enter();
        let (mut extents, mut damaged) = (Vec::new(), Vec::new());
        let (mut blocks, mut count, mut next) = (0, 0, None);
        let from = pair_key(at.0, at.1);
        fs.store
            .scan(Table::Extents, &from, &LAST, &mut |key, value| {
                let (ino, start) = (key_u64(key, 0).unwrap_or(0), key_u64(key, 8).unwrap_or(0));
                if blocks >= STEP_BLOCKS || count >= STEP_EXTENTS {
                    next = Some((ino, start));
                    return false;
                }
                count += 1;
                match Extent::decode(start, value) {
                    Some(extent) if extent.unwritten() => {}
                    Some(extent) => {
                        blocks += extent.len;
                        extents.push((ino, extent));
                    }
                    None => damaged.push((ino, start)),
                }
                true
            })?;
        for (ino, start) in damaged {
            let what = "the record of an extent".to_owned();
            let mut error = self.error_at(VolBlock(0), u8::MAX, what, false);
            (error.ino, error.file_offset_bytes) =
                (Some(ino), Some(start.saturating_mul(BLOCK_SIZE)));
            log::error!("inode {ino}: an extent record is damaged; run 'braidfs fsck -n'");
            self.add(error, Some((ino, start)));
        }
        *read = blocks * BLOCK_SIZE;
        for (index, result) in self.read_all(&extents) {
            let (ino, extent) = &extents[index];
            self.verify(*ino, extent, result.ok().as_deref());
        }
        Ok(next)
    }

    /// Reads the blocks of all extents at once.
    fn read_all(&self, extents: &[(Ino, Extent)]) -> Vec<(usize, Result<AlignedBuf, BlockError>)> {
        let (to, from) = channel();
        let mut plug = self.fs.volume.plug();
        for (index, (_, extent)) in extents.iter().enumerate() {
            let len = extent.crcs.len() * PAGE_SIZE;
            let to = to.clone();
            let end_io = Box::new(move |done: Completion| {
                let result = match (done.error, done.pages.map(AlignedBuf::from_pages)) {
                    (Some(error), _) => Some(Err(error)),
                    (None, Some(Ok(buf))) => Some(Ok(buf)),
                    (None, _) => None,
                };
                // The receiver waits for all of them.
                to.send((index, result)).unwrap_or_default();
            });
            let kiobuf = Kiobuf::new(Box::new(AlignedBuf::zeroed(len)), 0, len, end_io);
            plug.read(VolBlock(extent.block), kiobuf, None, Class::Background);
        }
        plug.finish();
        drop(to);
        // Bounded by the block layer: every kiobuf ends, and lets go of its sender.
        from.iter()
            .filter_map(|(index, result)| Some((index, result?)))
            .collect()
    }

    /// Compares an extent's blocks with their checksums. What does not match, or could not be read
    /// as a whole, is read once more, block by block.
    fn verify(&mut self, ino: Ino, extent: &Extent, bytes: Option<&[u8]>) {
        let volume = Arc::clone(&self.fs.volume);
        for (nth, &crc) in (0..).zip(&extent.crcs) {
            let within =
                usize::try_from(nth).expect("an extent with checksums is short") * PAGE_SIZE;
            let block = bytes.and_then(|bytes| bytes.get(within..within + PAGE_SIZE));
            if block.is_some_and(|block| crc32c::crc32c(block) == crc) {
                continue;
            }
            let place = VolBlock(extent.block).plus(nth);
            let again = volume.read_wait(place, AlignedBuf::zeroed(PAGE_SIZE), None);
            let why = match again {
                Ok(block) if crc32c::crc32c(&block) == crc => continue,
                Ok(_) => "does not match its checksum".to_owned(),
                Err(error) => format!("cannot be read ({:?})", error.kind),
            };
            let mut error = self.error_at(place, 0, format!("data that {why}"), false);
            let file_block = extent.start + nth;
            error.ino = Some(ino);
            error.file_offset_bytes = Some(file_block.saturating_mul(BLOCK_SIZE));
            log::error!(
                "{} at byte {}: data of inode {ino} at {}: {why}",
                error.device,
                error.offset_bytes,
                file_block.saturating_mul(BLOCK_SIZE)
            );
            self.add(error, Some((ino, file_block)));
        }
    }

    /// Finds the names of the files with bad blocks.
    fn name_files(&mut self) {
        let bad = std::mem::take(&mut self.bad_data);
        let inos: BTreeSet<Ino> = bad.values().map(|&(ino, _)| ino).collect();
        if inos.is_empty() {
            return;
        }
        let paths = match self.fs.paths_of(&inos) {
            Ok(paths) => paths,
            Err(error) => {
                return log::error!("names of damaged files cannot be found: {error}");
            }
        };
        for (ino, paths) in &paths {
            log::error!("inode {ino} with bad data is '{}'", paths.join("', '"));
        }
        self.fs.scrubber.update(|status| {
            for (index, (ino, _)) in bad {
                if let (Some(error), Some(paths)) = (status.errors.get_mut(index), paths.get(&ino))
                {
                    error.paths.clone_from(paths);
                }
            }
        });
    }
}
