//! Data that says where it belongs.
//!
//! Each 4 KiB block carries a mark, a seed, a version and its own index, and is filled with bytes
//! that follow from them: a block found anywhere, on a raw device or in a wrong file, can be
//! traced, and one that is torn or mixed from two writes does not decode.

/// Bytes per block.
pub const BLOCK: usize = 4096;
/// What every block begins with.
const MARK: [u8; 8] = *b"blkpatrn";
/// Bytes before the filling.
const HEADER: usize = 32;

/// What a block says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// Which file it belongs to.
    pub seed: u64,
    /// Which write of that file it came from.
    pub version: u64,
    /// Its place in the file, in blocks.
    pub index: u64,
}

impl Stamp {
    /// Fills one block.
    pub fn encode(self, block: &mut [u8]) {
        let words = [self.seed, self.version, self.index].map(u64::to_le_bytes);
        block[..8].copy_from_slice(&MARK);
        block[8..HEADER].copy_from_slice(words.as_flattened());
        let mut state = Random::new(self.seed ^ self.version.rotate_left(32) ^ self.index);
        for chunk in block[HEADER..].chunks_exact_mut(8) {
            chunk.copy_from_slice(&state.next().to_le_bytes());
        }
    }

    /// Reads a block; `None` if it is not exactly what `encode` makes.
    pub fn decode(block: &[u8]) -> Option<Self> {
        if block.len() != BLOCK || block[..8] != MARK {
            return None;
        }
        let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
        let stamp = Self {
            seed: word(8),
            version: word(16),
            index: word(24),
        };
        let mut expected = vec![0; BLOCK];
        stamp.encode(&mut expected);
        (expected == block).then_some(stamp)
    }
}

/// Data of `blocks` blocks from block `first` on.
pub fn blocks(seed: u64, version: u64, first: u64, count: u64) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(count).expect("fits") * BLOCK];
    for (index, block) in (first..).zip(data.chunks_exact_mut(BLOCK)) {
        Stamp {
            seed,
            version,
            index,
        }
        .encode(block);
    }
    data
}

/// A small generator of pseudo-random numbers (splitmix64); the same seed, the same numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator that starts from a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    #[expect(
        clippy::should_implement_trait,
        reason = "an endless source, not an iterator"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let words = (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(count).collect()
    }
}

/// The seed of a randomised test: `SEED`, else one from the clock; printed either way.
pub fn seed() -> u64 {
    let given = std::env::var("SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |elapsed| elapsed.as_secs())
    });
    println!("SEED={seed}");
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_decodes_to_its_stamp_and_damage_is_seen() {
        let stamp = Stamp {
            seed: 7,
            version: 3,
            index: 9,
        };
        let mut block = vec![0; BLOCK];
        stamp.encode(&mut block);
        assert_eq!(Stamp::decode(&block), Some(stamp));
        for at in [0, 8, 31, 32, 2048, BLOCK - 1] {
            let mut damaged = block.clone();
            damaged[at] ^= 1;
            assert_eq!(Stamp::decode(&damaged), None, "byte {at}");
        }
        assert_eq!(Stamp::decode(&vec![0; BLOCK]), None);
    }

    #[test]
    fn random_bytes_have_the_asked_for_length() {
        for len in [0, 1, 7, 8, 9, 4096] {
            assert_eq!(Random::new(1).bytes(len).len(), len);
        }
    }
}
