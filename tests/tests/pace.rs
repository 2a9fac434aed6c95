//! `braidfs bench`: it measures, says what limits, and leaves nothing behind.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::ordinary::Ordinary;
use braidfs_tests::report::{list, number};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, json};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MEMBER_BYTES: u64 = 256 * MIB;

/// The keys of its rows, and whether members have a part in them.
const LOADS: [(&str, bool); 7] = [
    ("write", true),
    ("direct_write", true),
    ("direct_read", true),
    ("random_read", true),
    ("warm_read", false),
    ("sync", true),
    ("files", false),
];

fn main() -> ExitCode {
    runner::main(
        "pace",
        &[
            Test::new("measures_members_fuse_and_braidfs", 180, measures),
            Test::new("says_what_limits", 180, limits),
            Test::new("a_signal_ends_it_and_nothing_is_left", 120, interrupted),
            Test::new("refuses_what_cannot_be_measured", 60, refusals),
            Test::new("an_ordinary_user_can_measure_his_own", 180, user),
        ],
    )
}

fn bench(env: &Env, volume: &Volume<'_>) -> Cmd {
    let bench = env.braidfs().env("TMPDIR", &env.dir).arg("bench");
    let small = ["--size", "16M", "--seconds", "1"];
    bench.arg(&volume.mountpoint).args(small).limit_secs(150)
}

fn control(env: &Env, volume: &Volume<'_>, word: &str) {
    let control = env.braidfs().arg("control").arg(&volume.mountpoint);
    control.arg(word).ok();
}

/// Neither a file, nor a mount, nor a folder.
fn assert_nothing_left(env: &Env, volume: &Volume<'_>) {
    let left = fs::read_dir(&volume.mountpoint).expect("list").count();
    assert_eq!(left, 0, "something is left on the volume");
    assert_no_null(&env.dir);
}

fn assert_no_null(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
    assert!(!mounts.contains("fuse.null"), "{mounts}");
    for entry in fs::read_dir(folder).expect("list") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_string_lossy();
        assert!(!name.starts_with("braidfs-bench"), "{name} is left");
    }
}

fn measures(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    control(env, &volume, "sync");
    let free = |volume: &Volume<'_>| number(&volume.stats(), "/space/free_blocks");
    let before = free(&volume);
    let output = bench(env, &volume).arg("--json").ok();
    let report = json(&output);
    let rows = list(&report, "/rows");
    assert_eq!(rows.len(), LOADS.len());
    for (row, (key, reaches_members)) in rows.iter().zip(LOADS) {
        assert_eq!(row["load"], key);
        let positive = |field: &str| row[field].as_f64().is_some_and(|pace| pace > 0.0);
        for field in ["fuse", "braidfs", "ceiling", "share"] {
            assert!(positive(field), "{field}: {row}");
        }
        assert_eq!(positive("members"), reaches_members, "{row}");
        let limit = row["limit"].as_str().expect("a limit");
        assert!(["members", "fuse", "braidfs"].contains(&limit), "{row}");
    }
    let grade = report["grade"].as_str().expect("a grade");
    assert!(["A", "B", "C", "D", "E"].contains(&grade), "{grade}");
    assert_nothing_left(env, &volume);
    let grown = |volume: &Volume<'_>| {
        let stats = volume.stats();
        number(&stats, "/space/chunk_blocks") - number(&stats, "/space/free_blocks")
    };
    wait_until("the space to be free again", || {
        control(env, &volume, "sync");
        grown(&volume) == 0
    });
    assert!(free(&volume) >= before, "space is gone");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn limits(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    let output = bench(env, &volume).ok();
    let text = &output.stdout;
    for words in ["members", "FUSE", "limited by", "write 4 KiB and fsync"] {
        assert!(text.contains(words), "{words}: {}", output.describe());
    }
    let grades = text.lines().filter(|line| line.starts_with("grade "));
    assert_eq!(grades.count(), 1, "{}", output.describe());
    let steps = output.stderr.lines();
    let steps = steps.filter(|line| line.starts_with("step ") && line.contains("ETA "));
    assert_eq!(steps.count(), 1 + 2 * LOADS.len(), "{}", output.stderr);
    volume.umount();
    Ok(())
}

fn interrupted(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    // In the first step the daemon measures, then the null server serves, then the volume is used.
    for step in ["step 1 ", "step 6 ", "step 14 "] {
        let running = bench(env, &volume).quiet().spawn();
        wait_until("the step", || running.text_so_far().contains(step));
        kill(Pid::from_raw(running.pid()), Signal::SIGINT).expect("a signal");
        let output = running.wait();
        assert_eq!(output.status.code(), Some(130), "{}", output.describe());
        assert_nothing_left(env, &volume);
    }
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn refusals(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    control(env, &volume, "freeze");
    let frozen = bench(env, &volume).exits(1);
    assert!(frozen.stderr.contains("is frozen"), "{}", frozen.describe());
    control(env, &volume, "thaw");
    volume.umount();
    volume.mount(&["ro"]);
    let refused = bench(env, &volume).exits(1);
    let words = "is mounted read-only";
    assert!(refused.stderr.contains(words), "{}", refused.describe());
    volume.umount();
    Ok(())
}

/// With image files and fusermount3, no root anywhere.
fn user(env: &Env) -> Outcome {
    let user = Ordinary::new(env)?;
    let volume = user.volume(env, &[MEMBER_BYTES; 2]);
    let bench = |words: &[&str]| {
        let bench = user.braidfs().arg("bench").arg(&volume.mountpoint);
        let small = ["--size", "16M", "--seconds", "1"];
        bench.args(small).args(words).limit_secs(150)
    };
    let report = json(&bench(&["--json"]).ok());
    let rows = list(&report, "/rows");
    assert!(rows.iter().all(|row| row["fuse"].is_number()), "{report}");
    let left = user.command().args(["ls", "-A"]).arg(&volume.mountpoint);
    assert_eq!(left.ok().stdout, "");
    assert_no_null(&env.path("run"));
    let mode = |bits| user.command().args(["chmod", bits]).arg(&volume.mountpoint);
    mode("500").ok();
    let refused = bench(&[]).exits(2);
    let hint = "name one that you may write to, --directory";
    assert!(refused.stderr.contains(hint), "{}", refused.describe());
    user.braidfs().arg("umount").arg(&volume.mountpoint).ok();
    Ok(())
}
