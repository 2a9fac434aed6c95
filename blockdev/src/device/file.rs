//! A file or block device, opened and locked, with the plain system calls on it.
#![expect(unsafe_code, reason = "system calls on raw memory and device ioctls")]

use super::open::{OpenError, open_error};
use crate::error::{ErrorKind, Op};
use crate::request::DeviceRequest;
use crate::units::dev_len;
use libc::iovec;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The kernel's limit on segments of one vectored call.
pub(super) const IOV_MAX: usize = 1024;

/// An open, locked device.
pub(super) struct DeviceFile {
    pub name: String,
    pub file: File,
    /// Shared by all shares; the last one to go releases the lock.
    pub lock: Option<Arc<Locked>>,
    pub size_bytes: u64,
    pub direct: bool,
    pub is_block: bool,
    pub is_writable: bool,
    pub answer_time_max: Duration,
    /// A block device that was opened shared is opened once more when it is taken for ourselves.
    pub claim: OnceLock<File>,
}

/// Stands for the lock of an open file.
pub(super) struct Locked;

impl Drop for DeviceFile {
    /// The lock would go with the last reference to the open file, but the kernel may have one for
    /// a moment longer: for a request that has just ended, or a program that is being started.
    fn drop(&mut self) {
        if self.lock.take().and_then(Arc::into_inner).is_some()
            && let Err(error) = self.file.unlock()
        {
            log::debug!("{}: unlocked by closing it alone: {error}", self.name);
        }
    }
}

nix::ioctl_write_ptr_bad!(
    /// Discards a range of a block device: first byte and length.
    blkdiscard,
    nix::request_code_none!(0x12, 119),
    [u64; 2]
);

nix::ioctl_read!(
    /// Size of a block device in bytes.
    blkgetsize64,
    0x12,
    114,
    u64
);

nix::ioctl_read_bad!(
    /// Whether a block device is write-protected: not zero.
    blkroget,
    nix::request_code_none!(0x12, 94),
    libc::c_int
);

/// Whether a block device is write-protected. The kernel opens it for writing all the same, and
/// refuses each write.
pub(super) fn is_write_protected(file: &File) -> bool {
    let mut protected = 0;
    // SAFETY: the ioctl writes one int to the given place.
    unsafe { blkroget(file.as_raw_fd(), &mut protected) }.is_ok() && protected != 0
}

/// Size of a block device.
pub(super) fn block_device_size(file: &File) -> Result<u64, i32> {
    let mut size = 0;
    // SAFETY: the ioctl writes one u64 to the given place.
    unsafe { blkgetsize64(file.as_raw_fd(), &mut size) }.map_err(|errno| errno as i32)?;
    Ok(size)
}

impl DeviceFile {
    /// The same open file (and lock) once more.
    pub(super) fn share(&self) -> std::io::Result<DeviceFile> {
        Ok(DeviceFile {
            name: self.name.clone(),
            file: self.file.try_clone()?,
            lock: self.lock.clone(),
            claim: OnceLock::new(),
            ..*self
        })
    }

    /// See [`super::BlockDevice::make_writable`].
    pub(super) fn make_writable(&self) -> Result<(), OpenError> {
        if !self.is_writable || self.is_block && is_write_protected(&self.file) {
            return Err(OpenError::Os(libc::EROFS));
        }
        if self.file.try_lock().is_err() {
            // Asking for more may have cost what there was.
            return self.file.try_lock_shared().map_or_else(
                |_| Err(OpenError::Os(libc::ENOLCK)),
                |()| Err(OpenError::InUse),
            );
        }
        if self.is_block && self.claim.get().is_none() {
            let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let mut options = File::options();
            let exclusively = libc::O_EXCL | libc::O_CLOEXEC;
            let claim = options.read(true).custom_flags(exclusively).open(same);
            let claim = claim.map_err(open_error)?;
            self.claim.get_or_init(|| claim);
        }
        Ok(())
    }

    /// Does the whole request on this thread. Short transfers are continued.
    pub(super) fn transfer(
        &self,
        request: &DeviceRequest,
        iovecs: &mut Vec<iovec>,
    ) -> Result<u64, ErrorKind> {
        match request.op() {
            Op::Flush => self.sync().map(|()| 0),
            Op::Discard => self
                .discard(request.offset(), request.len())
                .map(|()| request.len()),
            Op::Read | Op::Write => {
                let mut done = 0;
                while done < request.len() {
                    iovecs.clear();
                    request.fill_iovecs_from(done, iovecs);
                    iovecs.truncate(IOV_MAX);
                    match self.transfer_once(request.op(), request.offset() + done, iovecs)? {
                        0 => break,
                        bytes => done += bytes,
                    }
                }
                Ok(done)
            }
        }
    }

    fn transfer_once(&self, op: Op, offset: u64, iovecs: &[iovec]) -> Result<u64, ErrorKind> {
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        let at = libc::off_t::try_from(offset).map_err(|_| ErrorKind::OutOfRange)?;
        loop {
            let fd = self.file.as_raw_fd();
            // SAFETY: the iovecs describe memory that the request's kiobufs own until it ends, and
            // the request outlives this call; nobody else accesses it in conflict (PageVector).
            let moved = unsafe {
                match op {
                    Op::Read => libc::preadv(fd, iovecs.as_ptr(), count, at),
                    _ => libc::pwritev(fd, iovecs.as_ptr(), count, at),
                }
            };
            match usize::try_from(moved) {
                Ok(bytes) => return Ok(dev_len(bytes)),
                Err(_) => match nix::errno::Errno::last_raw() {
                    libc::EINTR => continue,
                    errno => return Err(ErrorKind::Os(errno)),
                },
            }
        }
    }

    pub(super) fn sync(&self) -> Result<(), ErrorKind> {
        self.file.sync_data().map_err(os_kind)
    }

    /// A block device that cannot discard may still be able to zero a range by unmapping it, which
    /// is what punching a hole means there.
    fn discard(&self, offset: u64, len: u64) -> Result<(), ErrorKind> {
        use nix::fcntl::FallocateFlags;
        if self.is_block {
            let range = [offset, len];
            // SAFETY: the ioctl reads two u64 from the given place.
            match unsafe { blkdiscard(self.file.as_raw_fd(), &range) } {
                Err(nix::errno::Errno::EOPNOTSUPP) => {}
                Err(errno) => return Err(ErrorKind::Os(errno as i32)),
                Ok(_) => return Ok(()),
            }
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |value| i64::try_from(value).map_err(|_| ErrorKind::OutOfRange);
        nix::fcntl::fallocate(&self.file, flags, signed(offset)?, signed(len)?)
            .map_err(|errno| ErrorKind::Os(errno as i32))
    }
}

/// The kind of a failed call.
pub(super) fn os_kind(error: std::io::Error) -> ErrorKind {
    ErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO))
}
