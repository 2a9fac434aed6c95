//! What a daemon logs of itself when it gets SIGUSR1: a few lines, for people who have nothing but
//! the log and kill(1).

use braidfs_blockdev::QueueStats;

use super::size::format_size;
use super::table::time;
use crate::fuse::Sample;

/// The lines.
pub fn lines(sample: &Sample) -> Vec<String> {
    let (fs, cache) = (&sample.fs, &sample.fs.cache);
    let state = match (sample.frozen, fs.read_only) {
        (true, _) => ", frozen",
        (_, true) => ", read-only",
        _ => "",
    };
    let requests: u64 = sample
        .requests
        .iter()
        .map(|each| each.latency_us.count)
        .sum();
    let mut lines = vec![
        format!(
            "summary: mounted for {} s{state}; {requests} requests, {} under way; {} read, {} \
             written; {} open files",
            sample.at_us / 1_000_000,
            sample.in_flight,
            format_size(sample.read_bytes),
            format_size(sample.write_bytes),
            sample.open_files,
        ),
        format!(
            "summary: cache {} of at most {}, {} free, {} dirty, {} being written; {} hits, {} \
             misses; {} commits, the longest {}",
            format_size(cache.size_bytes),
            format_size(cache.size_bytes_max),
            format_size(cache.free_bytes),
            format_size(cache.dirty_bytes),
            format_size(cache.writeback_bytes),
            cache.hits,
            cache.misses,
            fs.txg.commits,
            time(fs.txg.commit_us_max.saturating_mul(1000)),
        ),
    ];
    lines.extend(fs.volume.devices.iter().map(device));
    if let Some(slow) = sample.slowest.first() {
        lines.push(format!(
            "summary: the oldest request under way is a {} of inode {} for process {} ({}), {} ago",
            slow.op,
            slow.ino,
            slow.pid,
            slow.process,
            time(slow.age_us.saturating_mul(1000)),
        ));
    }
    lines
}

fn device(device: &QueueStats) -> String {
    let (read, write) = (&device.read, &device.write);
    let silent = if device.silent { ", SILENT" } else { "" };
    format!(
        "summary: {}: read {} in {} requests of {} on average, written {} in {} of {}; {} errors; \
         {} with the device, {} waiting{silent}",
        device.name,
        format_size(read.bytes),
        read.requests,
        time(read.latency_ns.mean()),
        format_size(write.bytes),
        write.requests,
        time(write.latency_ns.mean()),
        read.errors + write.errors,
        device.in_flight,
        device.queued,
    )
}
