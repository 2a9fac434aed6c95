//! Errors, orders of completion, mirrors and flushes on simulated devices.

mod common;

use braidfs_blockdev::device::sim::{SimEffect, SimPower};
use braidfs_blockdev::{
    AlignedBuf, BlockDevice, BlockError, Chain, Chunk, ChunkKind, Class, DeviceRequest, ErrorKind,
    Kiobuf, Op, SimDevice, Volume,
};
use common::{Ended, KIB, MIB, Reports, as_devices, options, sims, tagged};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const EIO: ErrorKind = ErrorKind::Os(5);

struct Rig {
    sims: Vec<Arc<SimDevice>>,
    volume: Arc<Volume>,
    chunk: Chunk,
}

impl Rig {
    fn new(devices: usize, stripe_unit: u64) -> Rig {
        let sims = sims(&vec![16 * MIB; devices]);
        let volume = Volume::format(as_devices(&sims), &options(stripe_unit)).unwrap();
        let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
        sims.iter().for_each(|sim| sim.clear_log());
        Rig {
            sims,
            volume,
            chunk,
        }
    }

    /// Submits kiobufs of the given lengths (in blocks) one after another from the chunk's start.
    fn submit(&self, reports: &Reports, op: Op, lengths: &[u64]) {
        let mut at = self.chunk.start;
        let mut plug = self.volume.plug();
        for (number, &blocks) in lengths.iter().enumerate() {
            let kiobuf = reports.kiobuf(number, tagged(at, blocks * 4096, 1));
            match op {
                Op::Write => plug.write(at, kiobuf, Class::Background),
                _ => plug.read(at, kiobuf, None, Class::Sync),
            }
            at = at.plus(blocks);
        }
        plug.finish();
    }
}

/// Sixteen kiobufs leave as one request; a bad spot under two of them fails exactly these two.
#[test]
fn error_inside_a_merged_request_fails_only_the_kiobufs_there() {
    for op in [Op::Read, Op::Write] {
        let rig = Rig::new(1, 64 * KIB);
        let place = rig.chunk.members[0].offset_bytes;
        // Kiobufs 5 and 6 are blocks 10..14.
        rig.sims[0].inject(
            op,
            place + 11 * 4096..place + 13 * 4096,
            SimEffect::Fail(EIO),
            None,
        );
        let reports = Reports::new();
        rig.submit(&reports, op, &[2; 16]);
        let first = rig.sims[0].log()[0].clone();
        assert_eq!((first.op, first.len), (op, 16 * 8192), "all in one request");
        let mut ended = reports.take();
        ended.sort_by_key(|ended| ended.number);
        assert_eq!(ended.len(), 16);
        for Ended {
            number,
            bytes,
            error,
        } in ended
        {
            if matches!(number, 5 | 6) {
                let at = place + number as u64 * 8192;
                assert_eq!(
                    (bytes, error),
                    (
                        0,
                        Some(BlockError {
                            kind: EIO,
                            op,
                            dev: 0,
                            at
                        })
                    )
                );
            } else {
                assert_eq!((bytes, error), (8192, None), "kiobuf {number}");
            }
        }
        assert_eq!(rig.volume.stats().devices[0].piecewise_retries, 1);
    }
}

/// A kiobuf over four devices of which one fails has the bytes of three.
#[test]
fn a_striped_kiobuf_counts_the_good_bytes_of_the_other_devices() {
    let rig = Rig::new(4, 64 * KIB);
    let member = rig.chunk.members[2];
    let range = member.offset_bytes..member.offset_bytes + 4096;
    rig.sims[usize::from(member.dev)].inject(Op::Write, range, SimEffect::Fail(EIO), None);
    let reports = Reports::new();
    rig.submit(&reports, Op::Write, &[64]);
    let ended = reports.take();
    assert_eq!((ended.len(), ended[0].bytes), (1, 192 * KIB));
    assert_eq!(ended[0].error.unwrap().dev, member.dev);
}

