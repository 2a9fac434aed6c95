//! What the volumes lie on: image files on a tmpfs or on the disk, as loop devices or as they are.
//!
//! Images are written once before anything is measured: the first touch of a tmpfs's memory, or the
//! allocation of a disk's blocks, is nobody's work that is measured here. A loop device goes with
//! the last process that has it open, so nothing is left of it whatever ends the bench.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use braidfs_tests::command::Cmd;
use braidfs_tests::env::Skip;
use braidfs_tests::loopdev::LoopDevice;
use braidfs_tests::throttle::Throttle;
use braidfs_tests::volume::MIB;
use clap::ValueEnum;

/// Kinds of media.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// 4 loop devices on files of a tmpfs: bound by the processors.
    Tmpfs,
    /// 4 image files on the disk.
    Disk,
    /// 1 to 4 loop devices, each limited to 100 MB/s: bound by the devices.
    Throttled,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tmpfs => "tmpfs",
            Self::Disk => "disk",
            Self::Throttled => "throttled",
        }
    }
}

/// How many devices there are.
pub const DEVICES: usize = 4;
/// What a throttled device may move in a second, in each direction.
pub const THROTTLED_BYTES_PER_SEC: u64 = 100_000_000;

/// A loop device that is kept open.
struct Held {
    device: LoopDevice,
    _open: File,
}

impl Held {
    fn attach(image: &Path) -> Self {
        let device = LoopDevice::attach(image);
        let open = File::open(&device.path).expect("open a loop device");
        // Still open: so it only goes when nobody has it any more.
        let detach = Cmd::new("losetup").arg("--detach").arg(&device.path);
        detach.quiet().ok();
        Self {
            device,
            _open: open,
        }
    }
}

/// The media of one kind.
pub struct Media {
    pub kind: Kind,
    images: Vec<PathBuf>,
    image_bytes: u64,
    loops: RefCell<Vec<Held>>,
    throttle: Option<Throttle>,
}

impl Media {
    /// Makes images of `image_bytes` each in `dir`, which is on the right file system. A cgroup is
    /// named after `work`, the bench's own folder.
    pub fn new(kind: Kind, dir: &Path, image_bytes: u64, work: &Path) -> Result<Self, Skip> {
        fs::create_dir_all(dir).expect("a folder for images");
        check_room(kind, dir, image_bytes * DEVICES as u64)?;
        let images = (0..DEVICES)
            .map(|index| dir.join(format!("image{index}")))
            .collect();
        let mut media = Self {
            kind,
            images,
            image_bytes,
            loops: RefCell::default(),
            throttle: None,
        };
        media.warm();
        if kind != Kind::Disk {
            media.attach();
        }
        if kind == Kind::Throttled {
            let loops = media.loops.borrow();
            let devices: Vec<&LoopDevice> = loops.iter().map(|it| &it.device).collect();
            let throttle = Throttle::new(work, &devices, THROTTLED_BYTES_PER_SEC)?;
            drop(loops);
            media.throttle = Some(throttle);
        }
        Ok(media)
    }

    /// Writes images that have holes. Peers are told not to discard; this finds out who did.
    pub fn warm(&self) {
        for image in &self.images {
            let written = fs::metadata(image).map_or(0, |meta| meta.blocks() * 512);
            if written < self.image_bytes {
                if written > 0 {
                    println!("  {} has holes, and is written again", image.display());
                }
                fill(image, self.image_bytes);
            }
        }
    }

    fn attach(&self) {
        let attached = self.images.iter().map(|image| Held::attach(image));
        self.loops.replace(attached.collect());
    }

    /// The first `count` devices, for whoever needs block devices.
    pub fn block_devices(&self, count: usize) -> Vec<PathBuf> {
        if self.loops.borrow().is_empty() {
            self.attach();
        }
        let loops = self.loops.borrow();
        loops
            .iter()
            .take(count)
            .map(|held| held.device.path.clone())
            .collect()
    }

    /// The first `count` members of a volume that can lie on files too.
    pub fn members(&self, count: usize) -> Vec<PathBuf> {
        if self.kind == Kind::Disk {
            self.loops.take();
            return self.images.iter().take(count).cloned().collect();
        }
        self.block_devices(count)
    }

    /// Bytes of one device.
    pub fn device_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// What limits the devices: whoever is to be limited joins by writing to this file.
    pub fn group(&self) -> Option<PathBuf> {
        self.throttle.as_ref().map(Throttle::procs)
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        self.loops.take();
        for image in &self.images {
            let _never_made = fs::remove_file(image);
        }
    }
}

/// Whether images of so many bytes in all fit into memory, or on the disk.
fn check_room(kind: Kind, dir: &Path, bytes: u64) -> Result<(), Skip> {
    let (free, place) = if kind == Kind::Disk {
        let disk = nix::sys::statvfs::statvfs(dir).expect("the folder is there");
        let free = disk.blocks_available() * disk.fragment_size();
        (free, format!("in {}", dir.display()))
    } else {
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        (
            kib.map_or(u64::MAX, |kib| kib << 10),
            "of memory".to_owned(),
        )
    };
    // Something must be left for those who are measured.
    if free / 5 * 4 >= bytes {
        return Ok(());
    }
    let [bytes, free] = [bytes, free].map(|bytes| bytes / MIB);
    Err(Skip(format!(
        "images of {bytes} MiB do not fit into the {free} MiB that are free {place}; \
         --quick needs less"
    )))
}

/// Writes all of an image.
fn fill(image: &Path, bytes: u64) {
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(false);
    let mut file = options.open(image).expect("open an image");
    let zeros = vec![0; MIB as usize];
    for _ in 0..bytes.div_ceil(MIB) {
        file.write_all(&zeros).expect("room for an image");
    }
    file.sync_data().expect("write an image");
}
