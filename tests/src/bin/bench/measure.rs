//! One measurement: what was done in which time, and what it cost.
//!
//! Processor time is that of the whole machine (all but idle time), so kernel threads count, and so
//! does whoever asks for the I/O; the daemon's own is told beside it.

use std::fs;

use braidfs_tests::daemon::Daemon;
use braidfs_tests::report::{DeviceTotals, number};
use braidfs_tests::volume::MIB;
use serde::Serialize;
use serde_json::Value;

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Bytes moved.
    pub bytes: f64,
    /// Requests, files...
    pub operations: f64,
    /// In so many seconds.
    pub secs: f64,
    /// Half of the operations took at most so long.
    pub p50_us: Option<f64>,
    /// 99 of 100 did.
    pub p99_us: Option<f64>,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Bytes in a second.
    BytesPerSecond,
    /// Operations in a second.
    PerSecond,
    /// Seconds: less is better.
    Seconds,
}

impl Unit {
    /// Behind a number with its prefix.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::BytesPerSecond => "B/s",
            Self::PerSecond => "/s",
            Self::Seconds => "s",
        }
    }
}

/// What one row of one workload gave for one peer in one round.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    pub media: String,
    pub workload: String,
    pub row: String,
    pub peer: String,
    pub round: usize,
    pub unit: Unit,
    pub value: f64,
    #[serde(flatten)]
    pub cost: Cost,
}

/// What it cost. Nothing is told that could not be measured.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cost {
    pub secs: f64,
    pub bytes: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    /// Processor seconds of the machine, and for each 10^9 bytes.
    pub cpu_secs: f64,
    pub cpu_secs_per_gb: Option<f64>,
    /// Of the daemon alone.
    pub daemon_cpu_secs: Option<f64>,
    /// The most memory the daemon had resident meanwhile; of braidfs's, how much it may have.
    pub daemon_peak_bytes: Option<u64>,
    pub daemon_allowed_bytes: Option<u64>,
    /// Of braidfs: bytes of a device request on average, kiobufs in it.
    pub request_bytes: Option<f64>,
    pub kiobufs_per_request: Option<f64>,
}

/// Counters at one moment.
#[derive(Clone, Debug)]
pub struct Counters {
    cpu_ticks: u64,
    daemon_ticks: Option<u64>,
    devices: Option<DeviceTotals>,
    allowed_bytes: Option<u64>,
}

/// What a daemon may have resident beside its cache.
const FIXED_BYTES: u64 = 128 * MIB;
/// And for each inode that the kernel remembers.
const INODE_BYTES: u64 = 300;
/// What the kernel counts processor time in, per second (USER_HZ, fixed for user space).
const TICKS_PER_SEC: f64 = 100.0;
/// Fewer device requests than this say nothing about their size.
const REQUESTS_MIN: u64 = 8;

impl Counters {
    /// Reads them; `stats` is what `braidfs stats --json` says, `inodes` what the kernel remembers
    /// of the mount.
    pub fn read(daemon: Option<Daemon>, stats: Option<&Value>, inodes: u64) -> Self {
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        Self {
            cpu_ticks: busy_ticks(&stat).unwrap_or(0),
            daemon_ticks: daemon.and_then(|daemon| {
                let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid)).ok()?;
                process_ticks(&stat)
            }),
            devices: stats.map(|stats| {
                let [read, write] = ["read", "write"].map(|way| DeviceTotals::of(stats, way));
                DeviceTotals {
                    requests: read.requests + write.requests,
                    bytes: read.bytes + write.bytes,
                    kiobufs: read.kiobufs + write.kiobufs,
                }
            }),
            allowed_bytes: stats.map(|stats| {
                number(stats, "/cache/size_bytes") + FIXED_BYTES + INODE_BYTES * inodes
            }),
        }
    }

    /// What was spent between two readings for some work.
    pub fn cost(&self, later: &Self, work: &Work, daemon: Option<Daemon>) -> Cost {
        let secs_of = |ticks: u64| ticks as f64 / TICKS_PER_SEC;
        let cpu_secs = secs_of(later.cpu_ticks.saturating_sub(self.cpu_ticks));
        let daemon_ticks = self.daemon_ticks.zip(later.daemon_ticks);
        let devices = self.devices.zip(later.devices);
        let devices = devices.map(|(earlier, later)| later.since(earlier));
        let devices = devices.filter(|devices| devices.requests >= REQUESTS_MIN);
        let mean = |sum: u64, count: u64| sum as f64 / count as f64;
        Cost {
            secs: work.secs,
            bytes: work.bytes,
            p50_us: work.p50_us,
            p99_us: work.p99_us,
            cpu_secs,
            cpu_secs_per_gb: (work.bytes > 0.0).then(|| cpu_secs / (work.bytes / 1e9)),
            daemon_cpu_secs: daemon_ticks
                .map(|(earlier, later)| secs_of(later.saturating_sub(earlier))),
            daemon_peak_bytes: daemon
                .filter(|it| it.is_alive())
                .map(Daemon::peak_rss_bytes),
            daemon_allowed_bytes: later.allowed_bytes,
            request_bytes: devices.map(|it| mean(it.bytes, it.requests)),
            kiobufs_per_request: devices.map(|it| mean(it.kiobufs, it.requests)),
        }
    }
}

/// All time that was not idle: user, nice, system, irq, softirq, steal. Waiting for a disk is idle.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    let busy = [0, 1, 2, 5, 6].map(|index| numbers.get(index).copied());
    busy.into_iter().sum()
}

/// Inodes of FUSE mounts that the kernel remembers, from its slab statistics.
pub fn fuse_inodes() -> u64 {
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    let line = slabs
        .lines()
        .find_map(|line| line.strip_prefix("fuse_inode "));
    let count = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    count.unwrap_or(0)
}

/// User and system time of a process, with its threads.
fn process_ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything.
    let rest = &stat[stat.rfind(')')? + 2..];
    let mut fields = rest.split(' ').skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_time_do_not_count() {
        let stat = "cpu  1 2 4 1000 2000 8 16 32 64 64\ncpu0 9 9 9 9\n";
        assert_eq!(busy_ticks(stat), Some(1 + 2 + 4 + 8 + 16));
        assert_eq!(busy_ticks("intr 1"), None);
    }

    #[test]
    fn a_process_may_have_any_name() {
        let stat = "7 (a) b) R 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0 1 0 5\n";
        assert_eq!(process_ticks(stat), Some(42));
        assert_eq!(process_ticks("7 (a"), None);
    }
}
