//! The pass over extents: each alone, against the one after it in its file, against the file's end,
//! and against the data chunks. It also marks which blocks are named, and which of them twice.

use std::ops::Range;

use super::Check;
use super::progress::FsckError;
use super::report::Class;
use crate::inode::PAGE;
use crate::meta::records::{EXTENT_BLOCKS_MAX, Extent, key_u64, pair_key};
use crate::meta::store::Table;
use crate::{FILE_SIZE_MAX, Ino};

/// No file has a block with this number or a higher one.
const FILE_BLOCKS_MAX: u64 = FILE_SIZE_MAX.div_ceil(PAGE);

/// What a message calls an extent.
pub(super) fn extent_object(ino: Ino, start: u64) -> String {
    format!("inode {ino}, file block {start}")
}

/// Volume blocks of an extent.
pub(super) fn blocks_of(extent: &Extent) -> Range<u64> {
    extent.block..extent.block + extent.len
}

/// The parts of `blocks` that lie in `data`, which is in order.
pub(super) fn inside(data: &[Range<u64>], blocks: &Range<u64>) -> Vec<Range<u64>> {
    let first = data.partition_point(|chunk| chunk.end <= blocks.start);
    data[first..]
        .iter()
        .take_while(|chunk| chunk.start < blocks.end)
        .map(|chunk| chunk.start.max(blocks.start)..chunk.end.min(blocks.end))
        .collect()
}

/// Cuts a written extent where records must end.
fn cut_at_borders(extent: &Extent) -> Vec<Extent> {
    if extent.unwritten() {
        return vec![extent.clone()];
    }
    let mut pieces = Vec::new();
    let mut at = extent.start;
    while at < extent.end() {
        let border = (at / EXTENT_BLOCKS_MAX + 1) * EXTENT_BLOCKS_MAX;
        let piece = extent.slice(at, border);
        at = piece.end();
        pieces.push(piece);
    }
    pieces
}

