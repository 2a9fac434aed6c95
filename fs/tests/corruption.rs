//! Every byte of a small volume's labels, chunk tables, metadata heads, checksum areas and redb
//! header turned over, and one byte of each used sector elsewhere: once in one copy, once in all.
//!
//! A reader gets the right bytes, EIO, or no mount at all with a reason; never wrong bytes, a
//! missing name, a panic or a hang. With one of two copies damaged it gets everything; a writable
//! mount, or a scrub, then mends that copy, so that the other one may go. With all copies damaged,
//! what is lost is not hidden: `fsck -n` does not call such metadata sound, and a scrub names the
//! place of such data.
//!
//! By default a sample of each region; `CORRUPTION=all` takes every place, `CORRUPTION=n` so many
//! of each region. `SEED=n` repeats a sample.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use braidfs::scrub::{ScrubError, ScrubOptions};
use braidfs::{Errno, FileSystem, MountOptions, ROOT_INO};
use braidfs_blockdev::device::sim::{SimImage, SimPower};
use braidfs_blockdev::label::{LABEL_LEN, LABEL_OFFSETS, TABLE_LEN_MAX, TABLE_OFFSETS};
use braidfs_blockdev::{BlockDevice, Chunk, ChunkKind, SimDevice, Volume};
use common::rng::Rng;
use common::watchdog::Watchdog;
use common::*;

/// Places of each region by default.
const SAMPLE: usize = 40;
const THREADS: usize = 2;
const BLOCK: u64 = 4096;
const SECTOR: u64 = 512;
const PIECE: usize = 64 << 10;
/// Payload blocks that one sector of a checksum area speaks for.
const SECTOR_ENTRIES: u64 = 127;
/// Where a label has the length of the table.
const TABLE_LEN_AT: u64 = 108;

/// Panics on any thread, also on those of the file system.
static PANICS: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Region {
    Label,
    Table,
    Head,
    Checksums,
    Header,
    Metadata,
    Data,
}

impl Region {
    /// Whether a writable mount that comes across the damage of one copy mends it. (Where nobody
    /// reads, in pages that no table is in any more, only a scrub comes across it.)
    fn heals(self) -> bool {
        !matches!(self, Region::Metadata | Region::Data)
    }
}

/// A byte, in every place that holds it: device and offset.
#[derive(Clone, Debug)]
struct Place {
    region: Region,
    copies: Vec<(usize, u64)>,
}

/// What a file, directory or link is to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Names(Vec<String>),
    Bytes(Vec<u8>),
    Target(Vec<u8>),
}

/// What is there, by path, with the extended attributes.
type Tree = BTreeMap<String, (Content, BTreeMap<Vec<u8>, Vec<u8>>)>;

/// A sound volume, and what is in it.
struct Bed {
    images: Vec<SimImage>,
    tree: Tree,
    chunks: Vec<Chunk>,
}

fn small(read_only: bool) -> MountOptions {
    MountOptions {
        read_only,
        cache_bytes: braidfs::CACHE_BYTES_MIN,
        ..options()
    }
}

fn devices_of(images: &[SimImage]) -> Vec<Arc<SimDevice>> {
    let device = |(nth, image): (usize, &SimImage)| {
        SimDevice::with_image(&format!("sim{nth}"), image.clone(), &SimPower::new())
    };
    images.iter().enumerate().map(device).collect()
}

fn assemble(devices: &[Arc<SimDevice>], read_only: bool) -> Result<Arc<Volume>, String> {
    let share = |device: &Arc<SimDevice>| Arc::clone(device) as Arc<dyn BlockDevice>;
    let members = devices.iter().map(share).collect();
    Volume::assemble(members, read_only).map_err(|error| error.to_string())
}

