//! `braidfs trace`: follows single requests from the kernel through cache, kiobufs, merges, splits
//! and devices to the answer.
//!
//! | file | what |
//! | --- | --- |
//! | `stream.rs` | events from the daemon, put in order |
//! | `ties.rs` | which writes a writeback writes, which writebacks an fsync waited for |
//! | `chains.rs`, `steps.rs` | from events to what one request did |
//! | `text.rs` | that as text |
//! | `perfetto.rs`, `slices.rs`, `tracks.rs` | all events as a file for Perfetto |
//!
//! The daemon only records while this is connected. What it sends is in no order of time between
//! threads, and is put in order here; so what is shown is a moment late.

mod chains;
mod perfetto;
mod slices;
mod steps;
mod stream;
mod text;
mod ties;
mod tracks;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use braidfs_blockdev::trace::{Event, Kind};
use clap::builder::PossibleValuesParser;
use nix::sys::signal::Signal;
use nix::sys::stat::{major, minor};

use super::control::{self, Asked};
use super::devices::io_text;
use super::exit::{self, CliError};
use super::{print, signals, stats};
use crate::fuse;
use crate::fuse::mounts::MountEntry;
use chains::Chains;
use perfetto::Recording;
use stream::Stream;

/// How `--op` calls writeback, which is no request.
const WRITEBACK: &str = "writeback";

/// Requests that wait for writeback, so that they are shown with it.
const WAIT_FOR_WRITEBACK: [&str; 3] = ["fsync", "fsyncdir", "syncfs"];

/// How long the daemon may take to send what is left.
const FAREWELL: Duration = Duration::from_secs(10);

/// Follow single requests of a mounted file system: through cache, kiobufs, merges, splits and
/// devices to the answer, with a time for each step. Ctrl-C ends it
#[derive(clap::Args, Debug)]
pub struct TraceArgs {
    /// Only such requests, as 'braidfs stats' calls them, or 'writeback'; may be repeated
    #[arg(long, value_name = "OP", value_parser = op_parser(), hide_possible_values = true)]
    pub op: Vec<String>,
    /// Only requests about this file, and its writeback
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Stop after so many seconds
    #[arg(long = "for", value_name = "SECONDS", value_parser = stats::interval)]
    pub duration: Option<Duration>,
    /// Stop after so many requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// As JSON, one object a line for each request
    #[arg(long, conflicts_with = "perfetto")]
    pub json: bool,
    /// Show nothing, but write a file for <https://ui.perfetto.dev>
    #[arg(long, value_name = "FILE")]
    pub perfetto: Option<PathBuf>,
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: OsString,
}

fn op_parser() -> PossibleValuesParser {
    let mut names = fuse::op_names().to_vec();
    names.push(WRITEBACK);
    PossibleValuesParser::new(names)
}

impl TraceArgs {
    fn shows_writeback(&self) -> bool {
        self.op.is_empty() || self.op.iter().any(|op| op == WRITEBACK)
    }

    fn asked(&self, inode: Option<u64>) -> Asked {
        let waits = |op: &String| WAIT_FOR_WRITEBACK.contains(&op.as_str());
        let requests = self.op.iter().filter(|op| *op != WRITEBACK);
        let mut ops: Vec<String> = requests.cloned().collect();
        if ops.is_empty() && !self.op.is_empty() {
            // Writeback alone; no request that there is.
            ops.push("init".to_owned());
        }
        Asked {
            ops,
            background: self.shows_writeback() || self.op.iter().any(waits),
            inode,
        }
    }
}

/// `braidfs trace`.
pub fn run(args: &TraceArgs) -> Result<(), CliError> {
    let (entry, connection) = control::reach(Path::new(&args.mount_point))?;
    let inode = args.file.as_deref().map(|path| inode_of(path, &entry));
    let inode = inode.transpose()?;
    let sink = match &args.perfetto {
        // What is wrong with it is told before anything is recorded.
        Some(path) => Some((path, File::create(path).map_err(|e| cannot(path, &e))?)),
        None => None,
    };
    let ended = signals::watch()?;
    let (stream, told) = Stream::begin(&entry, connection, &args.asked(inode))?;
    let mut trace = Trace {
        left: args.count.unwrap_or(u64::MAX),
        until: args.duration.map(|duration| Instant::now() + duration),
        ended,
        signal: None,
        output: match sink {
            Some(_) => Output::File(Recording::default()),
            None => Output::Lines {
                chains: Box::new(Chains::new(told.clone(), args.shows_writeback())),
                json: args.json,
            },
        },
    };
    let followed = trace.follow(stream);
    if let (Output::File(recording), Some((path, file))) = (trace.output, sink) {
        let written = recording.write(&told, &entry.mount_point, file);
        written.map_err(|error| cannot(path, &error))?;
    }
    followed?;
    match trace.signal {
        // The usual way to end it.
        None | Some(Signal::SIGINT) => Ok(()),
        Some(signal) => Err(exit::ended_by(signal)),
    }
}

