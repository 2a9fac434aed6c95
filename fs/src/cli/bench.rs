//! `braidfs bench`: what the members can do, what FUSE can do, what braidfs makes of both, and
//! which of them limits. `load.rs` has the workloads, `grade.rs` the reckoning.
//!
//! The daemon measures the members (see [`crate::MemberPace`]); a null FUSE server in this process
//! shows what FUSE can do. Then the same loads run on the null server and on braidfs.

mod grade;
mod load;

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};

use super::control::{self, Patience};
use super::exit::{self, CliError};
use super::progress::Line;
use super::size::{format_size, parse_size};
use super::{print, signals};
use crate::MemberPace;
use crate::fuse::null::{self, NullOptions};
use crate::fuse::{CacheMode, Unmount, mounts, threads_default, unmount};
use grade::Report;
use load::{LOADS, Load, Paces};

/// Least and most that is written, in bytes.
const SIZE: std::ops::RangeInclusive<u64> = (16 << 20)..=(64 << 30);

/// Memory of the null server for file data, in MiB.
const ARENA_MIB: usize = 64;

/// How long the null server may take to be mounted.
const MOUNT_PATIENCE: Duration = Duration::from_secs(10);

/// How often it is looked whether a signal came.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);

/// Steps of the members that the daemon measures in one go.
const MEMBER_STEPS: u32 = 4;

/// Measure what the members can do, what FUSE can do and what braidfs does, and say which of them
/// limits. It writes to free space and to a file of its own, which it removes, and drops braidfs's
/// cache; run it while nothing else is going on. Exit codes: 0 measured, 1 wrong usage or not
/// reachable, 2 the system refused something, 128 + N ended by signal N.
#[derive(clap::Args, Debug)]
pub struct BenchArgs {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    mount_point: OsString,
    /// How much is written and read, at the most; twice as much has to be free
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    size: u64,
    /// How long each step may take
    #[arg(long, value_name = "SECONDS", default_value = "2",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Where in the file system the file is made (its root unless given)
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).filter(|bytes| SIZE.contains(bytes));
    bytes.ok_or_else(|| {
        let (least, most) = (format_size(*SIZE.start()), format_size(*SIZE.end()));
        format!("expected a size from {least} to {most}")
    })
}

/// `braidfs bench`.
pub fn run(args: &BenchArgs) -> Result<(), CliError> {
    let place = Path::new(&args.mount_point);
    let (entry, stream) = control::reach(place)?;
    let directory = directory(args, &entry.mount_point)?;
    check_room(&directory, args.size)?;
    // Before there are other threads, which would take the signals.
    let ended = watch_signals()?;
    let limit = Duration::from_secs(args.seconds);
    let mut progress = Progress::new(limit);
    progress.begin("members", "large and small, straight from the daemon");
    let members = measure_members(args, &entry.mount_point, stream, &ended)?;
    progress.done += MEMBER_STEPS;
    let bounds = load::Bounds {
        bytes: args.size,
        limit,
        ended: &ended,
    };
    let drop_caches = || {
        let (entry, stream) = control::reach(place)?;
        control::told(&entry.mount_point, &stream, "drop-caches", Patience::Long).map(drop)
    };
    let fuse = match NullMount::new() {
        Ok(null) => Some(measure(
            "FUSE",
            null.place(),
            &bounds,
            &mut progress,
            || Ok(()),
        )?),
        Err(why) => {
            progress
                .line
                .say(&format!("FUSE by itself cannot be measured: {why}"));
            None
        }
    };
    let braidfs = measure("braidfs", &directory, &bounds, &mut progress, drop_caches)?;
    drop(progress);
    let report = Report::new(&entry.mount_point, args.size, &members, fuse, braidfs);
    match args.json {
        true => print::json(&report),
        false => print::text(&report.render()),
    }
}

fn directory(args: &BenchArgs, mount_point: &Path) -> Result<PathBuf, CliError> {
    let Some(given) = &args.directory else {
        return Ok(mount_point.to_owned());
    };
    let refuse = |what: String| exit::usage(format!("{}: {what}", given.display()));
    let path =
        std::fs::canonicalize(given).map_err(|error| refuse(super::devices::io_text(&error)))?;
    match path.starts_with(mount_point) && path.is_dir() {
        true => Ok(path),
        false => Err(refuse(format!(
            "is not a directory in {}",
            mount_point.display()
        ))),
    }
}

fn check_room(directory: &Path, bytes: u64) -> Result<(), CliError> {
    let name = directory.display();
    let stat = nix::sys::statvfs::statvfs(directory)
        .map_err(|errno| exit::system(format!("{name}: {}", errno.desc())))?;
    if stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        return Err(exit::usage(format!("{name}: is mounted read-only")));
    }
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if free / 2 < bytes {
        return Err(exit::usage(format!(
            "{name}: {} are free, and {} are needed; use a smaller --size",
            format_size(free),
            format_size(bytes.saturating_mul(2))
        )));
    }
    Ok(())
}

