//! Scrub and the two copies of metadata, on simulated devices, without a mount.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use braidfs::scrub::{ScrubOptions, ScrubState, ScrubStatus};
use braidfs::{FileSystem, MountOptions, ROOT_INO};
use braidfs_blockdev::device::sim::{SimHistory, SimLoss, SimPower, SimRecord, SimReplay};
use braidfs_blockdev::{BlockDevice, ChunkKind, Op, SimDevice, VolBlock, Volume};
use common::*;

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
/// No scrub here takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where copy `copy` of a block lies.
fn place(fs: &FileSystem, block: u64, copy: u8) -> (usize, u64) {
    let (dev, at) = fs.volume().locate(VolBlock(block), copy).expect("a place");
    (usize::from(dev), at)
}

/// The first metadata chunk: its start, blocks of checksums, blocks of payload; see FORMAT.md.
fn layout(fs: &FileSystem) -> (u64, u64, u64) {
    let chunks = fs.volume().chunks();
    let meta = chunks.iter().find(|chunk| chunk.kind == ChunkKind::Meta);
    let meta = meta.expect("a metadata chunk");
    let area = (meta.len_blocks - 2).div_ceil(1017);
    (meta.start.0, area, meta.len_blocks - 2 - area)
}

fn scrub_with(fs: &FileSystem, options: ScrubOptions) -> ScrubStatus {
    fs.scrub_start(options).expect("start a scrub");
    assert!(fs.scrub_wait(PATIENCE), "the scrub goes on and on");
    let status = fs.scrub_status();
    assert_eq!(status.summary.state, ScrubState::Finished, "{status:#?}");
    status
}

fn scrub(fs: &FileSystem) -> ScrubStatus {
    scrub_with(fs, ScrubOptions::default())
}

/// Found, repaired, left.
fn counts(status: &ScrubStatus) -> (u64, u64, u64) {
    let summary = &status.summary;
    (summary.found, summary.repaired, summary.left)
}

/// Devices with some files on them, and the file system mounted.
fn filled(count: usize) -> (Vec<Arc<SimDevice>>, Arc<FileSystem>) {
    let devices = devices(count, 32 << 20);
    format(&devices);
    let fs = mount(&devices);
    fs.mkdir(ROOT_INO, b"dir", 0o755, &CRED).unwrap();
    let dir = fs.lookup(ROOT_INO, b"dir").unwrap().ino;
    for nth in 0..40 {
        let file = create(&fs, dir, &format!("name-{nth}"));
        write(&fs, &file, 0, &pattern(nth, 100_000));
    }
    let file = create(&fs, ROOT_INO, "large");
    write(&fs, &file, 0, &pattern(99, 3 * MIB));
    drop(file);
    fs.sync().unwrap();
    (devices, fs)
}

/// The same devices after a clean end, as another program would open them.
fn remount(devices: &[Arc<SimDevice>], fs: Arc<FileSystem>) -> Arc<FileSystem> {
    fs.unmount().unwrap();
    drop(fs);
    mount(devices)
}

fn images(devices: &[Arc<SimDevice>]) -> Vec<Vec<u8>> {
    devices.iter().map(|device| device.image()).collect()
}

fn from_images(images: &[Vec<u8>]) -> Vec<Arc<SimDevice>> {
    let power = SimPower::new();
    let device = |(nth, image): (usize, &Vec<u8>)| {
        SimDevice::from_image(&format!("sim{nth}"), image.clone(), &power)
    };
    images.iter().enumerate().map(device).collect()
}

fn block_at(devices: &[Arc<SimDevice>], (dev, at): (usize, u64)) -> Vec<u8> {
    devices[dev].peek(at, PAGE)
}

fn is_filled(block: &[u8]) -> bool {
    block.iter().any(|&byte| byte != 0)
}

