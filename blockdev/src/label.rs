//! The device label.
use serde::Serialize;
use std::path::Path;

/// What a label says, for people and for finding members.
#[derive(Clone, Debug, Serialize)]
pub struct LabelInfo {
    /// UUID of the file system.
    pub fs_uuid: String,
    /// UUID of this device.
    pub device_uuid: String,
    /// Index of this device among the members.
    pub device_index: u16,
    /// Number of members.
    pub device_count: u16,
    /// Size of this member as labelled.
    pub size_bytes: u64,
    /// Generation of the label.
    pub generation: u64,
    /// Stripe unit in bytes.
    pub stripe_unit_bytes: u32,
    /// The label that the user gave.
    pub label: String,
    /// Whether the volume was closed properly.
    pub clean: bool,
}

/// Why a label cannot be had. Each message says what was seen, the caller names the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The device could not be read.
    #[error("cannot be read: {}", std::io::Error::from_raw_os_error(*.0))]
    Io(i32),
    /// Neither place holds anything like a label.
    #[error("is not a braidfs device")]
    Missing,
}

/// Reads the newest valid label of a file or block device without locking it.
pub fn read_label(_path: &Path) -> Result<LabelInfo, LabelError> {
    unimplemented!()
}
