//! Fixed buffers: the arena registered with a ring, piece by piece, when first used.
//!
//! Registering pins (and so allocates) a piece, which would make a mount slow and big if it were
//! done for the whole arena at once. A request uses a fixed buffer if all its memory lies in one
//! piece.

use crate::pages::PageRun;
use io_uring::IoUring;
use libc::iovec;

/// Arena memory is registered in pieces of at least this size, when first used.
const PIECE_MIN: usize = 64 << 20;
/// The kernel's limit on one registered buffer.
const PIECE_MAX: usize = 1 << 30;
/// Pieces of an arena: far below the kernel's limit of registered buffers.
const PIECES_WANTED: usize = 256;

/// The arena's registered pieces.
pub(super) struct FixedMemory {
    arena: PageRun,
    piece_len: usize,
    registered: Vec<bool>,
}

impl FixedMemory {
    /// A table of buffers, still empty; `None` if the kernel refuses.
    pub(super) fn new(arena: PageRun, ring: &IoUring) -> Option<FixedMemory> {
        let wanted = (arena.len() / PIECES_WANTED).next_power_of_two();
        let piece_len = wanted.clamp(PIECE_MIN, PIECE_MAX);
        let pieces = arena.len().div_ceil(piece_len);
        let count = u32::try_from(pieces).ok()?;
        match ring.submitter().register_buffers_sparse(count) {
            Ok(()) => Some(FixedMemory {
                arena,
                piece_len,
                registered: vec![false; pieces],
            }),
            Err(error) => {
                log::info!("no fixed buffers: {error}");
                None
            }
        }
    }

    /// The registered piece in which all segments lie, registering it when it is first used. After
    /// a refusal (locked-memory limit) `registered` is empty and nothing is tried again.
    pub(super) fn index_of(&mut self, iovecs: &[iovec], ring: &IoUring) -> Option<u16> {
        let base = self.arena.as_ptr().addr();
        let range = |part: &iovec| {
            let start = part.iov_base.addr().checked_sub(base)?;
            Some((start, start + part.iov_len))
        };
        let index = range(iovecs.first()?)?.0 / self.piece_len;
        let start = index * self.piece_len;
        let len = self.piece_len.min(self.arena.len().checked_sub(start)?);
        let inside = |part| range(part).is_some_and(|(s, e)| s >= start && e <= start + len);
        if !iovecs.iter().all(inside) {
            return None;
        }
        if !*self.registered.get(index)? {
            let iov_base = self.arena.as_ptr().wrapping_add(start).cast();
            let piece = iovec {
                iov_base,
                iov_len: len,
            };
            let number = u32::try_from(index).ok()?;
            // SAFETY: the arena stays mapped as long as the process (`register_memory`).
            let done = unsafe {
                ring.submitter()
                    .register_buffers_update(number, &[piece], None)
            };
            if let Err(error) = done {
                log::info!("no fixed buffers: {error}");
                self.registered.clear();
                return None;
            }
            self.registered[index] = true;
        }
        u16::try_from(index).ok()
    }
}
