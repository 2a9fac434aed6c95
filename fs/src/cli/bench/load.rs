//! What is done in a directory, and how fast it goes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use braidfs_blockdev::AlignedBuf;
use nix::sys::signal::Signal;

use super::super::devices::io_text;
use super::super::exit::{self, CliError};

/// Bytes of a large read or write.
const LARGE: u64 = 1 << 20;
/// Bytes of a small one.
const SMALL: u64 = 4096;
/// Large ones under way at the same time, where there are several.
const DEPTH: usize = 4;
/// What small reads from memory go round in: it is in any cache.
const WARM_BYTES: u64 = 8 << 20;
/// Odd, and far from simple fractions of the number of blocks.
const STRIDE: u64 = 7919;

/// One of the things that are measured.
pub struct Load {
    /// For people.
    pub name: &'static str,
    /// For programs.
    pub key: &'static str,
    /// Whether it is bytes a second; else it is operations a second.
    pub is_stream: bool,
    /// Whether braidfs's cache is dropped before.
    pub cold: bool,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Write,
    DirectWrite,
    DirectRead,
    RandomRead,
    WarmRead,
    Sync,
    Files,
}

/// All loads, in the order in which they are run: what is read was written before.
pub const LOADS: [Load; 7] = [
    Load {
        name: "write 1 MiB, fsync at the end",
        key: "write",
        is_stream: true,
        cold: false,
        kind: Kind::Write,
    },
    Load {
        name: "write 1 MiB, O_DIRECT, 4 at a time",
        key: "direct_write",
        is_stream: true,
        cold: false,
        kind: Kind::DirectWrite,
    },
    Load {
        name: "read 1 MiB, O_DIRECT, 4 at a time",
        key: "direct_read",
        is_stream: true,
        cold: true,
        kind: Kind::DirectRead,
    },
    Load {
        name: "read 4 KiB at random",
        key: "random_read",
        is_stream: false,
        cold: true,
        kind: Kind::RandomRead,
    },
    Load {
        name: "read 4 KiB, cached by braidfs",
        key: "warm_read",
        is_stream: false,
        cold: false,
        kind: Kind::WarmRead,
    },
    Load {
        name: "write 4 KiB and fsync",
        key: "sync",
        is_stream: false,
        cold: false,
        kind: Kind::Sync,
    },
    Load {
        name: "make, write and remove small files",
        key: "files",
        is_stream: false,
        cold: false,
        kind: Kind::Files,
    },
];

/// Bytes or operations a second, by load.
pub type Paces = [f64; LOADS.len()];

/// How much, how long, and until what.
pub struct Bounds<'a> {
    /// Bytes of the file.
    pub bytes: u64,
    /// Of each load.
    pub limit: Duration,
    /// The signal that asked to end, or 0.
    pub ended: &'a AtomicI32,
}

/// A clock that says when to stop.
struct Watch<'a> {
    begun: Instant,
    bounds: &'a Bounds<'a>,
}

impl<'a> Watch<'a> {
    fn start(bounds: &'a Bounds<'a>) -> Self {
        Self {
            begun: Instant::now(),
            bounds,
        }
    }

    fn goes_on(&self) -> bool {
        self.begun.elapsed() < self.bounds.limit && !self.is_interrupted()
    }

    fn is_interrupted(&self) -> bool {
        self.bounds.ended.load(Ordering::Relaxed) != 0
    }

    fn pace(&self, done: u64) -> f64 {
        done as f64 / self.begun.elapsed().as_secs_f64().max(1e-9)
    }
}

/// A file in a directory, without a name as soon as it is open.
pub struct Place {
    directory: PathBuf,
    file: File,
    direct: File,
    /// So many bytes from the beginning were written.
    written: u64,
}

