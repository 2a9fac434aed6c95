//! Telling the devices what holds nothing of value: blocks of chunks, and space in no chunk.
//!
//! What is being discarded must not be used before the devices know: for blocks the caller sees to
//! that, for space in no chunk the lock under which chunks are made.

use super::Volume;
use crate::error::{ErrorKind, Op};
use crate::request::Parts;
use crate::stripe::Geometry;
use crate::units::VolBlock;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Ranges of one device as (start, end), in bytes.
type Ranges = Vec<(u64, u64)>;

/// The list ends when each of the requests has dropped its sender: waits for all of them.
fn wait_for_all(errors: &Receiver<ErrorKind>) -> Result<(), ErrorKind> {
    let mut found = errors.iter();
    let first = found.next();
    found.for_each(drop);
    first.map_or(Ok(()), Err)
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
    pub fn discard_wait(&self, ranges: &[(VolBlock, u64)]) -> Result<(), ErrorKind> {
        wait_for_all(&self.start_discard(ranges))
    }

    fn start_discard(&self, ranges: &[(VolBlock, u64)]) -> Receiver<ErrorKind> {
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

    fn send_discards(&self, on_device: Vec<Ranges>, sender: &Sender<ErrorKind>) {
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
    pub fn discard_unallocated(&self, from: u64, to: u64) -> Result<u64, ErrorKind> {
        if let Some(error) = self.refusal(Op::Write) {
            return Err(error);
        }
        let durable = self.durable.lock();
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
        wait_for_all(&errors)?;
        Ok(bytes)
    }
}
