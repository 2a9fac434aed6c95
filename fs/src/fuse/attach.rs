//! Attaching a FUSE connection to a mount point, and detaching it.
//!
//! With the privilege this is mount(2); without, fusermount3 does it and hands the connection over
//! a socket. On the way out, only a mount that is still ours is taken away: something else may be
//! on the same directory by then.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair,
};

use super::init::InitError;
use super::mounts::{self, MountEntry};

const DEVICE: &str = "/dev/fuse";
const FUSERMOUNT: &str = "fusermount3";

/// What is to be mounted, where and how.
#[derive(Clone, Debug)]
pub struct MountSpec {
    /// What the mount table shows as the source.
    pub source: String,
    /// The subtype: the type shows as `fuse.SUBTYPE`; plain `fuse` when empty.
    pub subtype: String,
    /// The directory, absolute.
    pub mount_point: PathBuf,
    /// Let other users in; the kernel checks permissions in any case.
    pub allow_other: bool,
    /// Let root in besides the owner.
    pub allow_root: bool,
    /// Mount flags of the VFS.
    pub flags: MsFlags,
}

/// Why a mount could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// /dev/fuse cannot be opened.
    #[error("cannot open /dev/fuse: {0}; is the fuse module loaded?")]
    Device(#[source] io::Error),
    /// The mount point cannot be used.
    #[error("mount point {0}: {1}")]
    MountPoint(PathBuf, #[source] io::Error),
    /// mount(2) failed.
    #[error("mount(2) on {0}: {1}")]
    Mount(PathBuf, Errno),
    /// fusermount3 cannot be run.
    #[error("cannot run fusermount3 (needed to mount without root; package fuse3): {0}")]
    NoFusermount(#[source] io::Error),
    /// fusermount3 refused; its own words.
    #[error("{0}")]
    Fusermount(String),
    /// The session did not begin.
    #[error("cannot start the FUSE session: {0}")]
    Session(#[from] InitError),
}

/// Mounts; returns the connection to the kernel.
pub(super) fn attach(spec: &MountSpec) -> Result<OwnedFd, AttachError> {
    match attach_directly(spec) {
        Err(AttachError::Mount(_, Errno::EPERM)) => attach_by_helper(spec),
        other => other,
    }
}

/// A connection of our own; never one of the standard descriptors, which children inherit.
fn open_device() -> Result<File, AttachError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(AttachError::Device)
}

nix::ioctl_read!(
    /// FUSE_DEV_IOC_CLONE: makes a fresh descriptor of the device one more way to a connection.
    fuse_dev_clone,
    229,
    0,
    u32
);

/// A further descriptor of a connection, so that a thread has a queue of its own.
#[expect(unsafe_code, reason = "an ioctl")]
pub(super) fn clone_connection(connection: &OwnedFd) -> io::Result<OwnedFd> {
    let device = open_device().map_err(|error| match error {
        AttachError::Device(error) => error,
        other => io::Error::other(other),
    })?;
    let mut number = u32::try_from(connection.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads one u32, the number of an open descriptor, which `connection` is.
    unsafe { fuse_dev_clone(device.as_raw_fd(), &raw mut number) }?;
    Ok(OwnedFd::from(device))
}

fn attach_directly(spec: &MountSpec) -> Result<OwnedFd, AttachError> {
    let device = open_device()?;
    let mount_point = &spec.mount_point;
    let meta = fs::metadata(mount_point)
        .map_err(|error| AttachError::MountPoint(mount_point.clone(), error))?;
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        meta.mode() & libc::S_IFMT,
        nix::unistd::getuid(),
        nix::unistd::getgid(),
    );
    if spec.allow_other || spec.allow_root {
        data.push_str(",allow_other");
    }
    let fs_type = match spec.subtype.as_str() {
        "" => "fuse".to_owned(),
        subtype => format!("fuse.{subtype}"),
    };
    let (source, data) = (spec.source.as_str(), data.as_str());
    nix::mount::mount(
        Some(source),
        mount_point,
        Some(fs_type.as_str()),
        spec.flags,
        Some(data),
    )
    .map_err(|error| AttachError::Mount(mount_point.clone(), error))?;
    Ok(OwnedFd::from(device))
}

fn attach_by_helper(spec: &MountSpec) -> Result<OwnedFd, AttachError> {
    let system = |error: Errno| AttachError::Session(InitError::System(error));
    // Without CLOEXEC: the helper finds its end by number. Nothing else is started meanwhile.
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::empty(),
    )
    .map_err(system)?;
    let helper = Command::new(FUSERMOUNT)
        .arg("-o")
        .arg(helper_options(spec))
        .arg("--")
        .arg(&spec.mount_point)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(AttachError::NoFusermount)?;
    drop(theirs);
    let connection = receive_descriptor(&ours);
    let output = helper
        .wait_with_output()
        .map_err(AttachError::NoFusermount)?;
    match connection {
        Ok(connection) => Ok(connection),
        Err(error) => {
            let said = String::from_utf8_lossy(&output.stderr);
            match said.trim() {
                "" => Err(system(error)),
                said => Err(AttachError::Fusermount(said.to_owned())),
            }
        }
    }
}

/// Options in fusermount3's spelling. It adds nosuid and nodev by itself.
fn helper_options(spec: &MountSpec) -> String {
    let escape = |text: &str| text.replace('\\', "\\\\").replace(',', "\\,");
    let mut options = vec![format!("fsname={}", escape(&spec.source))];
    if !spec.subtype.is_empty() {
        options.push(format!("subtype={}", escape(&spec.subtype)));
    }
    options.push("default_permissions".to_owned());
    if spec.allow_other || spec.allow_root {
        options.push("allow_other".to_owned());
    }
    let named = [
        (MsFlags::MS_RDONLY, "ro"),
        (MsFlags::MS_NOEXEC, "noexec"),
        (MsFlags::MS_NOATIME, "noatime"),
        (MsFlags::MS_NOSUID, "nosuid"),
        (MsFlags::MS_NODEV, "nodev"),
    ];
    for (flag, name) in named {
        if spec.flags.contains(flag) {
            options.push(name.to_owned());
        }
    }
    options.join(",")
}

/// The descriptor that fusermount3 sends with one byte.
#[expect(unsafe_code, reason = "a received descriptor comes as a bare number")]
fn receive_descriptor(socket: &OwnedFd) -> Result<OwnedFd, Errno> {
    let mut byte = [0_u8];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!(RawFd);
    let message = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(&descriptor) = descriptors.first()
        {
            // SAFETY: the kernel has just installed this descriptor for this message; nobody else
            // knows its number.
            return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
        }
    }
    Err(Errno::ECONNRESET)
}

