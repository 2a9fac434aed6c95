//! Opening and locking files and block devices.
use crate::device::BlockDevice;
use std::path::Path;
use std::sync::Arc;

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
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenMode {
    /// Take a shared lock and never write.
    pub read_only: bool,
    /// Bypass the kernel's page cache (O_DIRECT) where the device allows it.
    pub direct: bool,
    /// The backend.
    pub backend: Backend,
}

/// Why a device cannot be opened. Messages do not name the device: the caller knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process (or this one) has it open for braidfs, has it mounted, or uses it otherwise.
    #[error("is in use")]
    InUse,
    /// Neither a regular file nor a block device.
    #[error("is neither a regular file nor a block device")]
    NotADevice,
    /// The operating system refused.
    #[error("cannot be opened: {}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
}

/// Opens and locks a regular file or block device.
pub fn open_device(_path: &Path, _mode: OpenMode) -> Result<Arc<dyn BlockDevice>, OpenError> {
    unimplemented!()
}
