//! The control socket of a mounted file system.
//!
//! It lies in a private directory of whoever mounted, named by the device number of the mount, and
//! speaks lines:
//!
//! | line | answer |
//! | --- | --- |
//! | `stats` | one line of JSON |
//! | `writable` | `ok` or `error TEXT`: a file system that was mounted read-only goes on writing |
//! | `scrub status` | one line of JSON |
//! | `scrub start MODE RATE` | `ok` or `error TEXT`; MODE: `repair`, `look`; RATE: bytes/s or `-` |
//! | `scrub resume MODE RATE` | the same, of one that was paused |
//! | `scrub pause`, `scrub cancel` | `ok` or `error TEXT` |
//! | `wait` | `waiting` at once; `ok` or `error TEXT` when the daemon has ended after an unmount |
//!
//! A device number belongs to one mount at a time, so whatever lies at its path when a mount begins
//! is left over from an earlier one.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::debug;
use parking_lot::{Condvar, Mutex};

use crate::fuse::MountHandle;
use crate::fuse::mounts::MountEntry;
use crate::scrub::ScrubOptions;
use crate::{Errno, FileSystem};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 64;

/// Longest line that is read.
const LINE_BYTES_MAX: u64 = 64;

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

fn answer(stream: &UnixStream, state: &State) -> io::Result<()> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    let mut out = stream;
    match line.trim_end() {
        "stats" => {
            let mount = state.inner.lock().mount.clone();
            match mount {
                Some(mount) => writeln!(out, "{}", mount.stats()),
                None => write_error(out, "the file system is being unmounted"),
            }
        }
        "writable" => {
            let mount = state.inner.lock().mount.clone();
            let made = mount.map(|mount| mount.file_system().make_writable());
            match made {
                Some(Ok(())) => writeln!(out, "ok"),
                Some(Err(error)) => write_error(out, &error.to_string()),
                None => write_error(out, "the file system is being unmounted"),
            }
        }
        line if line.starts_with("scrub ") => {
            let mount = state.inner.lock().mount.clone();
            match mount {
                Some(mount) => answer_scrub(out, mount.file_system(), line),
                None => write_error(out, "the file system is being unmounted"),
            }
        }
        "wait" => {
            writeln!(out, "waiting")?;
            match state.wait(stream)? {
                Some(Ok(())) => writeln!(out, "ok"),
                Some(Err(text)) => write_error(out, &text),
                None => Ok(()),
            }
        }
        _ => write_error(out, "unknown command"),
    }
}

fn answer_scrub(mut out: &UnixStream, fs: &FileSystem, line: &str) -> io::Result<()> {
    let words: Vec<&str> = line.split(' ').skip(1).collect();
    let done = match words[..] {
        ["status"] => {
            let status = serde_json::to_string(&fs.scrub_status())?;
            return writeln!(out, "{status}");
        }
        ["pause"] => fs.scrub_pause(),
        ["cancel"] => fs.scrub_cancel(),
        [verb @ ("start" | "resume"), mode, rate] => fs.scrub_start(ScrubOptions {
            rate_bytes: rate.parse().ok(),
            no_repair: mode == "look",
            resume: verb == "resume",
            since_mount: false,
        }),
        _ => return write_error(out, "unknown command"),
    };
    match done {
        Ok(()) => writeln!(out, "ok"),
        Err(errno) => write_error(out, &scrub_refusal(errno)),
    }
}

/// Why a scrub was not begun, paused, resumed or canceled.
pub fn scrub_refusal(errno: Errno) -> String {
    match errno {
        Errno::BUSY => "a scrub is under way; 'braidfs scrub --status' shows it".to_owned(),
        Errno::INVAL => "there is no scrub to pause, resume or cancel".to_owned(),
        errno => errno.to_string(),
    }
}

