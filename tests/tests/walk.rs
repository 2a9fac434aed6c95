//! The README's walk-through: each command in it is run, in order, on a machine of its own.
//!
//! Commands are the lines of the `sh` blocks of that section. One that is to fail says
//! `exit code N` in its comment. The test only puts in the program under test where the README
//! builds one.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome, project_root};
use braidfs_tests::machine::lay_over;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::is_mount_point;

/// The section's heading.
const HEADING: &str = "## A walk-through";
/// What it builds.
const BUILD: &str = "cargo build --release";
const BUILT: &str = "target/release/braidfs";
/// Where its volume is mounted.
const PLACE: &str = "/srv/tree";
/// What a walk may need.
const BYTES: u64 = 2 << 30;

fn main() -> ExitCode {
    runner::main(
        "walk",
        &[Test::new("each_command_of_the_readme_works", 300, walk)],
    )
}

/// A command, and the exit code that it is to have.
fn command(line: &str) -> Option<(&str, i32)> {
    let (command, comment) = line.split_once(" # ").unwrap_or((line, ""));
    let code = comment.split_once("exit code ").map(|(_, rest)| {
        let digits = rest.trim_end_matches(|c: char| !c.is_ascii_digit());
        digits.parse().expect("an exit code")
    });
    let command = command.trim();
    (!command.is_empty() && !command.starts_with('#')).then_some((command, code.unwrap_or(0)))
}

fn commands(readme: &str) -> Vec<(&str, i32)> {
    let (_, section) = readme.split_once(HEADING).expect("the section");
    let section = section.split("\n## ").next().expect("a first part");
    let blocks = section.split("```sh\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().expect("a first part"));
    blocks.flat_map(str::lines).filter_map(command).collect()
}

fn walk(env: &Env) -> Outcome {
    env.need_space(BYTES)?;
    for folder in ["/usr/local", "/sbin", "/srv", "/etc"] {
        lay_over(env, folder)?;
    }
    fs::write("/etc/fstab", "").expect("an empty fstab");
    let readme = fs::read_to_string(project_root().join("README.md")).expect("the README");
    let commands = commands(&readme);
    let verbs = [
        "mkfs", "mount", "stats", "top", "bench", "trace", "scrub", "doctor",
    ];
    for verb in verbs {
        let word = format!("{verb} ");
        let found = commands.iter().any(|(line, _)| line.contains(&word));
        assert!(found, "the walk-through has no {verb}");
    }
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    for (line, code) in commands.into_iter().filter(|(line, _)| *line != BUILD) {
        let line = line.replace(BUILT, &env.bin.display().to_string());
        let shell = Cmd::new("bash").args(["-euo", "pipefail", "-c", &line]);
        let shell = shell.cwd(project_root()).env("PATH", path);
        shell.limit_secs(120).exits(code);
    }
    assert!(!is_mount_point(Path::new(PLACE)), "it ends unmounted");
    Ok(())
}
