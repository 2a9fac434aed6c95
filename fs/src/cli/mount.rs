//! `braidfs mount`, and the mount helper's form of it.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use super::control::{self, Patience};
use super::daemon::{self, Job};
use super::descriptors::close_inherited;
use super::devices::{device_list, display_list, io_text, source_name};
use super::exit::{self, CliError};
use super::fstab;
use super::members::missing;
use super::options::ParsedOptions;
use super::umount;
use crate::fuse::MsFlags;

/// Mount a file system; returns when it can be used.
#[derive(clap::Args, Debug)]
#[command(override_usage = "braidfs mount [OPTIONS] [DEV]... MOUNTPOINT")]
pub struct MountArgs {
    /// Options, separated by commas: ro, noatime, relatime, strictatime, sync, commit=SECONDS,
    /// cache_size=SIZE, cache=auto|direct|writeback, allow_other, allow_root, discard, nodirect,
    /// backend=auto|uring|threads, threads=N, timeout=SECONDS, attr_timeout=SECONDS, logfile=FILE,
    /// metrics=unix:PATH|127.0.0.1:PORT|[::1]:PORT, device_wait=SECONDS, search=DIR, fsname=NAME,
    /// subtype=NAME, remount, norecovery, and the general ones of mount(8)
    #[arg(short = 'o', value_name = "OPT,...")]
    pub options: Vec<String>,

    /// Stay in the foreground; log to the standard error
    #[arg(short, long)]
    pub foreground: bool,

    /// Say more
    #[arg(short, long)]
    pub verbose: bool,

    /// Member devices or image files (one is enough where the others can be found; DEV:DEV,
    /// UUID=... and LABEL=... work too), then the directory; or the directory alone, which
    /// /etc/fstab knows
    #[arg(required = true, value_names = ["DEV|MOUNTPOINT"])]
    pub words: Vec<OsString>,

    /// Pass over unknown options
    #[arg(long, hide = true)]
    pub sloppy: bool,

    /// Set by the parent of a background daemon
    #[arg(long, hide = true)]
    pub daemon_child: bool,
}

/// The form in which mount(8) calls mount.braidfs and mount.fuse.braidfs.
#[derive(clap::Parser, Debug)]
#[command(
    name = "mount.braidfs",
    version,
    about = "Mount helper of mount(8) for braidfs"
)]
pub struct HelperArgs {
    /// Member devices, separated by colons
    #[arg(value_name = "DEV")]
    pub device: OsString,
    /// The directory
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: OsString,
    /// Options
    #[arg(short = 'o', value_name = "OPT,...")]
    pub options: Vec<String>,
    /// Check everything, but do not mount
    #[arg(short = 'f')]
    pub fake: bool,
    /// Pass over unknown options
    #[arg(short = 's')]
    pub sloppy: bool,
    /// Do not write /etc/mtab (nobody does)
    #[arg(short = 'n')]
    pub no_mtab: bool,
    /// Say more
    #[arg(short = 'v')]
    pub verbose: bool,
    /// Mount namespace to mount in
    #[arg(short = 'N', value_name = "NAMESPACE")]
    pub namespace: Option<PathBuf>,
    /// Type
    #[arg(short = 't', value_name = "TYPE")]
    pub fs_type: Option<String>,
}

/// `braidfs mount`.
pub fn run(args: &MountArgs) -> Result<(), CliError> {
    if args.verbose {
        log::set_max_level(log::max_level().max(log::LevelFilter::Info));
    }
    if ParsedOptions::parse(&args.options, true)
        .map_err(exit::usage)?
        .remount
    {
        return remount(args);
    }
    if let [place] = &args.words[..] {
        return run(&from_fstab(args, Path::new(place))?);
    }
    if args.daemon_child {
        close_inherited();
    }
    let job = job(args)?;
    if args.daemon_child {
        nix::unistd::setsid().map_err(|error| exit::system(format!("setsid: {error}")))?;
        return daemon::run(job);
    }
    if job.options.no_fail && is_excused(&job) {
        return Ok(());
    }
    if args.foreground {
        return daemon::run(job);
    }
    start_in_background(args)?;
    let (what, place) = (display_list(&job.devices), job.mount_point.display());
    log::info!("{what}: mounted on {place}");
    Ok(())
}

