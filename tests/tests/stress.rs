//! Many processes at once, and trees of the size of an operating system's source.
//!
//! `STRESS_SECONDS` (default 1) is for how long each stressor of stress-ng runs, and a multiple of
//! it how long dbench and the renames do. `STRESS_FILES` is the size of the tree in both modes
//! (default: 80,000 files with `direct_io`, 8,000 with `writeback_cache`).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome, Skip, number_from_environment};
use braidfs_tests::pattern::{Random, seed};
use braidfs_tests::peer::{self, Peer};
use braidfs_tests::report::Chunk;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::source_tree::SourceTree;
use braidfs_tests::volume::{CACHE_MODES, GIB, MIB, Volume};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// stress-ng's stressors of the class `filesystem` that are about the file system under them.
const STRESSORS: &[&str] = &[
    "access",
    "chattr",
    "chdir",
    "chmod",
    "chown",
    "copy-file",
    "dentry",
    "dir",
    "dirdeep",
    "dirmany",
    "dnotify",
    "dup",
    "fallocate",
    "fanotify",
    "fcntl",
    "file-ioctl",
    "filename",
    "flock",
    "fpunch",
    "fsize",
    "fstat",
    "getdent",
    "handle",
    "hdd",
    "inode-flags",
    "inotify",
    "io",
    "iomix",
    "lease",
    "link",
    "locka",
    "lockf",
    "lockofd",
    "mknod",
    "open",
    "rename",
    "symlink",
    "sync-file",
    "touch",
    "utime",
    "xattr",
];
/// The others of the class, and why they are not run.
const NOT_RUN: &[(&str, &str)] = &[
    ("bind-mount", "binds folders of the root file system"),
    ("binderfs", "mounts a file system of its own"),
    ("eventfd", "about descriptors without a file"),
    ("fiemap", "the kernel does not pass FIEMAP on to FUSE"),
    ("ioprio", "about the block layer's priorities"),
    ("procfs", "about /proc"),
    ("verity", "the kernel has no fs-verity for FUSE"),
];
/// Not run with `writeback_cache`: they kill processes in copy_file_range, and there the kernel
/// then marks the file, and the file system, as if a write had failed with EINTR.
const NOT_RUN_WITH_KERNEL_CACHE: &[&str] = &["io", "iomix"];
/// At least so many have to have run.
const STRESSORS_MIN: usize = 25;
/// How many stressors run side by side, with two workers each.
const LANES: usize = 2;
/// Keeps the stressors that fill files from filling the volume.
const FILE_SIZES: &[&str] = &[
    "--copy-file-bytes",
    "128m",
    "--fallocate-bytes",
    "64m",
    "--hdd-bytes",
    "64m",
    "--iomix-bytes",
    "64m",
    "--sync-file-bytes",
    "64m",
];

/// Where Debian's dbench keeps what its clients do.
const DBENCH_LOAD: &str = "/usr/share/dbench/client.txt";

/// Processes that rename.
const MOVERS: usize = 8;
const MOVED_FILES: usize = 400;
const MOVED_DIRS: usize = 40;

fn main() -> ExitCode {
    if let Some(code) = peer::run(&[("mover", mover)]) {
        return code;
    }
    let longer = number_from_environment("STRESS_SECONDS", 1) * 60;
    runner::main(
        "stress",
        &[
            Test::new("stressors_of_stress_ng", 200 + longer, stressors),
            Test::new("dbench_with_four_clients", 120 + longer, dbench),
            Test::new("a_tree_like_a_kernels_source", 900, tree),
            Test::new("renames_of_eight_processes", 120 + longer, renames),
        ],
    )
}

/// Runs one stressor in a folder of its own; whether it ran, or says why not.
fn run_stressor(name: &str, dir: &Path) -> Result<(), String> {
    let temp = dir.join(name);
    fs::create_dir(&temp).expect("a folder for a stressor");
    let secs = number_from_environment("STRESS_SECONDS", 1);
    let output = Cmd::new("stress-ng")
        .args([&format!("--{name}"), "2", "--timeout", &secs.to_string()])
        .args(["--verify", "--temp-path"])
        .arg(&temp)
        .args(FILE_SIZES)
        .cwd(&temp)
        .limit_secs(secs + 60)
        .quiet()
        .run();
    let text = output.text();
    let told = |word: &str| text.lines().find(|line| line.contains(word));
    if let Some(line) = told("skipping").or_else(|| told("unrecognized option")) {
        return Err(line.to_owned());
    }
    let good = output.status.success() && told("fail:").is_none() && told("error:").is_none();
    assert!(good, "{}", output.describe());
    let left: Vec<_> = fs::read_dir(&temp).expect("list").flatten().collect();
    if name == "chattr" && !left.is_empty() {
        // Its time may end while the file is immutable, which it cannot remove then.
        Cmd::new("chattr").args(["-R", "-i", "-a"]).arg(&temp).ok();
        for entry in left {
            fs::remove_dir_all(entry.path()).expect("removed without the flags");
        }
        return Ok(());
    }
    assert!(left.is_empty(), "{name} could not remove {left:?}");
    Ok(())
}

