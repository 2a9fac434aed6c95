//! Sets of blocks, one bit each: 32 MiB of memory for a TiB that is all in use.
//!
//! Bits come in pages of 32,768, made when the first of them is set, so a set takes memory for the
//! parts of the volume that it touches, wherever they lie.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bits of a word, and words of a page.
const WORD: u64 = 64;
const WORDS: usize = 512;
/// Bits of a page.
const PAGE_BITS: u64 = WORD * WORDS as u64;

type Words = [u64; WORDS];

/// A set of blocks.
#[derive(Debug, Default)]
pub(super) struct Bitmap {
    pages: BTreeMap<u64, Box<Words>>,
}

/// Bits `from..to` of a word.
fn mask(from: u64, to: u64) -> u64 {
    let up_to = |bits: u64| {
        if bits == WORD {
            u64::MAX
        } else {
            (1 << bits) - 1
        }
    };
    up_to(to) & !up_to(from)
}

/// The place of a word inside its page.
fn slot(block: u64) -> usize {
    usize::try_from(block % PAGE_BITS / WORD).expect("a page has few words")
}

/// Cuts a range into the parts of single words, with their masks.
fn words(range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let word = at / WORD * WORD;
        let part = mask(at - word, (range.end - word).min(WORD));
        at = word.saturating_add(WORD);
        Some((word, part))
    })
}

impl Bitmap {
    /// Adds the blocks of `range`; those that were there before are added to `again`.
    pub(super) fn add(&mut self, range: Range<u64>, again: &mut Bitmap) {
        for (at, part) in words(range) {
            let page = self.pages.entry(at / PAGE_BITS);
            let word = &mut page.or_insert_with(|| Box::new([0; WORDS]))[slot(at)];
            if *word & part != 0 {
                again.set_word(at, *word & part);
            }
            *word |= part;
        }
    }

    fn set_word(&mut self, at: u64, part: u64) {
        let page = self.pages.entry(at / PAGE_BITS);
        page.or_insert_with(|| Box::new([0; WORDS]))[slot(at)] |= part;
    }

    /// Adds the blocks of `range`.
    pub(super) fn set(&mut self, range: Range<u64>) {
        for (at, part) in words(range) {
            self.set_word(at, part);
        }
    }

    /// Whether nothing was ever added.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    fn word(&self, at: u64) -> u64 {
        let page = self.pages.get(&(at / PAGE_BITS));
        page.map_or(0, |page| page[slot(at)])
    }

    /// The first block of `range` that is in the set, or (with `wanted` false) that is not.
    pub(super) fn find(&self, range: Range<u64>, wanted: bool) -> Option<u64> {
        let mut at = range.start;
        while at < range.end {
            if !self.pages.contains_key(&(at / PAGE_BITS)) {
                if !wanted {
                    return Some(at);
                }
                let (next, _) = self.pages.range(at / PAGE_BITS..).next()?;
                at = next * PAGE_BITS;
                continue;
            }
            let word = at / WORD * WORD;
            let bits = if wanted {
                self.word(word)
            } else {
                !self.word(word)
            };
            let bits = bits & mask(at - word, WORD);
            if bits != 0 {
                let found = word + u64::from(bits.trailing_zeros());
                return (found < range.end).then_some(found);
            }
            at = word.saturating_add(WORD);
        }
        None
    }

    /// The runs of blocks of `range` that are in the set, or (with `wanted` false) that are not.
    pub(super) fn runs(
        &self,
        range: Range<u64>,
        wanted: bool,
    ) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let start = self.find(at..range.end, wanted)?;
            at = self.find(start..range.end, !wanted).unwrap_or(range.end);
            Some(start..at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(ranges in proptest::collection::vec((0u64..100_000, 0u64..9_000), 0..12),
                       looked_at in 0u64..100_000, len in 0u64..70_000) {
            let (mut bits, mut again) = (Bitmap::default(), Bitmap::default());
            let (mut set, mut twice) = (BTreeSet::new(), BTreeSet::new());
            for (start, len) in ranges {
                bits.add(start..start + len, &mut again);
                for block in start..start + len {
                    if !set.insert(block) {
                        twice.insert(block);
                    }
                }
            }
            let range = looked_at..looked_at + len;
            for (bits, set) in [(&bits, &set), (&again, &twice)] {
                let found: Vec<u64> = bits.runs(range.clone(), true).flatten().collect();
                let expected: Vec<u64> = set.range(range.clone()).copied().collect();
                prop_assert_eq!(&found, &expected);
                let missing: Vec<u64> = bits.runs(range.clone(), false).flatten().collect();
                let expected: Vec<u64> = range.clone().filter(|at| !set.contains(at)).collect();
                prop_assert_eq!(missing, expected);
            }
        }
    }

    #[test]
    fn the_last_blocks_are_blocks_like_others() {
        let mut bits = Bitmap::default();
        bits.set(u64::MAX - 3..u64::MAX);
        assert_eq!(bits.find(0..u64::MAX, true), Some(u64::MAX - 3));
        let runs: Vec<_> = bits.runs(0..u64::MAX, true).collect();
        let all = u64::MAX - 3..u64::MAX;
        assert_eq!(runs, std::slice::from_ref(&all));
    }
}