/// The same with what fstab says; options that were given come after those of fstab.
fn from_fstab(args: &MountArgs, place: &Path) -> Result<MountArgs, CliError> {
    let line = fstab::find(place).map_err(exit::usage)?;
    let mut options = vec![line.options];
    options.extend(args.options.iter().cloned());
    Ok(MountArgs {
        options,
        words: vec![line.source, line.target.into_os_string()],
        ..*args
    })
}

/// With `nofail`, devices that are not there are no error. mount(8) leaves that to its helpers.
fn is_excused(job: &Job) -> bool {
    match job.members() {
        Ok(members) => {
            let missing = missing(&members);
            if let (Some(index), Some(first)) = (missing.first(), members.first()) {
                let (count, path) = (first.label.device_count, first.path.display());
                log::warn!(
                    "{path}: member number {index} of {count} is missing; not mounted (nofail)"
                );
            }
            !missing.is_empty()
        }
        Err(error) if error.absent => {
            log::info!("{}; not mounted (nofail)", error.message);
            true
        }
        // What is wrong with them, the daemon will say.
        Err(_) => false,
    }
}

/// `mount.braidfs`.
pub fn run_helper(mut args: HelperArgs) -> Result<(), CliError> {
    if let Some(namespace) = &args.namespace {
        enter_namespace(namespace)?;
    }
    // mount(8) says `rw` where its user said nothing, so here that does not insist.
    if let Some(first) = args.options.first_mut()
        && let Some(rest) = first.strip_prefix("rw")
        && (rest.is_empty() || rest.starts_with(','))
    {
        *first = rest.trim_start_matches(',').to_owned();
    }
    let mount_args = MountArgs {
        options: args.options,
        foreground: false,
        verbose: args.verbose,
        words: vec![args.device, args.mount_point],
        sloppy: args.sloppy,
        daemon_child: false,
    };
    if args.fake {
        return pretend(&job(&mount_args)?);
    }
    run(&mount_args)
}

/// Checks everything that can be checked without taking the devices.
fn pretend(job: &Job) -> Result<(), CliError> {
    if job.options.no_fail && is_excused(job) {
        return Ok(());
    }
    let members = job.members().map_err(exit::failure)?;
    match (missing(&members).first(), members.first()) {
        (Some(index), Some(first)) => Err(exit::failure(format!(
            "{}: member number {index} of {} is missing (file system {})",
            first.path.display(),
            first.label.device_count,
            first.label.fs_uuid
        ))),
        _ => Ok(()),
    }
}

/// Enters another mount namespace (mount(8) and umount(8) with -N). Threads would stay behind, so
/// none may have been started.
pub fn enter_namespace(path: &Path) -> Result<(), CliError> {
    let failed = |text: String| exit::system(format!("namespace {}: {text}", path.display()));
    let file = fs::File::open(path).map_err(|error| failed(io_text(&error)))?;
    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNS)
        .map_err(|error| failed(error.desc().to_owned()))
}

