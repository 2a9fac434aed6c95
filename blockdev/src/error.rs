//! One error type for the crate: small and `Copy`, because one failed device request is reported
//! to every kiobuf that was merged into it.

/// What was asked of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Device to memory.
    Read,
    /// Memory to device.
    Write,
    /// Make completed writes durable.
    Flush,
    /// Tell the device that a range holds nothing of value.
    Discard,
}

/// What went wrong, in the terms that callers match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The operating system's errno.
    Os(i32),
    /// The device moved fewer bytes than asked and would not continue.
    ShortTransfer,
    /// The address lies in no chunk, or beyond the device.
    OutOfRange,
    /// The request was dropped before a device ended it.
    Aborted,
    /// The device was closed or has disappeared.
    DeviceGone,
    /// The device did not answer in time.
    TimedOut,
}

/// What failed, on which device and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op:?} on device {dev} at {at:#x}: {kind:?}")]
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

    /// The errno that a caller of read(2) or write(2) would see.
    pub fn errno(&self) -> i32 {
        match self.kind {
            ErrorKind::Os(errno) => errno,
            _ => libc::EIO,
        }
    }
}
