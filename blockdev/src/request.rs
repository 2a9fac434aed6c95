//! A device request: one contiguous range of one device and the chain that fills it.

use crate::chain::Chain;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::View;
use libc::iovec;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

/// Who hears of a request's end (the queue that dispatched it).
pub(crate) trait RequestOwner: Send + Sync {
    /// The device is done with the request. `bytes` of `Ok` may be less than its length.
    fn request_ended(self: Arc<Self>, request: Parts, result: Result<u64, ErrorKind>);
}

/// What a request is, without the duty to end it.
pub(crate) struct Parts {
    pub op: Op,
    pub dev: u16,
    pub offset: u64,
    pub len: u64,
    pub chain: Chain,
    /// Order of preference in the queue; lower goes first.
    pub lane: u8,
    /// A piece of a request that failed as a whole: not merged, not retried again.
    pub is_retry: bool,
    /// When the queue gave it to the device. A later per-request timeout starts here.
    pub started: Option<Instant>,
    /// Order of dispatch on its device, to see which were overtaken.
    pub seq: u64,
    /// How many kiobufs have bytes in it, counted at dispatch.
    pub kiobufs: u64,
    /// A discard tells its errors here, and that it ended by dropping it.
    pub discarded: Option<Sender<ErrorKind>>,
}

/// A request as a backend sees it. It must be ended exactly once with [`DeviceRequest::end`];
/// one that is dropped ends with [`ErrorKind::Aborted`].
pub struct DeviceRequest {
    parts: Option<Parts>,
    owner: Option<Arc<dyn RequestOwner>>,
}

impl DeviceRequest {
    /// A request without a queue, for tests and tools: its views end with its result.
    pub fn new(op: Op, offset: u64, chain: Chain) -> DeviceRequest {
        Self::with_owner(Parts::new(op, 0, offset, chain), None)
    }

    pub(crate) fn with_owner(parts: Parts, owner: Option<Arc<dyn RequestOwner>>) -> Self {
        DeviceRequest {
            parts: Some(parts),
            owner,
        }
    }

    fn parts(&self) -> &Parts {
        self.parts
            .as_ref()
            .expect("only `end` and `drop` take the parts")
    }

    /// What to do.
    pub fn op(&self) -> Op {
        self.parts().op
    }

    /// Byte offset on the device.
    pub fn offset(&self) -> u64 {
        self.parts().offset
    }

    /// Length in bytes; 0 for a flush.
    #[expect(clippy::len_without_is_empty, reason = "a length of the device range")]
    pub fn len(&self) -> u64 {
        self.parts().len
    }

    /// Number of views that the request carries.
    pub fn views(&self) -> usize {
        self.parts().chain.views()
    }

    /// Appends the memory of the request to `out`, whose allocation the backend reuses.
    pub fn fill_iovecs(&self, out: &mut Vec<iovec>) {
        self.fill_iovecs_from(0, out);
    }

    /// As [`Self::fill_iovecs`], without the first `done` bytes: for what a short transfer left.
    pub fn fill_iovecs_from(&self, done: u64, out: &mut Vec<iovec>) {
        self.parts().chain.fill_iovecs(done, out);
    }

    /// The device is done: `Ok` with the bytes transferred from the start (a backend retries what a
    /// short transfer left before it gives up), or the reason why none of it can be relied on.
    pub fn end(mut self, result: Result<u64, ErrorKind>) {
        self.end_now(result);
    }

    /// Dispatch: from here its latency counts.
    pub(crate) fn mark_started(&mut self, now: Instant) {
        if let Some(parts) = &mut self.parts {
            parts.started = Some(now);
            parts.kiobufs = crate::units::dev_len(parts.chain.kiobufs());
        }
    }

    fn end_now(&mut self, result: Result<u64, ErrorKind>) {
        let Some(parts) = self.parts.take() else {
            return;
        };
        match self.owner.take() {
            Some(owner) => owner.request_ended(parts, result),
            None => parts.end_views(result),
        }
    }
}

impl Drop for DeviceRequest {
    fn drop(&mut self) {
        self.end_now(Err(ErrorKind::Aborted));
    }
}

impl Parts {
    pub(crate) fn new(op: Op, dev: u16, offset: u64, chain: Chain) -> Parts {
        Parts {
            op,
            dev,
            offset,
            len: chain.bytes(),
            chain,
            lane: 0,
            is_retry: false,
            started: None,
            seq: 0,
            kiobufs: 0,
            discarded: None,
        }
    }

    pub(crate) fn of_view(op: Op, dev: u16, offset: u64, view: View) -> Parts {
        Parts::new(op, dev, offset, Chain::of(view))
    }

    pub(crate) fn discard(dev: u16, offset: u64, len: u64, ended: Sender<ErrorKind>) -> Parts {
        let lane = u8::MAX;
        Parts {
            len,
            lane,
            discarded: Some(ended),
            ..Parts::new(Op::Discard, dev, offset, Chain::new())
        }
    }

    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }

    pub(crate) fn error(&self, kind: ErrorKind, at: u64) -> BlockError {
        BlockError {
            kind,
            op: self.op,
            dev: self.dev,
            at,
        }
    }

    /// Ends the views with the device's word: what was transferred is good, the rest failed.
    pub(crate) fn end_views(mut self, result: Result<u64, ErrorKind>) {
        match result {
            Ok(bytes) => {
                let good = bytes.min(self.len);
                let error = self.error(ErrorKind::ShortTransfer, self.offset + good);
                // A view is one kiobuf's; a cut inside it keeps its byte count right.
                let front = self.chain.split_to(good);
                front.end_good();
                std::mem::take(&mut self.chain).end_bad(error);
            }
            Err(kind) => {
                let error = self.error(kind, self.offset);
                std::mem::take(&mut self.chain).end_bad(error);
            }
        }
    }
}
