//! The request queue of one device: merge, order, bounded depth, retry, flush.
//!
//! Requests wait in three lanes; a lower lane goes first, but no lane is passed over more than
//! [`PASSED_OVER_MAX`] times in a row. One thread at a time dispatches; others leave their requests
//! and go on, so a synchronous completion that submits again does not recurse.
//!
//! A device that does not answer within its time is *silent*, see [`watch`].
//!
//! Lock order: `inner` and `flush` are never held together, nor while a device or `end_io` is
//! called. A flight's lock is below `inner`.

pub(crate) mod backlog;
mod flush;
mod watch;

pub(crate) use flush::{FlushFanIn, FlushTicket};
pub(crate) use watch::Watchdog;

use crate::device::BlockDevice;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::{Leg, View};
use crate::request::{DeviceRequest, Parts, RequestOwner};
use crate::stats::{DirectionStats, Histogram, QueueStats};
use crate::trace;
use crate::units::{PAGE_SIZE, dev_len};
use backlog::Backlog;
use flush::FlushState;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};
use watch::InFlight;

/// Longest device request. IOV_MAX (1024) pages would be 4 MiB: every segment of a chain has at
/// least one page, so a request of at most this never has more segments than the kernel takes.
pub(crate) const IO_BYTES_MAX: u64 = 1 << 20;
const _: () = assert!(IO_BYTES_MAX <= 1024 * (PAGE_SIZE as u64));

/// Requests with a device at once: enough to keep an NVMe drive busy with 128 KiB requests.
pub(crate) const DEPTH_MAX: usize = 32;

/// Lanes of the queue.
pub(crate) const LANES: usize = 3;

/// How many requests of lower lanes may go before the waiting one of a lane, per lane.
const PASSED_OVER_MAX: [u32; LANES] = [u32::MAX, 8, 16];

/// What a read that failed on one copy may still try.
pub(crate) trait ReadFallback: Send + Sync {
    /// Ends the view or starts another transfer for it.
    fn read_failed(&self, view: View, error: BlockError);
}

#[derive(Default)]
struct Inner {
    lanes: [Backlog; LANES],
    passed_over: [u32; LANES],
    in_flight: usize,
    /// Some thread is in `kick` and will look again before it leaves.
    dispatching: bool,
    flush_wanted: bool,
    /// Reused from dispatch to dispatch.
    batch: Vec<DeviceRequest>,
    next_seq: u64,
    ended_seq_max: u64,
    flights: InFlight,
    stats: Counters,
}

#[derive(Default)]
struct Counters {
    read: DirectionStats,
    write: DirectionStats,
    flushes: u64,
    flush_latency_ns: Histogram,
    in_flight_max: usize,
    back_merges: u64,
    front_merges: u64,
    out_of_order: u64,
    piecewise_retries: u64,
    timed_out: u64,
}

/// The queue of one member device.
pub(crate) struct DeviceQueue {
    index: u16,
    device: Arc<dyn BlockDevice>,
    inner: Mutex<Inner>,
    flush: Mutex<FlushState>,
    /// Writes that ended, ever. What a flush must cover.
    written: AtomicU64,
    /// Requests that entered the queue and whose views have not all ended.
    unsettled: AtomicU64,
    /// The device does not answer: requests fail at once. Written under `inner`.
    silent: AtomicBool,
    fallback: OnceLock<Weak<dyn ReadFallback>>,
}

impl DeviceQueue {
    pub(crate) fn new(index: u16, device: Arc<dyn BlockDevice>) -> Arc<DeviceQueue> {
        Arc::new(DeviceQueue {
            index,
            device,
            inner: Mutex::default(),
            flush: Mutex::default(),
            written: AtomicU64::new(0),
            unsettled: AtomicU64::new(0),
            silent: AtomicBool::new(false),
            fallback: OnceLock::new(),
        })
    }

    pub(crate) fn set_fallback(&self, fallback: Weak<dyn ReadFallback>) {
        // Set once, right after construction; a second call would change nothing.
        self.fallback.get_or_init(|| fallback);
    }

    /// Takes requests over, merging them with what waits; `kick` dispatches.
    pub(crate) fn enqueue(&self, requests: impl Iterator<Item = Parts>) {
        let mut inner = self.inner.lock();
        for parts in requests {
            self.unsettled.fetch_add(1, Ordering::Relaxed);
            let lane = usize::from(parts.lane).min(LANES - 1);
            match inner.lanes[lane].add(parts, IO_BYTES_MAX) {
                backlog::Added::Waits => continue,
                backlog::Added::MergedBack => inner.stats.back_merges += 1,
                backlog::Added::MergedFront => inner.stats.front_merges += 1,
            }
            self.unsettled.fetch_sub(1, Ordering::Release);
        }
    }

