//! Counters and histograms: the mission at work, for people and for `--json`.

use serde::{Deserialize, Serialize};

/// Powers of two: bucket `i` counts values below `2^i` that no lower bucket took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Number of values per bucket; empty at the end is cut off.
    pub buckets: Vec<u64>,
    /// Number of values.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
    /// The largest value.
    pub max: u64,
}

impl Histogram {
    /// Buckets of a 64-bit value: 0, and one per bit length.
    pub const BUCKETS: usize = 65;

    /// Counts one value.
    pub fn add(&mut self, value: u64) {
        if self.buckets.is_empty() {
            self.buckets = vec![0; Self::BUCKETS];
        }
        let index = u64::BITS - value.leading_zeros();
        if let Some(bucket) = self.buckets.get_mut(usize::try_from(index).unwrap_or(0)) {
            *bucket += 1;
        }
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
    }

    /// Mean value; 0 if there is none.
    pub fn mean(&self) -> u64 {
        self.sum.checked_div(self.count).unwrap_or(0)
    }

    /// A bound that `percent` of the values are below: that of their bucket, or the largest value.
    /// 0 if there is none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let total: u128 = self.buckets.iter().copied().map(u128::from).sum();
        let mut seen = 0;
        for (shift, &count) in (0..).zip(&self.buckets) {
            seen += u128::from(count);
            if total > 0 && seen * 100 >= total * u128::from(percent) {
                let bound = 1_u64.checked_shl(shift).unwrap_or(u64::MAX);
                return bound.min(self.max);
            }
        }
        0
    }

    /// The values that came after `earlier`, an older state of this one. Their largest value is not
    /// known: it is that of all.
    #[must_use]
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let before = earlier.buckets.iter().chain(std::iter::repeat(&0));
        let each = self.buckets.iter().zip(before);
        let buckets: Vec<u64> = each.map(|(now, then)| now.saturating_sub(*then)).collect();
        Histogram {
            count: buckets.iter().sum(),
            buckets,
            sum: self.sum.saturating_sub(earlier.sum),
            max: self.max,
        }
    }

    /// Without the empty buckets at the end.
    #[must_use]
    pub fn trimmed(mut self) -> Histogram {
        while self.buckets.last() == Some(&0) {
            self.buckets.pop();
        }
        self
    }

    /// Adds another histogram's values.
    pub fn absorb(&mut self, other: &Histogram) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (bucket, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *bucket += more;
        }
        self.count += other.count;
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }
}

/// What one member device did in one direction.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DirectionStats {
    /// Requests that the device ended.
    pub requests: u64,
    /// Bytes transferred.
    pub bytes: u64,
    /// Requests that failed as a whole or in part.
    pub errors: u64,
    /// Sizes in bytes of requests as dispatched.
    pub request_bytes: Histogram,
    /// kiobufs that each request carried.
    pub kiobufs_per_request: Histogram,
    /// Nanoseconds from dispatch to completion.
    pub latency_ns: Histogram,
}

/// What one member device and its queue did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct QueueStats {
    /// Index of the member.
    pub index: u16,
    /// Its name.
    pub name: String,
    /// Its backend.
    pub backend: &'static str,
    /// Reads.
    pub read: DirectionStats,
    /// Writes.
    pub write: DirectionStats,
    /// Flushes that the device ended.
    pub flushes: u64,
    /// Nanoseconds per flush.
    pub flush_latency_ns: Histogram,
    /// Requests with the device now.
    pub in_flight: u64,
    /// The most that were with the device at once.
    pub in_flight_max: u64,
    /// Requests that wait in the queue now.
    pub queued: u64,
    /// Requests joined to the end of another.
    pub back_merges: u64,
    /// Requests joined to the front of another.
    pub front_merges: u64,
    /// Requests that ended after one that was dispatched later.
    pub out_of_order: u64,
    /// Failed merged requests that were tried again piece by piece.
    pub piecewise_retries: u64,
    /// Requests that the device did not answer in time.
    pub timed_out: u64,
    /// Those of them that it has not answered since.
    pub unanswered: u64,
    /// The device does not answer; requests to it fail at once until it does.
    pub silent: bool,
}

/// What the volume did since it was assembled.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VolumeStats {
    /// kiobufs submitted.
    pub kiobufs: u64,
    /// Bytes of these kiobufs.
    pub kiobuf_bytes: u64,
    /// Chains built: pieces of kiobufs before merging.
    pub chains: u64,
    /// Cuts at stripe, chunk and size borders.
    pub splits: u64,
    /// Plugs that carried something.
    pub plugs: u64,
    /// Joined to the end of another request, in a plug or a queue.
    pub back_merges: u64,
    /// Joined to the front of another request, in a plug or a queue.
    pub front_merges: u64,
    /// Mirrored reads that went to the other copy.
    pub mirror_retries: u64,
    /// Per member device.
    pub devices: Vec<QueueStats>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_upper_bounds() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), 0);
        for _ in 0..98 {
            histogram.add(7);
        }
        histogram.add(600);
        histogram.add(1000);
        assert_eq!(histogram.percentile(50), 8);
        assert_eq!(histogram.percentile(98), 8);
        assert_eq!(histogram.percentile(99), 1000, "no more than the largest");
        let mut all = Histogram::default();
        all.add(u64::MAX);
        assert_eq!(all.percentile(100), u64::MAX);
    }

    #[test]
    fn what_came_later_is_the_difference() {
        let mut now = Histogram::default();
        now.add(1);
        let earlier = now.clone().trimmed();
        now.add(5);
        now.add(6);
        let later = now.since(&earlier);
        assert_eq!((later.count, later.sum, later.mean()), (2, 11, 5));
        assert_eq!(later.percentile(50), 6);
        assert_eq!(now.since(&Histogram::default()).count, 3);
    }
}
