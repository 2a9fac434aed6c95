//! A small seeded generator.

/// Odd, and without a pattern in its bits.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The generator of step `nth` of a run: what another step draws does not matter to it.
    pub fn of(seed: u64, nth: u64) -> Self {
        Self(Self(seed.rotate_left(32) ^ nth).next())
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STRIDE);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True in one of `n` cases.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }

    /// One of `from`, each given with a label. While the one that the lot falls on is among them,
    /// it does not matter who else is.
    pub fn pick_labelled<T>(&mut self, from: impl Iterator<Item = (u64, T)>) -> Option<T> {
        let lot = self.next();
        let drawn = |label: u64| Rng(lot ^ label.wrapping_mul(STRIDE)).next();
        from.min_by_key(|&(label, _)| drawn(label))
            .map(|(_, chosen)| chosen)
    }

    /// Bytes, none of them zero, so that a lost byte shows.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            let word = self.next() | 0x0101_0101_0101_0101;
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.truncate(len);
        out
    }
}
