//! Simulated devices whose every write and flush is recorded in one order, so that the state after
//! a power cut at any point can be made as often as wanted.
//!
//! One lock is held while a request is executed, ended and recorded: what others see of its end
//! comes after it in the record.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use braidfs_blockdev::device::sim::{SECTOR, SimPower};
use braidfs_blockdev::{BlockDevice, DeviceRequest, Op, SimDevice};
use parking_lot::ReentrantMutex;

use super::content::is_zero;
use super::rng::Rng;

const PAGE: usize = 4096;

/// Something that happened, in the order in which it did.
#[derive(Clone)]
pub enum Event {
    Write {
        device: usize,
        offset: u64,
        data: Arc<[u8]>,
    },
    Flush {
        device: usize,
    },
    /// The test says how far it is.
    Mark(u64),
}

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    /// Executed, not yet recorded.
    pending: Option<(usize, Op, u64, u64)>,
}

/// The record of several devices.
pub struct Recorder {
    log: ReentrantMutex<RefCell<Log>>,
    devices: Vec<Arc<SimDevice>>,
}

impl Recorder {
    pub fn new(devices: &[Arc<SimDevice>]) -> Arc<Self> {
        Arc::new(Self {
            log: ReentrantMutex::default(),
            devices: devices.to_vec(),
        })
    }

    /// The devices as the volume is to see them.
    pub fn members(self: &Arc<Self>) -> Vec<Arc<dyn BlockDevice>> {
        (0..self.devices.len())
            .map(|device| {
                let recorder = Arc::clone(self);
                Arc::new(Recorded { recorder, device }) as Arc<dyn BlockDevice>
            })
            .collect()
    }

    pub fn mark(&self, number: u64) {
        self.log
            .lock()
            .borrow_mut()
            .events
            .push(Event::Mark(number));
    }

    pub fn events(&self) -> Vec<Event> {
        self.log.lock().borrow().events.clone()
    }

    fn settle(&self, log: &RefCell<Log>) {
        let pending = log.borrow_mut().pending.take();
        let event = match pending {
            Some((device, Op::Write, offset, len)) => Event::Write {
                device,
                offset,
                data: self.devices[device].peek(offset, len as usize).into(),
            },
            Some((device, Op::Flush, ..)) => Event::Flush { device },
            _ => return,
        };
        log.borrow_mut().events.push(event);
    }

    fn submit(&self, device: usize, request: DeviceRequest) {
        let log = self.log.lock();
        // The end of the request below may have led here.
        self.settle(&log);
        let (op, offset, len) = (request.op(), request.offset(), request.len());
        log.borrow_mut().pending = Some((device, op, offset, len));
        self.devices[device].submit(request);
        self.settle(&log);
    }
}

struct Recorded {
    recorder: Arc<Recorder>,
    device: usize,
}

impl BlockDevice for Recorded {
    fn name(&self) -> &str {
        self.recorder.devices[self.device].name()
    }

    fn size_bytes(&self) -> u64 {
        self.recorder.devices[self.device].size_bytes()
    }

    fn kind(&self) -> &'static str {
        "recorded"
    }

    fn submit(&self, request: DeviceRequest) {
        self.recorder.submit(self.device, request);
    }
}

type Pages = BTreeMap<usize, Arc<[u8]>>;

#[derive(Clone, Default)]
struct DeviceState {
    durable: Pages,
    /// Unflushed versions of a page, oldest first.
    cache: BTreeMap<usize, Vec<Arc<[u8]>>>,
}

/// What a power cut leaves of what was not flushed.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    /// Everything.
    Nothing,
    /// Nothing.
    All,
    /// Of some devices everything, of the others nothing.
    Devices,
    /// Of each page everything or nothing.
    Pages,
    /// Of each sector any version.
    Sectors,
}

pub const LOSSES: [Loss; 5] = [
    Loss::Nothing,
    Loss::All,
    Loss::Devices,
    Loss::Pages,
    Loss::Sectors,
];

/// The devices at one point of the record.
#[derive(Clone)]
pub struct Replay {
    sizes: Vec<usize>,
    states: Vec<DeviceState>,
}

impl Replay {
    /// Starts from what the devices hold.
    pub fn new(devices: &[Arc<SimDevice>]) -> Self {
        let image = |device: &Arc<SimDevice>| {
            let image = device.image();
            let pages = image.chunks(PAGE).enumerate();
            let filled = pages.filter(|(_, page)| !is_zero(page));
            let durable = filled.map(|(at, page)| (at, page.into())).collect();
            DeviceState {
                durable,
                cache: BTreeMap::new(),
            }
        };
        Self {
            sizes: devices.iter().map(|d| d.size_bytes() as usize).collect(),
            states: devices.iter().map(image).collect(),
        }
    }

    /// One event further.
    pub fn step(&mut self, event: &Event) {
        match event {
            Event::Write {
                device,
                offset,
                data,
            } => {
                let state = &mut self.states[*device];
                let first = *offset as usize / PAGE;
                assert!((*offset as usize).is_multiple_of(PAGE), "blocks are whole");
                for (nth, page) in data.chunks(PAGE).enumerate() {
                    let versions = state.cache.entry(first + nth).or_default();
                    versions.push(page.into());
                }
            }
            Event::Flush { device } => {
                let state = &mut self.states[*device];
                for (at, mut versions) in std::mem::take(&mut state.cache) {
                    state.durable.extend(versions.pop().map(|page| (at, page)));
                }
            }
            Event::Mark(_) => {}
        }
    }

    /// Whether there is anything to lose.
    pub fn is_settled(&self) -> bool {
        self.states.iter().all(|state| state.cache.is_empty())
    }

    /// The devices after a power cut here.
    pub fn wreck(&self, loss: Loss, seed: u64) -> Vec<Arc<SimDevice>> {
        let mut rng = Rng(seed);
        let power = SimPower::new();
        let mut wrecks = Vec::new();
        for (nth, state) in self.states.iter().enumerate() {
            let mut image = vec![0; self.sizes[nth]];
            for (at, page) in &state.durable {
                image[at * PAGE..(at + 1) * PAGE].copy_from_slice(page);
            }
            let whole_device = rng.one_in(2);
            for (at, versions) in &state.cache {
                let keeps = match loss {
                    Loss::Nothing => true,
                    Loss::All => false,
                    Loss::Devices => whole_device,
                    Loss::Pages => rng.one_in(2),
                    Loss::Sectors => {
                        for sector in (0..PAGE).step_by(SECTOR) {
                            let chosen = rng.below(versions.len() as u64 + 1) as usize;
                            if let Some(version) = versions.get(chosen) {
                                image[at * PAGE + sector..at * PAGE + sector + SECTOR]
                                    .copy_from_slice(&version[sector..sector + SECTOR]);
                            }
                        }
                        false
                    }
                };
                if keeps && let Some(newest) = versions.last() {
                    image[at * PAGE..(at + 1) * PAGE].copy_from_slice(newest);
                }
            }
            wrecks.push(SimDevice::from_image(&format!("sim{nth}"), image, &power));
        }
        wrecks
    }
}
