//! Devices that do not answer: requests end in time, memory and blocks stay with the device until
//! it is done, the others go on, and a device that answers again is used again.

mod common;

use braidfs_blockdev::device::sim::SimEffect;
use braidfs_blockdev::{
    AlignedBuf, BlockDevice, Chunk, ChunkKind, Class, Completion, DeviceRequest, ErrorKind,
    InDoubt, Kiobuf, Op, SimDevice, Volume,
};
use common::{KIB, MIB, as_devices, as_timed, options, sims, tagged};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_millis(150);
/// The watchdog looks eight times per timeout; the rest is for a busy machine.
const ENDS_WITHIN: Duration = Duration::from_millis(900);

struct Rig {
    sims: Vec<Arc<SimDevice>>,
    volume: Arc<Volume>,
    chunk: Chunk,
}

impl Rig {
    fn new(devices: usize) -> Rig {
        let sims = sims(&vec![16 * MIB; devices]);
        let volume = Volume::format(as_timed(&sims, TIMEOUT), &options(64 * KIB)).unwrap();
        let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
        Rig {
            sims,
            volume,
            chunk,
        }
    }

    /// A stripe unit of the chunk, and the device it lies on.
    fn unit(&self, number: u64) -> (braidfs_blockdev::VolBlock, &Arc<SimDevice>) {
        let at = self.chunk.start.plus(16 * number);
        let (dev, _) = self.volume.locate(at, 0).unwrap();
        (at, &self.sims[usize::from(dev)])
    }

    fn start(&self, op: Op, at: braidfs_blockdev::VolBlock, len: u64) -> Receiver<Completion> {
        let (to, from) = channel();
        let end_io = Box::new(move |done| to.send(done).unwrap());
        let len_bytes = usize::try_from(len).unwrap();
        let kiobuf = Kiobuf::new(Box::new(tagged(at, len, 3)), 0, len_bytes, end_io);
        let mut plug = self.volume.plug();
        match op {
            Op::Write => plug.write(at, kiobuf, Class::Background),
            _ => plug.read(at, kiobuf, None, Class::Sync),
        }
        from
    }

    fn is_silent(&self) -> bool {
        self.volume.silent_device().is_some()
    }
}

fn ended(from: &Receiver<Completion>) -> Completion {
    from.recv_timeout(ENDS_WITHIN).expect("an end in time")
}

fn kind(done: &Completion) -> Option<ErrorKind> {
    done.error.map(|error| error.kind)
}

/// The kiobuf ends in time without its pages; those come free when the device ends the request.
#[test]
fn a_request_that_is_not_answered_fails_and_its_memory_stays_with_the_device() {
    for op in [Op::Read, Op::Write] {
        let rig = Rig::new(2);
        let (at, sim) = rig.unit(0);
        sim.hold(true);
        let done = ended(&rig.start(op, at, 4096));
        assert_eq!(kind(&done), Some(ErrorKind::TimedOut), "{op}");
        assert!(done.pages.is_none());
        let in_doubt = done.in_doubt.expect("the device still has it");
        assert!(!in_doubt.is_over());
        let held = sim.held().iter().position(|held| held.0 == op).unwrap();
        assert!(sim.release(held));
        assert!(in_doubt.is_over());
        if op == Op::Write {
            let (_, offset) = rig.volume.locate(at, 0).unwrap();
            assert!(sim.peek(offset, 4096) == tagged(at, 4096, 3)[..], "late");
        }
    }
}

/// Others are served meanwhile; what comes fails at once; an answer brings the device back.
#[test]
fn a_silent_device_fails_fast_until_it_answers_and_the_others_go_on() {
    let rig = Rig::new(3);
    let (at, sim) = rig.unit(0);
    let (elsewhere, _) = rig.unit(1);
    sim.hold(true);
    ended(&rig.start(Op::Write, at, 4096));
    assert!(rig.is_silent());
    for _ in 0..50 {
        let begun = Instant::now();
        let done = ended(&rig.start(Op::Read, at, 4096));
        assert_eq!(kind(&done), Some(ErrorKind::TimedOut));
        assert!(begun.elapsed() < TIMEOUT / 2, "{:?}", begun.elapsed());
        assert!(done.pages.is_some(), "the device never had it");
        assert_eq!(kind(&ended(&rig.start(Op::Read, elsewhere, 4096))), None);
    }
    let name = rig.volume.stats().devices;
    let silent: Vec<_> = name.iter().filter(|queue| queue.silent).collect();
    assert_eq!(
        (silent.len(), silent[0].unanswered, silent[0].timed_out),
        (1, 1, 1)
    );
    sim.hold(false);
    sim.release_all();
    assert!(!rig.is_silent());
    assert_eq!(kind(&ended(&rig.start(Op::Write, at, 4096))), None);
    rig.volume.flush_wait().unwrap();
    assert_eq!(rig.volume.stats().devices[0].unanswered, 0);
    rig.volume.close().unwrap();
}

