//! Volumes that are full: of data, of names, of both.

mod common;

use std::time::{Duration, Instant};

use braidfs::{AtimeMode, Errno, FileSystem, Ino, MountOptions, ROOT_INO, SetAttr};
use common::dump::entries;
use common::watchdog::Watchdog;
use common::*;

/// Creates and writes files of a few KiB until nothing goes any more; returns how many. Nothing
/// but ENOSPC may come.
fn fill(fs: &FileSystem, dir: u64, salt: usize) -> usize {
    let bytes = vec![7; 12 << 10];
    let (mut refused, mut count) = (0, 0);
    while refused < 20 {
        let name = format!("{:x}-{salt}", count * 7919 % 100_003);
        count += 1;
        let flags = libc::O_RDWR | libc::O_CREAT;
        let made = fs.create(dir, name.as_bytes(), 0o644, flags, &CRED);
        let file = match made {
            Ok((_, file)) => file,
            Err(error) => {
                assert_eq!(error, Errno::NOSPC, "create {count}");
                refused += 1;
                continue;
            }
        };
        match try_write(fs, &file, 0, &bytes[..count % bytes.len()], false) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, Errno::NOSPC, "write {count}");
                refused += 1;
            }
        }
        fs.release(&file);
        fs.forget(file.ino(), 1);
    }
    count
}

fn names_of(fs: &FileSystem, dir: u64) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    fs.readdir(dir, 0, &mut |entry| {
        names.push(entry.name.to_vec());
        true
    })
    .unwrap();
    names.split_off(2)
}