impl Bed {
    fn new() -> Self {
        let devices = devices(2, 32 << 20);
        format(&devices);
        let fs = mount_with(&devices, small(false));
        for (parent, name) in [(ROOT_INO, "a"), (ROOT_INO, "b")] {
            let dir = fs
                .mkdir(parent, name.as_bytes(), 0o755, &CRED)
                .expect("mkdir")
                .ino;
            for nth in 0..40 {
                let file = create(&fs, dir, &format!("file-{nth}"));
                let len = [0, 10, 5000, 20_000][nth % 4];
                write(&fs, &file, 0, &pattern(nth as u64, len + 1));
                let value = pattern(nth as u64, 40 * nth);
                fs.setxattr(file.ino(), b"user.x", &value, 0, false)
                    .expect("setxattr");
                fs.release(&file);
            }
            fs.symlink(dir, b"link", b"file-1", &CRED).expect("symlink");
        }
        let file = create(&fs, ROOT_INO, "large");
        write(&fs, &file, 0, &pattern(99, 300_000));
        write(&fs, &file, 1_000_000, &pattern(98, 100_000));
        fs.release(&file);
        fs.unmount().expect("unmount");
        drop(fs);
        let volume = assemble(&devices, true).expect("a sound volume");
        let chunks = volume.chunks();
        let fs = FileSystem::mount(volume, small(true)).expect("a sound volume");
        let mut tree = BTreeMap::new();
        let mut errors = 0;
        read_tree(
            &fs,
            ROOT_INO,
            "",
            &mut errors,
            &mut |path, content, xattrs| {
                tree.insert(path, (content, xattrs));
            },
        );
        assert_eq!(errors, 0);
        assert!(tree.len() > 80, "{}", tree.len());
        fs.unmount().expect("unmount");
        let images = devices.iter().map(|device| device.snapshot()).collect();
        Self {
            images,
            tree,
            chunks,
        }
    }

    fn peek(&self, dev: usize, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let at = usize::try_from(at).expect("a small device");
        self.images[dev].read(at, &mut bytes);
        bytes
    }

    fn is_used(&self, copy: (usize, u64)) -> bool {
        let bytes = self.peek(copy.0, copy.1, SECTOR as usize);
        bytes.iter().any(|byte| *byte != 0)
    }

    /// Every place of each region; of used sectors elsewhere, one that `rng` picks.
    fn places(&self, rng: &mut Rng) -> Vec<Place> {
        let mut places = Vec::new();
        let mut add = |region, copies: Vec<(usize, u64)>| places.push(Place { region, copies });
        let members = 0..self.images.len();
        for dev in members.clone() {
            for at in 0..LABEL_LEN as u64 {
                add(
                    Region::Label,
                    LABEL_OFFSETS.map(|slot| (dev, slot + at)).to_vec(),
                );
            }
        }
        let raw = self.peek(0, LABEL_OFFSETS[0] + TABLE_LEN_AT, 4);
        let table_len = u32::from_le_bytes(raw.try_into().expect("four bytes"));
        // The two of a member are of different generations.
        for slot in TABLE_OFFSETS {
            for at in 0..u64::from(table_len) {
                let copies = members.clone().map(|dev| (dev, slot + at));
                add(Region::Table, copies.collect());
            }
        }
        let meta = self
            .chunks
            .iter()
            .find(|chunk| chunk.kind == ChunkKind::Meta);
        let meta = meta.expect("a metadata chunk");
        let copies = |at: u64| -> Vec<(usize, u64)> {
            let copy = meta.members.iter();
            copy.map(|copy| (usize::from(copy.dev), copy.offset_bytes + at))
                .collect()
        };
        for at in 0..2 * BLOCK {
            add(Region::Head, copies(at));
        }
        let area_blocks = (meta.len_blocks - 2).div_ceil(8 * SECTOR_ENTRIES + 1);
        let payload = (2 + area_blocks) * BLOCK;
        for sector in (2 * BLOCK..payload).step_by(SECTOR as usize) {
            let entries = self.peek(copies(sector)[0].0, copies(sector)[0].1, 508);
            if entries.iter().any(|byte| *byte != 0) {
                (sector..sector + SECTOR).for_each(|at| add(Region::Checksums, copies(at)));
            }
        }
        (payload..payload + SECTOR).for_each(|at| add(Region::Header, copies(at)));
        for sector in (payload + BLOCK..meta.member_len_bytes).step_by(SECTOR as usize) {
            if self.is_used(copies(sector)[0]) {
                add(Region::Metadata, copies(sector + rng.below(SECTOR)));
            }
        }
        for chunk in self
            .chunks
            .iter()
            .filter(|chunk| chunk.kind == ChunkKind::Data)
        {
            for member in &chunk.members {
                for sector in (0..chunk.member_len_bytes).step_by(SECTOR as usize) {
                    let at = (usize::from(member.dev), member.offset_bytes + sector);
                    if self.is_used(at) {
                        add(Region::Data, vec![(at.0, at.1 + rng.below(SECTOR))]);
                    }
                }
            }
        }
        places
    }

