//! Preallocation, holes, zeroing and searching, without a mount: what has a block, what reads as
//! zeros, and what still works when the volume is full.
#![allow(missing_docs)]

mod common;

use braidfs::{Errno, FileSystem, OpenFile, ROOT_INO, SetAttr};
use common::rng::Rng;
use common::*;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

fn blocks(fs: &FileSystem, file: &OpenFile) -> u64 {
    fs.getattr(file.ino()).unwrap().blocks / 8
}

fn size(fs: &FileSystem, file: &OpenFile) -> u64 {
    fs.getattr(file.ino()).unwrap().size
}

fn set_size(fs: &FileSystem, file: &OpenFile, size: u64) {
    let set = SetAttr {
        size: Some(size),
        ..SetAttr::default()
    };
    fs.setattr(file.ino(), &set, &CRED).unwrap();
}

fn assert_full(fs: &FileSystem) {
    let file = create(fs, ROOT_INO, "more");
    assert_eq!(
        try_write(fs, &file, 0, &[1; 4096], false),
        Err(Errno::NOSPC)
    );
    fs.release(&file);
    fs.unlink(ROOT_INO, b"more").unwrap();
}

#[test]
fn what_was_preallocated_can_be_written_on_a_full_volume() {
    for (direct, step) in [(false, PAGE), (false, MIB), (true, MIB), (false, 1000)] {
        let devices = devices(2, 32 << 20);
        format(&devices);
        let fs = mount(&devices);
        let file = create(&fs, ROOT_INO, "f");
        let len = 6 * MIB;
        fs.fallocate(&file, 0, 0, len).unwrap();
        assert_eq!(blocks(&fs, &file), len / PAGE);
        let _fillers = fill_with_data(&fs, ROOT_INO);
        assert_full(&fs);
        let bytes = pattern(7, len as usize);
        for (nth, piece) in bytes.chunks(step as usize).enumerate() {
            let at = nth as u64 * step;
            let done = try_write(&fs, &file, at, piece, direct);
            assert_eq!(done, Ok(piece.len() as u32), "{direct} {step} at {at}");
        }
        assert_eq!(blocks(&fs, &file), len / PAGE);
        fs.sync().unwrap();
        assert_eq!(fs.stats().space.reserved_blocks, 0);
        // And again: each block has to move now.
        for at in (0..len / (64 << 10)).rev().map(|nth| nth * (64 << 10)) {
            let piece = &bytes[at as usize..at as usize + (64 << 10)];
            assert_eq!(
                try_write(&fs, &file, at, piece, direct),
                Ok(64 << 10),
                "{direct} {step} again at {at}"
            );
        }
        assert_full(&fs);
        fs.unmount().unwrap();
        check(&devices);
        let fs = mount(&devices);
        let file = open(&fs, "f");
        assert!(read(&fs, &file, 0, len as usize) == bytes);
        assert_eq!(blocks(&fs, &file), len / PAGE);
        fs.unmount().unwrap();
    }
}

#[test]
fn a_first_write_to_preallocated_space_stays_where_it_is() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    fs.fallocate(&file, 0, 0, 4 * MIB).unwrap();
    fs.sync().unwrap();
    let free = fs.stats().space;
    for at in [0, 100, 7, 513, 1023] {
        write(&fs, &file, at * PAGE, &[1; 4096]);
        assert_eq!(
            try_write(&fs, &file, 2 * MIB, &[2; 1 << 18], true),
            Ok(1 << 18)
        );
    }
    fs.sync().unwrap();
    let after = fs.stats().space;
    assert_eq!(after.free_blocks + after.pending_blocks, free.free_blocks);
    assert_eq!(after.reserved_blocks, 0);
    fs.unmount().unwrap();
    let report = check(&devices);
    assert_eq!(report.data_blocks, 1024);
}

