//! What a simulated device does wrong, and when: single faults, and plans drawn by a seed.

use super::splitmix;
use crate::error::{ErrorKind, Op};
use crate::units::{BLOCK_SIZE, round_down};
use std::ops::Range;
use std::time::Duration;

/// What a fault does to a request that touches its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimEffect {
    /// The request fails as a whole; nothing is transferred.
    Fail(ErrorKind),
    /// Only so many bytes are transferred.
    Short(u64),
    /// A write lands so many bytes further on, and is reported as good.
    Misdirect(u64),
    /// A write transfers only so many bytes and is reported as good.
    Tear(u64),
    /// A write is reported as good and dropped.
    Lose,
    /// A read returns its bytes with this one bit (counted from its start, modulo its length)
    /// turned over; what is stored stays as it is.
    FlipRead(u64),
    /// The request is executed after this time, on a thread of its own.
    Delay(Duration),
    /// The device is silent: the request waits until [`super::SimDevice::come_back`].
    Hang,
}

/// One thing that goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimFault {
    /// The operation that meets it.
    pub op: Op,
    /// The bytes of the device that a request must touch; a flush touches all.
    pub range: Range<u64>,
    /// What happens.
    pub effect: SimEffect,
    /// How often; `None`: always.
    pub times: Option<u32>,
    /// Sleeps until the device has been asked so many things.
    pub from_request: u64,
}

impl SimFault {
    pub(super) fn hits(&self, op: Op, range: &Range<u64>, request: u64) -> bool {
        self.op == op
            && self.times != Some(0)
            && self.from_request <= request
            && (op == Op::Flush || (self.range.start < range.end && range.start < self.range.end))
    }
}

/// A kind of fault that a plan may draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimKind {
    /// EIO once or a few times.
    Transient,
    /// EIO for good, in a small range.
    Permanent,
    /// Fewer bytes than asked.
    Short,
    /// Up to 20 ms late.
    Delay,
    /// Silent from one request on.
    Hang,
    /// A bit is wrong in what is read.
    FlipRead,
    /// A write that lands elsewhere.
    Misdirect,
    /// A write that never lands.
    Lose,
}

/// Faults to come, drawn by a seed: the same seed, the same plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SimPlan {
    /// In no particular order.
    pub faults: Vec<SimFault>,
}

impl SimPlan {
    /// `count` faults of these kinds for a device of `size_bytes`, within its next `horizon`
    /// requests.
    pub fn draw(
        seed: u64,
        kinds: &[SimKind],
        count: usize,
        size_bytes: u64,
        horizon: u64,
    ) -> SimPlan {
        let mut state = seed;
        let mut below = |bound: u64| splitmix(&mut state) % bound.max(1);
        let mut faults = Vec::new();
        for _ in 0..if kinds.is_empty() { 0 } else { count } {
            let kind = kinds[crate::units::mem_len(below(crate::units::dev_len(kinds.len())))];
            let start = round_down(below(size_bytes), BLOCK_SIZE);
            let any = 0..size_bytes;
            let near = start..(start + (64 << 10)).min(size_bytes);
            let few = u32::try_from(1 + below(3)).ok();
            let read_or_write = if below(2) == 0 { Op::Read } else { Op::Write };
            let any_op = [Op::Read, Op::Write, Op::Flush][crate::units::mem_len(below(3))];
            let eio = SimEffect::Fail(ErrorKind::Os(libc::EIO));
            let (op, range, effect, times) = match kind {
                SimKind::Transient => (any_op, any, eio, few),
                SimKind::Permanent => (read_or_write, near, eio, None),
                SimKind::Short => {
                    let bytes = round_down(below(64 << 10), BLOCK_SIZE);
                    (read_or_write, any, SimEffect::Short(bytes), few)
                }
                SimKind::Delay => {
                    let delay = Duration::from_micros(below(20_000));
                    (any_op, any, SimEffect::Delay(delay), few)
                }
                SimKind::Hang => (any_op, any, SimEffect::Hang, None),
                SimKind::FlipRead => (Op::Read, any, SimEffect::FlipRead(below(1 << 20)), few),
                SimKind::Misdirect => {
                    let by = (1 + below(16)) * BLOCK_SIZE;
                    (Op::Write, any, SimEffect::Misdirect(by), Some(1))
                }
                SimKind::Lose => (Op::Write, any, SimEffect::Lose, Some(1)),
            };
            faults.push(SimFault {
                op,
                range,
                effect,
                times,
                from_request: below(horizon),
            });
        }
        SimPlan { faults }
    }
}
