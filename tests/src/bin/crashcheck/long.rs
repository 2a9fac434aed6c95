//! Long random workloads of several threads on a small cache, with failing, slow and silent
//! devices beside them, cut at random points.
//!
//! Each thread works in a directory of its own, on a few small files, and remembers each change
//! before it is made. After a cut, what a thread's directory holds must be what it held after some
//! change, not older than what fsync or sync promised it. So a round says nothing about the order
//! of changes of different threads; the enumeration does.
//!
//! A round whose faults hit writes or flushes may end read-only; what was durable must still be
//! there. Faults that lie (bits turned over on read) must show as errors, never as other bytes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use braidfs::{Errno, FileSystem, Ino, ROOT_INO, SetAttr, WriteFlags};
use braidfs_blockdev::Op;
use braidfs_blockdev::device::sim::{
    SimDevice, SimEffect, SimEvent, SimHistory, SimImage, SimKind, SimLoss, SimPlan, SimReplay,
};

use crate::check::fsck;
use crate::record::{devices_of, format_and_mount, mount};
use crate::session::{Abandoned, CRED, bytes_of, read, write};

/// Different names in a thread's directory.
const NAMES: u64 = 8;

/// Files are not longer than this.
const SIZE_MAX: u64 = 600_000;

/// States that are checked of each round.
const CUTS_PER_ROUND: usize = 24;

/// Bytes of one member.
const MEMBER_BYTES: usize = 64 << 20;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub seconds: u64,
    /// Threads that change things.
    pub threads: u64,
    /// How long a round works.
    pub round: Duration,
    pub quiet: bool,
}

/// What was seen.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Outcome {
    pub seed: u64,
    pub rounds: u64,
    pub rounds_read_only: u64,
    pub operations: u64,
    pub operations_failed: u64,
    pub faults: u64,
    pub syncs: u64,
    pub states: u64,
    pub violations: u64,
    pub seconds: f64,
}

/// The files of a directory.
type Files = BTreeMap<String, Vec<u8>>;

/// One change of a directory. Bytes are those of its number.
#[derive(Clone, Debug)]
enum Change {
    Replace(String, usize),
    Write(String, u64, usize),
    Truncate(String, u64),
    Rename(String, String),
    Unlink(String),
}

impl Change {
    /// Does it to the model.
    fn apply(&self, files: &mut Files, number: u64) {
        match self {
            Change::Replace(name, len) => {
                files.insert(name.clone(), bytes_of(number, *len));
            }
            Change::Write(name, at, len) => {
                let Some(file) = files.get_mut(name) else {
                    return;
                };
                let at = usize::try_from(*at).expect("small");
                file.resize(file.len().max(at + len), 0);
                file[at..at + len].copy_from_slice(&bytes_of(number, *len));
            }
            Change::Truncate(name, size) => {
                if let Some(file) = files.get_mut(name) {
                    file.resize(usize::try_from(*size).expect("small"), 0);
                }
            }
            Change::Rename(from, to) => {
                if let Some(file) = files.remove(from) {
                    files.insert(to.clone(), file);
                }
            }
            Change::Unlink(name) => drop(files.remove(name)),
        }
    }
}

/// What a thread did.
#[derive(Default)]
struct Story {
    changes: Vec<Change>,
    /// Everything up to so many changes was durable when the record had the mark of this index.
    promised: Vec<(u64, usize)>,
    /// After a failed change nobody knows what is there.
    ends_early: bool,
}

struct Lot(u64);

