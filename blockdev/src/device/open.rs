//! Opening and locking files and block devices.
//!
//! A writer holds an exclusive flock, a reader a shared one, for the device's life; a block device
//! is also opened with O_EXCL, which the kernel refuses while it is mounted, swapped on, or part of
//! a device-mapper or md array. A regular file that backs a loop device is refused too, because
//! whatever uses that loop device would not see our lock.

use super::BlockDevice;
use super::file::{DeviceFile, Locked, block_device_size, is_write_protected};
use super::pool::PoolDevice;
use crate::units::{BLOCK_SIZE, round_down};
use nix::fcntl::OFlag;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel offers it, else threads.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// The thread pool.
    Threads,
}

/// How to open a device.
#[derive(Clone, Copy, Debug)]
pub struct OpenMode {
    /// Take a shared lock and do not write.
    pub read_only: bool,
    /// Together with that: open it for writing if that is allowed, so that
    /// [`BlockDevice::make_writable`] can follow.
    pub for_writing_later: bool,
    /// Bypass the kernel's page cache (O_DIRECT) where the device allows it.
    pub direct: bool,
    /// The backend.
    pub backend: Backend,
    /// See [`BlockDevice::answer_time_max`].
    pub answer_time_max: Duration,
}

/// A device that has not answered a request after this long is not going to for a while: the
/// kernel's own disk drivers give up after 30 s.
pub const ANSWER_TIME_DEFAULT: Duration = Duration::from_secs(30);

impl Default for OpenMode {
    fn default() -> Self {
        OpenMode {
            read_only: false,
            for_writing_later: false,
            direct: false,
            backend: Backend::Auto,
            answer_time_max: ANSWER_TIME_DEFAULT,
        }
    }
}

/// Why a device cannot be opened. Messages do not name the device: the caller knows it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process (or this one) has it open for braidfs, has it mounted, or uses it otherwise.
    #[error("is in use (mounted, or opened by another program)")]
    InUse,
    /// A regular file that backs a loop device.
    #[error("is in use by loop device {}", .0.display())]
    BacksLoop(PathBuf),
    /// Neither a regular file nor a block device.
    #[error("is neither a regular file nor a block device")]
    NotADevice,
    /// The kernel or its policy does not offer io_uring.
    #[error("io_uring is not available: {}", std::io::Error::from_raw_os_error(*.0))]
    NoUring(i32),
    /// The operating system refused.
    #[error("cannot be opened: {}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
}

/// Opens and locks a regular file or block device. This starts threads, so a daemon forks before.
pub fn open_device(path: &Path, mode: OpenMode) -> Result<Arc<dyn BlockDevice>, OpenError> {
    let file = open_file(path, mode)?;
    if mode.backend == Backend::Threads {
        return Ok(Arc::new(PoolDevice::new(file)));
    }
    match super::uring::UringDevice::new(file) {
        Ok(device) => Ok(Arc::new(device)),
        Err((_, errno)) if mode.backend == Backend::Uring => Err(OpenError::NoUring(errno)),
        Err((file, errno)) => {
            let error = std::io::Error::from_raw_os_error(errno);
            log::info!("{}: no io_uring ({error}), using threads", file.name);
            Ok(Arc::new(PoolDevice::new(file)))
        }
    }
}

/// The loop device that a regular file backs, if any.
pub fn backed_loop_device(path: &Path) -> Option<PathBuf> {
    let meta = path.metadata().ok().filter(|meta| meta.is_file())?;
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let backing = entry.path().join("loop/backing_file");
        let Ok(text) = std::fs::read_to_string(backing) else {
            continue;
        };
        let same = Path::new(text.trim_end_matches('\n'))
            .metadata()
            .is_ok_and(|other| (other.dev(), other.ino()) == (meta.dev(), meta.ino()));
        if same {
            return Some(Path::new("/dev").join(entry.file_name()));
        }
    }
    None
}

/// Whether a device can be read but not written, whoever asks: a write-protected block device, or a
/// file on a file system that is mounted read-only.
pub fn write_protected(path: &Path) -> bool {
    use nix::unistd::{AccessFlags, access};
    if access(path, AccessFlags::W_OK) == Err(nix::errno::Errno::EROFS) {
        return true;
    }
    let is_block = |file: &File| {
        let meta = file.metadata();
        meta.is_ok_and(|meta| meta.file_type().is_block_device())
    };
    File::open(path).is_ok_and(|file| is_block(&file) && is_write_protected(&file))
}

fn open_file(path: &Path, mode: OpenMode) -> Result<DeviceFile, OpenError> {
    let meta = path.metadata().map_err(open_error)?;
    let is_block = meta.file_type().is_block_device();
    if !is_block && !meta.is_file() {
        return Err(OpenError::NotADevice);
    }
    if let Some(device) = backed_loop_device(path) {
        return Err(OpenError::BacksLoop(device));
    }
    let open = |direct: bool, write: bool| {
        let mut flags = OFlag::O_CLOEXEC;
        flags.set(OFlag::O_DIRECT, direct);
        flags.set(OFlag::O_EXCL, is_block && !mode.read_only);
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(write)
            .custom_flags(flags.bits())
            .open(path)
    };
    let is_writable = !mode.read_only || mode.for_writing_later && open(false, true).is_ok();
    let (file, direct) = match open(mode.direct, is_writable) {
        Ok(file) => (file, mode.direct),
        // This file system does not know O_DIRECT.
        Err(error) if mode.direct && error.raw_os_error() == Some(libc::EINVAL) => {
            (open(false, is_writable).map_err(open_error)?, false)
        }
        Err(error) => return Err(open_error(error)),
    };
    if is_block && !mode.read_only && is_write_protected(&file) {
        return Err(OpenError::Os(libc::EROFS));
    }
    lock(&file, mode.read_only)?;
    let size = match is_block {
        true => block_device_size(&file).map_err(OpenError::Os)?,
        false => file.metadata().map_err(open_error)?.len(),
    };
    let name = path.display().to_string();
    let size_bytes = round_down(size, BLOCK_SIZE);
    Ok(DeviceFile {
        name,
        file,
        lock: Some(Arc::new(Locked)),
        size_bytes,
        direct,
        is_block,
        is_writable,
        answer_time_max: mode.answer_time_max,
        claim: OnceLock::new(),
    })
}

fn lock(file: &File, shared: bool) -> Result<(), OpenError> {
    let result = if shared {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    result.map_err(|error| match error {
        TryLockError::WouldBlock => OpenError::InUse,
        TryLockError::Error(error) => open_error(error),
    })
}

pub(super) fn open_error(error: std::io::Error) -> OpenError {
    match error.raw_os_error().unwrap_or(libc::EIO) {
        libc::EBUSY => OpenError::InUse,
        errno => OpenError::Os(errno),
    }
}
