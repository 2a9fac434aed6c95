//! What the tests share: simulated members, recognisable bytes, kiobufs that report.
#![allow(dead_code, reason = "each test binary uses its part")]

use braidfs_blockdev::{
    AlignedBuf, BlockDevice, BlockError, Completion, DeviceRequest, EndIo, FormatOptions, Kiobuf,
    SimDevice, VolBlock,
};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

pub fn sims(sizes: &[u64]) -> Vec<Arc<SimDevice>> {
    let named = |(index, &size): (usize, &u64)| SimDevice::new(&format!("sim{index}"), size);
    sizes.iter().enumerate().map(named).collect()
}

pub fn as_devices(sims: &[Arc<SimDevice>]) -> Vec<Arc<dyn BlockDevice>> {
    sims.iter()
        .map(|sim| sim.clone() as Arc<dyn BlockDevice>)
        .collect()
}

pub fn options(stripe_unit_bytes: u64) -> FormatOptions {
    let stripe_unit_bytes = u32::try_from(stripe_unit_bytes).unwrap();
    FormatOptions {
        stripe_unit_bytes,
        ..FormatOptions::default()
    }
}

/// Bytes in which each block tells its logical address and a salt.
pub fn tagged(at: VolBlock, len: u64, salt: u64) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(usize::try_from(len).unwrap());
    for (block, number) in buf.chunks_exact_mut(4096).zip(at.0..) {
        for word in block.chunks_exact_mut(16) {
            word[..8].copy_from_slice(&number.to_le_bytes());
            word[8..].copy_from_slice(&salt.to_le_bytes());
        }
    }
    buf
}

/// How a numbered kiobuf ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    pub number: usize,
    pub bytes: u64,
    pub error: Option<BlockError>,
}

/// Makes kiobufs that report their end.
pub struct Reports {
    to: Sender<Ended>,
    from: Receiver<Ended>,
}

impl Reports {
    pub fn new() -> Reports {
        let (to, from) = channel();
        Reports { to, from }
    }

    pub fn end_io(&self, number: usize) -> EndIo {
        let to = self.to.clone();
        Box::new(move |done: Completion| {
            to.send(Ended {
                number,
                bytes: done.bytes,
                error: done.error,
            })
            .unwrap();
        })
    }

    pub fn kiobuf(&self, number: usize, buf: AlignedBuf) -> Kiobuf {
        let len = buf.len();
        Kiobuf::new(Box::new(buf), 0, len, self.end_io(number))
    }

    /// All ends so far, in order.
    pub fn take(&self) -> Vec<Ended> {
        self.from.try_iter().collect()
    }
}

/// A simulated device with a time to answer in.
pub struct Timed {
    pub sim: Arc<SimDevice>,
    pub answer_time_max: Duration,
}

impl BlockDevice for Timed {
    fn name(&self) -> &str {
        self.sim.name()
    }

    fn size_bytes(&self) -> u64 {
        self.sim.size_bytes()
    }

    fn kind(&self) -> &'static str {
        "timed"
    }

    fn answer_time_max(&self) -> Duration {
        self.answer_time_max
    }

    fn submit(&self, request: DeviceRequest) {
        self.sim.submit(request);
    }
}

pub fn as_timed(sims: &[Arc<SimDevice>], answer_time_max: Duration) -> Vec<Arc<dyn BlockDevice>> {
    let timed = |sim: &Arc<SimDevice>| {
        let sim = sim.clone();
        Arc::new(Timed {
            sim,
            answer_time_max,
        }) as Arc<dyn BlockDevice>
    };
    sims.iter().map(timed).collect()
}
