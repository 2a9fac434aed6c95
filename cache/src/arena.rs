//! The arena and the handles to its memory: the only module of the cache that touches raw pages.
//!
//! One anonymous mapping, made at start and never grown, is handed out by the buddy allocator as
//! frames of 2^k pages; how much of it may be used can change (see `resize`). A [`Frame`] is a
//! counted handle to a frame, or to a part of one. Reading needs a handle, writing needs the only
//! handle (see [`crate::refcount`]), and pages lent to a device for reading into are inaccessible
//! until the device's owner has given them back ([`FrameVec::lend`](crate::FrameVec)). So a page
//! that somebody can see never changes under him, and a page under I/O keeps the bytes its checksum
//! was computed from.
//!
//! The mapping lives as long as any frame: each frame handed out holds one strong count of the
//! arena, so that pinning and unpinning touch the frame's own count alone.
#![expect(
    unsafe_code,
    reason = "page memory is shared with devices and pinned by count"
)]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use braidfs_blockdev::{PAGE_SIZE, PageRun};
use memmap2::{Advice, MmapMut, MmapRaw, UncheckedAdvice};
use parking_lot::Mutex;

use crate::SpaceClass;
use crate::buddy::{Buddy, ORDER_MAX, PAGES_MAX};
use crate::event::Event;
use crate::refcount::RefCount;
use crate::units::mem;

/// The mapping starts at a multiple of the huge page size.
const HUGE_PAGE: usize = 2 << 20;
/// Smallest arena: the reserve and a few large folios.
const ARENA_MIN: u64 = 4 << 20;
/// Frames only metadata may take: at least this many bytes, or 1/32 of the arena.
const RESERVE_MIN: u64 = 2 << 20;

pub(crate) struct Arena {
    map: MmapRaw,
    base: NonNull<u8>,
    pages: u32,
    /// Pages that may be used, and of these the ones that only metadata may take.
    usable_pages: AtomicU32,
    reserve_pages: AtomicU32,
    /// Whether pages may be mapped ahead of their use; held while that is done.
    populating: Mutex<bool>,
    /// One count per page; that of a frame's first page is in use.
    pins: Box<[RefCount]>,
    buddy: Mutex<Buddy>,
    /// A copy of the allocator's count, to look at without its lock.
    free_pages: AtomicU32,
    /// Told when a frame comes back.
    pub freed: Event,
}

// SAFETY: `base` points into `map`, which the arena owns; access to its bytes is governed by the
// frames' counts, everything else is behind a lock or atomic.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps about `bytes` (whole MiB, not less than the minimum). Nothing is touched yet.
    pub fn new(bytes: u64) -> io::Result<Arc<Self>> {
        let pages =
            bytes.max(ARENA_MIN) / (u64::from(PAGES_MAX) * PAGE_SIZE as u64) * u64::from(PAGES_MAX);
        let too_large = || io::Error::from(io::ErrorKind::InvalidInput);
        let pages = u32::try_from(pages)
            .ok()
            .filter(|&p| p < 1 << 31)
            .ok_or_else(too_large)?;
        let len = pages as usize * PAGE_SIZE;
        let map = MmapRaw::from(MmapMut::map_anon(len + HUGE_PAGE)?);
        let skip = map.as_mut_ptr().align_offset(HUGE_PAGE);
        let base = NonNull::new(map.as_mut_ptr().wrapping_add(skip)).ok_or_else(too_large)?;
        if let Err(error) = map.advise_range(Advice::HugePage, skip, len) {
            log::debug!("no huge pages for the cache: {error}");
        }
        Ok(Arc::new(Self {
            map,
            base,
            pages,
            usable_pages: AtomicU32::new(pages),
            reserve_pages: AtomicU32::new(reserve_of(pages)),
            populating: Mutex::new(true),
            pins: (0..pages).map(|_| RefCount::new()).collect(),
            buddy: Mutex::new(Buddy::new(pages)),
            free_pages: AtomicU32::new(pages),
            freed: Event::new(),
        }))
    }

    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Those that may be used.
    pub fn usable_pages(&self) -> u32 {
        self.usable_pages.load(Ordering::Relaxed)
    }

    /// Says how many may be used; whoever lowers it takes the others, and nobody populates them.
    pub fn set_usable_pages(&self, pages: u32) {
        if pages < self.pages {
            *self.populating.lock() = false;
        }
        self.usable_pages.store(pages, Ordering::Relaxed);
        self.reserve_pages
            .store(reserve_of(pages), Ordering::Relaxed);
    }

    pub fn reserve_pages(&self) -> u32 {
        self.reserve_pages.load(Ordering::Relaxed)
    }

    pub fn free_pages(&self) -> u32 {
        self.free_pages.load(Ordering::Relaxed)
    }

    /// The whole arena, for a device to register.
    pub fn run(&self) -> PageRun {
        // SAFETY: mapped, writable, and as long as any frame (and so any page vector) exists.
        unsafe { PageRun::new(self.base, self.pages as usize * PAGE_SIZE) }
    }

    /// Maps `pages` pages from page `first` on now instead of at first touch. Contents stay. False
    /// if that is not wanted any more.
    pub fn populate(&self, first: u32, pages: u32) -> io::Result<bool> {
        let wanted = self.populating.lock();
        if !*wanted {
            return Ok(false);
        }
        let skip = self.base.as_ptr().addr() - self.map.as_mut_ptr().addr();
        let (at, len) = (first as usize * PAGE_SIZE, pages as usize * PAGE_SIZE);
        self.map
            .advise_range(Advice::PopulateWrite, skip + at, len)?;
        Ok(true)
    }

    /// A frame of 2^`order` pages nobody else has, without waiting. Data leaves the reserve alone.
    pub fn try_alloc(self: &Arc<Self>, order: u8, class: SpaceClass) -> Option<Frame> {
        debug_assert!(order <= ORDER_MAX);
        let mut buddy = self.buddy.lock();
        let keep = if class == SpaceClass::Meta {
            0
        } else {
            self.reserve_pages()
        };
        if buddy.free_pages() < keep + (1 << order) {
            return None;
        }
        let page = buddy.alloc(order)?;
        self.free_pages.store(buddy.free_pages(), Ordering::Relaxed);
        drop(buddy);
        self.pins[page as usize].begin();
        let arena = Arc::into_raw(Arc::clone(self));
        let arena = NonNull::new(arena.cast_mut()).expect("an Arc is not null");
        Some(Frame {
            arena,
            head: page,
            page,
            order,
            head_order: order,
        })
    }

    /// Like `try_alloc`, but smaller if there is none of that order.
    pub fn try_alloc_upto(self: &Arc<Self>, order: u8, class: SpaceClass) -> Option<Frame> {
        (0..=order)
            .rev()
            .find_map(|order| self.try_alloc(order, class))
    }

    fn free(&self, page: u32, order: u8) {
        let mut buddy = self.buddy.lock();
        buddy.free(page, order);
        self.free_pages.store(buddy.free_pages(), Ordering::Relaxed);
        drop(buddy);
        self.freed.notify();
    }
}

