//! Commits: when, in which order, and who waits for them.
//!
//! Who waits for a commit does it himself, unless one is under way; a thread does those that nobody
//! waits for. A whole commit
//! 1. writes back what is dirty while operations go on,
//! 2. closes the gate and writes back the rest, so that the data of every operation so far is on
//!    the devices and mapped,
//! 3. encodes the dirty inodes and freezes the group: a prefix of the history,
//! 4. opens the gate,
//! 5. applies the group, and those in the journal, to redb and commits it. redb syncs before it
//!    moves its root, and that sync flushes the devices, so data is durable before anything points
//!    to it,
//! 6. waits for those who still read blocks that these groups freed, and hands these out again.
//!
//! For fsync a group only has to be durable: if it is small it goes into the journal instead (see
//! [`crate::meta::journal`]), with one flush. The blocks that it freed wait for the next whole
//! commit, since until then a damaged journal would bring their owners back.
//!
//! Those who wait (fsync, ENOSPC, unmount) share a commit: each needs one whose gate closed after
//! its call. A commit that fails leaves the durable state as it was and turns the file system
//! read-only; the waiters get EIO. If only writing the journal fails, a whole commit follows.
//!
//! While a device does not answer no commit is begun, since it would fail: who waits for one gets
//! EIO, and the changes stay in memory until the device answers again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use braidfs_blockdev::trace;
use braidfs_cache::SpaceClass;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::Errno;
use crate::alloc::SpaceLog;
use crate::filesystem::FileSystem;

/// Step 1 is repeated while more than this is dirty, to keep step 2 short.
const REST_BYTES: u64 = 16 << 20;

/// How often step 1 is repeated at the most.
const PREPARE_ROUNDS_MAX: usize = 3;

/// An open group larger than this is committed before its time.
pub(crate) const GROUP_BYTES_MAX: usize = 32 << 20;

/// How often inodes that nothing holds are let go of: it looks at all that are in memory.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Default)]
struct State {
    /// Commits whose gate has been closed (counted just before).
    closed: u64,
    /// Commits that ended, well or not.
    ended: u64,
    /// The last of them that ended well.
    good: u64,
    /// Somebody wants a whole commit beyond this count of `closed`.
    wanted_whole: u64,
    /// Somebody commits.
    is_busy: bool,
    /// A device that did not answer when a commit was due, so that it is told once.
    silent: Option<u16>,
    stop: bool,
}

/// Counters of the transaction groups.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct TxgStats {
    /// Commits so far, into the journal and whole.
    pub commits: u64,
    /// Those that went into the journal.
    pub journaled: u64,
    /// Commits that failed.
    pub failures: u64,
    /// Commits that were not begun because a device did not answer.
    pub refusals: u64,
    /// Callers that waited for a commit (fsync and the like); shared ones count each.
    pub waiters: u64,
    /// Time from the start of a commit to its end: sum over all commits, microseconds.
    pub commit_us_total: u64,
    /// The longest commit, microseconds.
    pub commit_us_max: u64,
    /// The last commit, microseconds.
    pub commit_us_last: u64,
    /// Time in which operations had to wait at the gate: sum, microseconds.
    pub gate_us_total: u64,
    /// The longest such time, microseconds.
    pub gate_us_max: u64,
    /// Memory of the group that the last commit wrote, in bytes.
    pub group_bytes_last: u64,
}

