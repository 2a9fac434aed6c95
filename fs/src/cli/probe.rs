//! `braidfs probe`: what the labels of devices say, for udev and programs, as blkid(8) tells it of
//! the file systems that it knows.
//!
//! A label is what somebody wrote to a device: nothing of it gets out but harmless characters,
//! since udev takes each line for a property.

use std::ffi::OsString;
use std::path::Path;

use braidfs_blockdev::label::VERSION;
use braidfs_blockdev::{LabelError, read_label};
use serde_json::{Value, json};

use super::devices::device_list;
use super::exit::{CliError, PROBE_NOTHING, PROBE_USAGE};
use super::members::{self, Member};
use super::print;

/// Print the labels of devices, for udev and scripts. Exit codes as blkid(8): 0 found, 2 nothing
/// found, 4 wrong usage.
#[derive(clap::Args, Debug)]
pub struct ProbeArgs {
    /// Form of the output: udev's properties, or blkid's "export"
    #[arg(short, long, value_name = "FORM", default_value = "udev")]
    output: Form,
    /// As JSON
    #[arg(long, conflicts_with = "output")]
    json: bool,
    /// Tell also whether all members are there
    #[arg(long)]
    ready: bool,
    /// Devices or image files; all block devices if none is given
    #[arg(value_name = "DEV")]
    devices: Vec<OsString>,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Udev,
    Export,
}

/// `braidfs probe`.
pub fn run(args: &ProbeArgs) -> Result<(), CliError> {
    let found = match args.devices.is_empty() {
        true => members::all_members(),
        false => device_list(&args.devices)
            .map_err(|message| CliError::new(PROBE_USAGE, message))?
            .iter()
            .filter_map(|path| probe(path))
            .collect(),
    };
    if found.is_empty() {
        return Err(CliError::new(PROBE_NOTHING, ""));
    }
    if args.json {
        let devices: Vec<Value> = found
            .iter()
            .map(|member| json_of(member, ready(args, member)))
            .collect();
        return print::json(&json!({ "devices": devices }));
    }
    let blocks: Vec<String> = found
        .iter()
        .map(|member| {
            let name = args.output == Form::Export || found.len() > 1;
            block(member, args.output, name, ready(args, member))
        })
        .collect();
    print::text(&blocks.join("\n"))
}

/// A device that is no braidfs is nothing to talk about; one that cannot be looked at is.
fn probe(path: &Path) -> Option<Member> {
    match read_label(path) {
        Ok(label) => Some(Member {
            path: path.to_owned(),
            label,
        }),
        Err(LabelError::Missing | LabelError::TooSmall) => None,
        Err(error) => {
            log::warn!("{}: {error}", path.display());
            None
        }
    }
}

/// Whether all members are there, if that was asked.
fn ready(args: &ProbeArgs, member: &Member) -> Option<bool> {
    args.ready.then(|| {
        let found = members::find_members(std::slice::from_ref(&member.path));
        found.is_ok_and(|found| members::missing(&found).is_empty())
    })
}

fn json_of(member: &Member, ready: Option<bool>) -> Value {
    let mut device = json!({ "path": member.path.to_string_lossy(), "type": "braidfs" });
    if let (Some(device), Ok(Value::Object(label))) =
        (device.as_object_mut(), serde_json::to_value(&member.label))
    {
        device.extend(label);
        device.extend(ready.map(|ready| ("ready".to_owned(), Value::Bool(ready))));
    }
    device
}

/// Lines `NAME=value` for one device.
fn block(member: &Member, form: Form, name: bool, ready: Option<bool>) -> String {
    let label = &member.label;
    let mut lines = String::new();
    let mut line = |name: &str, value: &str| lines.push_str(&format!("{name}={value}\n"));
    if name {
        line("DEVNAME", &shell_safe(&member.path.to_string_lossy()));
    }
    let values = [
        ("LABEL", label.label.as_str()),
        ("UUID", &label.fs_uuid),
        ("UUID_SUB", &label.device_uuid),
    ];
    for (name, value) in values.into_iter().filter(|(_, value)| !value.is_empty()) {
        match form {
            Form::Export => line(name, &shell_safe(value)),
            Form::Udev => {
                line(&format!("ID_FS_{name}"), &plain(value));
                line(&format!("ID_FS_{name}_ENC"), &encoded(value));
            }
        }
    }
    if form == Form::Export {
        line("TYPE", "braidfs");
        return lines;
    }
    line("ID_FS_TYPE", "braidfs");
    line("ID_FS_USAGE", "filesystem");
    line("ID_FS_VERSION", &VERSION.to_string());
    line("ID_BRAIDFS_MEMBER", &label.device_index.to_string());
    line("ID_BRAIDFS_MEMBERS", &label.device_count.to_string());
    if let Some(ready) = ready {
        line("ID_BRAIDFS_READY", if ready { "1" } else { "0" });
    }
    lines
}

fn is_plain(char: char) -> bool {
    char.is_ascii_alphanumeric() || "#+-.:=@_".contains(char) || !char.is_ascii()
}

/// Other characters become `_`.
fn plain(text: &str) -> String {
    let replace = |char: char| match is_plain(char) || char == '/' {
        true if !char.is_control() => char,
        _ => '_',
    };
    text.chars().map(replace).collect()
}

/// Other characters become `\xNN`: such a name may become a file name in /dev/disk.
fn encoded(text: &str) -> String {
    let mut out = String::new();
    for char in text.chars() {
        match is_plain(char) && !char.is_control() {
            true => out.push(char),
            false => {
                let mut bytes = [0; 4];
                for byte in char.encode_utf8(&mut bytes).bytes() {
                    out.push_str(&format!("\\x{byte:02x}"));
                }
            }
        }
    }
    out
}

/// As blkid's `export` has it: what a shell would take for its own has a backslash before it.
fn shell_safe(text: &str) -> String {
    let mut out = String::new();
    for char in text.chars() {
        match char {
            control if control.is_control() => out.push('_'),
            special if " \\\"'$`<>|&;()*?[]#~".contains(special) => out.extend(['\\', special]),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_say_more_than_one_thing() {
        let label = "a b/\nID_FS_TYPE=ext4\u{85}$(x)\\\u{e4}";
        assert_eq!(plain(label), "a_b/_ID_FS_TYPE=ext4___x__\u{e4}");
        assert_eq!(
            encoded(label),
            "a\\x20b\\x2f\\x0aID_FS_TYPE=ext4\\xc2\\x85\\x24\\x28x\\x29\\x5c\u{e4}"
        );
        assert_eq!(
            shell_safe(label),
            "a\\ b/_ID_FS_TYPE=ext4_\\$\\(x\\)\\\\\u{e4}"
        );
    }
}