/// A transient error is healed by the piecewise retry.
#[test]
fn a_transient_error_of_a_merged_request_is_not_seen() {
    let rig = Rig::new(1, 64 * KIB);
    let place = rig.chunk.members[0].offset_bytes;
    rig.sims[0].inject(
        Op::Write,
        place..place + 4096,
        SimEffect::Fail(EIO),
        Some(1),
    );
    let reports = Reports::new();
    rig.submit(&reports, Op::Write, &[4, 4, 4]);
    assert!(reports.take().iter().all(|ended| ended.error.is_none()));
}

/// What a short transfer left is tried again piece by piece, and only that.
#[test]
fn the_rest_of_a_short_transfer_is_retried() {
    let rig = Rig::new(1, 64 * KIB);
    let place = rig.chunk.members[0].offset_bytes;
    rig.sims[0].inject(
        Op::Write,
        place..place + 4096,
        SimEffect::Short(3 * 4096),
        Some(1),
    );
    let reports = Reports::new();
    rig.submit(&reports, Op::Write, &[2, 2, 2]);
    let ended = reports.take();
    assert!(
        ended
            .iter()
            .all(|ended| ended.error.is_none() && ended.bytes == 8192)
    );
    let lens: Vec<u64> = rig.sims[0].log().iter().map(|record| record.len).collect();
    assert_eq!(lens, [6 * 4096, 4096, 8192]);
    assert!(rig.sims[0].peek(place, 6 * 4096) == tagged(rig.chunk.start, 6 * 4096, 1)[..]);
}

/// Each kiobuf lies on one of four devices; they finish in every order, and so do the kiobufs.
#[test]
fn kiobufs_end_in_the_order_in_which_devices_finish() {
    for order in permutations(4) {
        let rig = Rig::new(4, 64 * KIB);
        rig.sims.iter().for_each(|sim| sim.hold(true));
        let reports = Reports::new();
        rig.submit(&reports, Op::Write, &[16; 4]);
        assert!(reports.take().is_empty());
        for &member in &order {
            rig.sims[usize::from(rig.chunk.members[member].dev)].release_all();
        }
        let ended: Vec<usize> = reports.take().iter().map(|ended| ended.number).collect();
        assert_eq!(ended, order);
    }
}

/// A kiobuf over all devices ends with the last of them, in any order.
#[test]
fn a_striped_kiobuf_ends_with_its_last_device() {
    for order in permutations(4) {
        let rig = Rig::new(4, 64 * KIB);
        rig.sims.iter().for_each(|sim| sim.hold(true));
        let reports = Reports::new();
        rig.submit(&reports, Op::Read, &[64]);
        for (count, &device) in order.iter().enumerate() {
            assert!(reports.take().is_empty(), "after {count} devices");
            rig.sims[device].release_all();
        }
        assert_eq!(reports.take().len(), 1);
    }
}

/// One device may end its own requests in any order too.
#[test]
fn requests_of_one_device_may_overtake() {
    let rig = Rig::new(1, 64 * KIB);
    rig.sims[0].hold(true);
    let reports = Reports::new();
    for number in 0..3 {
        let at = rig.chunk.start.plus(number as u64 * 100);
        let mut plug = rig.volume.plug();
        plug.write(at, reports.kiobuf(number, tagged(at, 4096, 1)), Class::Sync);
    }
    for index in [2, 0, 0] {
        assert!(rig.sims[0].release(index));
    }
    let ended: Vec<usize> = reports.take().iter().map(|ended| ended.number).collect();
    assert_eq!(ended, [2, 0, 1]);
    assert_eq!(rig.volume.stats().devices[0].out_of_order, 2);
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![vec![]];
    }
    let shorter = permutations(count - 1);
    let insert = |order: &Vec<usize>| {
        let order = order.clone();
        (0..count).map(move |at| {
            let mut longer = order.clone();
            longer.insert(at, count - 1);
            longer
        })
    };
    shorter.iter().flat_map(insert).collect()
}

