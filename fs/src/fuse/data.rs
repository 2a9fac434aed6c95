//! Replies to READ and WRITE. They are sent by the thread that completes the request in the core.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use fuser::{ReplyData, ReplyWrite};

use super::Shared;
use super::attr::errno;
use super::stats::Timer;
use crate::{Errno, ReadReply};

thread_local! {
    /// Where a read of several pieces is gathered, as fuser sends one slice. Grows to the largest
    /// request at most (1 MiB) and is kept, because touching fresh memory costs more than the copy.
    static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Answers a READ.
pub(super) fn answer_read(
    shared: &Arc<Shared>,
    timer: Timer,
    result: Result<ReadReply, Errno>,
    reply: ReplyData,
) {
    let ok = result.is_ok();
    match result {
        Ok(data) => send(shared, &data, reply),
        Err(error) => reply.error(errno(error)),
    }
    shared.stats.end(timer, ok);
}

fn send(shared: &Shared, data: &ReadReply, reply: ReplyData) {
    let len = data.len() as u64;
    if let Some(single) = data.as_single() {
        reply.data(single);
        shared.stats.read_bytes_zero_copy.fetch_add(len, Relaxed);
        return;
    }
    BOUNCE.with_borrow_mut(|bounce| {
        bounce.clear();
        for slice in data.slices() {
            bounce.extend_from_slice(slice);
        }
        reply.data(bounce);
    });
    shared.stats.read_bytes_bounced.fetch_add(len, Relaxed);
}

/// Answers a WRITE.
pub(super) fn answer_write(
    shared: &Arc<Shared>,
    timer: Timer,
    result: Result<u32, Errno>,
    reply: ReplyWrite,
) {
    let ok = result.is_ok();
    match result {
        Ok(written) => {
            reply.written(written);
            shared
                .stats
                .write_bytes
                .fetch_add(u64::from(written), Relaxed);
        }
        Err(error) => reply.error(errno(error)),
    }
    shared.stats.end(timer, ok);
}
