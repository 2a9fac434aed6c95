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
        let (low, at) = (pair_key(self.ino, 0), pair_key(self.ino, from));
        if let Some((key, value)) = self.store.last_at_most(Table::Extents, &low, &at)? {
            let extent = decode(self.ino, &key, &value)?;
            if extent.end() > from {
                found.push(extent);
            }
        }
        let mut bad = None;
        let (next, end) = (
            pair_key(self.ino, from.saturating_add(1)),
            pair_key(self.ino, to),
        );
        if found.len() >= count {
            return Ok(found);
        }
        self.store
            .scan(Table::Extents, &next, &end, &mut |key, value| {
                match decode(self.ino, key, value) {
                    Ok(extent) => found.push(extent),
                    Err(error) => bad = Some(error),
                }
                bad.is_none() && found.len() < count
            })?;
        bad.map_or(Ok(found), Err)
    }

    /// The last extent that starts at or before `block`.
    pub(crate) fn last_at_most(&self, block: u64) -> Result<Option<Extent>, Errno> {
        let (low, at) = (pair_key(self.ino, 0), pair_key(self.ino, block));
        let found = self.store.last_at_most(Table::Extents, &low, &at)?;
        found
            .map(|(key, value)| decode(self.ino, &key, &value))
            .transpose()
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

    /// Takes `from..to` out of the map; what `keep` names stays allocated. Returns how many
    /// blocks left the map.
    fn cut(&self, from: u64, to: u64, keep: Option<(u64, u64)>) -> Result<u64, Errno> {
        let mut removed = 0;
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
            removed += end - start;
            if keep.is_none_or(|(kept, len)| block < kept || block >= kept + len) {
                self.space.free(block, end - start);
            }
        }
        Ok(removed)
    }

    /// Removes `from..to` and frees its blocks; returns how many.
    pub(crate) fn remove(&self, from: u64, to: u64) -> Result<u64, Errno> {
        self.cut(from, to, None)
    }

    /// Maps `new`, in place of whatever is mapped there; the old blocks are freed, unless they are
    /// the same ones (an unwritten extent that got written). Returns how many blocks it replaced.
    pub(crate) fn replace(&self, new: &Extent) -> Result<u64, Errno> {
        let replaced = self.cut(new.start, new.end(), Some((new.block, new.len)))?;
        if new.unwritten() {
            self.put(new);
            return Ok(replaced);
        }
        let mut at = new.start;
        while at < new.end() {
            let edge = (at / EXTENT_BLOCKS_MAX + 1) * EXTENT_BLOCKS_MAX;
            let piece = new.slice(at, edge);
            at = piece.end();
            self.put(&self.joined_with_former(piece)?);
        }
        Ok(replaced)
    }

    /// `piece`, with the extent before it if the two are one run in file and volume.
    fn joined_with_former(&self, piece: Extent) -> Result<Extent, Errno> {
        if piece.start.is_multiple_of(EXTENT_BLOCKS_MAX) {
            return Ok(piece);
        }
        match self.last_at_most(piece.start - 1)? {
            Some(mut former)
                if !former.unwritten()
                    && former.end() == piece.start
                    && former.block + former.len == piece.block
                    && former.len + piece.len <= EXTENT_BLOCKS_MAX =>
            {
                former.len += piece.len;
                former.crcs.extend_from_slice(&piece.crcs);
                Ok(former)
            }
            _ => Ok(piece),
        }
    }
}
