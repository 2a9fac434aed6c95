//! redb's header: page 0 of its file, sealed.
//!
//! redb writes its header in place, and all that it says hangs on it. So it does not go through
//! the page cache: its image stays in memory, and each sync writes it with a seal into the same
//! 512-byte sector, which a device writes whole or not at all. The seal has a magic, a CRC32C of
//! the sector and a sequence number that grows with each write. So each of the two copies can be
//! verified by itself, and after a power cut between them the newer one is known. Whoever opens
//! the file for writing makes the copies alike again before anything else is written; so no two
//! headers of the same sequence ever differ, and an older one is never met later.
//!
//! The seal also names the head that was durable when it was written: a head slot that is lost in
//! both copies is known to be an older one, or not.

use std::io;

use braidfs_blockdev::{AlignedBuf, PAGE_SIZE};

/// Bytes of a sector.
const SECTOR_LEN: usize = 512;
/// What redb uses: the header and two commit slots.
const REDB_LEN: usize = 320;

const MAGIC: [u8; 8] = *b"BRAIDHDR";
/// Magic (8), CRC32C of the sector with this field zero (4), zero (4), sequence (8), sequence of
/// the head (8), zeros. The CRC32C is not the last thing in the sector: a CRC over bytes that end
/// in their own CRC would be the same for all of them.
const MAGIC_AT: usize = REDB_LEN;
const CRC_AT: usize = MAGIC_AT + 8;
const SEQUENCE_AT: usize = CRC_AT + 8;
const HEAD_AT: usize = SEQUENCE_AT + 8;
const END: usize = HEAD_AT + 8;

/// The image of the header.
pub(super) struct Header {
    page: AlignedBuf,
    /// Of the last write that was begun; 0: none ever.
    sequence: u64,
    head_sequence: u64,
    /// redb changed it since.
    is_dirty: bool,
}

fn word(raw: &[u8], at: usize) -> u64 {
    let bytes = raw.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    u64::from_le_bytes(bytes.unwrap_or_default())
}

fn crc_of(raw: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&raw[..CRC_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &raw[CRC_AT + 4..SECTOR_LEN])
}

impl Header {
    /// The header of a file that is still empty.
    pub(super) fn empty() -> Self {
        Self {
            page: AlignedBuf::zeroed(PAGE_SIZE),
            sequence: 0,
            head_sequence: 0,
            is_dirty: false,
        }
    }

    /// What one copy says; `None` if it is damaged. Only the sector counts: the rest of the block
    /// is zeros, as [`Header::is_written`] wants it.
    pub(super) fn decode(raw: &[u8]) -> Option<Self> {
        let sealed = raw.len() == PAGE_SIZE
            && raw[MAGIC_AT..CRC_AT] == MAGIC
            && raw[CRC_AT..CRC_AT + 4] == crc_of(raw).to_le_bytes()
            && raw[END..SECTOR_LEN].iter().all(|&byte| byte == 0)
            && word(raw, SEQUENCE_AT) > 0;
        sealed.then(|| Self {
            page: AlignedBuf::from_slice(&raw[..SECTOR_LEN]),
            sequence: word(raw, SEQUENCE_AT),
            head_sequence: word(raw, HEAD_AT),
            is_dirty: false,
        })
    }

    /// The newer of two.
    pub(super) fn newer(self, other: Self) -> Self {
        if other.sequence > self.sequence {
            other
        } else {
            self
        }
    }

    /// Whether `raw` is what was last written, as far as that is still known.
    pub(super) fn is_written(&self, raw: &[u8]) -> bool {
        if self.is_dirty {
            Self::decode(raw).is_some_and(|read| read.sequence == self.sequence)
        } else {
            raw == self.image()
        }
    }

    /// The whole page; as it was last written, unless redb changed it since.
    pub(super) fn image(&self) -> &[u8] {
        &self.page
    }

