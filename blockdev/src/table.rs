//! The chunk table: which logical range lives where. Stored whole, twice, beside the labels.
//!
//! A table describes itself (file system, generation, checksum), so a member whose label copy of
//! the same generation was damaged can still be seen to have that generation.

use crate::codec::{Decoder, Encoder, crc_without};
use crate::label::{CHUNK_SPACE_START, CRC_AT, TABLE_LEN_MAX};
use crate::units::{BLOCK_SIZE, VolBlock, mem_len};
use crate::volume::{Chunk, ChunkKind, ChunkMember, Profile};

const MAGIC: [u8; 8] = *b"BRAIDCHK";
const VERSION: u32 = 1;
const HEADER_LEN: usize = 64;
const CHUNK_LEN: usize = 32;
const MEMBER_LEN: usize = 16;
/// The longest piece that a power cut writes whole or not at all.
const SECTOR_LEN: usize = 512;

/// What is wrong with a chunk table. Messages continue the device's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// It could not be read.
    #[error("chunk table cannot be read: {}", std::io::Error::from_raw_os_error(*.0))]
    Io(i32),
    /// Nothing like a table.
    #[error("chunk table is missing")]
    Missing,
    /// The content does not match its checksum.
    #[error("chunk table is damaged (checksum)")]
    Checksum,
    /// Written by a format that this version does not know.
    #[error("chunk table has unknown version {0}")]
    Version(u32),
    /// A table of another file system or generation.
    #[error("chunk table belongs to another generation or file system")]
    Foreign,
    /// A field has an impossible value.
    #[error("chunk table is damaged: impossible {0}")]
    Value(&'static str),
}

/// The table in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub next_chunk_id: u32,
    /// Where the next chunk starts: logical space is never reused.
    pub next_block: u64,
    /// In order of their start.
    pub chunks: Vec<Chunk>,
}

impl Table {
    /// Length on disk.
    pub(crate) fn encoded_len(&self) -> usize {
        let chunk_len = |chunk: &Chunk| CHUNK_LEN + MEMBER_LEN * chunk.members.len();
        HEADER_LEN + self.chunks.iter().map(chunk_len).sum::<usize>()
    }

    /// Whether it still fits its place with one more chunk over `members` devices.
    pub(crate) fn has_room_for(&self, members: usize) -> bool {
        self.encoded_len() + CHUNK_LEN + MEMBER_LEN * members <= TABLE_LEN_MAX
    }

    /// Whether a power cut cannot tear it, nor one with one more chunk over `members` devices.
    pub(crate) fn is_in_one_sector_with_another_chunk(&self, members: usize) -> bool {
        self.encoded_len() + CHUNK_LEN + MEMBER_LEN * members <= SECTOR_LEN
    }

    /// The bytes to write, and their checksum.
    pub(crate) fn encode(
        &self,
        fs_uuid: &[u8; 16],
        generation: u64,
        devices: u16,
    ) -> (Vec<u8>, u32) {
        let mut bytes = vec![0; self.encoded_len()];
        let len32 = |len: usize| u32::try_from(len).expect("bounded by TABLE_LEN_MAX");
        let len = len32(bytes.len());
        let mut to = Encoder::new(&mut bytes);
        to.bytes(&MAGIC)
            .u32(0) // checksum
            .u32(VERSION)
            .bytes(fs_uuid)
            .u64(generation)
            .u32(len)
            .u32(len32(self.chunks.len()))
            .u32(self.next_chunk_id)
            .u16(devices)
            .u16(0) // reserved
            .u64(self.next_block);
        for chunk in &self.chunks {
            to.u32(chunk.id)
                .u8(encode_kind(chunk.kind))
                .u8(encode_profile(chunk.profile))
                .u16(u16::try_from(chunk.members.len()).expect("bounded by DEVICES_MAX"))
                .u64(chunk.start.0)
                .u64(chunk.member_len_bytes)
                .u32(chunk.stripe_unit_blocks)
                .u32(0); // reserved
            for member in &chunk.members {
                to.u16(member.dev).bytes(&[0; 6]).u64(member.offset_bytes);
            }
        }
        let crc = crc_without(&bytes, CRC_AT);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        (bytes, crc)
    }