/// The state of committing.
#[derive(Default)]
pub(crate) struct Committer {
    state: Mutex<State>,
    /// A commit has ended.
    ended: Condvar,
    /// The committing thread has something to do.
    nudged: Condvar,
    /// Number of the open group, from 1.
    open_group: AtomicU64,
    /// Number of the last durable group.
    durable_group: AtomicU64,
    /// What the groups in the journal did to the free space.
    journaled: Mutex<SpaceLog>,
    stats: Mutex<TxgStats>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Committer {
    /// Number of the group that changes now go into.
    pub(crate) fn open_group(&self) -> u64 {
        self.open_group.load(Ordering::SeqCst) + 1
    }

    /// Whether group `number` is durable.
    pub(crate) fn is_durable(&self, number: u64) -> bool {
        self.durable_group.load(Ordering::SeqCst) >= number
    }

    pub(crate) fn stats(&self) -> TxgStats {
        *self.stats.lock()
    }

    pub(crate) fn keep_threads(&self, threads: [JoinHandle<()>; 2]) {
        self.threads.lock().extend(threads);
    }

    /// Ends committing, without a last commit, and waits for all threads.
    pub(crate) fn stop(&self) {
        let mut state = self.state.lock();
        state.stop = true;
        self.nudged.notify_all();
        self.ended.notify_all();
        while state.is_busy {
            self.ended.wait(&mut state);
        }
        drop(state);
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // A thread may be the one that drops the file system.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                log::error!("a file-system thread panicked");
            }
        }
    }

    /// Asks for a commit soon, without waiting for it.
    pub(crate) fn nudge(&self) {
        let mut state = self.state.lock();
        let wanted = state.closed + 1;
        if state.wanted_whole < wanted {
            state.wanted_whole = wanted;
            drop(state);
            self.nudged.notify_all();
        }
    }

    /// The commits so far have ended.
    fn end(&self, is_good: bool) {
        let mut state = self.state.lock();
        state.ended = state.closed;
        if is_good {
            state.good = state.closed;
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl FileSystem {
    /// Waits until everything done so far is durable, in redb, and what was freed may be used
    /// again. Call it without a pass and without locks.
    pub(crate) fn commit_now(&self) -> Result<(), Errno> {
        self.wait_for_commit(true)
    }

    /// Waits until everything done so far is durable. Call it without a pass and without locks.
    pub(crate) fn commit_durably(&self) -> Result<(), Errno> {
        self.wait_for_commit(false)
    }

    fn wait_for_commit(&self, whole: bool) -> Result<(), Errno> {
        let committer = &self.committer;
        committer.stats.lock().waiters += 1;
        let mut state = committer.state.lock();
        let mine = state.closed + 1;
        if whole {
            state.wanted_whole = state.wanted_whole.max(mine);
        }
        while state.ended < mine && !state.stop {
            if state.is_busy {
                committer.ended.wait(&mut state);
            } else {
                self.commit(&mut state, true);
            }
        }
        if state.good < mine {
            return Err(Errno::IO);
        }
        drop(state);
        if self.failed.load(Ordering::SeqCst) {
            Err(Errno::IO)
        } else {
            Ok(())
        }
    }

    /// Asks for an early commit when the open group has grown large; waits when it is far too
    /// large. Call it without a pass.
    pub(crate) fn balance_group(&self) -> Result<(), Errno> {
        let bytes = self.store.open_bytes();
        if bytes > 2 * GROUP_BYTES_MAX {
            return self.commit_now();
        }
        if bytes > GROUP_BYTES_MAX {
            self.committer.nudge();
        }
        self.balance_meta_room()
    }

    /// Everything is durable when this returns well.
    pub fn sync(&self) -> Result<(), Errno> {
        if self.is_read_only() {
            Ok(())
        } else {
            self.commit_now()
        }
    }

    /// The committing thread.
    pub(crate) fn run_commits(&self) {
        let committer = &self.committer;
        let mut swept = Instant::now();
        let mut state = committer.state.lock();
        loop {
            let deadline = Instant::now() + self.commit_interval();
            while !state.stop && (state.is_busy || state.wanted_whole <= state.closed) {
                let late = committer.nudged.wait_until(&mut state, deadline);
                if late.timed_out() {
                    break;
                }
            }
            while state.is_busy {
                committer.ended.wait(&mut state);
            }
            if state.stop {
                return;
            }
            let asked = state.wanted_whole > state.closed;
            self.commit(&mut state, asked);
            if swept.elapsed() >= SWEEP_INTERVAL {
                MutexGuard::unlocked(&mut state, || self.inodes.sweep());
                swept = Instant::now();
            }
        }
    }

    /// Commits, if anybody asked for it or anything has changed. Nobody else does.
    fn commit(&self, state: &mut MutexGuard<'_, State>, asked: bool) {
        state.is_busy = true;
        let silent = MutexGuard::unlocked(state, || {
            let may_commit = self.freezer.begin_commit();
            if may_commit.is_some() {
                self.meta.mend_now();
            }
            let is_due = || asked || self.is_changed() || self.store.has_journaled();
            if may_commit.is_none() || self.is_read_only() || !is_due() {
                if asked {
                    self.end_empty();
                }
                return None;
            }
            Some(self.commit_or_refuse(asked))
        });
        state.is_busy = false;
        if let Some(now_silent) = silent {
            if let Some(device) = now_silent.filter(|_| state.silent != now_silent) {
                let name = self.volume.device_name(device);
                log::error!("no commit until {name} answers: changes stay in memory");
            }
            state.silent = now_silent;
        }
        self.committer.ended.notify_all();
        if state.wanted_whole > state.closed {
            self.committer.nudged.notify_all();
        }
    }

    /// Whether there is anything to commit; access times alone do not count.
    pub(crate) fn is_changed(&self) -> bool {
        !self.store.open_is_empty()
            || !self.space.open_is_empty()
            || !self.dirty.lock().is_empty()
            || self.cache.dirty_bytes() > 0
    }

    fn end_empty(&self) {
        self.committer.state.lock().closed += 1;
        self.committer.end(true);
    }

    /// The device because of which there was no commit. If nobody asked for it, it is a whole one.
    fn commit_or_refuse(&self, asked: bool) -> Option<u16> {
        if self.failed.load(Ordering::SeqCst) {
            self.end_empty();
            return None;
        }
        let _traced = trace::Commit::begin();
        let began = Instant::now();
        if self.volume.silent_device().is_none() {
            self.prepare();
        }
        let silent = self.volume.silent_device();
        match silent {
            None => self.commit_once(began, asked),
            Some(_) => {
                self.committer.stats.lock().refusals += 1;
                self.committer.state.lock().closed += 1;
                self.committer.end(false);
            }
        }
        silent
    }

    /// Step 1.
    fn prepare(&self) {
        for _ in 0..PREPARE_ROUNDS_MAX {
            if self.cache.dirty_bytes() == 0 {
                break;
            }
            self.cache.flush_all(SpaceClass::Data);
            if self.cache.dirty_bytes() < REST_BYTES {
                break;
            }
        }
    }

    fn commit_once(&self, began: Instant, asked: bool) {
        let atimes_room = self.room_for_atimes();
        let whole = {
            let mut state = self.committer.state.lock();
            state.closed += 1;
            !asked || state.wanted_whole >= state.closed
        };
        let closing = Instant::now();
        self.gate.close();
        self.cache.flush_all(SpaceClass::Data);
        // A write that failed and is repeated in the background may end at any time: as a whole
        // before the group is frozen, or after.
        let mapping = self.mapping.write();
        self.take_late_atimes(atimes_room);
        let changed = self.is_changed();
        if changed {
            self.encode_dirty();
        }
        let group_bytes = self.store.open_bytes() as u64;
        let log = self.space.freeze();
        self.store.freeze();
        let group = self.committer.open_group.fetch_add(1, Ordering::SeqCst) + 1;
        drop(mapping);
        self.gate.open();
        let gate_us = micros(closing.elapsed());

        let result = if changed || whole && self.store.has_journaled() {
            self.commit_frozen(log, whole)
        } else {
            self.store.forget_frozen();
            Ok(())
        };
        match &result {
            Ok(()) => self.committer.durable_group.store(group, Ordering::SeqCst),
            Err(error) => {
                self.failed.store(true, Ordering::SeqCst);
                log::error!(
                    "a commit failed, the file system is read-only from now on: {error}; what \
                     was durable before is intact. Copy away what you need, unmount, mend the \
                     device, mount again"
                );
            }
        }
        let commit_us = micros(began.elapsed());
        {
            let mut stats = self.committer.stats.lock();
            stats.commits += 1;
            stats.failures += u64::from(result.is_err());
            stats.commit_us_total += commit_us;
            stats.commit_us_max = stats.commit_us_max.max(commit_us);
            stats.commit_us_last = commit_us;
            stats.gate_us_total += gate_us;
            stats.gate_us_max = stats.gate_us_max.max(gate_us);
            stats.group_bytes_last = group_bytes;
        }
        self.committer.end(result.is_ok());
    }

    /// Makes the frozen group durable, in the journal if it need not be whole.
    fn commit_frozen(&self, log: SpaceLog, whole: bool) -> Result<(), redb::Error> {
        if !whole && self.journal_frozen(&log) {
            self.store.note_journaled();
            self.committer.journaled.lock().append(log);
            self.committer.stats.lock().journaled += 1;
            return Ok(());
        }
        let mut all = std::mem::take(&mut *self.committer.journaled.lock());
        all.append(log);
        let log = Arc::new(all);
        let base = self.journal.next_base();
        self.store.commit(&log, base)?;
        self.journal.restart(base);
        if log.releases() {
            self.epoch.synchronize();
            if self.options.discard {
                self.discard_freed(&log);
            }
            self.space.release(&log);
        }
        Ok(())
    }

    /// Writes the frozen group into the journal; false if it has to be committed whole.
    fn journal_frozen(&self, log: &SpaceLog) -> bool {
        let Some(record) = self.store.encode_frozen(log) else {
            return false;
        };
        self.journal.append(&record).unwrap_or_else(|error| {
            let name = self.volume.device_name(error.dev);
            log::warn!("{name}: the journal cannot be written ({error}); committing without it");
            false
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::{assemble, options, single};

    /// Who changed something after the thread had looked, and waits for the next commit, must not
    /// be told that this was it.
    #[test]
    fn finding_nothing_to_do_is_no_commit() {
        let volume = assemble(&single(), false).expect("a sound volume");
        let fs = FileSystem::mount(volume, options(false)).expect("mount");
        fs.sync().expect("a commit");
        let closed = || fs.committer.state.lock().closed;
        let before = closed();
        fs.set_commit_interval(Duration::from_millis(1));
        // The new interval counts from the next commit on, which it asks for.
        while closed() == before {
            std::thread::yield_now();
        }
        let before = closed();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(closed(), before);
        fs.unmount().expect("unmount");
    }
}
