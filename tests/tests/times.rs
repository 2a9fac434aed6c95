//! Which call changes which time, and that access times cost nothing.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::report::number;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{CACHE_MODES, MIB, Volume};
use nix::fcntl::{AT_FDCWD, PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

/// Longer than the kernel's clock takes for a tick.
const TICK: Duration = Duration::from_millis(20);
/// A time in the past, in seconds: what access times are set to before something is read.
const LONG_AGO: i64 = 1_000_000_000;

fn main() -> ExitCode {
    runner::main(
        "times",
        &[
            Test::new("each_call_changes_the_times_it_should", 120, changes),
            Test::new("access_times_are_as_the_options_say", 60, access),
            Test::new("access_times_cause_no_commit_and_are_kept", 90, lazy),
        ],
    )
}

/// What changes the times of what. In each case there is a folder `a` with a file `f`, and a
/// folder `b` in which `other` is the same file, and `g` another one. The columns: the file, `a`,
/// `b`; `mc` is a change of both mtime and ctime, `c` of ctime alone, `-` of neither.
const CHANGES: &[(&str, [&str; 3])] = &[
    ("cat a/f", ["-", "-", "-"]),
    ("ls a", ["-", "-", "-"]),
    ("printf more >>a/f", ["mc", "-", "-"]),
    (
        "printf TEXT | dd of=a/f conv=notrunc status=none",
        ["mc", "-", "-"],
    ),
    ("printf new >a/f", ["mc", "-", "-"]),
    ("xfs_io -d -c 'pwrite -q 0 4k' a/f", ["mc", "-", "-"]),
    ("truncate -s 4 a/f", ["mc", "-", "-"]),
    ("truncate -s 2 a/f", ["mc", "-", "-"]),
    ("truncate -s 9999 a/f", ["mc", "-", "-"]),
    ("xfs_io -c 'falloc 0 64k' a/f", ["mc", "-", "-"]),
    ("xfs_io -c 'falloc -k 0 64k' a/f", ["mc", "-", "-"]),
    ("xfs_io -c 'fpunch 0 4k' a/f", ["mc", "-", "-"]),
    ("xfs_io -c 'fzero 0 4k' a/f", ["mc", "-", "-"]),
    (
        "xfs_io -c 'mmap 0 4' -c 'mwrite -S 66 0 4' -c 'msync -s 0 4' a/f",
        ["mc", "-", "-"],
    ),
    ("xfs_io -c 'copy_range b/g' a/f", ["mc", "-", "-"]),
    ("chmod 600 a/f", ["c", "-", "-"]),
    ("chown 7:7 a/f", ["c", "-", "-"]),
    ("touch -a a/f", ["c", "-", "-"]),
    ("touch a/f", ["mc", "-", "-"]),
    ("setfattr -n user.a -v 1 a/f", ["c", "-", "-"]),
    ("setfacl -m u:7:r a/f", ["c", "-", "-"]),
    ("chattr +A a/f", ["c", "-", "-"]),
    ("ln a/f a/more", ["c", "mc", "-"]),
    ("rm a/f", ["c", "mc", "-"]),
    ("mv a/f a/h", ["c", "mc", "-"]),
    ("mv a/f b/h", ["c", "mc", "mc"]),
    ("mv -T b/g a/f", ["c", "mc", "mc"]),
    ("touch a/new", ["-", "mc", "-"]),
    ("mkdir a/new", ["-", "mc", "-"]),
    ("mkfifo a/new", ["-", "mc", "-"]),
    ("ln -s x a/new", ["-", "mc", "-"]),
    ("mkdir a/new; mv a/new b", ["-", "mc", "mc"]),
    ("mv a b/inside; mv b/inside a", ["-", "c", "mc"]),
    ("chmod 700 a", ["-", "c", "-"]),
    ("setfattr -n user.a -v 1 a", ["-", "c", "-"]),
    ("xfs_io -T -c 'pwrite -q 0 9' a", ["-", "-", "-"]),
];

/// Not so with `writeback_cache`: there the kernel keeps the change time of files itself, and does
/// not expect an ioctl to change it; it shows once the kernel has forgotten the inode.
const SHOWN_LATE_BY_THE_KERNEL: &str = "chattr +A a/f";

/// mtime and ctime of the file, of `a` and of `b`.
fn times_in(dir: &Path) -> [[(i64, i64); 2]; 3] {
    ["b/other", "a", "b"].map(|name| {
        let metadata = fs::metadata(dir.join(name)).expect("stat");
        let (mtime, ctime) = (metadata.mtime(), metadata.ctime());
        [
            (mtime, metadata.mtime_nsec()),
            (ctime, metadata.ctime_nsec()),
        ]
    })
}

fn changes(env: &Env) -> Outcome {
    env.need_tools(&["xfs_io", "setfattr", "setfacl", "chattr"])?;
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[256 * MIB; 3], &[]);
        volume.mount(&[mode]);
        let (mut wrong, mut seen) = (Vec::new(), Vec::new());
        let kept_by_kernel = mode == "writeback_cache";
        for (index, (script, expected)) in CHANGES.iter().enumerate() {
            if kept_by_kernel && *script == SHOWN_LATE_BY_THE_KERNEL {
                continue;
            }
            let dir = volume.path(&format!("case-{index}"));
            fs::create_dir(&dir).expect("a folder");
            let run = |script: &str| Cmd::sh(script, [""; 0]).cwd(&dir).quiet().ok();
            run("mkdir a b; printf text >a/f; ln a/f b/other; printf other >b/g");
            let before = times_in(&dir);
            std::thread::sleep(TICK);
            run(script);
            let after = times_in(&dir);
            let changed = |index: usize| {
                let [mtime, ctime] = [0, 1].map(|time| before[index][time] != after[index][time]);
                ["-", "c", "m", "mc"][usize::from(mtime) * 2 + usize::from(ctime)]
            };
            let found = [0, 1, 2].map(changed);
            if found != *expected {
                wrong.push(format!("`{script}`: {found:?}, not {expected:?}"));
            }
            seen.push((dir, script, after));
        }
        assert!(wrong.is_empty(), "{mode}:\n{}", wrong.join("\n"));
        volume.remount(&[mode]);
        for (dir, script, after) in seen {
            assert_eq!(
                times_in(&dir),
                after,
                "{mode}: `{script}`: other times after a remount"
            );
        }
        volume.umount();
        volume.fsck_clean();
    }
    Ok(())
}

