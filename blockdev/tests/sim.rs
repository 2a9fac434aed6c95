//! The simulated device itself: what its record says, what a power cut leaves, how it fails.
#![allow(missing_docs)]

use braidfs_blockdev::device::sim::{
    SimDevice, SimEffect, SimEvent, SimHistory, SimKind, SimLoss, SimPlan, SimReplay,
};
use braidfs_blockdev::{
    AlignedBuf, BlockDevice, Chain, Completion, DeviceRequest, ErrorKind, Kiobuf, Op,
};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

const PAGE: usize = 4096;

type Ended = Receiver<Result<u64, ErrorKind>>;

fn submit(sim: &SimDevice, op: Op, page: u64, buf: AlignedBuf) -> Ended {
    let (sender, receiver) = sync_channel(1);
    let len = buf.len();
    let kiobuf = Kiobuf::new(
        Box::new(buf),
        0,
        len,
        Box::new(move |done| {
            let result = done.error.map_or(Ok(done.bytes), |error| Err(error.kind));
            sender.send(result).unwrap();
        }),
    );
    sim.submit(DeviceRequest::new(op, page * 4096, Chain::from(kiobuf)));
    receiver
}

fn write(sim: &SimDevice, page: u64, pages: usize, byte: u8) -> Ended {
    let mut buf = AlignedBuf::zeroed(pages * PAGE);
    buf.fill(byte);
    submit(sim, Op::Write, page, buf)
}

fn flush(sim: &SimDevice) {
    sim.submit(DeviceRequest::new(Op::Flush, 0, Chain::new()));
}

fn pair() -> Vec<Arc<SimDevice>> {
    let named = |nth| SimDevice::new(&format!("sim{nth}"), 1 << 20);
    (0..2).map(named).collect()
}

/// The first byte of each of the first pages of each device.
fn first_bytes(devices: &[Arc<SimDevice>], pages: u64) -> Vec<Vec<u8>> {
    let bytes = |device: &Arc<SimDevice>| {
        let pages = 0..pages;
        pages.map(|page| device.peek(page * 4096, 1)[0]).collect()
    };
    devices.iter().map(bytes).collect()
}

#[test]
fn a_cut_leaves_any_subset_of_what_was_not_flushed() {
    let devices = pair();
    let base = SimReplay::new(&devices);
    let history = SimHistory::of(&devices);
    write(&devices[0], 0, 1, 1);
    write(&devices[1], 0, 1, 1);
    flush(&devices[0]);
    history.mark(7);
    write(&devices[0], 0, 1, 2);
    write(&devices[0], 1, 1, 2);
    let mut replay = base.clone();
    let events = history.events();
    assert!(matches!(events[3], SimEvent::Mark(7)), "{events:?}");
    events.iter().for_each(|event| replay.step(event));
    assert_eq!((replay.pending(), replay.devices()), (3, 2));
    let left = |loss| first_bytes(&replay.wreck(loss), 2);
    assert_eq!(left(SimLoss::Nothing), [[2, 2], [1, 0]]);
    assert_eq!(left(SimLoss::All), [[1, 0], [0, 0]]);
    assert_eq!(left(SimLoss::Kept(0b110)), [[1, 2], [1, 0]]);
    assert_eq!(left(SimLoss::OneLost(0)), [[1, 2], [1, 0]]);
    assert_eq!(left(SimLoss::OneKept(0)), [[2, 0], [0, 0]]);
    assert_eq!(left(SimLoss::Front(1)), [[2, 0], [0, 0]]);
    assert_eq!(left(SimLoss::Devices(0b10)), [[1, 0], [1, 0]]);
    // What is on the devices now is not touched by any of that.
    assert_eq!(first_bytes(&devices, 2), [[2, 2], [1, 0]]);
}

#[test]
fn a_cut_tears_writes_at_sectors_only() {
    let devices = pair();
    let mut replay = SimReplay::new(&devices);
    let history = SimHistory::of(&devices);
    write(&devices[0], 3, 2, 9);
    history.events().iter().for_each(|event| replay.step(event));
    let (mut torn, mut whole) = (0, 0);
    for seed in 0..64 {
        let image = replay.images(SimLoss::Sectors(seed))[0].to_vec();
        let sectors = image[3 * PAGE..5 * PAGE].chunks(512);
        let kept = sectors.filter(|sector| {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "inside a sector"
            );
            sector[0] == 9
        });
        match kept.count() {
            0 | 16 => whole += 1,
            _ => torn += 1,
        }
        assert!(image[..3 * PAGE].iter().all(|byte| *byte == 0));
    }
    assert!(torn > 50 && whole < 14, "{torn} torn, {whole} whole");
}

