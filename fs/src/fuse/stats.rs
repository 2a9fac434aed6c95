//! What the front end counts: requests by opcode with their latency, and bytes by how they went.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

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

/// A request that has begun. It is finished with [`FuseStats::end`].
pub(super) struct Timer {
    opcode: Opcode,
    start: Instant,
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
        let mut requests = Map::new();
        for (name, stats) in Opcode::NAMES.iter().zip(&self.opcodes) {
            let count = stats.count.load(Relaxed);
            if count > 0 {
                let view = OpcodeView::new(stats, count);
                let value = serde_json::to_value(view).unwrap_or(Value::Null);
                requests.insert((*name).to_owned(), value);
            }
        }
        requests
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
    fn new(stats: &OpcodeStats, count: u64) -> Self {
        let buckets: Vec<u64> = stats
            .buckets
            .iter()
            .map(|bucket| bucket.load(Relaxed))
            .collect();
        let max_us = stats.nanos_max.load(Relaxed) / 1000;
        Self {
            count,
            errors: stats.errors.load(Relaxed),
            mean_us: stats.nanos.load(Relaxed) / count / 1000,
            p50_us: percentile(&buckets, 50).min(max_us),
            p99_us: percentile(&buckets, 99).min(max_us),
            max_us,
        }
    }
}

/// Upper bound in microseconds of the bucket in which `percent` of all requests have been seen.
fn percentile(buckets: &[u64], percent: u64) -> u64 {
    let total: u64 = buckets.iter().sum();
    let mut seen = 0;
    for (index, count) in buckets.iter().enumerate() {
        seen += count;
        if total > 0 && seen * 100 >= total * percent {
            return 1 << index;
        }
    }
    0
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
    fn percentiles_are_upper_bounds() {
        let mut buckets = vec![0; BUCKETS];
        assert_eq!(percentile(&buckets, 50), 0);
        buckets[3] = 98;
        buckets[10] = 2;
        assert_eq!(percentile(&buckets, 50), 8);
        assert_eq!(percentile(&buckets, 99), 1024);
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
