//! Copies of metadata blocks: reading each of them, mending a bad one, and counting.
//!
//! A copy is mended with the content that is in force, never with an older one, and only by who
//! holds off all other writers of the block. Nothing is written on a read-only mount. Each bad copy
//! is counted, and named in the log, once until it is mended.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use braidfs_blockdev::{AlignedBuf, BlockError, PAGE_SIZE, VolBlock, Volume};
use parking_lot::Mutex;

/// More places of bad copies than this are counted again when they are met again.
const PLACES_MAX: usize = 4096;

/// Copies of metadata blocks since the mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MetaStats {
    /// Copies that were damaged or could not be read.
    pub bad_copies: u64,
    /// Copies among them that were written again.
    pub repaired_copies: u64,
    /// Blocks none of whose copies is good.
    pub lost_blocks: u64,
}

/// A block of metadata with bad copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BadBlock {
    pub block: VolBlock,
    /// What it is, for people.
    pub what: String,
    /// The bad copies, and whether each is good again.
    pub copies: Vec<(u8, bool)>,
}

/// A copy of a block: logical block and number of the copy.
type Place = (u64, u8);

/// Access to the copies of metadata.
pub(super) struct Mirrors {
    pub(super) volume: Arc<Volume>,
    read_only: AtomicBool,
    bad: AtomicU64,
    repaired: AtomicU64,
    lost: AtomicU64,
    /// Bad copies that were counted and not mended.
    known: Mutex<BTreeSet<Place>>,
    known_lost: Mutex<BTreeSet<u64>>,
    /// The first copies that were mended.
    mended: Mutex<Vec<BadBlock>>,
}

impl Mirrors {
    pub(super) fn new(volume: Arc<Volume>, read_only: bool) -> Self {
        Self {
            volume,
            read_only: AtomicBool::new(read_only),
            bad: AtomicU64::new(0),
            repaired: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            known: Mutex::default(),
            known_lost: Mutex::default(),
            mended: Mutex::default(),
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    pub(super) fn set_writable(&self) {
        self.read_only.store(false, Ordering::Release);
    }

    pub(super) fn stats(&self) -> MetaStats {
        MetaStats {
            bad_copies: self.bad.load(Ordering::Relaxed),
            repaired_copies: self.repaired.load(Ordering::Relaxed),
            lost_blocks: self.lost.load(Ordering::Relaxed),
        }
    }

    /// Copies that were mended since the mount, the first of them.
    pub(super) fn mended(&self) -> Vec<BadBlock> {
        self.mended.lock().clone()
    }

    /// Every copy of `blocks` blocks from `block` on, past the cache.
    pub(super) fn read_copies(
        &self,
        block: VolBlock,
        blocks: usize,
    ) -> Vec<Result<AlignedBuf, BlockError>> {
        (0..self.volume.copies(block))
            .map(|copy| {
                let buf = AlignedBuf::zeroed(blocks * PAGE_SIZE);
                self.volume.read_wait(block, buf, Some(copy))
            })
            .collect()
    }

    /// Device and byte offset of a copy, for people.
    pub(super) fn place(&self, block: VolBlock, copy: u8) -> String {
        match self.volume.locate(block, copy) {
            Some((dev, at)) => format!("{} at byte {at}", self.volume.device_name(dev)),
            None => format!("block {}", block.0),
        }
    }

    /// All copies of a block, for people.
    pub(super) fn places(&self, block: VolBlock) -> String {
        let places: Vec<String> = (0..self.volume.copies(block))
            .map(|copy| self.place(block, copy))
            .collect();
        places.join(", ")
    }

    /// A copy is bad: counts and names it, if that is news.
    pub(super) fn note_bad(&self, block: VolBlock, copy: u8, what: fmt::Arguments<'_>) {
        let mut known = self.known.lock();
        if known.len() >= PLACES_MAX || known.insert((block.0, copy)) {
            self.bad.fetch_add(1, Ordering::Relaxed);
            drop(known);
            log::error!("{}: {what} is damaged", self.place(block, copy));
        }
    }

    /// No copy is good: counts and names the block, if that is news.
    pub(super) fn note_lost(&self, block: VolBlock, what: fmt::Arguments<'_>) {
        let mut known = self.known_lost.lock();
        if known.len() >= PLACES_MAX || known.insert(block.0) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            drop(known);
            let places = self.places(block);
            log::error!("{places}: {what} is lost in all copies; run 'braidfs fsck -n'");
        }
    }

    /// Writes a bad copy again, if the volume may be written; returns whether it is good now.
    /// Durable with the next flush. `image` is one block.
    pub(super) fn mend(
        &self,
        block: VolBlock,
        copy: u8,
        image: &[u8],
        what: fmt::Arguments<'_>,
    ) -> bool {
        if self.is_read_only() {
            return false;
        }
        let buf = AlignedBuf::from_slice(image);
        if let Err(error) = self.volume.write_copy_wait(block, buf, copy) {
            let place = self.place(block, copy);
            log::error!("{place}: {what} cannot be written again: {error}");
            return false;
        }
        if self.known.lock().remove(&(block.0, copy)) {
            self.repaired.fetch_add(1, Ordering::Relaxed);
            let place = self.place(block, copy);
            log::warn!("{place}: {what} was written again from the other copy");
            let mut mended = self.mended.lock();
            if mended.len() < PLACES_MAX {
                let (what, copies) = (what.to_string(), vec![(copy, true)]);
                mended.push(BadBlock {
                    block,
                    what,
                    copies,
                });
            }
        }
        true
    }
}