fn cannot(path: &Path, error: &std::io::Error) -> CliError {
    exit::usage(format!("{}: {}", path.display(), io_text(error)))
}

fn inode_of(path: &Path, entry: &MountEntry) -> Result<u64, CliError> {
    let meta = fs::metadata(path).map_err(|error| cannot(path, &error))?;
    let of_file = (major(meta.dev()), minor(meta.dev()));
    if of_file != (u64::from(entry.dev.0), u64::from(entry.dev.1)) {
        let (path, place) = (path.display(), entry.mount_point.display());
        return Err(exit::usage(format!(
            "{path}: is not in the file system that is mounted at {place}"
        )));
    }
    Ok(meta.ino())
}

enum Output {
    Lines { chains: Box<Chains>, json: bool },
    File(Recording),
}

/// A trace under way.
struct Trace {
    /// Requests that are still wanted.
    left: u64,
    until: Option<Instant>,
    ended: Receiver<Signal>,
    signal: Option<Signal>,
    output: Output,
}

impl Trace {
    /// Until there is a reason to end, and nothing is left.
    fn follow(&mut self, mut stream: Stream) -> Result<(), CliError> {
        let mut patience: Option<Instant> = None;
        loop {
            let wanted = self.wanted();
            if !wanted && patience.is_none() {
                stream.end();
                patience = Some(Instant::now() + FAREWELL);
            }
            if patience.is_some_and(|until| Instant::now() > until) {
                return Err(stream.gone());
            }
            let goes_on = stream.receive(self.until)?;
            for event in stream.take_ready() {
                self.take(&event)?;
            }
            if !goes_on {
                break;
            }
        }
        if let Output::File(recording) = &mut self.output {
            recording.note_dropped(stream.dropped());
        }
        stream.farewell(patience.is_some())
    }

    fn wanted(&mut self) -> bool {
        if let Ok(signal) = self.ended.try_recv() {
            self.signal = Some(signal);
        }
        let late = self.until.is_some_and(|until| Instant::now() >= until);
        let full = matches!(&self.output, Output::File(recording) if recording.is_full());
        self.left > 0 && self.signal.is_none() && !late && !full
    }

    fn take(&mut self, event: &Event) -> Result<(), CliError> {
        match &mut self.output {
            Output::File(recording) => {
                let begun = recording.take(event);
                let ended = begun && event.kind == Kind::Reply;
                self.left = self.left.saturating_sub(u64::from(ended));
            }
            Output::Lines { chains, json } => {
                let Some(chain) = chains.take(event).filter(|_| self.left > 0) else {
                    return Ok(());
                };
                self.left -= u64::from(!chain.is_background());
                let text = match json {
                    true => serde_json::to_string(&chain).map(|line| line + "\n"),
                    false => Ok(text::render(&chain)),
                };
                let text = text.map_err(|error| exit::system(format!("JSON: {error}")))?;
                if !print::more(&text)? {
                    // Nobody reads any more.
                    self.left = 0;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(op: &[&str]) -> TraceArgs {
        TraceArgs {
            op: op.iter().map(ToString::to_string).collect(),
            file: None,
            duration: None,
            count: None,
            json: false,
            perfetto: None,
            mount_point: OsString::new(),
        }
    }

    #[test]
    fn background_work_is_asked_for_where_it_is_shown_or_waited_for() {
        for (op, background, shown) in [
            (&[][..], true, true),
            (&["write"], false, false),
            (&["fsync"], true, false),
            (&["write", "writeback"], true, true),
            (&["writeback"], true, true),
        ] {
            let args = args(op);
            let asked = args.asked(None);
            assert_eq!(asked.background, background, "{op:?}");
            assert_eq!(args.shows_writeback(), shown, "{op:?}");
            assert_eq!(asked.ops.is_empty(), op.is_empty(), "{op:?}");
        }
    }
}