    /// Gives the device what its depth allows.
    pub(crate) fn kick(self: &Arc<Self>) {
        let mut inner = self.inner.lock();
        if inner.dispatching {
            return;
        }
        inner.dispatching = true;
        let mut batch = std::mem::take(&mut inner.batch);
        loop {
            if self.is_silent() {
                let refused = inner.take_all();
                let flush = std::mem::take(&mut inner.flush_wanted);
                if refused.is_empty() && !flush {
                    inner.batch = batch;
                    inner.dispatching = false;
                    return;
                }
                drop(inner);
                self.refuse(refused, flush);
                inner = self.inner.lock();
                continue;
            }
            let now = Instant::now();
            if std::mem::take(&mut inner.flush_wanted) {
                let parts = inner.begin(Parts::flush(self.index));
                batch.push(inner.flights.launch(parts, now, self));
            }
            while inner.in_flight < DEPTH_MAX {
                let Some(parts) = inner.next() else { break };
                batch.push(inner.flights.launch(parts, now, self));
            }
            if batch.is_empty() {
                inner.batch = batch;
                inner.dispatching = false;
                return;
            }
            drop(inner);
            self.device.submit_batch(&mut batch);
            inner = self.inner.lock();
        }
    }

    /// Waits until nothing is under way; false if that took longer than `timeout`.
    pub(crate) fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.unsettled.load(Ordering::Acquire) > 0 {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Ends the views of a request by the device's word; what failed may get a second chance.
    fn settle(self: &Arc<Self>, mut parts: Parts, result: Result<u64, ErrorKind>) {
        let kind = match result {
            Ok(bytes) if bytes >= parts.len => return parts.chain.end_good(),
            Ok(bytes) => {
                parts.chain.split_to(bytes).end_good();
                parts.offset += bytes;
                parts.len -= bytes;
                ErrorKind::ShortTransfer
            }
            Err(kind) => kind,
        };
        let transfers = matches!(parts.op, Op::Read | Op::Write);
        let is_local = matches!(kind, ErrorKind::Os(_) | ErrorKind::ShortTransfer);
        if transfers && is_local && !parts.is_retry && parts.chain.views() > 1 {
            self.retry_piecewise(parts);
        } else {
            self.fail(parts, kind);
        }
    }

    /// A device reports one error for a whole merged request. Its views go again one by one, so
    /// that only those with bytes in the bad part fail.
    fn retry_piecewise(self: &Arc<Self>, mut parts: Parts) {
        self.inner.lock().stats.piecewise_retries += 1;
        let mut pieces = Vec::with_capacity(parts.chain.views());
        let mut offset = parts.offset;
        while let Some(view) = parts.chain.pop() {
            let piece = Parts::of_view(parts.op, self.index, offset, view);
            offset = piece.end();
            pieces.push(Parts {
                lane: parts.lane,
                is_retry: true,
                ..piece
            });
        }
        self.enqueue(pieces.into_iter());
        self.kick();
    }

    fn fail(&self, mut parts: Parts, kind: ErrorKind) {
        let fallback = self
            .fallback
            .get()
            .filter(|_| parts.op == Op::Read)
            .and_then(Weak::upgrade);
        let mut at = parts.offset;
        while let Some(view) = parts.chain.pop() {
            let error = parts.error(kind, at);
            at += dev_len(view.len);
            match &fallback {
                Some(fallback) if view.leg == Leg::Only => fallback.read_failed(view, error),
                _ => view.end_bad(error),
            }
        }
    }

    pub(crate) fn stats(&self) -> QueueStats {
        let inner = self.inner.lock();
        let counters = &inner.stats;
        let trim = |direction: &DirectionStats| DirectionStats {
            request_bytes: direction.request_bytes.clone().trimmed(),
            kiobufs_per_request: direction.kiobufs_per_request.clone().trimmed(),
            latency_ns: direction.latency_ns.clone().trimmed(),
            ..*direction
        };
        QueueStats {
            index: self.index,
            name: self.device.name().to_owned(),
            backend: self.device.kind(),
            read: trim(&counters.read),
            write: trim(&counters.write),
            flushes: counters.flushes,
            flush_latency_ns: counters.flush_latency_ns.clone().trimmed(),
            in_flight: dev_len(inner.in_flight),
            in_flight_max: dev_len(counters.in_flight_max),
            queued: inner.lanes.iter().map(|lane| dev_len(lane.len())).sum(),
            back_merges: counters.back_merges,
            front_merges: counters.front_merges,
            out_of_order: counters.out_of_order,
            piecewise_retries: counters.piecewise_retries,
            timed_out: counters.timed_out,
            silent: self.is_silent(),
            unanswered: dev_len(inner.flights.unanswered()),
        }
    }
}

impl Inner {
    /// The next request to dispatch, counted as in flight.
    fn next(&mut self) -> Option<Parts> {
        let waiting = |lane: usize| !self.lanes[lane].is_empty();
        let first = (0..LANES).find(|&lane| waiting(lane))?;
        let starved = |lane: usize| self.passed_over[lane] >= PASSED_OVER_MAX[lane];
        let chosen = (first + 1..LANES)
            .rev()
            .find(|&lane| waiting(lane) && starved(lane));
        let chosen = chosen.unwrap_or(first);
        for lane in chosen + 1..LANES {
            if !self.lanes[lane].is_empty() {
                self.passed_over[lane] = self.passed_over[lane].saturating_add(1);
            }
        }
        self.passed_over[chosen] = 0;
        let parts = self.lanes[chosen].pop()?;
        self.in_flight += 1;
        self.stats.in_flight_max = self.stats.in_flight_max.max(self.in_flight);
        Some(self.begin(parts))
    }

