//! `BlockDevice`: the one seam between the queues and what stores bytes, and its backends.

mod bytes;
mod file;
mod gate;
#[cfg(not(loom))]
mod mailbox;
/// Public only for the loom tests.
#[cfg(loom)]
#[doc(hidden)]
pub mod mailbox;
pub mod open;
mod pool;
pub mod sim;
mod uring;

use crate::pages::PageRun;
use crate::request::DeviceRequest;
use open::OpenError;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

/// How long closing a device waits for requests that it has not ended.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(10);

/// How long to wait for something that is to end `requests` requests one after another on devices
/// with this time to answer: with room for the queue before them, and no end where there is none.
pub(crate) fn patience(answer_time_max: Duration, requests: u32) -> Duration {
    const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
    match answer_time_max.is_zero() {
        true => FOREVER,
        false => answer_time_max * requests + Duration::from_secs(1),
    }
}

/// The longest time to answer of several devices; zero if one of them has no limit.
pub(crate) fn answer_time_of_all(devices: &[Arc<dyn BlockDevice>]) -> Duration {
    let times = || devices.iter().map(|device| device.answer_time_max());
    match times().any(|time| time.is_zero()) {
        true => Duration::ZERO,
        false => times().max().unwrap_or_default(),
    }
}

/// A device that takes requests and ends each exactly once.
pub trait BlockDevice: Send + Sync {
    /// What a message calls it: the path it was opened by.
    fn name(&self) -> &str;

    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// How it does I/O, for people: "io_uring+O_DIRECT", "threads", "sim".
    fn kind(&self) -> &'static str;

    /// How long it may take to end a request; zero: as long as it likes. After that its users give
    /// a request up, which the device still ends when it can.
    fn answer_time_max(&self) -> Duration {
        Duration::ZERO
    }

    /// Takes ownership; ends the request exactly once, from any thread, possibly before returning.
    fn submit(&self, request: DeviceRequest);

    /// Submits several at once; leaves `requests` empty, with its allocation, for reuse.
    fn submit_batch(&self, requests: &mut Vec<DeviceRequest>) {
        for request in requests.drain(..) {
            self.submit(request);
        }
    }

    /// For a device that was opened to read, for now: takes it for ourselves, so that it may be
    /// written. If that fails, it can be read as before.
    fn make_writable(&self) -> Result<(), OpenError> {
        Ok(())
    }

    /// Memory that most requests will use (fixed buffers). Best effort, once, before I/O. The
    /// memory stays mapped as long as the device is open, and the same pages (no `MADV_DONTNEED` or
    /// the like) until [`BlockDevice::forget_memory`] is done: the kernel pins the pages, piece by
    /// piece as they are first used.
    fn register_memory(&self, _arena: PageRun) {}

    /// Does without registered memory from now on, and says so on `done`, or drops it, once nothing
    /// is pinned any more.
    fn forget_memory(&self, _done: Sender<()>) {}
}
