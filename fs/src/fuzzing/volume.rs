//! Small volumes on simulated devices, whose images share their pages.

use std::sync::{Arc, OnceLock};

use braidfs_blockdev::device::sim::{SimImage, SimPower};
use braidfs_blockdev::{BlockDevice, FormatOptions, SimDevice, Volume, VolumeError};

use crate::FileSystem;

use super::tree;

const DEVICE_BYTES: u64 = 32 << 20;

fn devices(images: &[SimImage]) -> Vec<Arc<SimDevice>> {
    let device = |(nth, image): (usize, &SimImage)| {
        SimDevice::with_image(&format!("sim{nth}"), image.clone(), &SimPower::new())
    };
    images.iter().enumerate().map(device).collect()
}

pub(crate) fn assemble(
    devices: &[Arc<SimDevice>],
    read_only: bool,
) -> Result<Arc<Volume>, VolumeError> {
    let share = |device: &Arc<SimDevice>| Arc::clone(device) as Arc<dyn BlockDevice>;
    Volume::assemble(devices.iter().map(share).collect(), read_only)
}

fn make(count: u8) -> Vec<SimImage> {
    let share = |device: &Arc<SimDevice>| Arc::clone(device) as Arc<dyn BlockDevice>;
    let device = |nth| SimDevice::new(&format!("sim{nth}"), DEVICE_BYTES);
    let devices: Vec<_> = (0..count).map(device).collect();
    let options = FormatOptions {
        stripe_unit_bytes: 64 << 10,
        fs_uuid: Some([count; 16]),
        ..FormatOptions::default()
    };
    let volume = Volume::format(devices.iter().map(share).collect(), &options).expect("format");
    crate::format(volume).expect("make the file system");
    let volume = assemble(&devices, false).expect("assemble");
    let fs = FileSystem::mount(volume, tree::options(false)).expect("mount");
    tree::make(&fs).expect("make the tree");
    fs.unmount().expect("unmount");
    devices.iter().map(|device| device.snapshot()).collect()
}

/// A volume on one member with the tree of [`tree::make`].
pub(crate) fn single() -> Vec<Arc<SimDevice>> {
    static IMAGES: OnceLock<Vec<SimImage>> = OnceLock::new();
    devices(IMAGES.get_or_init(|| make(1)))
}

/// The same as a power cut leaves it after some commits.
#[cfg(test)]
pub(crate) fn in_use() -> Vec<Arc<SimDevice>> {
    let made = single();
    let volume = assemble(&made, false).expect("assemble");
    let fs = FileSystem::mount(volume, tree::options(false)).expect("mount");
    for name in [b"one", b"two"] {
        fs.mkdir(crate::ROOT_INO, name, 0o755, &tree::CRED)
            .expect("make a directory");
        fs.sync().expect("a commit");
    }
    let images: Vec<SimImage> = made.iter().map(|device| device.snapshot()).collect();
    fs.unmount().expect("unmount");
    devices(&images)
}

/// The same on two members.
pub(super) fn pair() -> Vec<Arc<SimDevice>> {
    static IMAGES: OnceLock<Vec<SimImage>> = OnceLock::new();
    devices(IMAGES.get_or_init(|| make(2)))
}
