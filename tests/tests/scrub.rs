//! `braidfs scrub` on real mounts, with image files that are damaged behind the daemon's back.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use braidfs_tests::command::{Cmd, Output};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::pattern;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, json};

const BLOCK: usize = 4096;
/// Where the second label copy lies on each member.
const LABEL_1: u64 = 512 << 10;
/// Blocks of the large file.
const LARGE_BLOCKS: u64 = 4096;
const NAME: &str = "a-name-that-is-nowhere-else";

fn main() -> ExitCode {
    runner::main(
        "scrub",
        &[
            Test::new("clean_and_told_everywhere", 120, clean_and_told_everywhere),
            Test::new(
                "damage_is_repaired_or_named",
                240,
                damage_is_repaired_or_named,
            ),
            Test::new("interrupted_and_resumed", 240, interrupted_and_resumed),
            Test::new("unmounted_volumes", 240, unmounted_volumes),
            Test::new("foreground_goes_on", 240, foreground_goes_on),
        ],
    )
}

/// A mounted volume with a large file and a small one; all of it is on the devices, and in tables.
fn filled<'e>(env: &'e Env, name: &str) -> Volume<'e> {
    let mut volume = Volume::format(env, name, &[128 * MIB; 2], &[]);
    volume.mount(&[]);
    let content = pattern::blocks(1, 1, 0, LARGE_BLOCKS);
    fs::write(volume.path("large"), content).expect("write a file");
    fs::write(volume.path(NAME), b"small").expect("write a file");
    for name in ["large", NAME] {
        let file = File::open(volume.path(name)).expect("open a file");
        file.sync_all().expect("fsync");
    }
    let control = env.braidfs().arg("control").arg(&volume.mountpoint);
    control.arg("sync").ok();
    volume
}

fn scrub(env: &Env, args: &[&str], place: &Path) -> Cmd {
    env.braidfs().arg("scrub").args(args).arg(place)
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it ended by itself")
}

/// Runs a scrub that is to end with `wanted`.
fn scrub_ends(env: &Env, args: &[&str], place: &Path, wanted: i32) -> Output {
    let output = scrub(env, args, place).run();
    assert_eq!(code(&output), wanted, "{}", output.describe());
    output
}

fn number(value: &Value, field: &str) -> u64 {
    let number = value.get(field).and_then(Value::as_u64);
    number.unwrap_or_else(|| panic!("no {field} in {value}"))
}

/// Turns a byte over in all blocks of an image with these bytes in them; gives how many there were.
fn damage(image: &Path, bytes: &[u8]) -> usize {
    let content = fs::read(image).expect("read an image");
    let file = OpenOptions::new().write(true).open(image);
    let file = file.expect("open an image");
    let blocks = content.chunks(BLOCK).enumerate();
    let mut hits = 0;
    for (nth, block) in blocks {
        if block.windows(bytes.len()).any(|part| part == bytes) {
            let at = BLOCK / 2;
            let other = [block[at] ^ 0x10];
            file.write_all_at(&other, (nth * BLOCK + at) as u64)
                .expect("damage an image");
            hits += 1;
        }
    }
    hits
}

fn damage_at(image: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(image);
    let file = file.expect("open an image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read an image");
    file.write_all_at(&[byte[0] ^ 0x10], at)
        .expect("damage an image");
}

fn clean_and_told_everywhere(env: &Env) -> Outcome {
    let mut volume = filled(env, "v");
    let output = scrub_ends(env, &["--status"], &volume.mountpoint, 0);
    assert!(output.stdout.contains("never"), "{}", output.describe());
    let output = scrub_ends(env, &[], &volume.mountpoint, 0);
    assert!(output.stdout.contains("finished"), "{}", output.describe());
    let status = json(&scrub_ends(
        env,
        &["--status", "--json"],
        &volume.mountpoint,
        0,
    ));
    assert!(number(&status, "data_bytes") >= LARGE_BLOCKS * BLOCK as u64);
    assert_eq!(number(&status, "found"), 0);
    let stats = volume.stats();
    assert_eq!(stats["scrub"]["state"], "finished");
    assert_eq!(volume.info()["scrub"]["state"], "finished");
    volume.umount();
    assert_eq!(
        volume.info()["scrub"],
        stats["scrub"],
        "kept without a mount"
    );
    let info = env.braidfs().arg("info").arg(&volume.devices[0]).ok();
    assert!(info.stdout.contains("last scrub"), "{}", info.describe());
    let nowhere = env.mkdir("nowhere");
    assert_eq!(code(&scrub(env, &["--pause"], &nowhere).run()), 16);
    assert_eq!(code(&scrub(env, &[], &nowhere).run()), 8);
    assert_eq!(code(&scrub(env, &["--rate", "much"], &nowhere).run()), 16);
    volume.fsck_clean();
    Ok(())
}

