//! The simulated device: memory that behaves like a disk with a volatile cache, and fails as told.
//!
//! It executes a request when it is submitted, or, while [`SimDevice::hold`] is on, when the test
//! releases it, in any order. Writes go to a volatile cache of 512-byte sectors that keeps every
//! unflushed version; a flush makes them durable. [`SimDevice::crash`] gives an image in which each
//! unflushed sector has any of its versions or none, by a seeded coin toss: that covers reordering,
//! lost writes and writes torn at a sector edge. Same seed, same wreck.
//!
//! Several devices may tell one [`SimHistory`] what they do, in one order; a [`SimReplay`] of it
//! makes the devices after a power cut at any point, as often as wanted.
//!
//! Lock order: a device's state, then the history.

mod fault;
mod history;
mod image;
mod power;

pub use fault::{SimEffect, SimFault, SimKind, SimPlan};
pub use history::{SimEvent, SimHistory, SimLoss, SimPiece, SimReplay};
pub use image::{SimImage, SimPage};
pub use power::SimPower;

use super::{BlockDevice, bytes};
use crate::error::{ErrorKind, Op};
use crate::request::DeviceRequest;
use crate::units::{BLOCK_SIZE, PAGE_SIZE, dev_len, mem_len};
use history::sectors_of;
use parking_lot::Mutex;
use power::Power;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

/// The unit that a power cut writes whole or not at all.
pub const SECTOR: usize = 512;

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

type Versions = Vec<Arc<SimPage>>;

struct State {
    durable: SimImage,
    /// Unflushed versions of a page, oldest first; a crash chooses for each of its sectors.
    cache: BTreeMap<usize, Versions>,
    faults: Vec<SimFault>,
    log: Vec<SimRecord>,
    holding: bool,
    held: Vec<DeviceRequest>,
    /// How many requests came so far.
    requests: u64,
    /// More pages than this cannot be stored.
    room_pages: u64,
    /// Who is told, and as which device.
    history: Option<(Arc<SimHistory>, usize)>,
}

/// A device in memory that records what it is asked and fails as told.
pub struct SimDevice {
    me: Weak<SimDevice>,
    name: String,
    size_bytes: u64,
    power: Arc<SimPower>,
    state: Mutex<State>,
}

impl SimDevice {
    /// A zeroed device with power of its own.
    pub fn new(name: &str, size_bytes: u64) -> Arc<SimDevice> {
        Self::with_image(
            name,
            SimImage::zeroed(mem_len(size_bytes)),
            &SimPower::new(),
        )
    }

    /// A device that holds `image`.
    pub fn from_image(name: &str, image: Vec<u8>, power: &Arc<SimPower>) -> Arc<SimDevice> {
        Self::with_image(name, SimImage::of(&image), power)
    }

    /// A device that holds `image`, whose pages it shares.
    pub fn with_image(name: &str, image: SimImage, power: &Arc<SimPower>) -> Arc<SimDevice> {
        Arc::new_cyclic(|me| SimDevice {
            me: me.clone(),
            name: name.to_owned(),
            size_bytes: crate::units::round_down(dev_len(image.len()), BLOCK_SIZE),
            power: power.clone(),
            state: Mutex::new(State {
                durable: image,
                cache: BTreeMap::new(),
                faults: Vec::new(),
                log: Vec::new(),
                holding: false,
                held: Vec::new(),
                requests: 0,
                room_pages: u64::MAX,
                history: None,
            }),
        })
    }

    /// From now on `history` is told of each write and flush.
    pub(super) fn tell(&self, history: &Arc<SimHistory>, index: usize) {
        self.state.lock().history = Some((history.clone(), index));
    }

    /// The next `times` requests (all, if `None`) of kind `op` that touch `range` meet `effect`.
    pub fn inject(&self, op: Op, range: Range<u64>, effect: SimEffect, times: Option<u32>) {
        self.state.lock().faults.push(SimFault {
            op,
            range,
            effect,
            times,
            from_request: 0,
        });
    }

    /// Adds the faults of a plan, which counts requests from now on.
    pub fn follow(&self, plan: &SimPlan) {
        let mut state = self.state.lock();
        let now = state.requests;
        let faults = plan.faults.iter().cloned().map(|fault| SimFault {
            from_request: fault.from_request + now,
            ..fault
        });
        state.faults.extend(faults);
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        self.state.lock().faults.clear();
    }

