//! What a mounted file system did in an interval: the difference of two samples of its counters.
//!
//! Shown by `stats --interval` and `top`. A percentile is the upper bound of its power of two.

use std::path::Path;

use braidfs_blockdev::Histogram;
use serde::{Deserialize, Serialize};

use super::size::format_size;
use super::table::{grid, time};

/// What a daemon answers to `sample`, as far as it is used here.
#[derive(Clone, Debug, Deserialize)]
pub struct Sample {
    /// Microseconds since it was mounted.
    pub at_us: u64,
    frozen: bool,
    open_files: u64,
    in_flight: u64,
    read_bytes: u64,
    write_bytes: u64,
    requests: Vec<Request>,
    slowest: Vec<Slow>,
    fs: Core,
}

#[derive(Clone, Debug, Deserialize)]
struct Request {
    op: String,
    errors: u64,
    latency_us: Histogram,
}

/// A request that waits for its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Slow {
    /// What it asks for.
    pub op: String,
    /// Inode that it is about.
    pub ino: u64,
    /// Who waits.
    pub pid: u32,
    /// The name of that process.
    pub process: String,
    /// For how long, in microseconds.
    pub age_us: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Core {
    cache: Cache,
    volume: Volume,
}

#[derive(Clone, Debug, Deserialize)]
struct Cache {
    size_bytes: u64,
    free_bytes: u64,
    dirty_bytes: u64,
    writeback_bytes: u64,
    hits: u64,
    misses: u64,
    readahead_issued_pages: u64,
    readahead_used_pages: u64,
    readahead_wasted_pages: u64,
    throttled_ns: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Volume {
    devices: Vec<Device>,
}

#[derive(Clone, Debug, Deserialize)]
struct Device {
    name: String,
    read: Direction,
    write: Direction,
    flushes: u64,
    in_flight: u64,
    queued: u64,
    silent: bool,
}

#[derive(Clone, Debug, Deserialize)]
struct Direction {
    requests: u64,
    bytes: u64,
    errors: u64,
    latency_ns: Histogram,
}

/// One interval.
#[derive(Clone, Debug, Serialize)]
pub struct Interval {
    /// Its length.
    pub seconds: f64,
    /// Whether changes wait for a thaw, at its end.
    pub frozen: bool,
    /// Requests of the kernel.
    pub fuse: Fuse,
    /// The page cache.
    pub cache: CacheRates,
    /// Each member.
    pub devices: Vec<DeviceRates>,
    /// The requests that have waited for the longest time at its end, the oldest first.
    pub slowest: Vec<Slow>,
}

/// Requests of the kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Fuse {
    /// All of them.
    pub requests_per_s: f64,
    /// Read, and not answered yet.
    pub in_flight: u64,
    /// Files that are open.
    pub open_files: u64,
    /// Bytes read from files.
    pub read_bytes_per_s: f64,
    /// Bytes written to files.
    pub write_bytes_per_s: f64,
    /// By kind, those that came in the interval.
    pub requests: Vec<OpRates>,
}

/// Requests of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct OpRates {
    /// Which.
    pub op: String,
    /// How many.
    pub per_s: f64,
    /// Those that failed.
    pub errors_per_s: f64,
    /// Mean time to the answer.
    pub mean_us: u64,
    /// Half of them took less.
    pub p50_us: u64,
    /// All but one in a hundred took less.
    pub p99_us: u64,
}

/// The page cache.
#[derive(Clone, Debug, Serialize)]
pub struct CacheRates {
    /// Reads that needed no device, in percent; none if nothing was read.
    pub hit_percent: Option<f64>,
    /// Reads.
    pub reads_per_s: f64,
    /// Memory that it may use.
    pub size_bytes: u64,
    /// Of that, free.
    pub free_bytes: u64,
    /// To be written.
    pub dirty_bytes: u64,
    /// Being written.
    pub writeback_bytes: u64,
    /// Read ahead of readers.
    pub readahead_bytes_per_s: f64,
    /// How much of what was read ahead was used, in percent; none if nothing was decided.
    pub readahead_used_percent: Option<f64>,
    /// How long writers were held back: 100 is one of them all the time.
    pub throttled_percent: f64,
}

/// One member.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceRates {
    /// Its name.
    pub name: String,
    /// Requests.
    pub reads_per_s: f64,
    /// Requests.
    pub writes_per_s: f64,
    /// Bytes.
    pub read_bytes_per_s: f64,
    /// Bytes.
    pub write_bytes_per_s: f64,
    /// Mean size of a request; 0 if there was none.
    pub request_bytes: u64,
    /// With the device now.
    pub in_flight: u64,
    /// Waiting in its queue now.
    pub queued: u64,
    /// Mean time from dispatch to completion.
    pub latency_ns: u64,
    /// All but one in a hundred took less.
    pub latency_p99_ns: u64,
    /// Flushes.
    pub flushes_per_s: f64,
    /// Requests that failed, in all or in part.
    pub errors_per_s: f64,
    /// It does not answer.
    pub silent: bool,
}