#[test]
fn zeroing_moves_nothing_and_works_on_a_full_volume() {
    let devices = devices(2, 32 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let mut want = pattern(3, 3 * MIB as usize);
    write(&fs, &file, 0, &want[..1 << 20]);
    write(&fs, &file, MIB, &want[1 << 20..]);
    let _fillers = fill_with_data(&fs, ROOT_INO);
    fs.fallocate(&file, ZERO | KEEP, 5000, MIB).unwrap();
    want[5000..5000 + (1 << 20)].fill(0);
    assert!(read(&fs, &file, 0, want.len()) == want);
    assert_eq!(blocks(&fs, &file), 3 * MIB / PAGE);
    assert_eq!(fs.lseek(&file, 0, libc::SEEK_HOLE), Ok(8192));
    let data = (5000 + MIB) / PAGE * PAGE;
    assert_eq!(fs.lseek(&file, 8192, libc::SEEK_DATA), Ok(data));
    // Written again before a commit: not over what the durable state still has as data.
    for at in [2, 3, 100, 255] {
        write(&fs, &file, at * PAGE, &[9; 4096]);
        want[at as usize * 4096..][..4096].fill(9);
    }
    fs.sync().unwrap();
    for at in [4, 101] {
        write(&fs, &file, at * PAGE, &[8; 4096]);
        want[at as usize * 4096..][..4096].fill(8);
    }
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    let file = open(&fs, "f");
    assert!(read(&fs, &file, 0, want.len()) == want);
    assert_eq!(blocks(&fs, &file), 3 * MIB / PAGE);
    fs.unmount().unwrap();
}

#[test]
fn zeroing_extends_the_file_unless_told_not_to() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, &[1; 6000]);
    fs.fallocate(&file, ZERO | KEEP, 5000, 100_000).unwrap();
    assert_eq!((size(&fs, &file), blocks(&fs, &file)), (6000, 26));
    fs.fallocate(&file, ZERO, 5000, 100_000).unwrap();
    assert_eq!((size(&fs, &file), blocks(&fs, &file)), (105_000, 26));
    let mut want = vec![0; 105_000];
    want[..5000].fill(1);
    assert!(read(&fs, &file, 0, 200_000) == want);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn a_preallocation_without_room_is_refused_at_once_and_changes_nothing() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let bytes = pattern(5, 100_000);
    write(&fs, &file, 0, &bytes);
    let chunks = fs.volume().chunks().len();
    let began = std::time::Instant::now();
    for len in [1 << 30, 1 << 40, 1 << 60, i64::MAX as u64 - 4096] {
        for mode in [0, KEEP, ZERO] {
            let found = fs.fallocate(&file, mode, 4096, len);
            assert_eq!(found, Err(Errno::NOSPC), "{mode} {len}");
        }
    }
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    assert_eq!(
        fs.volume().chunks().len(),
        chunks,
        "no chunk was made for it"
    );
    assert_eq!(size(&fs, &file), 100_000);
    assert_eq!(blocks(&fs, &file), 25);
    assert!(read(&fs, &file, 0, 200_000) == bytes);
    // What fits, fits, and nothing else.
    let free = fs.statfs().bfree;
    assert_eq!(
        fs.fallocate(&file, 0, 25 * PAGE, (free + 1) * PAGE),
        Err(Errno::NOSPC)
    );
    fs.fallocate(&file, 0, 25 * PAGE, free * PAGE).unwrap();
    assert_eq!(fs.statfs().bfree, 0);
    assert_eq!(blocks(&fs, &file), 25 + free);
    fs.unmount().unwrap();
    let report = check(&devices);
    assert!(report.extents < 100, "{} extents", report.extents);
}

