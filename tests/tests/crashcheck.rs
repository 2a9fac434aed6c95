//! Power cuts everywhere in small workloads: runs `crashcheck`, which says what it saw.
//!
//! `CRASHCHECK_STATES` is the number of different states (100,000), `CRASHCHECK_SECONDS` how long
//! the long workloads run (20), `SEED` what random choices begin with.
#![allow(missing_docs)]

use std::process::{Command, ExitCode};

use braidfs_tests::env::{Env, Outcome, project_root};
use braidfs_tests::runner::{self, Test};
use serde_json::Value;

const TESTS: &[Test] = &[
    Test::new(
        "a_power_cut_anywhere_leaves_a_prefix_of_the_history",
        1500,
        a_power_cut_anywhere_leaves_a_prefix_of_the_history,
    ),
    Test::new(
        "long_workloads_on_failing_devices_keep_what_was_promised",
        600,
        long_workloads_on_failing_devices_keep_what_was_promised,
    ),
    Test::new(
        "planted_bugs_can_still_be_planted",
        60,
        planted_bugs_can_still_be_planted,
    ),
];

fn main() -> ExitCode {
    runner::main("crashcheck", TESTS)
}

fn setting(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(default, |given| given.parse().expect("a number"))
}

/// Runs crashcheck and shows what it says; the outcome as it printed it.
fn crashcheck(args: &[&str]) -> Value {
    let seed = setting("SEED", 1).to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_crashcheck"));
    command.args(args).args(["--json", "--seed", &seed]);
    let output = command.output().expect("run crashcheck");
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    println!("{text}{errors}");
    assert!(
        output.status.success(),
        "crashcheck found something: {errors}"
    );
    serde_json::from_str(&text).expect("its outcome")
}

fn a_power_cut_anywhere_leaves_a_prefix_of_the_history(_env: &Env) -> Outcome {
    let wanted = setting("CRASHCHECK_STATES", 100_000);
    let states = wanted.to_string();
    let bounds = ["--states", &states, "--fsck-every", "2"];
    let seen = crashcheck(&[&["--ops", "2", "--sample", "300"], &bounds[..]].concat());
    let different = seen["states_different"].as_u64();
    assert!(different >= Some(wanted), "only {different:?} states");
    assert_eq!(seen["violations"], 0);
    Ok(())
}

fn long_workloads_on_failing_devices_keep_what_was_promised(_env: &Env) -> Outcome {
    let seconds = setting("CRASHCHECK_SECONDS", 20).to_string();
    let seen = crashcheck(&["long", "--seconds", &seconds]);
    assert_eq!(seen["violations"], 0);
    assert!(seen["states"].as_u64() > Some(0) && seen["syncs"].as_u64() > Some(0));
    Ok(())
}

fn planted_bugs_can_still_be_planted(_env: &Env) -> Outcome {
    let mut command = Command::new(project_root().join("scripts/mutants"));
    let output = command
        .arg("--check")
        .output()
        .expect("run scripts/mutants");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    Ok(())
}
