//! Verifying the copies of metadata where they lie, past the cache, and mending bad ones.
//!
//! Writeback of the file is held off while its pages are compared with their checksums, and
//! `state` while the blocks are that a sync writes (head, header, checksums). Each hold is for a
//! few blocks.
//!
//! After a power cut, pages that the durable state does not refer to may not match the checksums,
//! or differ from copy to copy: nothing is wrong with that. So a page that does not match is bad
//! for sure only if it was written since the mount, or if redb reads it; see [`Probe`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use braidfs_blockdev::{AlignedBuf, BlockError, PAGE_SIZE, VolBlock};
use parking_lot::Mutex;

use super::backend::{MetaFile, MetaStorage};
use super::checksums::Known;
use super::head::Head;
use super::header::Header;
use super::mirrors::BadBlock;
use super::state::{NAMES, State};

/// Pages that are looked at while writeback is held off.
pub(crate) const STEP_PAGES: u64 = 64;

/// Pages that wait to be mended; more than these are met again.
const MEND_PAGES_MAX: usize = 4096;

/// What a step saw.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Bytes read from devices, all copies.
    pub bytes: u64,
    pub bad: Vec<BadBlock>,
    /// Pages that do not match and may be of no value.
    pub suspects: Vec<u64>,
}

/// How to look at pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// They are in use: what does not match is damage.
    InUse,
    /// They may be of no value: suspects are only listed, but for those written since the mount.
    Unknown,
}

type Copies = Vec<Result<AlignedBuf, BlockError>>;

impl MetaFile {
    /// Pages of the file that have a home.
    pub(crate) fn page_count(&self) -> u64 {
        self.state.lock().end_page()
    }

    /// A page was found bad in one copy and good in another: it is mended soon.
    pub(crate) fn mend_later(&self, page: u64) {
        let mut pages = self.to_mend.lock();
        if pages.len() < MEND_PAGES_MAX {
            pages.insert(page);
        }
    }

    /// A scrub looks at the pages, mends them, and counts them, itself.
    pub(crate) fn hold_mending(&self, hold: bool) {
        self.mending_held.store(hold, Ordering::SeqCst);
    }

    /// Copies that were mended since the mount, the first of them.
    pub(crate) fn mended_since_mount(&self) -> Vec<BadBlock> {
        self.mirrors.mended()
    }

    /// Mends what [`MetaFile::mend_later`] gathered. Waits for writeback of the file.
    pub(crate) fn mend_now(&self) {
        if self.is_read_only() || self.mending_held.load(Ordering::SeqCst) {
            return;
        }
        let pages = std::mem::take(&mut *self.to_mend.lock());
        for page in pages {
            if let Err(error) = self.check_pages(page, page + 1, Trust::InUse, true) {
                log::error!("metadata page {page}: {error}");
            }
        }
    }

    /// Verifies both copies of the pages `from..to`, of which there are at most [`STEP_PAGES`], and
    /// mends bad ones if `repair` says so. Pages without a home, or never written, are passed over.
    pub(crate) fn check_pages(
        &self,
        from: u64,
        to: u64,
        trust: Trust,
        repair: bool,
    ) -> Result<Seen, BlockError> {
        let mut seen = Seen::default();
        let _still = self.space().hold_writeback();
        let mut page = from.max(1);
        while page < to {
            let (block, knowns) = {
                let mut state = self.state.lock();
                let Some(chunk) = state.chunk_of(page) else {
                    break;
                };
                let (first, end) = (chunk.first_page, to.min(chunk.end_page()));
                let block = chunk.payload_block(page - first);
                let area = chunk.area(&self.mirrors)?;
                let known = |page: u64| (area.known(page - first), area.is_new(page - first));
                let is_there = |known: &Known| *known != Known::Nothing;
                let Some(start) = (page..end).find(|&page| is_there(&known(page).0)) else {
                    page = end;
                    continue;
                };
                let run = (start..end)
                    .map(known)
                    .take_while(|(known, _)| is_there(known));
                let run: Vec<(Known, bool)> = run.collect();
                let block = block.plus(start - page);
                page = start;
                (block, run)
            };
            let copies = self.mirrors.read_copies(block, knowns.len());
            for (nth, (known, is_new)) in knowns.into_iter().enumerate() {
                let in_use = trust == Trust::InUse || is_new;
                self.check_page(
                    page,
                    block.plus(nth as u64),
                    known,
                    &copies,
                    nth,
                    (in_use, repair),
                    &mut seen,
                );
                page += 1;
            }
            seen.bytes += copies
                .iter()
                .flatten()
                .map(|raw| raw.len() as u64)
                .sum::<u64>();
        }
        Ok(seen)
    }

