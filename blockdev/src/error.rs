//! One error type for the crate: small and `Copy`, because one failed device request is reported
//! to every kiobuf that was merged into it.

/// What was asked of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Op {
    /// Device to memory.
    #[error("read")]
    Read,
    /// Memory to device.
    #[error("write")]
    Write,
    /// Make completed writes durable.
    #[error("flush")]
    Flush,
    /// Tell the device that a range holds nothing of value.
    #[error("discard")]
    Discard,
}

/// What went wrong, in the terms that callers match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ErrorKind {
    /// The operating system's errno.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// The device moved fewer bytes than asked and would not continue.
    #[error("short transfer")]
    ShortTransfer,
    /// The address lies in no chunk, or beyond the device.
    #[error("beyond the device")]
    OutOfRange,
    /// The request was dropped before a device ended it.
    #[error("given up before a device ended it")]
    Aborted,
    /// The device was closed or has disappeared.
    #[error("the device is gone")]
    DeviceGone,
    /// The device did not answer in time.
    #[error("the device does not answer")]
    TimedOut,
}

/// What failed, on which device and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op} on device {dev} at byte {at}: {kind}")]
pub struct BlockError {
    /// The cause.
    pub kind: ErrorKind,
    /// The operation that was tried.
    pub op: Op,
    /// Index of the member device; [`BlockError::NO_DEVICE`] if none was reached.
    pub dev: u16,
    /// Byte offset on that device (or in the volume, if no device was reached).
    pub at: u64,
}

impl BlockError {
    /// `dev` of an error that happened before a device was chosen.
    pub const NO_DEVICE: u16 = u16::MAX;

    /// Whether the same may succeed when it is tried again: the device answered, and said no.
    pub fn may_pass(&self) -> bool {
        matches!(self.kind, ErrorKind::Os(_) | ErrorKind::ShortTransfer)
    }

    /// The errno that a caller of read(2) or write(2) would see: what a program can make sense of,
    /// and not what may come from below a device (ECONNABORTED, ENXIO, ETIMEDOUT, ...).
    pub fn errno(&self) -> i32 {
        match self.kind {
            ErrorKind::Os(errno @ (libc::ENOSPC | libc::EROFS)) => errno,
            _ => libc::EIO,
        }
    }
}
