//! Metrics for Prometheus over HTTP, on a loopback address or a unix socket (`-o metrics=`).
//!
//! A request is `GET /metrics`, the answer the counters at that moment (`exposition.rs`). No more
//! of HTTP is spoken than a scraper needs, and nothing can cost much: a request has a size, a
//! connection a time, and there are only so many at once.

mod exposition;

use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::control::LiveMount;

/// Most connections at a time; further ones are closed.
const CONNECTIONS_MAX: usize = 8;

/// Longest request, in bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// How long a connection may last.
const TIME_MAX: Duration = Duration::from_secs(5);

/// Written at a time, so that the time is looked at in between.
const PIECE_BYTES: usize = 16 << 10;

/// What the exposition calls itself.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Where metrics are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket file for this user alone.
    Unix(PathBuf),
    /// A port that this machine alone can reach.
    Loopback(SocketAddr),
}

impl Address {
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return path.is_absolute().then_some(Self::Unix(path));
        }
        let address: SocketAddr = text.parse().ok()?;
        let near = address.ip().is_loopback() && address.port() != 0;
        near.then_some(Self::Loopback(address))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(address) => address.fmt(f),
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    /// With device and inode number of the file, so that only ours is removed.
    Unix(UnixListener, PathBuf, (u64, u64)),
}

/// The address, taken.
pub struct Endpoint(Listener);

impl Endpoint {
    /// Takes the address. A socket file on which nobody listens any more is replaced.
    pub fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Loopback(address) => Ok(Self(Listener::Tcp(TcpListener::bind(address)?))),
            Address::Unix(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path)?;
                fs::set_permissions(path, Permissions::from_mode(0o600))?;
                let meta = fs::symlink_metadata(path)?;
                let identity = (meta.dev(), meta.ino());
                Ok(Self(Listener::Unix(listener, path.clone(), identity)))
            }
        }
    }

    /// Serves the metrics of a mount. The file is removed when what is returned is dropped.
    pub fn serve(self, live: &LiveMount) -> io::Result<ServedFile> {
        let live = live.clone();
        let serving = Arc::<AtomicUsize>::default();
        let thread = thread::Builder::new().name("braidfs-metrics".into());
        match self.0 {
            Listener::Tcp(listener) => {
                let run = move || accept(|| Ok(listener.accept()?.0), &live, &serving);
                thread.spawn(run)?;
                Ok(ServedFile(None))
            }
            Listener::Unix(listener, path, identity) => {
                let run = move || accept(|| Ok(listener.accept()?.0), &live, &serving);
                thread.spawn(run)?;
                Ok(ServedFile(Some((path, identity))))
            }
        }
    }
}

/// The socket file, if there is one.
pub struct ServedFile(Option<(PathBuf, (u64, u64))>);

impl Drop for ServedFile {
    fn drop(&mut self) {
        let Some((path, identity)) = &self.0 else {
            return;
        };
        let ours = fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == *identity);
        if ours && let Err(error) = fs::remove_file(path) {
            log::debug!("{}: {error}", path.display());
        }
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Err(ErrorKind::AddrInUse.into()),
    }
}

/// A connection, whatever it is made of.
trait Connection: Read + Write + Send + 'static {
    fn limit(&self, time: Duration) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

impl Connection for UnixStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

