//! Blocks that two extents name. Who may keep such a block is told by its content: the extent whose
//! checksum it matches. Every other extent with data gets a copy of the block in a free place, with
//! the checksum that it has: where that is right, it reads what it read before, and where it is
//! not, it reads an error as before, never somebody else's data. Of extents that are only set aside
//! (they read as zeros) the part is taken out: it becomes a hole. If there is no free block for a
//! copy, the block stays shared and is reported as left.

use std::collections::BTreeMap;
use std::ops::Range;

use braidfs_blockdev::{AlignedBuf, PAGE_SIZE, VolBlock};

use super::Check;
use super::extents::{blocks_of, extent_object};
use super::progress::FsckError;
use super::report::Class;
use crate::Ino;
use crate::meta::records::{Extent, key_u64, pair_key};
use crate::meta::store::Table;

/// Extents and blocks that one repair looks at; what is beyond is left to the next.
const OWNERS_MAX: usize = 1 << 14;
const BLOCKS_MAX: usize = 1 << 20;

/// A file's claim to a block.
struct Claim {
    ino: Ino,
    /// Start of the extent, and the block in the file.
    extent: u64,
    file_block: u64,
    crc: Option<u32>,
}

/// What becomes of a file's block that another one keeps.
enum Fate {
    Moved(u64),
    Gone,
}

impl Check<'_> {
    /// Settles who has which block. Needs the free space of the durable state.
    pub(super) fn share_out(&mut self) -> Result<(), FsckError> {
        if self.twice.is_empty() {
            return Ok(());
        }
        let owners = self.owners()?;
        let mut claims: BTreeMap<u64, Vec<Claim>> = BTreeMap::new();
        let mut repaired = true;
        for (ino, extent) in &owners {
            let parts: Vec<Range<u64>> = self.twice.runs(blocks_of(extent), true).collect();
            for part in parts {
                let message = format!(
                    "blocks {}+{} are used twice",
                    part.start,
                    part.end - part.start
                );
                let object = extent_object(*ino, extent.start);
                repaired &= self.problem(Class::Shared, object, message);
                for block in part {
                    if claims.len() >= BLOCKS_MAX {
                        break;
                    }
                    let file_block = extent.start + (block - extent.block);
                    let nth = usize::try_from(block - extent.block).unwrap_or(usize::MAX);
                    claims.entry(block).or_default().push(Claim {
                        ino: *ino,
                        extent: extent.start,
                        file_block,
                        crc: extent.crcs.get(nth).copied(),
                    });
                }
            }
        }
        if repaired {
            self.settle_claims(&owners, claims);
        }
        Ok(())
    }

    /// The extents that have such blocks, as they will be after what was decided before.
    fn owners(&self) -> Result<Vec<(Ino, Extent)>, FsckError> {
        let mut owners = Vec::new();
        let mut take = |key: &[u8], value: &[u8]| {
            let (Some(ino), Some(start)) = (key_u64(key, 0), key_u64(key, 8)) else {
                return;
            };
            if let Some(extent) = Extent::decode(start, value)
                && owners.len() < OWNERS_MAX
                && self.twice.find(blocks_of(&extent), true).is_some()
            {
                owners.push((ino, extent));
            }
        };
        self.reader
            .scan::<FsckError>(Table::Extents, &[], &[], &mut |key, value| {
                if self.edits.get(Table::Extents, key).is_none() {
                    take(key, value);
                }
                self.ticker.check()
            })?;
        for (key, value) in self.edits.puts(Table::Extents) {
            take(key, value);
        }
        Ok(owners)
    }

    fn settle_claims(&mut self, owners: &[(Ino, Extent)], claims: BTreeMap<u64, Vec<Claim>>) {
        let mut fates: BTreeMap<(Ino, u64), BTreeMap<u64, Fate>> = BTreeMap::new();
        let mut free = FreeBlocks::default();
        for (block, claims) in claims {
            if claims.len() < 2 {
                continue;
            }
            let keeper = self.keeper(block, &claims);
            for (index, claim) in claims.iter().enumerate() {
                if index == keeper {
                    continue;
                }
                let fate = match claim.crc {
                    None => Fate::Gone,
                    Some(_) => match free.next(self) {
                        Some(place) => {
                            self.edits.clones.push((block, place));
                            Fate::Moved(place)
                        }
                        // It stays shared, and the second look says so.
                        None => continue,
                    },
                };
                let of_extent = fates.entry((claim.ino, claim.extent)).or_default();
                of_extent.insert(claim.file_block, fate);
            }
        }
        for (_, place) in &self.edits.clones {
            self.used.set(*place..*place + 1);
        }
        for (ino, extent) in owners {
            if let Some(fates) = fates.get(&(*ino, extent.start)) {
                self.rewrite(*ino, extent, fates);
            }
        }
    }

    /// Which of several may keep a block.
    fn keeper(&self, block: u64, claims: &[Claim]) -> usize {
        let with_data = claims.iter().position(|claim| claim.crc.is_some());
        let Some(first) = with_data else {
            return 0;
        };
        let buf = AlignedBuf::zeroed(PAGE_SIZE);
        let Ok(data) = self.volume.read_wait(VolBlock(block), buf, None) else {
            return first;
        };
        let crc = Some(crc32c::crc32c(&data));
        let matching = claims.iter().position(|claim| claim.crc == crc);
        matching.unwrap_or(first)
    }

    /// Puts the pieces of an extent in its place.
    fn rewrite(&mut self, ino: Ino, extent: &Extent, fates: &BTreeMap<u64, Fate>) {
        self.edits
            .delete(Table::Extents, &pair_key(ino, extent.start));
        let mut put = |from: u64, to: u64, block: Option<u64>| {
            if from < to {
                let mut piece = extent.slice(from, to);
                piece.block = block.unwrap_or(piece.block);
                let key = pair_key(ino, from);
                self.edits.put(Table::Extents, &key, &piece.encode());
            }
        };
        let mut at = extent.start;
        let mut gone = 0;
        for (&file_block, fate) in fates {
            put(at, file_block, None);
            match fate {
                Fate::Moved(place) => put(file_block, file_block + 1, Some(*place)),
                Fate::Gone => gone += 1,
            }
            at = file_block + 1;
        }
        put(at, extent.end(), None);
        if let Some(seen) = self.inodes.get_mut(ino) {
            seen.blocks = seen.blocks.saturating_sub(gone);
        }
    }
}

/// Hands out blocks that are free in the durable state, and that nothing names: what is written
/// there before the commit does no harm if that never comes.
#[derive(Default)]
struct FreeBlocks {
    chunk: usize,
    at: u64,
}

impl FreeBlocks {
    fn next(&mut self, check: &Check<'_>) -> Option<u64> {
        while let Some(chunk) = check.data.get(self.chunk) {
            let from = self.at.max(chunk.start);
            let Some(block) = check.free.find(from..chunk.end, true) else {
                self.chunk += 1;
                continue;
            };
            self.at = block + 1;
            let one = block..block + 1;
            let named = [&check.used, &check.dropped];
            if named
                .iter()
                .all(|set| set.find(one.clone(), true).is_none())
            {
                return Some(block);
            }
        }
        None
    }
}
