//! The core against a simple model of what a file system should do: random operations, no mount,
//! simulated devices.
//!
//! After each step all that it touched is compared: attributes with their times, bytes, names,
//! extended attributes, holes; now and then, and at the end, everything. A run that fails is
//! shrunk to the steps that it takes to fail, and they are printed.
//!
//! `SEED=n` repeats one run, `STEPS=3,17,240` only these steps of it, `OPS=n` sets the length of
//! runs, `TRACE=1` shows every operation. `RUNS=n` sets the number of runs, `SECONDS=n` goes on for
//! so long, `FIRST=n` starts from another seed.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use braidfs::{AtimeMode, Errno, FileSystem, MountOptions, OpenFile, ROOT_INO};
use braidfs_blockdev::SimDevice;
use common::rng::Rng;
use common::shrink::{Budget, Panic, catch, shrink};
use common::watchdog::Watchdog;
use common::world::{Journal, Limits, World};
use common::*;

/// Together 100,000.
const RUNS: u64 = 20;
const OPS: u64 = 5000;

/// Runs side by side. They also wait for devices' and commits' threads.
const WORKERS: u64 = 3;

/// In runs as short as this, each step has a time of its own: what it failed to set shows.
const SHORT_STEPS: usize = 64;

const SHRINK: Budget = Budget {
    time: Duration::from_secs(120),
    attempts: 2000,
};