    /// The only way in from disk: `bytes` is the table's place (or its known length). `sizes` are
    /// the members' sizes in order of their index.
    pub(crate) fn decode(
        bytes: &[u8],
        fs_uuid: &[u8; 16],
        generation: u64,
        sizes: &[u64],
    ) -> Result<Table, TableError> {
        let mut from = Decoder::new(bytes);
        if from.bytes() != MAGIC {
            return Err(TableError::Missing);
        }
        let (crc, version) = (from.u32(), from.u32());
        let (uuid, stored_generation): ([u8; 16], u64) = (from.bytes(), from.u64());
        let len = mem_len(u64::from(from.u32()));
        let body = bytes.get(..len).filter(|body| body.len() >= HEADER_LEN);
        let body = body.ok_or(TableError::Checksum)?;
        if crc_without(body, CRC_AT) != crc {
            return Err(TableError::Checksum);
        }
        if version != VERSION {
            return Err(TableError::Version(version));
        }
        if (&uuid, stored_generation) != (fs_uuid, generation) {
            return Err(TableError::Foreign);
        }
        let mut from = Decoder::new(&body[8 + 4 + 4 + 16 + 8 + 4..]);
        let count = from.u32();
        let next_chunk_id = from.u32();
        let (devices, reserved) = (from.u16(), from.u16());
        let next_block = from.u64();
        if usize::from(devices) != sizes.len() || reserved != 0 {
            return Err(TableError::Value("device count"));
        }
        let mut chunks = Vec::new();
        for _ in 0..count {
            chunks.push(decode_chunk(&mut from)?);
        }
        if !from.ends_in_zeros() {
            return Err(TableError::Value("length"));
        }
        let table = Table {
            next_chunk_id,
            next_block,
            chunks,
        };
        table.check(sizes)?;
        Ok(table)
    }

    /// Places inside their devices, nothing twice, logical ranges in order.
    fn check(&self, sizes: &[u64]) -> Result<(), TableError> {
        let mut shares = Vec::new();
        let mut next = 0;
        for chunk in &self.chunks {
            if chunk.start.0 < next || chunk.id >= self.next_chunk_id {
                return Err(TableError::Value("chunk order"));
            }
            next = chunk.end().0;
            for member in &chunk.members {
                let end = member.offset_bytes.checked_add(chunk.member_len_bytes);
                let end = end.ok_or(TableError::Value("place"))?;
                let size = sizes.get(usize::from(member.dev)).copied().unwrap_or(0);
                if member.offset_bytes < CHUNK_SPACE_START || end > size {
                    return Err(TableError::Value("place"));
                }
                shares.push((member.dev, member.offset_bytes, end));
            }
        }
        if next > self.next_block {
            return Err(TableError::Value("logical end"));
        }
        shares.sort_unstable();
        let overlaps = |pair: &[(u16, u64, u64)]| pair[0].0 == pair[1].0 && pair[0].2 > pair[1].1;
        if shares.windows(2).any(overlaps) {
            return Err(TableError::Value("place (taken twice)"));
        }
        Ok(())
    }
}

fn encode_kind(kind: ChunkKind) -> u8 {
    match kind {
        ChunkKind::Data => 1,
        ChunkKind::Meta => 2,
    }
}

fn encode_profile(profile: Profile) -> u8 {
    match profile {
        Profile::Single => 1,
        Profile::Stripe => 2,
        Profile::Mirror => 3,
    }
}