fn meta_start(volume: &Volume) -> Chunk {
    volume
        .chunks()
        .into_iter()
        .find(|chunk| chunk.kind == ChunkKind::Meta)
        .unwrap()
}

#[test]
fn a_mirrored_read_falls_over_to_the_other_copy() {
    let rig = Rig::new(3, 64 * KIB);
    let meta = meta_start(&rig.volume);
    let data = tagged(meta.start, 64 * KIB, 7);
    rig.volume
        .write_wait(meta.start, tagged(meta.start, 64 * KIB, 7))
        .unwrap();
    for bad in 0..2usize {
        let member = meta.members[bad];
        let (range, dev) = (member.offset_bytes..member.offset_bytes + MIB, member.dev);
        let sim = &rig.sims[usize::from(dev)];
        sim.inject(Op::Read, range, SimEffect::Fail(EIO), None);
        let back = rig
            .volume
            .read_wait(meta.start, AlignedBuf::zeroed(64 << 10), None)
            .unwrap();
        assert!(back[..] == data[..]);
        // A named copy is read as it is, errors included.
        let named = u8::try_from(bad).ok();
        let refused = rig
            .volume
            .read_wait(meta.start, AlignedBuf::zeroed(4096), named);
        assert_eq!(refused.unwrap_err().dev, dev);
        let other = Some(1 - named.unwrap());
        rig.volume
            .read_wait(meta.start, AlignedBuf::zeroed(4096), other)
            .unwrap();
        sim.heal();
    }
    assert!(rig.volume.stats().mirror_retries >= 1);
}

#[test]
fn a_mirrored_block_that_fails_on_both_copies_is_an_error() {
    let rig = Rig::new(2, 64 * KIB);
    let meta = meta_start(&rig.volume);
    for member in &meta.members {
        let range = member.offset_bytes..member.offset_bytes + 4096;
        rig.sims[usize::from(member.dev)].inject(Op::Read, range, SimEffect::Fail(EIO), None);
    }
    let refused = rig
        .volume
        .read_wait(meta.start, AlignedBuf::zeroed(4096), None);
    assert_eq!(refused.unwrap_err().kind, EIO);
}

#[test]
fn a_mirrored_write_reports_either_copys_error_and_lands_on_the_good_one() {
    for bad in 0..2usize {
        let rig = Rig::new(2, 64 * KIB);
        let meta = meta_start(&rig.volume);
        let member = meta.members[bad];
        let range = member.offset_bytes..member.offset_bytes + 4096;
        rig.sims[usize::from(member.dev)].inject(Op::Write, range, SimEffect::Fail(EIO), None);
        let error = rig
            .volume
            .write_wait(meta.start, tagged(meta.start, 4096, 3))
            .unwrap_err();
        assert_eq!((error.kind, error.dev), (EIO, member.dev));
        let good = meta.members[1 - bad];
        let landed = rig.sims[usize::from(good.dev)].peek(good.offset_bytes, 4096);
        assert!(landed == tagged(meta.start, 4096, 3)[..]);
    }
}

/// Only devices written since their last flush are flushed.
#[test]
fn flush_asks_only_devices_that_were_written() {
    let rig = Rig::new(4, 64 * KIB);
    rig.volume.flush_wait().unwrap();
    let flushes = || -> Vec<usize> {
        let count = |sim: &Arc<SimDevice>| {
            sim.log()
                .iter()
                .filter(|record| record.op == Op::Flush)
                .count()
        };
        rig.sims.iter().map(count).collect()
    };
    assert_eq!(flushes(), [0; 4]);
    let reports = Reports::new();
    rig.submit(&reports, Op::Write, &[16]);
    rig.volume.flush_wait().unwrap();
    rig.volume.flush_wait().unwrap();
    let mut wanted = [0; 4];
    wanted[usize::from(rig.chunk.members[0].dev)] = 1;
    assert_eq!(flushes(), wanted);
}

