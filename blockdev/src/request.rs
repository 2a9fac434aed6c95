//! A device request: one contiguous range of one device and the chain that fills it.

use crate::chain::Chain;
use crate::completion;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::{InDoubt, View};
use crate::sync::{Arc as FlightArc, Mutex, MutexGuard};
use libc::iovec;
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

/// Who hears of a request's end (the queue that dispatched it).
pub(crate) trait RequestOwner: Send + Sync {
    /// The device is done with the request. `bytes` of `Ok` may be less than its length. `late`: it
    /// had been given up before, so its views have been told.
    fn request_ended(self: Arc<Self>, request: Parts, result: Result<u64, ErrorKind>, late: bool);
}

/// What a discard tells who waits for it: the error, and, if a device did not answer, when it will
/// be over.
pub(crate) type DiscardFailed = (ErrorKind, Option<InDoubt>);

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
    /// When the queue gave it to the device: its time to answer starts here.
    pub started: Option<Instant>,
    /// Its place in the queue's table of requests in flight.
    pub slot: usize,
    /// Order of dispatch on its device, to see which were overtaken.
    pub seq: u64,
    /// How many kiobufs have bytes in it, counted at dispatch.
    pub kiobufs: u64,
    /// Its dispatch was told to who traces.
    pub is_traced: bool,
    /// A discard tells its errors here, and that it ended by dropping it.
    pub discarded: Option<Sender<DiscardFailed>>,
    /// Of a discard that was given up.
    pub in_doubt: Option<InDoubt>,
}

/// A request while a device has it: both the device, which ends it, and whoever watches the clock
/// find it here, and the lock decides who was first. A queue uses a flight again and again, so a
/// watcher names the request that it means. The lock is a leaf; no `end_io` runs under it.
#[derive(Default)]
pub struct Flight {
    state: Mutex<FlightState>,
}

#[derive(Default)]
struct FlightState {
    parts: Option<Parts>,
    timed_out: bool,
}

impl Flight {
    fn lock(&self) -> MutexGuard<'_, FlightState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, parts: Parts) {
        *self.lock() = FlightState {
            parts: Some(parts),
            timed_out: false,
        };
    }

    /// Gives request number `seq` up: its kiobufs end as timed out, while the device keeps their
    /// memory until it ends the request. False if the device was first.
    pub fn time_out(&self, seq: u64) -> bool {
        let mut state = self.lock();
        if state.timed_out {
            return false;
        }
        let Some(parts) = state.parts.as_mut().filter(|parts| parts.seq == seq) else {
            return false;
        };
        let mut at = parts.offset;
        let mut jobs = Vec::with_capacity(parts.chain.views());
        for view in parts.chain.iter() {
            jobs.extend(view.expire(parts.error(ErrorKind::TimedOut, at)));
            at += crate::units::dev_len(view.len);
        }
        if let Some(discarded) = parts.discarded.take() {
            let in_doubt = InDoubt::default();
            parts.in_doubt = Some(in_doubt.clone());
            let failed = (ErrorKind::TimedOut, Some(in_doubt));
            // Nobody may wait for it any more.
            discarded.send(failed).unwrap_or_default();
        }
        state.timed_out = true;
        drop(state);
        jobs.into_iter().for_each(completion::run);
        true
    }

    fn end(&self) -> Option<(Parts, bool)> {
        let mut state = self.lock();
        let parts = state.parts.take()?;
        Some((parts, state.timed_out))
    }
}

/// A request as a backend sees it. It must be ended exactly once with [`DeviceRequest::end`];
/// one that is dropped ends with [`ErrorKind::Aborted`].
pub struct DeviceRequest {
    op: Op,
    offset: u64,
    len: u64,
    /// Taken by the end.
    flight: Option<FlightArc<Flight>>,
    owner: Option<Arc<dyn RequestOwner>>,
}

impl DeviceRequest {
    /// A request without a queue, for tests and tools: its views end with its result.
    pub fn new(op: Op, offset: u64, chain: Chain) -> DeviceRequest {
        Self::with_owner(Parts::new(op, 0, offset, chain), None)
    }

    pub(crate) fn with_owner(parts: Parts, owner: Option<Arc<dyn RequestOwner>>) -> Self {
        Self::in_flight(parts, FlightArc::default(), owner)
    }

    /// A request in a flight that its queue knows.
    pub(crate) fn in_flight(
        parts: Parts,
        flight: FlightArc<Flight>,
        owner: Option<Arc<dyn RequestOwner>>,
    ) -> Self {
        let (op, offset, len) = (parts.op, parts.offset, parts.len);
        flight.begin(parts);
        DeviceRequest {
            op,
            offset,
            len,
            flight: Some(flight),
            owner,
        }
    }

    /// Where to give it up when the device does not answer.
    pub fn flight(&self) -> FlightArc<Flight> {
        self.flight.clone().unwrap_or_default()
    }

    fn with_chain<R: Default>(&self, look: impl FnOnce(&Chain) -> R) -> R {
        let Some(flight) = &self.flight else {
            return R::default();
        };
        let state = flight.lock();
        state
            .parts
            .as_ref()
            .map(|parts| look(&parts.chain))
            .unwrap_or_default()
    }

    /// What to do.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Byte offset on the device.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes; 0 for a flush.
    #[expect(clippy::len_without_is_empty, reason = "a length of the device range")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Number of views that the request carries.
    pub fn views(&self) -> usize {
        self.with_chain(Chain::views)
    }

    /// Appends the memory of the request to `out`, whose allocation the backend reuses.
    pub fn fill_iovecs(&self, out: &mut Vec<iovec>) {
        self.fill_iovecs_from(0, out);
    }

    /// As [`Self::fill_iovecs`], without the first `done` bytes: for what a short transfer left.
    pub fn fill_iovecs_from(&self, done: u64, out: &mut Vec<iovec>) {
        self.with_chain(|chain| chain.fill_iovecs(done, out));
    }

    /// The device is done: `Ok` with the bytes transferred from the start (a backend retries what a
    /// short transfer left before it gives up), or the reason why none of it can be relied on.
    pub fn end(mut self, result: Result<u64, ErrorKind>) {
        self.end_now(result);
    }

    fn end_now(&mut self, result: Result<u64, ErrorKind>) {
        let Some((parts, late)) = self.flight.take().and_then(|flight| flight.end()) else {
            return;
        };
        match self.owner.take() {
            Some(owner) => owner.request_ended(parts, result, late),
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
            slot: 0,
            seq: 0,
            kiobufs: 0,
            is_traced: false,
            discarded: None,
            in_doubt: None,
        }
    }

    pub(crate) fn of_view(op: Op, dev: u16, offset: u64, view: View) -> Parts {
        Parts::new(op, dev, offset, Chain::of(view))
    }

    pub(crate) fn discard(dev: u16, offset: u64, len: u64, ended: Sender<DiscardFailed>) -> Parts {
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
