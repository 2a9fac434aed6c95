//! `braidfs scrub`: reads and verifies everything, of a mounted file system by way of its daemon,
//! of an unmounted one by itself.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use braidfs_blockdev::{OpenMode, Volume};
use nix::sys::signal::{SigSet, Signal};
use serde_json::Value;

use super::control::{self, Patience};
use super::devices::{device_list, display_list, io_text, open_all};
use super::exit::{
    CliError, FSCK_CANCELLED, FSCK_CORRECTED, FSCK_ERRORS, FSCK_OPERATIONAL, FSCK_USAGE,
};
use super::members::find_members;
use super::print;
use super::progress::ByteProgress;
use super::size::{format_size, parse_size};
use super::umount;
use crate::fuse::mounts::MountEntry;
use crate::scrub::ScrubOptions;
use crate::{FileSystem, MountError, MountOptions};

/// How often progress is looked at.
const POLL: Duration = Duration::from_millis(250);

/// Page cache of a scrub without a mount, in bytes.
const CACHE_BYTES: u64 = 64 << 20;

/// Read and verify everything, repair bad copies from good ones. Exit codes: 0 clean, 1 repaired, 4
/// errors left, 8 could not do it, 16 wrong usage, 32 paused or canceled.
#[derive(clap::Args, Debug)]
pub struct ScrubArgs {
    /// Read no more than this per second: 50M, 1G
    #[arg(long, value_name = "SIZE")]
    pub rate: Option<String>,
    /// Change nothing
    #[arg(short = 'n')]
    pub no_changes: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Begin it and return; of a mounted file system
    #[arg(short = 'b', long)]
    pub background: bool,
    /// Show how far it is, or what the last one found
    #[arg(long, group = "verb")]
    pub status: bool,
    /// Stop for now
    #[arg(long, group = "verb")]
    pub pause: bool,
    /// Go on with what was paused, or cut off by an unmount
    #[arg(long, group = "verb")]
    pub resume: bool,
    /// Give it up
    #[arg(long, group = "verb")]
    pub cancel: bool,
    /// Where it is mounted; or member devices or image files of an unmounted file system, of which
    /// one is enough where the others lie beside it
    #[arg(required = true, value_name = "MOUNTPOINT|DEV")]
    pub places: Vec<OsString>,
}

fn operational(message: impl Into<String>) -> CliError {
    CliError::new(FSCK_OPERATIONAL, message)
}

/// What is scrubbed.
enum Target {
    Mounted(MountEntry),
    Unmounted(Arc<FileSystem>, String),
}

/// `braidfs scrub`.
pub fn run(args: &ScrubArgs) -> Result<(), CliError> {
    let usage = |message: String| CliError::new(FSCK_USAGE, message);
    let rate_bytes = match &args.rate {
        None => None,
        Some(text) => {
            let bytes = parse_size(text.strip_suffix("/s").unwrap_or(text));
            Some(
                bytes
                    .filter(|&bytes| bytes > 0)
                    .ok_or_else(|| usage(format!("--rate {text}: is no size, such as 50M")))?,
            )
        }
    };
    let options = ScrubOptions {
        rate_bytes,
        no_repair: args.no_changes,
        resume: args.resume,
        since_mount: false,
    };
    if let [place] = &args.places[..]
        && let Ok(entry) = umount::find(Path::new(place))
    {
        let target = Target::Mounted(entry);
        if args.status {
            return show(&target, args.json);
        }
        if args.pause || args.cancel {
            return target.order(if args.pause { "pause" } else { "cancel" });
        }
        let signals = watch_signals(args.background)?;
        target.start(options)?;
        return match signals {
            Some(signals) => follow(&target, args.json, &signals),
            None => Ok(()),
        };
    }
    if args.pause || args.cancel || args.background {
        let place = args.places[0].to_string_lossy();
        return Err(usage(format!("{place}: no braidfs is mounted there")));
    }
    let paths = device_list(&args.places).map_err(usage)?;
    let members = find_members(&paths).map_err(operational)?;
    let paths: Vec<PathBuf> = members.into_iter().map(|member| member.path).collect();
    unmounted(&paths, args, options)
}

/// Assembles the volume without writing to it; labels that are damaged are found as they are.
fn assemble(paths: &[PathBuf], for_writing_later: bool) -> Result<Arc<Volume>, CliError> {
    let mode = OpenMode {
        read_only: true,
        for_writing_later,
        direct: true,
        ..OpenMode::default()
    };
    let devices = open_all(paths, mode).map_err(operational)?;
    Volume::assemble(devices, true).map_err(|error| operational(error.to_string()))
}

