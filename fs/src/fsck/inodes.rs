//! What the passes gather about each inode: 80 bytes, in order of the inode number.

use crate::Ino;

/// What is known of an inode, from its record and from what names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub ino: Ino,
    /// Bytes: a file's size, the length of a link's target. (A directory's is in `name_bytes`.)
    pub size: u64,
    /// Directories: the parent that the record names.
    pub parent: Ino,
    /// Directories: the directory that has the entry, 0 if none was found.
    pub named_in: Ino,
    /// Blocks of the extents.
    pub blocks: u64,
    /// Directories: the highest cookie of an entry.
    pub cookie_max: u64,
    /// Directories: bytes of all names.
    pub name_bytes: u64,
    /// Entries that name it.
    pub names: u32,
    /// Directories: directories in it.
    pub subdirs: u32,
    /// Directories: entries that are listed as they should be.
    pub listed: u32,
    /// DT_* type.
    pub kind: u8,
    /// It waits for deletion.
    pub orphan: bool,
    /// Its record goes.
    pub removed: bool,
    /// A symbolic link's target was found.
    pub target: bool,
    /// A file whose record has lost its size: `cookie_max` is the end of its extents, in blocks.
    pub unsized_file: bool,
    /// Directories: more than one entry names it.
    pub many: bool,
    /// Directories: how they hang on the root.
    pub reach: Reach,
}

/// Whether a directory hangs on the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Not looked at.
    Unknown,
    /// On the way that is being looked at.
    OnTheWay,
    /// Looked at: it does, or it does not and has been seen to.
    Settled,
}

const _: () = assert!(size_of::<Seen>() <= 80);

impl Seen {
    /// An inode of which nothing but the record is known.
    pub(super) fn new(ino: Ino, kind: u8, size: u64, parent: Ino) -> Self {
        Self {
            ino,
            size,
            parent,
            named_in: 0,
            blocks: 0,
            cookie_max: 0,
            name_bytes: 0,
            names: 0,
            subdirs: 0,
            listed: 0,
            kind,
            orphan: false,
            removed: false,
            target: false,
            many: false,
            unsized_file: false,
            reach: Reach::Unknown,
        }
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::DT_DIR
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind == libc::DT_REG
    }

    pub(super) fn is_symlink(&self) -> bool {
        self.kind == libc::DT_LNK
    }
}

/// Inodes of a segment: growing never copies what is there.
const SEGMENT: usize = 8192;

/// All inodes, in order.
#[derive(Default)]
pub(super) struct Inodes {
    segments: Vec<Vec<Seen>>,
}

impl Inodes {
    /// Takes one in, with a number above all others.
    pub(super) fn push(&mut self, seen: Seen) {
        debug_assert!(self.last_ino() < seen.ino, "in order");
        match self.segments.last_mut() {
            Some(segment) if segment.len() < SEGMENT => segment.push(seen),
            _ => {
                let mut segment = Vec::with_capacity(SEGMENT);
                segment.push(seen);
                self.segments.push(segment);
            }
        }
    }

    /// The highest number, 0 if there is no inode.
    pub(super) fn last_ino(&self) -> Ino {
        let last = self.segments.last().and_then(|segment| segment.last());
        last.map_or(0, |seen| seen.ino)
    }

    fn place(&self, ino: Ino) -> Option<(usize, usize)> {
        let after = self
            .segments
            .partition_point(|segment| segment[0].ino <= ino);
        let segment = after.checked_sub(1)?;
        let found = self.segments[segment].binary_search_by_key(&ino, |seen| seen.ino);
        found.ok().map(|index| (segment, index))
    }

    /// An inode, unless it is not there or goes.
    pub(super) fn get(&self, ino: Ino) -> Option<&Seen> {
        let (segment, index) = self.place(ino)?;
        Some(&self.segments[segment][index]).filter(|seen| !seen.removed)
    }

    /// The same, to change it.
    pub(super) fn get_mut(&mut self, ino: Ino) -> Option<&mut Seen> {
        let (segment, index) = self.place(ino)?;
        Some(&mut self.segments[segment][index]).filter(|seen| !seen.removed)
    }

    /// A directory that stays.
    pub(super) fn dir_mut(&mut self, ino: Ino) -> Option<&mut Seen> {
        self.get_mut(ino).filter(|seen| seen.is_dir())
    }

    /// All that stay, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Seen> {
        self.segments.iter().flatten().filter(|seen| !seen.removed)
    }

    /// How many stay.
    pub(super) fn count(&self) -> u64 {
        self.iter().map(|_| 1).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inodes_are_found_across_segments() {
        let mut inodes = Inodes::default();
        for ino in 1..=3 * SEGMENT as u64 {
            inodes.push(Seen::new(2 * ino, libc::DT_REG, ino, 0));
        }
        for ino in 0..=6 * SEGMENT as u64 + 2 {
            let there = ino > 0 && ino <= 6 * SEGMENT as u64 && ino.is_multiple_of(2);
            assert_eq!(
                inodes.get(ino).map(|seen| seen.size),
                there.then_some(ino / 2)
            );
        }
        inodes.get_mut(4).unwrap().removed = true;
        assert!(inodes.get(4).is_none());
        assert_eq!(inodes.count(), 3 * SEGMENT as u64 - 1);
    }
}
