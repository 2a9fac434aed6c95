//! The process that serves a mount, from opening the devices to the last flush.
//!
//! Order on the way out: the session ends (umount, or an aborted connection), the control socket
//! disappears, the core is unmounted, the devices are let go, those who wait are told. Whatever
//! ends the session, the core is unmounted.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use braidfs_blockdev::{OpenMode, Volume};
use log::{error, info, warn};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};

use super::control::{self, ControlServer, LiveMount};
use super::devices::{io_text, open_all, source_name};
use super::exit::{self, CliError};
use super::logger;
use super::members::{FindError, Member, find_members_in_time};
use super::metrics::Endpoint;
use super::notify::Manager;
use super::options::ParsedOptions;
use super::summary;
use crate::fuse::mounts::MountEntry;
use crate::fuse::{self, FuseOptions, MountHandle, MountSpec, Mounted, Unmount};
use crate::{FileSystem, MountError};

/// How long the new mount may take to answer its first request.
const FIRST_ANSWER: Duration = Duration::from_secs(60);

/// How long the devices may stay open after the core is unmounted (threads on their way out).
const LET_GO: Duration = Duration::from_secs(5);

/// What is to be served.
pub struct Job {
    /// Members as they were given.
    pub devices: Vec<PathBuf>,
    /// What the mount table shows; the members that are found, if nothing.
    pub source: Option<String>,
    /// The directory, absolute and without symbolic links.
    pub mount_point: PathBuf,
    /// Checked options.
    pub options: ParsedOptions,
    /// Somebody waits on the standard output for the word that the mount is usable, and the
    /// standard descriptors are to be left then.
    pub background: bool,
}

impl Job {
    /// The members, as far as they are there when the time to wait for them is over.
    pub fn members(&self) -> Result<Vec<Member>, FindError> {
        let options = &self.options;
        find_members_in_time(&self.devices, &options.search, options.device_wait)
    }
}

/// The line on the standard output of a background daemon that says: the mount is usable.
pub const READY: &str = "ready\n";

/// Mounts and serves until unmounted.
pub fn run(mut job: Job) -> Result<(), CliError> {
    // Before any thread starts, so that none of them takes the signals.
    let signals = super::signals::block_with_summary().map_err(exit::system)?;
    let directory = control::own_directory().map_err(exit::system)?;
    let logfile = open_logfile(&job)?;
    let metrics = bind_metrics(&job)?;
    let manager = match job.background {
        true => Manager::none(),
        false => Manager::of_this_process(),
    };
    let fs = mount_core(&mut job)?;
    let outside = Outside {
        directory: &directory,
        signals,
        logfile,
        metrics,
        manager: &manager,
    };
    match serve(&job, &fs, outside) {
        Ok(server) => {
            let _stopping = manager.stopping("writing back");
            finish(fs, Some(&server))
        }
        Err(error) => {
            if let Err(second) = finish(fs, None) {
                error!("{}", second.message);
            }
            Err(error)
        }
    }
}

/// The logfile is opened early, so that an impossible one is told to the caller.
fn open_logfile(job: &Job) -> Result<Option<File>, CliError> {
    let Some(path) = &job.options.logfile else {
        return Ok(None);
    };
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|error| exit::failure(format!("option 'logfile': {}: {error}", path.display())))?;
    Ok(Some(file))
}

/// The address of the metrics is taken early, too.
fn bind_metrics(job: &Job) -> Result<Option<Endpoint>, CliError> {
    let Some(address) = &job.options.metrics else {
        return Ok(None);
    };
    let bound = Endpoint::bind(address).map_err(|error| {
        let why = io_text(&error);
        exit::failure(format!(
            "option 'metrics={address}': {why}; nothing was mounted"
        ))
    })?;
    Ok(Some(bound))
}

