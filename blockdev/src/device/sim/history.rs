//! One ordered record of the writes and flushes of several devices, and what a power cut at a point
//! of it may leave.
//!
//! A request is recorded when it is executed and before it ends: whatever somebody does because it
//! ended stands behind it in the record.

use super::image::{SimImage, SimPage};
use super::{SECTOR, SimDevice, SimPower, splitmix};
use crate::units::{PAGE_SIZE, dev_len};
use parking_lot::Mutex;
use std::str::FromStr;
use std::sync::Arc;

/// The part of a write that lies in one page.
#[derive(Clone, Debug)]
pub struct SimPiece {
    /// Number of the page on its device.
    pub page: usize,
    /// The sectors of the page that were written: bit n stands for sector n.
    pub sectors: u8,
    /// The page as it is once the write has landed.
    pub bytes: Arc<SimPage>,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum SimEvent {
    /// A write reached the volatile cache of a device.
    Write {
        /// Index of the device in the history.
        device: usize,
        /// What was written.
        pieces: Arc<[SimPiece]>,
    },
    /// A device made durable what it had.
    Flush {
        /// Index of the device in the history.
        device: usize,
    },
    /// The test says how far it is.
    Mark(u64),
}

/// The record of several devices.
#[derive(Default)]
pub struct SimHistory {
    events: Mutex<Vec<SimEvent>>,
}

impl SimHistory {
    /// From now on these devices tell what they do.
    pub fn of(devices: &[Arc<SimDevice>]) -> Arc<SimHistory> {
        let history = Arc::new(SimHistory::default());
        for (index, device) in devices.iter().enumerate() {
            device.tell(&history, index);
        }
        history
    }

    pub(super) fn add(&self, event: SimEvent) {
        self.events.lock().push(event);
    }

    /// Adds a mark behind what has happened so far.
    pub fn mark(&self, number: u64) {
        self.add(SimEvent::Mark(number));
    }

    /// Everything so far, in order.
    pub fn events(&self) -> Vec<SimEvent> {
        self.events.lock().clone()
    }
}

/// What a power cut leaves of the writes that were not flushed. Writes are counted over all
/// devices, device by device, each in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimLoss {
    /// Everything is kept.
    Nothing,
    /// Everything is lost.
    All,
    /// Writes whose bits are set are kept, of the first 64.
    Kept(u64),
    /// All are kept but this one.
    OneLost(u64),
    /// All are lost but this one.
    OneKept(u64),
    /// All are kept, but this one only in part, as the seed says.
    OneTorn(u64, u64),
    /// The first so many are kept.
    Front(u64),
    /// The devices whose bits are set keep everything, the others nothing.
    Devices(u64),
    /// Of each write everything or nothing, by a seed.
    Writes(u64),
    /// Of each page of each write everything or nothing, by a seed.
    Pages(u64),
    /// Of each sector of each write everything or nothing, by a seed.
    Sectors(u64),
}

impl SimLoss {
    /// A random kind of loss where so many writes on so many devices are at stake.
    pub fn draw(seed: u64, writes: u64, devices: u64) -> SimLoss {
        let mut state = seed;
        let mut next = || splitmix(&mut state);
        let (kind, drawn, seed) = (next() % 11, next() % writes.max(1), next());
        match kind {
            0 => SimLoss::Nothing,
            1 => SimLoss::All,
            2 => SimLoss::Kept(seed),
            3 => SimLoss::OneLost(drawn),
            4 => SimLoss::OneKept(drawn),
            5 => SimLoss::OneTorn(drawn, seed),
            6 => SimLoss::Front(drawn),
            7 => SimLoss::Devices(seed % (1 << devices.min(63))),
            8 => SimLoss::Writes(seed),
            9 => SimLoss::Pages(seed),
            _ => SimLoss::Sectors(seed),
        }
    }

    /// The sectors that are kept of piece `piece` of write `write` on device `device`.
    fn keeps(self, device: usize, write: u64, piece: usize) -> u8 {
        let whole = |kept: bool| if kept { u8::MAX } else { 0 };
        let coin = |seed: u64, what: u64| {
            let mut state = seed ^ what.wrapping_mul(0xd1b5_4a32_d192_ed03);
            splitmix(&mut state)
        };
        let place = write << 20 | dev_len(piece);
        match self {
            SimLoss::Nothing => u8::MAX,
            SimLoss::All => 0,
            SimLoss::Kept(bits) => whole(write < 64 && bits >> write & 1 == 1),
            SimLoss::OneLost(one) => whole(write != one),
            SimLoss::OneKept(one) => whole(write == one),
            SimLoss::OneTorn(one, _) if write != one => u8::MAX,
            SimLoss::OneTorn(_, seed) | SimLoss::Sectors(seed) => {
                u8::try_from(coin(seed, place) & 0xff).expect("eight bits")
            }
            SimLoss::Front(count) => whole(write < count),
            SimLoss::Devices(bits) => whole(bits >> (device % 64) & 1 == 1),
            SimLoss::Writes(seed) => whole(coin(seed, write) & 1 == 1),
            SimLoss::Pages(seed) => whole(coin(seed, place) & 1 == 1),
        }
    }
}

