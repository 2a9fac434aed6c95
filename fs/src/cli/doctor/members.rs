//! Checks of the members and of what they lie on.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use braidfs_blockdev::write_protected;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

use super::Finding;
use crate::cli::size::format_size;

/// How many loop devices over images on loop devices are followed.
const LAYERS_MAX: usize = 8;

/// Members whose sizes differ by less than this part are alike.
const ALIKE_PART: u64 = 10;

/// Ramfs, which statfs(2) shows and nix does not name.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// How long members may take to be looked at.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a member is.
struct Fact {
    path: PathBuf,
    name: String,
    meta: fs::Metadata,
    size_bytes: u64,
}

impl Fact {
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        let size_bytes = match meta.file_type().is_block_device() {
            true => {
                let sectors = attribute(meta.rdev(), "size")?;
                sectors.parse::<u64>().ok()?.saturating_mul(512)
            }
            false => meta.len(),
        };
        Some(Self {
            path: path.to_owned(),
            name: path.display().to_string(),
            meta,
            size_bytes,
        })
    }
}

/// All checks.
pub fn examine(devices: &[PathBuf]) -> Vec<Finding> {
    let (facts, mut findings) = look(devices);
    findings.extend(alone(devices));
    findings.extend(same_disk(&facts));
    findings.extend(unequal(&facts));
    findings.extend(host_full(&facts));
    findings
}

/// Looks at each member in a thread of its own: one that hangs may hold up even stat(2).
fn look(devices: &[PathBuf]) -> (Vec<Fact>, Vec<Finding>) {
    let (to, from) = mpsc::channel();
    for (nth, path) in devices.iter().cloned().enumerate() {
        let to = to.clone();
        let look = move || {
            let fact = Fact::of(&path);
            let checks = [volatile, protected, loop_cached, no_direct];
            let found = |fact: &Fact| checks.iter().filter_map(|check| check(fact)).collect();
            let findings: Vec<Finding> = fact.as_ref().map(found).unwrap_or_default();
            // Nobody may be waiting any more.
            drop(to.send((nth, fact, findings)));
        };
        // Without a thread it is not looked at.
        drop(thread::Builder::new().spawn(look));
    }
    drop(to);
    let until = Instant::now() + PATIENCE;
    let (mut facts, mut findings) = (BTreeMap::new(), Vec::new());
    while let Ok((nth, fact, found)) =
        from.recv_timeout(until.saturating_duration_since(Instant::now()))
    {
        facts.insert(nth, fact);
        findings.extend(found);
    }
    for (nth, path) in devices.iter().enumerate() {
        if !facts.contains_key(&nth) {
            findings.push(Finding::weakens(
                "no-answer",
                path.display().to_string(),
                format!("could not be looked at within {} s", PATIENCE.as_secs()),
                "dmesg | tail; look after the device, or the file system it lies on".to_owned(),
            ));
        }
    }
    (facts.into_values().flatten().collect(), findings)
}

fn alone(devices: &[PathBuf]) -> Option<Finding> {
    let [only] = devices else {
        return None;
    };
    Some(Finding::weakens(
        "alone",
        only.display().to_string(),
        "is the only member: both copies of the metadata lie on it".to_owned(),
        "make the file system on two devices or more (braidfs mkfs)".to_owned(),
    ))
}

fn same_disk(facts: &[Fact]) -> Vec<Finding> {
    let mut disks: BTreeMap<String, Vec<&Fact>> = BTreeMap::new();
    for fact in facts {
        if let Some(disk) = disk_of(&fact.path, LAYERS_MAX) {
            disks.entry(disk).or_default().push(fact);
        }
    }
    disks.retain(|_, facts| facts.len() > 1);
    let finding = |(disk, facts): (String, Vec<&Fact>)| {
        Finding::weakens(
            "same-disk",
            list(&facts),
            format!("lie on the same disk ({disk}): they share its speed, and its end"),
            "put the members on different disks".to_owned(),
        )
    };
    disks.into_iter().map(finding).collect()
}

fn list(facts: &[&Fact]) -> String {
    let names: Vec<&str> = facts.iter().map(|fact| &*fact.name).collect();
    names.join(", ")
}

