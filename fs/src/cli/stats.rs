//! `braidfs stats`: what a mounted file system has done so far.

use std::ffi::OsString;
use std::path::Path;

use serde_json::Value;

use super::control;
use super::devices::io_text;
use super::exit::{self, CliError};
use super::print;
use super::table;
use super::umount;

/// Show what a mounted file system has done since it was mounted.
#[derive(clap::Args, Debug)]
pub struct StatsArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: OsString,
}

/// `braidfs stats`.
pub fn run(args: &StatsArgs) -> Result<(), CliError> {
    let entry = umount::find(Path::new(&args.mount_point))
        .map_err(|error| CliError::new(exit::USAGE, error.message))?;
    let place = entry.mount_point.display();
    let Some(stream) = control::connect(&entry) else {
        return Err(exit::usage(format!(
            "{place}: its daemon cannot be reached; is it braidfs, alive, and yours?"
        )));
    };
    let line = control::request_stats(&stream)
        .map_err(|error| exit::usage(format!("{place}: {}", io_text(&error))))?;
    if let Some(error) = line.strip_prefix("error ") {
        return Err(exit::usage(format!("{place}: {error}")));
    }
    let stats: Value = serde_json::from_str(&line)
        .map_err(|error| exit::usage(format!("{place}: unexpected answer: {error}")))?;
    if args.json {
        return print::json(&stats);
    }
    print::text(&table::render(&stats))
}
