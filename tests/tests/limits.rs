//! How far things go: entries of a directory, links of a file, names, sizes, times, attributes.
//!
//! `DIRECTORY_ENTRIES` (default 200,000) is the size of the largest directory.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome, number_from_environment};
use braidfs_tests::pattern::{Random, seed};
use braidfs_tests::peer::{self, Peer};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{
    CACHE_MODES, GIB, MIB, Volume, drop_kernel_caches, in_both_modes, sparse_image,
};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Whence, lseek};
use rustix::fs::{RawDir, XattrFlags, getxattr, listxattr, setxattr};

/// Names that stay, in the directory that others change.
const STAYING: usize = 3000;
/// Hard links that one file may have.
const LINKS_MAX: u64 = 65_000;
/// Bytes of the largest value of an extended attribute, and of a name.
const XATTR_BYTES_MAX: usize = 64 << 10;
const NAME_BYTES_MAX: usize = 255;

fn main() -> ExitCode {
    if let Some(code) = peer::run(&[("churner", churner)]) {
        return code;
    }
    let entries = number_from_environment("DIRECTORY_ENTRIES", 200_000);
    runner::main(
        "limits",
        &[
            Test::new(
                "positions_hold_while_others_change_a_directory",
                60,
                positions,
            ),
            Test::new("directories_of_all_sizes", 120 + entries / 500, directories),
            Test::new("a_file_has_65000_names_and_no_more", 180, links),
            Test::new("names_are_any_255_bytes", 60, names),
            Test::new("files_end_at_2_to_the_63", 60, largest_file),
            Test::new("times_from_1901_to_2446", 60, times),
            Test::new("attributes_of_64_kib_of_all_kinds", 60, attributes),
            Test::new("images_on_a_full_file_system_lose_nothing", 240, host_full),
        ],
    )
}

/// Lists with getdents64 through a buffer of so many bytes, from where the descriptor is: `each`
/// gets a name and the position after it, and says whether to go on.
fn list(dir: impl AsFd, buffer_bytes: usize, mut each: impl FnMut(&str, u64) -> bool) {
    let mut buffer = vec![MaybeUninit::uninit(); buffer_bytes];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry.expect("getdents64");
        let name = entry.file_name().to_str().expect("an ASCII name");
        let more = name == "." || name == ".." || each(name, entry.next_entry_cookie());
        if !more {
            break;
        }
    }
}

/// A process that makes and removes entries of a directory until there is something to read.
fn churner(arguments: &[String]) {
    let (dir, mut random) = (Path::new(&arguments[0]), Random::new(7));
    let stop = std::thread::spawn(|| std::io::stdin().lines().next());
    let mut count = 0;
    while !stop.is_finished() {
        let path = dir.join(format!("passing-{}", random.below(2000)));
        if fs::remove_file(&path).is_err() {
            File::create(&path).expect("create an entry");
        }
        count += 1;
    }
    println!("{count}");
}

fn positions(env: &Env) -> Outcome {
    in_both_modes(env, |volume, _| {
        let path = volume.path("dir");
        fs::create_dir(&path).expect("a directory");
        for index in 0..STAYING {
            for kind in ["staying", "leaving"] {
                File::create(path.join(format!("{kind}-{index}"))).expect("create an entry");
            }
        }
        let mut churner = Peer::play("churner", [&path]);
        let dir = File::open(&path).expect("open a directory");
        let mut seen = BTreeSet::new();
        // Where a listing stood before each entry that stays, and which entry that was.
        let (mut before, mut places) = (0, Vec::new());
        list(&dir, 1024, |name, after| {
            if !name.starts_with("passing") {
                assert!(seen.insert(name.to_owned()), "{name} was listed twice");
            }
            if name.starts_with("staying") {
                places.push((before, name.to_owned()));
            }
            before = after;
            true
        });
        assert_eq!(seen.len(), 2 * STAYING, "entries were missing");
        for index in 0..STAYING {
            fs::remove_file(path.join(format!("leaving-{index}"))).expect("remove an entry");
        }
        let mut random = Random::new(seed());
        for _ in 0..1000 {
            let index = usize::try_from(random.below(STAYING as u64)).expect("small");
            let (position, expected) = &places[index];
            let position = i64::try_from(*position).expect("a position is an offset");
            lseek(&dir, position, Whence::SeekSet).expect("seekdir");
            let mut found = None;
            list(&dir, 1024, |name, _| {
                let stays = name.starts_with("staying");
                found = stays.then(|| name.to_owned());
                !stays
            });
            assert_eq!(found.as_ref(), Some(expected), "after a seek to {position}");
        }
        let changes = churner.ask("stop");
        println!("{changes} changes meanwhile");
        churner.finish();
    })
}

