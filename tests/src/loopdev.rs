//! Loop devices that detach themselves.

use std::path::{Path, PathBuf};

use crate::command::Cmd;
use crate::env::Env;
use crate::volume::{MIB, Volume};

/// A loop device over an image file.
#[derive(Debug)]
pub struct LoopDevice {
    /// Its device node.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Attaches a file, bypassing the page cache for it, so that the device is as slow as it is.
    pub fn attach(image: &Path) -> Self {
        Self::attach_with(image, &["--direct-io=on"])
    }

    /// Attaches a file so that it cannot be written.
    pub fn attach_read_only(image: &Path) -> Self {
        Self::attach_with(image, &["--read-only"])
    }

    fn attach_with(image: &Path, flags: &[&str]) -> Self {
        let output = Cmd::new("losetup")
            .args(["--find", "--show"])
            .args(flags)
            .arg(image)
            .quiet()
            .ok();
        Self {
            path: PathBuf::from(output.stdout.trim()),
        }
    }

    /// `major:minor`, as a cgroup wants it.
    pub fn numbers(&self) -> String {
        let name = self
            .path
            .file_name()
            .expect("a device has a name")
            .to_string_lossy();
        let path = format!("/sys/block/{name}/dev");
        std::fs::read_to_string(&path)
            .expect("sysfs knows the loop device")
            .trim()
            .to_owned()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Write protection would outlast the device's file.
        Cmd::new("blockdev")
            .arg("--setrw")
            .arg(&self.path)
            .quiet()
            .run();
        let detach = Cmd::new("losetup").arg("--detach").arg(&self.path);
        detach.quiet().run();
    }
}

/// Detaches every loop device whose file is in a folder.
pub fn detach_below(dir: &Path) {
    let list = Cmd::new("losetup").args(["--list", "--noheadings", "--output", "NAME,BACK-FILE"]);
    for line in list.quiet().run().stdout.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(file)) = (words.next(), words.next()) else {
            continue;
        };
        if Path::new(file).starts_with(dir) {
            Cmd::new("losetup").args(["--detach", name]).quiet().run();
        }
    }
}

/// A volume of two members over loop devices; the second value keeps them.
pub fn on_loop_devices<'e>(env: &'e Env, stem: &str, label: &str) -> (Volume<'e>, Vec<LoopDevice>) {
    let images = Volume::unformatted(env, stem, &[128 * MIB; 2]);
    let attach = |image: &PathBuf| LoopDevice::attach(image);
    let loops: Vec<LoopDevice> = images.devices.iter().map(attach).collect();
    let devices: Vec<PathBuf> = loops.iter().map(|device| device.path.clone()).collect();
    let mkfs = env.braidfs().args(["mkfs", "--label", label]);
    mkfs.args(&devices).ok();
    (Volume::on(env, stem, devices), loops)
}