    /// Everything that can be read is as it was; returns how often there was EIO instead.
    fn compare(&self, fs: &Arc<FileSystem>) -> u64 {
        let mut errors = 0;
        for (path, (content, xattrs)) in &self.tree {
            let Some(ino) = errors_counted(look_up(fs, path), &mut errors) else {
                continue;
            };
            let (found, attributes) = read_node(fs, ino, &mut errors);
            match (content, found) {
                (_, None) => {}
                (Content::Bytes(bytes), Some(Content::Bytes(_))) => {
                    errors += compare_bytes(fs, ino, bytes, path);
                }
                (expected, Some(found)) => assert!(*expected == found, "{path}: wrong content"),
            }
            for (name, value) in attributes {
                assert_eq!(xattrs.get(&name), Some(&value), "{path}: wrong attribute");
            }
        }
        errors
    }
}

/// EIO is counted; any other error is a wrong answer.
fn errors_counted<T>(result: Result<T, Errno>, errors: &mut u64) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert_eq!(error, Errno::IO);
            *errors += 1;
            None
        }
    }
}

fn look_up(fs: &FileSystem, path: &str) -> Result<u64, Errno> {
    let names = path.split('/').filter(|name| !name.is_empty());
    let mut at = ROOT_INO;
    for name in names {
        at = fs.lookup(at, name.as_bytes())?.ino;
    }
    Ok(at)
}

fn compare_bytes(fs: &Arc<FileSystem>, ino: u64, expected: &[u8], path: &str) -> u64 {
    let mut errors = 0;
    let opened = fs.open(ino, libc::O_RDONLY);
    let Some(file) = errors_counted(opened, &mut errors) else {
        return errors;
    };
    for (at, piece) in (0..).step_by(PIECE).zip(expected.chunks(PIECE)) {
        let read = try_read(fs, &file, at, piece.len(), false);
        let Some(bytes) = errors_counted(read, &mut errors) else {
            continue;
        };
        assert!(bytes == piece, "{path}: wrong bytes after {at}");
    }
    fs.release(&file);
    errors
}

type Node = (Option<Content>, BTreeMap<Vec<u8>, Vec<u8>>);

/// An inode's content (for files, only its length is looked at) and extended attributes.
fn read_node(fs: &Arc<FileSystem>, ino: u64, errors: &mut u64) -> Node {
    let mut xattrs = BTreeMap::new();
    let listed = errors_counted(fs.listxattr(ino), errors).unwrap_or_default();
    for name in listed
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        if let Some(value) = errors_counted(fs.getxattr(ino, name), errors) {
            xattrs.insert(name.to_vec(), value);
        }
    }
    let Some(attr) = errors_counted(fs.getattr(ino), errors) else {
        return (None, xattrs);
    };
    let content = match attr.mode & libc::S_IFMT {
        libc::S_IFDIR => {
            let mut names = Vec::new();
            let listed = fs.readdir(ino, 0, &mut |entry| {
                names.push(String::from_utf8_lossy(entry.name).into_owned());
                true
            });
            names.retain(|name| name != "." && name != "..");
            names.sort();
            errors_counted(listed, errors).map(|()| Content::Names(names))
        }
        libc::S_IFLNK => errors_counted(fs.readlink(ino), errors).map(Content::Target),
        _ => Some(Content::Bytes(vec![
            0;
            usize::try_from(attr.size)
                .expect("small")
        ])),
    };
    (content, xattrs)
}

type Each<'a> = &'a mut dyn FnMut(String, Content, BTreeMap<Vec<u8>, Vec<u8>>);

fn read_tree(fs: &Arc<FileSystem>, ino: u64, path: &str, errors: &mut u64, each: Each<'_>) {
    let (content, xattrs) = read_node(fs, ino, errors);
    let mut content = content.expect("a sound volume");
    if let Content::Names(names) = &content {
        for name in names {
            let child = fs.lookup(ino, name.as_bytes()).expect("a sound volume").ino;
            read_tree(fs, child, &format!("{path}/{name}"), errors, each);
        }
    }
    if let Content::Bytes(bytes) = &mut content {
        let file = fs.open(ino, libc::O_RDONLY).expect("a sound volume");
        *bytes = read(fs, &file, 0, bytes.len());
        fs.release(&file);
    }
    each(path.to_owned(), content, xattrs);
}

/// What became of a damaged volume.
#[derive(Debug)]
enum Outcome {
    Refused(String),
    /// How often reading gave EIO.
    Mounted(u64),
}

