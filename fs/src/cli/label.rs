//! `braidfs label`: what a file system is called, mounted or not.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use braidfs_blockdev::label::LABEL_TEXT_MAX;
use braidfs_blockdev::{OpenMode, Volume};
use serde_json::{Value, json};

use super::control::{self, Patience};
use super::devices::{device_list, open_all};
use super::exit::{self, CliError};
use super::members::find_members;
use super::print;
use super::umount;

/// Show the label of a file system, or give it another one.
#[derive(clap::Args, Debug)]
pub struct LabelArgs {
    /// Where it is mounted; or a member device or image file of an unmounted file system
    #[arg(value_name = "MOUNTPOINT|DEV")]
    pub place: OsString,
    /// The new label, up to 64 bytes; may be empty
    #[arg(value_name = "LABEL")]
    pub text: Option<String>,
}

/// `braidfs label`.
pub fn run(args: &LabelArgs) -> Result<(), CliError> {
    if let Some(text) = &args.text {
        check(text)?;
    }
    let place = Path::new(&args.place);
    match umount::find(place) {
        Ok(_) => mounted(place, args.text.as_deref()),
        Err(_) => unmounted(args),
    }
}

fn check(text: &str) -> Result<(), CliError> {
    if text.len() > LABEL_TEXT_MAX {
        let len = text.len();
        return Err(exit::usage(format!(
            "label: {len} bytes; at most {LABEL_TEXT_MAX} are possible"
        )));
    }
    if text.contains(char::is_control) {
        return Err(exit::usage(
            "label: has a control character, which tables and udev cannot show",
        ));
    }
    Ok(())
}

fn mounted(place: &Path, text: Option<&str>) -> Result<(), CliError> {
    let (entry, stream) = control::reach(place)?;
    let place = &entry.mount_point;
    if let Some(text) = text {
        let words = format!("label {}", json!(text));
        return control::told(place, &stream, &words, Patience::Long).map(drop);
    }
    let view: Value = control::told_json(place, &stream, "get")?;
    print::text(&format!("{}\n", view["label"].as_str().unwrap_or_default()))
}

fn unmounted(args: &LabelArgs) -> Result<(), CliError> {
    let paths = device_list(std::slice::from_ref(&args.place)).map_err(exit::usage)?;
    let members = find_members(&paths).map_err(exit::usage)?;
    let Some(text) = &args.text else {
        let label = members.first().map_or("", |member| &member.label.label);
        return print::text(&format!("{label}\n"));
    };
    let paths: Vec<PathBuf> = members.into_iter().map(|member| member.path).collect();
    let devices = open_all(&paths, OpenMode::default()).map_err(exit::usage)?;
    Volume::relabel(devices, text).map_err(|error| exit::usage(error.to_string()))
}
