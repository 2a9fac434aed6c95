//! `braidfs fsck`: checks labels, metadata and space of an unmounted file system.

use std::ffi::OsString;
use std::path::PathBuf;

use braidfs_blockdev::{OpenMode, Volume};

use super::devices::{device_list, display_list, find_members, open_all};
use super::exit::{CliError, FSCK_ERRORS, FSCK_OPERATIONAL, FSCK_USAGE};
use super::print;
use super::table;

/// Check an unmounted file system. Exit codes as fsck(8): 0 clean, 4 errors left, 8 could not
/// check, 16 wrong usage.
#[derive(clap::Args, Debug)]
pub struct FsckArgs {
    /// Change nothing (repair is not in this version: -n is needed)
    #[arg(short = 'n')]
    pub no_changes: bool,
    /// Repair without asking (not in this version)
    #[arg(short = 'y', conflicts_with = "no_changes")]
    pub yes: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Member devices or image files; one is enough where the others lie beside it
    #[arg(required = true, value_name = "DEV")]
    pub devices: Vec<OsString>,

    /// At boot: nothing to do, mounting recovers by itself
    #[arg(short = 'a', short_alias = 'p', hide = true)]
    preen: bool,
    /// Accepted for fsck(8)
    #[arg(short = 'f', hide = true)]
    force: bool,
    /// Accepted for fsck(8)
    #[arg(short = 'T', hide = true)]
    no_title: bool,
    /// Accepted for fsck(8)
    #[arg(short = 'C', hide = true, num_args = 0..=1, require_equals = true)]
    progress: Option<String>,
}

/// `braidfs fsck`.
pub fn run(args: &FsckArgs) -> Result<(), CliError> {
    if args.preen {
        return Ok(());
    }
    if args.yes || !args.no_changes {
        return Err(CliError::new(
            FSCK_USAGE,
            "fsck: repair is not in this version; 'fsck -n' checks without changing anything",
        ));
    }
    let operational = |message: String| CliError::new(FSCK_OPERATIONAL, message);
    let paths = device_list(&args.devices).map_err(|message| CliError::new(FSCK_USAGE, message))?;
    let members = find_members(&paths).map_err(operational)?;
    let paths: Vec<PathBuf> = members.into_iter().map(|member| member.path).collect();
    let mode = OpenMode {
        read_only: true,
        direct: true,
        ..OpenMode::default()
    };
    let devices = open_all(&paths, mode).map_err(operational)?;
    let volume = Volume::assemble(devices, true).map_err(|error| operational(error.to_string()))?;
    let report = crate::fsck::check(volume).map_err(|error| operational(error.to_string()))?;
    let value =
        serde_json::to_value(&report).map_err(|error| operational(format!("report: {error}")))?;
    let problems = report.problems.len();
    if args.json {
        print::json(&value)?;
    } else {
        let mut counters = value;
        if let Some(fields) = counters.as_object_mut() {
            fields.remove("problems");
        }
        let mut text = String::new();
        for problem in &report.problems {
            text.push_str(&format!(
                "{}: {}: {}\n",
                problem.kind, problem.object, problem.message
            ));
        }
        text.push_str(&table::render(&counters));
        text.push_str(&match problems {
            0 => format!("{}: clean\n", display_list(&paths)),
            1 => format!("{}: 1 problem\n", display_list(&paths)),
            count => format!("{}: {count} problems\n", display_list(&paths)),
        });
        print::text(&text)?;
    }
    if problems == 0 {
        Ok(())
    } else {
        Err(CliError::new(FSCK_ERRORS, ""))
    }
}