/// Changes the flags of a mount (`-o remount`): ro, rw, nosuid and so on. What the daemon was told
/// when it started stays.
fn remount(args: &MountArgs) -> Result<(), CliError> {
    let options = ParsedOptions::parse(&args.options, args.sloppy).map_err(exit::usage)?;
    let place = args.words.last().map_or(Path::new(""), Path::new);
    let entry = umount::find(place)?;
    let place = entry.mount_point.display();
    let stats = control::connect(&entry)
        .and_then(|stream| control::ask(&stream, "stats", Patience::Short).ok()?.ok())
        .and_then(|line| serde_json::from_str::<serde_json::Value>(&line).ok());
    let read_only = stats.is_some_and(|stats| stats["read_only"] == true);
    if read_only && !options.core.read_only {
        // Recovery after a crash, and what was being deleted then, may take a while.
        let answer = control::connect(&entry)
            .map(|stream| control::ask(&stream, "writable", Patience::Long));
        let made = match answer {
            Some(Ok(made)) => made.map(drop),
            Some(Err(error)) => Err(io_text(&error)),
            None => Err("its daemon does not answer".to_owned()),
        };
        made.map_err(|why| {
            exit::failure(format!(
                "{place}: cannot be made writable, and stays read-only: {why}"
            ))
        })?;
    }
    if options.core.read_only && !read_only {
        // What was written until now is to be safe when this returns.
        fs::File::open(&entry.mount_point)
            .and_then(|root| root.sync_all())
            .map_err(|error| exit::failure(format!("{place}: {}", io_text(&error))))?;
    }
    let flags = options.flags | MsFlags::MS_REMOUNT;
    nix::mount::mount(
        None::<&str>,
        &entry.mount_point,
        None::<&str>,
        flags,
        None::<&str>,
    )
    .map_err(|error| exit::system(format!("remount {place}: {}", error.desc())))
}

/// Checks everything that can be checked without touching a device.
fn job(args: &MountArgs) -> Result<Job, CliError> {
    let Some((mount_point, words)) = args
        .words
        .split_last()
        .filter(|(_, words)| !words.is_empty())
    else {
        return Err(exit::usage("mount: a device and a mount point are needed"));
    };
    let options = ParsedOptions::parse(&args.options, args.sloppy).map_err(exit::usage)?;
    let devices = device_list(words).map_err(exit::usage)?;
    let mount_point = check_mount_point(Path::new(mount_point))?;
    let background = args.daemon_child;
    // What mount(8) looked up by itself, the table shows as the device that it found; so do we.
    let upper = ["UUID=", "LABEL="].map(str::as_bytes);
    let by_members = |word: &OsString| upper.iter().any(|tag| word.as_bytes().starts_with(tag));
    Ok(Job {
        devices,
        source: (!words.iter().any(by_members)).then(|| source_name(words)),
        mount_point,
        options,
        background,
    })
}

/// A mount point is a directory that can be entered.
fn check_mount_point(path: &Path) -> Result<PathBuf, CliError> {
    let refuse = |why: &str| {
        Err(exit::failure(format!(
            "mount point {}: {why}; nothing was mounted",
            path.display()
        )))
    };
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        // While the daemon's end is under way, requests are aborted.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOTCONN | libc::ECONNABORTED)
            ) =>
        {
            return refuse(
                "a FUSE file system whose daemon is gone is still mounted there; 'umount' it first",
            );
        }
        Err(error) => return refuse(&io_text(&error)),
    };
    if !meta.is_dir() {
        return refuse("is not a directory");
    }
    match fs::canonicalize(path).and_then(|path| fs::read_dir(&path).map(|_| path)) {
        Ok(path) => Ok(path),
        Err(error) => refuse(&io_text(&error)),
    }
}

/// Starts this program again as the daemon, and returns when that says that the mount is usable.
/// Its errors go straight to our standard error.
fn start_in_background(args: &MountArgs) -> Result<(), CliError> {
    let program = env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
    let mut command = Command::new(program);
    command.arg0("braidfs").args(["mount", "--daemon-child"]);
    if args.sloppy {
        command.arg("--sloppy");
    }
    if args.verbose {
        command.arg("--verbose");
    }
    for options in &args.options {
        command.arg("-o").arg(options);
    }
    let mut child = command
        .arg("--")
        .args(&args.words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| exit::system(format!("cannot start the daemon: {error}")))?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take()
        && let Err(error) = BufReader::new(out).read_line(&mut line)
    {
        line.clear();
        log::warn!("waiting for the daemon: {error}");
    }
    if line == daemon::READY {
        return Ok(());
    }
    let status = child
        .wait()
        .map_err(|error| exit::system(format!("waiting for the daemon: {error}")))?;
    match status.code().map(u8::try_from) {
        // It has said why.
        Some(Ok(code)) if code != 0 => Err(CliError::new(code, "")),
        _ => Err(exit::failure(format!(
            "the daemon ended before the mount was usable ({status})"
        ))),
    }
}