/// Does something with so many entries, and says how fast that was.
fn rate(what: &str, count: usize, work: impl FnOnce()) {
    let started = Instant::now();
    work();
    let secs = started.elapsed().as_secs_f64();
    println!(
        "{count:>9} entries: {what}: {secs:.1} s, {:.0}/s",
        count as f64 / secs
    );
}

fn directories(env: &Env) -> Outcome {
    let most = number_from_environment("DIRECTORY_ENTRIES", 200_000);
    let mut volume = Volume::format(env, "v", &[4 * GIB; 3], &[]);
    // The rates at smaller sizes, to compare.
    let smaller = [10_000, 100_000]
        .into_iter()
        .filter(|count| count * 5 <= most);
    for count in smaller.chain([most]) {
        let count = usize::try_from(count).expect("a number of entries");
        volume.mount(&[]);
        let path = volume.path("dir");
        fs::create_dir(&path).expect("a directory");
        directory_of(&path, count);
        fs::remove_dir(&path).expect("an empty directory");
        volume.umount();
    }
    volume.fsck_clean();
    Ok(())
}

fn directory_of(path: &Path, count: usize) {
    let entry = |index: usize| path.join(format!("entry-{index:07}"));
    let index_of = |name: &str| -> usize {
        name.strip_prefix("entry-")
            .and_then(|text| text.parse().ok())
            .expect("an entry's name")
    };
    rate("create", count, || {
        (0..count).for_each(|index| drop(File::create_new(entry(index)).expect("create")));
    });
    drop_kernel_caches();
    let mut listed = vec![0_u8; count];
    rate("list", count, || {
        let dir = File::open(path).expect("open");
        list(&dir, 32 << 10, |name, _| {
            listed[index_of(name)] += 1;
            true
        });
    });
    assert!(
        listed.iter().all(|times| *times == 1),
        "not each exactly once"
    );
    let mut random = Random::new(seed());
    let mut any = || usize::try_from(random.below(count as u64)).expect("small");
    let lookups = 20_000.min(count);
    drop_kernel_caches();
    rate("look up, at random", lookups, || {
        for _ in 0..lookups {
            let found = fs::metadata(entry(any())).expect("stat");
            assert!(found.is_file() && found.len() == 0);
        }
    });
    // Half of them go during a listing: some that were listed, and some that were not.
    let (mut removed, mut listed) = (vec![false; count], vec![0_u8; count]);
    rate("list, and remove half", count, || {
        let dir = File::open(path).expect("open");
        let (mut gone, mut steps) = (0, 0);
        list(&dir, 32 << 10, |name, _| {
            listed[index_of(name)] += 1;
            steps += 1;
            while gone < count / 2 && gone < steps {
                let index = any();
                if !std::mem::replace(&mut removed[index], true) {
                    fs::remove_file(entry(index)).expect("remove");
                    gone += 1;
                }
            }
            true
        });
    });
    for (index, times) in listed.iter().enumerate() {
        let right = if removed[index] {
            *times <= 1
        } else {
            *times == 1
        };
        assert!(
            right,
            "entry {index}: listed {times} times, removed: {}",
            removed[index]
        );
    }
    let left = removed.iter().filter(|gone| !**gone).count();
    rate("remove the rest", left, || {
        Cmd::sh("find \"$1\" -type f -delete", [path])
            .limit_secs(1200)
            .quiet()
            .ok();
    });
}

