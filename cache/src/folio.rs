//! A folio: a naturally aligned run of 2^k pages of a file, with state bits for each page.
//!
//! | bits of a page | meaning |
//! | --- | --- |
//! | none | the folio has room for it, its bytes mean nothing |
//! | reading | a fill owns it: bytes come in a private frame; writers, discard and readers wait |
//! | uptodate | readable |
//! | uptodate, dirty | newer than the device, not yet handed to writeback |
//! | uptodate, writeback | its bytes are pinned and on their way to the device; discard waits |
//! | uptodate, writeback, dirty | as above, and written again meanwhile (in another frame) |
//!
//! A page is never reading and uptodate. `frame` is `None` only while every page that means
//! something is reading. All of it is guarded by the lock of the address space, except `touch`.

use std::sync::atomic::{AtomicU32, Ordering};

use braidfs_blockdev::PAGE_SIZE;
use smallvec::{SmallVec, smallvec};

use crate::arena::Frame;
use crate::units::mem;

/// State bits of up to 64 pages.
#[derive(Clone, Copy, Default)]
pub(crate) struct Word {
    bits: [u64; 4],
}

/// Which state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bit {
    Uptodate = 0,
    Dirty = 1,
    Reading = 2,
    Writeback = 3,
}

pub(crate) struct Folio {
    pub order: u8,
    pub frame: Option<Frame>,
    words: SmallVec<[Word; 1]>,
    /// Its node in the replacement queues.
    pub slot: u32,
    touch: AtomicU32,
}

/// In `touch`: how often it was used again, up to 3; whether readahead brought it and nobody used
/// it yet; above, the byte where the last use ended.
const FREQ_MASK: u32 = 3;
const READAHEAD: u32 = 4;
const END_SHIFT: u32 = 8;

/// `count` ones from bit `first` of a word on.
fn mask(first: usize, count: usize) -> u64 {
    debug_assert!(count > 0 && first + count <= 64);
    (u64::MAX >> (64 - count)) << first
}

/// The parts of `first..first + count` in each word: word, first bit, number of bits.
fn spans(first: usize, count: usize) -> impl Iterator<Item = (usize, u64)> {
    let (mut at, end) = (first, first + count);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (word, bit) = (at / 64, at % 64);
        let len = (64 - bit).min(end - at);
        at += len;
        Some((word, mask(bit, len)))
    })
}

impl Folio {
    pub fn new(order: u8, frame: Option<Frame>, slot: u32) -> Self {
        debug_assert!(frame.as_ref().is_none_or(|frame| frame.order() == order));
        let words = (1usize << order).div_ceil(64);
        Self {
            order,
            frame,
            words: smallvec![Word::default(); words],
            slot,
            touch: AtomicU32::new(0),
        }
    }

    pub fn pages(&self) -> usize {
        1 << self.order
    }

    /// Sets a bit of `count` pages; gives how many did not have it.
    pub fn set(&mut self, bit: Bit, first: usize, count: usize) -> u64 {
        let mut new = 0;
        for (word, mask) in spans(first, count) {
            let bits = &mut self.words[word].bits[bit as usize];
            new += u64::from((mask & !*bits).count_ones());
            *bits |= mask;
        }
        new
    }

    /// Clears a bit of `count` pages; gives how many had it.
    pub fn clear(&mut self, bit: Bit, first: usize, count: usize) -> u64 {
        let mut old = 0;
        for (word, mask) in spans(first, count) {
            let bits = &mut self.words[word].bits[bit as usize];
            old += u64::from((mask & *bits).count_ones());
            *bits &= !mask;
        }
        old
    }

    pub fn has(&self, bit: Bit, page: usize) -> bool {
        self.words[page / 64].bits[bit as usize] >> (page % 64) & 1 == 1
    }

    pub fn count(&self, bit: Bit, first: usize, count: usize) -> u64 {
        spans(first, count)
            .map(|(word, mask)| {
                u64::from((self.words[word].bits[bit as usize] & mask).count_ones())
            })
            .sum()
    }

    pub fn any(&self, bit: Bit) -> bool {
        self.words.iter().any(|word| word.bits[bit as usize] != 0)
    }

    pub fn all_of(&self, bit: Bit, first: usize, count: usize) -> bool {
        spans(first, count).all(|(word, mask)| self.words[word].bits[bit as usize] & mask == mask)
    }

    /// From `from` on, how many pages below `end` are alike in `bit`: whether they have it, and
    /// their number.
    pub fn run_of(&self, bit: Bit, from: usize, end: usize) -> (bool, usize) {
        let has = self.has(bit, from);
        let mut at = from;
        while at < end {
            let bits = self.words[at / 64].bits[bit as usize];
            let bits = if has { !bits } else { bits } >> (at % 64);
            if bits != 0 {
                at += bits.trailing_zeros() as usize;
                break;
            }
            at = (at / 64 + 1) * 64;
        }
        (has, at.min(end) - from)
    }

    /// The pages below `end` from `from` on for which `pick` holds, as (first, count) runs.
    pub fn runs(&self, bit: Bit, from: usize, end: usize) -> impl Iterator<Item = (usize, usize)> {
        let mut at = from;
        std::iter::from_fn(move || {
            while at < end {
                let (has, count) = self.run_of(bit, at, end);
                let first = at;
                at += count;
                if has {
                    return Some((first, count));
                }
            }
            None
        })
    }

