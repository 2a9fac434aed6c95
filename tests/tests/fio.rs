//! Verified I/O: fio writes blocks that carry a checksum and their own offset, reads them back,
//! and reads them again after a remount, through a cache that is far smaller than the file.

use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{GIB, MIB, Volume};

const CACHE_BYTES: u64 = 64 * MIB;
const CACHE_OPTION: &str = "cache_size=64M";
const SPACE_BYTES: u64 = 8 * GIB;

fn main() -> ExitCode {
    runner::main(
        "fio",
        &[
            Test::new("sequential_buffered", 180, sequential_buffered),
            Test::new("sequential_o_direct", 180, sequential_o_direct),
            Test::new("random_buffered", 240, random_buffered),
            Test::new("random_o_direct", 240, random_o_direct),
            Test::new("four_jobs", 240, four_jobs),
            Test::new("mmap", 240, mmap),
            Test::new("io_uring_engine", 240, io_uring_engine),
            Test::new(
                "buffered_and_direct_at_once",
                240,
                buffered_and_direct_at_once,
            ),
        ],
    )
}

/// Writes and verifies, remounts, verifies again; the daemon's memory stays bounded throughout.
fn verified(env: &Env, jobs: &[&[&str]]) -> Outcome {
    env.need_tools(&["fio"])?;
    env.need_space(SPACE_BYTES)?;
    let mut volume = Volume::format(env, "v", &[2 * GIB; 4], &[]);
    volume.mount(&[CACHE_OPTION]);
    fio(&volume, &["--do_verify=1", "--end_fsync=1"], jobs);
    volume.assert_memory_bounded(CACHE_BYTES);
    volume.umount();
    volume.fsck_clean();
    volume.mount(&[CACHE_OPTION]);
    fio(&volume, &["--verify_only=1"], jobs);
    volume.assert_memory_bounded(CACHE_BYTES);
    volume.umount();
    Ok(())
}

fn fio(volume: &Volume, mode: &[&str], jobs: &[&[&str]]) {
    let common = [
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randrepeat=1",
        "--fallocate=none",
        "--thread",
        "--directory",
    ];
    let fio = Cmd::new("fio")
        .args(common)
        .arg(&volume.mountpoint)
        .args(mode);
    let output = fio.args(jobs.concat()).limit_secs(150).ok();
    for line in output.stdout.lines().filter(|line| line.contains("io=")) {
        println!("{line}");
    }
}

fn sequential_buffered(env: &Env) -> Outcome {
    verified(
        env,
        &[&["--name=seq", "--rw=write", "--bs=128k", "--size=2g"]],
    )
}

fn sequential_o_direct(env: &Env) -> Outcome {
    verified(
        env,
        &[&[
            "--name=seq",
            "--rw=write",
            "--bs=1m",
            "--size=2g",
            "--direct=1",
        ]],
    )
}

fn random_buffered(env: &Env) -> Outcome {
    verified(
        env,
        &[&["--name=rand", "--rw=randwrite", "--bs=64k", "--size=2g"]],
    )
}

fn random_o_direct(env: &Env) -> Outcome {
    let job = [
        "--name=rand",
        "--rw=randwrite",
        "--bs=16k",
        "--size=2g",
        "--direct=1",
    ];
    verified(
        env,
        &[&[&job[..], &["--ioengine=libaio", "--iodepth=16"]].concat()],
    )
}

fn four_jobs(env: &Env) -> Outcome {
    let job = [
        "--name=four",
        "--numjobs=4",
        "--rw=randwrite",
        "--bs=32k",
        "--size=512m",
    ];
    verified(env, &[&job])
}

fn mmap(env: &Env) -> Outcome {
    let job = [
        "--name=map",
        "--ioengine=mmap",
        "--rw=randwrite",
        "--bs=64k",
        "--size=512m",
    ];
    verified(env, &[&job])
}

fn io_uring_engine(env: &Env) -> Outcome {
    let ring = ["--ioengine=io_uring", "--iodepth=16", "--bs=64k"];
    let buffered = ["--name=ring", "--rw=randwrite", "--size=1g"];
    let direct = ["--name=ringd", "--rw=write", "--size=1g", "--direct=1"];
    verified(
        env,
        &[
            &[&buffered[..], &ring].concat(),
            &[&direct[..], &ring].concat(),
        ],
    )
}

/// Jobs that differ in how they go about it, on files of their own, side by side.
fn buffered_and_direct_at_once(env: &Env) -> Outcome {
    let (buffered, direct, map) = (
        ["--name=b", "--rw=write", "--bs=4k", "--size=256m"],
        [
            "--name=d",
            "--rw=randwrite",
            "--bs=64k",
            "--size=512m",
            "--direct=1",
        ],
        [
            "--name=m",
            "--ioengine=mmap",
            "--rw=write",
            "--bs=4k",
            "--size=512m",
        ],
    );
    verified(env, &[&buffered, &direct, &map])
}
