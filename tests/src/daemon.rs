//! The daemon's process, seen from outside: which one it is, how much memory it has.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process with its command line.
fn command_lines() -> impl Iterator<Item = (i32, Vec<u8>)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, fs::read(entry.path().join("cmdline")).ok()?))
    })
}

/// Processes other than this one whose command line names something in a folder.
pub fn processes_naming(dir: &Path) -> Vec<i32> {
    let needle = dir.as_os_str().as_encoded_bytes();
    let own = Pid::this().as_raw();
    let naming = |line: &[u8]| line.windows(needle.len()).any(|window| window == needle);
    command_lines()
        .filter(|(pid, line)| *pid != own && naming(line))
        .map(|found| found.0)
        .collect()
}

/// The daemon that serves a mount point: the process of this program that names it.
pub fn find(bin: &Path, mountpoint: &Path) -> Option<Daemon> {
    let target = mountpoint.as_os_str().as_encoded_bytes();
    command_lines()
        .filter(|(_, line)| line.split(|byte| *byte == 0).any(|word| word == target))
        .find(|(pid, _)| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == bin))
        .map(|(pid, _)| Daemon { pid })
}

/// A running daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Its process id.
    pub pid: i32,
}

impl Daemon {
    /// Whether it still runs; a zombie does not.
    pub fn is_alive(self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    }

    /// Kills it without a warning.
    pub fn kill_now(self) {
        let _gone_already = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
    }

    /// Waits for its end; false if it is still there.
    pub fn wait_gone(self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// The most memory it ever had resident, in bytes: the kernel's own high-water mark.
    pub fn peak_rss_bytes(self) -> u64 {
        self.status_kib("VmHWM:") << 10
    }

    /// From now on its high-water mark is what it has resident from now on.
    pub fn forget_peak_rss(self) {
        const PEAK: &str = "5";
        let _gone = fs::write(format!("/proc/{}/clear_refs", self.pid), PEAK);
    }

    /// The memory it has resident now, in bytes.
    pub fn rss_bytes(self) -> u64 {
        self.status_kib("VmRSS:") << 10
    }

    fn status_kib(self, key: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        number.unwrap_or_else(|| panic!("no {key} for process {}: is it gone?", self.pid))
    }
}
