//! Damage of labels, chunk tables and metadata chunks, with checksums mended where wanted.
//!
//! Places are as FORMAT.md has them.

use std::sync::Arc;

use braidfs_blockdev::label::{LABEL_LEN, LABEL_OFFSETS, TABLE_OFFSETS};
use braidfs_blockdev::{AlignedBuf, Chunk, ChunkKind, SimDevice, VolBlock};

use super::Input;
use super::tree::try_everything;
use super::volume::{self, assemble};

/// Where labels and tables have their checksum.
const CRC_AT: usize = 8;
const TABLE_LEN_AT: usize = 108;
const TABLE_CRC_AT: usize = 112;
/// How far into a table edits reach.
const TABLE_EDIT_LEN: usize = 512;
const EDITS_MAX: usize = 64;
const BLOCK: usize = 4096;
const SECTOR: usize = 512;

fn place(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a small device")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let raw = bytes.get(at..at + 4).and_then(|raw| raw.try_into().ok());
    u32::from_le_bytes(raw.unwrap_or_default())
}

fn read(device: &SimDevice, at: usize, len: usize) -> Vec<u8> {
    device.peek(at as u64, len)
}

fn write(device: &SimDevice, at: usize, bytes: &[u8]) {
    device.poke(at as u64, bytes);
}