#[test]
fn fallocate_refuses_what_linux_refuses() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    for mode in [
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
        libc::FALLOC_FL_UNSHARE_RANGE,
        libc::FALLOC_FL_PUNCH_HOLE,
        PUNCH | ZERO,
        1 << 30,
    ] {
        assert_eq!(fs.fallocate(&file, mode, 0, 4096), Err(Errno::NOTSUP));
    }
    assert_eq!(fs.fallocate(&file, 0, 0, 0), Err(Errno::INVAL));
    let max = i64::MAX as u64;
    for mode in [0, KEEP, PUNCH, ZERO] {
        assert_eq!(fs.fallocate(&file, mode, max, 1), Err(Errno::FBIG));
        assert_eq!(fs.fallocate(&file, mode, 4096, max), Err(Errno::FBIG));
    }
    assert_eq!(fs.fallocate(&file, PUNCH, max - 9000, 9000), Ok(()));
    assert_eq!(fs.lseek(&file, 0, libc::SEEK_END), Err(Errno::INVAL));
    fs.unmount().unwrap();
}

#[test]
fn blocks_behind_the_end_stay_until_the_file_is_truncated() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, &[1; 5000]);
    fs.fallocate(&file, KEEP, MIB, MIB).unwrap();
    assert_eq!((size(&fs, &file), blocks(&fs, &file)), (5000, 2 + 256));
    set_size(&fs, &file, 5000 + 3 * MIB);
    assert_eq!(blocks(&fs, &file), 2 + 256, "growing keeps them");
    set_size(&fs, &file, 5000);
    assert_eq!(blocks(&fs, &file), 2);
    fs.fallocate(&file, KEEP, MIB, MIB).unwrap();
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    let file = open(&fs, "f");
    assert_eq!(blocks(&fs, &file), 2 + 256);
    set_size(&fs, &file, 5000);
    assert_eq!(blocks(&fs, &file), 2, "the same size again frees them");
    fs.fallocate(&file, KEEP, MIB, MIB).unwrap();
    fs.fallocate(&file, PUNCH, MIB + 1, 2 * MIB).unwrap();
    assert_eq!(blocks(&fs, &file), 3);
    fs.unmount().unwrap();
    check(&devices);
}

/// Blocks, and what each of the first pages is, as SEEK_DATA and SEEK_HOLE tell.
fn data_map(fs: &FileSystem, file: &OpenFile, pages: u64) -> Vec<bool> {
    let end = size(fs, file);
    let mut map = vec![false; pages as usize];
    let mut at = 0;
    while at < end {
        let from = match fs.lseek(file, at, libc::SEEK_DATA) {
            Ok(from) => from,
            Err(error) => {
                assert_eq!(error, Errno::NXIO);
                break;
            }
        };
        let to = fs.lseek(file, from, libc::SEEK_HOLE).unwrap();
        assert!(
            at <= from && from < to && to <= end,
            "{at} {from} {to} {end}"
        );
        for page in from / PAGE..to.div_ceil(PAGE) {
            map[page as usize] = true;
        }
        at = to;
    }
    map
}