#[test]
fn a_volume_full_of_small_files_is_full_and_nothing_worse() {
    let devices = devices(3, 40 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    for round in 0..2 {
        let made = fill(&fs, dir, round);
        assert!(made > 2000, "{made}");
        fs.sync().unwrap();
        // Every third first, so that deletion itself has to touch all of the tables.
        for step in [3, 1] {
            for name in names_of(&fs, dir).iter().step_by(step) {
                fs.unlink(dir, name).unwrap();
            }
            fs.sync().unwrap();
        }
        assert!(!fs.stats().read_only);
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Where metadata has little room each change counts what is not durable yet, late access times
/// too, while commits take those over.
#[test]
fn readers_writers_and_commits_do_not_block_each_other_where_room_is_short() {
    let _dog = Watchdog::start(Duration::from_secs(60), "a busy full volume".to_owned());
    let devices = devices(2, 40 << 20);
    format(&devices);
    let options = MountOptions {
        atime: AtimeMode::Strictatime,
        ..options()
    };
    let fs = mount_with(&devices, options);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    let until = Instant::now() + Duration::from_secs(2);
    std::thread::scope(|scope| {
        for me in 0..4 {
            let fs = &fs;
            scope.spawn(move || {
                let name = format!("{me}");
                let file = create(fs, dir, &name);
                while Instant::now() < until {
                    try_write(fs, &file, 0, b"some bytes", false).unwrap();
                    try_read(fs, &file, 0, 10, false).unwrap();
                    fs.readdir(dir, 0, &mut |_| true).unwrap();
                }
                fs.release(&file);
            });
        }
        scope.spawn(|| {
            while Instant::now() < until {
                fs.sync().unwrap();
            }
        });
    });
    fs.unmount().unwrap();
    check(&devices);
}

/// As soon as the last user lets go, whoever asks sees the space, though deletion is another
/// thread's work.
#[test]
fn the_space_of_a_deleted_file_is_free_at_once() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let before = fs.statfs().bfree;
    for written_back in [true, false] {
        let file = create(&fs, ROOT_INO, "f");
        write(&fs, &file, 0, &pattern(1, 12 << 20));
        if written_back {
            fs.fsync(&file, false).unwrap();
        }
        let full = fs.statfs().bfree;
        assert!(full + 3000 < before, "{full} of {before}");
        fs.release(&file);
        fs.unlink(ROOT_INO, b"f").unwrap();
        fs.forget(file.ino(), 1);
        let after = fs.statfs().bfree;
        assert!(after + 32 >= before, "{after} of {before}");
        for _ in 0..200 {
            let now = fs.statfs().bfree;
            assert!(
                (before - 32..=before + 32).contains(&now),
                "{now} of {before}"
            );
            std::thread::yield_now();
        }
        fs.sync().unwrap();
    }
    fs.unmount().unwrap();
    check(&devices);
}

type Change = fn(&FileSystem, Ino) -> Result<(), Errno>;

/// Changes of many inodes, one after another, without any that needs room.
#[test]
fn changes_of_every_inode_do_not_need_more_than_metadata_has() {
    let devices = devices(1, 24 << 20);
    format(&devices);
    let fs = mount_with(
        &devices,
        MountOptions {
            cache_bytes: 64 << 20,
            ..options()
        },
    );
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    fill_with_names(&fs, dir, 0, 1);
    fs.setxattr(dir, b"user.filler", b"", 0, false).unwrap_err();
    fs.sync().unwrap();
    let all = entries(&fs, dir, 1000);
    let changes: [(&str, Change); 5] = [
        ("chmod", |fs, ino| {
            let mode = Some(0o600);
            let set = SetAttr {
                mode,
                ..SetAttr::default()
            };
            fs.setattr(ino, &set, &CRED).map(drop)
        }),
        ("chattr", |fs, ino| {
            fs.set_flags(ino, braidfs::FLAG_NODUMP, &ROOT)
        }),
        ("truncate up", |fs, ino| {
            let size = Some(1 << 20);
            let set = SetAttr {
                size,
                ..SetAttr::default()
            };
            fs.setattr(ino, &set, &CRED).map(drop)
        }),
        ("read", |fs, ino| {
            let file = fs.open(ino, libc::O_RDONLY)?;
            try_read(fs, &file, 0, 4096, false)?;
            fs.release(&file);
            Ok(())
        }),
        ("remove an attribute", |fs, ino| {
            fs.removexattr(ino, b"user.filler")
        }),
    ];
    for (name, change) in changes {
        let mut refused = 0;
        for &ino in all.values() {
            fs.lookup_ino(ino).unwrap();
            match change(&fs, ino) {
                Ok(()) | Err(Errno::NODATA) => {}
                Err(error) => {
                    assert_eq!(error, Errno::NOSPC, "{name}");
                    refused += 1;
                }
            }
            fs.forget(ino, 1);
        }
        println!("{name}: {refused} of {} refused", all.len());
        fs.sync()
            .unwrap_or_else(|error| panic!("{error:?} after {name}"));
        assert_eq!(refused, 0, "{name}");
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Whoever deletes need not wait for anything before what was deleted can be made again.
#[test]
fn the_room_of_deleted_names_is_there_at_once() {
    let devices = devices(2, 16 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o755, &CRED).unwrap().ino;
    fill_with_names(&fs, dir, 0, 3000);
    for round in 0..3 {
        let all = entries(&fs, dir, 1000);
        for name in all.keys().take(all.len() / 2) {
            fs.unlink(dir, name).unwrap();
        }
        if round == 1 {
            fs.sync().unwrap();
        }
        for nth in 0..all.len() / 3 {
            let file = create(&fs, dir, &format!("again-{round}-{nth}"));
            let set = fs.setxattr(file.ino(), b"user.filler", &[7; 3000], 0, false);
            assert_eq!(set, Ok(()), "{nth} of {} in round {round}", all.len());
            fs.release(&file);
            fs.forget(file.ino(), 1);
        }
        fill_with_names(&fs, dir, round + 1, 3000);
    }
    fs.unmount().unwrap();
    check(&devices);
}

/// Deleting what has very many attributes takes as many steps as it needs.
#[test]
fn a_file_that_fills_metadata_alone_can_be_deleted() {
    let devices = devices(2, 16 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let (mut refused, mut count) = (0, 0);
    while refused < 3 {
        let name = format!("user.{:x}", count * 7919 % 1_000_003);
        count += 1;
        match fs.setxattr(file.ino(), name.as_bytes(), &[7; 200], 0, false) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, Errno::NOSPC);
                refused += 1;
                fs.sync().unwrap();
            }
        }
    }
    println!("{count} attributes");
    fs.unlink(ROOT_INO, b"f").unwrap();
    fs.release(&file);
    fs.forget(file.ino(), 1);
    drop(file);
    // Waits for the deletion.
    fill_with_names(&fs, ROOT_INO, 0, 3000);
    fs.sync().unwrap();
    assert!(names_of(&fs, ROOT_INO).len() > 500);
    fs.unmount().unwrap();
    check(&devices);
}
