//! What a read gives: pinned slices of folios.

/// Bytes of a read: slices of pinned frames, in order. The frames stay as they are while it lives.
pub struct ReadData {
    pieces: Vec<Vec<u8>>,
}

impl ReadData {
    /// The bytes, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        self.pieces.iter().map(Vec::as_slice)
    }
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.slices().map(<[u8]>::len).sum()
    }
    /// Nothing was asked for.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The bytes as one slice, if they lie together.
    pub fn as_single(&self) -> Option<&[u8]> {
        None
    }
}
