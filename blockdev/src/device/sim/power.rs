//! Power shared by several simulated devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Power shared by several devices: counts their writes and flushes, and fails at a chosen one.
#[derive(Debug)]
pub struct SimPower {
    ops: AtomicU64,
    cut_at: AtomicU64,
}

impl Default for SimPower {
    fn default() -> Self {
        SimPower {
            ops: AtomicU64::new(0),
            cut_at: AtomicU64::new(u64::MAX),
        }
    }
}

impl SimPower {
    /// Power that stays on.
    pub fn new() -> Arc<SimPower> {
        Arc::default()
    }

    /// Writes and flushes begun so far.
    pub fn ops(&self) -> u64 {
        self.ops.load(Ordering::SeqCst)
    }

    /// Fails when operation number `ops` (counted from 0) begins: a write then may have landed in
    /// part, everything after is lost.
    pub fn cut_at(&self, ops: u64) {
        self.cut_at.store(ops, Ordering::SeqCst);
    }

    pub(super) fn begin(&self) -> Power {
        let number = self.ops.fetch_add(1, Ordering::SeqCst);
        match number.cmp(&self.cut_at.load(Ordering::SeqCst)) {
            std::cmp::Ordering::Less => Power::On,
            std::cmp::Ordering::Equal => Power::Failing,
            std::cmp::Ordering::Greater => Power::Off,
        }
    }

    pub(super) fn is_off(&self) -> bool {
        self.ops() > self.cut_at.load(Ordering::SeqCst)
    }
}

pub(super) enum Power {
    On,
    Failing,
    Off,
}