/// The number of the signal that asked to end, or 0.
fn watch_signals() -> Result<Arc<AtomicI32>, CliError> {
    let set = signals::block().map_err(exit::system)?;
    let ended = Arc::new(AtomicI32::new(0));
    let told = Arc::clone(&ended);
    thread::Builder::new()
        .name("braidfs-signals".into())
        .spawn(move || {
            while let Ok(signal) = set.wait() {
                told.store(signal as i32, Ordering::SeqCst);
            }
        })
        .map_err(|error| exit::system(format!("signals: {error}")))?;
    Ok(ended)
}

/// What the daemon says of the members, or a signal.
fn measure_members(
    args: &BenchArgs,
    mount_point: &Path,
    stream: UnixStream,
    ended: &AtomicI32,
) -> Result<MemberPace, CliError> {
    let words = format!("pace {} {}", args.size, args.seconds);
    let (to, from) = mpsc::channel();
    let place = mount_point.to_owned();
    thread::Builder::new()
        .name("braidfs-members".into())
        .spawn(move || {
            // Nobody may be waiting any more.
            drop(to.send(control::told(&place, &stream, &words, Patience::Long)));
        })
        .map_err(|error| exit::system(format!("cannot start a thread: {error}")))?;
    let line = loop {
        match from.recv_timeout(SIGNAL_CHECK) {
            Ok(said) => break said?,
            Err(RecvTimeoutError::Timeout) => load::check_signals(ended)?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(exit::system("a thread ended without a word"));
            }
        }
    };
    serde_json::from_str(&line).map_err(|error| {
        let name = mount_point.display();
        exit::usage(format!("{name}: unexpected answer: {error}"))
    })
}

/// Runs all loads in a directory.
fn measure(
    whose: &str,
    directory: &Path,
    bounds: &load::Bounds<'_>,
    progress: &mut Progress,
    drop_caches: impl Fn() -> Result<(), CliError>,
) -> Result<Paces, CliError> {
    let mut place = load::Place::new(directory, bounds.bytes)?;
    let mut paces = Paces::default();
    for (load, pace) in LOADS.iter().zip(&mut paces) {
        let Load { name, cold, .. } = load;
        progress.begin(whose, name);
        if *cold {
            drop_caches()?;
        }
        *pace = place.run(load, bounds)?;
        progress.done += 1;
    }
    Ok(paces)
}

/// What has been done.
struct Progress {
    steps: u32,
    done: u32,
    limit: Duration,
    begun: Instant,
    line: Line,
}

impl Progress {
    fn new(limit: Duration) -> Self {
        let loads = u32::try_from(LOADS.len()).expect("a few");
        Self {
            steps: MEMBER_STEPS + 2 * loads,
            done: 0,
            limit,
            begun: Instant::now(),
            line: Line::new(),
        }
    }

    /// As long as the steps so far took, the others take; before that, as long as they may.
    fn left(&self) -> Duration {
        let each = match self.done {
            0 => self.limit,
            done => self.begun.elapsed() / done,
        };
        each * (self.steps - self.done)
    }

    fn begin(&mut self, whose: &str, what: &str) {
        let (number, left) = (self.done + 1, self.left().as_secs());
        let (steps, minutes, seconds) = (self.steps, left / 60, left % 60);
        self.line.set(&format!(
            "step {number} of {steps}: {whose}: {what}, ETA {minutes}:{seconds:02}"
        ));
    }
}

/// The null server, mounted until this is dropped.
struct NullMount {
    place: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl NullMount {
    fn new() -> Result<Self, String> {
        let template = std::env::temp_dir().join("braidfs-bench-XXXXXX");
        let place = nix::unistd::mkdtemp(&template)
            .map_err(|errno| format!("{}: {}", template.display(), errno.desc()))?;
        // Root's mount is its own, and goes with it whatever happens.
        if nix::unistd::geteuid().is_root() && unshare(CloneFlags::CLONE_NEWNS).is_ok() {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            let none: Option<&str> = None;
            let made = nix::mount::mount(none, "/", none, private, none);
            log::debug!("a mount namespace of its own: {made:?}");
        }
        let options = NullOptions {
            mount_point: place.clone(),
            cache_mode: CacheMode::Direct,
            allow_other: false,
            threads: threads_default(),
            arena_mib: ARENA_MIB,
        };
        let server = thread::Builder::new()
            .name("braidfs-null".into())
            .spawn(move || {
                if let Err(error) = null::serve(&options) {
                    log::warn!("null FUSE server: {error}");
                }
            })
            .map_err(|error| format!("cannot start a thread: {error}"))?;
        let null = Self {
            place,
            server: Some(server),
        };
        null.wait_until_mounted()?;
        Ok(null)
    }

    fn place(&self) -> &Path {
        &self.place
    }

    fn wait_until_mounted(&self) -> Result<(), String> {
        let until = Instant::now() + MOUNT_PATIENCE;
        while Instant::now() < until && !self.has_ended() {
            if matches!(mounts::mount_at(&self.place), Ok(Some(_))) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err("the null server was not mounted".to_owned())
    }

    fn has_ended(&self) -> bool {
        self.server.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for NullMount {
    fn drop(&mut self) {
        if !self.has_ended() {
            let undone = unmount(&self.place, Unmount::Lazy);
            log::debug!("null server unmounted: {undone:?}");
        }
        if let Some(server) = self.server.take() {
            drop(server.join());
        }
        drop(std::fs::remove_dir(&self.place));
    }
}
