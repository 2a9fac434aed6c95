//! Checksums of metadata blocks, kept beside each metadata chunk.
//!
//! A metadata chunk starts with two head blocks, then its checksum area, then its payload. The
//! area is made of 512-byte sectors, each with the CRC32C of 127 payload blocks and one of its
//! own. A sector is what a device writes whole or not at all, and the entry of a block that
//! belongs to the durable state never changes, because redb does not rewrite such blocks. So an
//! area that is updated in place stays right for the durable state wherever the power fails.
//!
//! An entry of 0 means never written: such a block reads as zeros.

/// Bytes of a sector.
const SECTOR_LEN: usize = 512;

/// Payload blocks that one sector speaks for.
const SECTOR_ENTRIES: u64 = 127;

/// Payload blocks that one 4 KiB block of the area speaks for.
pub(crate) const BLOCK_ENTRIES: u64 = 8 * SECTOR_ENTRIES;

/// Head blocks at the start of every metadata chunk.
pub(crate) const HEAD_BLOCKS: u64 = 2;

/// How a chunk of `len` blocks is divided: blocks of the checksum area, blocks of payload.
pub(crate) fn divide(len: u64) -> (u64, u64) {
    let rest = len.saturating_sub(HEAD_BLOCKS);
    let area = rest.div_ceil(BLOCK_ENTRIES + 1);
    (area, rest - area)
}

/// What is known about the content of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// Never written: zeros.
    Nothing,
    /// Its CRC32C.
    Crc(u32),
    /// Written, but its checksum is one of the two values that double as marks.
    Unchecked,
    /// The sector that has the checksum is damaged in all copies.
    Lost,
}

const UNCHECKED: u32 = u32::MAX;

/// The checksum area of one chunk, in memory.
pub(crate) struct Area {
    entries: Vec<u32>,
    lost: Vec<bool>,
    dirty: Vec<bool>,
}

fn sector_of(index: u64) -> usize {
    usize::try_from(index / SECTOR_ENTRIES).expect("a chunk's blocks fit in memory")
}

fn entry_of(index: u64) -> usize {
    usize::try_from(index).expect("a chunk's blocks fit in memory")
}

impl Area {
    /// The area of a new chunk, all of it to be written.
    pub(crate) fn new(area_blocks: u64) -> Self {
        let blocks = entry_of(area_blocks);
        let entries = entry_of(area_blocks * BLOCK_ENTRIES);
        Self {
            entries: vec![0; entries],
            lost: vec![false; 8 * blocks],
            dirty: vec![true; blocks],
        }
    }

    /// Takes in one block of the area as read from a device; returns whether all its sectors are
    /// sound. Sectors that a former copy already gave are kept.
    pub(crate) fn load_block(&mut self, at: u64, raw: &[u8], first_copy: bool) -> bool {
        let mut sound = true;
        for (nth, sector) in raw.chunks_exact(SECTOR_LEN).enumerate() {
            let number = entry_of(at) * 8 + nth;
            if !first_copy && !self.lost[number] {
                continue;
            }
            let (body, sum) = sector.split_at(SECTOR_LEN - 4);
            let good = crc32c::crc32c(body).to_le_bytes() == sum;
            self.lost[number] = !good;
            sound &= good;
            if good {
                let from = number * entry_of(SECTOR_ENTRIES);
                for (entry, raw) in self.entries[from..].iter_mut().zip(body.chunks_exact(4)) {
                    *entry = u32::from_le_bytes(raw.try_into().expect("chunks of four"));
                }
            }
        }
        self.dirty[entry_of(at)] = false;
        sound
    }

    /// One block of the area as it is to be written.
    pub(crate) fn encode_block(&self, at: u64, out: &mut [u8]) {
        for (nth, sector) in out.chunks_exact_mut(SECTOR_LEN).enumerate() {
            let from = (entry_of(at) * 8 + nth) * entry_of(SECTOR_ENTRIES);
            let (body, sum) = sector.split_at_mut(SECTOR_LEN - 4);
            for (raw, entry) in body.chunks_exact_mut(4).zip(&self.entries[from..]) {
                raw.copy_from_slice(&entry.to_le_bytes());
            }
            sum.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        }
    }

    /// What is known about payload block `index`.
    pub(crate) fn known(&self, index: u64) -> Known {
        if self.lost[sector_of(index)] {
            return Known::Lost;
        }
        match self.entries[entry_of(index)] {
            0 => Known::Nothing,
            UNCHECKED => Known::Unchecked,
            crc => Known::Crc(crc),
        }
    }

    /// Payload block `index` was written with this checksum; `None` forgets the block.
    pub(crate) fn set(&mut self, index: u64, crc: Option<u32>) {
        let entry = match crc {
            None => 0,
            Some(0) => UNCHECKED,
            Some(crc) => crc,
        };
        let slot = &mut self.entries[entry_of(index)];
        if *slot != entry {
            *slot = entry;
            self.dirty[entry_of(index / BLOCK_ENTRIES)] = true;
        }
    }

    /// Blocks of the area that are to be written; they count as written from now on.
    pub(crate) fn take_dirty(&mut self) -> Vec<u64> {
        let mut taken = Vec::new();
        for (at, dirty) in (0..).zip(&mut self.dirty) {
            if std::mem::take(dirty) {
                taken.push(at);
            }
        }
        taken
    }

    /// A write of block `at` of the area failed: it is to be written again.
    pub(crate) fn set_dirty(&mut self, at: u64) {
        self.dirty[entry_of(at)] = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_divided_without_loss_and_the_area_covers_the_payload() {
        for len in 8..5000 {
            let (area, payload) = divide(len);
            assert_eq!(HEAD_BLOCKS + area + payload, len);
            assert!(area * BLOCK_ENTRIES >= payload, "{len}");
            assert!(
                (area - 1) * BLOCK_ENTRIES <= payload,
                "{len}: {area} is too much"
            );
        }
    }

    #[test]
    fn a_damaged_sector_is_noticed_and_taken_from_the_other_copy() {
        let mut area = Area::new(2);
        area.set(0, Some(7));
        area.set(200, Some(8));
        area.set(1016, Some(0));
        let mut raw = vec![0; 4096];
        area.encode_block(0, &mut raw);
        let mut bad = raw.clone();
        bad[512 + 9] ^= 1;
        let mut read = Area::new(2);
        assert!(!read.load_block(0, &bad, true));
        assert_eq!(
            (read.known(0), read.known(200)),
            (Known::Crc(7), Known::Lost)
        );
        assert!(read.load_block(0, &raw, false));
        assert_eq!(
            (read.known(0), read.known(200)),
            (Known::Crc(7), Known::Crc(8))
        );
        area.encode_block(1, &mut raw);
        assert!(read.load_block(1, &raw, true));
        assert_eq!(
            (read.known(1016), read.known(1017)),
            (Known::Unchecked, Known::Nothing)
        );
    }
}
