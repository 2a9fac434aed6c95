//! Devices that do not answer: the table of requests in flight, and the watchdog that looks at it.
//!
//! A request that its device has not ended in time is given up: its kiobufs end as timed out, its
//! memory stays with the device ([`crate::request::Flight`]), and the request no longer counts
//! against the depth of the queue. If the device has answered nothing for half of that time, it is
//! *silent*: whatever waits for it, and whatever comes, fails at once, and reads of mirrored blocks
//! go to the other copy. Small reads probe it meanwhile. Any answer, to the probe or to a
//! request that was given up, ends the silence.
//!
//! One thread per volume looks a few times per timeout; nothing is set up per request but the
//! time of its dispatch. Time in which the process did not run (stopped, frozen, starved), as the
//! thread sees by its own pauses, does not count.

use super::{DeviceQueue, Inner};
use crate::chain::Chain;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::Kiobuf;
use crate::pages::AlignedBuf;
use crate::request::{DeviceRequest, Flight, Parts, RequestOwner};
use crate::sync::Arc as FlightArc;
use crate::trace;
use crate::units::{BLOCK_SIZE, dev_len, mem_len};
use parking_lot::MutexGuard;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The watchdog looks so many times per timeout, but between these.
const LOOKS: u32 = 8;
const LOOK_MIN: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_secs(1);
/// A pause that took so many times as long as asked for was none of the watchdog's.
const OVERSLEPT: u32 = 2;
/// Probes that a device may have at once.
const PROBES_MAX: u32 = 6;

/// One place of the table.
struct Slot {
    flight: FlightArc<Flight>,
    /// Number, operation and time of dispatch of the request that is here now.
    seq: u64,
    op: Op,
    started: Option<Instant>,
    given_up: bool,
}

/// Requests that the device has.
pub(super) struct InFlight {
    slots: Vec<Slot>,
    free: Vec<usize>,
    given_up: usize,
    /// When the device last ended anything.
    last_answer: Instant,
    silent_since: Option<Instant>,
    /// Probes that the device has, and when the last one was sent.
    probes: u32,
    probed: Option<Instant>,
}

impl Default for InFlight {
    fn default() -> Self {
        InFlight {
            slots: Vec::new(),
            free: Vec::new(),
            given_up: 0,
            last_answer: Instant::now(),
            silent_since: None,
            probes: 0,
            probed: None,
        }
    }
}

impl InFlight {
    /// Puts a request into the table and makes what the device gets.
    pub(super) fn launch(
        &mut self,
        mut parts: Parts,
        now: Instant,
        owner: &Arc<DeviceQueue>,
    ) -> DeviceRequest {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                flight: FlightArc::default(),
                seq: 0,
                op: Op::Flush,
                started: None,
                given_up: false,
            });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        (slot.seq, slot.op, slot.started) = (parts.seq, parts.op, Some(now));
        (parts.slot, parts.started) = (index, Some(now));
        parts.kiobufs = dev_len(parts.chain.kiobufs());
        parts.is_traced = trace::dispatched(&parts, now);
        let owner = Some(owner.clone() as Arc<dyn RequestOwner>);
        DeviceRequest::in_flight(parts, slot.flight.clone(), owner)
    }

    /// The device ended the request in that slot; true if it had been given up.
    pub(super) fn land(&mut self, index: usize) -> bool {
        let slot = &mut self.slots[index];
        slot.started = None;
        self.free.push(index);
        let given_up = std::mem::take(&mut slot.given_up);
        self.given_up -= usize::from(given_up);
        given_up
    }

    /// The watchdog itself did not run for so long, nor perhaps did those who take answers: that
    /// time is not the device's.
    fn excuse(&mut self, lost: Duration, now: Instant) {
        let later = |time: Instant| (time + lost).min(now);
        for started in self
            .slots
            .iter_mut()
            .filter_map(|slot| slot.started.as_mut())
        {
            *started = later(*started);
        }
        self.last_answer = later(self.last_answer);
    }

    /// Whether to send a probe now. One that got lost is followed by another, after a pause that
    /// doubles.
    fn wants_probe(&mut self, now: Instant, timeout: Duration) -> bool {
        let pause = timeout * (1 << self.probes.min(PROBES_MAX));
        let is_due = |probed: Instant| now.duration_since(probed) >= pause;
        let wanted = self.silent_since.is_some()
            && self.probes < PROBES_MAX
            && (self.probes == 0 || self.probed.is_none_or(is_due));
        if wanted {
            self.probes += 1;
            self.probed = Some(now);
        }
        wanted
    }

    pub(super) fn unanswered(&self) -> usize {
        self.given_up
    }
}

