//! Processes that are killed while they wait for us, and threads that all wait.
//!
//! The kernel lets a killed process go only when the request that it waits for has been answered.
//! It tells us of every signal (INTERRUPT). Signals that a process survives do not end its calls,
//! as on any disk file system; so the process is looked up, again and again while its request is
//! unanswered, and when it has been killed, the request is answered in its place. The request goes
//! on; who comes to answer it later finds that nobody waits any more.
//!
//! An INTERRUPT must be read to be heard, and a device that does not answer can hold up every
//! thread that reads requests. So when none has come back for a moment, there is one more.
//!
//! Locks: one part of the table, for a look-up, or the watcher's list; never both.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use parking_lot::{Condvar, Mutex};
use serde::Serialize;

use super::channel::Channel;
use super::protocol::{InHeader, Opcode};

/// Parts of the table, so that threads seldom meet at one lock. A power of two.
const PARTS: usize = 16;

/// How often a signalled process is looked at, and how long all threads may be away before there is
/// one more.
const LOOK: Duration = Duration::from_millis(25);

/// Looks at a request that is not in the table: its reader may just be about to put it there.
const ABSENT_MAX: u32 = 20;

/// Threads that are added when all wait. Each serves one caller that waits; who comes when they
/// have run out stays in the kernel's queue, and can be killed there.
const SPARE_MAX: usize = 128;

/// A request that was read and not answered.
pub(super) struct Waiting {
    pid: u32,
    channel: Arc<Channel>,
    ino: u64,
    opcode: Opcode,
    since: Instant,
}

impl Waiting {
    pub(super) fn new(
        header: &InHeader,
        (opcode, since): (Opcode, Instant),
        channel: &Arc<Channel>,
    ) -> Self {
        Self {
            pid: header.pid,
            channel: Arc::clone(channel),
            ino: header.nodeid,
            opcode,
            since,
        }
    }
}

/// A request that has not been answered for a while.
#[derive(Clone, Debug, Serialize)]
pub struct SlowRequest {
    /// What it asks for.
    pub op: &'static str,
    /// Inode that it is about.
    pub ino: u64,
    /// Who waits.
    pub pid: u32,
    /// The name of that process; empty where it cannot be seen.
    pub process: String,
    /// Microseconds since it was read.
    pub age_us: u64,
}

#[derive(Default)]
struct Watch {
    /// Requests whose callers got a signal, and how often they were not in the table.
    signalled: Vec<(u64, u32)>,
    stop: bool,
}

/// Requests that wait for their answer, and the threads that read them.
#[derive(Default)]
pub(super) struct Unanswered {
    parts: [Mutex<HashMap<u64, Waiting>>; PARTS],
    watch: Mutex<Watch>,
    wake: Condvar,
    awake: AtomicBool,
    /// Threads that read from the kernel at the moment.
    reading: AtomicUsize,
    /// Requests that were read.
    begun: AtomicU64,
}

impl Unanswered {
    fn part(&self, unique: u64) -> &Mutex<HashMap<u64, Waiting>> {
        // The kernel counts in steps of two.
        let index = usize::try_from(unique / 2 % PARTS as u64).unwrap_or(0);
        &self.parts[index]
    }

    /// A request has been read.
    pub(super) fn begin(&self, unique: u64, waiting: Waiting) {
        self.part(unique).lock().insert(unique, waiting);
    }

