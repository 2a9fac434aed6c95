//! Touches the arena in the background, so that the first use of a page does not pay for it.
#![expect(unsafe_code, reason = "the priority of one thread has no safe wrapper")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::arena::Arena;

/// Pages touched at a time: one huge page, so that a stop or another fault waits little.
const PIECE_PAGES: u32 = 512;

/// The thread: first pages first, as they are handed out in that order.
pub(crate) fn run(arena: &Arc<Arena>, stop: &AtomicBool) {
    // SAFETY: a plain system call on the calling thread (0); failing is harmless.
    let nice = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    if nice != 0 {
        log::debug!("prefault runs at normal priority");
    }
    let mut page = 0;
    while page < arena.pages() && !stop.load(Ordering::Relaxed) {
        let count = PIECE_PAGES.min(arena.pages() - page);
        match arena.populate(page, count) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                log::debug!("cache memory is not touched ahead: {error}");
                return;
            }
        }
        page += count;
    }
}
