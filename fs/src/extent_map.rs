//! Which blocks of a file live where: the extents of one inode, over the metadata store.
//!
//! Extents never overlap. A written extent is at most [`EXTENT_BLOCKS_MAX`] blocks long and
//! carries a CRC32C per block; it does not cross a multiple of that many file blocks, so that a
//! large file has one record per 1 MiB and an overwrite touches few of them.
//!
//! The caller holds the inode's `map` lock: shared to look up, exclusive to change.

use braidfs_blockdev::VolBlock;
use braidfs_cache::{MapOut, PageRange, Segment, SegmentKind};

use crate::alloc::Allocator;
use crate::meta::records::{EXTENT_BLOCKS_MAX, Extent, key_u64, pair_key};
use crate::meta::store::{Store, Table};
use crate::{Errno, Ino};

/// Longest unwritten extent, in blocks (128 GiB).
const UNWRITTEN_BLOCKS_MAX: u64 = 1 << 25;

/// What a new extent took the place of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Replaced {
    /// Blocks of the file that were mapped before.
    pub blocks: u64,
    /// How many of them are the same blocks of the volume as now.
    pub kept: u64,
}

/// The extents of one inode.
pub(crate) struct ExtentMap<'a> {
    pub store: &'a Store,
    pub space: &'a Allocator,
    pub ino: Ino,
}

fn decode(ino: Ino, key: &[u8], value: &[u8]) -> Result<Extent, Errno> {
    key_u64(key, 8)
        .and_then(|start| Extent::decode(start, value))
        .ok_or_else(|| {
            log::error!("inode {ino}: an extent record is damaged; run 'braidfs fsck -n'");
            Errno::IO
        })
}