fn stressors(env: &Env) -> Outcome {
    env.need_tools(&["stress-ng", "chattr"])?;
    for (name, why) in NOT_RUN {
        println!("not run: {name}: {why}");
    }
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[GIB; 3], &[]);
        volume.mount(&[mode]);
        let left_out: &[&str] = match mode {
            "writeback_cache" => NOT_RUN_WITH_KERNEL_CACHE,
            _ => &[],
        };
        println!("{mode}: not run: {left_out:?}");
        let stressors = STRESSORS.iter().filter(|name| !left_out.contains(name));
        let (pending, ran) = (Mutex::new(stressors), Mutex::new(0));
        let lane = || {
            loop {
                let next = pending.lock().expect("no lane panics with it").next();
                let Some(name) = next else { break };
                let started = Instant::now();
                match run_stressor(name, &volume.mountpoint) {
                    Ok(()) => {
                        println!("{mode}: {name}: {:.1} s", started.elapsed().as_secs_f64());
                        *ran.lock().expect("no lane panics with it") += 1;
                    }
                    Err(why) => println!("{mode}: skipped: {name}: {why}"),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..LANES {
                scope.spawn(lane);
            }
        });
        let ran = ran.into_inner().expect("no lane panics with it");
        println!("{mode}: {ran} stressors of {}", STRESSORS.len());
        assert!(ran >= STRESSORS_MIN, "too few stressors can run here");
        volume.umount();
        volume.fsck_clean();
    }
    Ok(())
}

fn dbench(env: &Env) -> Outcome {
    env.need_tools(&["dbench"])?;
    if !Path::new(DBENCH_LOAD).exists() {
        return Err(Skip(format!("{DBENCH_LOAD} is missing")));
    }
    let secs = 5 * number_from_environment("STRESS_SECONDS", 1);
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[GIB; 3], &[]);
        volume.mount(&[mode]);
        let dbench = Cmd::new("dbench").args(["-t", &secs.to_string(), "-c", DBENCH_LOAD, "-D"]);
        let output = dbench
            .arg(&volume.mountpoint)
            .arg("4")
            .limit_secs(secs * 3 + 60);
        let output = output.ok();
        let result = output
            .stdout
            .lines()
            .find(|line| line.starts_with("Throughput"));
        println!("{mode}: {}", result.expect("dbench names its throughput"));
        let text = output.text();
        let complaint = text
            .lines()
            .find(|line| line.contains("failed") || line.contains("ERROR"));
        assert_eq!(complaint, None, "{}", output.describe());
        volume.umount();
        volume.fsck_clean();
    }
    Ok(())
}

/// Does something, and says how long it took.
fn step(what: &str, count: usize, work: impl FnOnce()) {
    let started = Instant::now();
    work();
    let secs = started.elapsed().as_secs_f64();
    println!("{what}: {secs:.1} s, {:.0} files/s", count as f64 / secs);
}

/// What df and df -i show: bytes available, and inodes in use.
fn free_and_used(volume: &Volume) -> (u64, u64) {
    let stat = nix::sys::statvfs::statvfs(&volume.mountpoint).expect("statvfs of the mount");
    let free = stat.blocks_available() * stat.fragment_size();
    (free, stat.files() - stat.files_free())
}

/// Bytes of the devices that hold metadata, or have held it: the volume keeps these for it.
fn metadata_bytes(volume: &Volume) -> u64 {
    let chunks = Chunk::table(&volume.info());
    let chunks = chunks.iter().filter(|chunk| chunk.kind == "meta");
    let on_devices = chunks.map(|chunk| chunk.member_len_bytes * chunk.members.len() as u64);
    on_devices.sum()
}