impl Lot {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

fn draw(lot: &mut Lot, files: &Files) -> Change {
    let name = |lot: &mut Lot| format!("f{}", lot.below(NAMES));
    let any = |lot: &mut Lot| {
        let nth = usize::try_from(lot.below(files.len() as u64)).expect("an index");
        files.keys().nth(nth).cloned()
    };
    let len = |lot: &mut Lot| usize::try_from(1 + lot.below(SIZE_MAX / 3)).expect("small");
    let Some(known) = any(lot) else {
        return Change::Replace(name(lot), len(lot));
    };
    match lot.below(10) {
        0..3 => Change::Replace(name(lot), len(lot)),
        3..7 => {
            let at = lot.below(SIZE_MAX / 2);
            Change::Write(known, at, len(lot))
        }
        7 => Change::Truncate(known, lot.below(SIZE_MAX)),
        8 => match name(lot) {
            same if same == known => Change::Unlink(known),
            other => Change::Rename(known, other),
        },
        _ => Change::Unlink(known),
    }
}

/// Does a change to the file system. A file is replaced as programs do it: written anew under
/// another name, and renamed.
fn perform(fs: &FileSystem, dir: Ino, change: &Change, number: u64) -> Result<(), Errno> {
    let flags = WriteFlags::default();
    let with = |name: &str, action: &dyn Fn(&Arc<braidfs::OpenFile>) -> Result<(), Errno>| {
        let ino = fs.lookup(dir, name.as_bytes())?.ino;
        let file = fs.open(ino, libc::O_RDWR);
        let result = file.and_then(|file| {
            let result = action(&file);
            fs.release(&file);
            result
        });
        fs.forget(ino, 1);
        result
    };
    match change {
        Change::Replace(name, len) => {
            let new = format!("{name}.new");
            let open = libc::O_RDWR | libc::O_CREAT;
            let (attr, file) = fs.create(dir, new.as_bytes(), 0o644, open, &CRED)?;
            let bytes = bytes_of(number, *len);
            let (one, two) = bytes.split_at(len / 2);
            let written = write(fs, &file, 0, one, false, flags)
                .and_then(|()| write(fs, &file, one.len() as u64, two, false, flags));
            fs.release(&file);
            fs.forget(attr.ino, 1);
            written?;
            fs.rename(dir, new.as_bytes(), dir, name.as_bytes(), 0, &CRED)
        }
        Change::Write(name, at, len) => with(name, &|file| {
            write(fs, file, *at, &bytes_of(number, *len), false, flags)
        }),
        Change::Truncate(name, size) => with(name, &|file| {
            let set = SetAttr {
                size: Some(*size),
                ..SetAttr::default()
            };
            fs.setattr(file.ino(), &set, &CRED).map(|_| ())
        }),
        Change::Rename(from, to) => fs.rename(dir, from.as_bytes(), dir, to.as_bytes(), 0, &CRED),
        Change::Unlink(name) => fs.unlink(dir, name.as_bytes()),
    }
}

/// A round under way.
struct Round<'a> {
    fs: &'a Arc<FileSystem>,
    recorder: &'a SimHistory,
    over: AtomicBool,
    marks: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
    syncs: AtomicU64,
}

impl Round<'_> {
    /// One thread's work; `number_from` keeps the bytes of the threads apart.
    fn work(&self, dir: Ino, seed: u64, number_from: u64, story: &Mutex<Story>) {
        let mut lot = Lot(seed);
        let mut files = Files::new();
        while !self.over.load(Ordering::Relaxed) {
            let change = draw(&mut lot, &files);
            let done = {
                let mut story = story.lock().expect("nobody panics with it");
                story.changes.push(change.clone());
                story.changes.len() as u64
            };
            let number = number_from + done;
            self.operations.fetch_add(1, Ordering::Relaxed);
            if perform(self.fs, dir, &change, number).is_err() {
                self.failed.fetch_add(1, Ordering::Relaxed);
                story.lock().expect("nobody panics with it").ends_early = true;
                return;
            }
            change.apply(&mut files, number);
            if lot.below(12) == 0 {
                let synced = if lot.below(2) == 0 {
                    self.fs.sync()
                } else {
                    self.fs
                        .fsync_dir(dir)
                        .and_then(|()| self.sync_files(dir, &files))
                };
                if synced.is_ok() {
                    self.syncs.fetch_add(1, Ordering::Relaxed);
                    let mut story = story.lock().expect("nobody panics with it");
                    let mark = self.marks.fetch_add(1, Ordering::SeqCst);
                    self.recorder.mark(mark);
                    story
                        .promised
                        .push((mark, usize::try_from(done).expect("a count")));
                }
            }
        }
    }

    fn sync_files(&self, dir: Ino, files: &Files) -> Result<(), Errno> {
        for name in files.keys() {
            let ino = self.fs.lookup(dir, name.as_bytes())?.ino;
            let file = self.fs.open(ino, libc::O_RDONLY)?;
            let synced = self.fs.fsync(&file, false);
            self.fs.release(&file);
            self.fs.forget(ino, 1);
            synced?;
        }
        Ok(())
    }
}