/// Opens the members and mounts the core, read-only if it must be.
fn mount_core(job: &mut Job) -> Result<Arc<FileSystem>, CliError> {
    let members = job.members().map_err(exit::failure)?;
    let paths: Vec<PathBuf> = members.into_iter().map(|member| member.path).collect();
    if job.source.is_none() {
        let words: Vec<_> = paths.iter().map(|path| path.clone().into()).collect();
        job.source = Some(source_name(&words));
    }
    job.options.settle_access(&paths).map_err(exit::failure)?;
    let read_only = job.options.core.read_only;
    let mode = OpenMode {
        read_only,
        for_writing_later: read_only,
        direct: job.options.member_direct,
        backend: job.options.backend,
        answer_time_max: job.options.answer_time_max,
    };
    let devices = open_all(&paths, mode).map_err(exit::failure)?;
    let volume = Volume::assemble(devices, read_only)
        .map_err(|error| exit::failure(MountError::from(error).to_string()))?;
    FileSystem::mount(Arc::clone(&volume), job.options.core.clone()).map_err(|error| {
        if let Err(second) = volume.close() {
            error!("closing the devices: {second}");
        }
        exit::failure(error.to_string())
    })
}

/// What a daemon has to do with besides its mount.
struct Outside<'a> {
    directory: &'a Path,
    signals: SigSet,
    logfile: Option<File>,
    metrics: Option<Endpoint>,
    manager: &'a Manager,
}

/// Mounts, tells that it is usable, answers until the end.
fn serve(job: &Job, fs: &Arc<FileSystem>, outside: Outside<'_>) -> Result<ControlServer, CliError> {
    let Outside {
        directory,
        signals,
        logfile,
        metrics,
        manager,
    } = outside;
    let options = &job.options;
    let as_root = nix::unistd::geteuid().is_root();
    let spec = MountSpec {
        source: (options.fsname.clone().or_else(|| job.source.clone())).unwrap_or_default(),
        subtype: options.subtype.clone(),
        mount_point: job.mount_point.clone(),
        allow_other: options
            .allow_other
            .unwrap_or(as_root && !options.allow_root),
        allow_root: options.allow_root,
        flags: options.flags,
    };
    let fuse_options = FuseOptions {
        cache_mode: options.cache_mode,
        threads: options.threads,
        timeout: options.timeout,
    };
    let mounted = fuse::mount(Arc::clone(fs), &spec, fuse_options).map_err(|error| {
        exit::failure(format!(
            "cannot mount on {}: {error}",
            job.mount_point.display()
        ))
    })?;
    let handle = mounted.handle();
    let server = match ControlServer::start(directory, handle.clone()) {
        Ok(server) => server,
        Err(error) => {
            take_out(&handle);
            let message = format!("control socket in {}: {error}", directory.display());
            return Err(exit::system(message));
        }
    };
    let target = SignalTarget {
        file_system: Arc::downgrade(fs),
        live: server.live_mount(),
        mount: handle.mount().clone(),
        background: job.background,
        manager: manager.clone(),
    };
    let served_file = metrics.map(|endpoint| endpoint.serve(&server.live_mount()));
    let started = served_file
        .transpose()
        .and_then(|file| Ok((start_threads(mounted, signals, target)?, file)))
        .and_then(|session| {
            first_answer(&job.mount_point)?;
            Ok(session)
        })
        .and_then(|session| {
            if job.background {
                leave_caller(logfile)?
            }
            Ok(session)
        });
    let (session, _served_file) = match started {
        Ok(session) => session,
        Err(error) => {
            take_out(&handle);
            server.session_ended();
            return Err(exit::system(format!(
                "{}: {error}",
                job.mount_point.display()
            )));
        }
    };
    let status = format!("mounted on {}", job.mount_point.display());
    info!("{status}");
    manager.ready(&status);
    drop(handle);
    match session.recv() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => error!("the FUSE session ended: {error}"),
        Err(_) => error!("the FUSE session ended unexpectedly"),
    }
    server.session_ended();
    Ok(server)
}

fn take_out(handle: &MountHandle) {
    if let Err(error) = handle.unmount(Unmount::Lazy) {
        warn!(
            "{}: cannot unmount: {error}",
            handle.mount().mount_point.display()
        );
    }
}

type SessionEnd = mpsc::Receiver<io::Result<()>>;

fn start_threads(
    mounted: Mounted,
    signals: SigSet,
    target: SignalTarget,
) -> io::Result<SessionEnd> {
    let (ended, end) = mpsc::channel();
    thread::Builder::new()
        .name("braidfs-session".into())
        .spawn(move || {
            let result = mounted.serve();
            // The receiver is gone only when the start failed elsewhere, which reports itself.
            let _start_failed = ended.send(result);
        })?;
    thread::Builder::new()
        .name("braidfs-signals".into())
        .spawn(move || target.serve(&signals))?;
    Ok(end)
}

