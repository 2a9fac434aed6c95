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

/// How long closing a device waits for requests that it has not ended.
const CLOSE_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// A device that takes requests and ends each exactly once.
pub trait BlockDevice: Send + Sync {
    /// What a message calls it: the path it was opened by.
    fn name(&self) -> &str;

    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// How it does I/O, for people: "io_uring+O_DIRECT", "threads", "sim".
    fn kind(&self) -> &'static str;

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
    /// memory
    /// stays mapped, and the same pages (no `MADV_DONTNEED` or the like), as long as the device is
    /// open: the kernel pins the pages, piece by piece as they are first used.
    fn register_memory(&self, _arena: PageRun) {}
}