fn decode_chunk(from: &mut Decoder<'_>) -> Result<Chunk, TableError> {
    let id = from.u32();
    let kind = match from.u8() {
        1 => ChunkKind::Data,
        2 => ChunkKind::Meta,
        _ => return Err(TableError::Value("chunk kind")),
    };
    let profile = match from.u8() {
        1 => Profile::Single,
        2 => Profile::Stripe,
        3 => Profile::Mirror,
        _ => return Err(TableError::Value("profile")),
    };
    let member_count = from.u16();
    let start = VolBlock(from.u64());
    let member_len_bytes = from.u64();
    let (stripe_unit_blocks, reserved) = (from.u32(), from.u32());
    let mut members = Vec::new();
    for _ in 0..member_count {
        let (dev, pad) = (from.u16(), from.bytes::<6>());
        if pad != [0; 6] || reserved != 0 {
            return Err(TableError::Value("reserved bytes"));
        }
        members.push(ChunkMember {
            dev,
            offset_bytes: from.u64(),
        });
    }
    let unit = u64::from(stripe_unit_blocks) * BLOCK_SIZE;
    let shape = match profile {
        Profile::Single => member_count == 1,
        Profile::Mirror => member_count == 2,
        Profile::Stripe => {
            member_count >= 2
                && stripe_unit_blocks.is_power_of_two()
                && member_len_bytes.is_multiple_of(unit)
        }
    };
    let aligned = |bytes: u64| bytes.is_multiple_of(BLOCK_SIZE);
    if !shape || member_len_bytes == 0 || !members.iter().all(|m| aligned(m.offset_bytes)) {
        return Err(TableError::Value("chunk shape"));
    }
    let copies_of = if profile == Profile::Stripe {
        u64::from(member_count)
    } else {
        1
    };
    let len_blocks = (member_len_bytes / BLOCK_SIZE).checked_mul(copies_of);
    let len_blocks = len_blocks
        .filter(|&len| aligned(member_len_bytes) && start.0.checked_add(len).is_some_and(fits))
        .ok_or(TableError::Value("chunk length"))?;
    Ok(Chunk {
        id,
        start,
        len_blocks,
        kind,
        profile,
        stripe_unit_blocks,
        members,
        member_len_bytes,
    })
}

/// Logical byte addresses must fit 63 bits.
fn fits(end_block: u64) -> bool {
    end_block <= (1 << 63) / BLOCK_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = [9; 16];

    fn sample() -> Table {
        let member = |dev, offset_bytes| ChunkMember { dev, offset_bytes };
        Table {
            next_chunk_id: 2,
            next_block: 3072,
            chunks: vec![
                Chunk {
                    id: 0,
                    start: VolBlock(0),
                    len_blocks: 1024,
                    kind: ChunkKind::Meta,
                    profile: Profile::Mirror,
                    stripe_unit_blocks: 64,
                    members: vec![member(0, 1 << 20), member(1, 1 << 20)],
                    member_len_bytes: 4 << 20,
                },
                Chunk {
                    id: 1,
                    start: VolBlock(1024),
                    len_blocks: 2048,
                    kind: ChunkKind::Data,
                    profile: Profile::Stripe,
                    stripe_unit_blocks: 64,
                    members: vec![member(0, 5 << 20), member(1, 5 << 20)],
                    member_len_bytes: 4 << 20,
                },
            ],
        }
    }

    #[test]
    fn encode_and_decode_agree() {
        let sizes = [16 << 20; 2];
        let (mut bytes, _) = sample().encode(&UUID, 5, 2);
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        assert_eq!(Table::decode(&bytes, &UUID, 5, &sizes), Ok(sample()));
        assert_eq!(
            Table::decode(&bytes, &UUID, 6, &sizes),
            Err(TableError::Foreign)
        );
        assert_eq!(
            Table::decode(&bytes, &[8; 16], 5, &sizes),
            Err(TableError::Foreign)
        );
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (bytes, _) = sample().encode(&UUID, 5, 2);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(
                Table::decode(&damaged, &UUID, 5, &[16 << 20; 2]).is_err(),
                "bit {bit}"
            );
        }
    }

    /// Right checksum, wrong content: shares that overlap, lie outside, or logical disorder.
    #[test]
    fn impossible_tables_are_refused() {
        let wrong: [fn(&mut Table); 7] = [
            |table| table.chunks[1].members[0].offset_bytes = 4 << 20,
            |table| table.chunks[1].members[0].offset_bytes = 15 << 20,
            |table| table.chunks[1].members[0].offset_bytes = 0,
            |table| table.chunks[1].members[0].dev = 2,
            |table| table.chunks[1].start = VolBlock(0),
            |table| table.next_block = 5,
            |table| table.chunks[1].member_len_bytes = 100 << 10,
        ];
        for change in wrong {
            let mut table = sample();
            change(&mut table);
            let (bytes, _) = table.encode(&UUID, 5, 2);
            let refused = Table::decode(&bytes, &UUID, 5, &[16 << 20; 2]);
            assert!(matches!(refused, Err(TableError::Value(_))), "{refused:?}");
        }
    }
}
