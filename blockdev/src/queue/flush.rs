//! Flush of one device, shared by all who ask for it at the same time, and its fan-in over devices.
//!
//! A flush that was *started* after a write ended covers it. So a caller is served at once if a
//! finished flush covers all writes, joins the running one if that covers them, and else waits for
//! the next, which serves everybody who came meanwhile.
//!
//! After a failed flush the kernel may have dropped the dirty pages and say that all is well the
//! next time. So the failure sticks: every later flush of this device reports it.

use super::DeviceQueue;
use crate::completion::{self, FlushDone, Job};
use crate::error::{BlockError, ErrorKind, Op};
use crate::request::Parts;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One flush of the volume; dropping it, after the last device's ticket, is the completion.
pub(crate) struct FlushFanIn {
    fate: parking_lot::Mutex<(Option<FlushDone>, Option<BlockError>)>,
}

impl FlushFanIn {
    pub(crate) fn new(done: FlushDone) -> Arc<FlushFanIn> {
        Arc::new(FlushFanIn {
            fate: parking_lot::Mutex::new((Some(done), None)),
        })
    }
}

impl Drop for FlushFanIn {
    fn drop(&mut self) {
        let (done, error) = self.fate.get_mut();
        if let Some(done) = done.take() {
            completion::run(Job::Flush(done, error.map_or(Ok(()), Err)));
        }
    }
}

/// One device's share of a flush. Dropped without an end, it failed.
pub(crate) struct FlushTicket(Option<Arc<FlushFanIn>>);

impl FlushTicket {
    pub(crate) fn new(fan_in: &Arc<FlushFanIn>) -> FlushTicket {
        FlushTicket(Some(fan_in.clone()))
    }

    pub(crate) fn end(mut self, result: Result<(), BlockError>) {
        self.end_now(result);
    }

    fn end_now(&mut self, result: Result<(), BlockError>) {
        if let Some(fan_in) = self.0.take()
            && let Err(error) = result
        {
            fan_in.fate.lock().1.get_or_insert(error);
        }
    }
}

impl Drop for FlushTicket {
    fn drop(&mut self) {
        let (dev, at) = (BlockError::NO_DEVICE, 0);
        self.end_now(Err(BlockError {
            kind: ErrorKind::Aborted,
            op: Op::Flush,
            dev,
            at,
        }));
    }
}

#[derive(Default)]
pub(super) struct FlushState {
    /// Writes that finished flushes cover.
    flushed: u64,
    /// Writes that the running flush covers.
    running: Option<u64>,
    joined: Vec<FlushTicket>,
    next: Vec<FlushTicket>,
    failed: Option<BlockError>,
}

impl DeviceQueue {
    /// Ends `ticket` when all writes that have ended by now are durable.
    pub(crate) fn flush(self: &Arc<Self>, ticket: FlushTicket) {
        let mut state = self.flush.lock();
        let need = self.written.load(Ordering::Acquire);
        let at_once = match (state.failed, state.running) {
            (Some(error), _) => Some(Err(error)),
            _ if state.flushed >= need => Some(Ok(())),
            (None, None) if self.is_silent() => Some(Err(self.not_answered(Op::Flush, 0))),
            (None, Some(covers)) if covers >= need => {
                state.joined.push(ticket);
                return;
            }
            (None, Some(_)) => {
                state.next.push(ticket);
                return;
            }
            (None, None) => None,
        };
        if let Some(result) = at_once {
            drop(state);
            return ticket.end(result);
        }
        state.running = Some(need);
        state.joined.push(ticket);
        drop(state);
        self.start_flush();
    }

    fn start_flush(self: &Arc<Self>) {
        self.unsettled.fetch_add(1, Ordering::Relaxed);
        self.inner.lock().flush_wanted = true;
        self.kick();
    }

    /// The flush under way ended. `begun`: the device was asked, so that a failure lasts.
    pub(super) fn flush_ended(self: &Arc<Self>, result: Result<(), BlockError>, begun: bool) {
        let mut state = self.flush.lock();
        let covered = state.running.take().unwrap_or(0);
        match result {
            Ok(()) => state.flushed = state.flushed.max(covered),
            Err(error) if begun => state.failed = Some(error),
            Err(_) => {}
        }
        let mut ended = std::mem::take(&mut state.joined);
        if result.is_err() {
            ended.append(&mut state.next);
        }
        let again = !state.next.is_empty();
        if again {
            state.joined = std::mem::take(&mut state.next);
            state.running = Some(self.written.load(Ordering::Acquire));
        }
        drop(state);
        if again {
            self.start_flush();
        }
        for ticket in ended {
            ticket.end(result);
        }
        self.unsettled.fetch_sub(1, Ordering::Release);
    }
}

impl Parts {
    pub(super) fn flush(dev: u16) -> Parts {
        Parts::new(Op::Flush, dev, 0, crate::chain::Chain::new())
    }
}