    /// Those that wait for the longest time, the oldest first.
    pub(super) fn slowest(&self, count: usize) -> Vec<SlowRequest> {
        let mut oldest: Vec<(Instant, Opcode, u64, u32)> = Vec::new();
        for part in &self.parts {
            let part = part.lock();
            let each = part.values();
            oldest.extend(each.map(|each| (each.since, each.opcode, each.ino, each.pid)));
            drop(part);
            oldest.sort_by_key(|request| request.0);
            oldest.truncate(count);
        }
        let show = |(since, opcode, ino, pid): (Instant, Opcode, u64, u32)| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            SlowRequest {
                op: Opcode::NAMES[opcode as usize],
                ino,
                pid,
                process: name.unwrap_or_default().trim_end().to_owned(),
                age_us: u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX),
            }
        };
        oldest.into_iter().map(show).collect()
    }

    /// The right to answer it; false if that was done because its caller is dead.
    pub(super) fn claim(&self, unique: u64) -> bool {
        self.part(unique).lock().remove(&unique).is_some()
    }

    /// The caller got a signal.
    pub(super) fn signalled(&self, unique: u64) {
        self.watch.lock().signalled.push((unique, 0));
        self.awake.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }

    /// Around the wait for a request.
    pub(super) fn begin_reading(&self) {
        self.reading.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn end_reading(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let was_last = self.reading.fetch_sub(1, Ordering::SeqCst) == 1;
        if was_last && !self.awake.swap(true, Ordering::SeqCst) {
            drop(self.watch.lock());
            self.wake.notify_one();
        }
    }

    fn all_away(&self) -> bool {
        self.reading.load(Ordering::SeqCst) == 0
    }

    /// Ends [`Self::run`].
    pub(super) fn stop(&self) {
        self.watch.lock().stop = true;
        self.wake.notify_one();
    }

    /// The watching thread. `one_more` starts a thread that reads requests; false if it cannot.
    pub(super) fn run(&self, mut one_more: impl FnMut() -> bool) {
        let mut spare = 0;
        let mut watch = self.watch.lock();
        loop {
            while watch.signalled.is_empty() && !self.all_away() && !watch.stop {
                self.awake.store(false, Ordering::SeqCst);
                // Who went away just before that woke nobody.
                if self.all_away() {
                    break;
                }
                self.wake.wait(&mut watch);
            }
            if watch.stop {
                return;
            }
            let begun = self.begun.load(Ordering::Relaxed);
            let mut signalled = std::mem::take(&mut watch.signalled);
            drop(watch);
            signalled.retain_mut(|(unique, absent)| self.still_waits(*unique, absent));
            watch = self.watch.lock();
            watch.signalled.append(&mut signalled);
            if watch.stop {
                return;
            }
            self.wake.wait_for(&mut watch, LOOK);
            let stuck = self.all_away() && begun == self.begun.load(Ordering::Relaxed);
            if stuck && spare < SPARE_MAX {
                drop(watch);
                spare += usize::from(one_more());
                watch = self.watch.lock();
            }
        }
    }

    /// Answers the request if its caller is dead; whether to look again.
    fn still_waits(&self, unique: u64, absent: &mut u32) -> bool {
        let pid = self.part(unique).lock().get(&unique).map(|each| each.pid);
        let Some(pid) = pid else {
            *absent += 1;
            return *absent < ABSENT_MAX;
        };
        if !is_killed(pid) {
            return true;
        }
        let waiting = self.part(unique).lock().remove(&unique);
        if let Some(waiting) = waiting {
            let sent = waiting.channel.send_error(unique, libc::EINTR);
            log::debug!("process {pid} is dead, its request ends ({sent:?})");
        }
        false
    }
}

/// Whether a thread is gone or about to go: SIGKILL is pending for it, which is also what the
/// kernel makes of other fatal signals. One that cannot be seen (pid 0: of a name space that is not
/// ours, or where /proc hides others) counts as alive.
fn is_killed(pid: u32) -> bool {
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let Some(raw) = i32::try_from(pid).ok().filter(|&pid| pid > 0) else {
        return false;
    };
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
        return kill(Pid::from_raw(raw), None) == Err(Errno::ESRCH);
    };
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    let pending = pending.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    pending.is_some_and(|mask| mask & SIGKILL != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::process::Command;
    use std::sync::mpsc;
    use std::thread;

    /// A table whose watcher runs, and reports when it wants one more thread.
    fn watched() -> (Arc<Unanswered>, mpsc::Receiver<()>, thread::JoinHandle<()>) {
        let table = Arc::<Unanswered>::default();
        let (to, wanted) = mpsc::channel();
        let watcher = {
            let table = Arc::clone(&table);
            thread::spawn(move || table.run(|| to.send(()).is_ok()))
        };
        (table, wanted, watcher)
    }

    #[test]
    fn the_request_of_a_killed_process_is_answered_and_that_of_a_signalled_one_is_not() {
        let (table, _wanted, watcher) = watched();
        table.begin_reading();
        let (read, write) = nix::unistd::pipe().unwrap();
        let channel = Arc::new(Channel::new(write));
        let alive = std::process::id();
        // A child that has ended and is not waited for is a process that is about to go.
        let mut child = Command::new("true").spawn().unwrap();
        let dead = child.id();
        child.wait().unwrap();
        let waiting = |pid: u32| Waiting {
            pid,
            channel: Arc::clone(&channel),
            ino: 1,
            opcode: Opcode::Read,
            since: Instant::now(),
        };
        table.begin(2, waiting(alive));
        table.begin(4, waiting(dead));
        let slowest = table.slowest(1);
        assert_eq!(slowest.len(), 1);
        assert_eq!((slowest[0].op, slowest[0].pid), ("read", alive));
        table.signalled(2);
        table.signalled(4);
        let mut answer = [0; 64];
        assert_eq!(nix::unistd::read(read.as_fd(), &mut answer), Ok(16));
        assert_eq!(answer[4..8], (-libc::EINTR).to_le_bytes());
        assert_eq!(answer[8], 4, "the request of the dead one");
        assert!(!table.claim(4), "it has been answered");
        thread::sleep(4 * LOOK);
        assert!(table.claim(2), "the other one has not");
        table.stop();
        watcher.join().unwrap();
    }

    #[test]
    fn when_all_threads_are_away_there_is_one_more() {
        let (table, wanted, watcher) = watched();
        table.begin_reading();
        assert!(wanted.recv_timeout(4 * LOOK).is_err(), "one is reading");
        table.end_reading();
        wanted.recv_timeout(Duration::from_secs(10)).unwrap();
        table.begin_reading();
        table.stop();
        watcher.join().unwrap();
    }
}