/// Sets the CRC32C at `at` of `bytes`, taken with that field zero.
fn mend(bytes: &mut [u8], at: usize) -> u32 {
    bytes[at..at + 4].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

/// Mends both tables and labels of a member; a label's length of the table is believed.
fn mend_member(device: &SimDevice) {
    for (label_at, table_at) in LABEL_OFFSETS.into_iter().zip(TABLE_OFFSETS) {
        let (label_at, table_at) = (place(label_at), place(table_at));
        let mut label = read(device, label_at, LABEL_LEN);
        let len = u32_at(&label, TABLE_LEN_AT) as usize;
        let mut table = read(device, table_at, len.clamp(64, 4096));
        let crc = mend(&mut table, CRC_AT);
        write(device, table_at, &table);
        label[TABLE_CRC_AT..TABLE_CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        mend(&mut label, CRC_AT);
        write(device, label_at, &label);
    }
}

/// Input: whether to mend; then edits: which member, copy and thing, where, how long, bytes.
pub(super) fn labels(input: &[u8]) {
    let mut input = Input(input);
    let devices = volume::pair();
    let mended = input.number(1) & 1 == 1;
    for _ in 0..EDITS_MAX {
        if input.is_empty() {
            break;
        }
        let which = place(input.number(1));
        let slot = which >> 1 & 1;
        let (base, reach) = match which >> 2 & 1 {
            0 => (LABEL_OFFSETS[slot], LABEL_LEN),
            _ => (TABLE_OFFSETS[slot], TABLE_EDIT_LEN),
        };
        // Most fields lie at the beginning.
        let reach = if which >> 3 & 1 == 0 { 192 } else { reach };
        let at = place(base) + input.below(reach);
        let len = place(input.number(1)) % 32 + 1;
        let bytes = input.bytes(len);
        write(&devices[which & 1], at, bytes);
    }
    if mended {
        devices.iter().for_each(|device| mend_member(device));
    }
    try_everything(&devices);
}

pub(super) fn label_seeds() -> Vec<(String, Vec<u8>)> {
    let seed = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    vec![
        seed("unharmed", &[1]),
        seed("generation", &[1, 0, 24, 0, 7, 9, 0, 0, 0, 0, 0, 0, 0]),
        seed("other-index", &[1, 1, 88, 0, 1, 0, 0, 3, 88, 0, 1, 0, 0]),
        seed("lost-copy", &[0, 2, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]),
        seed(
            "table",
            &[1, 4, 72, 0, 3, 255, 255, 255, 127, 6, 72, 0, 3, 1, 1, 1, 1],
        ),
    ]
}

/// Input: what follows the fixed fields of a chunk table: counts and chunks. Both members get it.
pub(super) fn table(input: &[u8]) {
    let input = &input[..input.len().min(2048)];
    let devices = volume::pair();
    for device in &devices {
        for (label_at, table_at) in LABEL_OFFSETS.into_iter().zip(TABLE_OFFSETS) {
            let len = u32::try_from(TABLE_FIXED + input.len().max(64 - TABLE_FIXED)).unwrap_or(64);
            write(device, place(label_at) + TABLE_LEN_AT, &len.to_le_bytes());
            write(
                device,
                place(table_at) + TABLE_FIXED - 4,
                &len.to_le_bytes(),
            );
            write(device, place(table_at) + TABLE_FIXED, input);
        }
        mend_member(device);
    }
    if let Ok(volume) = assemble(&devices, true) {
        for chunk in volume.chunks() {
            for at in [
                chunk.start.0,
                chunk.end().0.saturating_sub(1),
                chunk.end().0,
            ] {
                let buf = AlignedBuf::zeroed(BLOCK);
                let _read = volume.read_wait(VolBlock(at), buf, None);
            }
        }
    }
    try_everything(&devices);
}

/// Magic, checksum, version, UUID, generation, length of a table.
const TABLE_FIXED: usize = 44;

pub(super) fn table_seeds() -> Vec<(String, Vec<u8>)> {
    let devices = volume::pair();
    let at = place(TABLE_OFFSETS[0]);
    let len = u32_at(&read(&devices[0], at, 64), TABLE_FIXED - 4) as usize;
    let whole = read(&devices[0], at + TABLE_FIXED, len - TABLE_FIXED);
    let one = whole[..whole.len().min(64 - TABLE_FIXED + 64)].to_vec();
    vec![("whole".to_owned(), whole), ("one".to_owned(), one)]
}

/// The first metadata chunk, and how it is divided.
pub(crate) struct MetaChunk {
    chunk: Chunk,
    area_blocks: usize,
    /// Payload blocks that have been written.
    used: Vec<usize>,
}

impl MetaChunk {
    pub(crate) fn of(devices: &[Arc<SimDevice>]) -> Self {
        let volume = assemble(devices, true).expect("a sound volume");
        let meta = volume
            .chunks()
            .into_iter()
            .find(|chunk| chunk.kind == ChunkKind::Meta);
        let chunk = meta.expect("a metadata chunk");
        let area_blocks = (place(chunk.len_blocks) - 2).div_ceil(8 * 127 + 1);
        let mut made = Self {
            chunk,
            area_blocks,
            used: Vec::new(),
        };
        let payload = place(made.chunk.len_blocks) - 2 - area_blocks;
        made.used = (0..payload)
            .filter(|index| {
                let at = made.entry_at(*index);
                u32_at(&made.read(devices, at, 4), 0) != 0
            })
            .collect();
        made
    }

    /// Where in the chunk the checksum of a payload block is.
    fn entry_at(&self, index: usize) -> usize {
        2 * BLOCK + index / 127 * SECTOR + index % 127 * 4
    }

    pub(crate) fn payload_at(&self, index: usize) -> usize {
        (2 + self.area_blocks + index) * BLOCK
    }

    pub(crate) fn read(&self, devices: &[Arc<SimDevice>], at: usize, len: usize) -> Vec<u8> {
        let member = self.chunk.members[0];
        read(
            &devices[usize::from(member.dev)],
            place(member.offset_bytes) + at,
            len,
        )
    }

    /// Writes all copies.
    pub(crate) fn write(&self, devices: &[Arc<SimDevice>], at: usize, bytes: &[u8]) {
        for member in &self.chunk.members {
            write(
                &devices[usize::from(member.dev)],
                place(member.offset_bytes) + at,
                bytes,
            );
        }
    }

    fn mend_sector(&self, devices: &[Arc<SimDevice>], at: usize) {
        let body = self.read(devices, at, SECTOR - 4);
        self.write(
            devices,
            at + SECTOR - 4,
            &crc32c::crc32c(&body).to_le_bytes(),
        );
    }

    /// Gives a payload block the checksum of what it holds now.
    pub(crate) fn mend_payload(&self, devices: &[Arc<SimDevice>], index: usize) {
        if index == 0 {
            return self.mend_header(devices);
        }
        let block = self.read(devices, self.payload_at(index), BLOCK);
        let at = self.entry_at(index);
        self.write(devices, at, &crc32c::crc32c(&block).to_le_bytes());
        self.mend_sector(devices, at - at % SECTOR);
    }

    /// The seal of redb's header.
    fn mend_header(&self, devices: &[Arc<SimDevice>]) {
        const SEAL_AT: usize = 320;
        let at = self.payload_at(0);
        let mut sector = self.read(devices, at, SECTOR);
        if sector[SEAL_AT..].starts_with(b"BRAIDHDR") {
            mend(&mut sector, SEAL_AT + 8);
            self.write(devices, at, &sector);
        }
    }
}

/// Input: edits of all copies: what, whether to mend its checksum, which, where, how long, bytes.
pub(super) fn metadata(input: &[u8]) {
    let mut input = Input(input);
    let devices = volume::single();
    let meta = MetaChunk::of(&devices);
    for _ in 0..EDITS_MAX {
        if input.is_empty() {
            break;
        }
        let what = place(input.number(1));
        let mended = what >> 7 & 1 == 0;
        let which = place(input.number(1));
        match what % 8 {
            0 => {
                let at = which % 2 * BLOCK;
                let within = input.below(40);
                meta.write(&devices, at + within, input.bytes(8));
                let body = meta.read(&devices, at, 32);
                if mended {
                    meta.write(&devices, at + 32, &crc32c::crc32c(&body).to_le_bytes());
                }
            }
            1 => {
                let at = 2 * BLOCK + which % (8 * meta.area_blocks) * SECTOR;
                let within = input.below(SECTOR);
                meta.write(&devices, at + within, input.bytes(4));
                if mended {
                    meta.mend_sector(&devices, at);
                }
            }
            kind => {
                let nth = if kind == 2 {
                    0
                } else {
                    which % meta.used.len()
                };
                let reach = if kind < 5 { 128 } else { BLOCK };
                let index = meta.used[nth];
                let at = meta.payload_at(index) + input.below(reach);
                let len = place(input.number(1)) % 16 + 1;
                meta.write(&devices, at, input.bytes(len));
                if mended {
                    meta.mend_payload(&devices, index);
                }
            }
        }
    }
    try_everything(&devices);
}

pub(super) fn metadata_seeds() -> Vec<(String, Vec<u8>)> {
    let seed = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    let mut seeds = vec![
        seed("unharmed", &[]),
        seed(
            "length",
            &[
                0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 127, 0, 1, 16, 0, 0, 0, 0, 0, 0, 0, 0, 127,
            ],
        ),
        seed("area", &[1, 0, 8, 0, 1, 2, 3, 4]),
        seed("lost-area", &[129, 0, 8, 0, 1, 2, 3, 4]),
        seed("header", &[2, 0, 12, 0, 3, 1, 2, 3, 4]),
    ];
    for page in 0..24 {
        seeds.push(seed(&format!("page-{page}"), &[3, page, 0, 0, 1, 9]));
        seeds.push(seed(
            &format!("length-{page}"),
            &[3, page, 2, 0, 1, 255, 255],
        ));
    }
    seeds
}
