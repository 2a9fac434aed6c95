//! From a mounted core to a served mount point.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Instant;

use log::{debug, error, warn};
use nix::errno::Errno;
use serde::Serialize;
use serde_json::Value;

use super::attach::{self, AttachError, MountSpec, Unmount};
use super::blocking::Blocking;
use super::channel::{Channel, Received, RequestBuffer};
use super::dispatch::dispatch;
use super::handles::Handles;
use super::init::{InitError, handshake};
use super::interrupt::Unanswered;
use super::mounts::{self, MountEntry};
use super::stats::FuseStats;
use super::{FuseOptions, RequestStats, Shared, SlowRequest};
use crate::{FileSystem, FsStats};

/// What the kernel's readahead is raised to, in KiB: one request. A page fault reads as much around
/// itself, so that more would be slow for random access to mapped files.
pub const READ_AHEAD_KB: u32 = 1024;
/// How much of the memory that may be dirty at all the kernel's cache of this mount may fill, in
/// percent. A FUSE mount has 1 otherwise, which has writers sleep while the daemon waits for them.
const DIRTY_RATIO: u32 = 100;

/// A mounted file system that is not served yet. [`Mounted::serve`] does that until the end.
pub struct Mounted {
    handle: MountHandle,
}

/// What other threads may do with a mount while it is served.
#[derive(Clone)]
pub struct MountHandle {
    shared: Arc<Shared>,
    mount: MountEntry,
}

/// Slow requests that a sample names.
const SLOWEST: usize = 16;

/// Everything that is counted, at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Microseconds since it was mounted.
    pub at_us: u64,
    /// UUID of the file system.
    pub uuid: String,
    /// The core.
    pub fs: FsStats,
    /// Whether changes wait for a thaw.
    pub frozen: bool,
    /// Files that are open.
    pub open_files: u64,
    /// Requests that were read and not answered.
    pub in_flight: u64,
    /// Bytes that were read from files.
    pub read_bytes: u64,
    /// Bytes that were written to files.
    pub write_bytes: u64,
    /// Requests by kind.
    pub requests: Vec<RequestStats>,
    /// Those that wait for the longest time now.
    pub slowest: Vec<SlowRequest>,
}

/// Mounts. The kernel's first request is answered; the others wait until [`Mounted::serve`].
pub fn mount(
    fs: Arc<FileSystem>,
    spec: &MountSpec,
    options: FuseOptions,
) -> Result<Mounted, AttachError> {
    let connection = attach::attach(spec)?;
    // From here on the mount is in the table: whatever fails must take it out again.
    let mounted = start(fs, spec, options, connection);
    if mounted.is_err() {
        let undone = attach::unmount(&spec.mount_point, Unmount::Lazy);
        debug!("unmounted after a failed start: {undone:?}");
    }
    mounted
}

fn start(
    fs: Arc<FileSystem>,
    spec: &MountSpec,
    options: FuseOptions,
    connection: OwnedFd,
) -> Result<Mounted, AttachError> {
    let not_there = || InitError::System(Errno::ENOENT);
    let entry = mounts::mount_at(&spec.mount_point)
        .map_err(|_| not_there())?
        .ok_or_else(not_there)?;
    let channel = Arc::new(Channel::new(connection));
    handshake(&channel, options.cache_mode)?;
    // Only now: the kernel has just set it to what was negotiated.
    tune_kernel_cache(entry.dev);
    // The kernel itself keeps others out where neither option was given.
    let root_and_owner = spec.allow_root && !spec.allow_other;
    let shared = Arc::new(Shared {
        fs,
        handles: Handles::default(),
        unanswered: Unanswered::default(),
        stats: FuseStats::new(),
        since: Instant::now(),
        options,
        channel,
        only: root_and_owner.then(|| nix::unistd::getuid().as_raw()),
    });
    Ok(Mounted {
        handle: MountHandle {
            shared,
            mount: entry,
        },
    })
}

impl Mounted {
    /// For other threads.
    pub fn handle(&self) -> MountHandle {
        self.handle.clone()
    }

