//! The process that waits for the one that measures, and cleans up after it.
//!
//! Whatever ends the other, Ctrl-C too: daemons that name its folder are killed, and the folder
//! goes. Mounts go with the mount namespace of the other, loop devices with the last process that
//! has them open.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use braidfs_tests::env::{find_program, mount_obstacle};
use braidfs_tests::runner;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// Tells the process that measures its folder.
const WORK: &str = "BRAIDFS_BENCH_WORK";
/// As shells say it of Ctrl-C.
const INTERRUPTED: u8 = 130;

static IS_INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The folder, if this is the process that measures.
pub fn inside() -> Option<PathBuf> {
    std::env::var_os(WORK).map(PathBuf::from)
}

/// Starts this program again to measure, and waits for its end.
pub fn watch(dir: Option<&Path>) -> ExitCode {
    if let Some(why) = mount_obstacle() {
        eprintln!(
            "bench: {}",
            why.replace("real mounts are tested", "it measures real mounts")
        );
        return ExitCode::FAILURE;
    }
    let base = dir.map(Path::to_path_buf);
    let base = base.or_else(|| std::env::var_os("BRAIDFS_TEST_DIR").map(PathBuf::from));
    let base = base.unwrap_or_else(std::env::temp_dir);
    let work = match tempfile::Builder::new()
        .prefix("braidfs-bench-")
        .tempdir_in(&base)
    {
        Ok(work) => work.keep(),
        Err(error) => {
            eprintln!("bench: no folder in {}: {error}", base.display());
            return ExitCode::FAILURE;
        }
    };
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    let blocked = signals.thread_block();
    let code = match blocked
        .map_err(std::io::Error::from)
        .and_then(|()| start(&work))
    {
        Ok(child) => wait(child, &work, signals),
        Err(error) => {
            eprintln!("bench: cannot start: {error}");
            ExitCode::FAILURE
        }
    };
    runner::sweep(&work);
    runner::remove(&work);
    code
}

fn start(work: &Path) -> std::io::Result<Child> {
    use std::os::unix::process::CommandExt;
    let exe = std::env::current_exe()?;
    let unshare = find_program("unshare");
    let unshare =
        unshare.ok_or_else(|| std::io::Error::other("unshare is missing (util-linux)"))?;
    // With this process it goes too.
    let flags = [
        "--mount",
        "--propagation",
        "private",
        "--fork",
        "--kill-child",
        "--",
    ];
    let mut command = Command::new(unshare);
    command
        .args(flags)
        .arg(exe)
        .args(std::env::args_os().skip(1));
    command
        .env(WORK, work)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
}

fn wait(mut child: Child, work: &Path, signals: SigSet) -> ExitCode {
    let group = Pid::from_raw(-i32::try_from(child.id()).unwrap_or(i32::MAX));
    let work = work.to_path_buf();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            IS_INTERRUPTED.store(true, SeqCst);
            eprintln!("bench: interrupted; cleaning up");
            // First who measures: it would take the end of the others for a failure.
            let _gone_already = kill(group, Signal::SIGKILL);
            runner::kill_all_naming(&work);
        }
    });
    let status = child.wait();
    if IS_INTERRUPTED.load(SeqCst) {
        return ExitCode::from(INTERRUPTED);
    }
    match status.map(|status| status.code()) {
        Ok(Some(code)) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        _ => ExitCode::FAILURE,
    }
}