fn damage_is_repaired_or_named(env: &Env) -> Outcome {
    let mut volume = filled(env, "v");
    damage_at(&volume.devices[1], LABEL_1 + 100);
    assert!(damage(&volume.devices[0], NAME.as_bytes()) > 0);
    let looked = json(&scrub_ends(env, &["-n", "--json"], &volume.mountpoint, 4));
    let found = number(&looked, "found");
    assert!(found >= 2 && number(&looked, "left") == found, "{looked}");
    let repaired = json(&scrub_ends(env, &["--json"], &volume.mountpoint, 1));
    assert_eq!(number(&repaired, "repaired"), found, "{repaired}");
    scrub_ends(env, &[], &volume.mountpoint, 0);
    // Data has no second copy.
    let block = pattern::blocks(1, 1, 1000, 1);
    let hits: usize = volume
        .devices
        .iter()
        .map(|image| damage(image, &block[..64]))
        .sum();
    assert_eq!(hits, 1);
    let output = scrub_ends(env, &[], &volume.mountpoint, 4);
    let named = output.stdout.lines().any(|line| {
        line.contains(".img at byte")
            && line.contains(&format!("at byte {}", 1000 * BLOCK))
            && line.contains("/large")
    });
    assert!(named, "{}", output.describe());
    fs::remove_file(volume.path("large")).expect("remove the file");
    scrub_ends(env, &[], &volume.mountpoint, 0);
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn state(env: &Env, place: &Path) -> String {
    let status = json(&scrub(env, &["--status", "--json"], place).quiet().ok());
    status["state"].as_str().expect("a state").to_owned()
}

fn interrupted_and_resumed(env: &Env) -> Outcome {
    let mut volume = filled(env, "v");
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let running = scrub(env, &["--rate", "4M/s"], &volume.mountpoint).spawn();
        let until = Instant::now() + Duration::from_secs(30);
        while state(env, &volume.mountpoint) != "running" {
            assert!(Instant::now() < until, "it does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        let second = scrub(env, &[], &volume.mountpoint).run();
        assert_eq!(code(&second), 8, "{}", second.describe());
        kill(Pid::from_raw(running.pid()), signal).expect("send a signal");
        let output = running.wait();
        assert_eq!(code(&output), 32, "{}", output.describe());
        assert_eq!(state(env, &volume.mountpoint), "paused");
    }
    volume.remount(&[]);
    assert_eq!(state(env, &volume.mountpoint), "paused");
    let resumed = ["--resume", "--rate", "1G", "--json"];
    let status = json(&scrub_ends(env, &resumed, &volume.mountpoint, 0));
    assert!(number(&status, "data_bytes") >= LARGE_BLOCKS * BLOCK as u64);
    assert_eq!(
        code(&scrub(env, &["--resume"], &volume.mountpoint).run()),
        8
    );
    scrub(env, &["-b", "--rate", "1M"], &volume.mountpoint).ok();
    assert_eq!(state(env, &volume.mountpoint), "running");
    scrub(env, &["--pause"], &volume.mountpoint).ok();
    scrub(env, &["--cancel"], &volume.mountpoint).ok();
    assert_eq!(state(env, &volume.mountpoint), "canceled");
    // An unmount does not wait for it.
    scrub(env, &["-b", "--rate", "1M"], &volume.mountpoint).ok();
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn unmounted_volumes(env: &Env) -> Outcome {
    let mut volume = filled(env, "v");
    volume.umount();
    let device = volume.devices[0].clone();
    scrub_ends(env, &[], &device, 0);
    damage_at(&volume.devices[1], LABEL_1 + 100);
    assert!(damage(&device, NAME.as_bytes()) > 0);
    let looked = json(&scrub_ends(env, &["-n", "--json"], &device, 4));
    let found = number(&looked, "found");
    assert!(found >= 2, "{looked}");
    let repaired = json(&scrub_ends(env, &["--json"], &device, 1));
    assert_eq!(number(&repaired, "repaired"), found, "{repaired}");
    scrub_ends(env, &["-n"], &device, 0);
    let status = json(&scrub_ends(env, &["--status", "--json"], &device, 0));
    assert_eq!(status["state"], "finished");
    volume.mount(&[]);
    // A device of a mounted file system stands for its mount.
    scrub_ends(env, &[], &volume.mountpoint, 0);
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

/// What a scrub does to others: prints how long a read of the file takes beside one.
fn foreground_goes_on(env: &Env) -> Outcome {
    let mut volume = filled(env, "v");
    let read = |volume: &mut Volume<'_>| {
        volume.remount(&[]);
        let begun = Instant::now();
        let bytes = fs::read(volume.path("large")).expect("read the file");
        assert!(
            bytes == pattern::blocks(1, 1, 0, LARGE_BLOCKS),
            "wrong bytes"
        );
        begun.elapsed()
    };
    let alone = read(&mut volume);
    volume.remount(&[]);
    scrub(env, &["-b"], &volume.mountpoint).ok();
    let begun = Instant::now();
    let bytes = fs::read(volume.path("large")).expect("read the file");
    let beside = begun.elapsed();
    assert!(
        bytes == pattern::blocks(1, 1, 0, LARGE_BLOCKS),
        "wrong bytes"
    );
    println!("16 MiB read cold: {alone:?} alone, {beside:?} beside a scrub");
    let until = Instant::now() + Duration::from_secs(60);
    while state(env, &volume.mountpoint) == "running" {
        assert!(Instant::now() < until, "it does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
    let status = json(&scrub(env, &["--status", "--json"], &volume.mountpoint).ok());
    let (bytes, millis) = (
        number(&status, "data_bytes") + number(&status, "metadata_bytes"),
        number(&status, "active_ms"),
    );
    println!("scrub: {bytes} bytes in {millis} ms");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}