    /// A device that was silent answers again: its faults are gone, and it executes what waited.
    pub fn come_back(&self) {
        self.heal();
        self.release_all();
    }

    /// The store behind the device has room for so many pages that are not zero (`None`: for all).
    /// A write that needs more fails with ENOSPC.
    pub fn limit_room(&self, pages: Option<u64>) {
        self.state.lock().room_pages = pages.unwrap_or(u64::MAX);
    }

    /// How many pages that are not zero are stored.
    pub fn stored_pages(&self) -> u64 {
        self.state.lock().stored_pages()
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
        let late = |effect: &SimEffect| matches!(effect, SimEffect::Hang | SimEffect::Delay(_));
        let effect = state.fault(&request).filter(|effect| !late(effect));
        drop(state);
        self.execute(request, effect);
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
        let (start, mut done) = (mem_len(offset), 0);
        while done < bytes.len() {
            let (page, within) = ((start + done) / PAGE_SIZE, (start + done) % PAGE_SIZE);
            let len = (PAGE_SIZE - within).min(bytes.len() - done);
            let part = &bytes[done..done + len];
            let change = |mut page: [u8; PAGE_SIZE]| {
                page[within..within + len].copy_from_slice(part);
                SimPage::new(&page)
            };
            for version in state.cache.get_mut(&page).into_iter().flatten() {
                *version = change(*version.bytes());
            }
            let changed = change(state.durable.copy_of(page));
            state.durable.set_page(page, changed);
            done += len;
        }
    }

    /// What the device holds, caches included: an image after a clean end.
    pub fn image(&self) -> Vec<u8> {
        self.snapshot().to_vec()
    }

    /// The same, sharing the pages.
    pub fn snapshot(&self) -> SimImage {
        let state = self.state.lock();
        let mut image = state.durable.clone();
        for (page, versions) in &state.cache {
            if let Some(newest) = versions.last() {
                image.set_page(*page, newest.clone());
            }
        }
        image
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
            for sector in 0..PAGE_SIZE / SECTOR {
                let chosen = splitmix(&mut random) % (dev_len(versions.len()) + 1);
                let Some(index) = mem_len(chosen).checked_sub(1) else {
                    continue;
                };
                image.set_sectors(page, &versions[index], 1 << sector);
            }
        }
        image.to_vec()
    }

    /// Does what the request asks, as its fault and the power allow, and ends it.
    fn execute(&self, request: DeviceRequest, effect: Option<SimEffect>) {
        let result = self.perform(&request, effect);
        let (op, offset, len) = (request.op(), request.offset(), request.len());
        self.state.lock().log.push(SimRecord {
            op,
            offset,
            len,
            result,
        });
        request.end(result);
    }

    fn perform(
        &self,
        request: &DeviceRequest,
        effect: Option<SimEffect>,
    ) -> Result<u64, ErrorKind> {
        let (op, offset, len) = (request.op(), request.offset(), request.len());
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= self.size_bytes);
        let end = end.ok_or(ErrorKind::OutOfRange)?;
        let mut state = self.state.lock();
        // Under the lock, so that what the power counts has the order of the record.
        let power = match op {
            Op::Write | Op::Flush => self.power.begin(),
            Op::Read | Op::Discard if self.power.is_off() => Power::Off,
            Op::Read | Op::Discard => Power::On,
        };
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
            Op::Read => {
                let mut bytes = state.read(mem_len(offset), mem_len(transferred));
                if let Some(SimEffect::FlipRead(bit)) = effect
                    && !bytes.is_empty()
                {
                    let bit = mem_len(bit) % (bytes.len() * 8);
                    bytes[bit / 8] ^= 1 << (bit % 8);
                }
                bytes::scatter(request, &bytes);
            }
            Op::Write => {
                let data = bytes::gather(request);
                let (at, data) = (mem_len(offset + moved), &data[..mem_len(transferred)]);
                if !state.has_room(at, data) {
                    return Err(ErrorKind::Os(libc::ENOSPC));
                }
                state.write(at, data);
            }
            Op::Flush => state.flush(),
            Op::Discard => {}
        }
        Ok(reported)
    }
}