    /// One page of those that were read; `flags`: whether it is in use, and whether to repair.
    #[expect(clippy::too_many_arguments, reason = "one step of a loop")]
    fn check_page(
        &self,
        page: u64,
        block: VolBlock,
        known: Known,
        copies: &Copies,
        nth: usize,
        (in_use, repair): (bool, bool),
        seen: &mut Seen,
    ) {
        let raw = |copy: &'_ Result<AlignedBuf, BlockError>| {
            let raw = copy.as_ref().ok()?;
            Some(raw[nth * PAGE_SIZE..(nth + 1) * PAGE_SIZE].to_vec())
        };
        let raws: Vec<Option<Vec<u8>>> = copies.iter().map(raw).collect();
        let is_good = |raw: &Vec<u8>| match known {
            Known::Crc(crc) => crc32c::crc32c(raw) == crc,
            // Without a checksum, a copy that can be read is as good as any.
            Known::Unchecked | Known::Nothing => true,
            Known::Lost => false,
        };
        let good = raws.iter().flatten().find(|raw| is_good(raw));
        let is_bad = |raw: &Option<Vec<u8>>| !raw.as_ref().is_some_and(&is_good);
        let bad: Vec<u8> = (0..)
            .zip(&raws)
            .filter(|(_, raw)| is_bad(raw))
            .map(|(copy, _)| copy)
            .collect();
        if bad.is_empty() {
            return;
        }
        if !in_use {
            return seen.suspects.push(page);
        }
        seen.bad.push(self.settle(
            block,
            format!("metadata page {page}"),
            &bad,
            good.map(Vec::as_slice),
            repair,
        ));
    }

    /// Counts and names bad copies, and mends them with `image` if there is one.
    fn settle(
        &self,
        block: VolBlock,
        what: String,
        bad: &[u8],
        image: Option<&[u8]>,
        repair: bool,
    ) -> BadBlock {
        for &copy in bad {
            self.mirrors.note_bad(block, copy, format_args!("{what}"));
        }
        if image.is_none() {
            self.mirrors.note_lost(block, format_args!("{what}"));
        }
        let image = image.filter(|_| repair);
        let mend = |copy: u8| {
            image.is_some_and(|image| {
                self.mirrors
                    .mend(block, copy, image, format_args!("{what}"))
            })
        };
        let copies = bad.iter().map(|&copy| (copy, mend(copy))).collect();
        BadBlock {
            block,
            what,
            copies,
        }
    }

    /// A page of no value whose copies differ: makes them alike, without counting it.
    pub(crate) fn make_alike(&self, page: u64) -> Result<(), BlockError> {
        let _still = self.space().hold_writeback();
        let (block, known) = {
            let mut state = self.state.lock();
            let Some(chunk) = state.chunk_of(page) else {
                return Ok(());
            };
            let index = page - chunk.first_page;
            (
                chunk.payload_block(index),
                chunk.area(&self.mirrors)?.known(index),
            )
        };
        let Known::Crc(crc) = known else {
            return Ok(());
        };
        let copies = self.mirrors.read_copies(block, 1);
        let is_good = |raw: &Result<AlignedBuf, BlockError>| {
            raw.as_ref().is_ok_and(|raw| crc32c::crc32c(raw) == crc)
        };
        let Some(Ok(good)) = copies.iter().find(|raw| is_good(raw)) else {
            return Ok(());
        };
        for (copy, _) in (0..).zip(&copies).filter(|(_, raw)| !is_good(raw)) {
            self.mirrors
                .mend(block, copy, good, format_args!("metadata page {page}"));
        }
        Ok(())
    }

    /// Verifies head slots and header.
    pub(crate) fn check_fixed(&self, repair: bool) -> Seen {
        let mut seen = Seen::default();
        let state = self.state.lock();
        let blocks = state.fixed_blocks();
        for (slot, &block) in blocks.iter().enumerate() {
            let copies = self.mirrors.read_copies(block, 1);
            seen.bytes += copies
                .iter()
                .flatten()
                .map(|raw| raw.len() as u64)
                .sum::<u64>();
            let image = fixed_image(&state, slot, &copies);
            // On a read-only mount, copies that a power cut left different stay so.
            let lags = |raw: &AlignedBuf| {
                self.is_read_only()
                    && if slot == 2 {
                        Header::is_whole(raw)
                    } else {
                        Head::decode(raw, slot as u64).is_some()
                    }
            };
            let is_good = |raw: &Result<AlignedBuf, BlockError>| match (raw, &image) {
                (Ok(raw), Some(image)) => raw[..] == image[..] || lags(raw),
                _ => false,
            };
            let bad: Vec<u8> = (0..)
                .zip(&copies)
                .filter(|(_, raw)| !is_good(raw))
                .map(|(copy, _)| copy)
                .collect();
            if !bad.is_empty() {
                let what = NAMES[slot].to_owned();
                seen.bad
                    .push(self.settle(block, what, &bad, image.as_deref(), repair));
            }
        }
        seen
    }

    /// Blocks of the checksum areas of all chunks.
    pub(crate) fn area_blocks(&self) -> u64 {
        let state = self.state.lock();
        state.chunks.iter().map(|chunk| chunk.area_blocks).sum()
    }

    /// Verifies the copies of block `at` of the checksum areas, counted over all chunks.
    pub(crate) fn check_area(&self, at: u64, repair: bool) -> Result<Seen, BlockError> {
        let mut seen = Seen::default();
        let mut state = self.state.lock();
        let mut within = at;
        for chunk in &mut state.chunks {
            if within >= chunk.area_blocks {
                within -= chunk.area_blocks;
                continue;
            }
            let block = chunk.area_block(within);
            let area = chunk.area(&self.mirrors)?;
            let copies = self.mirrors.read_copies(block, 1);
            seen.bytes += copies
                .iter()
                .flatten()
                .map(|raw| raw.len() as u64)
                .sum::<u64>();
            let is_good = |raw: &Result<AlignedBuf, BlockError>| {
                raw.as_ref().is_ok_and(|raw| area.is_written(within, raw))
            };
            let lost = area.has_lost(within);
            let is_bad = |raw: &Result<AlignedBuf, BlockError>| lost || !is_good(raw);
            let bad: Vec<u8> = (0..)
                .zip(&copies)
                .filter(|(_, raw)| is_bad(raw))
                .map(|(copy, _)| copy)
                .collect();
            if !bad.is_empty() {
                let mut image = vec![0; PAGE_SIZE];
                area.encode_block(within, &mut image);
                let image = (!lost).then_some(image.as_slice());
                let what = format!("block {at} of metadata checksums");
                seen.bad.push(self.settle(block, what, &bad, image, repair));
            }
            break;
        }
        Ok(seen)
    }
}

