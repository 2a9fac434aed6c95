//! Private pages of the arena.
use braidfs_blockdev::PageVector;

/// Page-aligned private pages for direct I/O. Moves into a kiobuf as its page vector and comes
/// back from the completion by [`FrameVec::from_pages`].
pub struct FrameVec(Vec<u8>);

impl FrameVec {
    /// Length in bytes, as asked for.
    pub fn len(&self) -> usize {
        self.0.len()
    }
    /// Never true for what the cache hands out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The bytes, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(self.0.as_slice())
    }
    /// The bytes, in order, to be filled.
    pub fn slices_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        std::iter::once(self.0.as_mut_slice())
    }
    /// As the page vector of a kiobuf.
    pub fn into_pages(self) -> Box<dyn PageVector> {
        unimplemented!()
    }
    /// Back from a completion.
    pub fn from_pages(_pages: Box<dyn PageVector>) -> Option<FrameVec> {
        unimplemented!()
    }
}