const PAGE: u64 = 4096;

fn real(number: u64) -> f64 {
    // Counts of less than 2^53, which are exact.
    number as f64
}

fn percent(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| 100.0 * real(part) / real(whole))
}

impl Interval {
    /// What happened from `old` to `new`.
    pub fn between(old: &Sample, new: &Sample) -> Self {
        let micros = new.at_us.saturating_sub(old.at_us).max(1);
        let seconds = real(micros) / 1e6;
        let rate = |new: u64, old: u64| real(new.saturating_sub(old)) / seconds;
        let mut requests: Vec<OpRates> = Vec::new();
        for new in &new.requests {
            let before = old.requests.iter().find(|old| old.op == new.op);
            let (errors, latency) = match before {
                Some(old) => (old.errors, new.latency_us.since(&old.latency_us)),
                None => (0, new.latency_us.clone()),
            };
            if latency.count > 0 {
                requests.push(OpRates {
                    op: new.op.clone(),
                    per_s: real(latency.count) / seconds,
                    errors_per_s: rate(new.errors, errors),
                    mean_us: latency.mean(),
                    p50_us: latency.percentile(50),
                    p99_us: latency.percentile(99),
                });
            }
        }
        let devices = new.fs.volume.devices.iter().zip(&old.fs.volume.devices);
        Self {
            seconds,
            frozen: new.frozen,
            slowest: new.slowest.clone(),
            fuse: Fuse {
                requests_per_s: requests.iter().map(|op| op.per_s).sum(),
                in_flight: new.in_flight,
                open_files: new.open_files,
                read_bytes_per_s: rate(new.read_bytes, old.read_bytes),
                write_bytes_per_s: rate(new.write_bytes, old.write_bytes),
                requests,
            },
            cache: CacheRates::between(&old.fs.cache, &new.fs.cache, seconds),
            devices: devices
                .map(|(new, old)| DeviceRates::between(old, new, seconds))
                .collect(),
        }
    }
}

impl CacheRates {
    fn between(old: &Cache, new: &Cache, seconds: f64) -> Self {
        let more = |new: u64, old: u64| new.saturating_sub(old);
        let hits = more(new.hits, old.hits);
        let reads = hits + more(new.misses, old.misses);
        let used = more(new.readahead_used_pages, old.readahead_used_pages);
        let wasted = more(new.readahead_wasted_pages, old.readahead_wasted_pages);
        let ahead = more(new.readahead_issued_pages, old.readahead_issued_pages) * PAGE;
        Self {
            hit_percent: percent(hits, reads),
            reads_per_s: real(reads) / seconds,
            size_bytes: new.size_bytes,
            free_bytes: new.free_bytes,
            dirty_bytes: new.dirty_bytes,
            writeback_bytes: new.writeback_bytes,
            readahead_bytes_per_s: real(ahead) / seconds,
            readahead_used_percent: percent(used, used + wasted),
            throttled_percent: real(more(new.throttled_ns, old.throttled_ns)) / seconds / 1e7,
        }
    }
}

impl DeviceRates {
    fn between(old: &Device, new: &Device, seconds: f64) -> Self {
        let rate = |new: u64, old: u64| real(new.saturating_sub(old)) / seconds;
        let of = |direction: fn(&Device) -> &Direction| (direction(new), direction(old));
        let ((read, read_old), (write, write_old)) = (of(|d| &d.read), of(|d| &d.write));
        let mut latency = read.latency_ns.since(&read_old.latency_ns);
        latency.absorb(&write.latency_ns.since(&write_old.latency_ns));
        let sum = |field: fn(&Direction) -> u64| {
            let (new, old) = (
                field(read) + field(write),
                field(read_old) + field(write_old),
            );
            new.saturating_sub(old)
        };
        let (bytes, requests) = (sum(|d| d.bytes), sum(|d| d.requests));
        Self {
            name: new.name.clone(),
            reads_per_s: rate(read.requests, read_old.requests),
            writes_per_s: rate(write.requests, write_old.requests),
            read_bytes_per_s: rate(read.bytes, read_old.bytes),
            write_bytes_per_s: rate(write.bytes, write_old.bytes),
            request_bytes: bytes.checked_div(requests).unwrap_or(0),
            in_flight: new.in_flight,
            queued: new.queued,
            latency_ns: latency.mean(),
            latency_p99_ns: latency.percentile(99),
            flushes_per_s: rate(new.flushes, old.flushes),
            errors_per_s: real(sum(|d| d.errors)) / seconds,
            silent: new.silent,
        }
    }
}

