//! Small writes leave as large requests: what kiobufs and their chains are for.

use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::report::{DeviceTotals, number};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{GIB, MIB, Volume};

const KIB: u64 = 1 << 10;

fn main() -> ExitCode {
    runner::main(
        "requests",
        &[
            Test::new("sequential_4k_writes_leave_as_512k", 120, sequential),
            Test::new("random_4k_writes_leave_as_256k", 180, random),
        ],
    )
}

/// One GiB in writes of 4 KiB on four devices, and what the devices were asked to write for it:
/// data, metadata and all.
fn writes(env: &Env, order: &str, prepare: bool) -> DeviceTotals {
    let mut volume = Volume::format(env, "v", &[2 * GIB; 4], &[]);
    volume.mount(&[]);
    let fio = |rw: &str, bs: &str| {
        let job = [
            "--name=w",
            "--size=1g",
            "--end_fsync=1",
            "--fallocate=none",
            "--thread",
        ];
        let fio = Cmd::new("fio")
            .args(job)
            .arg(format!("--rw={rw}"))
            .arg(format!("--bs={bs}"));
        let output = fio
            .arg("--filename")
            .arg(volume.path("file"))
            .limit_secs(120)
            .ok();
        let line = output.stdout.lines().find(|line| line.contains("WRITE:"));
        println!("{}", line.unwrap_or_default());
    };
    if prepare {
        fio("write", "1m");
    }
    let before = volume.stats();
    fio(order, "4k");
    let after = volume.stats();
    let writes = DeviceTotals::of(&after, "write").since(DeviceTotals::of(&before, "write"));
    let grown = |key: &str| number(&after, key) - number(&before, key);
    println!(
        "{} requests, {} KiB each, {:.2} kiobufs each; {} kiobufs, {} splits, {} + {} merges",
        writes.requests,
        writes.mean_request_bytes() / KIB,
        writes.kiobufs as f64 / writes.requests as f64,
        grown("/volume/kiobufs"),
        grown("/volume/splits"),
        grown("/volume/back_merges"),
        grown("/volume/front_merges"),
    );
    assert!(
        writes.bytes >= GIB - 64 * MIB,
        "the devices were given {} bytes",
        writes.bytes
    );
    assert!(
        writes.kiobufs >= writes.requests,
        "a request carries at least one kiobuf"
    );
    volume.umount();
    writes
}

fn sequential(env: &Env) -> Outcome {
    env.need_tools(&["fio"])?;
    let writes = writes(env, "write", false);
    assert!(writes.mean_request_bytes() >= 512 * KIB, "{writes:?}");
    Ok(())
}

fn random(env: &Env) -> Outcome {
    env.need_tools(&["fio"])?;
    let fresh = writes(env, "randwrite", false);
    assert!(
        fresh.mean_request_bytes() >= 256 * KIB,
        "into a new file: {fresh:?}"
    );
    let over = writes(env, "randwrite", true);
    assert!(
        over.mean_request_bytes() >= 256 * KIB,
        "over an old file: {over:?}"
    );
    Ok(())
}
