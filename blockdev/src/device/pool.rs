//! The thread-pool backend: preadv/pwritev where io_uring is not to be had.
//!
//! Threads start as requests come, up to [`THREADS_MAX`], and take requests from one list. `Drop`
//! lets them finish what was submitted, so no request is lost.

use super::BlockDevice;
use super::file::DeviceFile;
use super::gate::Gate;
use super::open::OpenError;
use crate::error::ErrorKind;
use crate::request::DeviceRequest;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Threads per device: enough for a disk's own queue to have something to sort, few enough not to
/// crowd the machine.
const THREADS_MAX: usize = 8;

#[derive(Default)]
struct Work {
    requests: VecDeque<DeviceRequest>,
    idle: usize,
    threads: usize,
    stop: bool,
}

struct Shared {
    file: DeviceFile,
    work: Mutex<Work>,
    wake: Condvar,
}

/// A file or block device served by threads.
pub(super) struct PoolDevice {
    /// Dropped by hand before the wait for the threads; `None` only then.
    shared: Option<Arc<Shared>>,
    gate: Arc<Gate>,
}

impl PoolDevice {
    pub(super) fn new(file: DeviceFile) -> PoolDevice {
        let shared = Shared {
            file,
            work: Mutex::default(),
            wake: Condvar::new(),
        };
        PoolDevice {
            shared: Some(Arc::new(shared)),
            gate: Arc::default(),
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        self.shared.as_ref().expect("only drop takes it")
    }

    /// Starts a thread if none is idle; false if there is none at all.
    fn staff(&self, work: &mut Work) -> bool {
        if work.idle >= work.requests.len() || work.threads >= THREADS_MAX {
            return true;
        }
        let (shared, mut inside) = (self.shared().clone(), self.gate.enter());
        let serve = move || {
            inside.adopt();
            shared.serve();
            drop(shared);
            drop(inside);
        };
        let name = format!("braid-io-{}", work.threads);
        match std::thread::Builder::new().name(name).spawn(serve) {
            Ok(_detached) => work.threads += 1,
            Err(error) => log::warn!("{}: no I/O thread: {error}", self.name()),
        }
        work.threads > 0
    }
}

impl Shared {
    fn serve(&self) {
        let mut iovecs = Vec::new();
        let mut work = self.work.lock();
        loop {
            if let Some(request) = work.requests.pop_front() {
                drop(work);
                let result = self.file.transfer(&request, &mut iovecs);
                request.end(result);
                work = self.work.lock();
            } else if work.stop {
                work.threads -= 1;
                return;
            } else {
                work.idle += 1;
                self.wake.wait(&mut work);
                work.idle -= 1;
            }
        }
    }
}

impl BlockDevice for PoolDevice {
    fn name(&self) -> &str {
        &self.shared().file.name
    }

    fn size_bytes(&self) -> u64 {
        self.shared().file.size_bytes
    }

    fn kind(&self) -> &'static str {
        if self.shared().file.direct {
            "threads+O_DIRECT"
        } else {
            "threads"
        }
    }

    fn answer_time_max(&self) -> Duration {
        self.shared().file.answer_time_max
    }

    fn make_writable(&self) -> Result<(), OpenError> {
        self.shared().file.make_writable()
    }

    fn submit(&self, request: DeviceRequest) {
        self.submit_batch(&mut vec![request]);
    }

    fn submit_batch(&self, requests: &mut Vec<DeviceRequest>) {
        let mut work = self.shared().work.lock();
        let mut orphans = Vec::new();
        for request in requests.drain(..) {
            work.requests.push_back(request);
            if self.staff(&mut work) {
                self.shared().wake.notify_one();
            } else {
                orphans.extend(work.requests.drain(..));
            }
        }
        drop(work);
        for request in orphans {
            request.end(Err(ErrorKind::Os(libc::EAGAIN)));
        }
    }
}

impl Drop for PoolDevice {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else {
            return;
        };
        shared.work.lock().stop = true;
        shared.wake.notify_all();
        let name = shared.file.name.clone();
        drop(shared);
        self.gate.wait_empty(&name);
    }
}
