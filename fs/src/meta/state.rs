//! What is known of the metadata file: its head, redb's header, its chunks and their checksums.
//!
//! Loading looks at every copy of the head slots and of the header. To write, the copies are made
//! alike, durably, before anything else is written: see [`super::header`].

use std::io;

use braidfs_blockdev::{AlignedBuf, BlockError, Chunk, ChunkKind, PAGE_SIZE, VolBlock, Volume};

use super::checksums::{self, Area, HEAD_BLOCKS, Known};
use super::head::Head;
use super::header::Header;
use super::mirrors::Mirrors;
use super::page::{GEOMETRY_LEN, Geometry};

/// Blocks of a checksum area that are read at a time.
const LOAD_BLOCKS_MAX: u64 = 64;

/// One metadata chunk.
pub(super) struct MetaChunk {
    start: VolBlock,
    pub(super) area_blocks: u64,
    pub(super) payload_blocks: u64,
    /// First page of the file that lives here.
    pub(super) first_page: u64,
    /// The checksum area; `None` until first needed.
    pub(super) area: Option<Area>,
}

impl MetaChunk {
    /// A chunk in which nothing counts yet.
    pub(super) fn fresh(chunk: &Chunk, first_page: u64) -> Self {
        let mut chunk = Self::new(chunk, first_page);
        chunk.area = Some(Area::new(chunk.area_blocks));
        chunk
    }

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

    /// Block `at` of the checksum area.
    pub(super) fn area_block(&self, at: u64) -> VolBlock {
        VolBlock(self.start.0 + HEAD_BLOCKS + at)
    }

    /// Payload block `index`.
    pub(super) fn payload_block(&self, index: u64) -> VolBlock {
        VolBlock(self.start.0 + HEAD_BLOCKS + self.area_blocks + index)
    }

    pub(super) fn end_page(&self) -> u64 {
        self.first_page + self.payload_blocks
    }

    /// The area, read from the devices if need be; a damaged sector is taken from the other copy,
    /// and the damaged copy is mended.
    pub(super) fn area(&mut self, mirrors: &Mirrors) -> Result<&mut Area, BlockError> {
        if self.area.is_none() {
            let mut area = Area::new(self.area_blocks);
            let mut at = 0;
            while at < self.area_blocks {
                let blocks = LOAD_BLOCKS_MAX.min(self.area_blocks - at);
                self.load_area(&mut area, at, blocks, mirrors)?;
                at += blocks;
            }
            self.area = Some(area);
        }
        Ok(self.area.as_mut().expect("loaded above"))
    }

    fn load_area(
        &self,
        area: &mut Area,
        from: u64,
        blocks: u64,
        mirrors: &Mirrors,
    ) -> Result<(), BlockError> {
        let count = usize::try_from(blocks).expect("a few blocks");
        let copies = mirrors.read_copies(self.area_block(from), count);
        if let Some(Err(error)) = copies.first()
            && copies.iter().all(Result::is_err)
        {
            return Err(*error);
        }
        for (at, nth) in (from..).zip(0..count) {
            let part = |raw: &'_ Result<AlignedBuf, BlockError>| -> Option<Vec<u8>> {
                let raw = raw.as_ref().ok()?;
                Some(raw[nth * PAGE_SIZE..(nth + 1) * PAGE_SIZE].to_vec())
            };
            let raws: Vec<Option<Vec<u8>>> = copies.iter().map(part).collect();
            let views: Vec<Option<&[u8]>> = raws.iter().map(Option::as_deref).collect();
            let loaded = area.load_block(at, &views);
            let block = self.area_block(at);
            let what = format_args!("block {at} of metadata checksums");
            for copy in loaded.bad_copies() {
                mirrors.note_bad(block, copy, what);
            }
            if loaded.lost {
                mirrors.note_lost(block, what);
                continue;
            }
            let mut image = vec![0; PAGE_SIZE];
            area.encode_block(at, &mut image);
            for copy in loaded.bad_copies() {
                mirrors.mend(block, copy, &image, what);
            }
        }
        Ok(())
    }
}

