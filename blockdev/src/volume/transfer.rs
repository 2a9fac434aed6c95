//! Transfers of labels and tables: straight to the devices, on all members at once, and waited for.

use crate::chain::Chain;
use crate::device::{BlockDevice, answer_time_of_all, patience};
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::Kiobuf;
use crate::pages::AlignedBuf;
use crate::request::{DeviceRequest, Parts, RequestOwner};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// How often a write of labels or tables that failed is tried again, and the first pause before
/// that; it doubles. A flush that failed is not.
const RETRIES_MAX: u32 = 3;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

pub(super) type Device = Arc<dyn BlockDevice>;
pub(super) type Devices = [Device];

/// One transfer on one member.
pub(super) struct Job {
    pub dev: usize,
    pub op: Op,
    pub offset: u64,
    pub buf: Option<AlignedBuf>,
}

type Outcome = (usize, Result<Option<AlignedBuf>, BlockError>);

/// Tells the end of a flush, which has no kiobuf.
struct FlushWaiter {
    job: usize,
    to: parking_lot::Mutex<Sender<Outcome>>,
}

impl RequestOwner for FlushWaiter {
    fn request_ended(self: Arc<Self>, parts: Parts, result: Result<u64, ErrorKind>, _late: bool) {
        let result = result.map(|_| None).map_err(|kind| parts.error(kind, 0));
        // The receiver may have given up; then nobody wants to know.
        self.to.lock().send((self.job, result)).unwrap_or_default();
    }
}

/// Runs one transfer per member at the same time; results in the order of `jobs`.
pub(super) fn run(
    devices: &Devices,
    jobs: Vec<Job>,
) -> Vec<Result<Option<AlignedBuf>, BlockError>> {
    let (to, from): (Sender<Outcome>, Receiver<Outcome>) = channel();
    let mut results: Vec<_> = jobs
        .iter()
        .map(|job| {
            let dev = u16::try_from(job.dev).unwrap_or(BlockError::NO_DEVICE);
            Err(BlockError {
                kind: ErrorKind::TimedOut,
                op: job.op,
                dev,
                at: job.offset,
            })
        })
        .collect();
    let count = jobs.len();
    for (number, job) in jobs.into_iter().enumerate() {
        let dev = u16::try_from(job.dev).unwrap_or(BlockError::NO_DEVICE);
        let to = to.clone();
        let request = match job.buf {
            Some(buf) => {
                let len = buf.len();
                let end_io = Box::new(move |done: crate::kiobuf::Completion| {
                    let result = match (done.error, done.pages.map(AlignedBuf::from_pages)) {
                        (None, Some(Ok(buf))) => Ok(Some(buf)),
                        (None, _) => Ok(None),
                        (Some(error), _) => Err(error),
                    };
                    to.send((number, result)).unwrap_or_default();
                });
                let chain = Chain::from(Kiobuf::new(Box::new(buf), 0, len, end_io));
                DeviceRequest::with_owner(Parts::new(job.op, dev, job.offset, chain), None)
            }
            None => {
                let to = parking_lot::Mutex::new(to);
                let owner: Arc<dyn RequestOwner> = Arc::new(FlushWaiter { job: number, to });
                DeviceRequest::with_owner(Parts::new(job.op, dev, 0, Chain::new()), Some(owner))
            }
        };
        devices[job.dev].submit(request);
    }
    // Requests go to a device at the same time here, so one time to answer is for all of them.
    // Those that it does not answer keep their memory until it does.
    let deadline = Instant::now() + patience(answer_time_of_all(devices), 1);
    for _ in 0..count {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((number, result)) = from.recv_timeout(left) else {
            break;
        };
        results[number] = result;
    }
    results
}

fn all_good(results: Vec<Result<Option<AlignedBuf>, BlockError>>) -> Result<(), BlockError> {
    results
        .into_iter()
        .try_for_each(|result| result.map(|_| ()))
}

pub(super) fn flush_all(devices: &Devices) -> Result<(), BlockError> {
    let job = |dev| Job {
        dev,
        op: Op::Flush,
        offset: 0,
        buf: None,
    };
    all_good(run(devices, (0..devices.len()).map(job).collect()))
}

pub(super) fn write_all(
    devices: &Devices,
    jobs: Vec<(usize, u64, AlignedBuf)>,
) -> Result<(), BlockError> {
    let job = |(dev, offset, buf): &(usize, u64, AlignedBuf)| Job {
        dev: *dev,
        op: Op::Write,
        offset: *offset,
        buf: Some(AlignedBuf::from_slice(buf)),
    };
    let mut pause = RETRY_PAUSE;
    for _ in 0..RETRIES_MAX {
        let Err(error) = all_good(run(devices, jobs.iter().map(job).collect())) else {
            return Ok(());
        };
        // One that was not answered may still be carried out: it must stay the last.
        if !error.may_pass() {
            return Err(error);
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
    all_good(run(devices, jobs.iter().map(job).collect()))
}
