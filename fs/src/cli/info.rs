//! `braidfs info`: what the labels of members say, mounted or not, and what the last scrub found.
//! Nothing is locked for long, or changed.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;

use braidfs_blockdev::{Backend, OpenMode, Volume, VolumeInfo, open_device};
use serde_json::{Value, json};

use super::control::{self, Patience};
use super::devices::device_list;
use super::exit::{self, CliError};
use super::members::{Member, Tag, find_members, missing};
use super::print;
use super::scrub;
use super::size::format_size;
use crate::fuse::mounts::{self, MountEntry};

/// Show what devices belong to a file system, mounted or not.
#[derive(clap::Args, Debug)]
pub struct InfoArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Member devices or image files; one is enough where the others lie beside it
    #[arg(required = true, value_name = "DEV")]
    pub devices: Vec<OsString>,
}

/// `braidfs info`.
pub fn run(args: &InfoArgs) -> Result<(), CliError> {
    let paths = device_list(&args.devices).map_err(exit::usage)?;
    let members = find_members(&paths).map_err(exit::usage)?;
    let Some(first) = members.first() else {
        return Err(exit::usage("no device given"));
    };
    if let Some(other) = members
        .iter()
        .find(|m| m.label.fs_uuid != first.label.fs_uuid)
    {
        return Err(exit::usage(format!(
            "{} and {} belong to different file systems ({} and {})",
            first.path.display(),
            other.path.display(),
            first.label.fs_uuid,
            other.label.fs_uuid
        )));
    }
    let mounted = mounted_on(&members);
    let missing = missing(&members);
    let (space, scrub) = match &mounted {
        None if missing.is_empty() => inside(&members),
        None => (None, None),
        Some(entry) => (None, scrub_of_mount(entry)),
    };
    let seen = Seen {
        members: &members,
        mounted: mounted.as_ref(),
        missing: &missing,
        space: space.as_ref(),
        scrub: scrub.as_ref(),
    };
    if args.json {
        return print::json(&value(&seen));
    }
    print::text(&render(&seen))
}

/// What is shown.
struct Seen<'a> {
    members: &'a [Member],
    mounted: Option<&'a MountEntry>,
    missing: &'a [u16],
    space: Option<&'a VolumeInfo>,
    scrub: Option<&'a Value>,
}

/// What the daemon of a mount says about the last scrub.
fn scrub_of_mount(entry: &MountEntry) -> Option<Value> {
    let stream = control::connect(entry)?;
    let line = control::ask(&stream, "scrub status", Patience::Short)
        .ok()?
        .ok()?;
    serde_json::from_str(&line).ok()
}

/// How the space is divided, and the last scrub, where nobody uses the devices: the lock is held
/// for a moment only, and is shared. Metadata is only looked into after a clean end.
fn inside(members: &[Member]) -> (Option<VolumeInfo>, Option<Value>) {
    let Some(volume) = assemble(members) else {
        return (None, None);
    };
    let info = volume.info();
    let is_clean = members.iter().all(|member| member.label.clean);
    let summary = is_clean.then(|| crate::scrub::last(volume).ok()).flatten();
    let scrub = summary.and_then(|summary| serde_json::to_value(summary).ok());
    (Some(info), scrub)
}

fn assemble(members: &[Member]) -> Option<Arc<Volume>> {
    let mode = OpenMode {
        read_only: true,
        backend: Backend::Threads,
        ..OpenMode::default()
    };
    let devices = members
        .iter()
        .map(|member| open_device(&member.path, mode))
        .collect::<Result<_, _>>();
    Volume::assemble(devices.ok()?, true).ok()
}

/// The mount that names one of the members as its source.
fn mounted_on(members: &[Member]) -> Option<MountEntry> {
    let table = mounts::mounts().unwrap_or_default();
    table.into_iter().rfind(|entry| {
        let tag = Tag::parse(&entry.source);
        let names = |member: &Member| {
            entry.names_device(&member.path)
                || tag.as_ref().is_some_and(|tag| tag.names(&member.label))
        };
        entry.is_fuse() && members.iter().any(names)
    })
}

