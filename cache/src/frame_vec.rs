//! Frames as the page vectors of kiobufs.
//!
//! [`FrameVec`] owns frames that nobody else has, for a device to read into or a caller to fill.
//! [`PinnedPages`] shares frames that stay as they are while it lives, for a device to write.
#![expect(unsafe_code, reason = "signs the contract of PageVector")]

use std::any::Any;
use std::sync::Arc;

use braidfs_blockdev::{PAGE_SIZE, PageRun, PageVector};
use smallvec::SmallVec;

use crate::arena::Frame;

/// Often one large frame.
pub(crate) type Frames = SmallVec<[Frame; 1]>;

/// Page-aligned private pages of the cache's arena. Moves into a kiobuf as its page vector and
/// comes back from the completion by [`FrameVec::from_pages`]; [`FrameVec::lend`] cuts it into
/// several page vectors.
pub struct FrameVec {
    /// Each the only handle to its frame; no clone is ever made.
    frames: Frames,
    runs: SmallVec<[PageRun; 1]>,
    len: usize,
}

impl FrameVec {
    /// `frames` were just allocated; `len` bytes of them are of use.
    pub(crate) fn new(frames: impl Into<Frames>, len: usize) -> Self {
        let mut frames = frames.into();
        assert!(
            frames.iter_mut().all(|frame| frame.get_mut().is_some()),
            "frames are private"
        );
        let runs = frames
            .iter()
            .map(|frame| frame.run(0, 1 << frame.order()))
            .collect();
        debug_assert!(len <= frames.iter().map(Frame::len).sum());
        Self { frames, runs, len }
    }

    /// Length in bytes, as asked for. The page vector is that, rounded up to whole frames.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true for what the cache hands out.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, in order.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let mut left = self.len;
        self.frames.iter().map(move |frame| {
            let take = frame.len().min(left);
            left -= take;
            &frame.bytes()[..take]
        })
    }

    /// The bytes, in order, to be filled.
    pub fn slices_mut(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let mut left = self.len;
        self.frames.iter_mut().map(move |frame| {
            let take = frame.len().min(left);
            left -= take;
            &mut frame.get_mut().expect("frames of a FrameVec are private")[..take]
        })
    }

    /// All of it as one piece, where it is one.
    pub fn as_single(&self) -> Option<&[u8]> {
        match self.frames.as_slice() {
            [frame] => Some(&frame.bytes()[..self.len]),
            _ => None,
        }
    }

    /// Sets pages `first..first + count` to zero.
    pub(crate) fn zero_pages(&mut self, first: usize, count: usize) {
        let (mut from, mut left) = (first * PAGE_SIZE, count * PAGE_SIZE);
        for slice in self.slices_mut() {
            if from >= slice.len() {
                from -= slice.len();
                continue;
            }
            let take = left.min(slice.len() - from);
            slice[from..from + take].fill(0);
            (from, left) = (0, left - take);
            if left == 0 {
                return;
            }
        }
    }

    pub(crate) fn into_frames(self) -> Frames {
        self.frames
    }

    /// As the page vector of one kiobuf.
    pub fn into_pages(self) -> Box<dyn PageVector> {
        Box::new(self)
    }

    /// Back from a completion; `None` if the pages are something else.
    pub fn from_pages(pages: Box<dyn PageVector>) -> Option<FrameVec> {
        let any: Box<dyn Any> = pages;
        any.downcast::<FrameVec>().ok().map(|vec| *vec)
    }

    /// To be cut into page vectors for several kiobufs, in order.
    pub fn lend(self) -> Lender {
        Lender {
            set: Arc::new(self),
            frame: 0,
            page: 0,
        }
    }
}

// SAFETY: the frames are owned, mapped while they are, and reached only through the FrameVec
// itself, which the kiobuf owns during I/O.
unsafe impl PageVector for FrameVec {
    fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

/// Cuts a [`FrameVec`] into disjoint page vectors. Nobody can reach a byte until all of them are
/// gone and [`Lender::finish`] gave the pages back.
pub struct Lender {
    set: Arc<FrameVec>,
    /// The next page to lend: in which frame, and where in it.
    frame: usize,
    page: u64,
}

struct LentPages {
    _set: Arc<FrameVec>,
    runs: SmallVec<[PageRun; 4]>,
}

impl Lender {
    /// The next `pages` pages.
    ///
    /// # Panics
    /// If there are not so many left.
    pub fn take(&mut self, pages: usize) -> Box<dyn PageVector> {
        let runs = self.advance(pages);
        Box::new(LentPages {
            _set: Arc::clone(&self.set),
            runs,
        })
    }

    /// Passes over the next `pages` pages.
    ///
    /// # Panics
    /// If there are not so many left.
    pub fn skip(&mut self, pages: usize) {
        self.advance(pages);
    }

    fn advance(&mut self, pages: usize) -> SmallVec<[PageRun; 4]> {
        let mut runs = SmallVec::new();
        let mut left = pages as u64;
        while left > 0 {
            let frame = &self.set.frames[self.frame];
            let take = left.min((1 << frame.order()) - self.page);
            runs.push(frame.run(self.page, take));
            self.page += take;
            left -= take;
            if self.page == 1 << frame.order() {
                (self.frame, self.page) = (self.frame + 1, 0);
            }
        }
        runs
    }

    /// The pages, once every page vector is gone; else `None`, and they are freed in time.
    pub fn finish(self) -> Option<FrameVec> {
        Arc::into_inner(self.set)
    }
}

// SAFETY: the set keeps the frames mapped; `Lender` hands every page out once and gives no access
// to bytes, and the FrameVec comes back only when no LentPages is left.
unsafe impl PageVector for LentPages {
    fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

/// Shared frames, pinned so that nobody can write them: the pages of a writeback kiobuf.
pub(crate) struct PinnedPages {
    _pins: Vec<Frame>,
    runs: Vec<PageRun>,
}

impl PinnedPages {
    pub fn new() -> Self {
        Self {
            _pins: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// Adds `count` pages from page `first` of `frame`.
    pub fn push(&mut self, frame: Frame, first: usize, count: usize) {
        self.runs.push(frame.run(first as u64, count as u64));
        self._pins.push(frame);
    }

    pub fn len(&self) -> usize {
        self.runs.iter().map(PageRun::len).sum()
    }
}

// SAFETY: each pin keeps its frame mapped and, being one more handle, keeps everybody from
// writing it. The kiobufs built from it only write to devices.
unsafe impl PageVector for PinnedPages {
    fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}