fn mount_error(error: &MountError) -> CliError {
    match error {
        MountError::Metadata(_) => CliError::new(FSCK_ERRORS, error.to_string()),
        _ => operational(error.to_string()),
    }
}

fn unmounted(paths: &[PathBuf], args: &ScrubArgs, options: ScrubOptions) -> Result<(), CliError> {
    // Before there are other threads, which would take the signals.
    let signals = watch_signals(args.status)?;
    let volume = assemble(paths, !args.no_changes && !args.status)?;
    let mount_options = MountOptions {
        read_only: true,
        cache_bytes: CACHE_BYTES,
        ..MountOptions::default()
    };
    let fs = FileSystem::mount(volume, mount_options).map_err(|error| mount_error(&error))?;
    let target = Target::Unmounted(Arc::clone(&fs), display_list(paths));
    let result = if args.status {
        show(&target, args.json)
    } else {
        scrub_unmounted(&target, &fs, args, options, signals.as_ref())
    };
    let closed = fs.unmount();
    result.and(closed.map_err(|error| operational(format!("closing the volume: {error}"))))
}

fn scrub_unmounted(
    target: &Target,
    fs: &FileSystem,
    args: &ScrubArgs,
    mut options: ScrubOptions,
    signals: Option<&Receiver<()>>,
) -> Result<(), CliError> {
    if !args.no_changes {
        // This mends labels and fixed blocks; what it mended is counted.
        fs.make_writable().map_err(|error| mount_error(&error))?;
        options.since_mount = true;
    }
    target.start(options)?;
    match signals {
        Some(signals) => follow(target, args.json, signals),
        None => Ok(()),
    }
}

/// From here on, what would end the process comes by a channel.
fn watch_signals(background: bool) -> Result<Option<Receiver<()>>, CliError> {
    if background {
        return Ok(None);
    }
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    let failed = |error: nix::Error| operational(format!("signals: {error}"));
    signals.thread_block().map_err(failed)?;
    let (to, from) = channel();
    std::thread::Builder::new()
        .name("braidfs-signals".into())
        .spawn(
            move || {
                while signals.wait().is_ok() && to.send(()).is_ok() {}
            },
        )
        .map_err(|error| operational(format!("signals: {error}")))?;
    Ok(Some(from))
}

impl Target {
    fn name(&self) -> String {
        match self {
            Target::Mounted(entry) => entry.mount_point.display().to_string(),
            Target::Unmounted(_, name) => name.clone(),
        }
    }

    /// Asks the daemon; its answer is a line.
    fn ask(&self, entry: &MountEntry, words: &str) -> Result<String, CliError> {
        let place = self.name();
        let stream = control::connect(entry).ok_or_else(|| {
            operational(format!(
                "{place}: its daemon cannot be reached; is it braidfs, alive, and yours?"
            ))
        })?;
        control::ask(&stream, &format!("scrub {words}"), Patience::Short)
            .map_err(|error| operational(format!("{place}: {}", io_text(&error))))?
            .map_err(|error| operational(format!("{place}: {error}")))
    }

    fn start(&self, options: ScrubOptions) -> Result<(), CliError> {
        match self {
            Target::Mounted(entry) => {
                let rate = options
                    .rate_bytes
                    .map_or("-".to_owned(), |rate| rate.to_string());
                let repair = if options.no_repair { "look" } else { "repair" };
                let verb = if options.resume { "resume" } else { "start" };
                self.ask(entry, &format!("{verb} {repair} {rate}"))
                    .map(drop)
            }
            Target::Unmounted(fs, name) => fs
                .scrub_start(options)
                .map_err(|errno| operational(format!("{name}: {}", control::scrub_refusal(errno)))),
        }
    }

    fn status(&self) -> Result<Value, CliError> {
        let place = self.name();
        let odd =
            |error: serde_json::Error| operational(format!("{place}: unexpected answer: {error}"));
        match self {
            Target::Mounted(entry) => {
                serde_json::from_str(&self.ask(entry, "status")?).map_err(odd)
            }
            Target::Unmounted(fs, _) => serde_json::to_value(fs.scrub_status()).map_err(odd),
        }
    }

    fn order(&self, verb: &str) -> Result<(), CliError> {
        match self {
            Target::Mounted(entry) => self.ask(entry, verb).map(drop),
            // Ended at the same moment is as well.
            Target::Unmounted(fs, _) => fs.scrub_pause().or(Ok(())),
        }
    }
}

fn number(status: &Value, field: &str) -> u64 {
    status.get(field).and_then(Value::as_u64).unwrap_or(0)
}