fn value(seen: &Seen<'_>) -> Value {
    let &Seen {
        members,
        mounted,
        missing,
        space,
        scrub,
    } = seen;
    let devices: Vec<Value> = members
        .iter()
        .map(|member| {
            let mut device = json!({
                "path": member.path.to_string_lossy(),
                "allocated_bytes": allocated(space, member),
            });
            if let (Some(device), Ok(Value::Object(label))) =
                (device.as_object_mut(), serde_json::to_value(&member.label))
            {
                device.extend(label);
            }
            device
        })
        .collect();
    let label = members.first().map(|member| &member.label);
    json!({
        "fs_uuid": label.map(|label| &label.fs_uuid),
        "label": label.map(|label| &label.label),
        "stripe_unit_bytes": label.map(|label| label.stripe_unit_bytes),
        "device_count": label.map(|label| label.device_count),
        "total_bytes": members.iter().map(|member| member.label.size_bytes).sum::<u64>(),
        "clean": members.iter().all(|member| member.label.clean),
        "mounted_on": mounted.map(|entry| entry.mount_point.to_string_lossy()),
        "missing": missing,
        "devices": devices,
        // Unknown while the file system is mounted: 'braidfs stats' has it then.
        "chunks": space.map(|info| &info.chunks),
        "scrub": scrub,
    })
}

/// Bytes of a member that belong to chunks.
fn allocated(space: Option<&VolumeInfo>, member: &Member) -> Option<u64> {
    let device = space?
        .devices
        .iter()
        .find(|device| device.index == member.label.device_index)?;
    Some(device.allocated_bytes)
}

fn render(seen: &Seen<'_>) -> String {
    let &Seen {
        members,
        mounted,
        missing,
        space,
        scrub,
    } = seen;
    let Some(Member { label, .. }) = members.first() else {
        return String::new();
    };
    let total: u64 = members.iter().map(|member| member.label.size_bytes).sum();
    let state = match mounted {
        Some(entry) => format!("mounted on {}", entry.mount_point.display()),
        None if members.iter().all(|member| member.label.clean) => "clean".to_owned(),
        None => "not closed properly (mounting recovers it), or in use".to_owned(),
    };
    let mut out = format!(
        "file system  {}\nlabel        {}\nstate        {state}\nstripe unit  {}\n\
         size         {} on {} of {} devices\nlast scrub   {}\n\n",
        label.fs_uuid,
        if label.label.is_empty() {
            "-"
        } else {
            &label.label
        },
        format_size(u64::from(label.stripe_unit_bytes)),
        format_size(total),
        members.len(),
        label.device_count,
        scrub.map_or_else(|| "unknown".to_owned(), scrub::summary_text),
    );
    let width = members
        .iter()
        .map(|m| m.path.to_string_lossy().chars().count())
        .max()
        .unwrap_or(0);
    out.push_str(&format!(
        "{:>6}  {:width$}  {:>10}  {:>10}  {:>10}  device uuid\n",
        "member", "path", "size", "allocated", "generation"
    ));
    for member in members {
        let Member { path, label } = member;
        let path = path.to_string_lossy();
        out.push_str(&format!(
            "{:>6}  {path:width$}  {:>10}  {:>10}  {:>10}  {}\n",
            label.device_index,
            format_size(label.size_bytes),
            allocated(space, member).map_or_else(|| "-".to_owned(), format_size),
            label.generation,
            label.device_uuid
        ));
    }
    for index in missing {
        out.push_str(&format!("{index:>6}  missing\n"));
    }
    if let Some(info) = space {
        out.push_str(&chunk_summary(info));
    }
    out
}

/// Chunks by kind and profile.
fn chunk_summary(info: &VolumeInfo) -> String {
    let mut kinds: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for chunk in &info.chunks {
        let kind = format!("{:?} ({:?})", chunk.kind, chunk.profile).to_lowercase();
        let sum = kinds.entry(kind).or_default();
        *sum = (sum.0 + 1, sum.1 + chunk.raw_bytes());
    }
    kinds
        .into_iter()
        .fold("\n".to_owned(), |mut out, (kind, (count, bytes))| {
            out.push_str(&format!(
                "{kind:16}  {count:>4} chunks  {:>10}\n",
                format_size(bytes)
            ));
            out
        })
}