/// What a head slot or the header (slot 2) should hold.
fn fixed_image(state: &State, slot: usize, copies: &Copies) -> Option<Vec<u8>> {
    let mut read = copies.iter().flatten();
    if slot == 2 {
        if !state.header.is_dirty() {
            return Some(state.header.image().to_vec());
        }
        let written = read.find(|raw| state.header.is_written(raw));
        return written.map(|raw| raw.to_vec());
    }
    let slot = slot as u64;
    if state.head.slot() == slot && !state.head_dirty {
        return Some(state.head.encode().to_vec());
    }
    // The slot not in force holds some older head; which one does not matter.
    let heads = read.filter_map(|raw| Some((Head::decode(raw, slot)?.sequence, raw)));
    let newest = heads.max_by_key(|&(sequence, _)| sequence);
    newest.map(|(_, raw)| raw.to_vec())
}

/// A store of its own over the file as it is durable: what it writes stays in memory. It notes
/// which of the pages it was asked about are read.
#[derive(Debug)]
pub(crate) struct Probe {
    file: MetaStorage,
    header: Vec<u8>,
    len: Mutex<u64>,
    written: Mutex<BTreeMap<u64, Vec<u8>>>,
    suspects: BTreeSet<u64>,
    met: Arc<Mutex<BTreeSet<u64>>>,
}

impl Probe {
    /// Nothing is committed from here on until the store over it is open. Pages that it reads are
    /// put into `met` if they are among `suspects`.
    pub(crate) fn new(
        file: &Arc<MetaFile>,
        suspects: BTreeSet<u64>,
        met: &Arc<Mutex<BTreeSet<u64>>>,
    ) -> Self {
        let (header, len) = {
            let state = file.state.lock();
            (state.header.image().to_vec(), state.head.len_bytes)
        };
        Self {
            file: file.storage(),
            header,
            len: Mutex::new(len),
            written: Mutex::default(),
            suspects,
            met: Arc::clone(met),
        }
    }

    fn read_page(&self, page: u64) -> io::Result<Vec<u8>> {
        if let Some(bytes) = self.written.lock().get(&page) {
            return Ok(bytes.clone());
        }
        if page == 0 {
            return Ok(self.header.clone());
        }
        if self.suspects.contains(&page) {
            self.met.lock().insert(page);
        }
        let mut bytes = vec![0; PAGE_SIZE];
        self.file
            .read_unchecked(page * PAGE_SIZE as u64, &mut bytes)?;
        Ok(bytes)
    }

    /// Hands each page with bytes of `offset..offset + len` to `each`: its number, where in it the
    /// bytes begin, and which of the bytes they are.
    fn pages(
        offset: u64,
        len: usize,
        mut each: impl FnMut(u64, usize, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = usize::try_from(at % PAGE_SIZE as u64).expect("inside a page");
            let take = (PAGE_SIZE - within).min(len - done);
            each(at / PAGE_SIZE as u64, within, done..done + take)?;
            done += take;
        }
        Ok(())
    }
}

impl redb::StorageBackend for Probe {
    fn len(&self) -> io::Result<u64> {
        Ok(*self.len.lock())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        Self::pages(offset, out.len(), |page, within, part| {
            let bytes = self.read_page(page)?;
            let len = part.len();
            out[part].copy_from_slice(&bytes[within..within + len]);
            Ok(())
        })?;
        self.file.check(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        *self.len.lock() = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        Self::pages(offset, data.len(), |page, within, part| {
            let mut bytes = if part.len() == PAGE_SIZE {
                vec![0; PAGE_SIZE]
            } else {
                self.read_page(page)?
            };
            bytes[within..within + part.len()].copy_from_slice(&data[part]);
            self.written.lock().insert(page, bytes);
            Ok(())
        })
    }
}
