//! `braidfs doctor`: says in plain words what weakens or slows a volume as it is now, with the
//! command that mends it. It only looks.
//!
//! `members.rs` looks at devices and what they lie on, `mounted.rs` at a mount, its daemon and the
//! kernel. Each check stands alone, gives nothing if it cannot look, and has a name that stays.

mod members;
mod mounted;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::devices::device_list;
use super::exit::{CliError, FSCK_ERRORS, FSCK_OPERATIONAL, FSCK_USAGE};
use super::members::{find_members, missing};
use super::{print, umount};

/// Say what weakens or slows a file system, and what mends it. Exit codes: 0 nothing, 4
/// something, 8 could not look, 16 wrong usage.
#[derive(clap::Args, Debug)]
pub struct DoctorArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Where it is mounted; or member devices or image files of an unmounted file system, of which
    /// one is enough where the others can be found
    #[arg(required = true, value_name = "MOUNTPOINT|DEV")]
    places: Vec<OsString>,
}

/// What a finding does to the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Effect {
    /// Data, or the mount, is in danger.
    Weakens,
    /// It could be faster.
    Slows,
}

/// Something that could be better.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// Name of the check.
    check: &'static str,
    effect: Effect,
    /// Device, or mount point.
    about: String,
    /// What was seen.
    seen: String,
    /// A command, or what to do where no command does it.
    mend: String,
}

impl Finding {
    fn weakens(check: &'static str, about: impl Into<String>, seen: String, mend: String) -> Self {
        Self {
            check,
            effect: Effect::Weakens,
            about: about.into(),
            seen,
            mend,
        }
    }

    fn slows(check: &'static str, about: impl Into<String>, seen: String, mend: String) -> Self {
        Self {
            effect: Effect::Slows,
            ..Self::weakens(check, about, seen, mend)
        }
    }
}

/// What was looked at, and found.
#[derive(Serialize)]
struct Diagnosis {
    name: String,
    findings: Vec<Finding>,
}

/// `braidfs doctor`.
pub fn run(args: &DoctorArgs) -> Result<(), CliError> {
    let entry = match &args.places[..] {
        [place] => umount::find(Path::new(place)).ok(),
        _ => None,
    };
    let mut diagnosis = match entry {
        Some(entry) => {
            let (devices, mut findings) = mounted::examine(&entry);
            findings.extend(members::examine(&devices));
            Diagnosis {
                name: entry.mount_point.display().to_string(),
                findings,
            }
        }
        None => unmounted(&args.places)?,
    };
    diagnosis.findings.sort_by_key(|finding| finding.effect);
    match args.json {
        true => print::json(&diagnosis)?,
        false => print::text(&render(&diagnosis))?,
    }
    match diagnosis.findings.is_empty() {
        true => Ok(()),
        false => Err(CliError::new(FSCK_ERRORS, "")),
    }
}

fn unmounted(places: &[OsString]) -> Result<Diagnosis, CliError> {
    let paths = device_list(places).map_err(|message| CliError::new(FSCK_USAGE, message))?;
    let found = find_members(&paths).map_err(|error| CliError::new(FSCK_OPERATIONAL, error))?;
    let devices: Vec<PathBuf> = found.iter().map(|member| member.path.clone()).collect();
    let name = super::devices::display_list(&devices);
    let mut findings = Vec::new();
    for index in missing(&found) {
        findings.push(Finding::weakens(
            "missing",
            &name,
            format!("member number {index} is missing: it cannot be mounted"),
            "connect the device, or name it too".to_owned(),
        ));
    }
    if found.iter().any(|member| !member.label.clean) {
        findings.push(Finding::weakens(
            "unclean",
            &name,
            "was not closed properly, or is in use: the next mount recovers it".to_owned(),
            format!("braidfs mount {name} MOUNTPOINT"),
        ));
    }
    findings.extend(members::examine(&devices));
    Ok(Diagnosis { name, findings })
}

fn render(diagnosis: &Diagnosis) -> String {
    let Diagnosis { name, findings } = diagnosis;
    let mut out = match findings.len() {
        0 => format!("{name}: nothing to complain about\n"),
        1 => format!("{name}: 1 finding\n"),
        count => format!("{name}: {count} findings\n"),
    };
    for finding in findings {
        let effect = match finding.effect {
            Effect::Weakens => "weakens",
            Effect::Slows => "slows",
        };
        let Finding {
            check,
            about,
            seen,
            mend,
            ..
        } = finding;
        out.push_str(&format!(
            "\n{effect} ({check}): {about}: {seen}\n    {mend}\n"
        ));
    }
    out
}
