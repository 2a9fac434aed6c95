//! Talk to a service manager, as sd_notify(3) describes it: lines to the datagram socket that
//! NOTIFY_SOCKET names. Without it nothing happens, and nothing that goes wrong here matters to the
//! mount.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use log::debug;

/// How often, while the daemon ends, more time is asked for, and how much.
const EXTEND_EVERY: Duration = Duration::from_secs(10);
const EXTEND_BY: Duration = Duration::from_secs(60);

/// A manager that does not read must not stop us.
const PATIENCE: Duration = Duration::from_secs(5);

/// The service manager, if there is one.
#[derive(Clone, Debug)]
pub struct Manager {
    address: Option<OsString>,
}

impl Manager {
    /// The one that waits for this process, which it started itself.
    pub fn of_this_process() -> Self {
        Self {
            address: std::env::var_os("NOTIFY_SOCKET"),
        }
    }

    /// Nobody: a background daemon is not what the manager of its caller waits for.
    pub fn none() -> Self {
        Self { address: None }
    }

    /// The mount is usable.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={status}"));
    }

    /// The end has begun. More time is asked for until the value returned is dropped.
    pub fn stopping(&self, status: &str) -> Stopping {
        let (alive, dropped) = mpsc::channel();
        self.tell(&format!("STOPPING=1\nSTATUS={status}"));
        if self.address.is_some() {
            let manager = self.clone();
            let extend = move || {
                let message = format!("EXTEND_TIMEOUT_USEC={}", EXTEND_BY.as_micros());
                manager.tell(&message);
                while dropped.recv_timeout(EXTEND_EVERY) == Err(RecvTimeoutError::Timeout) {
                    manager.tell(&message);
                }
            };
            let spawned = thread::Builder::new()
                .name("braidfs-notify".into())
                .spawn(extend);
            if let Err(error) = spawned {
                debug!("the service manager is not asked for more time: {error}");
            }
        }
        Stopping { _alive: alive }
    }

    fn tell(&self, lines: &str) {
        if let Some(address) = &self.address
            && let Err(error) = send(address.as_bytes(), lines)
        {
            debug!("service manager: {error}");
        }
    }
}

/// The daemon is about to end, and needs the time.
pub struct Stopping {
    _alive: mpsc::Sender<()>,
}

/// A name that begins with `@` is an abstract one.
fn send(name: &[u8], lines: &str) -> io::Result<()> {
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.send_to_addr(lines.as_bytes(), &address).map(drop)
}