impl Outcome {
    fn is_whole(&self) -> bool {
        matches!(self, Outcome::Mounted(0))
    }
}

/// Mounts, reads everything, unmounts.
fn try_mount(bed: &Bed, devices: &[Arc<SimDevice>], read_only: bool) -> Outcome {
    let volume = match assemble(devices, read_only) {
        Ok(volume) => volume,
        Err(why) => return Outcome::Refused(why),
    };
    let fs = match FileSystem::mount(volume, small(read_only)) {
        Ok(fs) => fs,
        Err(error) => return Outcome::Refused(error.to_string()),
    };
    let errors = bed.compare(&fs);
    // What cannot be read cannot always be closed well either.
    let closed = fs.unmount();
    assert!(closed.is_ok() || errors > 0 || !read_only, "{closed:?}");
    Outcome::Mounted(errors)
}

/// What `fsck -n` complains of, if it does.
fn complaint(devices: &[Arc<SimDevice>]) -> Option<String> {
    let volume = match assemble(devices, true) {
        Ok(volume) => volume,
        Err(why) => return Some(why),
    };
    match braidfs::fsck::check(volume) {
        Ok(report) if report.problems.is_empty() => None,
        Ok(report) => Some(format!("{:?}", report.problems)),
        Err(error) => Some(error.to_string()),
    }
}

fn flip(devices: &[Arc<SimDevice>], copy: (usize, u64), bit: u8) {
    devices[copy.0].flip_bit(copy.1, bit);
}

/// Scrubs a volume that can be mounted; what was found.
fn scrub(devices: &[Arc<SimDevice>]) -> Vec<ScrubError> {
    let volume = assemble(devices, false).expect("assemble");
    let fs = FileSystem::mount(volume, small(false)).expect("mount");
    fs.scrub_start(ScrubOptions::default())
        .expect("start a scrub");
    assert!(
        fs.scrub_wait(Duration::from_secs(60)),
        "the scrub has not ended"
    );
    let status = fs.scrub_status();
    assert_eq!(status.failure, None);
    fs.unmount().expect("unmount");
    status.errors
}

/// Whether an error names the place: the device, and the block or table that it lies in.
fn names(error: &ScrubError, region: Region, copy: (usize, u64)) -> bool {
    let reach = if region == Region::Table {
        TABLE_LEN_MAX as u64
    } else {
        BLOCK
    };
    let near = (error.offset_bytes..error.offset_bytes + reach).contains(&copy.1);
    error.device == format!("sim{}", copy.0) && near
}

/// One copy of several is damaged: nothing is lost; a writable mount mends what it comes across,
/// and a scrub mends the rest.
fn one_copy(bed: &Bed, place: &Place, nth: usize, bit: u8) {
    let devices = devices_of(&bed.images);
    let damaged = place.copies[nth];
    let others = || place.copies.iter().filter(|copy| **copy != damaged);
    flip(&devices, damaged, bit);
    let outcome = try_mount(bed, &devices, true);
    assert!(outcome.is_whole(), "read-only: {outcome:?}");
    let again = devices_of(&bed.images);
    flip(&again, damaged, bit);
    let outcome = try_mount(bed, &devices, false);
    assert!(outcome.is_whole(), "writable: {outcome:?}");
    assert_eq!(complaint(&devices), None, "after a writable mount");
    if place.region.heals() {
        others().for_each(|copy| flip(&devices, *copy, bit));
        let outcome = try_mount(bed, &devices, true);
        assert!(
            outcome.is_whole(),
            "not mended, so not without the other copy: {outcome:?}"
        );
    }
    let found = scrub(&again);
    let named = found
        .iter()
        .all(|error| error.repaired && names(error, place.region, damaged));
    assert!(named, "{found:#?}");
    assert_eq!(scrub(&again), [], "a second scrub");
    others().for_each(|copy| flip(&again, *copy, bit));
    let outcome = try_mount(bed, &again, true);
    assert!(
        outcome.is_whole(),
        "not mended by a scrub: {outcome:?}; it found {found:#?}"
    );
}