/// Counted handle to a frame or to an aligned part of one: clone to pin, drop to unpin. The frame
/// goes back to the arena with its last handle.
pub(crate) struct Frame {
    arena: NonNull<Arena>,
    /// First page of the frame as allocated: where the count is.
    head: u32,
    /// First page of this handle's part.
    page: u32,
    order: u8,
    head_order: u8,
}

// SAFETY: a handle is a count on the frame, and the counts are atomic; bytes are written through
// the only handle alone.
unsafe impl Send for Frame {}
// SAFETY: `&Frame` gives read access only.
unsafe impl Sync for Frame {}

impl Frame {
    fn arena(&self) -> &Arena {
        // SAFETY: the frame holds a strong count of its arena until its last handle is gone.
        unsafe { self.arena.as_ref() }
    }

    fn pins(&self) -> &RefCount {
        &self.arena().pins[self.head as usize]
    }

    pub fn order(&self) -> u8 {
        self.order
    }

    pub fn len(&self) -> usize {
        PAGE_SIZE << self.order
    }

    fn ptr(&self) -> NonNull<u8> {
        // SAFETY: `page` is a page of the arena, so the offset stays inside the mapping.
        unsafe { self.arena().base.add(self.page as usize * PAGE_SIZE) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the part is mapped and initialised (the mapping began as zeros); writing needs
        // the only handle by `&mut`, and a device reads only into lent frames, which have no
        // `Frame` that anyone can reach.
        unsafe { std::slice::from_raw_parts(self.ptr().as_ptr(), self.len()) }
    }

    /// The bytes of page `index` of this part.
    pub fn page_bytes(&self, index: usize) -> &[u8] {
        &self.bytes()[index * PAGE_SIZE..(index + 1) * PAGE_SIZE]
    }

    /// The bytes, to write, if this is the only handle.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        if !self.pins().is_unique() {
            return None;
        }
        // SAFETY: mapped and initialised; this is the only handle, borrowed mutably, and new ones
        // come only from it, so nobody else reads or writes these bytes.
        Some(unsafe { std::slice::from_raw_parts_mut(self.ptr().as_ptr(), self.len()) })
    }

    /// Gives the memory back to the system, if this is the only handle; it reads as zeros when it
    /// is used again. No device may have it registered.
    pub fn release(&mut self) -> io::Result<()> {
        let len = self.len();
        let Some(bytes) = self.get_mut() else {
            return Err(io::ErrorKind::ResourceBusy.into());
        };
        let at = bytes.as_ptr().addr() - self.arena().map.as_mut_ptr().addr();
        let advice = UncheckedAdvice::DontNeed;
        // SAFETY: these pages are private anonymous memory of the arena, nobody else has a handle
        // to them, and none of their bytes is relied on: any bytes will do, and they become zeros.
        unsafe { self.arena().map.unchecked_advise_range(advice, at, len) }
    }

    /// A handle to the part of 2^`order` pages number `index` of this one.
    pub fn part(&self, index: u32, order: u8) -> Frame {
        assert!(order <= self.order && index < 1 << (self.order - order));
        let mut part = self.clone();
        part.page += index << order;
        part.order = order;
        part
    }

    /// `count` pages from page `first` of this part, as memory for an I/O. Whoever uses it keeps
    /// a handle, or keeps the frame lent.
    pub fn run(&self, first: u64, count: u64) -> PageRun {
        assert!(count > 0 && first + count <= 1 << self.order);
        // SAFETY: inside this part, so inside the mapping; mapped while a handle exists.
        unsafe {
            let ptr = self.ptr().add(mem(first) * PAGE_SIZE);
            PageRun::new(ptr, mem(count) * PAGE_SIZE)
        }
    }
}