fn links(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[256 * MIB; 3], &[]);
    volume.mount(&[]);
    let (first, others) = (volume.path("file"), volume.path("others"));
    fs::write(&first, "many names").expect("write");
    fs::create_dir(&others).expect("a directory");
    let name = |index: u64| others.join(format!("name-{index}"));
    let file = File::open(&first).expect("open");
    let expect = |links: u64| assert_eq!(file.metadata().expect("stat").nlink(), links);
    for index in 1..LINKS_MAX {
        fs::hard_link(&first, name(index)).expect("link");
        if index % 1000 == 0 || index > LINKS_MAX - 5 {
            expect(index + 1);
        }
    }
    let error = fs::hard_link(&first, name(LINKS_MAX)).expect_err("one more");
    assert_eq!(error.raw_os_error(), Some(libc::EMLINK), "{error}");
    expect(LINKS_MAX);
    volume_with_links(&mut volume, file);
    let file = File::open(&first).expect("open");
    let expect = |links: u64| assert_eq!(file.metadata().expect("stat").nlink(), links);
    fs::remove_file(name(77)).expect("unlink");
    fs::hard_link(name(1), name(77)).expect("there is room for one again");
    fs::remove_file(&first).expect("unlink");
    for index in 1..LINKS_MAX {
        fs::remove_file(name(index)).expect("unlink");
        if index % 1000 == 0 || index > LINKS_MAX - 5 {
            expect(LINKS_MAX - 1 - index);
        }
    }
    let mut text = [0; 10];
    file.read_exact_at(&mut text, 0)
        .expect("read a file without a name");
    assert_eq!(&text, b"many names");
    drop(file);
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

/// A remount of a volume whose file has all links it can have.
fn volume_with_links(volume: &mut Volume, open: File) {
    drop(open);
    volume.umount();
    volume.fsck_clean();
    volume.mount(&[]);
    let links = fs::metadata(volume.path("file")).expect("stat").nlink();
    assert_eq!(links, LINKS_MAX, "after a remount");
}

fn names(env: &Env) -> Outcome {
    in_both_modes(env, |volume, mode| {
        let path = volume.path("dir");
        fs::create_dir(&path).expect("a directory");
        let mut random = Random::new(seed());
        let allowed: Vec<u8> = (1..=255).filter(|byte| *byte != b'/').collect();
        let mut expected: BTreeSet<OsString> = BTreeSet::new();
        for byte in &allowed {
            expected.insert(OsString::from_vec(vec![*byte; NAME_BYTES_MAX]));
            if *byte != b'.' {
                expected.insert(OsString::from_vec(vec![*byte]));
            }
        }
        for _ in 0..200 {
            let bytes = random.bytes(NAME_BYTES_MAX).into_iter();
            let bytes = bytes.map(|byte| allowed[usize::from(byte) % allowed.len()]);
            expected.insert(OsString::from_vec(bytes.collect()));
        }
        for name in &expected {
            fs::write(path.join(name), name.as_bytes()).expect("write");
        }
        let check = || {
            let entries = fs::read_dir(&path).expect("list");
            let found: BTreeSet<_> = entries
                .map(|entry| entry.expect("an entry").file_name())
                .collect();
            assert!(found == expected, "other names than were made");
            for name in &expected {
                assert_eq!(fs::read(path.join(name)).expect("read"), name.as_bytes());
            }
        };
        check();
        let long = OsString::from_vec(vec![b'n'; NAME_BYTES_MAX + 1]);
        let long = path.join(long);
        let refused = [
            File::create(&long).map(drop),
            fs::create_dir(&long),
            symlink("x", &long),
            fs::rename(path.join("n"), &long),
            fs::hard_link(path.join("n"), &long),
            fs::metadata(&long).map(drop),
        ];
        for result in refused {
            let error = result.expect_err("a name of 256 bytes");
            assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG), "{error}");
        }
        volume.remount(&[mode]);
        check();
        fs::remove_dir_all(&path).expect("remove them");
    })
}

fn largest_file(env: &Env) -> Outcome {
    in_both_modes(env, |volume, mode| {
        let (path, most) = (volume.path("file"), i64::MAX.unsigned_abs());
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true);
        let file = options.open(&path).expect("create");
        file.write_all_at(b"start", 0).expect("write");
        file.write_all_at(b"end", most - 3)
            .expect("write at the end");
        let error = file
            .write_at(b"x", most)
            .expect_err("a write behind the end");
        // The kernel's own word, for offsets that it cannot count.
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}");
        drop(file);
        for _ in 0..2 {
            let file = options.open(&path).expect("open");
            let metadata = file.metadata().expect("stat");
            assert_eq!(metadata.len(), most);
            assert!(
                metadata.blocks() <= 16,
                "{} blocks for 8 bytes",
                metadata.blocks()
            );
            let read = |at: u64| {
                let mut bytes = [1; 5];
                file.read_exact_at(&mut bytes, at).expect("read");
                bytes
            };
            assert_eq!(&read(most - 5), b"\0\0end");
            assert_eq!(&read(0), b"start");
            assert_eq!(read(1 << 62), [0; 5]);
            drop(file);
            volume.remount(&[mode]);
        }
    })
}