/// All copies are damaged: what is lost is not hidden.
fn all_copies(bed: &Bed, place: &Place, bit: u8) {
    let devices = devices_of(&bed.images);
    place
        .copies
        .iter()
        .for_each(|copy| flip(&devices, *copy, bit));
    let outcome = try_mount(bed, &devices, true);
    if let Outcome::Refused(why) = &outcome {
        assert!(why.len() > 10, "refused without a reason: {why}");
        if place.region == Region::Label {
            assert!(why.contains(&format!("sim{}", place.copies[0].0)), "{why}");
        }
    }
    if place.region == Region::Data {
        let found = scrub(&devices);
        let mut named = found
            .iter()
            .filter(|error| names(error, place.region, place.copies[0]));
        let is_named = named.any(|error| !error.repaired && !error.paths.is_empty());
        assert_eq!(
            outcome.is_whole(),
            found.is_empty(),
            "{outcome:?} {found:#?}"
        );
        assert!(is_named || found.is_empty(), "{found:#?}");
    } else {
        let said = complaint(&devices);
        assert!(
            outcome.is_whole() || said.is_some(),
            "fsck is content with {outcome:?}"
        );
    }
    let _not_worse = try_mount(bed, &devices, false);
}

fn wanted() -> usize {
    match std::env::var("CORRUPTION").as_deref() {
        Ok("all") => usize::MAX,
        Ok(number) => number.parse().expect("CORRUPTION is `all` or a number"),
        Err(_) => SAMPLE,
    }
}

/// So many places of each region, spread over it.
fn sample(all: Vec<Place>, count: usize, rng: &mut Rng) -> Vec<Place> {
    let mut chosen = Vec::new();
    let mut regions: Vec<Region> = all.iter().map(|place| place.region).collect();
    regions.dedup();
    for region in regions {
        let of_region: Vec<&Place> = all.iter().filter(|place| place.region == region).collect();
        if count >= of_region.len() {
            chosen.extend(of_region.into_iter().cloned());
            continue;
        }
        let stride = of_region.len() / count;
        let pick = |nth: usize| of_region[nth * stride + rng.below(stride as u64) as usize].clone();
        chosen.extend((0..count).map(pick));
    }
    chosen
}

#[test]
fn no_damage_goes_unnoticed_or_gives_wrong_bytes() {
    let seed = std::env::var("SEED")
        .ok()
        .map(|text| text.parse().expect("SEED is a number"));
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("SEED={seed}");
    let former = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        former(info);
    }));
    let count = wanted();
    let _watchdog = Watchdog::start(Duration::from_secs(7200), format!("SEED={seed}"));
    let bed = Bed::new();
    let mut rng = Rng(seed);
    let all = bed.places(&mut rng);
    let total = all.len();
    let places = sample(all, count, &mut rng);
    println!("{} of {total} places", places.len());
    let (begun, next) = (Instant::now(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((nth, place)) = take(&next, &places) {
                    let mut rng = Rng::of(seed, nth as u64);
                    let bit = u8::try_from(rng.below(8)).expect("below 8");
                    println!("place {nth}: {place:?}, bit {bit}");
                    let copies = place.copies.len();
                    // All of them take turns when there is but a sample.
                    let copy = rng.below(copies as u64) as usize;
                    let each = if count == usize::MAX {
                        0..copies
                    } else {
                        copy..copy + 1
                    };
                    if copies > 1 {
                        each.for_each(|copy| one_copy(&bed, place, copy, bit));
                    }
                    all_copies(&bed, place, bit);
                    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "a panic on some thread");
                    if nth % 1000 == 999 {
                        eprintln!("{nth} of {} after {:?}", places.len(), begun.elapsed());
                    }
                }
            });
        }
    });
    println!("{} places in {:?}", places.len(), begun.elapsed());
}

/// Closing reads more of the metadata than was ever asked for; where nothing can be lost, that does
/// not fail.
#[test]
fn a_read_only_mount_that_read_everything_closes() {
    let bed = Bed::new();
    let mut pages = bed.places(&mut Rng(1));
    pages.retain(|place| place.region == Region::Metadata);
    pages.dedup_by_key(|place| (place.copies[0].0, place.copies[0].1 / BLOCK));
    let read = pages.iter().filter(|place| {
        let devices = devices_of(&bed.images);
        let copies = place.copies.iter();
        copies.for_each(|copy| flip(&devices, *copy, 0));
        try_mount(&bed, &devices, true).is_whole()
    });
    let read = read.count();
    assert!(0 < read && read < pages.len(), "{read} of {}", pages.len());
}

fn take<'a>(next: &AtomicUsize, places: &'a [Place]) -> Option<(usize, &'a Place)> {
    if PANICS.load(Ordering::SeqCst) > 0 {
        return None;
    }
    let nth = next.fetch_add(1, Ordering::SeqCst);
    places.get(nth).map(|place| (nth, place))
}
