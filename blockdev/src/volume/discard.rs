//! Telling the devices what holds nothing of value: blocks of chunks, and space in no chunk.
//!
//! What is being discarded must not be used before the devices know: for blocks the caller sees to
//! that, for space in no chunk the lock under which chunks are made.

use super::Volume;
use crate::error::{ErrorKind, Op};
use crate::kiobuf::InDoubt;
use crate::request::{DiscardFailed, Parts};
use crate::stripe::Geometry;
use crate::units::VolBlock;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Ranges of one device as (start, end), in bytes.
type Ranges = Vec<(u64, u64)>;

/// The list ends when each of the requests has dropped its sender: waits for all of them.
fn wait_for_all(errors: &Receiver<DiscardFailed>) -> Result<(), DiscardError> {
    let mut all = errors.iter();
    let Some((kind, in_doubt)) = all.next() else {
        return Ok(());
    };
    let mut in_doubt: Vec<InDoubt> = in_doubt.into_iter().collect();
    in_doubt.extend(all.filter_map(|(_, in_doubt)| in_doubt));
    Err(DiscardError { kind, in_doubt })
}

/// Why a discard failed.
#[derive(Clone, Debug)]
pub struct DiscardError {
    /// The first cause.
    pub kind: ErrorKind,
    /// Parts that a device did not answer, and may still carry out: what they are of must not be
    /// used before they are over.
    pub in_doubt: Vec<InDoubt>,
}

impl From<ErrorKind> for DiscardError {
    fn from(kind: ErrorKind) -> Self {
        let in_doubt = Vec::new();
        DiscardError { kind, in_doubt }
    }
}

impl Volume {
    /// Tells the devices that a range holds nothing of value. Best effort, in the background: a
    /// write that is begun later may come first, so the range must not be used again.
    pub fn discard(&self, at: VolBlock, blocks: u64) {
        self.start_discard(&[(at, blocks)]);
    }

    /// Tells the devices that some ranges hold nothing of value, and waits until they know: then
    /// the ranges may be written again. Device I/O ends in bounded time. The error is the first of
    /// any device.
    pub fn discard_wait(&self, ranges: &[(VolBlock, u64)]) -> Result<(), DiscardError> {
        wait_for_all(&self.start_discard(ranges))
    }

    fn start_discard(&self, ranges: &[(VolBlock, u64)]) -> Receiver<DiscardFailed> {
        let (sender, errors) = channel();
        if self.refusal(Op::Write).is_some() {
            return errors;
        }
        // For each device, so that the stripes of a range that are adjacent there go as one.
        let mut on_device: Vec<Ranges> = vec![Vec::new(); self.queues.len()];
        let map = self.map.read().clone();
        for &(start, blocks) in ranges {
            let (mut at, end) = (start, start.plus(blocks));
            while at < end {
                let Some(chunk) = map.find(at).map(|index| &map.chunks[index]) else {
                    break;
                };
                let within = at.bytes() - chunk.start.bytes();
                let stop = end.min(chunk.end());
                let upto = stop.bytes() - chunk.start.bytes();
                for piece in Geometry::of(chunk).pieces(within, upto) {
                    let copies = usize::from(chunk.copies());
                    for member in &chunk.members[piece.member..piece.member + copies] {
                        let from = member.offset_bytes + piece.offset;
                        let parts = &mut on_device[usize::from(member.dev)];
                        match parts.last_mut() {
                            Some((_, end)) if *end == from => *end += piece.len,
                            _ => parts.push((from, from + piece.len)),
                        }
                    }
                }
                at = stop;
            }
        }
        self.send_discards(on_device, &sender);
        errors
    }

    fn send_discards(&self, on_device: Vec<Ranges>, sender: &Sender<DiscardFailed>) {
        for ((dev, queue), parts) in (0..).zip(&self.queues).zip(on_device) {
            if parts.is_empty() {
                continue;
            }
            let requests = parts.into_iter();
            let requests =
                requests.map(|(from, to)| Parts::discard(dev, from, to - from, sender.clone()));
            queue.enqueue(requests);
            queue.kick();
        }
    }

    /// As [`Volume::discard_wait`], for device space that is in no chunk: thought of as one run,
    /// the gaps of one device after those of the other, the part `from..to`, in bytes. Returns how
    /// many bytes that were. No chunk can be made meanwhile, so let the part be small.
    pub fn discard_unallocated(&self, from: u64, to: u64) -> Result<u64, DiscardError> {
        if let Some(error) = self.refusal(Op::Write) {
            return Err(error.into());
        }
        let mut durable = self.durable.lock();
        let (sender, errors) = channel();
        let mut on_device: Vec<Ranges> = vec![Vec::new(); self.queues.len()];
        let (mut at, mut bytes) = (0, 0);
        for (dev, start, end) in self.space(&durable.table).gaps() {
            let len = end - start;
            let (first, last) = (from.clamp(at, at + len) - at, to.clamp(at, at + len) - at);
            if first < last {
                on_device[dev].push((start + first, start + last));
                bytes += last - first;
            }
            at += len;
        }
        self.send_discards(on_device, &sender);
        drop(sender);
        let done = wait_for_all(&errors);
        if let Err(error) = &done {
            durable.discarding.extend_from_slice(&error.in_doubt);
        }
        done.map(|()| bytes)
    }
}
