//! Workloads of many names: small files, a large directory, the copy of a tree.
//!
//! One process, one thread, the calls that programs make. Before each phase the kernel forgets its
//! names, inodes and pages, for all peers alike: so what is measured is what a server answers, and
//! not what the kernel remembers of the phase before.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use braidfs_tests::command::Cmd;

use crate::measure::{Unit, Work};
use crate::run::Run;
use crate::stage::Stage;

/// Bytes of a small file.
const FILE_BYTES: usize = 4096;
/// Small files in a directory.
const DIR_FILES: u64 = 1000;
/// A directory of this size is what a large one is compared with.
const FEW: u64 = 10_000;

/// What is written just before a kill.
const LATE_BYTES: usize = 64 << 20;

/// Does something with each number below `count`, and takes the time.
fn each(count: u64, mut act: impl FnMut(u64)) -> Work {
    let begun = Instant::now();
    (0..count).for_each(&mut act);
    Work {
        operations: count as f64,
        secs: begun.elapsed().as_secs_f64(),
        ..Work::default()
    }
}

/// Small files: create and write, stat, list, read, rename, unlink.
pub fn files(run: &mut Run<'_>) {
    let mut stage = run.stage("");
    let count = run.scale().files;
    let dirs = (0..count.div_ceil(DIR_FILES)).map(|number| stage.path(&format!("d{number}")));
    let dirs: Vec<PathBuf> = dirs.collect();
    dirs.iter()
        .for_each(|dir| fs::create_dir(dir).expect("make a directory"));
    let of = |number: u64, prefix: char| {
        dirs[(number / DIR_FILES) as usize].join(format!("{prefix}{number}"))
    };
    let content = [7; FILE_BYTES];
    phase(run, &mut stage, "create", |_| {
        let mut work = each(count, |number| {
            let mut file = File::create(of(number, 'f')).expect("create a file");
            file.write_all(&content).expect("write a file");
        });
        work.bytes = (count * FILE_BYTES as u64) as f64;
        work
    });
    phase(run, &mut stage, "stat", |_| {
        each(count, |number| {
            fs::metadata(of(number, 'f')).expect("stat a file");
        })
    });
    phase(run, &mut stage, "list", |_| list(&dirs, count));
    phase(run, &mut stage, "read", |_| {
        let mut buffer = [0; 2 * FILE_BYTES];
        let mut work = each(count, |number| {
            let mut file = File::open(of(number, 'f')).expect("open a file");
            let len = file.read(&mut buffer).expect("read a file");
            assert_eq!(len, FILE_BYTES, "the length of a file");
        });
        work.bytes = (count * FILE_BYTES as u64) as f64;
        work
    });
    phase(run, &mut stage, "rename", |_| {
        each(count, |number| {
            fs::rename(of(number, 'f'), of(number, 'g')).expect("rename a file");
        })
    });
    phase(run, &mut stage, "unlink", |_| {
        each(count, |number| {
            fs::remove_file(of(number, 'g')).expect("unlink a file");
        })
    });
}