fn write_error(mut out: &UnixStream, text: &str) -> io::Result<()> {
    writeln!(out, "error {}", text.replace('\n', " "))
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

/// Connects to the daemon of a mount; `None` when there is none.
pub fn connect(entry: &MountEntry) -> Option<UnixStream> {
    let uid = entry.user_id()?;
    directories(uid).iter().find_map(|directory| {
        if !is_private(directory, uid).unwrap_or(false) {
            return None;
        }
        UnixStream::connect(directory.join(socket_name(entry.dev))).ok()
    })
}

/// Asks the daemon of a mount for its statistics.
pub fn request_stats(stream: &UnixStream) -> io::Result<String> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    let mut out = stream;
    writeln!(out, "stats")?;
    read_line(&mut BufReader::new(stream))
}

/// Says `words` about a scrub to the daemon of a mount; gives its answer.
pub fn request_scrub(stream: &UnixStream, words: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    let mut out = stream;
    writeln!(out, "scrub {words}")?;
    read_line(&mut BufReader::new(stream))
}

/// Has the daemon of a read-only mount go on writing. The inner error is the daemon's.
pub fn request_writable(stream: &UnixStream) -> io::Result<Result<(), String>> {
    // Recovery after a crash, and what was being deleted then, may take a while.
    stream.set_read_timeout(None)?;
    let mut out = stream;
    writeln!(out, "writable")?;
    let line = read_line(&mut BufReader::new(stream))?;
    Ok(match line.strip_prefix("error ") {
        Some(text) => Err(text.to_owned()),
        None => Ok(()),
    })
}

/// A connection on which the daemon will say how the unmount went.
pub struct Waiting {
    reader: BufReader<UnixStream>,
}

impl Waiting {
    /// Asks; returns when the daemon knows that somebody waits.
    pub fn begin(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PEER_TIMEOUT))?;
        let mut out = &stream;
        writeln!(out, "wait")?;
        let mut reader = BufReader::new(stream);
        let line = read_line(&mut reader)?;
        if line != "waiting" {
            return Err(io::Error::new(ErrorKind::InvalidData, "unexpected answer"));
        }
        Ok(Self { reader })
    }

    /// Waits until the daemon has finished. It takes as long as writing everything back takes; if
    /// the daemon dies, the connection ends.
    pub fn end(mut self) -> Result<(), String> {
        let gone = "the daemon ended without saying that all data is safe";
        self.reader
            .get_ref()
            .set_read_timeout(None)
            .map_err(|error| error.to_string())?;
        let said = read_line(&mut self.reader);
        wait_gone(self.reader.get_ref());
        match said {
            Ok(line) if line == "ok" => Ok(()),
            Ok(line) => match line.strip_prefix("error ") {
                Some(text) => Err(text.to_owned()),
                None => Err(gone.to_owned()),
            },
            Err(_) => Err(gone.to_owned()),
        }
    }
}

/// Waits a moment for the end of a daemon that has said its last word: what its members lie on may
/// be unmounted next, and is in use as long as the process is there.
fn wait_gone(stream: &UnixStream) {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    let Ok(peer) = getsockopt(stream, PeerCredentials) else {
        return;
    };
    let stat = format!("/proc/{}/stat", peer.pid());
    let until = Instant::now() + FAREWELL;
    // The state follows the name, which may have blanks and brackets of its own.
    let runs = || {
        let text = fs::read_to_string(&stat).unwrap_or_default();
        let state = text
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    };
    while peer.pid() != nix::unistd::getpid().as_raw() && runs() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.pop() == Some('\n') {
        Ok(line)
    } else {
        Err(ErrorKind::UnexpectedEof.into())
    }
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

    #[test]
    fn a_waiting_client_hears_ok_errors_and_death() {
        for (said, expected) in [
            ("waiting\nok\n", Ok(())),
            ("waiting\nerror disk on fire\n", Err("disk on fire")),
            (
                "waiting\n",
                Err("the daemon ended without saying that all data is safe"),
            ),
        ] {
            let (client, mut server) = UnixStream::pair().unwrap();
            server.write_all(said.as_bytes()).unwrap();
            let waiting = Waiting::begin(client).unwrap();
            drop(server);
            assert_eq!(waiting.end(), expected.map_err(str::to_owned));
        }
    }
}