fn times(env: &Env) -> Outcome {
    in_both_modes(env, |volume, mode| {
        let (first, last) = (-2_147_483_648, 15_032_385_535);
        let times = [
            (first, 1),
            (-1, 999_999_999),
            (0, 0),
            (0, 1),
            (2_147_483_647, 999_999_999),
            (2_147_483_648, 0),
            (4_294_967_296, 5),
            (last, 999_999_999),
        ];
        let mut expected = Vec::new();
        for (index, (secs, nanos)) in times.into_iter().enumerate() {
            for kind in ["file", "dir", "link"] {
                let path = volume.path(&format!("{kind}-{index}"));
                match kind {
                    "file" => fs::write(&path, "x"),
                    "dir" => fs::create_dir(&path),
                    _ => symlink("nowhere", &path),
                }
                .expect("make one");
                expected.push((path, secs, nanos));
            }
        }
        for (path, secs, nanos) in &expected {
            let (atime, mtime) = (
                TimeSpec::new(secs - 1, *nanos),
                TimeSpec::new(*secs, *nanos),
            );
            let flag = UtimensatFlags::NoFollowSymlink;
            utimensat(nix::fcntl::AT_FDCWD, path, &atime, &mtime, flag).expect("utimensat");
        }
        for _ in 0..2 {
            for (path, secs, nanos) in &expected {
                let found = fs::symlink_metadata(path).expect("stat");
                let found = (
                    found.atime(),
                    found.atime_nsec(),
                    found.mtime(),
                    found.mtime_nsec(),
                );
                let (secs, nanos) = (*secs, *nanos);
                assert_eq!(found, (secs - 1, nanos, secs, nanos), "{}", path.display());
            }
            volume.remount(&[mode]);
        }
    })
}

fn attributes(env: &Env) -> Outcome {
    env.need_tools(&["setfacl", "getfacl"])?;
    in_both_modes(env, |volume, mode| {
        let mut random = Random::new(seed());
        let names = ["user.large", "trusted.large", "security.large"];
        let paths = [volume.path("file"), volume.path("dir")];
        File::create(&paths[0]).expect("create");
        fs::create_dir(&paths[1]).expect("create");
        let mut expected = Vec::new();
        for path in &paths {
            for name in names {
                let value = random.bytes(XATTR_BYTES_MAX);
                setxattr(path, name, &value, XattrFlags::CREATE).expect("set an attribute");
                expected.push((path, name, value));
            }
            for (len, name) in [(0, "user.empty"), (1, "user.one"), (4096, "user.page")] {
                let value = random.bytes(len);
                setxattr(path, name, &value, XattrFlags::empty()).expect("set an attribute");
                expected.push((path, name, value));
            }
            let too_large = vec![1; XATTR_BYTES_MAX + 1];
            let error = setxattr(path, "user.x", &too_large, XattrFlags::empty());
            assert_eq!(error, Err(rustix::io::Errno::TOOBIG));
            let error = setxattr(path, names[0], b"", XattrFlags::CREATE);
            assert_eq!(error, Err(rustix::io::Errno::EXIST));
        }
        let users: String = (1..=500)
            .map(|user| format!("u:{}:r-x\n", 10_000 + user))
            .collect();
        fs::write(volume.path("acl"), users).expect("write");
        let script = "setfacl -M acl file; setfacl -d -M acl dir; setfacl -M acl dir";
        Cmd::sh(script, [""; 0]).cwd(&volume.mountpoint).ok();
        for _ in 0..2 {
            for (path, name, value) in &expected {
                let mut found = vec![0; XATTR_BYTES_MAX];
                let len = getxattr(*path, *name, &mut found).expect("get an attribute");
                assert!(
                    found[..len] == value[..],
                    "{name} of {} changed",
                    path.display()
                );
            }
            for (path, lists) in [(&paths[0], 1), (&paths[1], 2)] {
                let mut buffer = vec![0_u8; 4096];
                let len = listxattr(path, &mut buffer).expect("list attributes");
                let listed = buffer[..len]
                    .split(|byte| *byte == 0)
                    .filter(|name| !name.is_empty());
                assert_eq!(listed.count(), 6 + lists, "{}", path.display());
                let acl = Cmd::new("getfacl")
                    .arg("-cpn")
                    .arg(path)
                    .quiet()
                    .ok()
                    .stdout;
                let users = acl.lines().filter(|line| line.contains("user:10"));
                assert_eq!(users.count(), 500 * lists, "{}", path.display());
            }
            volume.remount(&[mode]);
        }
    })
}