    /// No I/O under way and nothing to write: may be evicted.
    pub fn is_idle_clean(&self) -> bool {
        self.words.iter().all(|word| {
            let [_, dirty, reading, writeback] = word.bits;
            dirty | reading | writeback == 0
        })
    }

    /// No page means anything: to be removed.
    pub fn is_void(&self) -> bool {
        self.words.iter().all(|word| word.bits == [0; 4])
    }

    /// Takes the states of `count` pages from page `from` of another folio.
    pub fn copy_states(&mut self, other: &Folio, from: usize) {
        for bit in [Bit::Uptodate, Bit::Dirty, Bit::Reading, Bit::Writeback] {
            for (first, count) in other.runs(bit, from, from + self.pages()) {
                self.set(bit, first - from, count);
            }
        }
        self.touch = AtomicU32::new(other.touch.load(Ordering::Relaxed) & FREQ_MASK);
    }

    /// Copies the uptodate pages of `from` that lie in `keep` into the same place of `to`.
    pub fn copy_uptodate(&self, to: &mut [u8]) {
        let Some(frame) = &self.frame else { return };
        for (first, count) in self.runs(Bit::Uptodate, 0, self.pages()) {
            let (start, end) = (first * PAGE_SIZE, (first + count) * PAGE_SIZE);
            to[start..end].copy_from_slice(&frame.bytes()[start..end]);
        }
    }

    /// Readahead brought it.
    pub fn mark_readahead(&mut self) {
        *self.touch.get_mut() |= READAHEAD;
    }

    /// Brought by readahead and not used since.
    pub fn is_unused_readahead(&self) -> bool {
        self.touch.load(Ordering::Relaxed) & READAHEAD != 0
    }

    /// Bytes `start..end` of the folio are used. Going on where the last use ended is the same
    /// use of a stream; going back is using it again, which is what replacement counts. Gives
    /// true for the first use of what readahead brought. A lost race costs a count, no more.
    pub fn touched(&self, start: usize, end: usize) -> bool {
        let old = self.touch.load(Ordering::Relaxed);
        let again = (start as u64) < u64::from(old >> END_SHIFT);
        let freq = (old & FREQ_MASK) + u32::from(again);
        let end = u32::try_from(end).expect("inside a folio");
        let new = end << END_SHIFT | freq.min(FREQ_MASK);
        if new != old {
            self.touch.store(new, Ordering::Relaxed);
        }
        old & READAHEAD != 0
    }

    pub fn freq(&self) -> u32 {
        self.touch.load(Ordering::Relaxed) & FREQ_MASK
    }

    pub fn age(&self) {
        let old = self.touch.load(Ordering::Relaxed);
        if old & FREQ_MASK > 0 {
            self.touch.store(old - 1, Ordering::Relaxed);
        }
    }
}

/// The largest order of a folio at page `page` with room for `room` pages.
pub(crate) fn order_at(page: u64, room: u64, order_max: u8) -> u8 {
    debug_assert!(room > 0);
    let aligned = page.trailing_zeros().min(63);
    let order = aligned.min(room.ilog2()).min(u32::from(order_max));
    u8::try_from(order).expect("at most the largest order")
}

/// Page index inside a folio that starts at `start`.
pub(crate) fn inside(page: u64, start: u64) -> usize {
    mem(page - start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_count_exactly_over_word_borders() {
        let mut folio = Folio::new(8, None, 0);
        assert_eq!(folio.set(Bit::Dirty, 60, 10), 10);
        assert_eq!(folio.set(Bit::Dirty, 0, 256), 246);
        assert_eq!(folio.clear(Bit::Dirty, 63, 2), 2);
        assert_eq!(folio.count(Bit::Dirty, 0, 256), 254);
        let runs: Vec<_> = folio.runs(Bit::Dirty, 0, 256).collect();
        assert_eq!(runs, [(0, 63), (65, 191)]);
        assert_eq!(folio.run_of(Bit::Dirty, 63, 256), (false, 2));
        assert!(folio.all_of(Bit::Dirty, 65, 191) && !folio.all_of(Bit::Dirty, 64, 2));
        assert!(!folio.is_idle_clean() && !folio.is_void());
    }

    #[test]
    fn a_stream_through_a_folio_is_one_use() {
        let mut folio = Folio::new(5, None, 0);
        folio.mark_readahead();
        assert!(folio.touched(0, 4096));
        for page in 1..32 {
            assert!(!folio.touched(page * 4096, (page + 1) * 4096));
        }
        assert_eq!(folio.freq(), 0);
        folio.touched(0, 4096);
        assert_eq!(folio.freq(), 1);
    }

    #[test]
    fn orders_are_aligned_and_fit() {
        assert_eq!(order_at(0, 256, 8), 8);
        assert_eq!(order_at(0, 255, 8), 7);
        assert_eq!(order_at(4, 256, 8), 2);
        assert_eq!(order_at(3, 256, 8), 0);
        assert_eq!(order_at(256, 1000, 4), 4);
    }
}
