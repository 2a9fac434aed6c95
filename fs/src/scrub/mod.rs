//! Scrub: reads and verifies everything on the devices, past the caches, and mends bad copies.
//!
//! One pass looks at labels and chunk tables, then at all metadata (`crate::meta::verify`), then
//! at the data of all files, in order of their extents (`pass`). It runs in a thread of its own,
//! in the background class of the device queues, at most at the rate that was asked for, with a few
//! MiB of memory. Where it is, and what came of it, is a record in the settings (`record`), so a
//! pass that was paused goes on after a remount; metadata is then not looked at again if that part
//! was done.
//!
//! A scrub of an unmounted volume is the same, of a core without a front end.
//!
//! Locks: `inner` is a leaf.

mod pass;
mod paths;
pub(crate) mod record;

pub use record::{ScrubState, ScrubSummary};

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};

use crate::filesystem::FileSystem;
use crate::meta::store::Table;
use crate::{Errno, Ino};

use record::SETTING_SCRUB;

/// Errors that are kept one by one; all are counted, and in the log.
pub const SCRUB_ERRORS_MAX: usize = 1000;

/// How often the record is written while a pass is under way.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// One bad copy, or block.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ScrubError {
    /// The member.
    pub device: String,
    /// Where on it, in bytes.
    pub offset_bytes: u64,
    /// What lies there.
    pub what: String,
    /// It is good again.
    pub repaired: bool,
    /// Data: the inode.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ino: Option<Ino>,
    /// Data: where in the file, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_offset_bytes: Option<u64>,
    /// Data: the names of the file, from the root of the file system.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
}

/// Progress and result, with what was found since the mount.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct ScrubStatus {
    /// The numbers.
    #[serde(flatten)]
    pub summary: ScrubSummary,
    /// The first [`SCRUB_ERRORS_MAX`] of what was found.
    pub errors: Vec<ScrubError>,
    /// Why it could not go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// How a scrub is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubOptions {
    /// Bytes per second to read at the most.
    pub rate_bytes: Option<u64>,
    /// Only look.
    pub no_repair: bool,
    /// Go on with the one that was paused.
    pub resume: bool,
    /// What mounting mended belongs to the result: for a volume that was mounted to be scrubbed.
    pub since_mount: bool,
}

/// What the running pass is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    #[default]
    GoOn,
    Pause,
    Cancel,
}

#[derive(Default)]
struct Inner {
    status: ScrubStatus,
    order: Order,
    /// The pass under way began to work, this time, then; with `active_ms` at that moment.
    since: Option<(Instant, u64)>,
    thread: Option<JoinHandle<()>>,
    /// No more passes: the file system is being unmounted.
    ended: bool,
}

/// The scrub of a mounted file system.
#[derive(Default)]
pub(crate) struct Scrubber {
    inner: Mutex<Inner>,
    changed: Condvar,
}

fn unix_now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

impl Scrubber {
    /// Takes over what the settings say. One that was running was cut off.
    pub(crate) fn load(&self, value: Option<&[u8]>) {
        let mut summary = value.and_then(ScrubSummary::decode).unwrap_or_default();
        if summary.state == ScrubState::Running {
            summary.state = ScrubState::Paused;
        }
        self.inner.lock().status.summary = summary;
    }

    fn update<R>(&self, change: impl FnOnce(&mut ScrubStatus) -> R) -> R {
        let mut inner = self.inner.lock();
        if let Some((since, before)) = inner.since {
            let now = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
            inner.status.summary.active_ms = before.saturating_add(now);
            inner.status.summary.ended_unix = unix_now();
        }
        change(&mut inner.status)
    }

    /// Waits until `until`, or for an order; returns the order.
    fn wait_until(&self, until: Instant) -> Order {
        let mut inner = self.inner.lock();
        while inner.order == Order::GoOn && Instant::now() < until {
            self.changed.wait_until(&mut inner, until);
        }
        inner.order
    }
}

impl FileSystem {
    /// Begins a scrub in the background, or goes on with one that was paused. `BUSY` if one is
    /// under way, `INVAL` if there is none to resume.
    pub fn scrub_start(&self, options: ScrubOptions) -> Result<(), Errno> {
        let me = self.me.upgrade().ok_or(Errno::IO)?;
        let can_write = self.check_may_write().is_ok();
        let mut inner = self.scrubber.inner.lock();
        if inner.ended || inner.status.summary.state == ScrubState::Running {
            return Err(Errno::BUSY);
        }
        if let Some(thread) = inner.thread.take() {
            // It has nothing left to do but to end.
            drop(thread);
        }
        let summary = inner.status.summary;
        if options.resume && summary.state != ScrubState::Paused {
            return Err(Errno::INVAL);
        }
        let mut begun = if options.resume {
            summary
        } else {
            inner.status.errors.clear();
            ScrubSummary {
                started_unix: unix_now(),
                total_bytes: self.scrub_total_bytes(),
                ..ScrubSummary::default()
            }
        };
        begun.state = ScrubState::Running;
        begun.repair = can_write && !options.no_repair;
        if options.rate_bytes.is_some() || !options.resume {
            begun.rate_bytes = options.rate_bytes.unwrap_or(0);
        }
        inner.status.summary = begun;
        inner.status.failure = None;
        inner.order = Order::GoOn;
        inner.since = Some((Instant::now(), begun.active_ms));
        let thread = std::thread::Builder::new()
            .name("braidfs-scrub".into())
            .spawn(move || me.run_scrub(options.since_mount));
        match thread {
            Ok(thread) => inner.thread = Some(thread),
            Err(error) => {
                log::error!("no thread for a scrub: {error}");
                inner.status.summary = summary;
                inner.since = None;
                return Err(Errno::NOMEM);
            }
        }
        Ok(())
    }

