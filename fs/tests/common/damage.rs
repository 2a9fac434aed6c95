//! A volume with a bit of everything, its records, and damage done to them.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use braidfs::fsck::raw::{self, Record};
use braidfs::fsck::{Class, FsckError, Mode, Options, Outcome};
use braidfs::{FileSystem, Ino, ROOT_INO};
use braidfs_blockdev::device::sim::SimPower;
use braidfs_blockdev::{BlockDevice, SimDevice, Volume};

use super::dump::{Dump, dump};
use super::*;

/// Files are longer than one extent's record covers.
const LONG: usize = (1 << 20) + 300_000;

/// A list of access for three users.
pub fn access_list() -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 4, 7),
        (4, 4, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 4, u32::MAX),
    ] {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&perm.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

fn fill(fs: &FileSystem) {
    let mkdir = |parent, name: &str| {
        let attr = fs.mkdir(parent, name.as_bytes(), 0o755, &CRED);
        attr.expect("mkdir").ino
    };
    let file = |parent, name: &str, seed: u64, len: usize| {
        let file = create(fs, parent, name);
        write(fs, &file, 0, &pattern(seed, len));
        let ino = file.ino();
        fs.release(&file);
        ino
    };
    let (a, b) = (mkdir(ROOT_INO, "a"), mkdir(ROOT_INO, "b"));
    let (c, _) = (mkdir(b, "c"), mkdir(b, "empty"));
    let d = mkdir(c, "d");
    let long = file(a, "long", 1, LONG);
    fs.link(long, b, b"second").expect("link");
    file(d, "deep", 2, 10_000);
    file(ROOT_INO, "other", 3, 50_000);
    for nth in 0..20 {
        file(c, &format!("many{nth}"), 10 + nth, 5000);
    }
    fs.symlink(ROOT_INO, b"link", b"a/long", &CRED)
        .expect("symlink");
    fs.mknod(a, b"fifo", libc::S_IFIFO | 0o600, 0, &CRED)
        .expect("mknod");
    let set_aside = create(fs, ROOT_INO, "set-aside");
    write(fs, &set_aside, 0, &pattern(4, 9000));
    fs.fallocate(&set_aside, libc::FALLOC_FL_KEEP_SIZE, 0, 300_000)
        .expect("fallocate");
    fs.release(&set_aside);
    let listed = file(a, "listed", 5, 100);
    fs.setxattr(listed, b"user.note", b"hello", 0, false)
        .expect("setxattr");
    fs.setxattr(listed, acl::ACCESS, &access_list(), 0, false)
        .expect("setxattr");
}

/// Images of a volume, with what it holds.
pub struct Sample {
    images: Vec<Vec<u8>>,
    pub records: Vec<Record>,
    pub tree: Dump,
}

/// An assembled volume.
pub fn assemble(devices: &[Arc<SimDevice>], read_only: bool) -> Arc<Volume> {
    Volume::assemble(members(devices), read_only).expect("assemble")
}

impl Sample {
    pub fn new() -> Self {
        let devices = devices(2, 32 << 20);
        format(&devices);
        let fs = mount(&devices);
        fill(&fs);
        fs.unmount().expect("unmount");
        Self::of(&devices)
    }

    /// What these devices hold.
    pub fn of(devices: &[Arc<SimDevice>]) -> Self {
        Self {
            images: devices.iter().map(|device| device.image()).collect(),
            records: raw::read(assemble(devices, true)).expect("read the records"),
            tree: tree(devices),
        }
    }

    /// New devices with the same content.
    pub fn devices(&self) -> Vec<Arc<SimDevice>> {
        let images = self.images.iter().cloned().enumerate();
        images
            .map(|(nth, image)| {
                SimDevice::from_image(&format!("sim{nth}"), image, &SimPower::new())
            })
            .collect()
    }

    /// New devices with damaged records.
    pub fn damaged(&self, records: &[Record]) -> Vec<Arc<SimDevice>> {
        let devices = self.devices();
        raw::write(assemble(&devices, false), records).expect("write the records");
        devices
    }

    /// The value of a record.
    pub fn value(&self, table: &str, key: &[u8]) -> Vec<u8> {
        let found = self.records.iter().find(|r| r.0 == table && r.1 == key);
        let record = found.unwrap_or_else(|| panic!("no {table} {key:?}"));
        record.2.clone().expect("records have values")
    }

    /// The keys of a table that begin with the number of an inode.
    pub fn keys(&self, table: &str, ino: Ino) -> Vec<Vec<u8>> {
        let of_it = |r: &&Record| r.0 == table && r.1.starts_with(&ino.to_be_bytes());
        self.records
            .iter()
            .filter(of_it)
            .map(|r| r.1.clone())
            .collect()
    }

    /// The inode of a path.
    pub fn ino(&self, path: &str) -> Ino {
        path.split('/').fold(ROOT_INO, |dir, name| {
            let value = self.value("dentries", &name_key(dir, name));
            Ino::from_le_bytes(value[..8].try_into().expect("8 bytes"))
        })
    }

    /// The keys of an entry: by name, and by cookie.
    pub fn entry(&self, dir: Ino, name: &str) -> (Vec<u8>, Vec<u8>) {
        let key = name_key(dir, name);
        let cookie = &self.value("dentries", &key)[8..16];
        let mut listed = dir.to_be_bytes().to_vec();
        listed.extend(cookie.iter().rev());
        (key, listed)
    }
}

pub fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(Sample::new)
}

