//! What a read gives: pinned slices of folios.

use braidfs_blockdev::PAGE_SIZE;
use smallvec::SmallVec;

use crate::arena::Frame;

/// Some bytes of a pinned frame.
pub(crate) struct Piece {
    pub frame: Frame,
    pub start: usize,
    pub len: usize,
}

/// Bytes of a read: slices of pinned frames, in order. They stay as they are while it lives: a
/// write to these pages meanwhile goes to other frames.
#[derive(Default)]
pub struct ReadData {
    pieces: SmallVec<[Piece; 3]>,
    len: usize,
}

impl ReadData {
    /// Appends `len` bytes from byte `start` of `frame`.
    pub(crate) fn push(&mut self, frame: Frame, start: usize, len: usize) {
        debug_assert!(start + len <= frame.len());
        self.len += len;
        if let Some(last) = self.pieces.last_mut()
            && last.frame.bytes().as_ptr() == frame.bytes().as_ptr()
            && last.start + last.len == start
        {
            last.len += len;
        } else {
            self.pieces.push(Piece { frame, start, len });
        }
    }

    /// Appends the pages `first..first + count` of `frame`.
    pub(crate) fn push_pages(&mut self, frame: Frame, first: usize, count: usize) {
        self.push(frame, first * PAGE_SIZE, count * PAGE_SIZE);
    }

    /// Appends what another one holds.
    pub(crate) fn append(&mut self, other: ReadData) {
        for piece in other.pieces {
            self.push(piece.frame, piece.start, piece.len);
        }
    }

    /// Cuts `front` bytes from the beginning and everything behind `len` bytes from there.
    pub(crate) fn trim(&mut self, front: usize, len: usize) {
        let mut front = front;
        self.pieces.retain_mut(|piece| {
            let cut = front.min(piece.len);
            front -= cut;
            piece.start += cut;
            piece.len -= cut;
            piece.len > 0
        });
        let mut left = len;
        self.pieces.retain_mut(|piece| {
            piece.len = piece.len.min(left);
            left -= piece.len;
            piece.len > 0
        });
        self.len = len - left;
    }

    /// The bytes, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.pieces
            .iter()
            .map(|piece| &piece.frame.bytes()[piece.start..piece.start + piece.len])
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes as one slice, if they lie together.
    pub fn as_single(&self) -> Option<&[u8]> {
        match self.pieces.as_slice() {
            [] => Some(&[]),
            [piece] => Some(&piece.frame.bytes()[piece.start..piece.start + piece.len]),
            _ => None,
        }
    }

    /// Copies the bytes to `out`, which is as long.
    pub(crate) fn copy_to(&self, out: &mut [u8]) {
        let mut rest = out;
        for slice in self.slices() {
            let (now, later) = rest.split_at_mut(slice.len());
            now.copy_from_slice(slice);
            rest = later;
        }
    }
}
