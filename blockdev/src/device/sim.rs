//! The simulated device: memory that behaves like a disk with a volatile cache, and fails as told.
//!
//! It executes a request when it is submitted, or, while [`SimDevice::hold`] is on, when the test
//! releases it, in any order. Writes go to a volatile cache of 512-byte sectors that keeps every
//! unflushed version; a flush makes them durable. [`SimDevice::crash`] gives an image in which each
//! unflushed sector has any of its versions or none, by a seeded coin toss: that covers reordering,
//! lost writes and writes torn at a sector edge. Same seed, same wreck.

use super::{BlockDevice, bytes};
use crate::error::{ErrorKind, Op};
use crate::request::DeviceRequest;
use crate::units::{BLOCK_SIZE, PAGE_SIZE, dev_len, mem_len};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The unit that a power cut writes whole or not at all.
pub const SECTOR: usize = 512;

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

    fn begin(&self) -> Power {
        let number = self.ops.fetch_add(1, Ordering::SeqCst);
        match number.cmp(&self.cut_at.load(Ordering::SeqCst)) {
            std::cmp::Ordering::Less => Power::On,
            std::cmp::Ordering::Equal => Power::Failing,
            std::cmp::Ordering::Greater => Power::Off,
        }
    }

    fn is_off(&self) -> bool {
        self.ops() > self.cut_at.load(Ordering::SeqCst)
    }
}

enum Power {
    On,
    Failing,
    Off,
}

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
}

struct Fault {
    op: Op,
    range: Range<u64>,
    effect: SimEffect,
    times: Option<u32>,
}

/// One executed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimRecord {
    /// The operation.
    pub op: Op,
    /// Byte offset.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// How it ended.
    pub result: Result<u64, ErrorKind>,
}

type Versions = Vec<Box<[u8; PAGE_SIZE]>>;

#[derive(Default)]
struct State {
    durable: Vec<u8>,
    /// Unflushed versions of a page, oldest first; a crash chooses for each of its sectors.
    cache: BTreeMap<usize, Versions>,
    faults: Vec<Fault>,
    log: Vec<SimRecord>,
    holding: bool,
    held: Vec<DeviceRequest>,
}

/// A device in memory that records what it is asked and fails as told.
pub struct SimDevice {
    name: String,
    size_bytes: u64,
    power: Arc<SimPower>,
    state: Mutex<State>,
}

impl SimDevice {
    /// A zeroed device with power of its own.
    pub fn new(name: &str, size_bytes: u64) -> Arc<SimDevice> {
        Self::from_image(name, vec![0; mem_len(size_bytes)], &SimPower::new())
    }

    /// A device that holds `image`.
    pub fn from_image(name: &str, image: Vec<u8>, power: &Arc<SimPower>) -> Arc<SimDevice> {
        Arc::new(SimDevice {
            name: name.to_owned(),
            size_bytes: crate::units::round_down(dev_len(image.len()), BLOCK_SIZE),
            power: power.clone(),
            state: Mutex::new(State {
                durable: image,
                ..State::default()
            }),
        })
    }

    /// The next `times` requests (all, if `None`) of kind `op` that touch `range` meet `effect`.
    pub fn inject(&self, op: Op, range: Range<u64>, effect: SimEffect, times: Option<u32>) {
        self.state.lock().faults.push(Fault {
            op,
            range,
            effect,
            times,
        });
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        self.state.lock().faults.clear();
    }

    /// While on, requests wait for [`Self::release`].
    pub fn hold(&self, on: bool) {
        self.state.lock().holding = on;
    }

    /// Operation, offset and length of the requests that wait, in order of submission.
    pub fn held(&self) -> Vec<(Op, u64, u64)> {
        let state = self.state.lock();
        state
            .held
            .iter()
            .map(|request| (request.op(), request.offset(), request.len()))
            .collect()
    }

    /// Executes and ends the waiting request number `index`; false if there is none.
    pub fn release(&self, index: usize) -> bool {
        let mut state = self.state.lock();
        if index >= state.held.len() {
            return false;
        }
        let request = state.held.remove(index);
        drop(state);
        self.execute(request);
        true
    }

    /// Executes and ends all waiting requests in order, including those that come meanwhile.
    pub fn release_all(&self) {
        while self.release(0) {}
    }

    /// Everything executed so far, in order.
    pub fn log(&self) -> Vec<SimRecord> {
        self.state.lock().log.clone()
    }

    /// Forgets the record.
    pub fn clear_log(&self) {
        self.state.lock().log.clear();
    }