/// The mount is usable when it answers; asked from another thread, so that the wait has an end.
fn first_answer(mount_point: &Path) -> io::Result<()> {
    let (answered, answer) = mpsc::channel();
    let path = mount_point.to_owned();
    thread::Builder::new()
        .name("braidfs-probe".into())
        .spawn(move || {
            let result = nix::sys::statvfs::statvfs(&path).map(drop);
            let _nobody_waits_any_more = answered.send(result);
        })?;
    match answer.recv_timeout(FIRST_ANSWER) {
        Ok(result) => Ok(result?),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the mount does not answer",
        )),
    }
}

/// Says that the mount is usable and lets go of the caller's standard descriptors. The numbers 0 to
/// 2 stay in use, so that nothing else ever gets them.
fn leave_caller(logfile: Option<File>) -> io::Result<()> {
    let mut out = io::stdout();
    // If nobody listens any more, the caller has given up, and so do we.
    out.write_all(READY.as_bytes())?;
    out.flush()?;
    logger::leave_stderr(logfile);
    std::env::set_current_dir("/")?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// Unmounts the core, lets go of the devices, tells those who wait.
fn finish(fs: Arc<FileSystem>, server: Option<&ControlServer>) -> Result<(), CliError> {
    let outcome = fs.unmount().map_err(|error| {
        format!(
            "not all data could be written back: {error}; \
             'braidfs fsck -n' tells what the devices hold"
        )
    });
    let volume = Arc::downgrade(fs.volume());
    drop(fs);
    let until = Instant::now() + LET_GO;
    while volume.strong_count() > 0 && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    if let Err(message) = &outcome {
        error!("{message}");
    }
    if let Some(server) = server {
        server.finish(outcome.clone());
    }
    outcome.map_err(exit::failure)
}

/// What the signal thread may touch. It keeps nothing alive.
struct SignalTarget {
    file_system: std::sync::Weak<FileSystem>,
    /// For summaries.
    live: LiveMount,
    mount: MountEntry,
    background: bool,
    manager: Manager,
}

impl SignalTarget {
    /// The first request to end unmounts, lazily if the mount is in use; a second one ends the
    /// connection, whoever uses it.
    fn serve(&self, signals: &SigSet) {
        let mut asked = false;
        loop {
            match signals.wait() {
                Ok(Signal::SIGHUP) if self.background => continue,
                Ok(Signal::SIGUSR1) => {
                    self.summarize();
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    warn!("waiting for signals: {error}");
                    return;
                }
            }
            if asked {
                self.end_now();
            } else {
                asked = true;
                self.end_soon();
            }
        }
    }

    fn summarize(&self) {
        if let Some(mount) = self.live.get() {
            let lines = summary::lines(&mount.sample());
            lines.iter().for_each(|line| logger::note(line));
        }
    }

    fn end_soon(&self) {
        let place = self.mount.mount_point.display();
        let _stopping = self.manager.stopping("unmounting");
        // Writers that wait would keep the mount in use.
        if let Some(fs) = self.file_system.upgrade() {
            fs.thaw();
        }
        match fuse::unmount_if_ours(&self.mount, Unmount::Normal) {
            Ok(()) => return,
            Err(Errno::EBUSY) => warn!(
                "{place} is in use: taken out of the tree; the daemon ends when the last user is \
                 gone, or at once with a second signal"
            ),
            Err(error) => warn!("{place}: cannot unmount: {error}"),
        }
        if let Err(error) = fuse::unmount_if_ours(&self.mount, Unmount::Lazy) {
            warn!("{place}: cannot unmount: {error}");
        }
        // Whatever the users do next, what they did until now is to be safe.
        if let Some(fs) = self.file_system.upgrade()
            && let Err(error) = fs.sync()
        {
            error!("writing back: {error}");
        }
    }

    fn end_now(&self) {
        if fuse::abort_connection(self.mount.dev).is_ok() {
            return;
        }
        // Without the right to abort: when this process ends, so does its connection.
        let Some(fs) = self.file_system.upgrade() else {
            return;
        };
        let code = match fs.unmount() {
            Ok(()) => exit::FAILURE,
            Err(error) => {
                error!("not all data could be written back: {error}");
                exit::SYSTEM
            }
        };
        std::process::exit(i32::from(code));
    }
}
