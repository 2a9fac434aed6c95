//! Threads for requests that wait for the devices (fsync, large copies), so that they never keep
//! the few threads that read requests from the kernel away from them.
//!
//! Threads start on demand and end after a while without work. Many waiting fsyncs are wanted: the
//! core makes one commit of them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use braidfs_blockdev::trace;
use parking_lot::{Condvar, Mutex};

/// Enough fsyncs to share a commit well; each costs a mostly untouched stack.
const THREADS_MAX: usize = 32;

/// How long a thread waits for the next job before it ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// A bounded, elastic pool.
#[derive(Clone, Default)]
pub(super) struct Blocking {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

impl Blocking {
    /// Runs a job soon, on another thread where one can be had; for the same request as now.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let context = trace::current();
        let job = move || {
            let _in = trace::enter(context);
            job();
        };
        let mut state = self.shared.state.lock();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() || state.threads >= THREADS_MAX {
            drop(state);
            self.shared.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(&self.shared);
        let spawned = thread::Builder::new()
            .name("braidfs-wait".into())
            .spawn(move || shared.serve());
        if spawned.is_err() {
            self.shared.lost_thread();
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let timed_out = self.work.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if timed_out && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// No thread could be started: the caller's thread does the work if nobody else can.
    fn lost_thread(&self) {
        let mut state = self.state.lock();
        state.threads -= 1;
        if state.threads > 0 {
            return;
        }
        while let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = self.state.lock();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn jobs_that_wait_for_each_other_all_run() {
        let pool = Blocking::default();
        let barrier = Arc::new(std::sync::Barrier::new(THREADS_MAX));
        let (sender, receiver) = mpsc::channel();
        for _ in 0..THREADS_MAX {
            let (barrier, sender) = (Arc::clone(&barrier), sender.clone());
            pool.run(move || {
                barrier.wait();
                sender.send(()).unwrap();
            });
        }
        for _ in 0..THREADS_MAX {
            receiver.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    }

    #[test]
    fn more_jobs_than_threads_all_run() {
        let pool = Blocking::default();
        let (sender, receiver) = mpsc::channel();
        for _ in 0..10 * THREADS_MAX {
            let sender = sender.clone();
            pool.run(move || sender.send(()).unwrap());
        }
        for _ in 0..10 * THREADS_MAX {
            receiver.recv_timeout(Duration::from_secs(30)).unwrap();
        }
    }
}