    /// Sequence of the head that was durable when this was written.
    pub(super) fn head_sequence(&self) -> u64 {
        self.head_sequence
    }

    /// redb changed it since it was last written.
    pub(super) fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    /// redb reads bytes of the page.
    pub(super) fn read(&self, at: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.page[at..at + out.len()]);
        if at + out.len() > REDB_LEN {
            out[REDB_LEN.saturating_sub(at)..].fill(0);
        }
    }

    /// redb writes bytes of the page. It has never written behind its header.
    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> io::Result<()> {
        let Some(place) = self.page[..REDB_LEN].get_mut(at..at + data.len()) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the metadata store's header is longer than this version knows",
            ));
        };
        place.copy_from_slice(data);
        self.is_dirty = true;
        Ok(())
    }

    /// The sealed page to be written now. Whether the write succeeds or not, this sequence is used.
    pub(super) fn seal(&mut self, head_sequence: u64) -> AlignedBuf {
        self.sequence += 1;
        self.head_sequence = head_sequence;
        self.page[MAGIC_AT..CRC_AT].copy_from_slice(&MAGIC);
        self.page[SEQUENCE_AT..HEAD_AT].copy_from_slice(&self.sequence.to_le_bytes());
        self.page[HEAD_AT..END].copy_from_slice(&head_sequence.to_le_bytes());
        let crc = crc_of(&self.page);
        self.page[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        self.is_dirty = false;
        AlignedBuf::from_slice(&self.page)
    }

    /// The write failed: it is to be written again.
    pub(super) fn set_dirty(&mut self) {
        self.is_dirty = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(header: &mut Header, byte: u8) -> AlignedBuf {
        header.write(9, &[byte]).unwrap();
        header.seal(3)
    }

    #[test]
    fn the_seal_verifies_each_copy_by_itself() {
        let mut header = Header::empty();
        assert!(Header::decode(&[0; PAGE_SIZE]).is_none());
        let mut raw = written(&mut header, 7).to_vec();
        let read = Header::decode(&raw).unwrap();
        assert_eq!((read.sequence, read.head_sequence()), (1, 3));
        assert!(read.is_written(&raw) && header.is_written(&raw));
        for at in 0..PAGE_SIZE {
            raw[at] ^= 0x40;
            let read = Header::decode(&raw);
            assert!(read.is_none_or(|read| !read.is_written(&raw)), "byte {at}");
            raw[at] ^= 0x40;
        }
    }

    #[test]
    fn a_checksum_over_the_sector_tells_contents_apart() {
        let mut header = Header::empty();
        let sums: Vec<u32> = (0..4)
            .map(|byte| crc32c::crc32c(&written(&mut header, byte)[..SECTOR_LEN]))
            .collect();
        assert!(sums.windows(2).all(|pair| pair[0] != pair[1]), "{sums:x?}");
    }

    #[test]
    fn the_newer_copy_is_chosen_wherever_it_lies() {
        let mut header = Header::empty();
        let old = written(&mut header, 1);
        let new = written(&mut header, 2);
        for pair in [[&old, &new], [&new, &old]] {
            let [a, b] = pair.map(|raw| Header::decode(raw).unwrap());
            let chosen = a.newer(b);
            assert!(chosen.is_written(&new) && !chosen.is_written(&old));
        }
    }

    #[test]
    fn redb_sees_its_own_bytes_alone() {
        let mut header = Header::empty();
        header.write(0, &[5; REDB_LEN]).unwrap();
        header.seal(1);
        let mut page = [9; PAGE_SIZE];
        header.read(0, &mut page);
        assert!(page[..REDB_LEN].iter().all(|&byte| byte == 5));
        assert!(page[REDB_LEN..].iter().all(|&byte| byte == 0));
        let mut rest = [9; 100];
        header.read(400, &mut rest);
        assert_eq!(rest, [0; 100]);
        assert!(header.write(REDB_LEN - 1, &[1, 2]).is_err());
    }
}