/// A flush that began before a write ended does not cover it.
#[test]
fn a_flush_under_way_does_not_serve_later_writes() {
    let rig = Rig::new(1, 64 * KIB);
    let reports = Reports::new();
    rig.submit(&reports, Op::Write, &[1]);
    rig.sims[0].hold(true);
    let ended: Arc<Mutex<Vec<char>>> = Arc::default();
    let flush = |name| {
        let ended = ended.clone();
        rig.volume.flush(Box::new(move |result| {
            result.unwrap();
            ended.lock().unwrap().push(name);
        }));
    };
    flush('a');
    flush('b'); // joins: nothing was written in between
    rig.submit(&reports, Op::Write, &[1]);
    assert!(rig.sims[0].release(1), "the second write");
    flush('c'); // needs a flush of its own
    assert_eq!(rig.sims[0].held().len(), 1);
    assert!(rig.sims[0].release(0));
    assert_eq!(*ended.lock().unwrap(), ['a', 'b']);
    assert!(rig.sims[0].release(0), "the flush for c was started");
    assert_eq!(*ended.lock().unwrap(), ['a', 'b', 'c']);
}

/// A failed flush is reported by every later flush and by close: nobody may believe the next one.
#[test]
fn a_failed_flush_sticks() {
    let rig = Rig::new(2, 64 * KIB);
    rig.sims[0].inject(Op::Flush, 0..1, SimEffect::Fail(EIO), Some(1));
    let reports = Reports::new();
    rig.submit(&reports, Op::Write, &[64]);
    for _ in 0..2 {
        let error = rig.volume.flush_wait().unwrap_err();
        assert_eq!((error.op, error.kind, error.dev), (Op::Flush, EIO, 0));
    }
    assert!(rig.volume.close().is_err());
    drop(rig.volume);
    assert!(
        !Volume::assemble(as_devices(&rig.sims), true)
            .unwrap()
            .info()
            .was_clean
    );
}

/// An `end_io` that submits again, on devices that end everything at once, does not recurse.
#[test]
fn synchronous_completions_that_submit_again_do_not_recurse() {
    let rig = Rig::new(2, 64 * KIB);
    let count = Arc::new(AtomicUsize::new(0));
    fn again(volume: &Arc<Volume>, at: braidfs_blockdev::VolBlock, count: &Arc<AtomicUsize>) {
        if count.fetch_add(1, Ordering::SeqCst) >= 100_000 {
            return;
        }
        let (theirs, counter) = (volume.clone(), count.clone());
        let end_io = Box::new(move |_| again(&theirs, at, &counter));
        let kiobuf = Kiobuf::new(Box::new(AlignedBuf::zeroed(4096)), 0, 4096, end_io);
        volume.plug().read(at, kiobuf, None, Class::Sync);
    }
    again(&rig.volume, rig.chunk.start, &count);
    assert_eq!(count.load(Ordering::SeqCst), 100_001);
    count.store(0, Ordering::SeqCst);
    again(&rig.volume, braidfs_blockdev::VolBlock(1 << 40), &count);
    assert_eq!(count.load(Ordering::SeqCst), 100_001);
}

#[test]
fn what_nobody_ends_is_aborted() {
    let reports = Reports::new();
    drop(reports.kiobuf(0, AlignedBuf::zeroed(4096)));
    let chain = Chain::from(reports.kiobuf(1, AlignedBuf::zeroed(8192)));
    drop(DeviceRequest::new(Op::Write, 0, chain));
    let mut long = Chain::new();
    for number in 2..100_002 {
        long.append(Chain::from(
            reports.kiobuf(number, AlignedBuf::zeroed(4096)),
        ));
    }
    drop(long);
    let ended = reports.take();
    assert_eq!(ended.len(), 100_002);
    assert!(
        ended
            .iter()
            .all(|ended| ended.error.unwrap().kind == ErrorKind::Aborted)
    );
}

