//! Devices made slow on purpose: a cgroup whose members may move so many bytes a second.
//!
//! Works on either kind of cgroup: version 1 with the `blkio` controller, version 2 with `io`.
//! Only direct I/O is charged to the process that asks for it, so the program under test must
//! bypass the page cache of its devices, and the loop devices that of their files.

use std::fs;
use std::path::{Path, PathBuf};

use crate::env::Skip;
use crate::loopdev::LoopDevice;

/// Where version 1 keeps its block controller.
const V1_ROOT: &str = "/sys/fs/cgroup/blkio";
/// Where version 2 may be.
const V2_ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A cgroup with limits on some devices.
#[derive(Debug)]
pub struct Throttle {
    group: PathBuf,
}

impl Throttle {
    /// Limits reads and writes of each device to `bytes_per_sec` for the members of a new group.
    /// The group is named after the test's folder.
    pub fn new(work: &Path, devices: &[&LoopDevice], bytes_per_sec: u64) -> Result<Self, Skip> {
        let name = work.file_name().expect("the test's folder has a name");
        let v1 = Path::new(V1_ROOT);
        if v1.join("blkio.throttle.read_bps_device").exists() {
            let this = Self::in_group(v1.join(name))?;
            for device in devices {
                let line = format!("{} {bytes_per_sec}", device.numbers());
                this.set("blkio.throttle.read_bps_device", &line)?;
                this.set("blkio.throttle.write_bps_device", &line)?;
            }
            return Ok(this);
        }
        for root in V2_ROOTS.map(Path::new) {
            let controllers = fs::read_to_string(root.join("cgroup.controllers"));
            if controllers
                .unwrap_or_default()
                .split_whitespace()
                .all(|word| word != "io")
            {
                continue;
            }
            let enabled = fs::write(root.join("cgroup.subtree_control"), "+io");
            enabled.map_err(|error| Skip(format!("cgroup io controller: {error}")))?;
            let this = Self::in_group(root.join(name))?;
            for device in devices {
                let numbers = device.numbers();
                let line = format!("{numbers} rbps={bytes_per_sec} wbps={bytes_per_sec}");
                this.set("io.max", &line)?;
            }
            return Ok(this);
        }
        Err(Skip(
            "no cgroup block I/O controller (blkio or io) here".to_owned(),
        ))
    }

    /// The file to write a process id to: it and its children are then limited.
    pub fn procs(&self) -> PathBuf {
        self.group.join("cgroup.procs")
    }

    fn in_group(group: PathBuf) -> Result<Self, Skip> {
        match fs::create_dir(&group) {
            Ok(()) => Ok(Self { group }),
            Err(error) => Err(Skip(format!(
                "cannot make cgroup {}: {error}",
                group.display()
            ))),
        }
    }

    fn set(&self, file: &str, line: &str) -> Result<(), Skip> {
        let path = self.group.join(file);
        let done = fs::write(&path, line);
        done.map_err(|error| {
            Skip(format!(
                "cannot write '{line}' to {}: {error}",
                path.display()
            ))
        })
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // A group with a process in it cannot be removed; the runner's sweep tries again.
        let _still_busy = fs::remove_dir(&self.group);
    }
}

/// Removes the group of a test that did not get to.
pub fn remove_leftovers(work: &Path) {
    let Some(name) = work.file_name() else { return };
    for root in V2_ROOTS.iter().chain([&V1_ROOT]) {
        let _not_there = fs::remove_dir(Path::new(root).join(name));
    }
}