#[test]
fn kinds_of_loss_are_spelt_as_they_are_read() {
    for seed in 0..200 {
        let loss = SimLoss::draw(seed, 9, 3);
        assert_eq!(loss.to_string().parse(), Ok(loss));
    }
    for wrong in ["", "none", "writes", "writes:x", "all:1"] {
        assert!(wrong.parse::<SimLoss>().is_err(), "'{wrong}' was taken");
    }
}

#[test]
fn images_share_pages_and_digests_tell_them_apart() {
    let sim = SimDevice::new("sim", 1 << 20);
    let _written = write(&sim, 5, 1, 1);
    let one = sim.snapshot();
    let two = one.clone();
    assert_eq!(one.digest(), two.digest());
    let (a, b) = (one.page(5).unwrap(), two.page(5).unwrap());
    assert!(Arc::ptr_eq(a, b));
    let _written = write(&sim, 5, 1, 2);
    assert_ne!(one.digest(), sim.snapshot().digest());
    // Moved by a page is something else, too.
    let other = SimDevice::new("sim", 1 << 20);
    let _written = write(&other, 6, 1, 1);
    assert_ne!(one.digest(), other.snapshot().digest());
    let _written = write(&other, 6, 1, 0);
    assert_eq!(other.stored_pages(), 1, "until it is flushed");
    flush(&other);
    assert_eq!(other.stored_pages(), 0, "zeros are not stored");
}

#[test]
fn a_silent_device_comes_back() {
    let sim = SimDevice::new("sim", 1 << 20);
    sim.inject(Op::Write, 0..1 << 20, SimEffect::Hang, None);
    let ended = write(&sim, 0, 1, 3);
    assert!(ended.try_recv().is_err());
    assert_eq!(sim.peek(0, 1), [0]);
    sim.come_back();
    assert_eq!(ended.recv(), Ok(Ok(4096)));
    assert_eq!(sim.peek(0, 1), [3]);
    sim.inject(
        Op::Write,
        0..1 << 20,
        SimEffect::Delay(Duration::from_millis(5)),
        Some(1),
    );
    let ended = write(&sim, 0, 1, 4);
    assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(Ok(4096)));
    assert_eq!(sim.peek(0, 1), [4]);
}

#[test]
fn a_full_store_takes_what_fits_and_what_is_there_already() {
    let sim = SimDevice::new("sim", 1 << 20);
    sim.limit_room(Some(2));
    assert_eq!(write(&sim, 0, 2, 1).recv(), Ok(Ok(8192)));
    let full = Ok(Err(ErrorKind::Os(libc::ENOSPC)));
    assert_eq!(write(&sim, 2, 1, 1).recv(), full);
    assert_eq!(write(&sim, 1, 1, 2).recv(), Ok(Ok(4096)));
    sim.limit_room(None);
    assert_eq!(write(&sim, 2, 1, 1).recv(), Ok(Ok(4096)));
}

#[test]
fn a_read_may_lie_once() {
    let sim = SimDevice::new("sim", 1 << 20);
    sim.inject(Op::Read, 0..4096, SimEffect::FlipRead(11), Some(1));
    let read = || {
        let (sender, receiver) = sync_channel(1);
        let end = Box::new(move |done: Completion| {
            assert!(done.error.is_none());
            let bytes = AlignedBuf::from_pages(done.pages.unwrap()).map_err(|_| "other pages");
            sender.send(bytes.unwrap()[..3].to_vec()).unwrap();
        });
        let kiobuf = Kiobuf::new(Box::new(AlignedBuf::zeroed(PAGE)), 0, PAGE, end);
        sim.submit(DeviceRequest::new(Op::Read, 0, Chain::from(kiobuf)));
        receiver.recv().unwrap()
    };
    assert_eq!(read(), [0, 8, 0]);
    assert_eq!(read(), [0, 0, 0]);
    assert_eq!(sim.peek(0, 2), [0, 0], "what is stored is as it was");
}

#[test]
fn plans_are_drawn_by_their_seed_and_wait_for_their_request() {
    let kinds = [SimKind::Transient, SimKind::Lose, SimKind::Permanent];
    let plan = |seed| SimPlan::draw(seed, &kinds, 8, 1 << 20, 100);
    assert_eq!(plan(5), plan(5));
    assert_ne!(plan(5), plan(6));
    let sim = SimDevice::new("sim", 1 << 20);
    let mut plan = SimPlan::draw(1, &[SimKind::Lose], 1, 1 << 20, 1);
    plan.faults[0].from_request = 3;
    sim.follow(&plan);
    for page in 0..4 {
        assert_eq!(write(&sim, page, 1, 1).recv(), Ok(Ok(4096)));
    }
    let lost: Vec<u8> = (0..4).map(|page| sim.peek(page * 4096, 1)[0]).collect();
    assert_eq!(lost, [1, 1, 0, 1]);
}