/// Draws the faults of a round; returns how many, and whether writes may fail.
fn plans(seed: u64, devices: &[Arc<SimDevice>]) -> (u64, bool) {
    let kinds: &[SimKind] = match seed % 4 {
        0 => &[],
        1 => &[SimKind::Delay],
        2 => &[SimKind::Delay, SimKind::FlipRead, SimKind::Hang],
        _ => &[
            SimKind::Transient,
            SimKind::Delay,
            SimKind::Short,
            SimKind::FlipRead,
        ],
    };
    let (mut faults, mut writes_fail) = (0, false);
    for (nth, device) in devices.iter().enumerate() {
        let seed = seed ^ (nth as u64) << 48;
        let plan = SimPlan::draw(seed, kinds, 6, MEMBER_BYTES as u64, 2000);
        faults += plan.faults.len() as u64;
        writes_fail |= plan.faults.iter().any(|fault| {
            let fails = matches!(fault.effect, SimEffect::Fail(_) | SimEffect::Short(_));
            fault.op == Op::Write && fails
        });
        device.follow(&plan);
    }
    (faults, writes_fail)
}

/// What a directory holds; an error that says what cannot be read.
fn files_of(fs: &FileSystem, dir: Ino) -> Result<Files, String> {
    let mut names = Vec::new();
    let listed = fs.readdir(dir, 0, &mut |entry| {
        names.push(String::from_utf8_lossy(entry.name).into_owned());
        true
    });
    listed.map_err(|error| format!("listing {dir}: {error}"))?;
    let mut files = Files::new();
    // A file under its first name is not there yet.
    names.retain(|name| name != "." && name != ".." && !name.ends_with(".new"));
    for name in names {
        let bytes = (|| {
            let ino = fs.lookup(dir, name.as_bytes())?.ino;
            let file = fs.open(ino, libc::O_RDONLY)?;
            let bytes = read(fs, &file, 0, 1 << 20);
            fs.release(&file);
            fs.forget(ino, 1);
            bytes
        })();
        let bytes: Vec<u8> = bytes.map_err(|error| format!("{name}: {error}"))?;
        files.insert(name, bytes);
    }
    Ok(files)
}

/// What is compared of a directory.
#[derive(Clone, Copy)]
struct Rigour {
    /// Where writes fail, pages stay dirty beyond the commit of their size: then only names count.
    names_only: bool,
}

fn is_like(one: &Files, two: &Files, but: Option<&str>, rigour: Rigour) -> bool {
    let same = |name: &String, bytes: &Vec<u8>| {
        let is_vague = rigour.names_only || Some(name.as_str()) == but;
        two.get(name)
            .is_some_and(|other| is_vague || bytes == other)
    };
    one.len() == two.len() && one.iter().all(|(name, bytes)| same(name, bytes))
}

/// Whether the directory is as after one of the changes from `least` on.
fn is_a_state(
    story: &Story,
    least: usize,
    found: &Files,
    number_from: u64,
    rigour: Rigour,
) -> bool {
    let mut files = Files::new();
    if least == 0 && found.is_empty() {
        return true;
    }
    // A change that failed may have been done in part.
    let but = match story.changes.last() {
        Some(Change::Write(name, ..) | Change::Truncate(name, _)) if story.ends_early => Some(name),
        _ => None,
    };
    let but = but.map(String::as_str);
    for (count, change) in (1..).zip(&story.changes) {
        change.apply(&mut files, number_from + count as u64);
        if count >= least && is_like(&files, found, but, rigour) {
            return true;
        }
    }
    false
}

const NUMBERS: u64 = 1 << 40;

fn check_state(
    images: &[SimImage],
    dirs: &[Ino],
    stories: &[Story],
    marked: Option<u64>,
    rigour: Rigour,
) -> Result<(), String> {
    let devices = devices_of(images);
    fsck(&devices)?;
    let fs = Abandoned(mount(&devices)?);
    for (thread, (dir, story)) in dirs.iter().zip(stories).enumerate() {
        let found = files_of(&fs.0, *dir)?;
        let promised = story.promised.iter();
        let promised = promised.filter(|(mark, _)| marked.is_some_and(|marked| *mark <= marked));
        let least = promised.map(|(_, done)| *done).max().unwrap_or(0);
        if !is_a_state(story, least, &found, NUMBERS * thread as u64, rigour) {
            let sizes: Vec<_> = found
                .iter()
                .map(|(name, bytes)| (name, bytes.len()))
                .collect();
            return Err(format!(
                "thread {thread}: {sizes:?} was not there after any change from {least} on of {}",
                story.changes.len()
            ));
        }
    }
    Ok(())
}