fn phase(
    run: &mut Run<'_>,
    stage: &mut Stage<'_>,
    row: &str,
    act: impl FnOnce(&mut Stage<'_>) -> Work,
) {
    stage.drop_kernel_caches();
    let (work, cost) = stage.measured(act);
    run.record(row, Unit::PerSecond, &work, cost);
}

/// Lists directories with the type of each entry, as find(1) does.
fn list(dirs: &[PathBuf], expected: u64) -> Work {
    let mut seen = 0;
    let work = each(1, |_| {
        for dir in dirs {
            for entry in fs::read_dir(dir).expect("list a directory") {
                let entry = entry.expect("an entry");
                seen += u64::from(entry.file_type().expect("its type").is_file());
            }
        }
    });
    assert_eq!(seen, expected, "files that were listed");
    Work {
        operations: expected as f64,
        ..work
    }
}

/// Many empty files in some directories: creation, lookups, and mounting after it.
pub fn million(run: &mut Run<'_>, dirs: u64) {
    let mut stage = run.stage("");
    let count = run.scale().million;
    if stage.peer.is_braidfs() {
        let work = seconds(stage.remount_secs());
        let cost = stage.measured(|_| work).1;
        run.record("mount, empty", Unit::Seconds, &work, cost);
    }
    let folders: Vec<PathBuf> = (0..dirs).map(|n| stage.path(&format!("d{n}"))).collect();
    folders
        .iter()
        .for_each(|dir| fs::create_dir(dir).expect("make a directory"));
    let of = |number: u64| folders[(number % dirs) as usize].join(format!("file-{number}"));
    let create = |from: u64, to: u64| {
        each(to - from, |number| {
            File::create(of(from + number)).expect("create a file");
        })
    };
    // From the first tenth of a small directory's files on, names are made at the same pace.
    let few = FEW.min(count / 4);
    let (work, cost) = stage.measured(|_| create(0, few));
    run.record("create, few", Unit::PerSecond, &work, cost);
    lookups(run, &mut stage, "lookup, few", few, few, &of);
    let late = count - count / 10;
    create(few, late);
    let (work, cost) = stage.measured(|_| create(late, count));
    run.record("create, many", Unit::PerSecond, &work, cost);
    lookups(run, &mut stage, "lookup, many", count, few, &of);
    if stage.peer.is_braidfs() {
        let work = seconds(stage.remount_secs());
        let cost = stage.measured(|_| work).1;
        run.record("mount, many", Unit::Seconds, &work, cost);
        // In the middle of work: nobody waited for a commit of this.
        create(count, count + few);
        std::fs::write(stage.path("late"), vec![1; LATE_BYTES]).expect("write a file");
        let work = seconds(stage.kill_and_mount_secs());
        let cost = stage.measured(|_| work).1;
        run.record("mount, killed", Unit::Seconds, &work, cost);
    }
}

fn seconds(secs: f64) -> Work {
    Work {
        secs,
        ..Work::default()
    }
}

/// Looks up `count` of `among` names, in an order that no directory has.
fn lookups(
    run: &mut Run<'_>,
    stage: &mut Stage<'_>,
    row: &str,
    among: u64,
    count: u64,
    of: &dyn Fn(u64) -> PathBuf,
) {
    // A prime beyond every count: steps of it visit each number once.
    const STEP: u64 = 7_368_787;
    phase(run, stage, row, |_| {
        each(count, |number| {
            fs::metadata(of(number * STEP % among)).expect("stat a file");
        })
    });
}

/// cp -a of a tree there, and back when cold.
pub fn copy(run: &mut Run<'_>) {
    let source = run.work.join("source");
    let files = run.scale().files / 25;
    let bytes = make_tree(&source, files);
    let mut stage = run.stage("");
    let there = stage.path("copy");
    let back = run.work.join("back");
    let cp = |from: &Path, to: &Path| {
        let output = Cmd::new("cp")
            .arg("-a")
            .arg(from)
            .arg(to)
            .limit_secs(600)
            .quiet()
            .ok();
        Work {
            bytes,
            operations: files as f64,
            secs: output.elapsed.as_secs_f64(),
            ..Work::default()
        }
    };
    let (work, cost) = stage.measured(|_| cp(&source, &there));
    run.record("there", Unit::PerSecond, &work, cost);
    stage.cold();
    let (work, cost) = stage.measured(|_| cp(&there, &back));
    run.record("back, cold", Unit::PerSecond, &work, cost);
    drop(stage);
    fs::remove_dir_all(&back).expect("remove a copy");
}

/// A tree of files of 1 to 64 KiB; how many bytes it has. It is made once.
fn make_tree(root: &Path, files: u64) -> f64 {
    let content = vec![3; 64 << 10];
    let is_there = root.is_dir();
    let mut bytes = 0;
    for number in 0..files {
        let dir = root.join(format!("d{}", number / 40));
        if !is_there && number % 40 == 0 {
            fs::create_dir_all(&dir).expect("make a directory");
        }
        // Sizes go round from small to large, most of them small.
        let len = 1 << (10 + number % 7);
        if !is_there {
            fs::write(dir.join(format!("f{number}")), &content[..len]).expect("write a file");
        }
        bytes += len;
    }
    bytes as f64
}