#[test]
fn data_and_holes_are_exact_before_and_after_write_back() {
    const PAGES: u64 = 300;
    for seed in 1..=6 {
        let mut rng = Rng(seed);
        let devices = devices(2, 64 << 20);
        format(&devices);
        let fs = mount(&devices);
        let file = create(&fs, ROOT_INO, "f");
        set_size(&fs, &file, PAGES * PAGE);
        // What is data, and what has a block.
        let mut data = vec![false; PAGES as usize];
        let mut taken = vec![false; PAGES as usize];
        for step in 0..120 {
            let from = rng.below(PAGES);
            let count = 1 + rng.below((PAGES - from).min(40));
            let range = from as usize..(from + count) as usize;
            let (at, len) = (from * PAGE, count * PAGE);
            match rng.below(8) {
                0..3 => {
                    let bytes = rng.bytes(len as usize);
                    let direct = rng.below(4) == 0;
                    assert_eq!(try_write(&fs, &file, at, &bytes, direct), Ok(len as u32));
                    data[range.clone()].fill(true);
                    taken[range].fill(true);
                }
                3 => {
                    fs.fallocate(&file, PUNCH, at, len).unwrap();
                    data[range.clone()].fill(false);
                    taken[range].fill(false);
                }
                4 => {
                    fs.fallocate(&file, 0, at, len).unwrap();
                    taken[range].fill(true);
                }
                5 => {
                    fs.fallocate(&file, ZERO, at, len).unwrap();
                    data[range.clone()].fill(false);
                    taken[range].fill(true);
                }
                6 => {
                    // Reading fills the cache, and makes no data.
                    read(&fs, &file, at, len as usize);
                }
                _ if step % 3 == 0 => fs.sync().unwrap(),
                _ => {}
            }
            let found = data_map(&fs, &file, PAGES);
            assert!(found == data, "seed {seed} step {step}");
            let want = taken.iter().filter(|&&taken| taken).count() as u64;
            assert_eq!(blocks(&fs, &file), want, "seed {seed} step {step}");
        }
        fs.sync().unwrap();
        assert!(data_map(&fs, &file, PAGES) == data, "seed {seed}");
        let want = blocks(&fs, &file);
        assert_eq!(fs.stats().space.reserved_blocks, 0);
        fs.unmount().unwrap();
        assert_eq!(check(&devices).data_blocks, want);
        let fs = mount(&devices);
        let file = open(&fs, "f");
        assert!(data_map(&fs, &file, PAGES) == data, "seed {seed}");
        assert_eq!(blocks(&fs, &file), want);
        fs.unmount().unwrap();
    }
}

#[test]
fn the_largest_file_there_can_be() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let max = i64::MAX as u64;
    let began = std::time::Instant::now();
    assert_eq!(try_write(&fs, &file, max - 3, b"end", false), Ok(3));
    assert_eq!(size(&fs, &file), max);
    for (at, len) in [(max, 1), (max - 2, 3), (max - 4096, 1 << 16)] {
        for direct in [false, true] {
            let found = try_write(&fs, &file, at, &vec![1; len], direct);
            assert_eq!(found, Err(Errno::FBIG), "{at} {len}");
        }
    }
    assert_eq!(fs.lseek(&file, 0, libc::SEEK_DATA), Ok(max / PAGE * PAGE));
    assert_eq!(fs.lseek(&file, max - 1, libc::SEEK_HOLE), Ok(max));
    assert_eq!(fs.lseek(&file, max, libc::SEEK_HOLE), Err(Errno::NXIO));
    for direct in [false, true] {
        let found = try_read(&fs, &file, max - 5, 1 << 20, direct).unwrap();
        assert_eq!(found, b"\0\0end");
        let at = (max - (1 << 17)) / PAGE * PAGE;
        let found = try_read(&fs, &file, at, 1 << 20, direct).unwrap();
        assert_eq!(found.len() as u64, max - at);
        assert!(found.ends_with(b"\0end"));
        assert_eq!(try_read(&fs, &file, max, 10, direct), Ok(vec![]));
        assert_eq!(try_read(&fs, &file, u64::MAX, 10, direct), Ok(vec![]));
    }
    write(&fs, &file, 10, b"start");
    fs.sync().unwrap();
    set_size(&fs, &file, max - 1);
    assert_eq!(
        try_read(&fs, &file, max - 5, 100, false).unwrap(),
        b"\0\0en"
    );
    set_size(&fs, &file, max);
    assert_eq!(
        try_read(&fs, &file, max - 5, 9, false).unwrap(),
        b"\0\0en\0"
    );
    set_size(&fs, &file, 12);
    assert_eq!(read(&fs, &file, 10, 100), b"st");
    set_size(&fs, &file, max);
    let too_large = SetAttr {
        size: Some(max + 1),
        ..SetAttr::default()
    };
    assert_eq!(
        fs.setattr(file.ino(), &too_large, &CRED).map(drop),
        Err(Errno::FBIG)
    );
    fs.unlink(ROOT_INO, b"f").unwrap();
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    fs.unmount().unwrap();
    check(&devices);
}
