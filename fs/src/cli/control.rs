//! The control socket of a mounted file system.
//!
//! It lies in a private directory of whoever mounted, named by the device number of the mount, and
//! speaks lines:
//!
//! | line | answer, if not `error TEXT` |
//! | --- | --- |
//! | `stats` | one line of JSON |
//! | `sample` | the same with the time, histograms of requests, and the slowest of them now |
//! | `writable` | `ok`: a file system that was mounted read-only goes on writing |
//! | `get`, `set JSON` | what can be changed, as JSON; `ok` |
//! | `freeze SECONDS`, `thaw` | `ok`: everything is durable and stays as it is; changes go on |
//! | `sync`, `drop-caches` | `ok` |
//! | `label JSON` | `ok`: the file system has this label, a string |
//! | `pace BYTES SECONDS` | what the members can do, as JSON; four steps of so many seconds |
//! | `scrub status` | one line of JSON |
//! | `scrub start MODE RATE` | `ok`; MODE: `repair`, `look`; RATE: bytes/s or `-` |
//! | `scrub resume MODE RATE` | the same, of one that was paused |
//! | `scrub pause`, `scrub cancel` | `ok` |
//! | `trace JSON` | one line of JSON; after an empty line events, until the peer shuts down |
//! | `wait` | `waiting` at once; `ok` when the daemon has ended after an unmount |
//!
//! A device number belongs to one mount at a time, so whatever lies at its path when a mount begins
//! is left over from an earlier one.

mod answer;
mod client;
mod tracing;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::debug;
use parking_lot::{Condvar, Mutex};

use crate::fuse::MountHandle;
use answer::answer;
pub use answer::{Settings, scrub_refusal};
pub use client::{Patience, Waiting, ask, connect, reach, told, told_json};
pub use tracing::{Asked, TRACE_VERSION, Told};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;

/// Longest line that is read: a label, with each of its bytes escaped, and to spare.
const LINE_BYTES_MAX: u64 = 1024;

/// How long a peer may take for its part.
const PEER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a waiting connection looks whether its peer has gone.
const HANGUP_CHECK: Duration = Duration::from_millis(250);

/// How long the daemon's end waits until all who wait have been told.
const FAREWELL: Duration = Duration::from_secs(2);

/// Age from which a socket that nobody listens on is left over.
const SETTLED: Duration = Duration::from_secs(10);

/// The daemon's end.
pub struct ControlServer {
    path: PathBuf,
    /// Device and inode number of the socket file, so that only ours is removed.
    identity: (u64, u64),
    state: Arc<State>,
}

struct State {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    /// Gone when the session has ended: nothing here may keep the file system then.
    mount: Option<MountHandle>,
    outcome: Option<Result<(), String>>,
    connections: usize,
}

impl ControlServer {
    /// Listens for a mount.
    pub fn start(directory: &Path, mount: MountHandle) -> io::Result<Self> {
        remove_stale(directory);
        let path = directory.join(socket_name(mount.mount().dev));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let meta = fs::symlink_metadata(&path)?;
        let inner = Inner {
            mount: Some(mount),
            outcome: None,
            connections: 0,
        };
        let state = Arc::new(State {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        });
        let served = Arc::clone(&state);
        thread::Builder::new()
            .name("braidfs-control".into())
            .spawn(move || accept_all(&listener, &served))?;
        Ok(Self {
            path,
            identity: (meta.dev(), meta.ino()),
            state,
        })
    }

    /// For others that look at the mount.
    pub fn live_mount(&self) -> LiveMount {
        LiveMount(Arc::clone(&self.state))
    }

    /// The session has ended: no new connections, no more statistics; those who wait go on waiting.
    pub fn session_ended(&self) {
        let mount = self.state.inner.lock().mount.take();
        drop(mount);
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            debug!("{}: {error}", self.path.display());
        }
    }

    /// The daemon has finished: tells all who wait, and gives them a moment to hear it.
    pub fn finish(&self, outcome: Result<(), String>) {
        let mut inner = self.state.inner.lock();
        inner.outcome = Some(outcome);
        self.state.changed.notify_all();
        let until = Instant::now() + FAREWELL;
        while inner.connections > 0 {
            if self.state.changed.wait_until(&mut inner, until).timed_out() {
                return;
            }
        }
    }
}

/// Removes sockets of daemons that were killed. One that was made a moment ago may not listen yet.
fn remove_stale(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let settled = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .is_ok_and(|made| made.elapsed().is_ok_and(|age| age >= SETTLED));
        if path.extension() != Some(OsStr::new("sock")) || !settled {
            continue;
        }
        let refused = |error: io::Error| error.kind() == ErrorKind::ConnectionRefused;
        if UnixStream::connect(&path).is_err_and(refused)
            && let Err(error) = fs::remove_file(&path)
        {
            debug!("{}: {error}", path.display());
        }
    }
}