impl Place {
    /// Makes the file.
    pub fn new(directory: &Path, bytes: u64) -> Result<Self, CliError> {
        let path = directory.join(format!(".braidfs-bench-{}", std::process::id()));
        let make = || -> io::Result<(File, File)> {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            let file = options.clone().create_new(true).mode(0o600).open(&path)?;
            let direct = options.custom_flags(libc::O_DIRECT).open(&path);
            fs::remove_file(&path)?;
            let direct = direct?;
            file.set_len(bytes)?;
            Ok((file, direct))
        };
        let (file, direct) = make().map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied => "; name one that you may write to, --directory",
                _ => "",
            };
            let (name, error) = (directory.display(), io_text(&error));
            exit::system(format!("{name}: no file can be made: {error}{hint}"))
        })?;
        Ok(Self {
            directory: directory.to_owned(),
            file,
            direct,
            written: 0,
        })
    }

    /// Does one thing as long as it may take. What a signal ends is an error without words.
    pub fn run(&mut self, load: &Load, bounds: &Bounds<'_>) -> Result<f64, CliError> {
        let done = match load.kind {
            Kind::Write => self.write(bounds),
            Kind::DirectWrite => {
                let write = |file: &File, buf: &mut [u8], at| file.write_all_at(buf, at);
                self.streams(bounds, bounds.bytes, write)
            }
            Kind::DirectRead => {
                let read = |file: &File, buf: &mut [u8], at| file.read_exact_at(buf, at);
                self.streams(bounds, self.written, read)
            }
            Kind::RandomRead => self.small_reads(bounds, self.written),
            Kind::WarmRead => self.warm_reads(bounds),
            Kind::Sync => self.syncs(bounds),
            Kind::Files => self.files(bounds),
        };
        let pace = done.map_err(|error| {
            let (name, error) = (self.directory.display(), io_text(&error));
            exit::system(format!("{name}: {}: {error}", load.name))
        })?;
        check_signals(bounds.ended).map(|()| pace)
    }

    fn write(&mut self, bounds: &Bounds<'_>) -> io::Result<f64> {
        let buf = noise(LARGE);
        let watch = Watch::start(bounds);
        let mut at = 0;
        while at + LARGE <= bounds.bytes && watch.goes_on() {
            self.file.write_all_at(&buf, at)?;
            at += LARGE;
        }
        self.written = self.written.max(at);
        if !watch.is_interrupted() {
            self.file.sync_all()?;
        }
        Ok(watch.pace(at))
    }

    /// The first `within` bytes of the file, several pieces at a time.
    fn streams(
        &self,
        bounds: &Bounds<'_>,
        within: u64,
        act: impl Fn(&File, &mut [u8], u64) -> io::Result<()> + Sync,
    ) -> io::Result<f64> {
        let buffers: Vec<AlignedBuf> = (0..DEPTH).map(|_| noise(LARGE)).collect();
        let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let watch = Watch::start(bounds);
        let work = |mut buf: AlignedBuf| -> io::Result<()> {
            while watch.goes_on() {
                let at = next.fetch_add(LARGE, Ordering::Relaxed);
                if at + LARGE > within {
                    break;
                }
                act(&self.direct, &mut buf, at)?;
                done.fetch_add(LARGE, Ordering::Relaxed);
            }
            Ok(())
        };
        let work = &work;
        std::thread::scope(|scope| {
            let workers: Vec<_> = buffers
                .into_iter()
                .map(|buf| scope.spawn(move || work(buf)))
                .collect();
            workers.into_iter().try_for_each(|worker| {
                let gone = Err(io::Error::other("a thread ended"));
                worker.join().unwrap_or(gone)
            })
        })?;
        Ok(watch.pace(done.into_inner()))
    }

    /// With O_DIRECT, so that the kernel's cache has no part in it.
    fn small_reads(&self, bounds: &Bounds<'_>, within: u64) -> io::Result<f64> {
        let (mut buf, blocks) = (noise(SMALL), within / SMALL);
        let watch = Watch::start(bounds);
        let mut done = 0;
        while watch.goes_on() {
            let at = done * STRIDE % blocks * SMALL;
            self.direct.read_exact_at(&mut buf, at)?;
            done += 1;
        }
        Ok(watch.pace(done))
    }

    /// What was read before as usual is in the cache, and O_DIRECT gets it from there.
    fn warm_reads(&self, bounds: &Bounds<'_>) -> io::Result<f64> {
        let within = WARM_BYTES.min(self.written);
        let mut buf = noise(within);
        self.file.read_exact_at(&mut buf, 0)?;
        self.small_reads(bounds, within)
    }

    fn syncs(&self, bounds: &Bounds<'_>) -> io::Result<f64> {
        let (buf, blocks) = (noise(SMALL), self.written / SMALL);
        let watch = Watch::start(bounds);
        let mut done = 0;
        while watch.goes_on() {
            let at = done * STRIDE % blocks * SMALL;
            self.file.write_all_at(&buf, at)?;
            self.file.sync_data()?;
            done += 1;
        }
        Ok(watch.pace(done))
    }

    fn files(&self, bounds: &Bounds<'_>) -> io::Result<f64> {
        const AT_A_TIME: u64 = 100;
        let name = format!(".braidfs-bench-{}-", std::process::id());
        let path = |number: u64| self.directory.join(format!("{name}{number}"));
        let watch = Watch::start(bounds);
        let mut done = 0;
        while watch.goes_on() {
            let made = (0..AT_A_TIME).try_for_each(|number| fs::write(path(number), [7; 1024]));
            let removed = (0..AT_A_TIME).map(|number| fs::remove_file(path(number)));
            let removed: Vec<io::Result<()>> = removed.collect();
            made?;
            removed.into_iter().collect::<io::Result<()>>()?;
            done += AT_A_TIME;
        }
        Ok(watch.pace(done))
    }
}

/// An error without words if a signal asked to end.
pub fn check_signals(ended: &AtomicI32) -> Result<(), CliError> {
    match Signal::try_from(ended.load(Ordering::SeqCst)) {
        Ok(signal) => Err(exit::ended_by(signal)),
        Err(_) => Ok(()),
    }
}

/// Bytes that nothing leaves out, at a border of pages.
fn noise(len: u64) -> AlignedBuf {
    let len = usize::try_from(len).expect("a few MiB");
    AlignedBuf::from_slice(&vec![0x5a; len])
}
