//! The head: how long the metadata file is and how many chunks it uses.
//!
//! Blocks 0 and 1 of the first metadata chunk, written by turns: sequence `s` to slot `s % 2`. The
//! valid one with the higher sequence counts. A slot of zeros has never been written.

use braidfs_blockdev::{AlignedBuf, PAGE_SIZE};

use super::checksums::HEAD_BLOCKS;

const MAGIC: [u8; 8] = *b"BRAIDMET";
const LEN: usize = 36;

/// A valid head, or, with sequence 0, none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub sequence: u64,
    pub len_bytes: u64,
    pub chunk_count: u32,
}

impl Head {
    pub(super) fn encode(&self) -> AlignedBuf {
        let mut buf = AlignedBuf::zeroed(PAGE_SIZE);
        buf[..8].copy_from_slice(&MAGIC);
        buf[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        buf[16..24].copy_from_slice(&self.len_bytes.to_le_bytes());
        buf[24..28].copy_from_slice(&self.chunk_count.to_le_bytes());
        let crc = crc32c::crc32c(&buf[..LEN - 4]);
        buf[LEN - 4..LEN].copy_from_slice(&crc.to_le_bytes());
        buf
    }

    /// What a copy of `slot` says; zeros are no head yet. `None` if it is damaged.
    pub(super) fn decode(raw: &[u8], slot: u64) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(raw.get(at..at + 8)?.try_into().ok()?));
        let half = |at: usize| Some(u32::from_le_bytes(raw.get(at..at + 4)?.try_into().ok()?));
        if raw.iter().all(|&byte| byte == 0) {
            return Some(Self::default());
        }
        if raw.get(..8)? != MAGIC
            || half(LEN - 4)? != crc32c::crc32c(raw.get(..LEN - 4)?)
            || raw[28..32].iter().chain(&raw[LEN..]).any(|&byte| byte != 0)
        {
            return None;
        }
        let head = Self {
            sequence: word(8)?,
            len_bytes: word(16)?,
            chunk_count: half(24)?,
        };
        (head.sequence > 0 && head.slot() == slot).then_some(head)
    }

    /// Where this one is written.
    pub(super) fn slot(&self) -> u64 {
        self.sequence % HEAD_BLOCKS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_round_trips_and_damage_is_noticed() {
        let head = Head {
            sequence: 9,
            len_bytes: 1 << 33,
            chunk_count: 3,
        };
        let mut raw = head.encode().to_vec();
        assert_eq!(Head::decode(&raw, 1), Some(head));
        assert_eq!(Head::decode(&raw, 0), None, "in the wrong slot");
        for at in 0..PAGE_SIZE {
            raw[at] ^= 1;
            assert_eq!(Head::decode(&raw, 1), None, "byte {at}");
            raw[at] ^= 1;
        }
        assert_eq!(Head::decode(&[0; PAGE_SIZE], 0), Some(Head::default()));
    }
}