fn accept_all(listener: &UnixListener, state: &Arc<State>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // Out of descriptors, most likely: do not spin.
            thread::sleep(HANGUP_CHECK);
            continue;
        };
        {
            let mut inner = state.inner.lock();
            if inner.connections >= CONNECTIONS_MAX {
                continue;
            }
            inner.connections += 1;
        }
        let served = Arc::clone(state);
        let spawned = thread::Builder::new()
            .name("braidfs-control".into())
            .spawn(move || {
                if let Err(error) = answer(&stream, &served) {
                    debug!("control connection: {error}");
                }
                drop(stream);
                served.left();
            });
        if spawned.is_err() {
            state.left();
        }
    }
}

/// The mount for as long as it is served.
#[derive(Clone)]
pub struct LiveMount(Arc<State>);

impl LiveMount {
    /// None when the session has ended.
    pub fn get(&self) -> Option<MountHandle> {
        self.0.inner.lock().mount.clone()
    }
}

impl State {
    fn left(&self) {
        self.inner.lock().connections -= 1;
        self.changed.notify_all();
    }

    /// Waits for the outcome; `None` when the peer has gone.
    fn wait(&self, stream: &UnixStream) -> io::Result<Option<Result<(), String>>> {
        stream.set_nonblocking(true)?;
        let mut inner = self.inner.lock();
        loop {
            if let Some(outcome) = inner.outcome.clone() {
                stream.set_nonblocking(false)?;
                return Ok(Some(outcome));
            }
            self.changed.wait_for(&mut inner, HANGUP_CHECK);
            let mut byte = [0];
            match (&*stream).read(&mut byte) {
                Ok(0) => return Ok(None),
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
    }
}

fn socket_name((major, minor): (u32, u32)) -> String {
    format!("{major}-{minor}.sock")
}

/// Directories where sockets of a user may lie, the preferred one first.
fn directories(uid: u32) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    if uid == 0 {
        directories.push(PathBuf::from("/run/braidfs"));
    } else {
        let own = nix::unistd::geteuid().as_raw() == uid;
        if let Some(runtime) = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| own) {
            let runtime = PathBuf::from(runtime);
            if runtime.is_absolute() {
                directories.push(runtime.join("braidfs"));
            }
        }
        directories.push(PathBuf::from(format!("/run/user/{uid}/braidfs")));
    }
    directories.push(PathBuf::from(format!("/tmp/braidfs-{uid}")));
    directories
}

/// The directory for the sockets of this process's user, made if needed.
pub fn own_directory() -> Result<PathBuf, String> {
    let uid = nix::unistd::geteuid().as_raw();
    let mut reasons = Vec::new();
    for directory in directories(uid) {
        match make_private(&directory, uid) {
            Ok(()) => return Ok(directory),
            Err(error) => reasons.push(format!("{}: {error}", directory.display())),
        }
    }
    Err(format!(
        "no private directory for the control socket: {}",
        reasons.join("; ")
    ))
}

fn make_private(directory: &Path, uid: u32) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if is_private(directory, uid)? {
        return Ok(());
    }
    Err(io::Error::new(
        ErrorKind::PermissionDenied,
        "is not a directory of this user alone",
    ))
}

/// A real directory of this user, closed to all others.
fn is_private(directory: &Path, uid: u32) -> io::Result<bool> {
    let meta = fs::symlink_metadata(directory)?;
    Ok(meta.is_dir() && meta.uid() == uid && meta.mode() & 0o077 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_must_be_private() {
        let folder = tempfile::tempdir().unwrap();
        let uid = nix::unistd::geteuid().as_raw();
        let private = folder.path().join("private");
        make_private(&private, uid).unwrap();
        make_private(&private, uid).unwrap();
        assert!(is_private(&private, uid).unwrap());
        assert!(!is_private(&private, uid + 1).unwrap());
        fs::set_permissions(&private, Permissions::from_mode(0o750)).unwrap();
        assert!(make_private(&private, uid).is_err());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        assert!(make_private(&link, uid).is_err());
    }

    #[test]
    fn only_sockets_that_nobody_listens_on_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let _alive = UnixListener::bind(path("0-1.sock")).unwrap();
        drop(UnixListener::bind(path("0-2.sock")).unwrap());
        drop(UnixListener::bind(path("0-3.sock")).unwrap());
        for name in ["0-1.sock", "0-2.sock"] {
            // A socket cannot be opened, so its time is set through its path.
            let path = path(name);
            let time = nix::sys::time::TimeSpec::new(0, 0);
            let follow = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
            nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &path, &time, &time, follow).unwrap();
        }
        remove_stale(folder.path());
        assert!(path("0-1.sock").exists(), "somebody listens there");
        assert!(!path("0-2.sock").exists(), "nobody listens there any more");
        assert!(path("0-3.sock").exists(), "it may be about to listen");
    }
}