impl std::fmt::Display for SimLoss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SimLoss::Nothing => f.write_str("nothing"),
            SimLoss::All => f.write_str("all"),
            SimLoss::Kept(bits) => write!(f, "kept:{bits}"),
            SimLoss::OneLost(one) => write!(f, "one-lost:{one}"),
            SimLoss::OneKept(one) => write!(f, "one-kept:{one}"),
            SimLoss::OneTorn(one, seed) => write!(f, "one-torn:{one}:{seed}"),
            SimLoss::Front(count) => write!(f, "front:{count}"),
            SimLoss::Devices(bits) => write!(f, "devices:{bits}"),
            SimLoss::Writes(seed) => write!(f, "writes:{seed}"),
            SimLoss::Pages(seed) => write!(f, "pages:{seed}"),
            SimLoss::Sectors(seed) => write!(f, "sectors:{seed}"),
        }
    }
}

impl FromStr for SimLoss {
    type Err = String;

    fn from_str(text: &str) -> Result<SimLoss, String> {
        let wrong = || format!("'{text}' is no kind of loss: try 'all' or 'writes:17'");
        let mut parts = text.split(':');
        let kind = parts.next().unwrap_or_default();
        let numbers: Result<Vec<u64>, _> = parts.map(str::parse).collect();
        let numbers = numbers.map_err(|_| wrong())?;
        Ok(match (kind, numbers.as_slice()) {
            ("nothing", []) => SimLoss::Nothing,
            ("all", []) => SimLoss::All,
            ("kept", [bits]) => SimLoss::Kept(*bits),
            ("one-lost", [one]) => SimLoss::OneLost(*one),
            ("one-kept", [one]) => SimLoss::OneKept(*one),
            ("one-torn", [one, seed]) => SimLoss::OneTorn(*one, *seed),
            ("front", [count]) => SimLoss::Front(*count),
            ("devices", [bits]) => SimLoss::Devices(*bits),
            ("writes", [seed]) => SimLoss::Writes(*seed),
            ("pages", [seed]) => SimLoss::Pages(*seed),
            ("sectors", [seed]) => SimLoss::Sectors(*seed),
            _ => return Err(wrong()),
        })
    }
}

#[derive(Clone)]
struct Member {
    durable: SimImage,
    /// Not flushed, oldest first.
    pending: Vec<Arc<[SimPiece]>>,
}

/// The devices at one point of the record.
#[derive(Clone)]
pub struct SimReplay {
    members: Vec<Member>,
}

impl SimReplay {
    /// Starts from what the devices hold, caches included.
    pub fn new(devices: &[Arc<SimDevice>]) -> SimReplay {
        SimReplay::from_images(devices.iter().map(|device| device.snapshot()).collect())
    }

    /// Starts from these images.
    pub fn from_images(images: Vec<SimImage>) -> SimReplay {
        let member = |durable| Member {
            durable,
            pending: Vec::new(),
        };
        SimReplay {
            members: images.into_iter().map(member).collect(),
        }
    }

    /// One event further.
    pub fn step(&mut self, event: &SimEvent) {
        match event {
            SimEvent::Write { device, pieces } => {
                self.members[*device].pending.push(pieces.clone());
            }
            SimEvent::Flush { device } => {
                let member = &mut self.members[*device];
                for write in std::mem::take(&mut member.pending) {
                    for piece in write.iter() {
                        let (page, sectors) = (piece.page, piece.sectors);
                        member.durable.set_sectors(page, &piece.bytes, sectors);
                    }
                }
            }
            SimEvent::Mark(_) => {}
        }
    }

    /// How many writes are at stake, over all devices.
    pub fn pending(&self) -> u64 {
        let members = self.members.iter();
        members.map(|member| dev_len(member.pending.len())).sum()
    }

    /// How many devices there are.
    pub fn devices(&self) -> u64 {
        dev_len(self.members.len())
    }

    /// What the devices hold after a power cut here.
    pub fn images(&self, loss: SimLoss) -> Vec<SimImage> {
        let mut write = 0;
        let mut images = Vec::with_capacity(self.members.len());
        for (device, member) in self.members.iter().enumerate() {
            let mut image = member.durable.clone();
            for pieces in &member.pending {
                for (nth, piece) in pieces.iter().enumerate() {
                    let mask = loss.keeps(device, write, nth) & piece.sectors;
                    image.set_sectors(piece.page, &piece.bytes, mask);
                }
                write += 1;
            }
            images.push(image);
        }
        images
    }

    /// The devices after a power cut here, with power again.
    pub fn wreck(&self, loss: SimLoss) -> Vec<Arc<SimDevice>> {
        let power = SimPower::new();
        let images = self.images(loss).into_iter().enumerate();
        images
            .map(|(nth, image)| SimDevice::with_image(&format!("sim{nth}"), image, &power))
            .collect()
    }
}

/// The sectors of a page that `len` bytes from `within` on cover.
pub(super) fn sectors_of(within: usize, len: usize) -> u8 {
    let sectors = (0..PAGE_SIZE / SECTOR)
        .filter(|sector| within <= sector * SECTOR && (sector + 1) * SECTOR <= within + len);
    sectors.fold(0, |mask, sector| mask | 1 << sector)
}
