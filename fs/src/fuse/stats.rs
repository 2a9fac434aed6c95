//! What the front end counts: requests by opcode with their latency, and bytes by how they went.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use braidfs_blockdev::Histogram;
use serde::Serialize;
use serde_json::{Map, Value};

use super::protocol::Opcode;

/// Latency buckets: bucket n holds requests that took less than 2^n microseconds.
const BUCKETS: usize = 26;

/// Counters of one opcode.
#[derive(Default)]
struct OpcodeStats {
    count: AtomicU64,
    errors: AtomicU64,
    nanos: AtomicU64,
    nanos_max: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

/// All counters of a front end.
pub struct FuseStats {
    opcodes: Vec<OpcodeStats>,
    pub(super) read_bytes: AtomicU64,
    pub(super) write_bytes: AtomicU64,
    pub(super) in_flight: AtomicU64,
}

/// What is known of the requests of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct RequestStats {
    /// Its name.
    pub op: &'static str,
    /// Those of them that failed.
    pub errors: u64,
    /// Microseconds from reading a request to its answer; the sum is exact to the microsecond.
    pub latency_us: Histogram,
}

/// A request that has begun. It is finished with [`FuseStats::end`].
pub(super) struct Timer {
    opcode: Opcode,
    start: Instant,
}

impl Timer {
    /// What was begun, and when.
    pub(super) fn begun(&self) -> (Opcode, Instant) {
        (self.opcode, self.start)
    }
}

impl FuseStats {
    pub(super) fn new() -> Self {
        Self {
            opcodes: Opcode::NAMES
                .iter()
                .map(|_| OpcodeStats::default())
                .collect(),
            read_bytes: AtomicU64::new(0),
            write_bytes: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
        }
    }

    pub(super) fn begin(&self, opcode: Opcode) -> Timer {
        self.in_flight.fetch_add(1, Relaxed);
        Timer {
            opcode,
            start: Instant::now(),
        }
    }

    /// The opcodes that were seen, each with its histogram.
    pub(super) fn by_opcode(&self) -> Vec<RequestStats> {
        let seen = Opcode::NAMES.iter().zip(&self.opcodes);
        let seen = seen.filter(|(_, stats)| stats.count.load(Relaxed) > 0);
        seen.map(|(op, stats)| {
            let buckets: Vec<u64> = stats
                .buckets
                .iter()
                .map(|bucket| bucket.load(Relaxed))
                .collect();
            RequestStats {
                op,
                errors: stats.errors.load(Relaxed),
                latency_us: Histogram {
                    // Of the same moment as the buckets, whatever comes meanwhile.
                    count: buckets.iter().sum(),
                    buckets,
                    sum: stats.nanos.load(Relaxed) / 1000,
                    max: stats.nanos_max.load(Relaxed) / 1000,
                },
            }
        })
        .collect()
    }

    pub(super) fn end(&self, timer: Timer, ok: bool) {
        let nanos = u64::try_from(timer.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let stats = &self.opcodes[timer.opcode as usize];
        stats.count.fetch_add(1, Relaxed);
        stats.nanos.fetch_add(nanos, Relaxed);
        stats.buckets[bucket(nanos)].fetch_add(1, Relaxed);
        if nanos > stats.nanos_max.load(Relaxed) {
            stats.nanos_max.fetch_max(nanos, Relaxed);
        }
        if !ok {
            stats.errors.fetch_add(1, Relaxed);
        }
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// The opcodes that were seen, by name.
    pub(super) fn requests(&self) -> Map<String, Value> {
        let views = self.by_opcode().into_iter().map(|stats| {
            let view = serde_json::to_value(OpcodeView::new(&stats));
            (stats.op.to_owned(), view.unwrap_or(Value::Null))
        });
        views.collect()
    }
}

/// Logarithmic bucket of a latency.
fn bucket(nanos: u64) -> usize {
    let micros = nanos / 1000;
    ((u64::BITS - micros.leading_zeros()) as usize).min(BUCKETS - 1)
}

/// One opcode as `braidfs stats` shows it; percentiles are upper bounds of their bucket.
#[derive(Serialize)]
struct OpcodeView {
    count: u64,
    errors: u64,
    mean_us: u64,
    p50_us: u64,
    p99_us: u64,
    max_us: u64,
}

impl OpcodeView {
    fn new(stats: &RequestStats) -> Self {
        let latency = &stats.latency_us;
        Self {
            count: latency.count,
            errors: stats.errors,
            mean_us: latency.mean(),
            p50_us: latency.percentile(50),
            p99_us: latency.percentile(99),
            max_us: latency.max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_of_microseconds() {
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(999), 0);
        assert_eq!(bucket(1_000), 1);
        assert_eq!(bucket(3_999), 2);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn only_seen_opcodes_are_shown() {
        let stats = FuseStats::new();
        let timer = stats.begin(Opcode::CopyFileRange);
        stats.end(timer, false);
        let requests = stats.requests();
        assert_eq!(requests.len(), 1);
        assert_eq!(requests["copy_file_range"]["errors"], 1);
        assert_eq!(stats.in_flight.load(Relaxed), 0);
    }
}