impl State {
    /// The effect that a request meets, counted against its fault.
    fn fault(&mut self, request: &DeviceRequest) -> Option<SimEffect> {
        let (op, start) = (request.op(), request.offset());
        let range = start..start.saturating_add(request.len().max(1));
        let now = self.requests;
        let hits = |fault: &&mut SimFault| fault.hits(op, &range, now);
        let fault = self.faults.iter_mut().find(hits)?;
        if let Some(times) = &mut fault.times {
            *times -= 1;
        }
        Some(fault.effect)
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.durable.read(offset, &mut bytes);
        let pages = offset / PAGE_SIZE..(offset + len).div_ceil(PAGE_SIZE);
        for (page, versions) in self.cache.range(pages) {
            let Some(newest) = versions.last() else {
                continue;
            };
            let at = page * PAGE_SIZE;
            let (from, to) = (at.max(offset), (at + PAGE_SIZE).min(offset + len));
            let part = &newest.bytes()[from - at..to - at];
            bytes[from - offset..to - offset].copy_from_slice(part);
        }
        bytes
    }

    fn stored_pages(&self) -> u64 {
        let new = self.cache.keys();
        let new = new.filter(|page| self.durable.page(**page).is_none());
        self.durable.stored_pages() + dev_len(new.count())
    }

    fn has_room(&self, offset: usize, data: &[u8]) -> bool {
        if self.room_pages == u64::MAX {
            return true;
        }
        let pages = offset / PAGE_SIZE..(offset + data.len()).div_ceil(PAGE_SIZE);
        let is_new =
            |page: &usize| self.durable.page(*page).is_none() && !self.cache.contains_key(page);
        self.stored_pages() + dev_len(pages.filter(is_new).count()) <= self.room_pages
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        let pieces = push_versions(&mut self.cache, &self.durable, offset, data);
        if let Some((history, device)) = &self.history
            && !pieces.is_empty()
        {
            history.add(SimEvent::Write {
                device: *device,
                pieces: pieces.into(),
            });
        }
    }

    fn flush(&mut self) {
        for (page, mut versions) in std::mem::take(&mut self.cache) {
            if let Some(newest) = versions.pop() {
                self.durable.set_page(page, newest);
            }
        }
        if let Some((history, device)) = &self.history {
            history.add(SimEvent::Flush { device: *device });
        }
    }
}

/// Writes land in whole sectors: one that ends inside a sector leaves that sector out. What a write
/// leaves of its page is as the version before it.
fn push_versions(
    cache: &mut BTreeMap<usize, Versions>,
    durable: &SimImage,
    offset: usize,
    data: &[u8],
) -> Vec<SimPiece> {
    let end = offset + data.len() - data.len() % SECTOR;
    let mut at = offset;
    let mut pieces = Vec::new();
    while at < end {
        let (page, within) = (at / PAGE_SIZE, at % PAGE_SIZE);
        let len = (PAGE_SIZE - within).min(end - at);
        let part = &data[at - offset..at - offset + len];
        let versions = cache.entry(page).or_default();
        let bytes = if len == PAGE_SIZE {
            SimPage::new(part)
        } else {
            let former = versions.last().map(|page| *page.bytes());
            let mut bytes = former.unwrap_or_else(|| durable.copy_of(page));
            bytes[within..within + len].copy_from_slice(part);
            SimPage::new(&bytes)
        };
        versions.push(bytes.clone());
        pieces.push(SimPiece {
            page,
            sectors: sectors_of(within, len),
            bytes,
        });
        at += len;
    }
    pieces
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
        state.requests += 1;
        if state.holding {
            state.held.push(request);
            return;
        }
        let effect = state.fault(&request);
        match effect {
            Some(SimEffect::Hang) => state.held.push(request),
            Some(SimEffect::Delay(delay)) => {
                let me = self.me.clone();
                // Without a device any more the request ends as aborted, by being dropped.
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    if let Some(device) = me.upgrade() {
                        device.execute(request, None);
                    }
                });
            }
            _ => {
                drop(state);
                self.execute(request, effect);
            }
        }
    }
}