/// A device that lost one request and serves the next ones is not given up.
#[test]
fn a_probe_finds_out_that_a_device_answers_though_a_request_got_lost() {
    let rig = Rig::new(1);
    let (at, sim) = rig.unit(0);
    sim.hold(true);
    let lost = rig.start(Op::Read, at, 4096);
    sim.hold(false);
    let done = ended(&lost);
    assert_eq!(kind(&done), Some(ErrorKind::TimedOut));
    let until = Instant::now() + ENDS_WITHIN;
    while rig.is_silent() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!rig.is_silent());
    assert_eq!(kind(&ended(&rig.start(Op::Read, at, 4096))), None);
    assert!(!done.in_doubt.unwrap().is_over(), "still lost");
}

/// More than the device takes at once: those in the queue do not wait a timeout each.
#[test]
fn what_waits_in_the_queue_of_a_silent_device_ends_with_it() {
    let rig = Rig::new(1);
    let (_, sim) = rig.unit(0);
    sim.hold(true);
    let waiting: Vec<_> = (0..200)
        .map(|number| rig.start(Op::Write, rig.chunk.start.plus(2 * number), 4096))
        .collect();
    let begun = Instant::now();
    let mut with_the_device = 0;
    for one in &waiting {
        let done = ended(one);
        assert_eq!(kind(&done), Some(ErrorKind::TimedOut));
        with_the_device += usize::from(done.in_doubt.is_some());
    }
    assert!(begun.elapsed() < 2 * ENDS_WITHIN, "{:?}", begun.elapsed());
    assert_eq!(with_the_device, 32, "the depth of the queue");
    sim.release_all();
    assert!(!rig.is_silent());
}

#[test]
fn mirrored_blocks_are_read_from_the_copy_that_answers() {
    let rig = Rig::new(2);
    let meta = rig.volume.chunks()[0].clone();
    assert_eq!(meta.kind, ChunkKind::Meta);
    let want = tagged(meta.start, 64 * KIB, 7);
    rig.volume
        .write_wait(meta.start, tagged(meta.start, 64 * KIB, 7))
        .unwrap();
    let (dev, _) = rig.volume.locate(meta.start, 0).unwrap();
    let sim = &rig.sims[usize::from(dev)];
    sim.hold(true);
    ended(&rig.start(Op::Read, meta.start, 4096));
    for _ in 0..20 {
        let begun = Instant::now();
        let buf = AlignedBuf::zeroed(64 << 10);
        let back = rig.volume.read_wait(meta.start, buf, None).unwrap();
        assert!(back[..] == want[..]);
        assert!(begun.elapsed() < TIMEOUT / 2);
    }
    sim.release_all();
}

/// A flush that was not answered has failed, for good; one that was not begun has not.
#[test]
fn a_flush_that_is_not_answered_sticks_and_one_that_was_refused_does_not() {
    let rig = Rig::new(1);
    let (at, sim) = rig.unit(0);
    assert_eq!(kind(&ended(&rig.start(Op::Write, at, 4096))), None);
    sim.hold(true);
    ended(&rig.start(Op::Read, at, 4096));
    assert!(rig.is_silent());
    assert_eq!(
        rig.volume.flush_wait().unwrap_err().kind,
        ErrorKind::TimedOut
    );
    sim.hold(false);
    sim.release_all();
    rig.volume.flush_wait().unwrap();
    assert_eq!(kind(&ended(&rig.start(Op::Write, at, 4096))), None);
    sim.hold(true);
    assert_eq!(
        rig.volume.flush_wait().unwrap_err().kind,
        ErrorKind::TimedOut
    );
    sim.hold(false);
    sim.release_all();
    assert!(rig.volume.flush_wait().is_err(), "it sticks");
}

#[test]
fn a_discard_that_is_not_answered_says_when_it_is_over() {
    let rig = Rig::new(1);
    let (at, sim) = rig.unit(0);
    sim.hold(true);
    let error = rig.volume.discard_wait(&[(at, 16)]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::TimedOut);
    assert_eq!(error.in_doubt.len(), 1);
    assert!(!error.in_doubt[0].is_over());
    sim.release_all();
    assert!(error.in_doubt.iter().all(InDoubt::is_over));
    // Space in no chunk is not handed out while such a discard may come.
    sim.hold(true);
    let chunks = rig.volume.chunks().len();
    assert!(rig.volume.discard_unallocated(0, 4096).is_err());
    sim.hold(false);
    assert!(rig.volume.allocate_chunk(ChunkKind::Meta, 0).is_err());
    sim.release_all();
    assert_eq!(rig.volume.chunks().len(), chunks);
    rig.volume.allocate_chunk(ChunkKind::Meta, 0).unwrap();
}