    fn begin(&mut self, mut parts: Parts) -> Parts {
        self.next_seq += 1;
        parts.seq = self.next_seq;
        parts
    }

    /// Everything that waits.
    fn take_all(&mut self) -> Vec<Parts> {
        let lanes = self.lanes.iter_mut();
        lanes
            .flat_map(|lane| std::iter::from_fn(|| lane.pop()))
            .collect()
    }

    /// Counts a request that the device ended; true if its slot should be refilled now. Refilling
    /// waits until a quarter of the depth is free, so that submissions go in batches.
    fn ended(&mut self, parts: &Parts, result: Result<u64, ErrorKind>, latency_ns: u64) -> bool {
        if parts.seq < self.ended_seq_max {
            self.stats.out_of_order += 1;
        }
        self.ended_seq_max = self.ended_seq_max.max(parts.seq);
        let direction = match parts.op {
            Op::Read => Some(&mut self.stats.read),
            Op::Write => Some(&mut self.stats.write),
            Op::Flush | Op::Discard => None,
        };
        if let Some(direction) = direction {
            direction.requests += 1;
            direction.bytes += result.unwrap_or(0);
            direction.errors += u64::from(result != Ok(parts.len));
            direction.request_bytes.add(parts.len);
            direction.kiobufs_per_request.add(parts.kiobufs);
            direction.latency_ns.add(latency_ns);
        }
        self.in_flight <= DEPTH_MAX - DEPTH_MAX / 4
            && self.lanes.iter().any(|lane| !lane.is_empty())
    }
}

impl RequestOwner for DeviceQueue {
    fn request_ended(self: Arc<Self>, parts: Parts, result: Result<u64, ErrorKind>, late: bool) {
        let now = Instant::now();
        let elapsed = parts
            .started
            .map_or(Duration::ZERO, |started| now.duration_since(started));
        let latency_ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        trace::done(&parts, result, now);
        if parts.op == Op::Flush {
            let mut inner = self.inner.lock();
            inner.flights.land(parts.slot);
            inner.stats.flushes += 1;
            inner.stats.flush_latency_ns.add(latency_ns);
            self.answered(inner, now);
            return match late {
                true => {}
                false => {
                    let result = result.map(|_| ()).map_err(|kind| parts.error(kind, 0));
                    self.flush_ended(result, true);
                }
            };
        }
        if parts.op == Op::Write {
            // Before the views end, so that whoever saw its write end gets it flushed.
            self.written.fetch_add(1, Ordering::Release);
        }
        if let (Some(discarded), Err(kind)) = (&parts.discarded, result) {
            // Nobody may wait for it any more.
            discarded.send((kind, None)).unwrap_or_default();
        }
        let mut inner = self.inner.lock();
        if !inner.flights.land(parts.slot) {
            inner.in_flight -= 1;
        }
        let refill = inner.ended(&parts, result, latency_ns);
        self.answered(inner, now);
        if refill {
            self.kick();
        }
        if late {
            // Its views were told; what they keep goes now.
            if let Some(in_doubt) = &parts.in_doubt {
                in_doubt.end();
            }
            return drop(parts);
        }
        self.settle(parts, result);
        self.unsettled.fetch_sub(1, Ordering::Release);
    }
}
