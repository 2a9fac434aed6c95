//! Page indices and half-open runs of them; the only place that turns bytes into pages.

use braidfs_blockdev::BLOCK_SIZE;

/// Bytes of a page as a file offset.
pub(crate) const PAGE: u64 = BLOCK_SIZE;

/// Half-open run of page indices `start..end`. Never empty when built by [`PageRange::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page.
    pub start: u64,
    /// The page behind the last one.
    pub end: u64,
}

impl PageRange {
    /// The last page index any file can have, plus one.
    pub const END_MAX: u64 = u64::MAX >> 12;

    /// Every page a file can have.
    pub const ALL: PageRange = PageRange {
        start: 0,
        end: Self::END_MAX,
    };

    /// `start..end`, or `None` if that is empty.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// The one page `page`.
    pub fn single(page: u64) -> Self {
        Self {
            start: page,
            end: page + 1,
        }
    }

    /// All pages that hold a byte of `offset..offset + len`.
    pub fn covering(offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        Self::new(offset / PAGE, end.div_ceil(PAGE)).filter(|_| len > 0)
    }

    /// The pages that lie wholly inside `offset..offset + len`.
    pub fn inside(offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        Self::new(offset.div_ceil(PAGE), end / PAGE)
    }

    /// Number of pages.
    pub fn count(self) -> u64 {
        self.end - self.start
    }

    /// The common part of two runs.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Does this run hold `page`?
    pub fn contains(self, page: u64) -> bool {
        self.start <= page && page < self.end
    }

    /// Does `next` begin where this run ends?
    pub fn abuts(self, next: Self) -> bool {
        self.end == next.start
    }
}

/// A count of pages or bytes that is known to fit memory.
pub(crate) fn mem(count: u64) -> usize {
    usize::try_from(count).expect("a length inside the arena fits usize")
}
