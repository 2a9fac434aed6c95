//! Runs a theme's tests: one after the other, each in a process of its own.
//!
//! A test process lives in a private mount namespace, so what it mounts is gone with it, and has
//! a time limit, after which it, its children and its daemons are killed. Whatever the end, the
//! parent sweeps up: daemons whose command line names the test's folder, loop devices backed by
//! files in it, mounts below it, throttles, the folder. The summary has the form of the standard
//! test harness's, so that one reader (`scripts/test`) counts both; a skipped test counts as
//! `ignored` and is printed with its reason.
//!
//! Arguments: words to filter test names by, `--exact`, `--skip WORD`, `--list`, `--nocapture`.

use std::fs::{self, File};
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::Cmd;
use crate::env::{Env, Outcome, find_program, mount_obstacle, program_under_test};
use crate::{daemon, loopdev, throttle};

/// Exit code of a test process that skipped.
const SKIPPED: u8 = 77;
/// Tells a test process which test to run.
const CHILD: &str = "BRAIDFS_TEST_CHILD";
/// Tells a test process its folder.
const WORK: &str = "BRAIDFS_TEST_WORK";
/// Tells a test process the program under test, and lets the user choose it.
const BIN: &str = "BRAIDFS_BIN";

/// One test of a theme.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// Its name: what holds when it passes.
    pub name: &'static str,
    /// After this long it is killed, and has failed.
    pub limit: Duration,
    /// The test.
    pub run: fn(&Env) -> Outcome,
}

impl Test {
    /// A test with a time limit.
    pub const fn new(name: &'static str, limit_secs: u64, run: fn(&Env) -> Outcome) -> Self {
        Self {
            name,
            limit: Duration::from_secs(limit_secs),
            run,
        }
    }
}

/// What the command line asked for.
#[derive(Debug, Default)]
struct Selection {
    words: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
    only_ignored: bool,
    show_output: bool,
}

impl Selection {
    fn from_args(args: impl Iterator<Item = String>) -> Self {
        let mut selection = Self::default();
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--exact" => selection.exact = true,
                "--list" => selection.list = true,
                "--ignored" => selection.only_ignored = true,
                "--nocapture" | "--no-capture" | "--show-output" => selection.show_output = true,
                "--skip" => selection.skip.extend(args.next()),
                "--format" | "--test-threads" | "--color" | "--logfile" | "-Z" => {
                    args.next();
                }
                flag if flag.starts_with('-') => {}
                _ => selection.words.push(arg),
            }
        }
        selection
    }

    fn takes(&self, name: &str) -> bool {
        let hit = |word: &String| {
            if self.exact {
                name == word
            } else {
                name.contains(word)
            }
        };
        let wanted = self.words.is_empty() || self.words.iter().any(hit);
        wanted && !self.skip.iter().any(|word| name.contains(word)) && !self.only_ignored
    }
}

/// How one test ended.
enum End {
    Passed,
    Failed,
    Skipped(String),
}