    /// Turns one stored bit over.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        let byte = self.peek(offset, 1)[0] ^ (1 << (bit % 8));
        self.poke(offset, &[byte]);
    }

    /// Stored bytes as a read would see them.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        self.state.lock().read(mem_len(offset), len)
    }

    /// Changes stored bytes behind everybody's back, durably.
    pub fn poke(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state.lock();
        for (at, byte) in (mem_len(offset)..).zip(bytes) {
            if let Some(versions) = state.cache.get_mut(&(at / PAGE_SIZE)) {
                for version in versions {
                    version[at % PAGE_SIZE] = *byte;
                }
            }
            state.durable[at] = *byte;
        }
    }

    /// What the device holds, caches included: an image after a clean end.
    pub fn image(&self) -> Vec<u8> {
        let state = self.state.lock();
        state.read(0, state.durable.len())
    }

    /// An image after a power cut now. Requests that are held may have landed in part.
    pub fn crash(&self, seed: u64) -> Vec<u8> {
        let state = self.state.lock();
        let held: Vec<_> = state
            .held
            .iter()
            .filter(|request| request.op() == Op::Write)
            .collect();
        let writes: Vec<_> = held
            .into_iter()
            .map(|request| (request.offset(), bytes::gather(request)))
            .collect();
        let mut image = state.durable.clone();
        let mut cache = state.cache.clone();
        drop(state);
        for (offset, data) in writes {
            push_versions(&mut cache, &image, mem_len(offset), &data);
        }
        let mut random = seed ^ 0x9e37_79b9_7f4a_7c15;
        for (page, versions) in cache {
            for at in (0..PAGE_SIZE).step_by(SECTOR) {
                let chosen = splitmix(&mut random) % (dev_len(versions.len()) + 1);
                let Some(index) = mem_len(chosen).checked_sub(1) else {
                    continue;
                };
                let place = page * PAGE_SIZE + at;
                image[place..place + SECTOR].copy_from_slice(&versions[index][at..at + SECTOR]);
            }
        }
        image
    }

    fn execute(&self, request: DeviceRequest) {
        let result = self.perform(&request);
        let (op, offset, len) = (request.op(), request.offset(), request.len());
        self.state.lock().log.push(SimRecord {
            op,
            offset,
            len,
            result,
        });
        request.end(result);
    }

    fn perform(&self, request: &DeviceRequest) -> Result<u64, ErrorKind> {
        let (op, offset, len) = (request.op(), request.offset(), request.len());
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= self.size_bytes);
        let end = end.ok_or(ErrorKind::OutOfRange)?;
        let power = match op {
            Op::Write | Op::Flush => self.power.begin(),
            Op::Read | Op::Discard if self.power.is_off() => Power::Off,
            Op::Read | Op::Discard => Power::On,
        };
        let mut state = self.state.lock();
        let effect = state.fault(op, offset..end.max(offset + 1));
        match (power, effect) {
            (Power::Off, _) => return Err(ErrorKind::DeviceGone),
            (Power::Failing, _) => {
                if op == Op::Write {
                    state.write(mem_len(offset), &bytes::gather(request));
                }
                return Err(ErrorKind::DeviceGone);
            }
            (Power::On, Some(SimEffect::Fail(kind))) => return Err(kind),
            (Power::On, _) => {}
        }
        let (transferred, reported) = match effect {
            Some(SimEffect::Short(bytes)) => (bytes.min(len), bytes.min(len)),
            Some(SimEffect::Tear(bytes)) => (bytes.min(len), len),
            Some(SimEffect::Lose) => (0, len),
            _ => (len, len),
        };
        let moved = match effect {
            Some(SimEffect::Misdirect(by)) if end + by <= self.size_bytes => by,
            _ => 0,
        };
        match op {
            Op::Read => bytes::scatter(request, &state.read(mem_len(offset), mem_len(transferred))),
            Op::Write => {
                let data = bytes::gather(request);
                state.write(mem_len(offset + moved), &data[..mem_len(transferred)]);
            }
            Op::Flush => state.flush(),
            Op::Discard => {}
        }
        Ok(reported)
    }
}

impl State {
    /// The effect that a request meets, counted against its fault.
    fn fault(&mut self, op: Op, range: Range<u64>) -> Option<SimEffect> {
        let hits = |fault: &Fault| {
            fault.op == op
                && fault.times != Some(0)
                && (op == Op::Flush
                    || (fault.range.start < range.end && range.start < fault.range.end))
        };
        let fault = self.faults.iter_mut().find(|fault| hits(fault))?;
        if let Some(times) = &mut fault.times {
            *times -= 1;
        }
        Some(fault.effect)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = self.durable[offset..offset + len].to_vec();
        let pages = offset / PAGE_SIZE..(offset + len).div_ceil(PAGE_SIZE);
        for (page, versions) in self.cache.range(pages) {
            let Some(newest) = versions.last() else {
                continue;
            };
            let at = page * PAGE_SIZE;
            let (from, to) = (at.max(offset), (at + PAGE_SIZE).min(offset + len));
            bytes[from - offset..to - offset].copy_from_slice(&newest[from - at..to - at]);
        }
        bytes
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        push_versions(&mut self.cache, &self.durable, offset, data);
    }

    fn flush(&mut self) {
        for (page, versions) in std::mem::take(&mut self.cache) {
            let at = page * PAGE_SIZE;
            if let Some(newest) = versions.last() {
                self.durable[at..at + PAGE_SIZE].copy_from_slice(&newest[..]);
            }
        }
    }
}

/// Writes land in whole sectors: one that ends inside a sector leaves that sector out. What a write
/// leaves of its page is as the version before it.
fn push_versions(
    cache: &mut BTreeMap<usize, Versions>,
    durable: &[u8],
    offset: usize,
    data: &[u8],
) {
    let end = offset + data.len() - data.len() % SECTOR;
    let mut at = offset;
    while at < end {
        let (page, within) = (at / PAGE_SIZE, at % PAGE_SIZE);
        let len = (PAGE_SIZE - within).min(end - at);
        let versions = cache.entry(page).or_default();
        let mut next = match versions.last() {
            Some(newest) => newest.clone(),
            None => {
                let mut base = Box::new([0; PAGE_SIZE]);
                base.copy_from_slice(&durable[page * PAGE_SIZE..(page + 1) * PAGE_SIZE]);
                base
            }
        };
        next[within..within + len].copy_from_slice(&data[at - offset..at - offset + len]);
        versions.push(next);
        at += len;
    }
}

/// A small seeded generator, good enough for coin tosses.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl BlockDevice for SimDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn kind(&self) -> &'static str {
        "sim"
    }

    fn submit(&self, request: DeviceRequest) {
        let mut state = self.state.lock();
        if state.holding {
            state.held.push(request);
            return;
        }
        drop(state);
        self.execute(request);
    }
}