fn unequal(facts: &[Fact]) -> Option<Finding> {
    let small = facts.iter().min_by_key(|fact| fact.size_bytes)?;
    let large = facts.iter().max_by_key(|fact| fact.size_bytes)?;
    let more = large.size_bytes - small.size_bytes;
    (more > small.size_bytes / ALIKE_PART).then(|| {
        Finding::slows(
            "unequal",
            &large.name,
            format!(
                "is larger than {} by {}: what comes last lies on fewer devices",
                small.name,
                format_size(more)
            ),
            "use members of the same size (partitions, for one)".to_owned(),
        )
    })
}

/// Image files with holes that their file system has no room for.
fn host_full(facts: &[Fact]) -> Vec<Finding> {
    let mut hosts: BTreeMap<u64, Vec<&Fact>> = BTreeMap::new();
    for fact in facts.iter().filter(|fact| fact.meta.is_file()) {
        hosts.entry(fact.meta.dev()).or_default().push(fact);
    }
    let finding = |facts: Vec<&Fact>| {
        let first = facts.first()?;
        let stat = nix::sys::statvfs::statvfs(&first.path).ok()?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        let holes: u64 = facts
            .iter()
            .map(|fact| fact.size_bytes.saturating_sub(fact.meta.blocks() * 512))
            .sum();
        let folder = first.path.parent()?.display();
        (holes > free).then(|| {
            Finding::weakens(
                "host-full",
                list(&facts),
                format!(
                    "may still grow by {}, and their file system has {} free: writes will fail",
                    format_size(holes),
                    format_size(free)
                ),
                format!("make room: df -h {folder}"),
            )
        })
    };
    hosts.into_values().filter_map(finding).collect()
}

fn volatile(fact: &Fact) -> Option<Finding> {
    let kind = statfs(&fact.path).ok().filter(|_| fact.meta.is_file())?;
    let kind = kind.filesystem_type();
    let is_memory = kind == TMPFS_MAGIC || kind == RAMFS_MAGIC;
    is_memory.then(|| {
        Finding::weakens(
            "volatile",
            &fact.name,
            "lies in memory (tmpfs): no flush makes anything durable there".to_owned(),
            "move it to a disk while it is not mounted (cp --sparse=always)".to_owned(),
        )
    })
}

fn protected(fact: &Fact) -> Option<Finding> {
    write_protected(&fact.path).then(|| {
        let mend = match fact.meta.file_type().is_block_device() {
            true => format!("blockdev --setrw {}", fact.name),
            false => "mount its file system for writing (mount -o remount,rw)".to_owned(),
        };
        let seen = "is write-protected: the mount is read-only".to_owned();
        Finding::weakens("write-protected", &fact.name, seen, mend)
    })
}

/// A loop device that goes through the page cache has everything in memory twice.
fn loop_cached(fact: &Fact) -> Option<Finding> {
    let direct = attribute(fact.meta.rdev(), "loop/dio")?;
    (direct == "0").then(|| {
        Finding::slows(
            "loop-cached",
            &fact.name,
            "is a loop device that caches its file: everything is in memory twice".to_owned(),
            format!("losetup --direct-io=on {}", fact.name),
        )
    })
}

fn no_direct(fact: &Fact) -> Option<Finding> {
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&fact.path);
    let refused = open.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL));
    refused.then(|| {
        Finding::slows(
            "no-direct",
            &fact.name,
            "is refused O_DIRECT by its file system: everything is in memory twice".to_owned(),
            "move it to a file system that knows O_DIRECT (ext4, XFS, btrfs)".to_owned(),
        )
    })
}

/// An attribute of a block device in sysfs.
fn attribute(dev: u64, name: &str) -> Option<String> {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    let mut text = String::new();
    let path = format!("/sys/dev/block/{major}:{minor}/{name}");
    File::open(path).ok()?.read_to_string(&mut text).ok()?;
    Some(text.trim_end().to_owned())
}

/// The disk that a device or file lies on in the end, as far as the kernel tells; file systems that
/// have no device of their own stand for themselves.
fn disk_of(path: &Path, layers: usize) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let dev = match meta.file_type().is_block_device() {
        true => meta.rdev(),
        false => meta.dev(),
    };
    if let Some(file) = attribute(dev, "loop/backing_file")
        && layers > 0
    {
        return disk_of(Path::new(&file), layers - 1);
    }
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    let Ok(place) = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else {
        return Some(format!("file system {major}:{minor}"));
    };
    let disk = match place.join("partition").exists() {
        true => place.parent()?,
        false => &place,
    };
    Some(format!("/dev/{}", disk.file_name()?.to_string_lossy()))
}