impl DeviceQueue {
    /// Whether the device does not answer at the moment.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Acquire)
    }

    pub(super) fn not_answered(&self, op: Op, at: u64) -> BlockError {
        BlockError {
            kind: ErrorKind::TimedOut,
            op,
            dev: self.index,
            at,
        }
    }

    /// The device ended something.
    pub(super) fn answered(&self, mut inner: MutexGuard<'_, Inner>, now: Instant) {
        inner.flights.last_answer = now;
        let Some(since) = inner.flights.silent_since.take() else {
            return;
        };
        self.silent.store(false, Ordering::Release);
        drop(inner);
        let secs = now.duration_since(since).as_secs_f64();
        log::warn!("{}: answers again after {secs:.1} s", self.device.name());
    }

    /// Fails requests that were never given to the device.
    pub(super) fn refuse(self: &Arc<Self>, requests: Vec<Parts>, flush: bool) {
        for parts in requests {
            if let Some(discarded) = &parts.discarded {
                // Nobody may wait for it any more.
                discarded
                    .send((ErrorKind::TimedOut, None))
                    .unwrap_or_default();
            }
            self.fail(parts, ErrorKind::TimedOut);
            self.unsettled.fetch_sub(1, Ordering::Release);
        }
        if flush {
            self.flush_ended(Err(self.not_answered(Op::Flush, 0)), false);
        }
    }

    /// One look of the watchdog, which has just lost so much time: gives up what is too old.
    fn look(self: &Arc<Self>, timeout: Duration, lost: Duration) {
        let now = Instant::now();
        let mut late = Vec::new();
        let mut inner = self.inner.lock();
        if !lost.is_zero() {
            inner.flights.excuse(lost, now);
        }
        let Inner {
            flights,
            in_flight,
            stats,
            ..
        } = &mut *inner;
        for slot in &mut flights.slots {
            let is_late = |started: Instant| now.duration_since(started) >= timeout;
            if slot.given_up || !slot.started.is_some_and(is_late) {
                continue;
            }
            slot.given_up = true;
            late.push((slot.flight.clone(), slot.seq, slot.op));
        }
        flights.given_up += late.len();
        *in_flight -= late.iter().filter(|late| late.2 != Op::Flush).count();
        stats.timed_out += dev_len(late.len());
        let quiet = now.duration_since(flights.last_answer) >= timeout / 2;
        let turns_silent = !late.is_empty() && quiet && flights.silent_since.is_none();
        if turns_silent {
            flights.silent_since = Some(now);
            self.silent.store(true, Ordering::Release);
        }
        let probe = flights.wants_probe(now, timeout);
        drop(inner);
        if turns_silent {
            log::error!(
                "{}: has not answered {} requests within {timeout:?}; requests to it fail until \
                 it answers again",
                self.device.name(),
                late.len()
            );
        }
        let changed = !late.is_empty() || self.is_silent();
        for (flight, seq, op) in late {
            if flight.time_out(seq) {
                self.given_up(op);
            }
        }
        if probe {
            self.probe();
        }
        if changed {
            self.kick();
        }
    }

    fn given_up(self: &Arc<Self>, op: Op) {
        if op == Op::Flush {
            self.flush_ended(Err(self.not_answered(op, 0)), true);
        } else {
            self.unsettled.fetch_sub(1, Ordering::Release);
        }
    }

    /// Asks the device for one block of no interest.
    fn probe(self: &Arc<Self>) {
        let buf = Box::new(AlignedBuf::zeroed(mem_len(BLOCK_SIZE)));
        let kiobuf = Kiobuf::new(buf, 0, mem_len(BLOCK_SIZE), Box::new(drop));
        let parts = Parts::new(Op::Read, self.index, 0, Chain::from(kiobuf));
        let owner: Arc<dyn RequestOwner> = Arc::new(Probe(Arc::downgrade(self)));
        self.device
            .submit(DeviceRequest::with_owner(parts, Some(owner)));
    }
}