fn round(plan: &Plan, seed: u64, seen: &mut Outcome) -> Result<(), String> {
    let count = 1 + usize::try_from(seed % 3).expect("small");
    let devices = devices_of(&vec![SimImage::zeroed(MEMBER_BYTES); count]);
    let fs = Abandoned(format_and_mount(&devices, Duration::from_millis(40))?);
    let mut dirs = Vec::new();
    for thread in 0..plan.threads {
        let made =
            fs.0.mkdir(ROOT_INO, format!("t{thread}").as_bytes(), 0o755, &CRED);
        dirs.push(made.map_err(|error| format!("mkdir: {error}"))?.ino);
    }
    fs.0.sync().map_err(|error| format!("sync: {error}"))?;
    let base = SimReplay::new(&devices);
    let recorder = SimHistory::of(&devices);
    let (faults, names_only) = plans(seed, &devices);
    seen.faults += faults;
    let stories: Vec<Mutex<Story>> = dirs.iter().map(|_| Mutex::default()).collect();
    let work = Round {
        fs: &fs.0,
        recorder: &recorder,
        over: AtomicBool::new(false),
        marks: AtomicU64::new(0),
        operations: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        syncs: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        for (thread, (dir, story)) in (0..).zip(dirs.iter().zip(&stories)) {
            let work = &work;
            scope.spawn(move || work.work(*dir, seed ^ thread << 56, NUMBERS * thread, story));
        }
        std::thread::sleep(plan.round);
        work.over.store(true, Ordering::Relaxed);
        devices.iter().for_each(|device| device.come_back());
    });
    let events = recorder.events();
    seen.operations += work.operations.load(Ordering::Relaxed);
    seen.operations_failed += work.failed.load(Ordering::Relaxed);
    seen.syncs += work.syncs.load(Ordering::Relaxed);
    seen.rounds_read_only += u64::from(fs.0.stats().read_only);
    drop(fs);
    let into = |story: Mutex<Story>| story.into_inner().expect("nobody panicked with it");
    let stories: Vec<Story> = stories.into_iter().map(into).collect();
    let what = Cuts {
        events: &events,
        dirs: &dirs,
        stories: &stories,
        rigour: Rigour { names_only },
    };
    cut(seed, base, &what, seen)
}

/// A round that has ended.
struct Cuts<'a> {
    events: &'a [SimEvent],
    dirs: &'a [Ino],
    stories: &'a [Story],
    rigour: Rigour,
}

fn cut(
    seed: u64,
    mut replay: SimReplay,
    what: &Cuts<'_>,
    seen: &mut Outcome,
) -> Result<(), String> {
    let events = what.events;
    let mut lot = Lot(seed);
    let mut cuts: Vec<u64> = (0..CUTS_PER_ROUND)
        .map(|_| lot.below(events.len() as u64 + 1))
        .collect();
    cuts.push(events.len() as u64);
    cuts.sort_unstable();
    let mut marked = None;
    let mut done = 0;
    for cut in cuts {
        let to = usize::try_from(cut).expect("an index");
        for event in &events[done..to] {
            replay.step(event);
            if let SimEvent::Mark(mark) = event {
                marked = Some(marked.map_or(*mark, |marked: u64| marked.max(*mark)));
            }
        }
        done = to;
        let loss = SimLoss::draw(lot.next(), replay.pending(), replay.devices());
        seen.states += 1;
        let images = replay.images(loss);
        check_state(&images, what.dirs, what.stories, marked, what.rigour)
            .map_err(|why| format!("cut behind event {cut}, {loss}: {why}"))?;
    }
    Ok(())
}

/// Rounds until the time is over.
pub fn run(plan: &Plan) -> Outcome {
    let began = Instant::now();
    let mut seen = Outcome {
        seed: plan.seed,
        ..Outcome::default()
    };
    let mut lot = Lot(plan.seed);
    while began.elapsed() < Duration::from_secs(plan.seconds) {
        // The first round's seed is the one given, so that a failure can be repeated.
        let seed = if seen.rounds == 0 {
            plan.seed
        } else {
            lot.next()
        };
        if let Err(what) = round(plan, seed, &mut seen) {
            seen.violations += 1;
            eprintln!("\nVIOLATION: {what}\n  repeat it with: crashcheck long --seed {seed}");
            break;
        }
        seen.rounds += 1;
        seen.seconds = began.elapsed().as_secs_f64();
        if !plan.quiet {
            eprintln!(
                "{:.0} of {} s: {} rounds, {} operations, {} states",
                seen.seconds, plan.seconds, seen.rounds, seen.operations, seen.states
            );
        }
    }
    seen.seconds = began.elapsed().as_secs_f64();
    seen
}
