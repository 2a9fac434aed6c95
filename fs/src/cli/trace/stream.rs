//! Events from the daemon, put in order.
//!
//! An event is handed on when the daemon has looked at all its rings a while later: a thread may
//! have been held up between the time that it noted and the ring.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use braidfs_blockdev::trace::{EVENT_BYTES, Event, Kind};

use super::super::control::{self, Asked, TRACE_VERSION, Told};
use super::super::devices::io_text;
use super::super::exit::{self, CliError};
use crate::fuse::mounts::MountEntry;

/// How long events are held back.
const HOLD_NS: u64 = 50_000_000;

/// Events are put in order again when there is so much more time to hand on.
const STEP_NS: u64 = 20_000_000;

/// How long one look for events waits; after that signals are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Bytes that are read at a time: whole events.
const READ_BYTES: usize = 4096 * EVENT_BYTES;

pub(super) struct Stream {
    place: PathBuf,
    connection: UnixStream,
    bytes: Vec<u8>,
    /// Of them not decoded yet: less than an event.
    rest: usize,
    held: Vec<Event>,
    /// Up to then, everything is here.
    complete_ns: u64,
    handed_on_ns: u64,
    dropped: u64,
    over: Option<Event>,
    is_at_end: bool,
}

impl Stream {
    /// Has the daemon begin.
    pub(super) fn begin(
        entry: &MountEntry,
        connection: UnixStream,
        asked: &Asked,
    ) -> Result<(Self, Told), CliError> {
        let place = entry.mount_point.clone();
        let asked = serde_json::to_string(asked);
        let asked = asked.map_err(|error| exit::system(format!("JSON: {error}")))?;
        let told: Told = control::told_json(&place, &connection, &format!("trace {asked}"))?;
        if told.version != TRACE_VERSION {
            let place = place.display();
            return Err(exit::usage(format!(
                "{place}: its daemon is of another version of braidfs; mount it anew to trace it"
            )));
        }
        // The answer has been read; nothing of the events, which come now.
        let begun = (&connection).write_all(b"\n");
        begun.map_err(|error| exit::usage(format!("{}: {}", place.display(), io_text(&error))))?;
        Ok((Self::new(place, connection), told))
    }

    fn new(place: PathBuf, connection: UnixStream) -> Self {
        Self {
            place,
            connection,
            bytes: vec![0; READ_BYTES],
            rest: 0,
            held: Vec::new(),
            complete_ns: 0,
            handed_on_ns: 0,
            dropped: 0,
            over: None,
            is_at_end: false,
        }
    }

    /// Asks the daemon to stop; what is left still comes.
    pub(super) fn end(&self) {
        if let Err(error) = self.connection.shutdown(Shutdown::Write) {
            log::debug!("{}: {error}", self.place.display());
        }
    }

    /// Waits a moment for events, not beyond `until`; false if there will be no more.
    pub(super) fn receive(&mut self, until: Option<Instant>) -> Result<bool, CliError> {
        let left = until.map_or(LOOK, |until| {
            until.saturating_duration_since(Instant::now())
        });
        let wait = left.clamp(Duration::from_millis(1), LOOK);
        let timed = self.connection.set_read_timeout(Some(wait));
        let read = timed.and_then(|()| self.connection.read(&mut self.bytes[self.rest..]));
        let count = match read {
            Ok(0) => {
                self.is_at_end = true;
                return Ok(false);
            }
            Ok(count) => count,
            Err(error) if is_passing(&error) => return Ok(true),
            Err(error) => {
                let place = self.place.display();
                return Err(exit::usage(format!("{place}: {}", io_text(&error))));
            }
        };
        let len = self.rest + count;
        let whole = len - len % EVENT_BYTES;
        let (events, _) = self.bytes[..whole].as_chunks::<EVENT_BYTES>();
        for event in events.iter().filter_map(Event::decode) {
            match event.kind {
                Kind::Tick => {
                    self.complete_ns = event.at;
                    self.dropped = event.values[0];
                }
                Kind::Over => self.over = Some(event),
                _ => self.held.push(event),
            }
        }
        self.bytes.copy_within(whole..len, 0);
        self.rest = len - whole;
        Ok(true)
    }

    /// Events that can be handed on, in order.
    pub(super) fn take_ready(&mut self) -> Vec<Event> {
        let mut until = self.complete_ns.saturating_sub(HOLD_NS);
        if self.is_at_end {
            until = u64::MAX;
        } else if until < self.handed_on_ns + STEP_NS {
            return Vec::new();
        }
        self.handed_on_ns = until;
        self.held.sort_by_key(|event| event.at);
        let ready = self.held.partition_point(|event| event.at < until);
        let later = self.held.split_off(ready);
        std::mem::replace(&mut self.held, later)
    }

    /// Events that the daemon had no room for.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// What is to be said when there are no more events. `asked`: we wanted it to end.
    pub(super) fn farewell(&self, asked: bool) -> Result<(), CliError> {
        if self.dropped > 0 {
            log::warn!(
                "{} events came faster than they could be taken and are missing; ask for less with \
                 --op or --file",
                self.dropped
            );
        }
        match self.over {
            Some(over) if over.values[0] == 1 && !asked => {
                log::warn!("{}: is being unmounted", self.place.display());
                Ok(())
            }
            Some(_) => Ok(()),
            None => Err(self.gone()),
        }
    }

    /// The daemon ended without a word.
    pub(super) fn gone(&self) -> CliError {
        let place = self.place.display();
        exit::system(format!("{place}: its daemon has gone, or does not answer"))
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Stream::new(PathBuf::from("/mnt"), ours), theirs)
    }

    fn event(at: u64, kind: Kind, value: u64) -> [u8; EVENT_BYTES] {
        let values = [value, 0, 0, 0, 0];
        let event = Event {
            at,
            kind,
            values,
            ..Event::default()
        };
        event.encode()
    }

    #[test]
    fn events_are_put_in_order_and_held_back() {
        let (mut stream, mut daemon) = stream();
        let mut bytes = Vec::new();
        for at in [30, 10, 20, 100_000_000] {
            bytes.extend(event(at, Kind::Hit, at));
        }
        // In pieces that are no whole events.
        let (first, second) = bytes.split_at(100);
        daemon.write_all(first).unwrap();
        assert!(stream.receive(None).unwrap());
        assert!(stream.take_ready().is_empty(), "no time is complete");
        daemon.write_all(second).unwrap();
        daemon
            .write_all(&event(120_000_000, Kind::Tick, 7))
            .unwrap();
        assert!(stream.receive(None).unwrap());
        let times: Vec<u64> = stream.take_ready().iter().map(|event| event.at).collect();
        assert_eq!(times, [10, 20, 30]);
        daemon.write_all(&event(1, Kind::Over, 0)).unwrap();
        drop(daemon);
        while stream.receive(None).unwrap() {}
        assert_eq!(stream.take_ready().len(), 1);
        assert_eq!((stream.dropped(), stream.farewell(true)), (7, Ok(())));
    }

    #[test]
    fn a_daemon_that_goes_without_a_word_is_an_error() {
        let (mut stream, daemon) = stream();
        assert!(stream.receive(None).unwrap(), "nothing yet");
        drop(daemon);
        assert!(!stream.receive(None).unwrap());
        assert_eq!(stream.farewell(false).unwrap_err().code, exit::SYSTEM);
    }
}