/// Hears of a probe's end: good or bad, it is an answer.
struct Probe(Weak<DeviceQueue>);

impl RequestOwner for Probe {
    fn request_ended(self: Arc<Self>, parts: Parts, _: Result<u64, ErrorKind>, _late: bool) {
        drop(parts);
        if let Some(queue) = self.0.upgrade() {
            let mut inner = queue.inner.lock();
            inner.flights.probes = inner.flights.probes.saturating_sub(1);
            queue.answered(inner, Instant::now());
        }
    }
}

/// The thread that looks at the queues of a volume; it ends when this is dropped.
pub(crate) struct Watchdog {
    /// Dropped by hand before the wait for the thread.
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches the queues whose devices have a time to answer in; `None` if there is none.
    pub(crate) fn start(queues: &[Arc<DeviceQueue>]) -> Option<Watchdog> {
        let timeout = |queue: &Arc<DeviceQueue>| queue.device.answer_time_max();
        let watched = queues
            .iter()
            .filter(|queue| !timeout(queue).is_zero())
            .map(|queue| (timeout(queue), Arc::downgrade(queue)))
            .collect::<Vec<_>>();
        let shortest = watched.iter().map(|watched| watched.0).min()?;
        let pause = (shortest / LOOKS).clamp(LOOK_MIN, LOOK_MAX);
        let (stop, stopped) = sync_channel(0);
        let run = move || {
            let mut slept = Instant::now();
            while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                // Much later than asked for: the process was stopped, or had no processor.
                let elapsed = slept.elapsed();
                let lost = match elapsed > pause * OVERSLEPT {
                    true => elapsed - pause,
                    false => Duration::ZERO,
                };
                for (timeout, queue) in &watched {
                    if let Some(queue) = queue.upgrade() {
                        queue.look(*timeout, lost);
                    }
                }
                slept = Instant::now();
            }
        };
        let spawned = std::thread::Builder::new()
            .name("braid-watchdog".into())
            .spawn(run);
        match spawned {
            Ok(thread) => Some(Watchdog {
                stop: Some(stop),
                thread: Some(thread),
            }),
            Err(error) => {
                log::warn!("no thread to watch the devices, so none of them times out: {error}");
                None
            }
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        // An `end_io` that the watchdog runs may drop the last handle of its volume.
        let own = std::thread::current().id();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != own
            && thread.join().is_err()
        {
            log::error!("the thread that watches the devices panicked");
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn lost_time_does_not_count() {
        let begun = Instant::now();
        let now = begun + Duration::from_secs(60);
        let mut flights = InFlight::default();
        for started in [Some(begun), Some(now - Duration::from_secs(1)), None] {
            flights.slots.push(Slot {
                flight: FlightArc::default(),
                seq: 0,
                op: Op::Read,
                started,
                given_up: false,
            });
        }
        flights.last_answer = begun;
        flights.excuse(Duration::from_secs(58), now);
        let age = |time: Instant| now.duration_since(time).as_secs();
        let ages = flights.slots.iter().map(|slot| slot.started.map(age));
        assert_eq!(ages.collect::<Vec<_>>(), [Some(2), Some(0), None]);
        assert_eq!(age(flights.last_answer), 2);
    }
}