/// Runs the tests of a theme that the command line selects; its `main`.
pub fn main(theme: &str, tests: &[Test]) -> ExitCode {
    if let Ok(name) = std::env::var(CHILD) {
        return run_here(&name, tests);
    }
    let selection = Selection::from_args(std::env::args().skip(1));
    let selected: Vec<&Test> = tests
        .iter()
        .filter(|test| selection.takes(test.name))
        .collect();
    if selection.list {
        for test in &selected {
            println!("{}: test", test.name);
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests of {theme}", selected.len());
    let started = Instant::now();
    let obstacle = mount_obstacle();
    let bin = match (&obstacle, selected.is_empty()) {
        (None, false) => match program_under_test() {
            Ok(bin) => bin,
            Err(error) => {
                println!("cannot build the program under test: {error}");
                return ExitCode::FAILURE;
            }
        },
        _ => PathBuf::new(),
    };
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for test in &selected {
        print!("test {theme}::{} ... ", test.name);
        std::io::stdout().flush().expect("stdout");
        let begun = Instant::now();
        let end = match &obstacle {
            Some(why) => End::Skipped(why.clone()),
            None => run_in_child(theme, test, &bin, selection.show_output),
        };
        let secs = begun.elapsed().as_secs_f64();
        match end {
            End::Passed => {
                passed += 1;
                println!("ok ({secs:.1} s)");
            }
            End::Skipped(why) => {
                skipped += 1;
                println!("ignored, skipped: {why}");
            }
            End::Failed => {
                failed.push(test.name);
                println!("test {theme}::{} FAILED ({secs:.1} s)", test.name);
            }
        }
    }
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    let word = if failed.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {} failed; {skipped} ignored; 0 measured; \
         {} filtered out; finished in {:.2}s\n",
        failed.len(),
        tests.len() - selected.len(),
        started.elapsed().as_secs_f64(),
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The test process: runs one test and says how it ended.
fn run_here(name: &str, tests: &[Test]) -> ExitCode {
    let test = tests
        .iter()
        .find(|test| test.name == name)
        .expect("the parent knows the names");
    let path = |key| PathBuf::from(std::env::var_os(key).expect("set by the parent"));
    let env = Env {
        dir: path(WORK),
        bin: path(BIN),
    };
    match catch_unwind(AssertUnwindSafe(|| (test.run)(&env))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(skip)) => {
            fs::write(env.dir.join("skipped"), &skip.0).expect("the test folder is writable");
            ExitCode::from(SKIPPED)
        }
        // The panic hook has printed the message already.
        Err(_payload) => ExitCode::FAILURE,
    }
}

fn run_in_child(theme: &str, test: &Test, bin: &Path, show_output: bool) -> End {
    let base = std::env::var_os("BRAIDFS_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let prefix = format!("braidfs-{theme}-{}-", test.name);
    let work = match tempfile::Builder::new().prefix(&prefix).tempdir_in(&base) {
        Ok(work) => work.keep(),
        Err(error) => {
            println!("no folder in {}: {error}", base.display());
            return End::Failed;
        }
    };
    let log_path = work.with_extension("log");
    let end = supervise(test, bin, &work, &log_path);
    sweep(&work);
    let log = fs::read(&log_path).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let end = match end {
        Ok(0) => End::Passed,
        Ok(code) if code == i32::from(SKIPPED) => {
            let why = fs::read_to_string(work.join("skipped")).unwrap_or_default();
            End::Skipped(why)
        }
        Ok(code) => {
            println!("failed with exit code {code}; its output:\n{log}");
            End::Failed
        }
        Err(why) => {
            println!("{why}; its output:\n{log}");
            End::Failed
        }
    };
    if show_output && !matches!(end, End::Failed) {
        println!("\n{log}");
    }
    // A failed test may leave its folder for a look.
    let keep = std::env::var_os("BRAIDFS_TEST_KEEP").is_some() && matches!(end, End::Failed);
    if keep {
        println!("kept: {} and {}", work.display(), log_path.display());
    } else {
        remove(&work);
        let _never_made = fs::remove_file(&log_path);
    }
    end
}

/// Starts the test process and waits for it, within the time limit. The exit code, or why none.
fn supervise(test: &Test, bin: &Path, work: &Path, log_path: &Path) -> Result<i32, String> {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    let log = File::create(log_path).map_err(|error| error.to_string())?;
    let log_too = log.try_clone().map_err(|error| error.to_string())?;
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = match find_program("unshare") {
        Some(unshare) => {
            let mut command = std::process::Command::new(unshare);
            command
                .args(["--mount", "--propagation", "private", "--"])
                .arg(exe);
            command
        }
        None => std::process::Command::new(exe),
    };
    command
        .env(CHILD, test.name)
        .env(WORK, work)
        .env(BIN, bin)
        .env("RUST_BACKTRACE", "0");
    command
        .stdin(std::process::Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .process_group(0);
    let mut child = command
        .spawn()
        .map_err(|error| format!("cannot start: {error}"))?;
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                let signal = status
                    .signal()
                    .map(|signal| format!("ended by signal {signal}"));
                return status.code().ok_or_else(|| signal.unwrap_or_default());
            }
            Ok(None) if started.elapsed() < test.limit => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(None) => break,
            Err(error) => return Err(error.to_string()),
        }
    }
    let group = Pid::from_raw(-i32::try_from(child.id()).unwrap_or(i32::MAX));
    // The daemons first: a process waiting for a mount cannot die before the mount does.
    kill_all_naming(work);
    let _gone_already = kill(group, Signal::SIGKILL);
    let deadline = Instant::now() + Duration::from_secs(10);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!(
        "killed after its time limit of {} s",
        test.limit.as_secs()
    ))
}

/// Ends and detaches whatever was left behind by a test, or whoever else used a folder.
pub fn sweep(work: &Path) {
    kill_all_naming(work);
    for target in mounts_below(work) {
        Cmd::new("umount").arg("-l").arg(target).quiet().run();
    }
    loopdev::detach_below(work);
    throttle::remove_leftovers(work);
}

/// Kills every process whose command line names something in a folder.
pub fn kill_all_naming(work: &Path) {
    for pid in daemon::processes_naming(work) {
        let _gone_already = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while !daemon::processes_naming(work).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Mount points below a folder in this namespace, the deepest first.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let targets = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from);
    let mut below: Vec<PathBuf> = targets.filter(|target| target.starts_with(dir)).collect();
    below.sort();
    below.reverse();
    below
}

/// Removes a test's folder, unless something is still mounted in it.
pub fn remove(work: &Path) {
    if !mounts_below(work).is_empty() {
        println!(
            "left in place, as something is still mounted there: {}",
            work.display()
        );
        return;
    }
    if let Err(error) = fs::remove_dir_all(work) {
        println!("cannot remove {}: {error}", work.display());
    }
}
