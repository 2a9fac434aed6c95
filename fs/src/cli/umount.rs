//! `braidfs umount`: returns when the data is safe on the devices.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::control::{self, Patience, Waiting};
use super::devices::io_text;
use super::exit::{self, CliError};
use crate::fuse::mounts::{MountEntry, mount_at, mounts, resolve_mount_point};
use crate::fuse::{Unmount, unmount};

/// Unmount; returns when all data is safe on the devices.
#[derive(clap::Args, Debug)]
pub struct UmountArgs {
    /// Where it is mounted, or what
    #[arg(value_name = "MOUNTPOINT")]
    pub place: OsString,

    /// Take it out of the tree now, end when the last user is gone; does not wait
    #[arg(short = 'l', long)]
    pub lazy: bool,

    /// Let requests under way fail
    #[arg(short = 'f', long)]
    pub force: bool,

    #[arg(short = 'n', hide = true)]
    no_mtab: bool,
    #[arg(short = 'r', hide = true)]
    read_only: bool,
    #[arg(short = 'v', hide = true)]
    verbose: bool,
    #[arg(short = 't', hide = true)]
    fs_type: Option<String>,
    #[arg(short = 'N', hide = true)]
    namespace: Option<PathBuf>,
}

/// `braidfs umount`.
pub fn run(args: &UmountArgs) -> Result<(), CliError> {
    if let Some(namespace) = &args.namespace {
        super::mount::enter_namespace(namespace)?;
    }
    let entry = find(Path::new(&args.place))?;
    let place = entry.mount_point.display().to_string();
    let how = match (args.force, args.lazy) {
        (true, _) => Unmount::Force,
        (_, true) => Unmount::Lazy,
        _ => Unmount::Normal,
    };
    // Asked first, as afterwards there is nothing to ask; and not of a mount that may hang.
    let dead = how == Unmount::Normal
        && matches!(
            nix::sys::statvfs::statvfs(&entry.mount_point),
            Err(Errno::ENOTCONN | Errno::ECONNABORTED)
        );
    // The daemon must know that we wait before the mount is gone.
    let waiting = match dead {
        true => None,
        false => control::connect(&entry).and_then(|stream| Waiting::begin(stream).ok()),
    };
    // Writers of a frozen file system would keep it in use.
    if how != Unmount::Lazy && !dead {
        thaw(&entry);
    }
    detach(&entry.mount_point, how).map_err(|error| refused(&place, error, how))?;
    // Where it is mounted elsewhere too (a bind mount), its daemon goes on.
    let elsewhere = mounts().is_ok_and(|all| all.iter().any(|other| other.dev == entry.dev));
    if how == Unmount::Lazy || elsewhere {
        return Ok(());
    }
    match waiting {
        Some(waiting) => waiting
            .end()
            .map_err(|error| exit::failure(format!("{place} is unmounted, but {error}"))),
        None if dead => {
            log::warn!(
                "{place} is unmounted; its daemon had ended before, so what was neither fsynced \
                 nor committed by then is lost"
            );
            Ok(())
        }
        None => Err(exit::failure(format!(
            "{place} is unmounted, but its daemon could not be asked whether all data is safe yet"
        ))),
    }
}

/// Ends a freeze, if there is one; whatever hinders that, the unmount tells.
fn thaw(entry: &MountEntry) {
    let stream = control::connect(entry);
    let told = stream.map(|stream| control::ask(&stream, "thaw", Patience::Short));
    if let Some(Ok(Ok(_))) = told {
        let place = entry.mount_point.display();
        log::warn!("{place} was frozen, and is thawed to be unmounted");
    }
}

/// A forced unmount ends the connection even where open files keep the mount; then it is to leave
/// the tree as well.
fn detach(mount_point: &Path, how: Unmount) -> Result<(), Errno> {
    match unmount(mount_point, how) {
        Err(Errno::EBUSY) if how == Unmount::Force => unmount(mount_point, Unmount::Lazy),
        other => other,
    }
}

fn refused(place: &str, error: Errno, how: Unmount) -> CliError {
    match error {
        Errno::EBUSY => exit::failure(format!(
            "{place} is in use: something has open files or its working directory there \
             (fuser -vm {place} shows what); nothing was unmounted"
        )),
        Errno::EPERM => exit::failure(format!(
            "{place}: not permitted; only root and who mounted it may unmount it"
        )),
        error => exit::failure(format!(
            "{place}: cannot unmount ({how:?}): {}",
            error.desc()
        )),
    }
}

/// The braidfs mount at a directory, or of a source.
pub fn find(place: &Path) -> Result<MountEntry, CliError> {
    let table = |error: std::io::Error| exit::system(format!("mount table: {}", io_text(&error)));
    let path = match resolve_mount_point(place) {
        Ok(path) => path,
        Err(_) => PathBuf::from(place),
    };
    let entry = match mount_at(&path).map_err(table)? {
        Some(entry) => entry,
        None => mounts()
            .map_err(table)?
            .into_iter()
            .rfind(|entry| entry.is_fuse() && Path::new(&entry.source) == place)
            .ok_or_else(|| exit::failure(format!("{}: not mounted", place.display())))?,
    };
    if !entry.is_fuse() {
        return Err(exit::failure(format!(
            "{}: is not a braidfs mount but {}",
            place.display(),
            entry.fs_type
        )));
    }
    Ok(entry)
}
