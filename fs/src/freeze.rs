//! Freezing: everything is durable, and nothing changes until the thaw; for backups and snapshots
//! of the devices. Reading goes on.
//!
//! A freeze holds back what is to come (whoever asks [`FileSystem::check_writable`] waits, and a
//! front end may leave whole requests here, see [`FileSystem::leave_until_thaw`]), commits, and
//! then keeps the gate of the transaction groups closed. It ends by a thaw, by its time limit, and
//! by the end of the mount, so that nobody waits for ever.
//!
//! The committing thread and the closing of the gate exclude each other by `committing`: while the
//! gate is closed for good, there is nothing to commit, and those who ask for a commit have it.
//!
//! Locks: `committing`, then the gate, then `state`. Jobs are run with no lock held.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::Errno;
use crate::filesystem::FileSystem;

/// Memory that requests left until the thaw may take, in bytes: those of some hundred writers.
const LEFT_BYTES_MAX: usize = 64 << 20;

/// Tries to get everything durable, while operations that began before end.
const TRIES_MAX: u32 = 8;

/// What is done at the thaw.
pub type ThawJob = Box<dyn FnOnce() + Send>;

/// Why a file system was not frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FreezeError {
    /// Somebody did that before.
    #[error("it is frozen already")]
    Already,
    /// Not everything can be made durable.
    #[error("not everything could be made durable: {0}")]
    Unwritten(Errno),
    /// Thawed, or unmounted, before it was done.
    #[error("it was thawed or unmounted meanwhile")]
    Thawed,
    /// No thread for the time limit could be had.
    #[error("the system has no thread for its time limit")]
    NoThread,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Open,
    /// Changes wait, and what was done before is being committed.
    Freezing,
    /// The gate is closed.
    Frozen,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// Which freeze it is, so that an old time limit does not end a new one.
    round: u64,
    until: Option<Instant>,
    left: Vec<ThawJob>,
    left_bytes: usize,
}

/// The state of freezing.
#[derive(Default)]
pub(crate) struct Freezer {
    /// Whether changes wait: a copy of `state`, to look at without its lock.
    holds: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    committing: Mutex<()>,
}

impl Freezer {
    /// Whether changes are to wait.
    pub(crate) fn holds(&self) -> bool {
        self.holds.load(Ordering::Relaxed)
    }

    /// Waits for the thaw, if it is frozen.
    pub(crate) fn wait_open(&self) {
        if self.holds() {
            let mut state = self.state.lock();
            while state.phase != Phase::Open {
                self.changed.wait(&mut state);
            }
        }
    }

    /// The right to commit; none while everything is durable and stays so.
    pub(crate) fn begin_commit(&self) -> Option<MutexGuard<'_, ()>> {
        let guard = self.committing.lock();
        (self.state.lock().phase != Phase::Frozen).then_some(guard)
    }
}

impl FileSystem {
    /// Makes everything durable and holds back all changes until [`FileSystem::thaw`], but not for
    /// longer than `limit`. On an error nothing is held back.
    pub fn freeze(&self, limit: Duration) -> Result<(), FreezeError> {
        let round = {
            let mut state = self.freezer.state.lock();
            if state.phase != Phase::Open {
                return Err(FreezeError::Already);
            }
            state.phase = Phase::Freezing;
            state.round += 1;
            self.freezer.holds.store(true, Ordering::SeqCst);
            state.round
        };
        let until = Instant::now() + limit;
        let frozen = self
            .close_for_good(round, until)
            .and_then(|()| self.watch_limit(round, until));
        if frozen.is_err() {
            self.end_freeze(Some(round), true);
        }
        frozen
    }

    fn close_for_good(&self, round: u64, until: Instant) -> Result<(), FreezeError> {
        for _ in 0..TRIES_MAX {
            self.sync().map_err(FreezeError::Unwritten)?;
            let _no_commit = self.freezer.committing.lock();
            self.gate.close();
            let is_changed = !self.is_read_only() && self.is_changed();
            let mut state = self.freezer.state.lock();
            if state.phase != Phase::Freezing || state.round != round {
                drop(state);
                self.gate.open();
                return Err(FreezeError::Thawed);
            }
            if !is_changed {
                state.phase = Phase::Frozen;
                state.until = Some(until);
                return Ok(());
            }
            drop(state);
            self.gate.open();
        }
        Err(FreezeError::Unwritten(Errno::BUSY))
    }

    /// Starts the thread that thaws when the time is over.
    fn watch_limit(&self, round: u64, until: Instant) -> Result<(), FreezeError> {
        let (freezer, me) = (Arc::clone(&self.freezer), Weak::clone(&self.me));
        let watch = move || {
            let mut state = freezer.state.lock();
            while state.phase == Phase::Frozen && state.round == round {
                if freezer.changed.wait_until(&mut state, until).timed_out() {
                    drop(state);
                    if let Some(fs) = me.upgrade()
                        && fs.end_freeze(Some(round), true)
                    {
                        log::warn!("frozen for as long as was allowed, and thawed now");
                    }
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("braidfs-thaw".into());
        let spawned = thread.spawn(watch).map(drop);
        spawned.map_err(|_| FreezeError::NoThread)
    }

    /// Lets changes in again; false if it was not frozen. What was left for it is begun.
    pub fn thaw(&self) -> bool {
        self.end_freeze(None, true)
    }

    /// The same when nobody waits any more for what was left: the mount is ending.
    pub fn thaw_at_end(&self) -> bool {
        self.end_freeze(None, false)
    }

    fn end_freeze(&self, round: Option<u64>, run: bool) -> bool {
        let mut state = self.freezer.state.lock();
        let other = round.is_some_and(|round| round != state.round);
        if state.phase == Phase::Open || other {
            return false;
        }
        let was_closed = state.phase == Phase::Frozen;
        state.phase = Phase::Open;
        state.until = None;
        state.left_bytes = 0;
        let jobs = std::mem::take(&mut state.left);
        self.freezer.holds.store(false, Ordering::SeqCst);
        drop(state);
        if was_closed {
            self.gate.open();
        }
        self.freezer.changed.notify_all();
        for job in jobs.into_iter().filter(|_| run) {
            job();
        }
        true
    }

    /// How long it is going to stay frozen; `None` if it is not.
    pub fn frozen_for(&self) -> Option<Duration> {
        let state = self.freezer.state.lock();
        let until = state.until.filter(|_| state.phase == Phase::Frozen)?;
        Some(until.saturating_duration_since(Instant::now()))
    }

    /// For a front end, with a request that would change something: while changes wait, `job` is
    /// made and kept for the thaw. False if they do not wait, or if there is no room for its
    /// `bytes` of memory: then the request is to be begun, which waits by itself. `job` must not
    /// call the file system before it is run.
    pub fn leave_until_thaw(&self, bytes: usize, job: impl FnOnce() -> ThawJob) -> bool {
        if !self.freezer.holds() {
            return false;
        }
        let mut state = self.freezer.state.lock();
        if state.phase == Phase::Open || state.left_bytes.saturating_add(bytes) > LEFT_BYTES_MAX {
            return false;
        }
        state.left_bytes += bytes;
        state.left.push(job());
        true
    }
}