/// See the module.
pub(super) struct State {
    pub(super) chunks: Vec<MetaChunk>,
    pub(super) head: Head,
    pub(super) head_dirty: bool,
    pub(super) header: Header,
    /// One past the highest page that was ever written.
    pub(super) high_page: u64,
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn block_error(error: BlockError) -> io::Error {
    io::Error::other(error)
}

/// Places of the fixed blocks: the head slots, then the header.
fn fixed_blocks(chunk: &MetaChunk) -> [VolBlock; 3] {
    [
        chunk.start,
        VolBlock(chunk.start.0 + 1),
        chunk.payload_block(0),
    ]
}

impl State {
    /// What the devices say. With `fresh`, makes the file empty first, whatever they held.
    pub(super) fn load(mirrors: &Mirrors, fresh: bool) -> io::Result<Self> {
        let volume = &mirrors.volume;
        let chunks = meta_chunks(volume);
        let Some(first) = chunks.first() else {
            return Err(invalid("the chunk table has no metadata chunk".into()));
        };
        let first = MetaChunk::new(first, 0);
        let (head, header) = if fresh {
            for block in fixed_blocks(&first) {
                let zeros = AlignedBuf::zeroed(PAGE_SIZE);
                volume.write_wait(block, zeros).map_err(block_error)?;
            }
            volume.flush_wait().map_err(block_error)?;
            (Head::default(), Header::empty())
        } else {
            load_fixed(&first, mirrors)?
        };
        if head.chunk_count as usize > chunks.len() {
            return Err(invalid(format!(
                "the metadata head names {} chunks, the chunk table has {}",
                head.chunk_count,
                chunks.len()
            )));
        }
        let mut state = State {
            chunks: Vec::new(),
            head,
            head_dirty: false,
            header,
            high_page: 0,
        };
        for chunk in &chunks {
            let first_page = state.end_page();
            // Made just before a crash, or by formatting: nothing in it counts yet.
            let is_fresh = state.chunks.len() >= head.chunk_count as usize;
            state.chunks.push(if is_fresh {
                MetaChunk::fresh(chunk, first_page)
            } else {
                MetaChunk::new(chunk, first_page)
            });
        }
        let capacity = state.end_page() * PAGE_SIZE as u64;
        if head.len_bytes > capacity {
            return Err(invalid(format!(
                "the metadata head names a file of {} bytes, its chunks hold {capacity}",
                head.len_bytes
            )));
        }
        state.high_page = highest_page(&mut state.chunks, mirrors);
        Ok(state)
    }

    /// One past the last page that has a home.
    pub(super) fn end_page(&self) -> u64 {
        self.chunks.last().map_or(0, MetaChunk::end_page)
    }

    /// The chunk that holds `page`.
    pub(super) fn chunk_of(&mut self, page: u64) -> Option<&mut MetaChunk> {
        self.chunks.iter_mut().find(|chunk| page < chunk.end_page())
    }

    /// Where redb's pages are, as its header and the length of the file say.
    pub(super) fn geometry(&self) -> Option<Geometry> {
        let mut header = [0; GEOMETRY_LEN];
        self.header.read(0, &mut header);
        Geometry::decode(&header, self.head.len_bytes)
    }

