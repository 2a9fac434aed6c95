//! Blocks that nothing owns and that are kept back all the same.
//!
//! A block is *in doubt* while a device that did not answer may still write it (or discard it):
//! whoever got it would lose what he writes. When such a block becomes free it is *held*, and
//! counts as used until the device is done. While it is set aside for a page, it is not written in
//! place.
//!
//! A block is *suspect* when the last write to it failed. It counts as free, and is handed out when
//! nothing else is left, so that a write that is tried again goes elsewhere.

use braidfs_blockdev::InDoubt;

use super::RunSet;

#[derive(Default)]
pub(super) struct Parked {
    in_doubt: Vec<(u64, u64, InDoubt)>,
    held: RunSet,
    suspect: RunSet,
}

/// The part of `start..start + len` that lies in `other`.
fn overlap(start: u64, len: u64, other: (u64, u64)) -> Option<(u64, u64)> {
    let from = start.max(other.0);
    let to = (start + len).min(other.0 + other.1);
    (from < to).then(|| (from, to - from))
}

/// Takes out of `set` what lies in the range.
fn take_overlap(set: &mut RunSet, start: u64, len: u64) -> Vec<(u64, u64)> {
    let parts: Vec<_> = set
        .iter()
        .filter_map(|run| overlap(start, len, run))
        .collect();
    for &(start, len) in &parts {
        set.take(start, len);
    }
    parts
}

impl Parked {
    /// A device may still write these blocks.
    pub(super) fn doubt(&mut self, start: u64, len: u64, in_doubt: InDoubt) {
        self.in_doubt.push((start, len, in_doubt));
    }

    /// The first range in doubt that has a part in `start..start + len`, and that part.
    pub(super) fn first_doubt(&self, start: u64, len: u64) -> Option<(u64, u64)> {
        let live = self.in_doubt.iter().filter(|entry| !entry.2.is_over());
        live.filter_map(|entry| overlap(start, len, (entry.0, entry.1)))
            .min()
    }

    /// Adds blocks to `free`, but for those in doubt; false if some were there already.
    pub(super) fn put(&mut self, free: &mut RunSet, start: u64, len: u64) -> bool {
        let (mut at, end) = (start, start + len);
        let mut is_new = true;
        while at < end {
            let doubt = self.first_doubt(at, end - at);
            let clear = doubt.map_or(end, |(from, _)| from);
            if at < clear {
                is_new &= !self.suspect.overlaps(at, clear - at) && free.insert(at, clear - at);
            }
            at = clear;
            if let Some((from, count)) = doubt {
                is_new &= self.held.insert(from, count);
                at = from + count;
            }
        }
        is_new
    }

    /// A write to these blocks failed.
    pub(super) fn put_suspect(&mut self, free: &RunSet, start: u64, len: u64) -> bool {
        !free.overlaps(start, len) && self.suspect.insert(start, len)
    }

    /// Gives back what devices are done with.
    pub(super) fn sweep(&mut self, free: &mut RunSet) {
        if self.in_doubt.iter().all(|entry| !entry.2.is_over()) {
            return;
        }
        let over: Vec<_> = self
            .in_doubt
            .extract_if(.., |entry| entry.2.is_over())
            .collect();
        for (start, len, _) in over {
            for (start, len) in take_overlap(&mut self.held, start, len) {
                // A part may be in doubt for another reason.
                if !self.put(free, start, len) {
                    log::error!("blocks {start}+{len} were handed out while they were in doubt");
                }
            }
        }
    }

    /// Gives all suspect blocks back: there is nothing better.
    pub(super) fn trust_all(&mut self, free: &mut RunSet) {
        let suspect = std::mem::take(&mut self.suspect);
        for (start, len) in suspect.iter() {
            if !self.put(free, start, len) {
                log::error!("blocks {start}+{len} were handed out while they were suspect");
            }
        }
    }

    pub(super) fn suspect_blocks(&self) -> u64 {
        self.suspect.blocks()
    }

    pub(super) fn held_blocks(&self) -> u64 {
        self.held.blocks()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(set: &RunSet) -> Vec<(u64, u64)> {
        set.iter().collect()
    }

    #[test]
    fn blocks_in_doubt_come_back_when_the_device_is_done() {
        let (mut parked, mut free) = (Parked::default(), RunSet::default());
        let doubts = [InDoubt::default(), InDoubt::default()];
        parked.doubt(10, 10, doubts[0].clone());
        parked.doubt(15, 10, doubts[1].clone());
        assert!(parked.put(&mut free, 0, 40));
        assert_eq!(runs(&free), [(0, 10), (25, 15)]);
        assert_eq!(parked.held_blocks(), 15);
        assert_eq!(parked.first_doubt(0, 12), Some((10, 2)));
        assert_eq!(parked.first_doubt(30, 5), None);
        doubts[0].end();
        parked.sweep(&mut free);
        assert_eq!(runs(&free), [(0, 15), (25, 15)]);
        doubts[1].end();
        parked.sweep(&mut free);
        assert_eq!(runs(&free), [(0, 40)]);
        assert_eq!(parked.held_blocks(), 0);
    }

    #[test]
    fn suspect_blocks_are_the_last_to_be_handed_out() {
        let (mut parked, mut free) = (Parked::default(), RunSet::default());
        assert!(parked.put(&mut free, 0, 10));
        assert!(parked.put_suspect(&free, 20, 5));
        assert!(!parked.put_suspect(&free, 5, 5), "these are free");
        assert!(!parked.put(&mut free, 22, 1), "these are suspect");
        assert_eq!((free.blocks(), parked.suspect_blocks()), (10, 5));
        parked.trust_all(&mut free);
        assert_eq!(runs(&free), [(0, 10), (20, 5)]);
    }
}
