//! The daemon's end of a trace: events go from the rings to the peer.
//!
//! The thread of the connection does it; nobody waits for it. A peer that reads slowly makes events
//! be dropped, and one that reads nothing for a while loses the connection. Tracing is off when
//! this returns, whatever the reason.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use braidfs_blockdev::trace::{EVENT_BYTES, Event, Filter, Kind, NO_FILE, Session};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

use super::State;
use super::answer::{Said, json, tell};
use crate::fuse;

/// Changes whenever events do.
pub const TRACE_VERSION: u32 = 1;

/// How long events lie in the rings while little happens.
const PAUSE: Duration = Duration::from_millis(10);

/// So many bytes of events are no little.
const LITTLE: usize = 1000 * EVENT_BYTES;

/// What is to be traced.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// Requests by name; all if there is none.
    pub ops: Vec<String>,
    /// Writeback, readahead and commits too.
    pub background: bool,
    /// Only about this inode.
    pub inode: Option<u64>,
}

/// What is told before the events.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    /// [`TRACE_VERSION`].
    pub version: u32,
    /// Names of requests, by their numbers.
    pub ops: Vec<String>,
    /// Names of members, by their index.
    pub members: Vec<String>,
    /// The daemon.
    pub pid: u32,
}

impl Asked {
    fn filter(&self) -> Result<Filter, String> {
        let mut ops = 0;
        for name in &self.ops {
            let number = fuse::op_names().iter().position(|known| known == name);
            let number = number.ok_or_else(|| format!("unknown request '{name}'"))?;
            ops |= 1 << number;
        }
        if self.ops.is_empty() {
            ops = !Filter::BACKGROUND_WORK;
        }
        if self.background {
            ops |= Filter::BACKGROUND_WORK;
        }
        let file = self.inode.unwrap_or(NO_FILE);
        Ok(Filter { ops, file })
    }
}

fn begin(state: &State, asked: &str) -> Result<(Session, String), String> {
    let asked: Asked = serde_json::from_str(asked).map_err(|error| error.to_string())?;
    let filter = asked.filter()?;
    let mount = state.inner.lock().mount.clone();
    let mount = mount.ok_or("the file system is being unmounted")?;
    let stats = mount.file_system().volume().stats();
    let told = Told {
        version: TRACE_VERSION,
        ops: fuse::op_names().iter().map(ToString::to_string).collect(),
        members: stats.devices.into_iter().map(|dev| dev.name).collect(),
        pid: std::process::id(),
    };
    let told = json(&told)?;
    let session = Session::begin(filter);
    let session = session.ok_or("is traced already; only one can do that at a time")?;
    Ok((session, told))
}

/// Sends events until the peer or the session ends.
pub(super) fn stream(stream: &UnixStream, state: &State, asked: &str) -> io::Result<()> {
    let (session, told) = match begin(state, asked) {
        Ok(begun) => begun,
        Err(text) => return tell(stream, Said::Err(text)),
    };
    tell(stream, Ok(told))?;
    // The peer has read that much, and nothing of what comes next.
    (&*stream).read_exact(&mut [0])?;
    let mut sender = Sender::default();
    loop {
        let unmounted = state.inner.lock().mount.is_none();
        let ends = unmounted || has_shut_down(stream);
        if ends {
            session.stop();
        }
        sender.collect(&session);
        if ends {
            let over = [u64::from(unmounted), 0, 0, 0, 0];
            sender.tell(session.now(), Kind::Over, over);
        }
        let little = sender.bytes.len() < LITTLE;
        sender.send(stream)?;
        if ends {
            return Ok(());
        }
        if little {
            thread::sleep(PAUSE);
        }
    }
}

/// Whether the peer has shut its side down, or is gone.
fn has_shut_down(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let seen = recv(stream.as_raw_fd(), &mut [0], flags);
    !matches!(seen, Ok(1..) | Err(Errno::EAGAIN | Errno::EINTR))
}

#[derive(Default)]
struct Sender {
    bytes: Vec<u8>,
    /// Threads whose names were told.
    named: HashSet<u32>,
    dropped: u64,
}

impl Sender {
    fn collect(&mut self, session: &Session) {
        let before = session.now();
        let mut last = 0;
        self.dropped += session.drain(|event| {
            if event.thread != last {
                last = event.thread;
                if self.named.insert(last) {
                    self.bytes.extend_from_slice(&name_of(last).encode());
                }
            }
            self.bytes.extend_from_slice(&event.encode());
        });
        self.tell(before, Kind::Tick, [self.dropped, 0, 0, 0, 0]);
    }

    fn tell(&mut self, at: u64, kind: Kind, values: [u64; 5]) {
        let event = Event {
            at,
            kind,
            values,
            ..Event::default()
        };
        self.bytes.extend_from_slice(&event.encode());
    }

    fn send(&mut self, mut stream: &UnixStream) -> io::Result<()> {
        let sent = stream.write_all(&self.bytes);
        self.bytes.clear();
        sent
    }
}

/// Tells what a thread is called, in as many bytes as the kernel has for it.
fn name_of(thread: u32) -> Event {
    let name = std::fs::read(format!("/proc/self/task/{thread}/comm")).unwrap_or_default();
    let mut bytes = [0; 16];
    let name = name.trim_ascii_end();
    let len = name.len().min(bytes.len());
    bytes[..len].copy_from_slice(&name[..len]);
    let whole = u128::from_le_bytes(bytes);
    let half = |shift: u32| u64::try_from(whole >> shift & u128::from(u64::MAX)).unwrap_or(0);
    Event {
        kind: Kind::Thread,
        thread,
        values: [half(0), half(64), 0, 0, 0],
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_becomes_bits() {
        let filter = |ops: &[&str], background, inode| {
            let ops = ops.iter().map(ToString::to_string).collect();
            let asked = Asked {
                ops,
                background,
                inode,
            };
            asked.filter().map(|filter| (filter.ops, filter.file))
        };
        assert_eq!(filter(&[], true, None), Ok((u64::MAX, NO_FILE)));
        assert_eq!(filter(&[], false, Some(7)), Ok((u64::MAX >> 1, 7)));
        assert_eq!(
            filter(&["lookup", "getattr"], false, None),
            Ok((5, NO_FILE))
        );
        assert!(filter(&["frobnicate"], false, None).is_err());
        assert!(fuse::op_names().len() < 63, "each has a bit");
    }
}
