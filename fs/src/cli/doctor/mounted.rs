//! Checks of a mount, of its daemon, and of what the kernel allows them.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use super::Finding;
use crate::cli::control::{self, Patience};
use crate::cli::size::format_size;
use crate::fuse::READ_AHEAD_KB;
use crate::fuse::mounts::MountEntry;

/// Below this part of its room a volume is nearly full.
const ROOM_PART: u64 = 20;

/// One request of FUSE, in pages.
const REQUEST_PAGES: u64 = 256;

/// All checks, and the members that the daemon names.
pub fn examine(entry: &MountEntry) -> (Vec<PathBuf>, Vec<Finding>) {
    let place = entry.mount_point.display().to_string();
    let gone = [Errno::ENOTCONN, Errno::ECONNABORTED];
    if statvfs(&entry.mount_point).is_err_and(|error| gone.contains(&error)) {
        let seen = "its daemon is gone: every access fails".to_owned();
        let mend = format!("umount {place}; braidfs mount {place}");
        return (
            Vec::new(),
            vec![Finding::weakens("dead", place, seen, mend)],
        );
    }
    let stream = control::connect(entry);
    let stats = stream
        .as_ref()
        .and_then(|stream| control::ask(stream, "stats", Patience::Short).ok()?.ok())
        .and_then(|line| serde_json::from_str::<Value>(&line).ok());
    let (Some(stream), Some(stats)) = (stream, stats) else {
        let seen = "its daemon cannot be asked; is it yours?".to_owned();
        let mend = format!("sudo braidfs doctor {place}");
        return (
            Vec::new(),
            vec![Finding::weakens("silent", place, seen, mend)],
        );
    };
    let mut findings = Vec::new();
    findings.extend(room(entry, &place));
    findings.extend(gone_read_only(entry, &place, &stats));
    findings.extend(scrub(&place, &stats));
    findings.extend(locked_memory(&place, &stats, &stream));
    findings.extend(read_ahead(entry, &place, &stats));
    findings.extend(request_size(&place, "/proc/sys/fs/fuse/max_pages_limit"));
    let devices = stats.pointer("/volume/devices").and_then(Value::as_array);
    let devices = devices.map_or(&[][..], Vec::as_slice);
    for device in devices {
        findings.extend(errors(&place, device));
        findings.extend(backend(&place, device));
    }
    let name = |device: &Value| device["name"].as_str().map(PathBuf::from);
    (devices.iter().filter_map(name).collect(), findings)
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn room(entry: &MountEntry, place: &str) -> Option<Finding> {
    let stat = statvfs(&entry.mount_point).ok()?;
    let left = stat.blocks_available();
    (left < stat.blocks() / ROOM_PART).then(|| {
        let left = format_size(left.saturating_mul(stat.fragment_size()));
        let seen =
            format!("is nearly full: {left} are left; what is written next has no long runs");
        Finding::slows(
            "full",
            place,
            seen,
            format!("du -xh {place} | sort -h | tail"),
        )
    })
}

fn gone_read_only(entry: &MountEntry, place: &str, stats: &Value) -> Option<Finding> {
    let for_writing = entry.super_options.split(',').any(|option| option == "rw");
    (stats["read_only"] == true && for_writing && number(stats, "/txg/failures") > 0).then(|| {
        let seen = "has become read-only: a commit failed; the log names the device".to_owned();
        Finding::weakens(
            "read-only",
            place,
            seen,
            format!("umount {place}; braidfs mount {place}"),
        )
    })
}

fn scrub(place: &str, stats: &Value) -> Option<Finding> {
    let left = number(stats, "/scrub/left");
    let bad = number(stats, "/cache/crc_errors") + number(stats, "/metadata/lost_blocks");
    let state = stats.pointer("/scrub/state").and_then(Value::as_str);
    if left + bad > 0 {
        let seen = format!("{left} errors that a scrub left, {bad} blocks that were read damaged");
        let mend = format!("braidfs scrub {place}");
        return Some(Finding::weakens("damage", place, seen, mend));
    }
    matches!(state, Some("paused" | "interrupted")).then(|| {
        let seen = "a scrub was begun and not finished".to_owned();
        Finding::weakens(
            "scrub",
            place,
            seen,
            format!("braidfs scrub --resume {place}"),
        )
    })
}

/// Pieces of the cache that cannot be registered with the ring are mapped anew by each request.
fn locked_memory(place: &str, stats: &Value, stream: &UnixStream) -> Option<Finding> {
    let peer = getsockopt(stream, PeerCredentials).ok()?;
    let limits = fs::read_to_string(format!("/proc/{}/limits", peer.pid())).ok()?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    let cache = number(stats, "/cache/size_bytes");
    (peer.uid() != 0 && limit < cache).then(|| {
        let seen = format!(
            "its daemon may lock {} of memory, less than its cache of {}",
            format_size(limit),
            format_size(cache)
        );
        let mend = "ulimit -l unlimited before mounting (limits.conf(5), LimitMEMLOCK=)".to_owned();
        Finding::slows("locked-memory", place, seen, mend)
    })
}

fn read_ahead(entry: &MountEntry, place: &str, stats: &Value) -> Option<Finding> {
    let (major, minor) = entry.dev;
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    let kib: u32 = fs::read_to_string(&path).ok()?.trim().parse().ok()?;
    let by_kernel = stats.pointer("/fuse/cache_mode").and_then(Value::as_str) != Some("direct_io");
    (by_kernel && kib < READ_AHEAD_KB).then(|| {
        let seen = format!("the kernel reads {kib} KiB ahead: streams wait for the devices");
        Finding::slows(
            "read-ahead",
            place,
            seen,
            format!("echo {READ_AHEAD_KB} > {path}"),
        )
    })
}

fn request_size(place: &str, path: &str) -> Option<Finding> {
    let pages: u64 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    (pages < REQUEST_PAGES).then(|| {
        let seen = format!("the kernel's limit for requests of FUSE is {pages} pages");
        let mend = format!("sysctl fs.fuse.max_pages_limit={REQUEST_PAGES}, then mount again");
        Finding::slows("request-size", place, seen, mend)
    })
}

fn errors(place: &str, device: &Value) -> Option<Finding> {
    let name = device["name"].as_str()?;
    let failed = number(device, "/read/errors") + number(device, "/write/errors");
    let late = number(device, "/timed_out");
    (failed + late > 0 || device["silent"] == true).then(|| {
        let seen = format!("{failed} requests failed, {late} were not answered in time");
        let mend = format!("smartctl -a {name}; braidfs scrub {place}");
        Finding::weakens("errors", name, seen, mend)
    })
}

fn backend(place: &str, device: &Value) -> Option<Finding> {
    let (name, backend) = (device["name"].as_str()?, device["backend"].as_str()?);
    if !backend.contains("io_uring") {
        let allowed = fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
        let mend = match allowed.as_deref().map(str::trim) {
            Ok("1" | "2") => "sysctl kernel.io_uring_disabled=0, then mount again".to_owned(),
            _ => format!("umount {place}; mount it without backend=threads"),
        };
        let seen = format!("is driven by threads, not by io_uring ({backend})");
        return Some(Finding::slows("threads", name, seen, mend));
    }
    (!backend.contains("O_DIRECT")).then(|| {
        let seen = "goes through the kernel's cache: everything is in memory twice".to_owned();
        let mend = format!("umount {place}; mount it without nodirect");
        Finding::slows("cached", name, seen, mend)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_test_cannot_provoke_on_a_real_mount() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("max_pages_limit");
        let path = path.to_str().unwrap();
        assert_eq!(request_size("/m", path), None);
        fs::write(path, "32\n").unwrap();
        assert_eq!(request_size("/m", path).unwrap().check, "request-size");
        fs::write(path, "256\n").unwrap();
        assert_eq!(request_size("/m", path), None);

        let device = |errors: u64, late: u64, silent: bool| {
            json!({ "name": "/d/0", "read": { "errors": 0 }, "write": { "errors": errors },
                "timed_out": late, "silent": silent })
        };
        assert_eq!(errors("/m", &device(0, 0, false)), None);
        for device in [device(1, 0, false), device(0, 1, false), device(0, 0, true)] {
            assert_eq!(errors("/m", &device).unwrap().check, "errors");
        }

        let clean = json!({ "scrub": { "left": 0, "state": "finished" } });
        assert_eq!(scrub("/m", &clean), None);
        let left = json!({ "scrub": { "left": 2, "state": "finished" } });
        assert_eq!(scrub("/m", &left).unwrap().check, "damage");
    }
}