    /// Blocks of the two head slots and of the header.
    pub(super) fn fixed_blocks(&self) -> [VolBlock; 3] {
        fixed_blocks(&self.chunks[0])
    }
}

fn meta_chunks(volume: &Volume) -> Vec<Chunk> {
    let chunks = volume.chunks().into_iter();
    chunks
        .filter(|chunk| chunk.kind == ChunkKind::Meta)
        .collect()
}

/// The heads and the header in force. If the volume may be written, all their copies are alike,
/// durably, when this returns.
fn load_fixed(first: &MetaChunk, mirrors: &Mirrors) -> io::Result<(Head, Header)> {
    let blocks = fixed_blocks(first);
    let raws = blocks.map(|block| mirrors.read_copies(block, 1));
    let header = choose_header(blocks[2], &raws[2], mirrors)?;
    let slots = [0, 1].map(|slot| choose_head(slot, blocks[slot], &raws[slot], mirrors));
    let best = slots.into_iter().flatten().max_by_key(|head| head.sequence);
    let best = best.filter(|head| head.sequence > 0).ok_or_else(|| {
        let why = "it is damaged in all copies, or formatting did not come to its end";
        invalid(format!("there is no valid metadata head: {why}"))
    })?;
    let lost = slots.iter().position(Option::is_none);
    if let Some(slot) = lost
        && best.sequence < header.head_sequence()
    {
        let places = mirrors.places(blocks[slot]);
        return Err(invalid(format!(
            "the metadata head (number {}) is damaged in all copies: {places}",
            header.head_sequence()
        )));
    }
    let mut head = best;
    if mirrors.is_read_only() {
        return Ok((head, header));
    }
    let mut images = [None, None, Some(header.image().to_vec())];
    for (image, slot) in images.iter_mut().zip(slots) {
        *image = slot.map(|head| encode_slot(&head));
    }
    if let Some(slot) = lost {
        // What it held was older, or never acted on; the one in force goes there, too.
        head.sequence += 1;
        images[slot] = Some(encode_slot(&head));
    }
    make_alike(&blocks, &raws, &images, mirrors)?;
    Ok((head, header))
}

/// A slot that never was written is zeros.
fn encode_slot(head: &Head) -> Vec<u8> {
    if head.sequence == 0 {
        vec![0; PAGE_SIZE]
    } else {
        head.encode().to_vec()
    }
}

type Copies = [Result<AlignedBuf, BlockError>];

/// What the fixed blocks are called.
pub(super) const NAMES: [&str; 3] = ["metadata head 0", "metadata head 1", "metadata header"];

fn choose_head(slot: usize, block: VolBlock, raws: &Copies, mirrors: &Mirrors) -> Option<Head> {
    let name = NAMES[slot];
    let mut chosen: Option<Head> = None;
    for (copy, raw) in (0..).zip(raws) {
        let head = raw
            .as_ref()
            .ok()
            .and_then(|raw| Head::decode(raw, slot as u64));
        match head {
            Some(head) => {
                chosen = chosen
                    .into_iter()
                    .chain([head])
                    .max_by_key(|head| head.sequence)
            }
            None => mirrors.note_bad(block, copy, format_args!("{name}")),
        }
    }
    if chosen.is_none() {
        mirrors.note_lost(block, format_args!("{name}"));
    }
    chosen
}

fn choose_header(block: VolBlock, raws: &Copies, mirrors: &Mirrors) -> io::Result<Header> {
    let mut chosen: Option<Header> = None;
    for (copy, raw) in (0..).zip(raws) {
        match raw.as_ref().ok().and_then(|raw| Header::decode(raw)) {
            Some(header) => {
                chosen = Some(match chosen {
                    Some(other) => other.newer(header),
                    None => header,
                });
            }
            None => mirrors.note_bad(block, copy, format_args!("{}", NAMES[2])),
        }
    }
    chosen.ok_or_else(|| {
        mirrors.note_lost(block, format_args!("{}", NAMES[2]));
        let places = mirrors.places(block);
        invalid(format!(
            "the metadata header is damaged in all copies ({places}), or formatting did not come \
             to its end"
        ))
    })
}

/// Writes the copies that are not `images`, and flushes if there were any.
fn make_alike(
    blocks: &[VolBlock; 3],
    raws: &[Vec<Result<AlignedBuf, BlockError>>; 3],
    images: &[Option<Vec<u8>>; 3],
    mirrors: &Mirrors,
) -> io::Result<()> {
    let mut mended = false;
    for (nth, (&block, raws)) in blocks.iter().zip(raws).enumerate() {
        let Some(image) = &images[nth] else { continue };
        for (copy, raw) in (0..).zip(raws) {
            if raw.as_ref().is_ok_and(|raw| raw[..] == image[..]) {
                continue;
            }
            let name = NAMES[nth];
            if !mirrors.mend(block, copy, image, format_args!("{name}")) {
                let place = mirrors.place(block, copy);
                return Err(io::Error::other(format!(
                    "{place}: {name} cannot be written again"
                )));
            }
            mended = true;
        }
    }
    if mended {
        mirrors.volume.flush_wait().map_err(block_error)?;
    }
    Ok(())
}

/// One past the highest page that the checksum areas know of. Looks at the last chunks only, until
/// one has been written to.
fn highest_page(chunks: &mut [MetaChunk], mirrors: &Mirrors) -> u64 {
    for chunk in chunks.iter_mut().rev() {
        let (first, end) = (chunk.first_page, chunk.end_page());
        let payload = chunk.payload_blocks;
        match chunk.area(mirrors) {
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
