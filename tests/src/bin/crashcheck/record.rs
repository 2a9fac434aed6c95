//! Runs a workload on simulated devices and keeps what is needed to cut the power anywhere in it:
//! the devices' record, the tree after each step, and what was promised by then.
//!
//! The workload is run twice: once to see the tree after each step, and once, undisturbed by
//! looking, for the record. Inode numbers and bytes are the same in both.

use std::sync::Arc;
use std::time::Duration;

use braidfs::{AtimeMode, CACHE_BYTES_MIN, Errno, FileSystem, MountOptions};
use braidfs_blockdev::device::sim::{
    SimDevice, SimEvent, SimHistory, SimImage, SimPower, SimReplay,
};
use braidfs_blockdev::{BlockDevice, FormatOptions, Volume};

use crate::ops::{FIRST, Step, Workload, name_of, steps_of};
use crate::session::{Promise, Session};
use crate::tree::Tree;

/// Members of a volume, at most.
pub const DEVICES_MAX: usize = 3;

/// Bytes of all members together.
const VOLUME_BYTES: usize = 96 << 20;

pub fn options() -> MountOptions {
    MountOptions {
        cache_bytes: CACHE_BYTES_MIN,
        commit_interval: Duration::from_secs(3600),
        atime: AtimeMode::Noatime,
        ..MountOptions::default()
    }
}

pub fn devices_of(images: &[SimImage]) -> Vec<Arc<SimDevice>> {
    let power = SimPower::new();
    let images = images.iter().enumerate();
    images
        .map(|(nth, image)| SimDevice::with_image(&format!("sim{nth}"), image.clone(), &power))
        .collect()
}

/// The volume on these devices.
pub fn assemble(devices: &[Arc<SimDevice>], read_only: bool) -> Result<Arc<Volume>, String> {
    let members = devices.iter();
    let members = members.map(|device| Arc::clone(device) as Arc<dyn BlockDevice>);
    Volume::assemble(members.collect(), read_only).map_err(|error| format!("assemble: {error}"))
}

pub fn mount(devices: &[Arc<SimDevice>]) -> Result<Arc<FileSystem>, String> {
    mount_with(devices, options())
}

fn mount_with(
    devices: &[Arc<SimDevice>],
    options: MountOptions,
) -> Result<Arc<FileSystem>, String> {
    FileSystem::mount(assemble(devices, false)?, options).map_err(|e| format!("mount: {e}"))
}

fn format(devices: &[Arc<SimDevice>]) -> Result<(), String> {
    let members = devices.iter();
    let members = members.map(|device| Arc::clone(device) as Arc<dyn BlockDevice>);
    let format = FormatOptions {
        stripe_unit_bytes: 64 << 10,
        ..FormatOptions::default()
    };
    let volume = Volume::format(members.collect(), &format).map_err(|e| format!("format: {e}"))?;
    braidfs::format(volume).map_err(|error| format!("format: {error}"))
}

/// A new file system that commits this often.
pub fn format_and_mount(
    devices: &[Arc<SimDevice>],
    commit_interval: Duration,
) -> Result<Arc<FileSystem>, String> {
    format(devices)?;
    let options = MountOptions {
        commit_interval,
        ..options()
    };
    mount_with(devices, options)
}

/// Volumes of one to three members that hold the first tree.
pub struct Bases(Vec<Vec<SimImage>>);

impl Bases {
    pub fn make() -> Result<Bases, String> {
        (1..=DEVICES_MAX)
            .map(base)
            .collect::<Result<_, _>>()
            .map(Bases)
    }

    pub fn of(&self, devices: usize) -> &[SimImage] {
        &self.0[devices - 1]
    }
}

fn base(count: usize) -> Result<Vec<SimImage>, String> {
    let images = vec![SimImage::zeroed(VOLUME_BYTES / count); count];
    let devices = devices_of(&images);
    format(&devices)?;
    let mut session = Session::new(mount(&devices)?);
    for step in FIRST {
        session
            .apply(*step)
            .map_err(|error| format!("{step:?}: {error}"))?;
    }
    session
        .fs
        .unmount()
        .map_err(|error| format!("unmount: {error}"))?;
    Ok(devices.iter().map(|device| device.snapshot()).collect())
}

/// A workload that ran.
pub struct History {
    pub name: String,
    pub devices: usize,
    pub base: SimReplay,
    pub events: Vec<SimEvent>,
    pub steps: Vec<Step>,
    /// After step n, from 0.
    pub trees: Vec<Tree>,
    /// Once step n had ended, no state older than this may be found.
    pub durable: Vec<u64>,
}

/// Why there is no history.
pub enum NoHistory {
    /// An operation was refused, so a shorter workload is the same.
    Refused,
    /// It should have worked.
    Failed(String),
}

impl From<String> for NoHistory {
    fn from(what: String) -> Self {
        NoHistory::Failed(what)
    }
}

/// How a workload is run.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Members of the volume.
    pub devices: usize,
    /// Whether it is unmounted at the end, and the cuts go on through that.
    pub unmounts: bool,
}

impl Setup {
    /// The same for the same workload and seed.
    pub fn of(workload: &[usize], seed: u64) -> Setup {
        let drawn = u64::from(crc32c::crc32c(name_of(workload).as_bytes())) ^ seed;
        Setup {
            devices: 1 + usize::try_from(drawn % 3).expect("small"),
            unmounts: (drawn / 3).is_multiple_of(4),
        }
    }
}

fn trees(base: &[SimImage], steps: &[Step]) -> Result<Vec<Tree>, NoHistory> {
    let devices = devices_of(base);
    let mut session = Session::new(mount(&devices)?);
    let mut trees = vec![Tree::of(&session.fs)?];
    for step in steps {
        match session.apply(*step) {
            Ok(_) => trees.push(Tree::of(&session.fs)?),
            Err(error) => {
                let failed = format!("{step:?}: {error}");
                return Err(match error {
                    Errno::IO | Errno::ROFS => NoHistory::Failed(failed),
                    _ => NoHistory::Refused,
                });
            }
        }
    }
    Ok(trees)
}

/// Runs the workload.
pub fn record(bases: &Bases, workload: &Workload, setup: Setup) -> Result<History, NoHistory> {
    let images = bases.of(setup.devices);
    let mut steps = steps_of(workload);
    if !matches!(steps.last(), Some(Step::Sync)) {
        steps.push(Step::Sync);
    }
    let trees = trees(images, &steps)?;
    let devices = devices_of(images);
    let mut session = Session::new(mount(&devices)?);
    let base = SimReplay::new(&devices);
    let recorder = SimHistory::of(&devices);
    let mut durable: Vec<u64> = vec![0];
    for (now, step) in (1..).zip(&steps) {
        let promise = session.apply(*step);
        let promise = promise.map_err(|error| format!("{step:?} once more: {error}"))?;
        let former = durable.last().copied().unwrap_or(0);
        durable.push(match promise {
            Promise::Nothing => former,
            Promise::All => now,
            Promise::Inode(ino) => {
                let changes = |n: &u64| {
                    let n = usize::try_from(*n).expect("an index");
                    trees[n].changed(&trees[n - 1], ino)
                };
                former.max((1..=now).rev().find(changes).unwrap_or(0))
            }
        });
        recorder.mark(now);
    }
    if setup.unmounts {
        let unmounted = session.fs.unmount();
        unmounted.map_err(|error| format!("unmount: {error}"))?;
    }
    Ok(History {
        name: name_of(workload),
        devices: setup.devices,
        base,
        events: recorder.events(),
        steps,
        trees,
        durable,
    })
}