impl Clone for Frame {
    fn clone(&self) -> Self {
        self.pins().add_ref();
        Self { ..*self }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if self.pins().drop_ref() {
            // SAFETY: the frame's strong count of the arena, made in `try_alloc`, is taken back
            // once, by the last handle.
            let arena = unsafe { Arc::from_raw(self.arena.as_ptr()) };
            arena.free(self.head, self.head_order);
        }
    }
}

/// Pages that only metadata may take, of so many.
fn reserve_of(pages: u32) -> u32 {
    let least = u32::try_from(RESERVE_MIN / PAGE_SIZE as u64).expect("a constant");
    least.max(pages / 32).min(pages / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_only_handle_writes() {
        let arena = Arena::new(8 << 20).unwrap();
        let mut frame = arena.try_alloc(3, SpaceClass::Data).unwrap();
        frame.get_mut().unwrap().fill(7);
        let pin = frame.clone();
        assert!(frame.get_mut().is_none());
        assert!(pin.bytes().iter().all(|&byte| byte == 7));
        drop(pin);
        let part = frame.part(1, 1);
        assert!(frame.get_mut().is_none());
        assert_eq!(part.bytes().as_ptr(), frame.page_bytes(2).as_ptr());
        drop(frame);
        assert_eq!(arena.free_pages(), arena.pages() - 8);
        drop(part);
        assert_eq!(arena.free_pages(), arena.pages());
    }

    #[test]
    fn a_frame_keeps_the_mapping() {
        let arena = Arena::new(8 << 20).unwrap();
        let mut frame = arena.try_alloc(0, SpaceClass::Data).unwrap();
        drop(arena);
        frame.get_mut().unwrap().fill(9);
        assert!(frame.bytes().iter().all(|&byte| byte == 9));
    }

    #[test]
    fn data_leaves_the_reserve_to_metadata() {
        let arena = Arena::new(8 << 20).unwrap();
        let data: Vec<_> =
            std::iter::from_fn(|| arena.try_alloc_upto(8, SpaceClass::Data)).collect();
        assert_eq!(arena.free_pages(), arena.reserve_pages());
        assert!(arena.try_alloc(0, SpaceClass::Data).is_none());
        assert!(arena.try_alloc(0, SpaceClass::Meta).is_some());
        drop(data);
    }

    #[test]
    fn populate_keeps_the_contents() {
        let arena = Arena::new(8 << 20).unwrap();
        let mut frame = arena.try_alloc(8, SpaceClass::Data).unwrap();
        frame.get_mut().unwrap().fill(5);
        assert!(arena.populate(0, arena.pages()).unwrap());
        assert!(frame.bytes().iter().all(|&byte| byte == 5));
        arena.set_usable_pages(arena.pages() / 2);
        assert!(!arena.populate(0, 1).unwrap(), "it could undo a release");
    }

    #[test]
    fn released_memory_reads_as_zeros_and_needs_the_only_handle() {
        let arena = Arena::new(8 << 20).unwrap();
        let mut frame = arena.try_alloc(3, SpaceClass::Data).unwrap();
        let mut other = arena.try_alloc(3, SpaceClass::Data).unwrap();
        frame.get_mut().unwrap().fill(5);
        other.get_mut().unwrap().fill(6);
        let pin = frame.clone();
        assert!(frame.release().is_err());
        drop(pin);
        frame.release().unwrap();
        assert!(frame.bytes().iter().all(|&byte| byte == 0));
        assert!(other.bytes().iter().all(|&byte| byte == 6));
    }
}