/// A rate of events.
pub fn count(rate: f64) -> String {
    match rate {
        0.0 => "0".to_owned(),
        ..10.0 => format!("{rate:.1}"),
        _ => format!("{rate:.0}"),
    }
}

/// A rate of bytes.
pub fn bytes(rate: f64) -> String {
    // What is shown has no fractions of a byte.
    format_size(format!("{rate:.0}").parse().unwrap_or(0))
}

/// A time in microseconds.
pub fn micros(us: u64) -> String {
    time(us.saturating_mul(1000))
}

fn share(percent: Option<f64>) -> String {
    percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1} %"))
}

/// Names as they fit into a table: without the directories where that tells them apart.
pub fn short_names(names: &[&str]) -> Vec<String> {
    const LEN_MAX: usize = 18;
    let base = |name: &str| {
        let file = Path::new(name).file_name().unwrap_or_default();
        file.to_string_lossy().into_owned()
    };
    let mut bases: Vec<String> = names.iter().map(|name| base(name)).collect();
    bases.sort();
    bases.dedup();
    let told_apart = bases.len() == names.len();
    let short = |name: &&str| {
        let name = match told_apart {
            true => base(name),
            false => (*name).to_owned(),
        };
        let skip = name.chars().count().saturating_sub(LEN_MAX);
        match skip {
            0 => name,
            _ => format!("..{}", name.chars().skip(skip + 2).collect::<String>()),
        }
    };
    names.iter().map(short).collect()
}

/// Lines of cells: a head, then one for each member.
pub fn device_lines(devices: &[DeviceRates]) -> Vec<Vec<String>> {
    const HEAD: [&str; 10] = [
        "device", "r/s", "w/s", "read/s", "write/s", "request", "now", "queue", "mean", "p99",
    ];
    let names: Vec<&str> = devices.iter().map(|device| &*device.name).collect();
    let mut lines = vec![HEAD.map(str::to_owned).to_vec()];
    for (device, name) in devices.iter().zip(short_names(&names)) {
        let state = match device.silent {
            true => "SILENT".to_owned(),
            false => time(device.latency_ns),
        };
        lines.push(vec![
            name,
            count(device.reads_per_s),
            count(device.writes_per_s),
            bytes(device.read_bytes_per_s),
            bytes(device.write_bytes_per_s),
            format_size(device.request_bytes),
            device.in_flight.to_string(),
            device.queued.to_string(),
            state,
            time(device.latency_p99_ns),
        ]);
    }
    lines
}

/// Lines of cells: a head, then one for each kind of request.
pub fn op_lines(requests: &[OpRates]) -> Vec<Vec<String>> {
    const HEAD: [&str; 6] = ["request", "per s", "errors", "mean", "p50", "p99"];
    let mut lines = vec![HEAD.map(str::to_owned).to_vec()];
    lines.extend(requests.iter().map(|op| {
        vec![
            op.op.clone(),
            count(op.per_s),
            count(op.errors_per_s),
            micros(op.mean_us),
            micros(op.p50_us),
            micros(op.p99_us),
        ]
    }));
    lines
}

/// One line each on the cache, its dirty part, and what is read ahead.
pub fn cache_lines(cache: &CacheRates) -> [String; 2] {
    [
        format!(
            "hits {} of {}/s  size {}  free {}  held back {:.0} %",
            share(cache.hit_percent),
            count(cache.reads_per_s),
            format_size(cache.size_bytes),
            format_size(cache.free_bytes),
            cache.throttled_percent,
        ),
        format!(
            "dirty {}  writeback {}  readahead {}/s, used {}",
            format_size(cache.dirty_bytes),
            format_size(cache.writeback_bytes),
            bytes(cache.readahead_bytes_per_s),
            share(cache.readahead_used_percent),
        ),
    ]
}

/// One line on all requests.
pub fn fuse_line(fuse: &Fuse) -> String {
    format!(
        "{} requests/s  {} now  read {}/s  write {}/s  open files {}",
        count(fuse.requests_per_s),
        fuse.in_flight,
        bytes(fuse.read_bytes_per_s),
        bytes(fuse.write_bytes_per_s),
        fuse.open_files,
    )
}

/// Lines of cells: a head, then one for each request that waits.
pub fn slow_lines(slowest: &[Slow]) -> Vec<Vec<String>> {
    const HEAD: [&str; 5] = ["waiting", "for", "inode", "process", "name"];
    let mut lines = vec![HEAD.map(str::to_owned).to_vec()];
    lines.extend(slowest.iter().map(|slow| {
        // Whatever a process calls itself.
        let process = slow
            .process
            .replace(|char: char| !char.is_ascii_graphic(), "?");
        vec![
            slow.op.clone(),
            micros(slow.age_us),
            slow.ino.to_string(),
            slow.pid.to_string(),
            process,
        ]
    }));
    lines
}