#[test]
fn a_sound_volume_is_clean_and_all_of_it_is_read() {
    let (devices, fs) = filled(3);
    devices.iter().for_each(|device| device.clear_log());
    let status = scrub(&fs);
    assert_eq!(counts(&status), (0, 0, 0), "{status:#?}");
    let data = 40 * 100_000_usize.next_multiple_of(PAGE) + 3 * MIB;
    assert_eq!(status.summary.data_bytes, data as u64);
    assert!(status.summary.metadata_bytes > fs.volume().label_bytes());
    // It is kept, also across a remount.
    let fs = remount(&devices, fs);
    assert_eq!(fs.scrub_summary(), status.summary);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn one_damaged_copy_of_each_kind_is_found_and_repaired() {
    let (devices, fs) = filled(2);
    let fs = remount(&devices, fs);
    let (start, area, _) = layout(&fs);
    let mut places = Vec::new();
    for copy in 0..2 {
        for block in [start, start + 1, start + 2, start + 2 + area] {
            places.push(place(&fs, block, copy));
        }
    }
    for dev in 0..2 {
        places.extend([0, 64 << 10, 512 << 10, 576 << 10].map(|at| (dev, at)));
    }
    for (dev, at) in places {
        for byte in [20, 332, 511] {
            let sound = devices[dev].peek(at, PAGE);
            devices[dev].flip_bit(at + byte, 3);
            let status = scrub(&fs);
            // Behind a chunk table's end there is nothing to verify.
            let is_table = at == 64 << 10 || at == 576 << 10;
            if is_table && byte > 200 {
                continue;
            }
            assert_eq!(counts(&status), (1, 1, 0), "{dev} {at} {byte}: {status:#?}");
            let error = &status.errors[0];
            assert_eq!(
                (error.device.as_str(), error.offset_bytes),
                (devices[dev].name(), at)
            );
            let is_label = at < 1 << 20;
            assert!(
                is_label || devices[dev].peek(at, PAGE) == sound,
                "{dev} {at} {byte}"
            );
            assert_eq!(counts(&scrub(&fs)), (0, 0, 0), "{dev} {at} {byte}");
        }
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Turns one bit over in all filled pages of metadata, or those with this text, in copy `copy`;
/// gives how many.
fn spoil_pages(
    devices: &[Arc<SimDevice>],
    fs: &FileSystem,
    copy: u8,
    text: Option<&[u8]>,
) -> usize {
    let (start, area, payload) = layout(fs);
    let mut spoilt = 0;
    for index in 1..payload {
        let (dev, at) = place(fs, start + 2 + area + index, copy);
        let block = devices[dev].peek(at, PAGE);
        let has = |text: &[u8]| block.windows(text.len()).any(|part| part == text);
        if is_filled(&block) && text.is_none_or(has) {
            devices[dev].flip_bit(at + 1000, 5);
            spoilt += 1;
        }
    }
    spoilt
}

#[test]
fn metadata_in_memory_is_still_verified_on_the_devices() {
    let (devices, fs) = filled(2);
    // Everything is cached, and was written by this mount.
    let spoilt = spoil_pages(&devices, &fs, 1, None);
    assert!(spoilt > 5, "{spoilt}");
    let status = scrub(&fs);
    let (found, repaired, left) = counts(&status);
    assert!(found > 5 && found <= spoilt as u64, "{found} of {spoilt}");
    assert_eq!((repaired, left), (found, 0), "{status:#?}");
    assert_eq!(counts(&scrub(&fs)), (0, 0, 0));
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn pages_that_are_in_use_count_and_others_do_not() {
    let (devices, fs) = filled(2);
    let fs = remount(&devices, fs);
    let before = images(&devices);
    let spoilt = spoil_pages(&devices, &fs, 0, None);
    let status = scrub(&fs);
    let (found, repaired, left) = counts(&status);
    // After so few commits a good part of what was ever written is of no value any more.
    assert!(found > 3 && found < spoilt as u64, "{found} of {spoilt}");
    assert_eq!((repaired, left), (found, 0), "{status:#?}");
    let (start, area, payload) = layout(&fs);
    for index in 1..payload {
        let (dev, at) = place(&fs, start + 2 + area + index, 0);
        let sound = &before[dev][at as usize..at as usize + PAGE];
        assert!(block_at(&devices, (dev, at)) == sound, "page {index}");
    }
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn a_bad_page_that_is_read_is_mended_by_and_by() {
    let (devices, fs) = filled(2);
    fs.unmount().unwrap();
    let fs = mount_with(
        &devices,
        MountOptions {
            read_only: true,
            ..options()
        },
    );
    let spoilt = spoil_pages(&devices, &fs, 0, None);
    assert!(spoilt > 5);
    fs.unmount().unwrap();
    let fs = mount_with(
        &devices,
        MountOptions {
            commit_interval: Duration::from_millis(20),
            ..options()
        },
    );
    let dir = fs.lookup(ROOT_INO, b"dir").unwrap().ino;
    assert_eq!(names(&fs, dir).len(), 40);
    let until = Instant::now() + PATIENCE;
    loop {
        let stats = fs.stats().metadata;
        assert_eq!(stats.lost_blocks, 0);
        if stats.bad_copies > 0 && stats.repaired_copies == stats.bad_copies {
            break;
        }
        assert!(Instant::now() < until, "{stats:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn what_is_lost_in_all_copies_is_named_and_left() {
    let (devices, fs) = filled(2);
    let large = fs.lookup(ROOT_INO, b"large").unwrap().ino;
    let dir = fs.lookup(ROOT_INO, b"dir").unwrap().ino;
    let small = fs.lookup(dir, b"name-7").unwrap().ino;
    let wanted = [
        (large, "/large", 2 * MIB / PAGE * PAGE, pattern(99, 3 * MIB)),
        (small, "/dir/name-7", 8192, pattern(7, 100_000)),
    ];
    for (_, _, offset, content) in &wanted {
        let block = &content[*offset..offset + PAGE];
        let mut hits = 0;
        for device in &devices {
            let image = device.image();
            for at in (0..image.len()).step_by(PAGE) {
                if &image[at..at + PAGE] == block {
                    device.flip_bit(at as u64 + 9, 1);
                    hits += 1;
                }
            }
        }
        assert_eq!(hits, 1, "a block of data lies in one place");
    }
    let spoilt = spoil_pages(&devices, &fs, 0, Some(b"name-3"))
        + spoil_pages(&devices, &fs, 1, Some(b"name-3"));
    let status = scrub(&fs);
    let (found, repaired, left) = counts(&status);
    assert_eq!((repaired, left), (0, found), "{status:#?}");
    assert!(found >= 4 && found <= 2 + spoilt as u64, "{status:#?}");
    for (ino, path, offset, _) in &wanted {
        let error = status.errors.iter().find(|error| error.ino == Some(*ino));
        let error = error.expect("named");
        assert_eq!(error.paths, [*path]);
        assert_eq!(error.file_offset_bytes, Some(*offset as u64));
        assert!(error.device.starts_with("sim") && error.offset_bytes >= 1 << 20);
    }
    fs.unmount().unwrap();
}

#[test]
fn looking_only_writes_nothing() {
    let (devices, fs) = filled(2);
    let (start, ..) = layout(&fs);
    let head = place(&fs, start, 0);
    devices[head.0].flip_bit(head.1 + 20, 0);
    let look = ScrubOptions {
        no_repair: true,
        ..ScrubOptions::default()
    };
    assert_eq!(counts(&scrub_with(&fs, look)), (1, 0, 1));
    assert_eq!(counts(&scrub(&fs)), (1, 1, 0));
    fs.unmount().unwrap();
    let fs = mount_with(
        &devices,
        MountOptions {
            read_only: true,
            ..options()
        },
    );
    let spoilt = spoil_pages(&devices, &fs, 0, Some(b"name-3"));
    assert!(spoilt > 0);
    devices.iter().for_each(|device| device.clear_log());
    let status = scrub(&fs);
    assert!(
        status.summary.left > 0 && status.summary.repaired == 0,
        "{status:#?}"
    );
    for device in &devices {
        let writes = device
            .log()
            .iter()
            .filter(|record| record.op == Op::Write)
            .count();
        assert_eq!(writes, 0);
    }
    fs.unmount().unwrap();
}

#[test]
fn a_scrub_beside_writers_finds_nothing() {
    let (devices, fs) = filled(3);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let (fs, stop) = (&fs, &stop);
            scope.spawn(move || {
                let file = create(fs, ROOT_INO, &format!("busy-{thread}"));
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let bytes = pattern(thread * 1000 + round, 200_000);
                    write(fs, &file, (round % 7) * 50_000, &bytes);
                    if round % 5 == 0 {
                        let cut = braidfs::SetAttr {
                            size: Some(30_000),
                            ..braidfs::SetAttr::default()
                        };
                        fs.setattr(file.ino(), &cut, &CRED).unwrap();
                    }
                    if round % 3 == 0 {
                        fs.fsync(&file, false).unwrap();
                    }
                    let name = format!("gone-{thread}-{round}");
                    drop(create(fs, ROOT_INO, &name));
                    fs.unlink(ROOT_INO, name.as_bytes()).unwrap();
                }
            });
        }
        let until = Instant::now() + Duration::from_secs(4);
        let mut rounds = 0;
        while Instant::now() < until || rounds < 3 {
            let status = scrub(&fs);
            assert_eq!(counts(&status), (0, 0, 0), "{status:#?}");
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn pausing_keeps_the_place_across_a_remount() {
    let (devices, fs) = filled(2);
    let whole = scrub(&fs).summary.data_bytes;
    // So slow that it waits for half a second after the first 4 MiB of data.
    let slow = ScrubOptions {
        rate_bytes: Some(8 << 20),
        ..ScrubOptions::default()
    };
    fs.scrub_start(slow).unwrap();
    assert!(fs.scrub_start(slow).is_err(), "one at a time");
    let until = Instant::now() + PATIENCE;
    while fs.scrub_summary().data_bytes == 0 {
        assert!(Instant::now() < until, "{:?}", fs.scrub_status());
        std::thread::yield_now();
    }
    fs.scrub_pause().unwrap();
    let at_pause = fs.scrub_summary();
    assert_eq!(at_pause.state, ScrubState::Paused);
    assert!(at_pause.data_bytes < whole);
    let fs = remount(&devices, fs);
    assert_eq!(fs.scrub_summary().state, ScrubState::Paused);
    let fast = ScrubOptions {
        resume: true,
        rate_bytes: Some(1 << 40),
        ..ScrubOptions::default()
    };
    let status = scrub_with(&fs, fast);
    assert_eq!(status.summary.data_bytes, whole);
    assert_eq!(status.summary.started_unix, at_pause.started_unix);
    assert_eq!(counts(&status), (0, 0, 0));
    let resume = ScrubOptions {
        resume: true,
        ..ScrubOptions::default()
    };
    assert!(fs.scrub_start(resume).is_err(), "nothing is paused");
    // A slow one, given up; and one that an unmount cuts off.
    let crawl = ScrubOptions {
        rate_bytes: Some(1000),
        ..ScrubOptions::default()
    };
    fs.scrub_start(crawl).unwrap();
    fs.scrub_cancel().unwrap();
    assert_eq!(fs.scrub_summary().state, ScrubState::Canceled);
    fs.scrub_start(crawl).unwrap();
    let fs = remount(&devices, fs);
    assert_eq!(fs.scrub_summary().state, ScrubState::Paused);
    fs.scrub_cancel().unwrap();
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn after_power_cuts_nothing_is_called_damage() {
    let devices = devices(2, 32 << 20);
    format(&devices);
    let mut replay = SimReplay::new(&devices);
    let history = SimHistory::of(&devices);
    let fs = mount(&devices);
    for round in 0..6 {
        for nth in 0..8 {
            let file = create(&fs, ROOT_INO, &format!("f{round}-{nth}"));
            write(&fs, &file, 0, &pattern(round * 8 + nth, 20_000));
        }
        if round > 2 {
            fs.unlink(ROOT_INO, format!("f{}-1", round - 2).as_bytes())
                .unwrap();
        }
        fs.sync().unwrap();
    }
    drop(fs);
    let events = history.events();
    let step = (events.len() / 12).max(1);
    let mut states = 0;
    for (nth, event) in events.iter().enumerate() {
        replay.step(event);
        if nth % step != 0 || replay.pending() == 0 {
            continue;
        }
        for kind in 0..8 {
            let seed = nth as u64 * 10 + kind;
            let loss = SimLoss::draw(seed, replay.pending(), replay.devices());
            let wreck = replay.wreck(loss);
            let what = format!("event {nth} of {}, {loss:?}", events.len());
            let read_only = MountOptions {
                read_only: true,
                ..options()
            };
            let fs = mount_with(&wreck, read_only);
            let status = scrub(&fs);
            assert_eq!(counts(&status), (0, 0, 0), "{what}, read-only: {status:#?}");
            fs.unmount().unwrap();
            let fs = mount(&wreck);
            let status = scrub(&fs);
            assert_eq!(counts(&status), (0, 0, 0), "{what}: {status:#?}");
            assert_eq!(fs.stats().metadata.bad_copies, 0, "{what}");
            fs.unmount().unwrap();
            states += 1;
        }
    }
    assert!(states >= 30, "{states} states");
}

/// The header's block, both copies.
fn header_places(fs: &FileSystem) -> [(usize, u64); 2] {
    let (start, area, _) = layout(fs);
    [0, 1].map(|copy| place(fs, start + 2 + area, copy))
}

#[test]
fn power_cuts_between_the_copies_of_the_header_never_bring_an_older_root_back() {
    let (devices, fs) = filled(2);
    let places = header_places(&fs);
    create(&fs, ROOT_INO, "first");
    fs.sync().unwrap();
    let old = block_at(&devices, places[1]);
    create(&fs, ROOT_INO, "second");
    fs.sync().unwrap();
    // The power fails: one copy is the older one.
    let devices = from_images(&images(&devices));
    devices[places[1].0].poke(places[1].1, &old);
    drop(fs);
    let fs = mount(&devices);
    assert!(fs.lookup(ROOT_INO, b"second").is_ok());
    let old = block_at(&devices, places[0]);
    create(&fs, ROOT_INO, "third");
    fs.sync().unwrap();
    // And again, the other way round.
    let devices = from_images(&images(&devices));
    devices[places[0].0].poke(places[0].1, &old);
    drop(fs);
    for read_only in [true, false] {
        devices.iter().for_each(|device| device.clear_log());
        let fs = mount_with(
            &devices,
            MountOptions {
                read_only,
                ..options()
            },
        );
        assert!(fs.lookup(ROOT_INO, b"third").is_ok());
        assert_eq!(fs.stats().metadata.bad_copies, 0, "nothing is damaged");
        let is_chunks = |record: &&SimRecord| record.offset >= 1 << 20 || record.op == Op::Flush;
        let log = devices[places[0].0].log();
        let mut log = log
            .iter()
            .filter(is_chunks)
            .skip_while(|record| record.op != Op::Write);
        let first = log.next().map(|record| (record.offset, record.len));
        let wanted = (places[0].1, PAGE as u64);
        assert_eq!(
            first,
            (!read_only).then_some(wanted),
            "the older copy is the first write"
        );
        assert!(read_only || log.next().is_some_and(|record| record.op == Op::Flush));
        let copies = places.map(|place| block_at(&devices, place));
        assert_eq!(
            copies[0] == copies[1],
            !read_only,
            "made alike before all else"
        );
        fs.unmount().unwrap();
    }
    check(&devices);
}

fn mount_error(devices: &[Arc<SimDevice>], read_only: bool) -> String {
    let members = devices
        .iter()
        .map(|d| Arc::clone(d) as Arc<dyn BlockDevice>);
    let volume = Volume::assemble(members.collect(), read_only).expect("assemble");
    let options = MountOptions {
        read_only,
        ..options()
    };
    match FileSystem::mount(volume, options) {
        Ok(_) => "it mounts".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn fixed_blocks_that_are_lost_are_named_and_heads_are_bounded() {
    let (devices, fs) = filled(2);
    let (start, ..) = layout(&fs);
    let slots = [0, 1].map(|slot| [0, 1].map(|copy| place(&fs, start + slot, copy)));
    let header = header_places(&fs);
    fs.unmount().unwrap();
    let sound = images(&devices);
    let spoil = |places: &[(usize, u64)]| {
        let devices = from_images(&sound);
        for &(dev, at) in places {
            devices[dev].flip_bit(at + 17, 2);
        }
        devices
    };
    let error = mount_error(&spoil(&header), false);
    assert!(
        error.contains("header") && error.contains("sim0 at byte"),
        "{error}"
    );
    // Of the head slots, the newer one is needed.
    let sequence = |place| u64::from_le_bytes(block_at(&devices, place)[8..16].try_into().unwrap());
    let newer = usize::from(sequence(slots[1][0]) > sequence(slots[0][0]));
    let error = mount_error(&spoil(&slots[newer]), true);
    assert!(
        error.contains("head") && error.contains("damaged in all"),
        "{error}"
    );
    // The older one is not, and is written again.
    let devices = spoil(&slots[1 - newer]);
    let fs = mount(&devices);
    assert_eq!(fs.stats().metadata.lost_blocks, 1);
    assert_eq!(counts(&scrub(&fs)), (0, 0, 0));
    fs.unmount().unwrap();
    check(&devices);
    let error = mount_error(&spoil(&slots.concat()), false);
    assert!(error.contains("head"), "{error}");
    // A head that was made up.
    let devices = from_images(&sound);
    for (dev, at) in slots[newer] {
        let mut head = devices[dev].peek(at, 32);
        head[16..24].copy_from_slice(&(1_u64 << 60).to_le_bytes());
        let crc = crc32c::crc32c(&head);
        devices[dev].poke(at, &head);
        devices[dev].poke(at + 32, &crc.to_le_bytes());
    }
    let error = mount_error(&devices, true);
    assert!(error.contains("its chunks hold"), "{error}");
}