impl Check<'_> {
    pub(super) fn pass_extents(&mut self) -> Result<(), FsckError> {
        let reader = self.reader;
        self.ticker.begin(reader.len(Table::Extents)?)?;
        let mut former: Option<(Ino, Extent)> = None;
        reader.scan(Table::Extents, &[], &[], &mut |key, value| {
            self.ticker.step()?;
            let Some((ino, extent)) = self.extent(key, value) else {
                return Ok::<(), FsckError>(());
            };
            let start = extent.start;
            if let Some((owner, former)) = former.replace((ino, extent)) {
                self.settle(owner, &former, (owner == ino).then_some(start));
            }
            Ok(())
        })?;
        if let Some((owner, former)) = former {
            self.settle(owner, &former, None);
        }
        self.ticker.end();
        Ok(())
    }

    /// Looks at an extent alone; `None` if there is nothing more to look at.
    fn extent(&mut self, key: &[u8], value: &[u8]) -> Option<(Ino, Extent)> {
        self.report.extents += 1;
        let (ino, start) = (key_u64(key, 0).unwrap_or(0), key_u64(key, 8).unwrap_or(0));
        let object = extent_object(ino, start);
        let decoded = Some(key).filter(|key| key.len() == 16);
        let Some(extent) = decoded.and_then(|_| Extent::decode(start, value)) else {
            if self.problem(Class::Extent, object, "damaged record".into()) {
                self.edits.delete(Table::Extents, key);
            }
            return None;
        };
        self.report.data_blocks += extent.len;
        let possible = extent.end() <= FILE_BLOCKS_MAX;
        if self
            .inodes
            .get(ino)
            .is_some_and(super::inodes::Seen::is_file)
            && possible
        {
            return Some((ino, extent));
        }
        let message = match possible {
            true => "belongs to no file",
            false => "lies behind the end of the longest file",
        };
        if self.problem(Class::Extent, object, message.into()) {
            self.edits.delete(Table::Extents, key);
            self.note_dropped(&blocks_of(&extent));
        } else {
            self.note_used(&blocks_of(&extent));
        }
        None
    }

    /// Looks at an extent of a file, now that the start of the one after it is known.
    fn settle(&mut self, ino: Ino, extent: &Extent, next: Option<u64>) {
        let object = || extent_object(ino, extent.start);
        let mut end = extent.end();
        if let Some(next) = next.filter(|&next| next < end) {
            let message = format!("overlaps the extent at file block {next}");
            if self.problem(Class::Extent, object(), message) {
                end = next;
            }
        }
        let size_blocks = self
            .inodes
            .get(ino)
            .map_or(0, |seen| seen.size.div_ceil(PAGE));
        if !extent.unwritten() && end > size_blocks {
            let message = format!("data up to block {end}, file ends at {size_blocks}");
            if self.problem(Class::Extent, object(), message) {
                end = size_blocks;
            }
        }
        let mut pieces = Vec::new();
        if end > extent.start {
            pieces.push(extent.slice(extent.start, end));
        }
        let blocks = blocks_of(extent);
        let places = inside(&self.data, &blocks);
        if places != [blocks.clone()] {
            let message = format!(
                "blocks {}+{} are not all in data chunks",
                extent.block, extent.len
            );
            if self.problem(Class::Extent, object(), message) {
                pieces = pieces
                    .iter()
                    .flat_map(|piece| parts_in(piece, &places))
                    .collect();
            }
        }
        let cut: Vec<Extent> = pieces.iter().flat_map(cut_at_borders).collect();
        if cut.len() > pieces.len()
            && self.problem(
                Class::Extent,
                object(),
                "crosses a border of records".into(),
            )
        {
            pieces = cut;
        }
        self.keep(ino, extent, &pieces, &places);
    }

    /// Puts `pieces` in place of the extent, and marks their blocks.
    fn keep(&mut self, ino: Ino, extent: &Extent, pieces: &[Extent], places: &[Range<u64>]) {
        if pieces != std::slice::from_ref(extent) {
            self.edits
                .delete(Table::Extents, &pair_key(ino, extent.start));
            for place in places {
                self.note_dropped(place);
            }
            for piece in pieces {
                let key = pair_key(ino, piece.start);
                self.edits.put(Table::Extents, &key, &piece.encode());
            }
        }
        for piece in pieces {
            self.note_used(&blocks_of(piece));
            if let Some(seen) = self.inodes.get_mut(ino) {
                seen.blocks += piece.len;
                if seen.unsized_file {
                    seen.cookie_max = seen.cookie_max.max(piece.end());
                }
            }
        }
    }

    /// Blocks that the durable state names, and the repaired one does not.
    fn note_dropped(&mut self, blocks: &Range<u64>) {
        for place in inside(&self.data, blocks) {
            self.dropped.set(place);
        }
    }

    /// Blocks of an extent that stays.
    fn note_used(&mut self, blocks: &Range<u64>) {
        for place in inside(&self.data, blocks) {
            self.used.add(place, &mut self.twice);
        }
    }
}

/// The parts of an extent whose blocks lie in `places`.
fn parts_in(extent: &Extent, places: &[Range<u64>]) -> Vec<Extent> {
    let part = |place: &Range<u64>| {
        let from = place.start.max(extent.block);
        let to = place.end.min(extent.block + extent.len);
        let file_block = |block: u64| extent.start + (block - extent.block);
        (from < to).then(|| extent.slice(file_block(from), file_block(to)))
    };
    places.iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_inside_chunks() {
        let data = [10..20, 30..40];
        let whole = 12..18;
        assert_eq!(inside(&data, &whole), std::slice::from_ref(&whole));
        assert_eq!(inside(&data, &(5..35)), [10..20, 30..35]);
        assert_eq!(inside(&data, &(20..30)), []);
        let extent = Extent {
            start: 100,
            len: 30,
            block: 5,
            crcs: (0..30).collect(),
        };
        let parts = parts_in(&extent, &inside(&data, &blocks_of(&extent)));
        let places: Vec<_> = parts.iter().map(|p| (p.start, p.block, p.len)).collect();
        assert_eq!(places, [(105, 10, 10), (125, 30, 5)]);
        assert_eq!(parts[1].crcs, [25, 26, 27, 28, 29]);
    }

    #[test]
    fn records_end_at_borders() {
        let extent = Extent {
            start: 250,
            len: 10,
            block: 7,
            crcs: vec![0; 10],
        };
        let pieces = cut_at_borders(&extent);
        let places: Vec<_> = pieces.iter().map(|p| (p.start, p.block, p.len)).collect();
        assert_eq!(places, [(250, 7, 6), (256, 13, 4)]);
    }
}