pub fn set(table: &'static str, key: Vec<u8>, value: Vec<u8>) -> Record {
    (table, key, Some(value))
}

pub fn gone(table: &'static str, key: Vec<u8>) -> Record {
    (table, key, None)
}

/// A record with other bytes at `at`.
pub fn patched(table: &'static str, key: Vec<u8>, at: usize, bytes: &[u8]) -> Record {
    let mut value = sample().value(table, &key);
    value[at..at + bytes.len()].copy_from_slice(bytes);
    set(table, key, value)
}

pub fn inode(ino: Ino) -> Vec<u8> {
    ino.to_be_bytes().to_vec()
}

pub fn le(number: u64) -> [u8; 8] {
    number.to_le_bytes()
}

/// The first extent of a file: key, first block, blocks.
pub fn extent(path: &str) -> (Vec<u8>, u64, u32) {
    let key = sample().keys("extents", sample().ino(path)).remove(0);
    let value = sample().value("extents", &key);
    let block = u64::from_le_bytes(value[..8].try_into().unwrap());
    let len = u32::from_le_bytes(value[8..12].try_into().unwrap());
    (key, block, len)
}

/// The longest free run.
pub fn free_run() -> (u64, u64) {
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let rows = sample().records.iter().filter(|record| record.0 == "free");
    let runs = rows.map(|(_, key, value)| (number(key), number(value.as_ref().unwrap())));
    runs.filter(|run| run.0 != u64::MAX)
        .max_by_key(|run| run.1)
        .unwrap()
}

pub fn name_key(dir: Ino, name: &str) -> Vec<u8> {
    [&dir.to_be_bytes()[..], name.as_bytes()].concat()
}

pub fn pair_key(ino: Ino, second: u64) -> Vec<u8> {
    [ino.to_be_bytes(), second.to_be_bytes()].concat()
}

/// Everything that can be seen of a tree that is mounted read-only.
pub fn tree(devices: &[Arc<SimDevice>]) -> Dump {
    let options = braidfs::MountOptions {
        read_only: true,
        ..options()
    };
    let fs = mount_with(devices, options);
    let tree = dump(&fs);
    fs.unmount().expect("unmount");
    tree
}

/// Checks or repairs.
pub fn fsck_members(members: Vec<Arc<dyn BlockDevice>>, mode: Mode) -> Result<Outcome, FsckError> {
    let volume = Volume::assemble(members, true).expect("assemble");
    let options = Options {
        mode,
        cancel: &AtomicBool::new(false),
        progress: &mut |_| {},
        ask: &mut |_, _| false,
    };
    braidfs::fsck::run(volume, options)
}

pub fn fsck(devices: &[Arc<SimDevice>], mode: Mode) -> Outcome {
    fsck_members(members(devices), mode).expect("fsck")
}

/// The classes that a check finds problems of.
pub fn classes(outcome: &Outcome) -> Vec<Class> {
    outcome.found.classes().map(|(class, _)| class).collect()
}

/// Repairs, and holds the repair to its promise: nothing is left, another check finds nothing, and
/// the volume mounts and can be changed. Gives the tree.
pub fn repair(devices: &[Arc<SimDevice>]) -> Dump {
    let outcome = fsck(devices, Mode::Repair);
    let left = outcome.left.expect("it repaired");
    assert!(left.is_clean(), "left: {:#?}", left.problems);
    check(devices);
    let repaired = tree(devices);
    let fs = mount(devices);
    let file = create(&fs, ROOT_INO, "after the repair");
    write(&fs, &file, 0, &pattern(9, 100_000));
    fs.release(&file);
    fs.unlink(ROOT_INO, b"after the repair").expect("unlink");
    fs.unmount().expect("unmount");
    check(devices);
    repaired
}

/// Nodes of a tree but some.
pub fn without(tree: &Dump, inodes: &[Ino]) -> Dump {
    let kept = tree.0.iter().filter(|(ino, _)| !inodes.contains(ino));
    Dump(
        kept.map(|(ino, node)| (*ino, node.clone()))
            .collect::<BTreeMap<_, _>>(),
    )
}
