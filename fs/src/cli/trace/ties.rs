//! What belongs together though it does not happen at one time: the write that made pages dirty,
//! the writeback that writes them, and the fsync that waited for it. Tied by inode, bytes and time.

use std::collections::{HashMap, VecDeque};

/// Writes of a file that are remembered until their bytes are written back.
const WRITES_MAX: usize = 4096;

/// Files of which writes are remembered.
const FILES_MAX: usize = 10_000;

/// Writebacks that are remembered.
const ENDED_MAX: usize = 4096;

struct Write {
    request: u64,
    start: u64,
    end: u64,
}

/// A writeback that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// Its context.
    pub context: u64,
    /// Which file, and which bytes of it.
    pub file: u64,
    pub offset: u64,
    pub len: u64,
    /// When.
    pub since: u64,
    pub at: u64,
}

#[derive(Default)]
pub(super) struct Ties {
    writes: HashMap<u64, VecDeque<Write>>,
    ended: VecDeque<Ended>,
}

impl Ties {
    /// A request made bytes of a file dirty.
    pub(super) fn dirtied(&mut self, request: u64, file: u64, offset: u64, len: u64) {
        if self.writes.len() >= FILES_MAX && !self.writes.contains_key(&file) {
            return;
        }
        let writes = self.writes.entry(file).or_default();
        if writes.len() >= WRITES_MAX {
            writes.pop_front();
        }
        let (start, end) = (offset, offset.saturating_add(len));
        writes.push_back(Write {
            request,
            start,
            end,
        });
    }

    /// A writeback of so many bytes of a file begins: the requests that it writes for, the oldest
    /// first. Each is named by the first writeback that has bytes of it, or more until all has been
    /// written.
    pub(super) fn written(&mut self, file: u64, offset: u64, len: u64) -> Vec<u64> {
        let Some(writes) = self.writes.get_mut(&file) else {
            return Vec::new();
        };
        let end = offset.saturating_add(len);
        let hit = |write: &Write| write.start < end && offset < write.end;
        let requests = writes.iter().filter(|write| hit(write));
        let requests = requests.map(|write| write.request).collect();
        writes.retain(|write| !(offset <= write.start && write.end <= end));
        if writes.is_empty() {
            self.writes.remove(&file);
        }
        requests
    }

    /// A writeback ended.
    pub(super) fn ended(&mut self, ended: Ended) {
        if self.ended.len() >= ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(ended);
    }

    /// Writebacks of a file (of all: `None`) that ended within a time.
    pub(super) fn waited_for(&self, file: Option<u64>, since: u64, until: u64) -> Vec<Ended> {
        let within = |ended: &&Ended| {
            (since..=until).contains(&ended.at) && file.is_none_or(|file| file == ended.file)
        };
        self.ended.iter().filter(within).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writeback_names_the_writes_whose_bytes_it_writes() {
        let mut ties = Ties::default();
        ties.dirtied(2, 5, 0, 100);
        ties.dirtied(4, 5, 8192, 100);
        ties.dirtied(6, 6, 0, 100);
        assert_eq!(ties.written(5, 0, 4096), [2]);
        assert!(ties.written(5, 0, 4096).is_empty(), "it was written");
        ties.dirtied(8, 5, 4096, 8192);
        assert_eq!(ties.written(5, 8192, 4096), [4, 8]);
        assert_eq!(ties.written(5, 4096, 4096), [8], "half of it was left");
        assert_eq!(ties.written(5, 4096, 8192), [8]);
        assert!(ties.written(5, 0, u64::MAX).is_empty());
        assert_eq!(ties.written(6, 99, 1), [6]);
    }

    #[test]
    fn an_fsync_waited_for_what_ended_meanwhile() {
        let mut ties = Ties::default();
        let ended = |context, file, at| Ended {
            context,
            file,
            offset: 0,
            len: 1,
            since: 0,
            at,
        };
        for each in [ended(1, 5, 10), ended(2, 5, 20), ended(3, 6, 21)] {
            ties.ended(each);
        }
        let contexts = |file, since, until| -> Vec<u64> {
            let found = ties.waited_for(file, since, until);
            found.iter().map(|ended| ended.context).collect()
        };
        assert_eq!(contexts(Some(5), 11, 30), [2]);
        assert_eq!(contexts(None, 11, 30), [2, 3]);
    }
}
