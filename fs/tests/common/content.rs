//! The bytes of a file of the model, and which of its pages are data, set aside, or holes.

use std::collections::{BTreeMap, BTreeSet};

pub const PAGE: u64 = 4096;

/// Whether all of these bytes, at most a page of them, are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    *bytes == ZEROS[..bytes.len()]
}

/// A page that is absent is a hole, or set aside, and reads as zeros.
#[derive(Clone, Default)]
pub struct Content {
    pub size: u64,
    /// Pages with data: written since they were a hole.
    pages: BTreeMap<u64, Vec<u8>>,
    /// Pages that have a block and no data; also behind the end.
    aside: BTreeSet<u64>,
    /// An operation went half of its way, so that what is a hole is not known.
    pub is_vague: bool,
}

impl Content {
    fn each_part(offset: u64, len: u64, mut each: impl FnMut(u64, usize, usize, usize)) {
        let mut at = 0;
        while at < len {
            let within = (offset + at) % PAGE;
            let part = (PAGE - within).min(len - at);
            each(
                (offset + at) / PAGE,
                within as usize,
                at as usize,
                part as usize,
            );
            at += part;
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        Self::each_part(offset, data.len() as u64, |at, within, from, len| {
            self.aside.remove(&at);
            let page = self.pages.entry(at);
            let page = page.or_insert_with(|| vec![0; PAGE as usize]);
            page[within..within + len].copy_from_slice(&data[from..from + len]);
        });
        if !data.is_empty() {
            self.size = self.size.max(offset + data.len() as u64);
        }
    }

    /// Zeros a range. Whole pages become holes.
    pub fn punch(&mut self, from: u64, to: u64) {
        let (first, last) = (from.div_ceil(PAGE), to / PAGE);
        if first < last {
            let gone: Vec<u64> = self.aside.range(first..last).copied().collect();
            gone.iter().for_each(|at| {
                self.aside.remove(at);
            });
        }
        for at in self.touched(from, to) {
            let (low, high) = (from.max(at * PAGE), to.min((at + 1) * PAGE));
            if high - low == PAGE {
                self.pages.remove(&at);
            } else if let Some(page) = self.pages.get_mut(&at) {
                page[(low - at * PAGE) as usize..(high - at * PAGE) as usize].fill(0);
            }
        }
    }

    fn touched(&self, from: u64, to: u64) -> Vec<u64> {
        if from >= to {
            return Vec::new();
        }
        let range = self.pages.range(from / PAGE..to.div_ceil(PAGE));
        range.map(|(&at, _)| at).collect()
    }

    /// Gives every page of a range a block.
    pub fn set_aside(&mut self, from: u64, to: u64) {
        for at in from / PAGE..to.div_ceil(PAGE) {
            if !self.pages.contains_key(&at) {
                self.aside.insert(at);
            }
        }
    }

    /// Zeros a range whose pages all keep, or get, a block.
    pub fn zero(&mut self, from: u64, to: u64) {
        self.punch(from, to);
        self.set_aside(from, to);
    }

    pub fn truncate(&mut self, size: u64) {
        if size <= self.size {
            self.punch(size, self.size.next_multiple_of(PAGE));
            self.aside.split_off(&size.div_ceil(PAGE));
        }
        self.size = size;
        self.is_vague &= size > 0;
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let len = (len as u64).min(self.size.saturating_sub(offset));
        let mut out = vec![0; len as usize];
        Self::each_part(offset, len, |page, within, at, len| {
            if let Some(page) = self.pages.get(&page) {
                out[at..at + len].copy_from_slice(&page[within..within + len]);
            }
        });
        out
    }

    /// Pages that are not all zero.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let pages = self.pages.iter();
        let pages = pages.map(|(&at, page)| (at, page.as_slice()));
        pages.filter(|(_, page)| !is_zero(page))
    }

    pub fn is_zero(&self, from: u64, to: u64) -> bool {
        self.touched(from, to).into_iter().all(|at| {
            let (low, high) = (from.max(at * PAGE), to.min((at + 1) * PAGE));
            let page = &self.pages[&at];
            is_zero(&page[(low - at * PAGE) as usize..(high - at * PAGE) as usize])
        })
    }

    /// The first page with data from page `from` on.
    pub fn next_data(&self, from: u64) -> Option<u64> {
        self.pages.range(from..).next().map(|(&at, _)| at)
    }

    /// The first page without data from page `from` on.
    pub fn next_hole(&self, from: u64) -> u64 {
        let mut at = from;
        for &data in self.pages.range(from..).map(|(data, _)| data) {
            if data > at {
                break;
            }
            at += 1;
        }
        at
    }

    /// Pages that have a block, or will get one.
    pub fn blocks(&self) -> u64 {
        (self.pages.len() + self.aside.len()) as u64
    }

    /// Where SEEK_DATA and SEEK_HOLE lead from `offset`; `None`: nowhere (ENXIO).
    pub fn seek(&self, offset: u64) -> [Option<u64>; 2] {
        if offset >= self.size {
            return [None, None];
        }
        let data = self.next_data(offset / PAGE);
        let data = data.map(|page| (page * PAGE).max(offset));
        let hole = self.next_hole(offset / PAGE) * PAGE;
        [
            data.filter(|&at| at < self.size),
            Some(hole.max(offset).min(self.size)),
        ]
    }
}
