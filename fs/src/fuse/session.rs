//! From a mounted core to a served mount point.

use std::io;
use std::sync::{Arc, OnceLock};

use fuser::{Config, Session, SessionACL};
use log::debug;
use nix::errno::Errno;
use serde_json::Value;

use super::attach::{self, AttachError, MountSpec, Unmount};
use super::blocking::Blocking;
use super::handles::Handles;
use super::mounts::{self, MountEntry};
use super::stats::FuseStats;
use super::{CacheMode, FrontEnd, FuseOptions, Shared};
use crate::FileSystem;

/// What the kernel's readahead is raised to where its page cache is used, in KiB: one request.
const READ_AHEAD_KB: u32 = 1024;

/// A mounted file system that is not served yet. [`Mounted::serve`] does that until the end.
pub struct Mounted {
    session: Session<FrontEnd>,
    handle: MountHandle,
}

/// What other threads may do with a mount while it is served.
#[derive(Clone)]
pub struct MountHandle {
    shared: Arc<Shared>,
    mount: MountEntry,
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
    connection: std::os::fd::OwnedFd,
) -> Result<Mounted, AttachError> {
    let session_error = |error: io::Error| AttachError::Session(error);
    let entry = mounts::mount_at(&spec.mount_point)
        .and_then(|entry| entry.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)))
        .map_err(session_error)?;
    let mut config = Config::default();
    config.n_threads = Some(options.threads);
    config.clone_fd = attach::can_clone_connection();
    // The kernel itself keeps others out where neither option was given.
    let acl = match spec.allow_root && !spec.allow_other {
        true => SessionACL::RootAndOwner,
        false => SessionACL::All,
    };
    let shared = Arc::new(Shared {
        fs,
        handles: Handles::default(),
        stats: FuseStats::new(),
        options,
        notifier: OnceLock::new(),
    });
    let front_end = FrontEnd {
        shared: Arc::clone(&shared),
        blocking: Blocking::default(),
    };
    let session =
        Session::from_fd(front_end, connection, acl, config).map_err(AttachError::Session)?;
    // The only place that sets it.
    drop(shared.notifier.set(session.notifier()));
    if shared.options.cache_mode == CacheMode::Kernel {
        // Only now: the kernel has just set it to what was negotiated.
        raise_read_ahead(entry.dev);
    }
    Ok(Mounted {
        session,
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
        let served = self.session.run();
        // After an abort a dead mount is left in the tree.
        let undone = self.handle.unmount(Unmount::Lazy);
        debug!("unmounted after the session: {undone:?}");
        served
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

    /// Takes the mount out of the tree, if it is still there.
    pub fn unmount(&self, how: Unmount) -> Result<(), Errno> {
        attach::unmount_if_ours(&self.mount, how)
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

/// The kernel reads 128 KiB ahead on FUSE unless told otherwise. Needs root; best effort.
fn raise_read_ahead((major, minor): (u32, u32)) {
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, READ_AHEAD_KB.to_string()) {
        debug!("readahead stays as it is, {path}: {error}");
    }
}