fn word<'a>(status: &'a Value, field: &str) -> &'a str {
    status.get(field).and_then(Value::as_str).unwrap_or("")
}

/// Waits for the end, shows progress, and the result.
fn follow(target: &Target, json: bool, signals: &Receiver<()>) -> Result<(), CliError> {
    let mut progress = match json {
        true => None,
        false => Some(ByteProgress::new(done_bytes(&target.status()?))),
    };
    let status = loop {
        let status = target.status()?;
        if word(&status, "state") != "running" {
            break status;
        }
        if let Some(progress) = &mut progress {
            let (done, total) = (done_bytes(&status), number(&status, "total_bytes"));
            let errors = format!(", {} errors", number(&status, "found"));
            progress.show(done, total, &errors);
        }
        match signals.recv_timeout(POLL) {
            Ok(()) => {
                // It may have ended at this moment.
                let paused = target.order("pause");
                let status = target.status()?;
                if word(&status, "state") == "running" {
                    paused?;
                }
                break status;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(POLL),
        }
    };
    drop(progress);
    print_result(target, &status, json)?;
    match (word(&status, "state"), number(&status, "left")) {
        ("finished", 1..) => Err(CliError::new(FSCK_ERRORS, "")),
        ("finished", 0) if number(&status, "repaired") > 0 => {
            Err(CliError::new(FSCK_CORRECTED, ""))
        }
        ("finished", 0) => Ok(()),
        ("paused" | "canceled", _) => Err(CliError::new(FSCK_CANCELLED, "")),
        _ => Err(operational(format!(
            "{}: the scrub could not go on: {}",
            target.name(),
            word(&status, "failure")
        ))),
    }
}

fn done_bytes(status: &Value) -> u64 {
    number(status, "data_bytes") + number(status, "metadata_bytes")
}

fn show(target: &Target, json: bool) -> Result<(), CliError> {
    print_result(target, &target.status()?, json)
}

fn print_result(target: &Target, status: &Value, json: bool) -> Result<(), CliError> {
    if json {
        return print::json(status);
    }
    print::text(&render(&target.name(), status))
}

/// The numbers of a scrub in a few words: what `info` shows, too.
pub fn summary_text(status: &Value) -> String {
    let state = word(status, "state");
    if state == "never" {
        return "never".to_owned();
    }
    format!(
        "{state} {}, {} read, {} errors found, {} repaired, {} left",
        date_text(number(status, "ended_unix")),
        format_size(done_bytes(status)),
        number(status, "found"),
        number(status, "repaired"),
        number(status, "left"),
    )
}

fn render(name: &str, status: &Value) -> String {
    let mut out = format!("scrub of {name}: {}\n", summary_text(status));
    if word(status, "state") == "never" {
        return out;
    }
    let seconds = number(status, "active_ms") / 1000;
    let rate = done_bytes(status) * 1000 / number(status, "active_ms").max(1);
    out.push_str(&format!(
        "  begun     {}\n  worked    {}:{:02} min, {}/s\n  data      {}\n  metadata  {}\n",
        date_text(number(status, "started_unix")),
        seconds / 60,
        seconds % 60,
        format_size(rate),
        format_size(number(status, "data_bytes")),
        format_size(number(status, "metadata_bytes")),
    ));
    let errors = status.get("errors").and_then(Value::as_array);
    for error in errors.into_iter().flatten() {
        let mut line = format!(
            "{} at byte {}: {}",
            word(error, "device"),
            number(error, "offset_bytes"),
            word(error, "what")
        );
        if let Some(ino) = error.get("ino").and_then(Value::as_u64) {
            let at = number(error, "file_offset_bytes");
            line.push_str(&format!(", inode {ino} at byte {at}"));
        }
        let paths = error.get("paths").and_then(Value::as_array);
        for path in paths.into_iter().flatten().filter_map(Value::as_str) {
            line.push_str(&format!(", {path}"));
        }
        let repaired = error.get("repaired").and_then(Value::as_bool);
        line.push_str(if repaired == Some(true) {
            " (repaired)\n"
        } else {
            " (left)\n"
        });
        out.push_str(&line);
    }
    out
}

/// Seconds since 1970 as a date, in UTC.
fn date_text(unix: u64) -> String {
    let (days, second) = (unix / 86_400, unix % 86_400);
    // Years that begin in March, so that the day a leap year has more is the last one; 146,097 days
    // are 400 years. Day 0 is then March 1st of the year 0.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!(
        "{year}-{month:02}-{date:02} {:02}:{:02}:{:02} UTC",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (unix, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_799, "2000-02-29 23:59:59 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(date_text(unix), text);
        }
    }
}
