//! The command line: one file per verb, and what they share.
//!
//! | file | what |
//! | --- | --- |
//! | `mkfs.rs` `mount.rs` `umount.rs` `fsck.rs` `scrub.rs` | the verbs |
//! | `manage.rs` `label.rs` | orders to a daemon (`braidfs control`); labels |
//! | `info.rs` `stats.rs` `top.rs` `trace.rs` `probe.rs` `doctor.rs` | those that only look |
//! | `bench.rs` | what limits the speed |
//! | `daemon.rs` | the process that serves a mount |
//! | `control.rs` | the socket by which the verbs talk to it |
//! | `summary.rs` | what it logs of itself when asked by a signal |
//! | `devices.rs` | device lists, opening them |
//! | `members.rs` | finding members, by device or tag |
//! | `fstab.rs` | what fstab says of a mount point |
//! | `notify.rs` | what a service manager is told |
//! | `options.rs` `size.rs` | what follows `-o`; sizes |
//! | `table.rs` `print.rs` | tables, JSON |
//! | `metrics.rs` | metrics for Prometheus |
//! | `rates.rs` | what happened between two samples of the counters |
//! | `meter.rs` | progress of fsck |
//! | `progress.rs` | progress of the others |
//! | `manual.rs` | man pages and shell completions |
//! | `signals.rs` | signals that ask to end |
//! | `logger.rs` | log lines to the standard error, a file or syslog |
//! | `descriptors.rs` | what a daemon does not keep of its caller |
//! | `exit.rs` | exit codes |
//!
//! The binary also answers to the names under which mount(8), umount(8), mkfs(8) and fsck(8) look
//! for helpers.

mod bench;
mod control;
mod daemon;
mod descriptors;
mod devices;
mod doctor;
mod exit;
mod fsck;
mod fstab;
mod info;
mod label;
mod logger;
mod manage;
mod manual;
mod members;
mod meter;
mod metrics;
mod mkfs;
mod mount;
mod notify;
mod options;
mod print;
mod probe;
mod progress;
mod rates;
mod scrub;
mod signals;
mod size;
mod stats;
mod summary;
mod table;
mod top;
mod trace;
mod umount;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use exit::CliError;

/// Several devices as one striped, checksummed, crash-consistent file system.
#[derive(Parser, Debug)]
#[command(name = "braidfs", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Mkfs(mkfs::MkfsArgs),
    Mount(mount::MountArgs),
    Umount(umount::UmountArgs),
    Fsck(fsck::FsckArgs),
    Info(info::InfoArgs),
    Stats(stats::StatsArgs),
    Top(top::TopArgs),
    Trace(trace::TraceArgs),
    Scrub(scrub::ScrubArgs),
    Control(manage::ControlArgs),
    Label(label::LabelArgs),
    Probe(probe::ProbeArgs),
    Doctor(doctor::DoctorArgs),
    Bench(bench::BenchArgs),
}

/// What the program was called as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Braidfs,
    MountHelper,
    Verb(&'static str),
}

fn called_as(argv0: &OsStr) -> Name {
    let base = Path::new(argv0).file_name().unwrap_or_default();
    match base.to_str() {
        Some("mount.braidfs" | "mount.fuse.braidfs") => Name::MountHelper,
        Some("umount.braidfs" | "umount.fuse.braidfs") => Name::Verb("umount"),
        Some("mkfs.braidfs") => Name::Verb("mkfs"),
        Some("fsck.braidfs" | "fsck.fuse.braidfs") => Name::Verb("fsck"),
        _ => Name::Braidfs,
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    logger::start();
    let mut words: Vec<OsString> = std::env::args_os().collect();
    let name = called_as(
        words
            .first()
            .map_or(OsStr::new("braidfs"), OsString::as_os_str),
    );
    let result = match name {
        Name::MountHelper => mount::HelperArgs::try_parse_from(words)
            .map_err(|error| parse_error(&error, exit::USAGE))
            .and_then(mount::run_helper),
        Name::Verb(verb) => {
            words.insert(1.min(words.len()), OsString::from(verb));
            run(words)
        }
        Name::Braidfs if words.get(1).is_some_and(|word| word == manual::VERB) => {
            words.remove(1);
            manual::ManualArgs::try_parse_from(words)
                .map_err(|error| parse_error(&error, exit::USAGE))
                .and_then(|args| manual::run(&args))
        }
        Name::Braidfs => run(words),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !error.message.is_empty() {
                logger::last_word(&error.message);
            }
            ExitCode::from(error.code)
        }
    }
}

fn run(mut words: Vec<OsString>) -> Result<(), CliError> {
    let usage = match words.get(1).and_then(|verb| verb.to_str()) {
        Some("fsck") => {
            words = fsck::with_plain_progress(words);
            exit::FSCK_USAGE
        }
        Some("scrub" | "doctor") => exit::FSCK_USAGE,
        Some("probe") => exit::PROBE_USAGE,
        _ => exit::USAGE,
    };
    let cli = Cli::try_parse_from(words).map_err(|error| parse_error(&error, usage))?;
    match cli.verb {
        Verb::Mkfs(args) => mkfs::run(&args),
        Verb::Mount(args) => mount::run(&args),
        Verb::Umount(args) => umount::run(&args),
        Verb::Fsck(args) => fsck::run(&args),
        Verb::Info(args) => info::run(&args),
        Verb::Stats(args) => stats::run(&args),
        Verb::Top(args) => top::run(&args),
        Verb::Trace(args) => trace::run(&args),
        Verb::Scrub(args) => scrub::run(&args),
        Verb::Control(args) => manage::run(&args),
        Verb::Label(args) => label::run(&args),
        Verb::Probe(args) => probe::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::Bench(args) => bench::run(&args),
    }
}

/// Prints what clap has to say; help and version are no errors.
fn parse_error(error: &clap::Error, usage: u8) -> CliError {
    if error.use_stderr() {
        drop(error.print());
        return CliError::new(usage, "");
    }
    match error.print() {
        Ok(()) => CliError::new(0, ""),
        Err(_) => CliError::new(exit::SYSTEM, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        mount::HelperArgs::command().debug_assert();
        manual::ManualArgs::command().debug_assert();
    }

    #[test]
    fn names_of_helpers() {
        for (argv0, name) in [
            ("braidfs", Name::Braidfs),
            ("/usr/local/bin/braidfs", Name::Braidfs),
            ("/sbin/mount.braidfs", Name::MountHelper),
            ("/sbin/mount.fuse.braidfs", Name::MountHelper),
            ("umount.fuse.braidfs", Name::Verb("umount")),
            ("/sbin/mkfs.braidfs", Name::Verb("mkfs")),
            ("fsck.braidfs", Name::Verb("fsck")),
            ("", Name::Braidfs),
        ] {
            assert_eq!(called_as(OsStr::new(argv0)), name, "{argv0}");
        }
    }

    #[test]
    fn helpers_take_what_mount_passes() {
        let words = [
            "mount.braidfs",
            "/d/0:/d/1",
            "/mnt",
            "-o",
            "rw,noatime",
            "-n",
            "-s",
            "-v",
        ];
        let args = mount::HelperArgs::try_parse_from(words).unwrap();
        assert_eq!(args.options, ["rw,noatime"]);
        assert!(args.sloppy && args.no_mtab && args.verbose && !args.fake);
    }
}
