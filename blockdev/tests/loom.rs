//! All schedules of the concurrent parts, explored by loom:
//! `RUSTFLAGS="--cfg loom" cargo test -p braidfs-blockdev --test loom --release`.
#![cfg(loom)]

use braidfs_blockdev::device::mailbox::{Mailbox, Next};
use braidfs_blockdev::{AlignedBuf, Chain, Completion, DeviceRequest, ErrorKind, Kiobuf, Op};
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Notify};
use loom::thread;
use std::sync::Mutex;

/// What a device writes before it ends a piece; loom reports any access that is not ordered.
struct Memory(UnsafeCell<u32>);

// SAFETY: that accesses are ordered is what the test is about; loom checks it.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

type Ends = std::sync::Arc<Mutex<Vec<(u64, Option<ErrorKind>)>>>;

/// A kiobuf of `blocks` whose end reads what all its devices wrote.
fn kiobuf(blocks: usize, memory: &[Arc<Memory>], ends: &Ends) -> Kiobuf {
    let (memory, ends) = (memory.to_vec(), ends.clone());
    let end_io = Box::new(move |done: Completion| {
        for cell in &memory {
            // SAFETY: all writers ended their pieces before; loom checks it.
            cell.0.with(|value| assert_eq!(unsafe { *value }, 1));
        }
        ends.lock()
            .unwrap()
            .push((done.bytes, done.error.map(|error| error.kind)));
    });
    Kiobuf::new(
        Box::new(AlignedBuf::zeroed(blocks * 4096)),
        0,
        blocks * 4096,
        end_io,
    )
}

fn memory(count: usize) -> Vec<Arc<Memory>> {
    (0..count)
        .map(|_| Arc::new(Memory(UnsafeCell::new(0))))
        .collect()
}

fn device(
    cell: &Arc<Memory>,
    chain: Chain,
    result: Result<u64, ErrorKind>,
) -> thread::JoinHandle<()> {
    let cell = cell.clone();
    thread::spawn(move || {
        // SAFETY: each cell has one writer; loom checks that the reader comes after.
        cell.0.with_mut(|value| unsafe { *value = 1 });
        DeviceRequest::new(Op::Read, 0, chain).end(result);
    })
}

/// Three pieces end on three threads: one end, after all of them, with the good bytes of all.
#[test]
fn pieces_on_three_threads_end_one_kiobuf_once() {
    loom::model(|| {
        let (memory, ends) = (memory(3), Ends::default());
        let mut chain = Chain::from(kiobuf(3, &memory, &ends));
        let first = device(&memory[0], chain.split_to(4096), Ok(4096));
        let second = device(&memory[1], chain.split_to(4096), Ok(4096));
        // The third device is this thread.
        // SAFETY: as in `device`.
        memory[2].0.with_mut(|value| unsafe { *value = 1 });
        DeviceRequest::new(Op::Read, 0, chain).end(Ok(4096));
        first.join().unwrap();
        second.join().unwrap();
        assert_eq!(*ends.lock().unwrap(), [(3 * 4096, None)]);
    });
}

/// Two errors and one good piece: one end, one of the two errors, the good bytes.
#[test]
fn racing_errors_leave_one_of_them() {
    loom::model(|| {
        let (memory, ends) = (memory(2), Ends::default());
        let mut chain = Chain::from(kiobuf(3, &memory, &ends));
        let good = chain.split_to(4096);
        let first = device(&memory[0], chain.split_to(4096), Err(ErrorKind::Os(5)));
        let second = device(&memory[1], chain, Err(ErrorKind::DeviceGone));
        good.end_good();
        first.join().unwrap();
        second.join().unwrap();
        let ends = ends.lock().unwrap();
        assert_eq!(ends.len(), 1);
        assert_eq!(ends[0].0, 4096);
        assert!(matches!(
            ends[0].1,
            Some(ErrorKind::Os(5) | ErrorKind::DeviceGone)
        ));
    });
}

/// Two kiobufs merged and cut for two devices that end at the same time: each ends once.
#[test]
fn merged_and_split_kiobufs_end_once_each() {
    loom::model(|| {
        let (memory, ends) = (memory(2), Ends::default());
        let mut chain = Chain::from(kiobuf(2, &memory[..1], &ends));
        chain.append(Chain::from(kiobuf(2, &memory, &ends)));
        let front = chain.split_to(3 * 4096);
        let first = device(&memory[0], front, Ok(3 * 4096));
        let second = device(&memory[1], chain, Ok(4096));
        first.join().unwrap();
        second.join().unwrap();
        assert_eq!(*ends.lock().unwrap(), [(2 * 4096, None); 2]);
    });
}

/// A device ends a request while it is given up: one end, whoever was first; if it was the device,
/// the memory is whole and comes back, else it stays until the device is done.
#[test]
fn a_time_out_that_races_with_the_end_leaves_one_end() {
    loom::model(|| {
        let ends = std::sync::Arc::new(Mutex::new(Vec::new()));
        let to = ends.clone();
        let end_io = Box::new(move |done: Completion| to.lock().unwrap().push(done));
        let buf = Box::new(AlignedBuf::zeroed(4096));
        let chain = Chain::from(Kiobuf::new(buf, 0, 4096, end_io));
        let request = DeviceRequest::new(Op::Read, 0, chain);
        let flight = request.flight();
        let device = thread::spawn(move || request.end(Ok(4096)));
        let given_up = flight.time_out(0);
        device.join().unwrap();
        assert!(!flight.time_out(0), "it has ended");
        let ends = ends.lock().unwrap();
        assert_eq!(ends.len(), 1);
        let done = &ends[0];
        assert_eq!(given_up, done.error.is_some());
        assert_eq!(given_up, done.pages.is_none());
        assert_eq!(done.bytes, if given_up { 0 } else { 4096 });
        assert!(
            done.in_doubt
                .as_ref()
                .is_none_or(braidfs_blockdev::InDoubt::is_over)
        );
    });
}

/// A sleeping owner never misses what was posted, and two posters never both miss to wake it.
#[test]
fn a_posted_item_is_never_slept_over() {
    loom::model(|| {
        let (mailbox, bell) = (Arc::new(Mailbox::new()), Arc::new(Notify::new()));
        let post = |item: u32| {
            let (mailbox, bell) = (mailbox.clone(), bell.clone());
            thread::spawn(move || {
                if mailbox.post(std::iter::once(item)) {
                    bell.notify();
                }
            })
        };
        let posters = [post(1), post(2)];
        let mut sum = 0;
        while sum < 3 {
            mailbox.take(|items| sum += items.sum::<u32>());
            if sum < 3 && mailbox.next() == Next::Sleep {
                bell.wait();
                mailbox.awake();
            }
        }
        posters
            .into_iter()
            .for_each(|poster| poster.join().unwrap());
    });
}