fn tree(env: &Env) -> Outcome {
    env.need_tools(&["tar"])?;
    env.need_space(6 * GIB)?;
    for (mode, files) in CACHE_MODES.into_iter().zip([80_000, 8_000]) {
        let files = number_from_environment("STRESS_FILES", files);
        let files = usize::try_from(files).expect("a number of files");
        let tree = SourceTree::plan(80_000, files.div_ceil(16), files);
        println!("{mode}: {files} files, {} MiB", tree.bytes() >> 20);
        let archive = env.path("tree.tar");
        step("make the archive", files, || {
            let file = File::create(&archive).expect("create an archive");
            let file = BufWriter::with_capacity(1 << 20, file);
            tree.write_tar(file).expect("write an archive");
        });
        let mut volume = Volume::format(env, mode, &[2 * GIB; 3], &[]);
        tree_comes_and_goes(&mut volume, mode, &tree, &archive);
        if files < 50_000 {
            // What the first round left behind must be enough for the second.
            let before = metadata_bytes(&volume);
            tree_comes_and_goes(&mut volume, mode, &tree, &archive);
            assert_eq!(metadata_bytes(&volume), before, "metadata grew again");
        }
        for path in volume.devices.iter().chain([&archive]) {
            fs::remove_file(path).expect("remove an image, or the archive");
        }
    }
    Ok(())
}

fn tree_comes_and_goes(volume: &mut Volume, mode: &str, tree: &SourceTree, archive: &Path) {
    let (count, metadata_before) = (tree.file_count(), metadata_bytes(volume));
    volume.mount(&[mode]);
    let (free_before, used_before) = free_and_used(volume);
    let place = volume.mountpoint.clone();
    let run = |script: &str| {
        let script = Cmd::sh(script, [&place, archive]).limit_secs(300);
        script.quiet().ok();
    };
    step("extract", count, || {
        run("mkdir \"$1/a\" \"$1/b\"; tar -xf \"$2\" -C \"$1/a\"")
    });
    step("move", count, || {
        run("mv \"$1/a/source\" \"$1/b/new\"; mv \"$1/b/new\" \"$1/b/source\"")
    });
    step("hard-link", count, || {
        run("cp -al \"$1/b/source\" \"$1/a/source\"")
    });
    volume.remount(&[mode]);
    step("compare", count, || tree.assert_is_at(&volume.path("b"), 2));
    step("compare the links", count, || {
        tree.assert_is_linked_at(&volume.path("b"), &volume.path("a"));
    });
    step("delete one", count, || run("rm -rf \"$1/a\""));
    step("delete the other", count, || run("rm -rf \"$1/b\""));
    let left: Vec<_> = fs::read_dir(&place).expect("list").flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    volume.remount(&[mode]);
    let (free, used) = free_and_used(volume);
    volume.umount();
    volume.fsck_clean();
    assert_eq!(used, used_before, "inodes in use");
    let grown = metadata_bytes(volume) - metadata_before;
    println!("metadata keeps {} MiB more of the devices", grown >> 20);
    let lost = free_before.saturating_sub(free);
    assert!(
        lost < grown + 4 * MIB,
        "{lost} bytes lost, {grown} of them to metadata"
    );
}

/// What a mover may be told, as others move the same things.
const MOVER_ERRORS: &[Errno] = &[Errno::ENOENT, Errno::EEXIST, Errno::EINVAL, Errno::ENOTDIR];

/// Goes down from a folder for as long as the dice say; a folder.
fn somewhere(random: &mut Random, top: &Path) -> PathBuf {
    let mut dir = top.join(format!("top-{}", random.below(MOVERS as u64)));
    while random.below(3) > 0 {
        let inside = fs::read_dir(&dir).into_iter().flatten().flatten();
        let inside = inside.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut inside: Vec<PathBuf> = inside.map(|entry| entry.path()).collect();
        if inside.is_empty() {
            break;
        }
        let index = random.below(inside.len() as u64);
        dir = inside.swap_remove(usize::try_from(index).expect("small"));
    }
    dir
}

/// Something in a folder.
fn something(random: &mut Random, top: &Path) -> Option<PathBuf> {
    let dir = somewhere(random, top);
    let inside = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut inside: Vec<PathBuf> = inside.map(|entry| entry.path()).collect();
    let index = random.below(inside.len().max(1) as u64);
    let index = usize::try_from(index).expect("small");
    (index < inside.len()).then(|| inside.swap_remove(index))
}