fn text(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn number(name: &str) -> Option<u64> {
    Some(text(name)?.parse().expect("a number"))
}

fn small_cache() -> MountOptions {
    MountOptions {
        cache_bytes: braidfs::CACHE_BYTES_MIN,
        ..options()
    }
}

/// Nothing is dirty: nothing may be reserved.
fn check_accounts(fs: &FileSystem) {
    fs.sync().expect("sync");
    let space = fs.stats().space;
    assert_eq!(space.reserved_blocks, 0, "{space:?}");
}

/// A run under way.
struct Run {
    devices: Vec<Arc<SimDevice>>,
    options: MountOptions,
    world: World,
    /// Free blocks of the empty volume.
    free: u64,
    /// What fills the volume, and the step that it goes in.
    filler: Option<(Arc<OpenFile>, u64)>,
    /// Metadata was full once: what it took then stays its own, and data has little left.
    is_eaten: bool,
}

impl Run {
    /// What does not change in a run depends on its seed alone.
    fn start(seed: u64, journal: &Arc<Journal>) -> Self {
        let mut rng = Rng(seed);
        let devices = devices(1 + rng.below(3) as usize, 64 << 20);
        let atimes = [
            AtimeMode::Relatime,
            AtimeMode::Strictatime,
            AtimeMode::Noatime,
        ];
        let options = MountOptions {
            atime: *rng.pick(&atimes),
            nodiratime: rng.one_in(4),
            ..small_cache()
        };
        let limits = Limits {
            size: if rng.one_in(2) { 3 << 20 } else { 200 << 10 },
            io: 1 << 20,
            total: 24 << 20,
            names: 3 + rng.below(8),
            inodes: 120,
            wide: true,
            sync_every: 5 + rng.below(100),
            compare: true,
        };
        format(&devices);
        let fs = mount_with(&devices, options.clone());
        let free = fs.statfs().bfree;
        let world = World::new(fs, seed, limits, journal);
        Self {
            devices,
            options,
            world,
            free,
            filler: None,
            is_eaten: false,
        }
    }

    /// One step: an operation, or something that happens to the file system as a whole.
    fn step(&mut self, seed: u64, nth: u64) {
        let mut rng = Rng::of(!seed, nth);
        if self.filler.as_ref().is_some_and(|(_, until)| nth >= *until) {
            self.make_room();
        }
        match rng.below(2400) {
            0..3 => self.remount(nth),
            3..5 => self.fill(nth),
            5..29 => {
                self.world.begin(nth);
                self.world.say(format_args!("look at everything"));
                self.world.check_tree();
            }
            _ => {
                self.world.step(nth);
            }
        }
    }

    fn remount(&mut self, nth: u64) {
        self.make_room();
        let world = &mut self.world;
        world.begin(nth);
        world.say(format_args!("unmount, check, mount"));
        check_accounts(&world.fs);
        world.unmount();
        let report = check(&self.devices);
        assert_eq!(report.orphans, 0);
        assert_eq!(report.inodes, world.model.nodes.len() as u64);
        world.go_on(mount_with(&self.devices, self.options.clone()));
        world.check_tree();
    }

    /// Fills the volume for some steps: with data, with metadata, or with both. What fills it has
    /// no name, and the model does not know it.
    fn fill(&mut self, nth: u64) {
        const STEPS: u64 = 40;
        if self.filler.is_some() {
            return;
        }
        let world = &mut self.world;
        world.begin(nth);
        let (data, metadata) = *world
            .rng
            .pick(&[(true, false), (false, true), (true, true)]);
        world.say(format_args!("fill with data: {data}, metadata: {metadata}"));
        let made = world.fs.tmpfile(ROOT_INO, 0o600, libc::O_RDWR, &CRED);
        let (_, file) = match made {
            Ok(made) => made,
            // The root is immutable.
            Err(error) => return assert_eq!(error, Errno::PERM),
        };
        if data {
            take_all_data(world, &file);
        }
        if metadata {
            take_all_metadata(world, file.ino());
        }
        world.is_crowded = true;
        world.has_no_names = metadata;
        self.is_eaten |= metadata;
        self.filler = Some((file, nth + STEPS));
    }

    fn make_room(&mut self) {
        if let Some((file, _)) = self.filler.take() {
            self.world.fs.release(&file);
            self.world.fs.forget(file.ino(), 1);
            self.world.fs.sync().expect("sync");
            self.world.is_crowded = self.is_eaten;
            self.world.has_no_names = false;
        }
    }

    /// Compares all, deletes all, and looks at what is left.
    fn end(mut self) -> Sums {
        self.make_room();
        self.world.begin(u64::MAX);
        self.world.say(format_args!("the end"));
        self.world.check_tree();
        let sums = Sums {
            full: self.world.full,
            refused: self.world.refused,
        };
        let devices = std::mem::take(&mut self.devices);
        remove_all(&mut self.world);
        assert_eq!(check(&devices).data_blocks, 0);
        let fs = mount_with(&devices, small_cache());
        let (left, free) = (fs.statfs().bfree, self.free);
        // Metadata may have grown by a chunk or two, or have taken all; and the room that is kept
        // for it is rounded to whole blocks of each device.
        const ROUNDING_BLOCKS: u64 = 16;
        assert!(
            (self.is_eaten || left + 4096 >= free) && left <= free + ROUNDING_BLOCKS,
            "{left} free, {free} at first"
        );
        fs.unmount().expect("unmount");
        sums
    }
}

fn take_all_data(world: &mut World, file: &Arc<OpenFile>) {
    const PIECE: u64 = 16 << 20;
    let (mut size, mut piece) = (0, PIECE);
    while piece >= common::content::PAGE {
        match world.fs.fallocate(file, 0, size, piece) {
            Ok(()) => size += piece,
            Err(error) => {
                assert_eq!(error, Errno::NOSPC);
                piece /= 2;
            }
        }
    }
    let bytes = world.rng.bytes(10_000);
    let error = loop {
        match try_write(&world.fs, file, size, &bytes, false) {
            Ok(count) => size += u64::from(count),
            Err(error) => break error,
        }
    };
    assert_eq!(error, Errno::NOSPC);
}

fn take_all_metadata(world: &World, ino: u64) {
    let mut nth = 0;
    for len in [60_000, 3000, 100] {
        let value = vec![7; len];
        let error = loop {
            let name = format!("user.{nth}");
            let set = world.fs.setxattr(ino, name.as_bytes(), &value, 0, false);
            if let Err(error) = set {
                break error;
            }
            nth += 1;
        };
        assert_eq!(error, Errno::NOSPC);
        world.fs.sync().expect("a commit has room");
    }
}

fn remove_all(world: &mut World) {
    for opened in std::mem::take(&mut world.handles) {
        world.fs.release(&opened.file);
    }
    fn clear(fs: &FileSystem, dir: u64) {
        fs.set_flags(dir, 0, &ROOT).expect("chattr");
        for (name, ino) in common::dump::entries(fs, dir, 1000) {
            fs.set_flags(ino, 0, &ROOT).expect("chattr");
            if fs.getattr(ino).expect("getattr").is_dir() {
                clear(fs, ino);
                fs.rmdir(dir, &name).expect("rmdir");
            } else {
                fs.unlink(dir, &name).expect("unlink");
            }
        }
    }
    clear(&world.fs, ROOT_INO);
    world.fs.unmount().expect("unmount");
}

/// What became of a run.
#[derive(Clone, Copy, Default)]
struct Sums {
    full: u64,
    refused: u64,
}

/// How a run failed.
struct Failure {
    /// In this step, `u64::MAX` for the end.
    step: u64,
    panic: Panic,
}

/// Runs these steps of a seed. `quiet`: a panic prints nothing.
fn attempt(seed: u64, steps: &[u64], journal: &Arc<Journal>, quiet: bool) -> Result<Sums, Failure> {
    const PATIENCE: Duration = Duration::from_secs(240);
    let _dog = Watchdog::start(PATIENCE, format!("SEED={seed}"));
    let at = AtomicU64::new(0);
    let is_short = steps.len() <= SHORT_STEPS;
    let ended = catch(quiet, || {
        let mut run = Run::start(seed, journal);
        for &nth in steps {
            at.store(nth, Ordering::SeqCst);
            if is_short {
                next_tick();
            }
            run.step(seed, nth);
        }
        at.store(u64::MAX, Ordering::SeqCst);
        run.end()
    });
    ended.map_err(|panic| Failure {
        step: at.load(Ordering::SeqCst),
        panic,
    })
}

/// Runs a seed; a run that fails is shrunk and explained.
fn run(seed: u64, ops: u64) -> Result<Sums, String> {
    let show = text("TRACE").is_some();
    let all: Vec<u64> = (1..=ops).collect();
    let first = match attempt(seed, &all, &Journal::new(false, show), false) {
        Ok(sums) => return Ok(sums),
        Err(failure) => failure,
    };
    eprintln!("SEED={seed} failed; looking for the steps that it takes");
    let began = Instant::now();
    let silent = Journal::new(false, false);
    // What fails elsewhere is another failure.
    let mut fails = |steps: &[u64]| {
        let failure = attempt(seed, steps, &silent, true).err()?;
        (failure.panic.place == first.panic.place).then_some(failure.step)
    };
    let steps = all.into_iter().filter(|&nth| nth <= first.step).collect();
    let (least, attempts) = shrink(steps, SHRINK, &mut fails);
    let journal = Journal::new(true, false);
    let again = attempt(seed, &least, &journal, true).err();
    let again = again.map_or("this time it did not".to_owned(), |f| f.panic.message);
    let list: Vec<String> = least.iter().map(u64::to_string).collect();
    Err(format!(
        "SEED={seed} failed in step {} of {ops}:\n{}\n\n\
         After {attempts} attempts ({:.0?}), {} steps fail:\n{again}\n    {}\n\n\
         Repeat with:\n    SEED={seed} STEPS={} cargo test -p braidfs --test model \
         random_operations\n",
        first.step,
        first.panic.message,
        began.elapsed(),
        least.len(),
        journal.lines().join("\n    "),
        list.join(",")
    ))
}

/// The steps named by `STEPS`: numbers with commas.
fn steps_asked() -> Option<Vec<u64>> {
    let text = text("STEPS")?;
    let steps = text.split(',').filter(|word| !word.trim().is_empty());
    let number = |word: &str| word.trim().parse().expect("STEPS are numbers");
    Some(steps.map(number).collect())
}

#[test]
fn random_operations_agree_with_the_model() {
    let ops = number("OPS").unwrap_or(OPS);
    if let (Some(seed), Some(steps)) = (number("SEED"), steps_asked()) {
        let journal = Journal::new(true, text("TRACE").is_some());
        if let Err(failure) = attempt(seed, &steps, &journal, false) {
            panic!("{}\n{}", journal.lines().join("\n"), failure.panic.message);
        }
        return;
    }
    let began = Instant::now();
    let limit = number("SECONDS").map(Duration::from_secs);
    let (first, runs) = match number("SEED") {
        Some(seed) => (seed, 1),
        None => (number("FIRST").unwrap_or(1), number("RUNS").unwrap_or(RUNS)),
    };
    let next = AtomicU64::new(0);
    let [full, refused] = [AtomicU64::new(0), AtomicU64::new(0)];
    let (stop, failed) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let worker = || {
        while !stop.load(Ordering::SeqCst) {
            let nth = next.fetch_add(1, Ordering::SeqCst);
            if nth >= runs && limit.is_none_or(|limit| began.elapsed() > limit) {
                return;
            }
            match run(first + nth, ops) {
                Ok(sums) => {
                    full.fetch_add(sums.full, Ordering::SeqCst);
                    refused.fetch_add(sums.refused, Ordering::SeqCst);
                }
                Err(report) => {
                    stop.store(true, Ordering::SeqCst);
                    failed.lock().expect("nobody panics with it").push(report);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(worker);
        }
    });
    let failed = failed.into_inner().expect("nobody panics with it");
    assert!(failed.is_empty(), "\n{}", failed.join("\n"));
    println!(
        "{} runs of {ops} operations, {} were refused, {} found the volume full, {:?}",
        next.into_inner().saturating_sub(WORKERS).max(runs),
        refused.into_inner(),
        full.into_inner(),
        began.elapsed()
    );
}

#[test]
fn shrinking_finds_what_it_takes_to_fail() {
    let needed = [3, 17, 240];
    let fails = |steps: &[u64]| {
        let all = needed.iter().all(|step| steps.contains(step));
        all.then_some(240)
    };
    let steps: Vec<u64> = (1..=1000).collect();
    let (least, attempts) = shrink(steps.clone(), SHRINK, &mut |steps| fails(steps));
    assert_eq!(least, needed);
    assert!(attempts < 200, "{attempts}");
    let none = Budget {
        attempts: 0,
        ..SHRINK
    };
    assert_eq!(
        shrink(steps.clone(), none, &mut |steps| fails(steps)).0,
        steps
    );
    // A run that fails without any step has none left.
    assert!(shrink(steps, SHRINK, &mut |_| Some(u64::MAX)).0.is_empty());
}

/// One thread of many: its own files in directories that all share, and some of everybody's.
fn busy(fs: &FileSystem, me: u64, dirs: &[u64], until: Instant) -> Vec<(u64, String, Vec<u8>)> {
    let mut rng = Rng(me);
    // Directory, name, bytes; no two threads use a name.
    let mut mine: Vec<(u64, String, Vec<u8>)> = Vec::new();
    let mut next = 0;
    while Instant::now() < until {
        if mine.len() < 6 {
            let (dir, name) = (*rng.pick(dirs), format!("{me}-{next}"));
            let file = create(fs, dir, &name);
            fs.release(&file);
            fs.forget(file.ino(), 1);
            mine.push((dir, name, Vec::new()));
            next += 1;
        }
        let at = rng.below(mine.len() as u64) as usize;
        let (dir, name, bytes) = &mut mine[at];
        let attr = fs.lookup(*dir, name.as_bytes()).expect("my file");
        let file = fs.open(attr.ino, libc::O_RDWR).expect("open");
        match rng.below(12) {
            0..4 => {
                let len = 1 + rng.below(200_000) as usize;
                let data = rng.bytes(len);
                let offset = rng.below(300_000) as usize;
                let written = try_write(fs, &file, offset as u64, &data, false);
                let stats = fs.stats();
                assert_eq!(written, Ok(len as u32), "{:?} {:?}", stats.space, stats.txg);
                bytes.resize(bytes.len().max(offset + len), 0);
                bytes[offset..offset + len].copy_from_slice(&data);
            }
            4 => {
                let len = (1 + rng.below(4) as usize) << 16;
                let data = rng.bytes(len);
                assert_eq!(try_write(fs, &file, 65_536, &data, true), Ok(len as u32));
                bytes.resize(bytes.len().max(65_536 + len), 0);
                bytes[65_536..65_536 + len].copy_from_slice(&data);
            }
            5 => {
                let size = rng.below(300_000);
                let set = braidfs::SetAttr {
                    size: Some(size),
                    ..braidfs::SetAttr::default()
                };
                fs.setattr(attr.ino, &set, &CRED).expect("truncate");
                bytes.resize(size as usize, 0);
            }
            6 => {
                let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (from, len) = (rng.below(200_000), 1 + rng.below(100_000));
                fs.fallocate(&file, punch, from, len).expect("punch");
                let end = (from + len).min(bytes.len() as u64) as usize;
                if (from as usize) < end {
                    bytes[from as usize..end].fill(0);
                }
            }
            7 => {
                let (to, new) = (*rng.pick(dirs), format!("{me}-{next}"));
                next += 1;
                fs.rename(*dir, name.as_bytes(), to, new.as_bytes(), 0, &CRED)
                    .expect("rename");
                (*dir, *name) = (to, new);
            }
            8 => {
                fs.unlink(*dir, name.as_bytes()).expect("unlink");
                // It goes on for who has it open.
                let found = try_read(fs, &file, 0, bytes.len(), false).expect("read");
                assert!(found == *bytes, "an unlinked file changed");
                mine.swap_remove(at);
            }
            9 => fs.fsync(&file, false).expect("fsync"),
            10 => {
                // Names that all threads fight for: any outcome is good that leaves it sound.
                let (dir, to) = (*rng.pick(dirs), *rng.pick(dirs));
                let shared = format!("shared{}", rng.below(3));
                let other = format!("shared{}", rng.below(3));
                let _any = match rng.below(6) {
                    0 => fs.link(attr.ino, dir, shared.as_bytes()).map(|attr| {
                        fs.forget(attr.ino, 1);
                    }),
                    1 => fs.unlink(dir, shared.as_bytes()),
                    2 => fs
                        .mkdir(dir, shared.as_bytes(), 0o755, &CRED)
                        .map(|attr| fs.forget(attr.ino, 1)),
                    3 => fs.rmdir(dir, shared.as_bytes()),
                    4 => {
                        let flags = *rng.pick(&[0, libc::RENAME_EXCHANGE]);
                        let (from, new) = (shared.as_bytes(), other.as_bytes());
                        fs.rename(dir, from, to, new, flags, &CRED)
                    }
                    _ => fs.readdir(dir, 0, &mut |_| true),
                };
            }
            _ => {
                let direct = rng.one_in(3);
                let found = read_all(fs, &file, bytes.len(), direct);
                assert!(found == *bytes, "{} bytes read wrong", bytes.len());
            }
        }
        fs.release(&file);
        fs.forget(attr.ino, 1);
    }
    mine
}

fn read_all(fs: &FileSystem, file: &Arc<braidfs::OpenFile>, len: usize, direct: bool) -> Vec<u8> {
    try_read(fs, file, 0, len + 1, direct).expect("read")
}

#[test]
fn many_threads_and_commits_leave_each_with_its_own_files() {
    let seconds = number("SECONDS").unwrap_or(4);
    let _dog = Watchdog::start(Duration::from_secs(seconds + 60), "many threads".into());
    let devices = devices(3, 128 << 20);
    format(&devices);
    let fs = mount_with(&devices, small_cache());
    let mut dirs = vec![ROOT_INO];
    for nth in 0..3 {
        let parent = dirs[nth / 2];
        let name = format!("d{nth}");
        let attr = fs.mkdir(parent, name.as_bytes(), 0o755, &CRED).unwrap();
        dirs.push(attr.ino);
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let files: Vec<_> = std::thread::scope(|scope| {
        let (fs, dirs) = (&fs, &dirs);
        let workers: Vec<_> = (1..=6)
            .map(|me| scope.spawn(move || busy(fs, me, dirs, until)))
            .collect();
        scope.spawn(|| {
            while Instant::now() < until {
                fs.sync().expect("sync");
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("a worker"))
            .collect()
    });
    let check_files = |fs: &Arc<FileSystem>| {
        for (dir, name, bytes) in &files {
            let attr = fs.lookup(*dir, name.as_bytes()).expect("it is there");
            let file = fs.open(attr.ino, libc::O_RDONLY).expect("open");
            assert!(read_all(fs, &file, bytes.len(), false) == *bytes, "{name}");
            fs.release(&file);
        }
    };
    check_files(&fs);
    check_accounts(&fs);
    fs.unmount().expect("unmount");
    assert_eq!(check(&devices).orphans, 0);
    let fs = mount_with(&devices, small_cache());
    check_files(&fs);
    fs.unmount().expect("unmount");
}
