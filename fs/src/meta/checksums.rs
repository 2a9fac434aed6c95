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

/// Sectors of one block.
const BLOCK_SECTORS: usize = 8;

fn is_sound(sector: &[u8]) -> bool {
    let (body, sum) = sector.split_at(SECTOR_LEN - 4);
    crc32c::crc32c(body).to_le_bytes() == sum
}

/// How the copies of one block of the area were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Bit n: copy n could not be read, or has an unsound sector.
    bad: u8,
    /// Sound copies differ: a power cut came between them.
    differ: bool,
    /// A sector is sound in no copy.
    pub(crate) lost: bool,
}

impl Loaded {
    fn note_bad(&mut self, bad: impl Iterator<Item = bool>) {
        for (copy, bad) in bad.enumerate() {
            self.bad |= u8::from(bad) << copy;
        }
    }

    /// The numbers of the bad copies.
    pub(crate) fn bad_copies(self) -> impl Iterator<Item = u8> {
        (0..8).filter(move |copy| self.bad & (1 << copy) != 0)
    }
}

/// The checksum area of one chunk, in memory.
pub(crate) struct Area {
    entries: Vec<u32>,
    lost: Vec<bool>,
    dirty: Vec<bool>,
    /// Bit n % 64 of word n / 64: payload block n was written since the mount.
    new: Vec<u64>,
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
            lost: vec![false; BLOCK_SECTORS * blocks],
            dirty: vec![true; blocks],
            new: vec![0; entries.div_ceil(64)],
        }
    }

    /// Takes in one block of the area from all its copies (`None`: could not be read): each sector
    /// from the first copy that has it sound.
    pub(crate) fn load_block(&mut self, at: u64, copies: &[Option<&[u8]>]) -> Loaded {
        let mut loaded = Loaded::default();
        for nth in 0..BLOCK_SECTORS {
            let number = entry_of(at) * BLOCK_SECTORS + nth;
            let sector = |raw: &&[u8]| {
                let sector = raw.get(nth * SECTOR_LEN..(nth + 1) * SECTOR_LEN)?;
                is_sound(sector).then(|| sector.to_vec())
            };
            let sound: Vec<Option<Vec<u8>>> = copies
                .iter()
                .map(|raw| raw.as_ref().and_then(sector))
                .collect();
            loaded.note_bad(sound.iter().map(Option::is_none));
            let mut good = sound.iter().flatten();
            let first = good.next();
            loaded.differ |= good.any(|other| Some(other) != first);
            self.lost[number] = first.is_none();
            loaded.lost |= first.is_none();
            let Some(sector) = first else { continue };
            let from = number * entry_of(SECTOR_ENTRIES);
            let entries = sector[..SECTOR_LEN - 4].chunks_exact(4);
            for (entry, raw) in self.entries[from..].iter_mut().zip(entries) {
                *entry = u32::from_le_bytes(raw.try_into().expect("chunks of four"));
            }
        }
        // What a power cut left different is made alike with the next sync.
        self.dirty[entry_of(at)] = loaded.differ;
        loaded
    }

    /// Whether a copy of block `at`, as it lies on a device, is what it should be; of a block that
    /// is to be written, the sectors need only be sound.
    pub(crate) fn is_written(&self, at: u64, raw: &[u8]) -> bool {
        if self.dirty[entry_of(at)] {
            return raw.chunks_exact(SECTOR_LEN).all(is_sound);
        }
        let mut image = vec![0; raw.len()];
        self.encode_block(at, &mut image);
        image == raw
    }

    /// Whether a sector of block `at` is lost.
    pub(crate) fn has_lost(&self, at: u64) -> bool {
        let from = entry_of(at) * BLOCK_SECTORS;
        self.lost[from..from + BLOCK_SECTORS].contains(&true)
    }

    /// One block of the area as it is to be written. A lost sector stays one: its sum is wrong.
    pub(crate) fn encode_block(&self, at: u64, out: &mut [u8]) {
        for (nth, sector) in out.chunks_exact_mut(SECTOR_LEN).enumerate() {
            let number = entry_of(at) * BLOCK_SECTORS + nth;
            let from = number * entry_of(SECTOR_ENTRIES);
            let (body, sum) = sector.split_at_mut(SECTOR_LEN - 4);
            for (raw, entry) in body.chunks_exact_mut(4).zip(&self.entries[from..]) {
                raw.copy_from_slice(&entry.to_le_bytes());
            }
            let crc = crc32c::crc32c(body);
            let crc = if self.lost[number] { !crc } else { crc };
            sum.copy_from_slice(&crc.to_le_bytes());
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

    /// Whether payload block `index` was written since the mount.
    pub(crate) fn is_new(&self, index: u64) -> bool {
        self.new[entry_of(index / 64)] & (1 << (index % 64)) != 0
    }

    /// Payload block `index` was written with this checksum; `None` forgets the block.
    pub(crate) fn set(&mut self, index: u64, crc: Option<u32>) {
        let (word, bit) = (entry_of(index / 64), 1 << (index % 64));
        match crc {
            None => self.new[word] &= !bit,
            Some(_) => self.new[word] |= bit,
        }
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
        let loaded = read.load_block(0, &[Some(&bad), Some(&raw)]);
        assert_eq!(loaded.bad_copies().collect::<Vec<_>>(), [0]);
        assert!(!loaded.lost && !loaded.differ);
        assert_eq!(
            (read.known(0), read.known(200)),
            (Known::Crc(7), Known::Crc(8))
        );
        assert!(read.is_written(0, &raw) && !read.is_written(0, &bad));
        area.encode_block(1, &mut raw);
        let loaded = read.load_block(1, &[Some(&raw), None]);
        assert_eq!(loaded.bad_copies().collect::<Vec<_>>(), [1]);
        assert_eq!(
            (read.known(1016), read.known(1017)),
            (Known::Unchecked, Known::Nothing)
        );
    }

    #[test]
    fn what_is_lost_in_all_copies_stays_lost_when_its_block_is_written() {
        let mut area = Area::new(1);
        area.set(0, Some(7));
        area.set(200, Some(8));
        let mut raw = vec![0; 4096];
        area.encode_block(0, &mut raw);
        raw[512 + 9] ^= 1;
        let mut read = Area::new(1);
        let loaded = read.load_block(0, &[Some(&raw), Some(&raw)]);
        assert!(loaded.lost && read.has_lost(0));
        assert_eq!(
            (read.known(0), read.known(200)),
            (Known::Crc(7), Known::Lost)
        );
        read.set(1, Some(9));
        read.encode_block(0, &mut raw);
        let mut again = Area::new(1);
        assert!(again.load_block(0, &[Some(&raw), Some(&raw)]).lost);
        assert_eq!(
            (again.known(1), again.known(200)),
            (Known::Crc(9), Known::Lost)
        );
    }

    #[test]
    fn copies_that_a_power_cut_left_different_are_written_again() {
        let mut area = Area::new(1);
        area.set(3, Some(1));
        let (mut old, mut new) = (vec![0; 4096], vec![0; 4096]);
        area.encode_block(0, &mut old);
        area.set(3, Some(2));
        area.encode_block(0, &mut new);
        let mut read = Area::new(1);
        let loaded = read.load_block(0, &[Some(&old), Some(&new)]);
        assert!(loaded.differ && loaded.bad_copies().next().is_none());
        assert_eq!(read.take_dirty(), [0]);
    }
}
