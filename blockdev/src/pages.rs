//! Who owns the memory that a device reads or writes.
//!
//! A [`PageVector`] is handed to a kiobuf by value and comes back in its completion, so the memory
//! outlives every request, chain and iovec that points into it. `unsafe` lives here because memory
//! is shared with devices: the implementor of the trait signs for it.
#![expect(unsafe_code, reason = "raw page memory is shared with devices")]

use crate::units::PAGE_SIZE;
use std::alloc::Layout;
use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// One contiguous, page-aligned piece of memory; its length is a multiple of the page size.
#[derive(Clone, Copy, Debug)]
pub struct PageRun {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a PageRun is an address and a length; whoever dereferences it answers for the access.
unsafe impl Send for PageRun {}
// SAFETY: as above, a shared PageRun gives no access by itself.
unsafe impl Sync for PageRun {}

impl PageRun {
    /// A run of `len` bytes at `ptr`.
    ///
    /// # Safety
    /// The memory must be mapped and writable for as long as the [`PageVector`] that lists the run
    /// lives, or, for a registered arena, as long as the process.
    ///
    /// # Panics
    /// If address or length is not a multiple of the page size, or the length is 0.
    pub unsafe fn new(ptr: NonNull<u8>, len: usize) -> Self {
        assert!(
            ptr.addr().get().is_multiple_of(PAGE_SIZE),
            "page run not page aligned"
        );
        assert!(
            len > 0 && len.is_multiple_of(PAGE_SIZE),
            "page run of partial pages"
        );
        Self { ptr, len }
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a run is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// Owner of pinned pages.
///
/// # Safety
/// The runs stay mapped and unchanged as long as the value lives, and nobody accesses their bytes
/// in conflict with the I/O: while a read is under way nobody else reads or writes them, while a
/// write is under way nobody writes them. `runs` gives the same answer every time.
pub unsafe trait PageVector: Any + Send + Sync {
    /// The memory, in order.
    fn runs(&self) -> &[PageRun];
}

/// Page-aligned heap memory for labels, metadata, direct callers and tests.
///
/// As it owns its memory, bytes are reached through `&`/`&mut` alone; as a [`PageVector`] it moves
/// into a kiobuf and is handed back by the completion, see [`AlignedBuf::from_pages`].
pub struct AlignedBuf {
    run: [PageRun; 1],
}

impl AlignedBuf {
    /// Zeroed memory of `len` bytes, which must be a multiple of the page size and not 0.
    pub fn zeroed(len: usize) -> AlignedBuf {
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size, checked by `layout`.
        let ptr = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            std::alloc::handle_alloc_error(layout)
        };
        // SAFETY: the allocation is page aligned, `len` long, and freed only by our drop.
        let run = unsafe { PageRun::new(ptr, len) };
        AlignedBuf { run: [run] }
    }

    /// Memory that holds `bytes`, padded with zeros to whole pages.
    pub fn from_slice(bytes: &[u8]) -> AlignedBuf {
        let mut buf = Self::zeroed(bytes.len().max(1).next_multiple_of(PAGE_SIZE));
        buf[..bytes.len()].copy_from_slice(bytes);
        buf
    }

    /// Back from what a completion returned; `Err` hands back pages of another type.
    pub fn from_pages(pages: Box<dyn PageVector>) -> Result<AlignedBuf, Box<dyn PageVector>> {
        let any: &dyn Any = &*pages;
        if !any.is::<AlignedBuf>() {
            return Err(pages);
        }
        let any: Box<dyn Any> = pages;
        Ok(*any.downcast::<AlignedBuf>().expect("type was just checked"))
    }

    fn layout(len: usize) -> Layout {
        assert!(
            len > 0 && len.is_multiple_of(PAGE_SIZE),
            "aligned buffer of partial pages"
        );
        Layout::from_size_align(len, PAGE_SIZE).expect("length fits the address space")
    }
}

// SAFETY: the memory is owned, fixed in place and freed only on drop; safe access needs the value
// itself, which the kiobuf owns during I/O.
unsafe impl PageVector for AlignedBuf {
    fn runs(&self) -> &[PageRun] {
        &self.run
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: owned, initialised (zeroed) memory; `&self` excludes writers.
        unsafe { std::slice::from_raw_parts(self.run[0].as_ptr(), self.run[0].len()) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: owned, initialised memory; `&mut self` excludes everybody else.
        unsafe { std::slice::from_raw_parts_mut(self.run[0].as_ptr(), self.run[0].len()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let run = self.run[0];
        // SAFETY: allocated in `zeroed` with the same layout, and nobody else frees it.
        unsafe { std::alloc::dealloc(run.as_ptr(), Self::layout(run.len())) };
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf")
            .field("len", &self.len())
            .finish()
    }
}