fn accept<C: Connection>(
    mut next: impl FnMut() -> io::Result<C>,
    live: &LiveMount,
    serving: &Arc<AtomicUsize>,
) {
    loop {
        let Ok(connection) = next() else {
            // Out of descriptors, most likely: do not spin.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        if serving.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            serving.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (live, here) = (live.clone(), Arc::clone(serving));
        let spawned = thread::Builder::new()
            .name("braidfs-metrics".into())
            .spawn(move || {
                if let Err(error) = answer(connection, &live) {
                    log::debug!("metrics: {error}");
                }
                here.fetch_sub(1, Ordering::Relaxed);
            });
        if spawned.is_err() {
            serving.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// One request on one connection.
fn answer(mut connection: impl Connection, live: &LiveMount) -> io::Result<()> {
    let until = Instant::now() + TIME_MAX;
    let request = read_head(&mut connection, until)?;
    let (status, with_body) = judge(request.as_deref());
    let (status, body) = match (status, live.get()) {
        ("200 OK", None) => ("503 Service Unavailable", "being unmounted\n".to_owned()),
        ("200 OK", Some(mount)) => {
            let place = mount.mount().mount_point.to_string_lossy().into_owned();
            (status, exposition::text(&mount.sample(), &place))
        }
        (status, _) => (status, format!("{status}; GET /metrics\n")),
    };
    let mut reply = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    if with_body {
        reply.push_str(&body);
    }
    for piece in reply.as_bytes().chunks(PIECE_BYTES) {
        connection.limit(left(until)?)?;
        connection.write_all(piece)?;
    }
    connection.flush()
}

/// The time that is left, or an error.
fn left(until: Instant) -> io::Result<Duration> {
    match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// The head of a request; nothing if it is too long.
fn read_head(connection: &mut impl Connection, until: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= REQUEST_BYTES_MAX {
            return Ok(None);
        }
        connection.limit(left(until)?)?;
        match connection.read(&mut piece)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            len => head.extend_from_slice(&piece[..len]),
        }
    }
    Ok(Some(head))
}

/// The status of a request, and whether its answer has a body.
fn judge(head: Option<&[u8]>) -> (&'static str, bool) {
    let Some(head) = head else {
        return ("431 Request Header Fields Too Large", true);
    };
    let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let words: Vec<&str> = std::str::from_utf8(line)
        .unwrap_or_default()
        .split(' ')
        .collect();
    let [method, target, version] = words[..] else {
        return ("400 Bad Request", true);
    };
    if !version.starts_with("HTTP/1.") {
        return ("400 Bad Request", true);
    }
    let path = target.split('?').next().unwrap_or_default();
    match (method, path) {
        ("GET", "/metrics") => ("200 OK", true),
        ("HEAD", "/metrics") => ("200 OK", false),
        ("GET", _) => ("404 Not Found", true),
        ("HEAD", _) => ("404 Not Found", false),
        _ => ("405 Method Not Allowed", true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_this_machine_can_reach() {
        let unix = Address::Unix(PathBuf::from("/run/m.sock"));
        assert_eq!(Address::parse("unix:/run/m.sock"), Some(unix));
        for text in ["127.0.0.1:9", "127.8.8.8:9", "[::1]:9"] {
            assert!(
                matches!(Address::parse(text), Some(Address::Loopback(_))),
                "{text}"
            );
        }
        for text in [
            "0.0.0.0:9",
            "[::]:9",
            "10.0.0.1:9",
            "localhost:9",
            "127.0.0.1",
            "127.0.0.1:0",
            "unix:m.sock",
            "unix:",
            "",
            ":9",
            "127.0.0.1:99999",
            "[::ffff:127.0.0.1]:9",
        ] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }

    #[test]
    fn requests_are_judged() {
        let status = |head: &str| judge(Some(head.as_bytes())).0;
        for (head, code) in [
            ("GET /metrics HTTP/1.1\r\n\r\n", "200"),
            ("GET /metrics?x=1 HTTP/1.0\r\nHost: a\r\n\r\n", "200"),
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("GET /metrics HTTP/2\r\n\r\n", "400"),
            ("GET /metrics\r\n\r\n", "400"),
            ("\r\n\r\n", "400"),
        ] {
            assert!(status(head).starts_with(code), "{head}");
        }
        assert!(judge(None).0.starts_with("431"));
        assert!(
            judge(Some(b"\xff\xfe \x00 HTTP/1.1\r\n\r\n"))
                .0
                .starts_with("400")
        );
        assert!(!judge(Some(b"HEAD /metrics HTTP/1.1\r\n\r\n")).1);
    }
}