/// An interval as plain text.
pub fn render(interval: &Interval) -> String {
    /// What has waited for less is not worth a line.
    const SLOW_US: u64 = 100_000;
    let frozen = if interval.frozen { ", frozen" } else { "" };
    let mut out = format!("interval {:.1} s{frozen}\n", interval.seconds);
    grid(&mut out, &device_lines(&interval.devices));
    for line in cache_lines(&interval.cache) {
        out.push_str(&format!("  cache: {line}\n"));
    }
    out.push_str(&format!("  fuse: {}\n", fuse_line(&interval.fuse)));
    if !interval.fuse.requests.is_empty() {
        grid(&mut out, &op_lines(&interval.fuse.requests));
    }
    let slow = interval
        .slowest
        .iter()
        .take_while(|slow| slow.age_us >= SLOW_US);
    let slow: Vec<Slow> = slow.cloned().collect();
    if !slow.is_empty() {
        grid(&mut out, &slow_lines(&slow));
    }
    out.push('\n');
    out
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn histogram(values: &[u64]) -> Value {
        let mut histogram = Histogram::default();
        values.iter().for_each(|&value| histogram.add(value));
        serde_json::to_value(histogram).unwrap()
    }

    /// A state of the counters: cache hits, nanoseconds of device reads, microseconds of requests.
    pub fn sample(at_us: u64, hits: u64, reads: &[u64], requests: &[u64]) -> Sample {
        let none = json!({ "requests": 0, "bytes": 0, "errors": 0, "latency_ns": histogram(&[]) });
        let device = json!({
            "name": "/d/a.img", "flushes": 2, "in_flight": 1, "queued": 3, "silent": false,
            "read": { "requests": reads.len(), "bytes": 4096 * reads.len(), "errors": 0,
                      "latency_ns": histogram(reads) },
            "write": none,
        });
        serde_json::from_value(json!({
            "at_us": at_us, "frozen": true, "open_files": 1, "in_flight": 2, "slowest": [
                { "op": "write", "ino": 7, "pid": 9, "process": "a b", "age_us": 2_000_000 },
                { "op": "read", "ino": 8, "pid": 9, "process": "c", "age_us": 20 }],
            "read_bytes": 1000 * hits, "write_bytes": 0,
            "requests": [{ "op": "read", "errors": 0, "latency_us": histogram(requests) }],
            "fs": { "volume": { "devices": [device] }, "cache": {
                "size_bytes": 1 << 20, "free_bytes": 0, "dirty_bytes": 0, "writeback_bytes": 0,
                "hits": hits, "misses": 1, "readahead_issued_pages": 0,
                "readahead_used_pages": 0, "readahead_wasted_pages": 0, "throttled_ns": 0 } },
        }))
        .unwrap()
    }

    #[test]
    fn rates_are_differences_by_time() {
        let old = sample(1_000_000, 10, &[500], &[100_000; 9]);
        let later: Vec<u64> = [vec![100_000; 9], vec![5; 99], vec![300]].concat();
        let new = sample(3_000_000, 110, &[500, 900, 1100], &later);
        let interval = Interval::between(&old, &new);
        let (fuse, device) = (&interval.fuse, &interval.devices[0]);
        assert_eq!((interval.seconds, fuse.requests_per_s), (2.0, 50.0));
        let read = &fuse.requests[0];
        assert_eq!((read.p50_us, read.p99_us, read.mean_us), (8, 8, 7));
        assert_eq!(interval.cache.hit_percent, Some(100.0));
        assert_eq!((device.reads_per_s, device.request_bytes), (1.0, 4096));
        assert_eq!((device.latency_ns, device.latency_p99_ns), (1000, 1100));
        let text = render(&interval);
        for part in [
            "a.img",
            "hits 100.0 % of 50/s",
            "read 48.8 KiB/s",
            "8 us",
            "s, frozen",
            "2 s",
            "a?b",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(
            text.lines().all(|line| line.chars().count() <= 80),
            "{text}"
        );
    }

    #[test]
    fn an_idle_interval_has_no_requests() {
        let sample = sample(5, 10, &[1], &[1]);
        let interval = Interval::between(&sample, &sample);
        assert!(interval.fuse.requests.is_empty());
        assert_eq!(interval.cache.hit_percent, None);
        let text = render(&interval);
        assert!(
            text.contains("hits - of 0/s") && text.contains(" 0 requests/s"),
            "{text}"
        );
    }

    #[test]
    fn names_are_short_where_that_tells_them_apart() {
        assert_eq!(short_names(&["/a/x", "/b/y"]), ["x", "y"]);
        assert_eq!(short_names(&["/a/x", "/b/x"]), ["/a/x", "/b/x"]);
        assert_eq!(
            short_names(&["/dev/a-name-of-24-characters"]),
            ["..of-24-characters"]
        );
    }
}
