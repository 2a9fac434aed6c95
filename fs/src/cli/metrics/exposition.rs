//! The counters in Prometheus' text format, version 0.0.4.
//!
//! Names begin with `braidfs_` and stay as they are from version to version; units are seconds and
//! bytes; what only grows ends in `_total`. Each sample says where the file system is mounted and
//! its UUID. Histograms have the same buckets whatever was counted: powers of two.

use std::fmt::Write;

use braidfs_blockdev::{BLOCK_SIZE, DirectionStats, Histogram, QueueStats};

use crate::fuse::Sample;

/// A page of the cache, in bytes.
const PAGE: u64 = BLOCK_SIZE;

/// Buckets of requests: up to 2^24 us (17 s).
const REQUEST_BUCKETS: std::ops::RangeInclusive<u32> = 0..=24;

/// Buckets of devices: 2^12 ns (4 us) to 2^34 ns (17 s).
const DEVICE_BUCKETS: std::ops::RangeInclusive<u32> = 12..=34;

struct Out {
    text: String,
    /// Labels that each sample has.
    common: String,
}

#[derive(Clone, Copy)]
enum Kind {
    Gauge,
    Counter,
    Histogram,
}

/// Labels that some samples have: names and values.
type Labels<'a> = &'a [(&'a str, &'a str)];

impl Out {
    fn family(&mut self, kind: Kind, name: &str, help: &str) {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
            Kind::Histogram => "histogram",
        };
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        self.text.write_fmt(line).unwrap_or_default();
        self.text.push('\n');
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: f64) {
        let mut all = self.common.clone();
        for (name, value) in labels {
            all.push_str(&label(name, value));
        }
        self.line(format_args!(
            "{name}{{{}}} {value}",
            all.trim_end_matches(',')
        ));
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(Kind::Gauge, name, help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.family(Kind::Counter, name, help);
        self.sample(name, &[], value);
    }

    /// A histogram whose values are so many to the second.
    fn histogram(
        &mut self,
        name: &str,
        labels: Labels<'_>,
        histogram: &Histogram,
        buckets: std::ops::RangeInclusive<u32>,
        per_second: f64,
    ) {
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        let mut next = 0;
        for shift in buckets {
            let end = usize::try_from(shift).unwrap_or(usize::MAX);
            let part = histogram.buckets.iter().take(end + 1).skip(next);
            below += part.sum::<u64>();
            next = end + 1;
            let bound = real(1 << shift) / per_second;
            let le = bound.to_string();
            let with_bound: Vec<_> = labels.iter().copied().chain([("le", &*le)]).collect();
            self.sample(&bucket, &with_bound, real(below));
        }
        let with_bound: Vec<_> = labels.iter().copied().chain([("le", "+Inf")]).collect();
        self.sample(&bucket, &with_bound, real(histogram.count));
        let sum = real(histogram.sum) / per_second;
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, real(histogram.count));
    }
}

fn real(number: u64) -> f64 {
    // Counts of less than 2^53, which are exact.
    number as f64
}

fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    format!("{name}=\"{}\",", value.replace('\n', "\\n"))
}

/// All metrics of a mount.
pub fn text(sample: &Sample, mount_point: &str) -> String {
    let common = label("mountpoint", mount_point) + &label("uuid", &sample.uuid);
    let text = String::with_capacity(64 << 10);
    let mut out = Out { text, common };
    mount(&mut out, sample);
    requests(&mut out, sample);
    cache(&mut out, sample);
    core(&mut out, sample);
    volume(&mut out, sample);
    for device in DEVICE_FAMILIES {
        device(&mut out, &sample.fs.volume.devices);
    }
    process(&mut out);
    out.text
}

