//! `braidfs control`: orders to the daemon of a mounted file system.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;

use log::LevelFilter;
use serde_json::Value;

use super::control::{self, Patience, Settings};
use super::devices::io_text;
use super::exit::{self, CliError};
use super::options::{COMMIT_SECONDS_MAX, FREEZE_SECONDS_MAX};
use super::print;
use super::size::parse_size;
use super::table;
use crate::fuse::mounts::MountEntry;

/// How long a freeze lasts unless something else was said, in seconds.
const FREEZE_SECONDS_DEFAULT: u64 = 60;

/// Freeze a mounted file system for a backup, change its settings, drop its cache. FUSE has no
/// FIFREEZE, so fsfreeze(8) and xfs_freeze(8) do not reach it; this does.
#[derive(clap::Args, Debug)]
pub struct ControlArgs {
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: OsString,
    /// What to do
    #[arg(value_enum, value_name = "ACTION")]
    pub action: Action,
    /// With set: cache_size=SIZE (up to what it was mounted with; smaller gives memory back),
    /// commit=SECONDS, log=error|warn|info|debug|trace
    #[arg(value_name = "NAME=VALUE")]
    pub settings: Vec<String>,
    /// With freeze: when it thaws by itself (60 unless given)
    #[arg(long, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=FREEZE_SECONDS_MAX))]
    pub timeout: Option<u64>,
    /// With get: as JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do with a mounted file system.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Show the settings, and whether it is frozen
    Get,
    /// Change settings until it is unmounted
    Set,
    /// Make everything durable and hold all changes back; reading goes on
    Freeze,
    /// Let changes go on
    Thaw,
    /// Make everything durable
    Sync,
    /// Forget what is cached and clean
    DropCaches,
}

/// `braidfs control`.
pub fn run(args: &ControlArgs) -> Result<(), CliError> {
    check(args)?;
    let settings = settings(&args.settings)?;
    let (entry, stream) = control::reach(Path::new(&args.mount_point))?;
    let say = |words: &str, patience| control::told(&entry.mount_point, &stream, words, patience);
    match args.action {
        Action::Get => {
            let view: Value = control::told_json(&entry.mount_point, &stream, "get")?;
            match args.json {
                true => print::json(&view),
                false => print::text(&table::render(&view)),
            }
        }
        Action::Set => {
            let settings = serde_json::to_string(&settings)
                .map_err(|error| exit::system(format!("JSON: {error}")))?;
            say(&format!("set {settings}"), Patience::Long).map(drop)
        }
        Action::Freeze => {
            hand_over(&entry)?;
            let seconds = args.timeout.unwrap_or(FREEZE_SECONDS_DEFAULT);
            say(&format!("freeze {seconds}"), Patience::Long).map(drop)
        }
        Action::Sync => {
            hand_over(&entry)?;
            say("sync", Patience::Long).map(drop)
        }
        Action::Thaw => say("thaw", Patience::Short).map(drop),
        Action::DropCaches => say("drop-caches", Patience::Long).map(drop),
    }
}

/// What belongs to one action alone.
fn check(args: &ControlArgs) -> Result<(), CliError> {
    let (action, given) = (args.action, args.settings.first());
    match given {
        Some(word) if action != Action::Set => {
            return Err(exit::usage(format!("control: '{word}' belongs to set")));
        }
        None if action == Action::Set => {
            return Err(exit::usage(
                "control: set needs a setting: cache_size=SIZE, commit=SECONDS or log=LEVEL",
            ));
        }
        _ => {}
    }
    if args.timeout.is_some() && action != Action::Freeze {
        return Err(exit::usage("control: --timeout belongs to freeze"));
    }
    if args.json && action != Action::Get {
        return Err(exit::usage("control: --json belongs to get"));
    }
    Ok(())
}

fn settings(words: &[String]) -> Result<Settings, CliError> {
    let mut settings = Settings::default();
    for word in words {
        let impossible = |expected: &str| {
            Err(exit::usage(format!(
                "setting '{word}': expected {expected}"
            )))
        };
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            "cache_size" => match parse_size(value) {
                Some(bytes) => settings.cache_size_bytes = Some(bytes),
                None => return impossible("a size, such as 64M"),
            },
            "commit" => match value.parse() {
                Ok(seconds @ 1..=COMMIT_SECONDS_MAX) => settings.commit_seconds = Some(seconds),
                _ => return impossible(&format!("seconds from 1 to {COMMIT_SECONDS_MAX}")),
            },
            "log" => match value.parse::<LevelFilter>() {
                Ok(level) if level != LevelFilter::Off => {
                    settings.log = Some(level.to_string().to_lowercase());
                }
                _ => return impossible("error, warn, info, debug or trace"),
            },
            _ => {
                return Err(exit::usage(format!(
                    "unknown setting '{name}'; there are cache_size, commit and log"
                )));
            }
        }
    }
    Ok(settings)
}

/// Has the kernel hand over what it has cached of writes: with `cache=writeback` there may be some.
/// Not on a frozen file system, where that would wait for the thaw.
fn hand_over(entry: &MountEntry) -> Result<(), CliError> {
    let place = &entry.mount_point;
    let frozen = control::connect(entry)
        .and_then(|stream| control::told_json::<Value>(place, &stream, "get").ok())
        .is_some_and(|view| view["frozen"] == true);
    if frozen {
        return Ok(());
    }
    let failed = |why: String| exit::usage(format!("{}: {why}", place.display()));
    let root = File::open(place).map_err(|error| failed(io_text(&error)))?;
    nix::unistd::syncfs(&root).map_err(|error| failed(error.desc().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Settings, String> {
        let words: Vec<String> = words.iter().map(ToString::to_string).collect();
        settings(&words).map_err(|error| error.message)
    }

    #[test]
    fn settings_are_checked_before_anybody_is_asked() {
        let all = parse(&["cache_size=64M", "commit=9", "log=DEBUG"]).unwrap();
        assert_eq!(all.cache_size_bytes, Some(64 << 20));
        assert_eq!(all.commit_seconds, Some(9));
        assert_eq!(all.log.as_deref(), Some("debug"));
        for (word, part) in [
            ("commit=0", "1 to 300"),
            ("commit", "1 to 300"),
            ("cache_size=much", "such as 64M"),
            ("log=off", "debug or trace"),
            ("threads=3", "unknown setting 'threads'"),
        ] {
            let error = parse(&["log=info", word]).unwrap_err();
            assert!(error.contains(part), "{word}: {error}");
        }
    }
}
