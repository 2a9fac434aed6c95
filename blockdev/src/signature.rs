//! What else may live on a device.
use crate::device::BlockDevice;

/// Names what a device seems to hold already, so that formatting can be refused.
pub fn foreign_signature(_device: &dyn BlockDevice) -> Option<&'static str> {
    unimplemented!()
}