    /// Answers requests until the file system is unmounted or its connection aborted. The core is
    /// then still mounted; its owner unmounts it.
    pub fn serve(self) -> io::Result<()> {
        let shared = &self.handle.shared;
        let blocking = Blocking::default();
        let served = thread::scope(|scope| {
            let watcher = thread::Builder::new()
                .name("braidfs-watch".into())
                .spawn_scoped(scope, || {
                    shared.unanswered.run(|| {
                        let (shared, blocking) = (Arc::clone(shared), blocking.clone());
                        let spare = thread::Builder::new()
                            .name("braidfs-spare".into())
                            .spawn_scoped(scope, move || {
                                // There may be many, and each is there because memory is short,
                                // or a device slow.
                                let channel = own_channel(&shared.channel);
                                let served = serve_channel(&shared, &blocking, &channel, false);
                                debug!("a spare thread ends: {served:?}");
                            });
                        spare.is_ok()
                    });
                });
            if let Err(error) = watcher {
                warn!("killed processes may have to wait: {error}");
            }
            let mut workers = Vec::new();
            for number in 1..shared.options.threads {
                let (shared, blocking) = (Arc::clone(shared), blocking.clone());
                let worker = thread::Builder::new()
                    .name(format!("braidfs-fuse{number}"))
                    .spawn_scoped(scope, move || {
                        serve_channel(&shared, &blocking, &own_channel(&shared.channel), true)
                    });
                match worker {
                    Ok(worker) => workers.push(worker),
                    Err(error) => warn!("only {number} threads serve requests: {error}"),
                }
            }
            let mut served = serve_channel(shared, &blocking, &shared.channel, true);
            for worker in workers {
                served = served.and(worker.join().unwrap_or(Err(Errno::EIO)));
            }
            shared.unanswered.stop();
            served
        });
        // After an abort a dead mount is left in the tree.
        let undone = self.handle.unmount(Unmount::Lazy);
        debug!("unmounted after the session: {undone:?}");
        Ok(served?)
    }
}

/// A channel for one thread; the common one where the device cannot be opened again.
pub(super) fn own_channel(first: &Arc<Channel>) -> Arc<Channel> {
    match attach::clone_connection(first.descriptor()) {
        Ok(descriptor) => Arc::new(Channel::new(descriptor)),
        Err(error) => {
            debug!("threads share one descriptor of the connection: {error}");
            Arc::clone(first)
        }
    }
}

/// Serves the requests of one channel until the connection ends. `lands`: payloads may come to lie
/// in the cache's own memory.
fn serve_channel(
    shared: &Arc<Shared>,
    blocking: &Blocking,
    channel: &Arc<Channel>,
    lands: bool,
) -> Result<(), Errno> {
    let mut buffer = RequestBuffer::new();
    loop {
        if lands {
            match shared.may_land() {
                true => buffer.land_on(|| shared.fs.alloc_landing()),
                false => buffer.land_nowhere(),
            }
        }
        shared.unanswered.begin_reading();
        let received = channel.receive(&mut buffer);
        shared.unanswered.end_reading();
        match received {
            Ok(Received::Request(len)) => {
                let (bytes, landed) = buffer.request(len);
                dispatch(shared, blocking, channel, bytes, landed);
            }
            Ok(Received::Ended) => {
                // Other threads may wait for the thaw with their requests.
                shared.fs.thaw_at_end();
                return Ok(());
            }
            Err(error) => {
                error!("cannot read requests from the kernel: {error}");
                return Err(error);
            }
        }
    }
}

impl MountHandle {
    /// Its entry in the mount table.
    pub fn mount(&self) -> &MountEntry {
        &self.mount
    }

    /// The core behind it.
    pub fn file_system(&self) -> &Arc<FileSystem> {
        &self.shared.fs
    }

    /// The least that the cache can be made, in bytes: what the threads keep of it is theirs.
    pub fn cache_bytes_min(&self) -> u64 {
        crate::CACHE_BYTES_MIN + self.shared.landing_bytes()
    }

    /// Takes the mount out of the tree, if it is still there.
    pub fn unmount(&self, how: Unmount) -> Result<(), Errno> {
        attach::unmount_if_ours(&self.mount, how)
    }

    /// Everything that is counted.
    pub fn sample(&self) -> Sample {
        let (shared, fs) = (&self.shared, self.file_system());
        let stats = &shared.stats;
        Sample {
            at_us: u64::try_from(shared.since.elapsed().as_micros()).unwrap_or(u64::MAX),
            uuid: fs.volume().info().uuid,
            fs: fs.stats(),
            frozen: fs.frozen_for().is_some(),
            open_files: shared.handles.count() as u64,
            in_flight: stats.in_flight.load(Relaxed),
            read_bytes: stats.read_bytes.load(Relaxed),
            write_bytes: stats.write_bytes.load(Relaxed),
            requests: stats.by_opcode(),
            slowest: shared.unanswered.slowest(SLOWEST),
        }
    }

    /// Statistics of the core and of the front end (section `fuse`).
    pub fn stats(&self) -> Value {
        let mut stats = serde_json::to_value(self.shared.fs.stats()).unwrap_or(Value::Null);
        match &mut stats {
            Value::Object(sections) => {
                sections.insert("fuse".to_owned(), self.shared.stats_value());
                stats
            }
            _ => serde_json::json!({ "fuse": self.shared.stats_value() }),
        }
    }
}

/// The kernel reads 128 KiB ahead on FUSE, and lets it have few dirty pages, unless told otherwise.
/// Needs root; best effort.
pub(super) fn tune_kernel_cache((major, minor): (u32, u32)) {
    let settings = [("read_ahead_kb", READ_AHEAD_KB), ("max_ratio", DIRTY_RATIO)];
    for (name, value) in settings {
        let path = format!("/sys/class/bdi/{major}:{minor}/{name}");
        if let Err(error) = std::fs::write(&path, value.to_string()) {
            debug!("the kernel's cache stays as it is, {path}: {error}");
        }
    }
}
