//! Pure geometry: a byte range of a chunk to the pieces of its members, and back.

use crate::volume::{Chunk, Profile};

/// A part of a chunk's range that is contiguous on one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which member of the chunk.
    pub member: usize,
    /// Byte offset in that member's share.
    pub offset: u64,
    /// Length in bytes; never 0.
    pub len: u64,
}

/// How a chunk's bytes lie over its members.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes that stay together on one member.
    unit: u64,
    members: usize,
}

impl Geometry {
    /// Round robin over `members`, `unit` bytes at a time.
    pub fn stripe(unit: u64, members: usize) -> Geometry {
        assert!(unit > 0 && members > 0, "a stripe has a unit and members");
        Geometry { unit, members }
    }

    /// One share that holds everything (of a mirror: the first copy).
    pub fn whole() -> Geometry {
        Geometry {
            unit: u64::MAX,
            members: 1,
        }
    }

    /// The geometry of a chunk.
    pub fn of(chunk: &Chunk) -> Geometry {
        match chunk.profile {
            Profile::Stripe => Geometry::stripe(
                u64::from(chunk.stripe_unit_blocks) * crate::units::BLOCK_SIZE,
                chunk.members.len(),
            ),
            Profile::Single | Profile::Mirror => Geometry::whole(),
        }
    }

    /// The piece that starts at byte `at` of the chunk, at most `len_max` long.
    pub fn piece(&self, at: u64, len_max: u64) -> Piece {
        if self.members == 1 {
            return Piece {
                member: 0,
                offset: at,
                len: len_max,
            };
        }
        let members = crate::units::dev_len(self.members);
        let (index, within) = (at / self.unit, at % self.unit);
        Piece {
            member: crate::units::mem_len(index % members),
            offset: index / members * self.unit + within,
            len: len_max.min(self.unit - within),
        }
    }

    /// The pieces of bytes `start..end` of the chunk, in order.
    pub fn pieces(&self, start: u64, end: u64) -> impl Iterator<Item = Piece> + use<> {
        let geometry = *self;
        let mut at = start;
        std::iter::from_fn(move || {
            let piece = (at < end).then(|| geometry.piece(at, end - at))?;
            at += piece.len;
            Some(piece)
        })
    }

    /// Byte of the chunk that lies at `offset` of a member's share.
    pub fn chunk_offset(&self, member: usize, offset: u64) -> u64 {
        if self.members == 1 {
            return offset;
        }
        let members = crate::units::dev_len(self.members);
        let index = offset / self.unit * members + crate::units::dev_len(member);
        index * self.unit + offset % self.unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exhaustive over small spaces: pieces tile the range in order, map back, stay in one unit.
    #[test]
    fn pieces_tile_the_range_and_map_back() {
        for members in [1usize, 2, 3, 4, 7] {
            for unit in 1..=4u64 {
                let geometry = Geometry::stripe(unit, members);
                for start in 0..40 {
                    for end in start..60 {
                        let mut at = start;
                        for piece in geometry.pieces(start, end) {
                            assert!(piece.len > 0 && piece.member < members);
                            assert_eq!(geometry.chunk_offset(piece.member, piece.offset), at);
                            let last = piece.offset + piece.len - 1;
                            assert_eq!(
                                geometry.chunk_offset(piece.member, last),
                                at + piece.len - 1
                            );
                            at += piece.len;
                        }
                        assert_eq!(at, end);
                    }
                }
            }
        }
    }

    /// Consecutive stripes of one member are adjacent on it, so that they merge.
    #[test]
    fn next_stripe_continues_on_the_member() {
        let geometry = Geometry::stripe(256 << 10, 4);
        let row = 4 * (256 << 10);
        for member in 0..4u64 {
            let one = geometry.piece(member * (256 << 10), u64::MAX);
            let next = geometry.piece(row + member * (256 << 10), u64::MAX);
            assert_eq!(
                (one.member, one.offset + one.len),
                (next.member, next.offset)
            );
        }
    }
}