    /// Pauses the scrub under way; it can be resumed, also after a remount. Returns when it has
    /// stopped. `INVAL` if none is under way.
    pub fn scrub_pause(&self) -> Result<(), Errno> {
        self.scrub_order(Order::Pause)
    }

    /// Gives up the scrub under way, or the one that was paused. `INVAL` if there is none.
    pub fn scrub_cancel(&self) -> Result<(), Errno> {
        {
            let mut inner = self.scrubber.inner.lock();
            if inner.status.summary.state == ScrubState::Paused {
                inner.status.summary.state = ScrubState::Canceled;
                drop(inner);
                self.save_scrub();
                return Ok(());
            }
        }
        self.scrub_order(Order::Cancel)
    }

    fn scrub_order(&self, order: Order) -> Result<(), Errno> {
        let scrubber = &self.scrubber;
        let mut inner = scrubber.inner.lock();
        if inner.status.summary.state != ScrubState::Running {
            return Err(Errno::INVAL);
        }
        inner.order = order;
        scrubber.changed.notify_all();
        // The pass looks for orders between steps, whose device I/O ends in bounded time.
        while inner.status.summary.state == ScrubState::Running {
            scrubber.changed.wait(&mut inner);
        }
        Ok(())
    }

    /// Progress, or the result of the last one.
    pub fn scrub_status(&self) -> ScrubStatus {
        self.scrubber.update(|status| status.clone())
    }

    /// The same without the list of errors.
    pub fn scrub_summary(&self) -> ScrubSummary {
        self.scrubber.update(|status| status.summary)
    }

    /// Waits until no scrub is under way, but not longer than `patience`; returns whether none is.
    pub fn scrub_wait(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut inner = self.scrubber.inner.lock();
        while inner.status.summary.state == ScrubState::Running {
            if self
                .scrubber
                .changed
                .wait_until(&mut inner, until)
                .timed_out()
            {
                return inner.status.summary.state != ScrubState::Running;
            }
        }
        true
    }

    /// Before an unmount: pauses the scrub under way, and lets none begin.
    pub(crate) fn end_scrubs(&self) {
        self.scrubber.inner.lock().ended = true;
        // None under way is as well.
        let _none = self.scrub_pause();
        let thread = self.scrubber.inner.lock().thread.take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            log::error!("the scrub's thread panicked");
        }
    }

    /// The thread.
    fn run_scrub(self: Arc<Self>, since_mount: bool) {
        let result = self.scrub_pass(since_mount);
        let scrubber = &self.scrubber;
        scrubber.update(|status| {
            let summary = &mut status.summary;
            match &result {
                Ok(Order::GoOn) => {
                    summary.state = ScrubState::Finished;
                    summary.position = (0, 0);
                }
                Ok(Order::Pause) => summary.state = ScrubState::Paused,
                Ok(Order::Cancel) => summary.state = ScrubState::Canceled,
                Err(text) => {
                    log::error!("the scrub cannot go on: {text}");
                    summary.state = ScrubState::Failed;
                    status.failure = Some(text.clone());
                }
            }
            let summary = &status.summary;
            log::info!(
                "scrub {:?}: {} bad copies and blocks found, {} repaired, {} left",
                summary.state,
                summary.found,
                summary.repaired,
                summary.left
            );
        });
        self.save_scrub();
        scrubber.inner.lock().since = None;
        scrubber.changed.notify_all();
    }

    /// Puts the record into the open group, where anything may be put there.
    fn save_scrub(&self) {
        if self.check_may_write().is_err() {
            return;
        }
        let value = self.scrub_summary().encode();
        let _pass = self.gate.enter();
        self.store.put(Table::Settings, SETTING_SCRUB, &value);
    }
}

/// The result of the last scrub of a volume that was assembled and is not mounted.
pub fn last(volume: Arc<braidfs_blockdev::Volume>) -> Result<ScrubSummary, crate::MountError> {
    let options = crate::MountOptions {
        read_only: true,
        cache_bytes: crate::CACHE_BYTES_MIN,
        ..crate::MountOptions::default()
    };
    let fs = FileSystem::start(volume, options, false)?;
    let summary = fs.scrub_summary();
    fs.unmount()?;
    Ok(summary)
}