impl ExtentMap<'_> {
    /// All extents that have blocks in `from..to`, whole, in order.
    pub(crate) fn overlapping(&self, from: u64, to: u64) -> Result<Vec<Extent>, Errno> {
        self.first_overlapping(from, to, usize::MAX)
    }

    /// The first extents, `count` at the most, that have blocks in `from..to`, whole, in order.
    pub(crate) fn first_overlapping(
        &self,
        from: u64,
        to: u64,
        count: usize,
    ) -> Result<Vec<Extent>, Errno> {
        let mut found = Vec::new();
        self.each_overlapping(from, to, &mut |extent| {
            found.push(extent);
            found.len() < count
        })?;
        Ok(found)
    }

    /// Hands the extents that have blocks in `from..to` to `each`, whole, in order, until it
    /// returns false. `each` must not call back into the store.
    fn each_overlapping(
        &self,
        from: u64,
        to: u64,
        each: &mut dyn FnMut(Extent) -> bool,
    ) -> Result<(), Errno> {
        if from >= to {
            return Ok(());
        }
        if let Some(extent) = self.last_at_most(from)?
            && extent.end() > from
            && !each(extent)
        {
            return Ok(());
        }
        let mut bad = None;
        let next = pair_key(self.ino, from.saturating_add(1));
        let end = pair_key(self.ino, to);
        self.store
            .scan(
                Table::Extents,
                &next,
                &end,
                &mut |key, value| match decode(self.ino, key, value) {
                    Ok(extent) => each(extent),
                    Err(error) => {
                        bad = Some(error);
                        false
                    }
                },
            )?;
        bad.map_or(Ok(()), Err)
    }

    /// The last extent that starts at or before `block`.
    pub(crate) fn last_at_most(&self, block: u64) -> Result<Option<Extent>, Errno> {
        let (low, at) = (pair_key(self.ino, 0), pair_key(self.ino, block));
        let found = self.store.last_at_most(Table::Extents, &low, &at)?;
        found
            .map(|(key, value)| decode(self.ino, &key, &value))
            .transpose()
    }

    /// The unwritten parts of `from..to`, in order: file block, block of the volume, length.
    pub(crate) fn unwritten(&self, from: u64, to: u64) -> Result<Vec<(u64, u64, u64)>, Errno> {
        let mut found = Vec::new();
        self.each_overlapping(from, to, &mut |extent| {
            if extent.unwritten() {
                let part = extent.slice(from, to);
                found.push((part.start, part.block, part.len));
            }
            true
        })?;
        Ok(found)
    }

    /// Blocks of `from..to` that no extent has.
    pub(crate) fn holes(&self, from: u64, to: u64) -> Result<u64, Errno> {
        let mut holes = to.saturating_sub(from);
        self.each_overlapping(from, to, &mut |extent| {
            holes -= extent.end().min(to) - extent.start.max(from);
            true
        })?;
        Ok(holes)
    }

    /// Describes `pages` for the cache: data, or holes that read as zeros.
    pub(crate) fn map(&self, pages: PageRange, out: &mut MapOut) -> Result<(), Errno> {
        let mut at = pages.start;
        let hole = |from: u64, to: u64, out: &mut MapOut| {
            if from < to {
                let pages = PageRange {
                    start: from,
                    end: to,
                };
                out.segments.push(Segment {
                    pages,
                    kind: SegmentKind::Hole,
                });
            }
        };
        for extent in self.overlapping(pages.start, pages.end)? {
            let part = extent.slice(pages.start, pages.end);
            hole(at, part.start, out);
            at = part.end();
            if part.unwritten() {
                hole(part.start, part.end(), out);
                continue;
            }
            let crc_index = Some(out.crcs.len());
            out.crcs.extend_from_slice(&part.crcs);
            out.segments.push(Segment {
                pages: PageRange {
                    start: part.start,
                    end: part.end(),
                },
                kind: SegmentKind::Data {
                    block: VolBlock(part.block),
                    crc_index,
                },
            });
        }
        hole(at, pages.end, out);
        Ok(())
    }

    fn put(&self, extent: &Extent) {
        self.store.put(
            Table::Extents,
            &pair_key(self.ino, extent.start),
            &extent.encode(),
        );
    }

    /// Takes `from..to` out of the map; what `keep` names stays allocated.
    fn cut(&self, from: u64, to: u64, keep: Option<(u64, u64)>) -> Result<Replaced, Errno> {
        let mut removed = Replaced::default();
        for extent in self.overlapping(from, to)? {
            if extent.start >= from {
                self.store
                    .delete(Table::Extents, &pair_key(self.ino, extent.start));
            } else {
                self.put(&extent.slice(extent.start, from));
            }
            if extent.end() > to {
                self.put(&extent.slice(to, extent.end()));
            }
            let (start, end) = (extent.start.max(from), extent.end().min(to));
            let block = extent.block + (start - extent.start);
            removed.blocks += end - start;
            if keep.is_some_and(|(kept, len)| block >= kept && block < kept + len) {
                removed.kept += end - start;
            } else {
                self.space.free(block, end - start);
            }
        }
        Ok(removed)
    }

    /// Removes `from..to` and frees its blocks; returns how many.
    pub(crate) fn remove(&self, from: u64, to: u64) -> Result<u64, Errno> {
        Ok(self.cut(from, to, None)?.blocks)
    }

    /// Maps `new`, in place of whatever is mapped there; the old blocks are freed, unless they are
    /// the same ones (an unwritten extent that got written, or the other way round).
    pub(crate) fn replace(&self, new: &Extent) -> Result<Replaced, Errno> {
        let replaced = self.cut(new.start, new.end(), Some((new.block, new.len)))?;
        let step = if new.unwritten() {
            UNWRITTEN_BLOCKS_MAX
        } else {
            EXTENT_BLOCKS_MAX
        };
        let mut at = new.start;
        while at < new.end() {
            let edge = if new.unwritten() {
                at.saturating_add(step)
            } else {
                (at / step + 1) * step
            };
            let piece = new.slice(at, edge);
            at = piece.end();
            self.put(&self.joined_with_former(piece)?);
        }
        Ok(replaced)
    }

    /// Turns what has data in `from..to` into blocks that are only set aside, without moving them.
    pub(crate) fn unwrite(&self, from: u64, to: u64) -> Result<(), Errno> {
        for extent in self.overlapping(from, to)? {
            if extent.unwritten() {
                continue;
            }
            let part = extent.slice(from, to);
            let set_aside = Extent {
                crcs: Vec::new(),
                ..part
            };
            self.replace(&set_aside)?;
            self.space.note_converted(set_aside.block, set_aside.len);
        }
        Ok(())
    }

    /// `piece`, with the extent before it if the two are one run in file and volume.
    fn joined_with_former(&self, piece: Extent) -> Result<Extent, Errno> {
        let (joins, len_max) = if piece.unwritten() {
            (piece.start > 0, UNWRITTEN_BLOCKS_MAX)
        } else {
            let inside = !piece.start.is_multiple_of(EXTENT_BLOCKS_MAX);
            (inside, EXTENT_BLOCKS_MAX)
        };
        if !joins {
            return Ok(piece);
        }
        match self.last_at_most(piece.start - 1)? {
            Some(mut former)
                if former.unwritten() == piece.unwritten()
                    && former.end() == piece.start
                    && former.block + former.len == piece.block
                    && former.len + piece.len <= len_max =>
            {
                former.len += piece.len;
                former.crcs.extend_from_slice(&piece.crcs);
                Ok(former)
            }
            _ => Ok(piece),
        }
    }
}
