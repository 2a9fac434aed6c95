//! Guards against a sudden loss of speed: braidfs beside the null FUSE server, in the same run.
//!
//! Nothing is compared with a clock. Both do the same small things in turns; the best ratio of the
//! rounds counts, and the bounds are generous: a machine that is busy with something else slows
//! both down, and a real loss is far larger. How fast it is, `scripts/bench` measures.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome, null_server};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, serve};

/// How often each does everything.
const ROUNDS: usize = 3;
/// Large enough to be sequential, small enough for the cache.
const LARGE_BYTES: usize = 64 * MIB as usize;
/// Reads of 4 KiB at random.
const SMALL_READS: u64 = 4000;
/// Small files.
const FILES: u64 = 1000;

/// What is done, and the least share of the null server's pace.
type Thing = (&'static str, f64, fn(&Path));

const THINGS: [Thing; 5] = [
    ("write of 1 MiB pieces", 0.05, write_large),
    ("read of 1 MiB pieces, warm", 0.2, read_large),
    ("read of 4 KiB at random, warm", 0.3, read_small),
    ("creation of small files", 0.05, create_files),
    ("lookup of small files", 0.2, stat_files),
];

fn main() -> ExitCode {
    let name = "keeps_up_with_the_null_server";
    runner::main(
        "guard",
        &[Test::new(name, 900, keeps_up_with_the_null_server)],
    )
}

fn keeps_up_with_the_null_server(env: &Env) -> Outcome {
    let program = null_server().expect("the null server can be built");
    let place = env.mkdir("null");
    let server = serve(Cmd::new(program).arg(&place).limit_secs(300), &place);
    let mut volume = Volume::format(env, "volume", &[512 * MIB; 2], &[]);
    volume.mount(&[]);
    let mut best = [0.0_f64; THINGS.len()];
    for round in 1..=ROUNDS {
        for ((name, _, act), best) in THINGS.iter().zip(&mut best) {
            let [theirs, ours] = [&place, &volume.mountpoint].map(|dir| {
                let begun = Instant::now();
                act(dir);
                begun.elapsed().as_secs_f64()
            });
            println!("round {round}: {name}: {:.2}", theirs / ours);
            *best = best.max(theirs / ours);
        }
        for dir in [&place, &volume.mountpoint] {
            fs::remove_dir_all(dir.join("files")).expect("remove small files");
        }
    }
    volume.umount();
    Cmd::new("umount").arg(&place).ok();
    server.wait();
    let slow = THINGS
        .iter()
        .zip(best)
        .filter(|((_, least, _), best)| best < least);
    let slow: Vec<String> = slow
        .map(|((name, least, _), best)| {
            format!("{name}: {best:.3} of the null server's, not {least}")
        })
        .collect();
    assert!(slow.is_empty(), "{}", slow.join("\n"));
    Ok(())
}

fn write_large(dir: &Path) {
    let block = vec![1; MIB as usize];
    let mut file = File::create(dir.join("large")).expect("create a file");
    for _ in 0..LARGE_BYTES / block.len() {
        file.write_all(&block).expect("write a file");
    }
}

fn read_large(dir: &Path) {
    let mut block = vec![0; MIB as usize];
    let mut file = File::open(dir.join("large")).expect("open a file");
    for _ in 0..LARGE_BYTES / block.len() {
        file.read_exact(&mut block).expect("read a file");
    }
}

fn read_small(dir: &Path) {
    let mut block = [0; 4096];
    let blocks = (LARGE_BYTES / block.len()) as u64;
    let file = File::open(dir.join("large")).expect("open a file");
    for number in 0..SMALL_READS {
        let at = number * 7919 % blocks * block.len() as u64;
        file.read_exact_at(&mut block, at).expect("read a file");
    }
}

fn create_files(dir: &Path) {
    fs::create_dir(dir.join("files")).expect("make a directory");
    for number in 0..FILES {
        let path = dir.join(format!("files/{number}"));
        fs::write(path, [7; 1000]).expect("write a small file");
    }
}

/// Whose attributes the kernel knows is not asked: it is made to forget.
fn stat_files(dir: &Path) {
    fs::write("/proc/sys/vm/drop_caches", "2").expect("root may drop the caches");
    for number in 0..FILES {
        fs::metadata(dir.join(format!("files/{number}"))).expect("stat a small file");
    }
}