/// What a write may say when the devices themselves run out of space.
fn is_no_space(error: &std::io::Error) -> bool {
    let known = [libc::ENOSPC, libc::EIO, libc::EROFS];
    error
        .raw_os_error()
        .is_some_and(|code| known.contains(&code))
}

/// Writes a file and makes it durable.
fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Writes durable files until one fails; returns their bytes. The last one is the one that failed.
fn write_until_full(volume: &Volume<'_>, random: &mut Random) -> Vec<Vec<u8>> {
    let mut files = Vec::new();
    loop {
        let bytes = random.bytes(MIB as usize);
        let written = write_durably(&volume.path(&format!("f{}", files.len())), &bytes);
        files.push(bytes);
        if let Err(error) = written {
            println!("file {}: {error}", files.len());
            assert!(is_no_space(&error), "{error}");
            return files;
        }
        assert!(files.len() < 200, "more than the host has room for");
    }
}

/// All of these files must be there, whole.
fn expect_files(volume: &Volume<'_>, files: &[Vec<u8>]) {
    for (nth, bytes) in files.iter().enumerate() {
        let found = fs::read(volume.path(&format!("f{nth}"))).expect("what fsync promised");
        assert!(found == *bytes, "file {nth} is another");
    }
}

/// Sparse images promise more than their file system has. What was durable stays so, and once there
/// is room again, everything works.
fn host_full(env: &Env) -> Outcome {
    let mut random = Random::new(seed());
    for mode in CACHE_MODES {
        let host = env.mkdir(&format!("{mode}.host"));
        let size = ["-t", "tmpfs", "-o", "size=96m", "host"];
        Cmd::new("mount").args(size).arg(&host).ok();
        let images = ["a", "b"].map(|name| host.join(name));
        images
            .iter()
            .for_each(|image| sparse_image(image, 256 * MIB));
        let ballast = host.join("ballast");
        fs::write(&ballast, vec![1; 32 * MIB as usize]).expect("write the ballast");
        let mut volume = Volume::on(env, mode, images.to_vec());
        env.braidfs().arg("mkfs").args(&volume.devices).ok();
        volume.mount(&[mode]);
        let mut files = write_until_full(&volume, &mut random);
        files.pop();
        println!(
            "{mode}: {} files, {}",
            files.len(),
            volume.stats()["read_only"]
        );
        assert!(files.len() > 20, "{}", files.len());
        expect_files(&volume, &files);
        // Deletion needs room, too: more than there is, maybe.
        if let Err(error) = fs::remove_file(volume.path("f0")) {
            assert!(is_no_space(&error), "{error}");
        } else if File::open(&volume.mountpoint)
            .and_then(|root| root.sync_all())
            .is_ok()
        {
            println!("{mode}: a file could be deleted");
        }
        let daemon = volume.daemon();
        let umount = env.braidfs().arg("umount").arg(&volume.mountpoint);
        let told = umount.limit_secs(120).run();
        assert!(!volume.is_mount_point(), "{}", told.describe());
        assert!(
            daemon.wait_gone(Duration::from_secs(20)),
            "it is still there"
        );

        fs::remove_file(&ballast).expect("make room");
        volume.fsck_clean();
        volume.mount(&[mode]);
        let deleted = !volume.path("f0").exists();
        if deleted {
            fs::write(volume.path("f0"), &files[0]).expect("write it again");
        }
        expect_files(&volume, &files);
        write_durably(&volume.path("new"), &files[0]).expect("there is room again");
        for nth in 0..files.len() {
            fs::remove_file(volume.path(&format!("f{nth}"))).expect("delete");
        }
        write_durably(&volume.path("newer"), &files[0]).expect("there is more room");
        volume.remount(&[mode]);
        assert!(fs::read(volume.path("newer")).expect("read") == files[0]);
        volume.umount();
        volume.fsck_clean();
        Cmd::new("umount").arg(&host).ok();
    }
    Ok(())
}
