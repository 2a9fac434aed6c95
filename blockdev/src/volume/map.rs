//! The chunk table as the I/O path sees it: volume to device and back.

use super::types::Chunk;
use crate::units::VolBlock;

/// A share of a chunk on a device, for the way back from a device to the volume.
#[derive(Clone, Copy)]
pub(super) struct Share {
    pub start: u64,
    end: u64,
    pub chunk: usize,
    pub member: usize,
}

/// The chunk table as the I/O path sees it; replaced whole when a chunk is added.
#[derive(Default)]
pub(super) struct ChunkMap {
    /// Ordered by start.
    pub chunks: Vec<Chunk>,
    /// By device, ordered by start.
    shares: Vec<Vec<Share>>,
}

impl ChunkMap {
    pub(super) fn new(chunks: &[Chunk], devices: usize) -> ChunkMap {
        let mut shares = vec![Vec::new(); devices];
        for (index, chunk) in chunks.iter().enumerate() {
            for (number, member) in chunk.members.iter().enumerate() {
                shares[usize::from(member.dev)].push(Share {
                    start: member.offset_bytes,
                    end: member.offset_bytes + chunk.member_len_bytes,
                    chunk: index,
                    member: number,
                });
            }
        }
        for list in &mut shares {
            list.sort_unstable_by_key(|share| share.start);
        }
        ChunkMap {
            chunks: chunks.to_vec(),
            shares,
        }
    }

    pub(super) fn find(&self, at: VolBlock) -> Option<usize> {
        let index = self
            .chunks
            .partition_point(|chunk| chunk.start <= at)
            .checked_sub(1)?;
        self.chunks[index].contains(at).then_some(index)
    }

    pub(super) fn share_at(&self, dev: u16, offset: u64) -> Option<Share> {
        let list = self.shares.get(usize::from(dev))?;
        let index = list
            .partition_point(|share| share.start <= offset)
            .checked_sub(1)?;
        Some(list[index]).filter(|share| offset < share.end)
    }
}
