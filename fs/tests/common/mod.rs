//! A file system on simulated devices, driven without a mount.
#![allow(dead_code, missing_docs, reason = "each test file uses a part of it")]

pub mod acl;
pub mod content;
pub mod damage;
pub mod dump;
pub mod model;
pub mod rng;
pub mod shrink;
pub mod timed;
pub mod watchdog;
pub mod world;

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use braidfs::{
    Cred, Errno, FileSystem, Ino, MountOptions, OpenFile, ROOT_INO, Timestamp, WriteFlags,
};
use braidfs_blockdev::{BlockDevice, FormatOptions, SimDevice, Volume};

pub const CRED: Cred = Cred {
    uid: 1000,
    gid: 1000,
    umask: 0o022,
    pid: 1,
    capable_immutable: true,
};

/// Who may change any flag.
pub const ROOT: Cred = Cred {
    uid: 0,
    gid: 0,
    umask: 0,
    pid: 1,
    capable_immutable: true,
};

struct Stderr;

impl log::Log for Stderr {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("{}: {}", record.level(), record.args());
        }
    }

    fn flush(&self) {}
}

/// Shows what the libraries log when a test fails.
fn log_to_stderr() {
    static LOGGER: Stderr = Stderr;
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

/// Nothing here may wait longer.
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn devices(count: usize, size_bytes: u64) -> Vec<Arc<SimDevice>> {
    log_to_stderr();
    (0..count)
        .map(|nth| SimDevice::new(&format!("sim{nth}"), size_bytes))
        .collect()
}

fn members(devices: &[Arc<SimDevice>]) -> Vec<Arc<dyn BlockDevice>> {
    devices
        .iter()
        .map(|device| Arc::clone(device) as Arc<dyn BlockDevice>)
        .collect()
}

pub fn format(devices: &[Arc<SimDevice>]) {
    format_members(members(devices));
}

pub fn format_members(members: Vec<Arc<dyn BlockDevice>>) {
    let options = FormatOptions {
        stripe_unit_bytes: 64 << 10,
        ..FormatOptions::default()
    };
    let volume = Volume::format(members, &options).expect("format");
    braidfs::format(volume).expect("make the file system");
}

pub fn options() -> MountOptions {
    MountOptions {
        cache_bytes: 32 << 20,
        commit_interval: Duration::from_secs(300),
        ..MountOptions::default()
    }
}

pub fn mount_with(devices: &[Arc<SimDevice>], options: MountOptions) -> Arc<FileSystem> {
    mount_members(members(devices), options)
}

pub fn mount_members(members: Vec<Arc<dyn BlockDevice>>, options: MountOptions) -> Arc<FileSystem> {
    let volume = Volume::assemble(members, options.read_only).expect("assemble");
    FileSystem::mount(volume, options).expect("mount")
}

pub fn mount(devices: &[Arc<SimDevice>]) -> Arc<FileSystem> {
    mount_with(devices, options())
}

/// No problems, or a panic that lists them.
pub fn check(devices: &[Arc<SimDevice>]) -> braidfs::fsck::Report {
    let volume = Volume::assemble(members(devices), true).expect("assemble");
    let report = braidfs::fsck::check(volume).expect("fsck");
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
    report
}

pub fn create(fs: &FileSystem, parent: Ino, name: &str) -> Arc<OpenFile> {
    let flags = libc::O_RDWR | libc::O_CREAT;
    fs.create(parent, name.as_bytes(), 0o644, flags, &CRED)
        .expect("create")
        .1
}

/// Takes all blocks that the volume still gives, in files of their own.
pub fn fill_with_data(fs: &FileSystem, dir: Ino) -> Vec<Arc<OpenFile>> {
    let mut files = Vec::new();
    for len in [1 << 20, 4096] {
        let file = create(fs, dir, &format!("fill{len}"));
        let bytes = pattern(len, len as usize);
        let mut at = 0;
        let error = loop {
            match try_write(fs, &file, at, &bytes, false) {
                Ok(count) => at += u64::from(count),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Errno::NOSPC);
        files.push(file);
    }
    assert_eq!(fs.statfs().bfree, 0);
    files
}

/// Fills metadata with names that have attributes of so many bytes.
pub fn fill_with_names(fs: &FileSystem, dir: Ino, salt: usize, len: usize) {
    let value = vec![7; len];
    let (mut refused, mut count) = (0, 0);
    while refused < 3 {
        let name = format!("{salt}-{len}-{count}");
        let flags = libc::O_RDWR | libc::O_CREAT;
        let made = fs.create(dir, name.as_bytes(), 0o644, flags, &CRED);
        let made = made.and_then(|(attr, file)| {
            fs.release(&file);
            let set = match len {
                0 => Ok(()),
                _ => fs.setxattr(attr.ino, b"user.filler", &value, 0, false),
            };
            fs.forget(attr.ino, 1);
            set
        });
        count += 1;
        if let Err(error) = made {
            assert_eq!(error, Errno::NOSPC, "file {count} with {len} bytes");
            refused += 1;
            fs.sync().unwrap();
        }
    }
}

/// Waits until files get another time than before: the clock that stamps them has a step of one
/// tick of the kernel, 10 ms at the most.
pub fn next_tick() {
    let before = Timestamp::now();
    while Timestamp::now() == before {
        std::thread::sleep(Duration::from_micros(500));
    }
}

pub fn open(fs: &FileSystem, name: &str) -> Arc<OpenFile> {
    let attr = fs.lookup(ROOT_INO, name.as_bytes()).expect("look up");
    fs.open(attr.ino, libc::O_RDWR).expect("open")
}

pub fn try_write(
    fs: &FileSystem,
    file: &Arc<OpenFile>,
    offset: u64,
    data: &[u8],
    direct: bool,
) -> Result<u32, Errno> {
    try_write_as(fs, file, offset, data, direct, WriteFlags::default())
}

pub fn try_write_as(
    fs: &FileSystem,
    file: &Arc<OpenFile>,
    offset: u64,
    data: &[u8],
    direct: bool,
    flags: WriteFlags,
) -> Result<u32, Errno> {
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result| sender.send(result).expect("the test waits"));
    fs.write(file, offset, data, direct, flags, done);
    receiver.recv_timeout(PATIENCE).expect("the write ends")
}

pub fn write(fs: &FileSystem, file: &Arc<OpenFile>, offset: u64, data: &[u8]) {
    assert_eq!(
        try_write(fs, file, offset, data, false),
        Ok(data.len() as u32)
    );
}

pub fn try_read(
    fs: &FileSystem,
    file: &Arc<OpenFile>,
    offset: u64,
    len: usize,
    direct: bool,
) -> Result<Vec<u8>, Errno> {
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result: Result<braidfs::ReadReply, Errno>| {
        let bytes = result.map(|reply| reply.slices().collect::<Vec<_>>().concat());
        sender.send(bytes).expect("the test waits");
    });
    fs.read(file, offset, len, direct, done);
    receiver.recv_timeout(PATIENCE).expect("the read ends")
}

/// Reads `len` bytes in pieces, as long as there are any.
pub fn read(fs: &FileSystem, file: &Arc<OpenFile>, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let left = (len - bytes.len()).min(1 << 20);
        let piece = try_read(fs, file, offset + bytes.len() as u64, left, false).expect("read");
        if piece.is_empty() {
            break;
        }
        bytes.extend_from_slice(&piece);
    }
    bytes
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        })
        .collect()
}

pub fn names(fs: &FileSystem, dir: Ino) -> Vec<String> {
    let mut names = Vec::new();
    fs.readdir(dir, 0, &mut |entry| {
        names.push(String::from_utf8_lossy(entry.name).into_owned());
        true
    })
    .expect("readdir");
    names.retain(|name| name != "." && name != "..");
    names
}