fn mount(out: &mut Out, sample: &Sample) {
    let name = "braidfs_build_info";
    out.family(
        Kind::Gauge,
        name,
        "The version that serves the mount; always 1.",
    );
    out.sample(name, &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    let flag = |set: bool| f64::from(u8::from(set));
    let up = real(sample.at_us) / 1e6;
    out.gauge("braidfs_uptime_seconds", "Time since it was mounted.", up);
    let help = "1 while nothing can be written, be it by its options or since a commit failed.";
    out.gauge("braidfs_read_only", help, flag(sample.fs.read_only));
    let help = "1 while changes wait for a thaw.";
    out.gauge("braidfs_frozen", help, flag(sample.frozen));
}

fn requests(out: &mut Out, sample: &Sample) {
    let name = "braidfs_request_duration_seconds";
    let help = "Time from reading a request of the kernel to its answer.";
    out.family(Kind::Histogram, name, help);
    for each in &sample.requests {
        let labels = [("op", each.op)];
        out.histogram(name, &labels, &each.latency_us, REQUEST_BUCKETS, 1e6);
    }
    let name = "braidfs_request_errors_total";
    out.family(
        Kind::Counter,
        name,
        "Requests that were answered with an error.",
    );
    for each in &sample.requests {
        out.sample(name, &[("op", each.op)], real(each.errors));
    }
    let oldest = sample.slowest.first().map_or(0, |slow| slow.age_us);
    let gauges = [
        (
            "braidfs_requests_in_flight",
            "Requests read and not answered.",
            real(sample.in_flight),
        ),
        (
            "braidfs_oldest_request_age_seconds",
            "How long the oldest unanswered request has waited.",
            real(oldest) / 1e6,
        ),
        (
            "braidfs_open_files",
            "Files that are open.",
            real(sample.open_files),
        ),
    ];
    gauges
        .iter()
        .for_each(|(name, help, value)| out.gauge(name, help, *value));
    let bytes = real(sample.read_bytes);
    out.counter("braidfs_read_bytes_total", "Bytes read from files.", bytes);
    let bytes = real(sample.write_bytes);
    out.counter(
        "braidfs_written_bytes_total",
        "Bytes written to files.",
        bytes,
    );
}

fn cache(out: &mut Out, sample: &Sample) {
    let cache = &sample.fs.cache;
    let gauges = [
        (
            "braidfs_cache_size_bytes",
            "Memory that the page cache may use.",
            cache.size_bytes,
        ),
        (
            "braidfs_cache_free_bytes",
            "Memory of the page cache that is free.",
            cache.free_bytes,
        ),
        (
            "braidfs_cache_dirty_bytes",
            "Data that is to be written.",
            cache.dirty_bytes,
        ),
        (
            "braidfs_cache_writeback_bytes",
            "Data that is being written.",
            cache.writeback_bytes,
        ),
    ];
    gauges
        .iter()
        .for_each(|(name, help, value)| out.gauge(name, help, real(*value)));
    let counters = [
        (
            "braidfs_cache_hits_total",
            "Reads answered from the cache alone.",
            cache.hits,
        ),
        (
            "braidfs_cache_misses_total",
            "Reads that waited for a device.",
            cache.misses,
        ),
        (
            "braidfs_cache_evicted_bytes_total",
            "Pages evicted.",
            cache.evicted_pages * PAGE,
        ),
        (
            "braidfs_cache_readahead_bytes_total",
            "Pages read ahead of readers.",
            cache.readahead_issued_pages * PAGE,
        ),
        (
            "braidfs_cache_readahead_used_bytes_total",
            "Pages read ahead that were used.",
            cache.readahead_used_pages * PAGE,
        ),
        (
            "braidfs_cache_readahead_wasted_bytes_total",
            "Pages read ahead that were evicted unused.",
            cache.readahead_wasted_pages * PAGE,
        ),
        (
            "braidfs_checksum_errors_total",
            "Blocks that failed their checksum.",
            cache.crc_errors,
        ),
        (
            "braidfs_checksum_errors_repaired_total",
            "Blocks that failed their checksum, and whose other copy did not.",
            cache.crc_repaired,
        ),
        (
            "braidfs_cache_read_errors_total",
            "Reads into the cache that failed.",
            cache.read_errors,
        ),
        (
            "braidfs_cache_write_errors_total",
            "Writes from it that failed.",
            cache.write_errors,
        ),
    ];
    counters
        .iter()
        .for_each(|(name, help, value)| out.counter(name, help, real(*value)));
    let help = "Time that writers were held back, as too much was dirty.";
    let seconds = real(cache.throttled_ns) / 1e9;
    out.counter("braidfs_cache_throttled_seconds_total", help, seconds);
}

fn core(out: &mut Out, sample: &Sample) {
    let (fs, txg) = (&sample.fs, &sample.fs.txg);
    let counters = [
        ("braidfs_commits_total", "Commits.", txg.commits),
        (
            "braidfs_commit_failures_total",
            "Commits that failed.",
            txg.failures,
        ),
        (
            "braidfs_commit_refusals_total",
            "Commits not begun, since a device did not answer.",
            txg.refusals,
        ),
        (
            "braidfs_commit_waiters_total",
            "Callers that waited for a commit.",
            txg.waiters,
        ),
        (
            "braidfs_metadata_bad_copies_total",
            "Copies of metadata that were damaged or could not be read.",
            fs.metadata.bad_copies,
        ),
        (
            "braidfs_metadata_repaired_copies_total",
            "Copies of metadata that were written again.",
            fs.metadata.repaired_copies,
        ),
        (
            "braidfs_metadata_lost_blocks_total",
            "Blocks of metadata without any good copy.",
            fs.metadata.lost_blocks,
        ),
    ];
    counters
        .iter()
        .for_each(|(name, help, value)| out.counter(name, help, real(*value)));
    let seconds = real(txg.commit_us_total) / 1e6;
    out.counter(
        "braidfs_commit_seconds_total",
        "Time spent in commits.",
        seconds,
    );
    let help = "Time in which operations waited for commits to begin.";
    let seconds = real(txg.gate_us_total) / 1e6;
    out.counter("braidfs_commit_gate_seconds_total", help, seconds);
    let space = &fs.space;
    let size = (space.chunk_blocks + space.unallocated_blocks) * BLOCK_SIZE;
    let free = (space.free_blocks + space.unallocated_blocks)
        .saturating_sub(space.reserved_blocks)
        .saturating_add(space.pending_blocks)
        * BLOCK_SIZE;
    let gauges = [
        ("braidfs_size_bytes", "Space for data.", size),
        (
            "braidfs_free_bytes",
            "Space for data that is not used.",
            free,
        ),
        (
            "braidfs_inodes_in_memory",
            "Inodes in memory.",
            fs.inodes_in_memory,
        ),
        (
            "braidfs_scrub_found",
            "Bad copies and blocks that the last scrub found.",
            fs.scrub.found,
        ),
        (
            "braidfs_scrub_left",
            "Those of them that are still bad.",
            fs.scrub.left,
        ),
        (
            "braidfs_scrub_end_timestamp_seconds",
            "When the last scrub ended, or was last heard of; 0 if there was none.",
            fs.scrub.ended_unix,
        ),
    ];
    gauges
        .iter()
        .for_each(|(name, help, value)| out.gauge(name, help, real(*value)));
}

fn volume(out: &mut Out, sample: &Sample) {
    let volume = &sample.fs.volume;
    let counters = [
        (
            "braidfs_kiobufs_total",
            "kiobufs submitted.",
            volume.kiobufs,
        ),
        (
            "braidfs_kiobuf_bytes_total",
            "Bytes of these kiobufs.",
            volume.kiobuf_bytes,
        ),
        (
            "braidfs_kiobuf_splits_total",
            "Cuts of kiobufs at borders.",
            volume.splits,
        ),
        (
            "braidfs_kiobuf_merges_total",
            "Pieces of kiobufs that joined a device request.",
            volume.back_merges + volume.front_merges,
        ),
        (
            "braidfs_mirror_retries_total",
            "Reads that took the other copy.",
            volume.mirror_retries,
        ),
    ];
    counters
        .iter()
        .for_each(|(name, help, value)| out.counter(name, help, real(*value)));
}

/// Name, help, and value of what each device has once.
type DeviceNumber = (&'static str, &'static str, fn(&QueueStats) -> u64);

type DeviceFamily = fn(&mut Out, &[QueueStats]);

/// A family's samples must stand together, so each goes through all devices.
const DEVICE_FAMILIES: [DeviceFamily; 4] = [
    device_latency,
    device_counters,
    device_totals,
    device_gauges,
];

fn device_latency(out: &mut Out, devices: &[QueueStats]) {
    let name = "braidfs_device_request_duration_seconds";
    let help = "Time from giving a request to a device to its end.";
    out.family(Kind::Histogram, name, help);
    for device in devices {
        let histograms = [
            ("read", &device.read.latency_ns),
            ("write", &device.write.latency_ns),
            ("flush", &device.flush_latency_ns),
        ];
        for (op, histogram) in histograms {
            let labels = [("device", &*device.name), ("op", op)];
            out.histogram(name, &labels, histogram, DEVICE_BUCKETS, 1e9);
        }
    }
}

fn device_counters(out: &mut Out, devices: &[QueueStats]) {
    type Field = fn(&DirectionStats) -> u64;
    let families: [(&str, &str, Field); 3] = [
        ("braidfs_device_bytes_total", "Bytes transferred.", |d| {
            d.bytes
        }),
        (
            "braidfs_device_request_errors_total",
            "Requests that failed as a whole or in part.",
            |d| d.errors,
        ),
        (
            "braidfs_device_request_kiobufs_total",
            "kiobufs that the requests carried.",
            |d| d.kiobufs_per_request.sum,
        ),
    ];
    for (name, help, field) in families {
        out.family(Kind::Counter, name, help);
        for device in devices {
            for (op, direction) in [("read", &device.read), ("write", &device.write)] {
                let labels = [("device", &*device.name), ("op", op)];
                out.sample(name, &labels, real(field(direction)));
            }
        }
    }
}

fn device_totals(out: &mut Out, devices: &[QueueStats]) {
    let families: [DeviceNumber; 2] = [
        (
            "braidfs_device_timeouts_total",
            "Requests that the device did not answer in time.",
            |d| d.timed_out,
        ),
        (
            "braidfs_device_retries_total",
            "Merged requests that failed and were tried again piece by piece.",
            |d| d.piecewise_retries,
        ),
    ];
    of_each(out, Kind::Counter, &families, devices);
}

fn device_gauges(out: &mut Out, devices: &[QueueStats]) {
    let families: [DeviceNumber; 3] = [
        (
            "braidfs_device_requests_in_flight",
            "Requests with the device.",
            |d| d.in_flight,
        ),
        (
            "braidfs_device_requests_queued",
            "Requests that wait for the device.",
            |d| d.queued,
        ),
        (
            "braidfs_device_silent",
            "1 while the device does not answer.",
            |d| u64::from(d.silent),
        ),
    ];
    of_each(out, Kind::Gauge, &families, devices);
}

fn of_each(out: &mut Out, kind: Kind, families: &[DeviceNumber], devices: &[QueueStats]) {
    for (name, help, field) in families {
        out.family(kind, name, help);
        for device in devices {
            out.sample(name, &[("device", &*device.name)], real(field(device)));
        }
    }
}

/// The daemon itself.
fn process(out: &mut Out) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| {
        let kib = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()
    });
    let help = "Memory that the daemon has resident.";
    let bytes = real(resident.unwrap_or(0) << 10);
    out.gauge("braidfs_process_resident_memory_bytes", help, bytes);
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let micros = getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| {
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
    });
    let seconds = real(u64::try_from(micros).unwrap_or(0)) / 1e6;
    let help = "Processor time that the daemon used.";
    out.counter("braidfs_process_cpu_seconds_total", help, seconds);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn out() -> Out {
        Out {
            text: String::new(),
            common: label("mountpoint", "/a \"b\"\\\n"),
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut out = out();
        out.gauge("braidfs_x", "Help.", 1.5);
        assert_eq!(
            out.text,
            "# HELP braidfs_x Help.\n# TYPE braidfs_x gauge\n\
             braidfs_x{mountpoint=\"/a \\\"b\\\"\\\\\\n\"} 1.5\n"
        );
    }

    #[test]
    fn buckets_add_up() {
        let mut histogram = Histogram::default();
        for value in [0, 1, 5, 5, 1 << 40] {
            histogram.add(value);
        }
        let mut out = out();
        out.histogram("h", &[("op", "read")], &histogram.trimmed(), 1..=3, 1e6);
        let found: Vec<(&str, &str)> = out
            .text
            .lines()
            .filter_map(|line| {
                let (name, rest) = line.split_once('{')?;
                let value = rest.rsplit(' ').next()?;
                let le = rest
                    .split("le=\"")
                    .nth(1)
                    .and_then(|le| le.split('"').next());
                Some((le.unwrap_or(name), value))
            })
            .collect();
        assert_eq!(
            found,
            [
                ("0.000002", "2"),
                ("0.000004", "2"),
                ("0.000008", "4"),
                ("+Inf", "5"),
                ("h_sum", "1099511.627787"),
                ("h_count", "5"),
            ]
        );
    }
}
