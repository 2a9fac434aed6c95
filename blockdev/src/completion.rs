//! Runs completions of one thread after one another instead of inside one another.
//!
//! An `end_io` may submit more I/O, which a device may end before the submission returns, which
//! runs the next `end_io`: without this a chain of synchronous completions would recurse without
//! bound. Here the inner one waits in a per-thread queue until the outer one has returned.

use crate::error::BlockError;
use crate::kiobuf::{Completion, EndIo};

/// Called once when a flush of the volume is over.
pub type FlushDone = Box<dyn FnOnce(Result<(), BlockError>) + Send>;

/// What is left to call.
pub(crate) enum Job {
    Kiobuf(EndIo, Completion),
    Flush(FlushDone, Result<(), BlockError>),
}

impl Job {
    fn call(self) {
        match self {
            Job::Kiobuf(end_io, completion) => end_io(completion),
            Job::Flush(done, result) => done(result),
        }
    }
}

#[cfg(not(loom))]
pub(crate) use per_thread::run;

/// All loom threads share one OS thread, so there a thread local would mix them up.
#[cfg(loom)]
pub(crate) fn run(job: Job) {
    job.call();
}

#[cfg(not(loom))]
mod per_thread {
    use super::Job;
    use std::cell::RefCell;
    use std::collections::VecDeque;

    #[derive(Default)]
    struct Waiting {
        running: bool,
        queue: VecDeque<Job>,
    }

    thread_local! {
        static WAITING: RefCell<Waiting> = RefCell::default();
    }

    fn next() -> Option<Job> {
        WAITING
            .try_with(|cell| cell.borrow_mut().queue.pop_front())
            .ok()
            .flatten()
    }

    /// Marks the thread idle again, and loses no completion even if one of them unwinds.
    struct Running;

    impl Drop for Running {
        fn drop(&mut self) {
            while let Some(job) = next() {
                job.call();
            }
            // An error means that the thread is exiting, and with it goes the flag.
            WAITING
                .try_with(|cell| cell.borrow_mut().running = false)
                .unwrap_or_default();
        }
    }

    pub(crate) fn run(job: Job) {
        let mut job = Some(job);
        let reachable = WAITING.try_with(|cell| {
            let mut waiting = cell.borrow_mut();
            if waiting.running {
                waiting.queue.extend(job.take());
            } else {
                waiting.running = true;
            }
        });
        let Some(job) = job else { return };
        let _running = reachable.is_ok().then_some(Running);
        job.call();
    }
}