/// Reads a file or lists a directory, past what the kernel has cached of it; whether its access
/// time was another one afterwards.
fn read_changes_atime(path: &Path) -> bool {
    let before = fs::metadata(path).expect("stat");
    std::thread::sleep(TICK);
    if before.is_dir() {
        assert!(fs::read_dir(path).expect("list").count() > 0);
    } else {
        let mut file = File::open(path).expect("open");
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
        assert!(file.read_to_end(&mut Vec::new()).expect("read") > 0);
    }
    let after = fs::metadata(path).expect("stat");
    (before.atime(), before.atime_nsec()) != (after.atime(), after.atime_nsec())
}

fn set_atime(path: &Path, secs: i64) {
    let (atime, keep) = (TimeSpec::new(secs, 0), TimeSpec::UTIME_OMIT);
    utimensat(AT_FDCWD, path, &atime, &keep, UtimensatFlags::FollowSymlink).expect("utimensat");
}

fn access(env: &Env) -> Outcome {
    // The first read of an access time long ago, and the second read: of a file, of a directory.
    let cases = [
        ("relatime", [true, false], [true, false]),
        ("strictatime", [true, true], [true, true]),
        ("noatime", [false, false], [false, false]),
        ("nodiratime", [true, false], [false, false]),
    ];
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[128 * MIB; 2], &[]);
        for (option, of_file, of_dir) in cases {
            volume.mount(&[mode, option]);
            let dir = volume.path(option);
            let file = dir.join("file");
            fs::create_dir(&dir).expect("a folder");
            fs::write(&file, "text").expect("a file");
            for (path, expected) in [(&file, of_file), (&dir, of_dir)] {
                set_atime(path, LONG_AGO);
                let found = [(); 2].map(|()| read_changes_atime(path));
                assert_eq!(found, expected, "{mode},{option}: {}", path.display());
            }
            volume.umount();
        }
        volume.fsck_clean();
    }
    Ok(())
}

fn lazy(env: &Env) -> Outcome {
    const FILES: usize = 50;
    for mode in CACHE_MODES {
        let options = [mode, "strictatime", "commit=1"];
        let mut volume = Volume::format(env, mode, &[128 * MIB; 2], &[]);
        volume.mount(&options);
        let paths: Vec<_> = (0..FILES)
            .map(|n| volume.path(&format!("file-{n}")))
            .collect();
        for path in &paths {
            fs::write(path, "text").expect("a file");
            set_atime(path, LONG_AGO);
        }
        volume.remount(&options);
        let commits = |volume: &Volume| number(&volume.stats(), "/txg/commits");
        let before = commits(&volume);
        for _ in 0..8 {
            for path in &paths {
                assert!(atime_after_reading(path) > LONG_AGO);
            }
            std::thread::sleep(Duration::from_millis(400));
        }
        assert_eq!(
            commits(&volume),
            before,
            "{mode}: commits while nothing but reading went on"
        );
        let atimes = || -> Vec<_> {
            let stat = |path| fs::metadata(path).expect("stat");
            paths
                .iter()
                .map(stat)
                .map(|found| (found.atime(), found.atime_nsec()))
                .collect()
        };
        let read = atimes();
        volume.remount(&options);
        assert_eq!(
            atimes(),
            read,
            "{mode}: access times lost by a clean umount"
        );
        volume.umount();
        volume.fsck_clean();
    }
    Ok(())
}

/// Reads a file; its access time then.
fn atime_after_reading(path: &Path) -> i64 {
    assert_eq!(fs::read(path).expect("read"), b"text");
    fs::metadata(path).expect("stat").atime()
}