/// How to detach a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Refused while in use.
    Normal,
    /// Out of the tree now, ended when the last user is gone.
    Lazy,
    /// Requests under way fail; the connection ends.
    Force,
}

/// Detaches what is mounted there, by umount(2) or, without the privilege, by fusermount3.
pub fn unmount(mount_point: &Path, how: Unmount) -> Result<(), Errno> {
    let flags = MntFlags::UMOUNT_NOFOLLOW
        | match how {
            Unmount::Normal => MntFlags::empty(),
            Unmount::Lazy => MntFlags::MNT_DETACH,
            Unmount::Force => MntFlags::MNT_FORCE,
        };
    match nix::mount::umount2(mount_point, flags) {
        Err(Errno::EPERM) => unmount_by_helper(mount_point, how),
        other => other,
    }
}

fn unmount_by_helper(mount_point: &Path, how: Unmount) -> Result<(), Errno> {
    let mut helper = Command::new(FUSERMOUNT);
    helper.arg("-u");
    if how != Unmount::Normal {
        helper.arg("-z");
    }
    let output = helper
        .arg("--")
        .arg(mount_point)
        .stdin(Stdio::null())
        .output()
        .map_err(|_| Errno::EPERM)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        Err(Errno::EBUSY)
    } else {
        Err(Errno::EPERM)
    }
}

/// Detaches a mount, if it is still the one on top of its mount point.
///
/// Device numbers are reused, but not together with a source whose members somebody holds; so the
/// caller must still hold them.
pub fn unmount_if_ours(mount: &MountEntry, how: Unmount) -> Result<(), Errno> {
    let on_top = mounts::mount_at(&mount.mount_point).map_err(|_| Errno::EIO)?;
    match on_top {
        Some(entry) if entry.dev == mount.dev && entry.source == mount.source => {
            unmount(&mount.mount_point, how)
        }
        _ => Ok(()),
    }
}

/// Ends the connection of a mount, whoever uses it: all their requests fail from now on. Needs the
/// rights of whoever mounted, and the control file system of FUSE.
pub fn abort_connection(dev: (u32, u32)) -> io::Result<()> {
    fs::write(format!("/sys/fs/fuse/connections/{}/abort", dev.1), "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helper_options_escape_what_they_carry() {
        let spec = MountSpec {
            source: "/a,b:/c\\d".to_owned(),
            subtype: "braidfs".to_owned(),
            mount_point: PathBuf::from("/mnt"),
            allow_other: false,
            allow_root: false,
            flags: MsFlags::MS_RDONLY | MsFlags::MS_NOATIME,
        };
        assert_eq!(
            helper_options(&spec),
            "fsname=/a\\,b:/c\\\\d,subtype=braidfs,default_permissions,ro,noatime"
        );
    }
}