/// A process that renames: its folder, its number, the seed and the seconds.
fn mover(arguments: &[String]) {
    let [top, me, seed, secs] = arguments else {
        panic!("four arguments: {arguments:?}");
    };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let (top, mut random) = (Path::new(top), Random::new(number(seed) ^ number(me)));
    let until = Instant::now() + Duration::from_secs(number(secs));
    let (mut moved, mut exchanged, mut refused) = (0, 0, 0);
    while Instant::now() < until {
        let Some(from) = something(&mut random, top) else {
            continue;
        };
        let fresh = format!("{me}-{moved}");
        let (to, flags) = match random.below(3) {
            0 => (
                somewhere(&mut random, top).join(fresh),
                RenameFlags::empty(),
            ),
            1 => {
                let slot = format!("slot-{}", random.below(50));
                (
                    somewhere(&mut random, top).join(slot),
                    RenameFlags::RENAME_NOREPLACE,
                )
            }
            _ => match something(&mut random, top) {
                Some(other) => (other, RenameFlags::RENAME_EXCHANGE),
                None => continue,
            },
        };
        match renameat2(AT_FDCWD, &from, AT_FDCWD, &to, flags) {
            Ok(()) if flags.contains(RenameFlags::RENAME_EXCHANGE) => exchanged += 1,
            Ok(()) => moved += 1,
            Err(errno) if MOVER_ERRORS.contains(&errno) => refused += 1,
            Err(errno) => panic!("{} to {}, {flags:?}: {errno}", from.display(), to.display()),
        }
    }
    println!("{moved} {exchanged} {refused}");
}

/// Contents of all files, sorted, and how many folders there are below.
fn inventory(dir: &Path) -> (Vec<String>, usize) {
    let (mut contents, mut dirs) = (Vec::new(), 0);
    for entry in fs::read_dir(dir)
        .expect("list a folder")
        .map(|entry| entry.expect("an entry"))
    {
        if entry.file_type().expect("a type").is_dir() {
            let (inside, below) = inventory(&entry.path());
            contents.extend(inside);
            dirs += below + 1;
        } else {
            contents.push(fs::read_to_string(entry.path()).expect("read a file"));
        }
    }
    contents.sort();
    (contents, dirs)
}

fn renames(env: &Env) -> Outcome {
    let (seed, secs) = (seed(), 4 * number_from_environment("STRESS_SECONDS", 1));
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[256 * MIB; 3], &[]);
        volume.mount(&[mode]);
        let top = |index: usize| volume.path(&format!("top-{}", index % MOVERS));
        (0..MOVERS).for_each(|index| fs::create_dir(top(index)).expect("a folder"));
        for index in 0..MOVED_DIRS {
            fs::create_dir(top(index).join(format!("dir-{index}"))).expect("a folder");
        }
        let mut expected = BTreeSet::new();
        for index in 0..MOVED_FILES {
            let name = format!("file-{index}");
            fs::write(top(index).join(&name), &name).expect("a file");
            expected.insert(name);
        }
        let start = |me: usize| {
            let numbers = [me as u64, seed, secs].map(|number| number.to_string());
            let place = volume.mountpoint.to_str().expect("UTF-8").to_owned();
            Peer::play("mover", [place].into_iter().chain(numbers))
        };
        let movers: Vec<Peer> = (0..MOVERS).map(start).collect();
        let mut totals = [0_u64; 3];
        for mut mover in movers {
            let counts = mover.hear();
            let counts = counts
                .split(' ')
                .map(|count| count.parse::<u64>().expect("a number"));
            totals
                .iter_mut()
                .zip(counts)
                .for_each(|(total, count)| *total += count);
            mover.finish();
        }
        println!("{mode}: {totals:?} moved, exchanged, refused in {secs} s");
        assert!(
            totals[0] > 100 && totals[1] > 100,
            "hardly any rename worked"
        );
        for _ in 0..2 {
            let (contents, dirs) = inventory(&volume.mountpoint);
            assert!(
                contents.iter().eq(expected.iter()),
                "files lost or doubled: {contents:?}"
            );
            assert_eq!(dirs, MOVERS + MOVED_DIRS, "folders lost or doubled");
            volume.remount(&[mode]);
        }
        volume.umount();
        volume.fsck_clean();
    }
    Ok(())
}