/// Labels and chunk tables: opening, growing and closing end in time, and name the device.
#[test]
fn opening_and_closing_with_a_silent_device_end_in_time() {
    let rig = Rig::new(2);
    let (at, sim) = rig.unit(0);
    let sim = &Arc::clone(sim);
    let begun = Instant::now();
    sim.hold(true);
    let refused = rig.volume.allocate_chunk(ChunkKind::Data, 0).unwrap_err();
    assert!(refused.to_string().contains(sim.name()), "{refused}");
    ended(&rig.start(Op::Write, at, 4096));
    assert!(rig.volume.close().is_err());
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    drop(rig.volume);
    let begun = Instant::now();
    let Err(error) = Volume::assemble(as_timed(&rig.sims, TIMEOUT), false) else {
        panic!("assembled without an answer")
    };
    assert!(error.to_string().contains(sim.name()), "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    sim.hold(false);
    sim.release_all();
    let volume = Volume::assemble(as_devices(&rig.sims), false).unwrap();
    volume.close().unwrap();
}

/// Ends its requests from another thread, some early, some late, some around the time-out.
struct Erratic {
    sim: Arc<SimDevice>,
    state: AtomicU64,
}

impl BlockDevice for Erratic {
    fn name(&self) -> &str {
        self.sim.name()
    }

    fn size_bytes(&self) -> u64 {
        self.sim.size_bytes()
    }

    fn kind(&self) -> &'static str {
        "erratic"
    }

    fn answer_time_max(&self) -> Duration {
        Duration::from_millis(20)
    }

    fn submit(&self, request: DeviceRequest) {
        let number = self.state.fetch_add(1, Ordering::Relaxed);
        let sim = self.sim.clone();
        let late = Duration::from_micros(number.wrapping_mul(2_654_435_761) % 40_000);
        std::thread::spawn(move || {
            std::thread::sleep(late);
            sim.submit(request);
        });
    }
}

/// Ends race with time-outs: every kiobuf ends once, and everything is over in the end.
#[test]
fn ends_that_race_with_time_outs_leave_one_end_each() {
    let sims = sims(&[16 * MIB; 2]);
    let volume = Volume::format(as_devices(&sims), &options(64 * KIB)).unwrap();
    let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
    volume.close().unwrap();
    drop(volume);
    sims[0].inject(
        Op::Write,
        0..u64::MAX,
        SimEffect::Fail(ErrorKind::Os(5)),
        Some(0),
    );
    let erratic = |sim: &Arc<SimDevice>| {
        let (sim, state) = (sim.clone(), AtomicU64::new(0));
        Arc::new(Erratic { sim, state }) as Arc<dyn BlockDevice>
    };
    // Read-only, so that opening needs no luck.
    let volume = loop {
        let devices = sims.iter().map(erratic).collect();
        if let Ok(volume) = Volume::assemble(devices, true) {
            break volume;
        }
    };
    let (to, from) = channel();
    let count = 1000;
    for number in 0..count {
        let to = to.clone();
        let end_io = Box::new(move |done: Completion| to.send((number, done)).unwrap());
        let buf = Box::new(AlignedBuf::zeroed(24 * 4096));
        let mut plug = volume.plug();
        let at = chunk
            .start
            .plus(number as u64 * 24 % (chunk.len_blocks - 24));
        plug.read(
            at,
            Kiobuf::new(buf, 0, 24 * 4096, end_io),
            None,
            Class::Sync,
        );
        if number % 16 == 0 {
            std::thread::sleep(Duration::from_millis(4));
        }
    }
    drop(to);
    let mut ends = vec![0; count];
    let (mut good, mut in_doubt) = (0, Vec::new());
    for (number, done) in from.iter() {
        ends[number] += 1;
        good += usize::from(done.error.is_none());
        assert_eq!(done.pages.is_none(), done.in_doubt.is_some());
        in_doubt.extend(done.in_doubt);
    }
    assert!(ends.iter().all(|&ends| ends == 1));
    assert!(
        good > 0 && !in_doubt.is_empty(),
        "{good} good, {} late",
        in_doubt.len()
    );
    let until = Instant::now() + Duration::from_secs(20);
    while !in_doubt.iter().all(InDoubt::is_over) {
        assert!(Instant::now() < until, "not over");
        std::thread::sleep(Duration::from_millis(5));
    }
}
