//! One thread for work that a completion found but may not do itself, as it may wait.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(crate) struct Helper {
    jobs: Mutex<Jobs>,
    wake: Condvar,
}

#[derive(Default)]
struct Jobs {
    queue: VecDeque<Job>,
    stop: bool,
}

impl Helper {
    /// Runs `job` on the helper thread; on a thread of its own once that has stopped.
    pub fn run(&self, job: Job) {
        let mut jobs = self.jobs.lock();
        if jobs.stop {
            drop(jobs);
            std::thread::spawn(job);
            return;
        }
        jobs.queue.push_back(job);
        self.wake.notify_one();
    }

    /// The thread: until stopped, and then what is still queued.
    pub fn work(&self) {
        loop {
            let mut jobs = self.jobs.lock();
            while jobs.queue.is_empty() && !jobs.stop {
                self.wake.wait(&mut jobs);
            }
            let Some(job) = jobs.queue.pop_front() else {
                return;
            };
            drop(jobs);
            job();
        }
    }

    pub fn stop(&self) {
        self.jobs.lock().stop = true;
        self.wake.notify_all();
    }
}
