//! The simulated device.
use crate::device::BlockDevice;
use crate::request::DeviceRequest;
use std::sync::Arc;

/// A device in memory that records what it is asked and fails as told.
pub struct SimDevice {}

impl SimDevice {
    /// A zeroed device.
    pub fn new(_name: &str, _size_bytes: u64) -> Arc<SimDevice> {
        unimplemented!()
    }
}

impl BlockDevice for SimDevice {
    fn name(&self) -> &str {
        unimplemented!()
    }
    fn size_bytes(&self) -> u64 {
        unimplemented!()
    }
    fn kind(&self) -> &'static str {
        "sim"
    }
    fn submit(&self, _request: DeviceRequest) {}
}