/// Reads do not starve writes, and writes wait behind reads.
#[test]
fn reads_go_first_but_writes_are_not_starved() {
    let rig = Rig::new(1, 64 * KIB);
    rig.sims[0].hold(true);
    let reports = Reports::new();
    let far = |number: usize| rig.chunk.start.plus(number as u64 * 2);
    // Fill the device's depth, then queue 40 writes and 200 reads, none adjacent to another.
    let submit = |number: usize, write: bool| {
        let at = far(number % 480);
        let kiobuf = reports.kiobuf(number, AlignedBuf::zeroed(4096));
        let mut plug = rig.volume.plug();
        match write {
            true => plug.write(at, kiobuf, Class::Background),
            false => plug.read(at, kiobuf, None, Class::Sync),
        }
    };
    (0..32).for_each(|number| submit(number, false));
    (32..72).for_each(|number| submit(number, true));
    (72..272).for_each(|number| submit(number, false));
    rig.sims[0].release_all();
    let order: Vec<usize> = reports.take().iter().map(|ended| ended.number).collect();
    assert_eq!(order.len(), 272);
    let first_write = order
        .iter()
        .position(|number| (32..72).contains(number))
        .unwrap();
    let last_read = order
        .iter()
        .rposition(|number| !(32..72).contains(number))
        .unwrap();
    assert!(
        (33..=64).contains(&first_write),
        "first write at {first_write}"
    );
    let early = order[..last_read]
        .iter()
        .filter(|number| (32..72).contains(*number))
        .count();
    assert!(
        (5..=20).contains(&early),
        "{early} writes before the last read"
    );
}

/// Requests that wait in the queue merge with what comes, at either end.
#[test]
fn waiting_requests_merge_front_and_back() {
    let rig = Rig::new(1, 64 * KIB);
    rig.sims[0].hold(true);
    let reports = Reports::new();
    let write = |number: usize, block: u64| {
        let at = rig.chunk.start.plus(block);
        let mut plug = rig.volume.plug();
        plug.write(
            at,
            reports.kiobuf(number, tagged(at, 4096, 9)),
            Class::Background,
        );
    };
    (0..32).for_each(|number| write(number, 500 + number as u64 * 2));
    write(32, 10);
    write(33, 11);
    write(34, 9);
    let stats = &rig.volume.stats().devices[0];
    assert_eq!(
        (stats.queued, stats.back_merges, stats.front_merges),
        (1, 1, 1)
    );
    rig.sims[0].release_all();
    assert!(reports.take().iter().all(|ended| ended.error.is_none()));
    let place = rig.chunk.members[0].offset_bytes + 9 * 4096;
    assert!(rig.sims[0].peek(place, 3 * 4096) == tagged(rig.chunk.start.plus(9), 3 * 4096, 9)[..]);
}

/// The simulated cut keeps flushed bytes and any mix of unflushed sectors; same seed, same wreck.
#[test]
fn a_power_cut_keeps_what_was_flushed() {
    let power = SimPower::new();
    let sim = SimDevice::from_image("sim", vec![0; 1 << 20], &power);
    let write = |byte: u8| {
        let mut buf = AlignedBuf::zeroed(8192);
        buf.fill(byte);
        let kiobuf = Kiobuf::new(Box::new(buf), 0, 8192, Box::new(|_| ()));
        sim.submit(DeviceRequest::new(Op::Write, 0, Chain::from(kiobuf)));
    };
    write(1);
    sim.submit(DeviceRequest::new(Op::Flush, 0, Chain::new()));
    write(2);
    write(3);
    assert_eq!(sim.crash(5), sim.crash(5));
    let seen: Vec<u8> = (0..20)
        .flat_map(|seed| sim.crash(seed)[..8192].to_vec())
        .step_by(512)
        .collect();
    assert!([1, 2, 3].iter().all(|byte| seen.contains(byte)) && !seen.contains(&0));
    power.cut_at(power.ops());
    write(4);
    write(5);
    assert!((0..20).all(|seed| !sim.crash(seed)[..8192].contains(&5)));
}
