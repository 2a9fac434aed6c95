//! Whether a page of redb makes sense by itself: checked where it was read and found right.
//!
//! A checksum says that a page is what was written, not who wrote it. redb slices pages as their
//! offsets say, and takes memory as the page numbers in them say. So a page that does not fit
//! itself, or leads out of the file, is refused like one that cannot be read.
//!
//! A page does not tell which table it is of, so it has to fit one of the layouts in use: which one
//! redb sees is known only to redb (see [`super::contain`]). Allocates nothing.

/// redb's page, in bytes.
pub(super) const PAGE: u64 = 4096;

/// Type bytes of pages.
pub(super) const LEAF: u8 = 1;
pub(super) const BRANCH: u8 = 2;

/// Pages longer than this (16 MiB) cannot be: values are far shorter.
const ORDER_MAX: u32 = 12;

/// What lies before the keys of a branch, for each child: checksum, page number.
const CHECKSUM_LEN: usize = 16;
pub(super) const CHILD_LEN: usize = CHECKSUM_LEN + 8;

/// Lengths of keys and values, where fixed.
pub(super) type Widths = (Option<usize>, Option<usize>);

/// The layouts of pages: all tables but that of free space, that one, and redb's own two kinds.
const LAYOUTS: [Widths; 4] = [
    (None, None),
    (Some(8), Some(8)),
    (Some(16), None),
    (Some(5), None),
];

/// As much of redb's header tells where pages are.
pub(super) const GEOMETRY_LEN: usize = 24;

/// Where pages are in redb's file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub file_len: u64,
    /// Bytes before the data of a region.
    pub region_header: u64,
    /// Pages of the data of a region.
    pub region_pages: u64,
}

/// A place in redb's file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub offset: u64,
    pub len: u64,
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    let raw = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(usize::from(u16::from_le_bytes(raw)))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let raw = bytes.get(at..at.checked_add(4)?)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(raw)).ok()
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let raw = bytes.get(at..at.checked_add(8)?)?.try_into().ok()?;
    Some(u64::from_le_bytes(raw))
}

impl Geometry {
    /// As redb's header says; `None` if that makes no sense.
    pub(super) fn decode(header: &[u8], file_len: u64) -> Option<Self> {
        let number = |at: usize| Some(u32_at(header, at)? as u64);
        let made = Self {
            file_len,
            region_header: number(16)? * PAGE,
            region_pages: number(20)?,
        };
        (number(12)? == PAGE && made.region_pages > 0).then_some(made)
    }

    /// Where a page is; `None` if that is not in the file.
    pub(super) fn place(&self, number: u64) -> Option<Extent> {
        let order = u32::try_from(number >> 59).ok()?;
        if order > ORDER_MAX {
            return None;
        }
        let index = number & (0x000f_ffff >> order);
        let region = number >> 20 & 0x000f_ffff;
        if (index + 1) << order > self.region_pages {
            return None;
        }
        let len = PAGE << order;
        let region_len = self.region_header + self.region_pages * PAGE;
        let offset = PAGE + region * region_len + self.region_header + index * len;
        (offset + len <= self.file_len).then_some(Extent { offset, len })
    }
}

/// Whether the ends of `count` things, as the numbers from `at` on say, rise from `least` on;
/// gives the last of them.
fn rising(page: &[u8], at: usize, count: usize, least: usize) -> Option<usize> {
    let ends = page.get(at..at + 4 * count)?;
    let mut last = least;
    for raw in ends.as_chunks::<4>().0 {
        let end = u32::from_le_bytes(*raw) as usize;
        if end < last {
            return None;
        }
        last = end;
    }
    Some(last)
}

/// Whether keys of this length, whose order is known, rise.
fn keys_rise(keys: &[u8], len: usize) -> bool {
    let numbers = |key: &[u8]| (u64_at(key, 0), u64_at(key, 8));
    let mut keys = keys.chunks_exact(len.max(1));
    match len {
        5 => keys.all(|key| matches!(key[0], 3..=5)),
        8 | 16 => keys.is_sorted_by(|a, b| numbers(a) < numbers(b)),
        _ => true,
    }
}

/// Whether a leaf with `count` records fits a layout.
pub(super) fn leaf_fits(page: &[u8], count: usize, (key_len, value_len): Widths) -> bool {
    let table = |len: Option<usize>| if len.is_none() { 4 * count } else { 0 };
    let value_ends = 4 + table(key_len);
    let keys = value_ends + table(value_len);
    let values = match key_len {
        Some(len) => page
            .get(keys..keys + len * count)
            .filter(|bytes| keys_rise(bytes, len))
            .map(|_| keys + len * count),
        None => rising(page, 4, count, keys),
    };
    let Some(values) = values else { return false };
    let end = match value_len {
        Some(len) => Some(values + len * count),
        None => rising(page, value_ends, count, values),
    };
    end.is_some_and(|end| end <= page.len())
}

/// Whether the keys of a branch with `keys` keys fit a layout.
pub(super) fn branch_fits(page: &[u8], keys: usize, key_len: Option<usize>) -> bool {
    let at = 8 + CHILD_LEN * (keys + 1);
    match key_len {
        Some(len) => page
            .get(at..at + len * keys)
            .is_some_and(|bytes| keys_rise(bytes, len)),
        None => rising(page, at, keys, at + 4 * keys).is_some_and(|end| end <= page.len()),
    }
}

/// The page number of child `n` of a branch with `keys` keys.
pub(super) fn child_at(page: &[u8], keys: usize, n: usize) -> Option<u64> {
    u64_at(page, 8 + CHECKSUM_LEN * (keys + 1) + 8 * n)
}

/// Why the page that lies at `offset` makes no sense, if so.
pub(super) fn fault(page: &[u8], offset: u64, geometry: &Geometry) -> Option<&'static str> {
    let count = u16_at(page, 2).unwrap_or(0);
    if count == 0 {
        return Some("it is empty");
    }
    let kind = page.first().copied().unwrap_or(0);
    let fits = LAYOUTS.iter().any(|&widths| match kind {
        LEAF => leaf_fits(page, count, widths),
        BRANCH => branch_fits(page, count, widths.0),
        _ => true,
    });
    if !fits {
        return Some("its records do not fit into it");
    }
    match kind {
        LEAF => None,
        BRANCH => {
            let leads_out = |n| {
                let place = child_at(page, count, n).and_then(|number| geometry.place(number));
                place.is_none_or(|place| place.offset == offset)
            };
            let leads_out = (0..=count).any(leads_out);
            leads_out.then_some("it leads out of the file, or to itself")
        }
        _ => Some("it is of no known type"),
    }
}
