//! The plug: kiobufs in, requests for the member queues out.
//!
//! A kiobuf is cut where its range crosses a stripe unit, a chunk or the longest request; a piece
//! that continues the request before it joins it at once, so a sequential stream never makes more
//! requests than it needs. `finish` (or drop) sorts what is left, joins neighbours and hands each
//! queue its share before any device is started.

use super::map::ChunkMap;
use super::types::{ChunkMember, Class};
use super::{Counters, Volume};
use crate::chain::Chain;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::{Kiobuf, Leg};
use crate::queue::IO_BYTES_MAX;
use crate::queue::backlog::{may_merge, merge_back, merge_front, sort_and_merge};
use crate::request::Parts;
use crate::stripe::Geometry;
use crate::trace;
use crate::units::{VolBlock, dev_len};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Requests that a plug holds back before it dispatches by itself. With 1 MiB requests it is far
/// more than any writeback batch; with scattered 4 KiB ones it bounds the wait of the first.
const PLUG_REQUESTS_MAX: usize = 1024;

/// A plug's lists, kept for the next plug.
#[derive(Default)]
pub(super) struct Lists {
    per_device: Vec<Vec<Parts>>,
    requests: usize,
}

/// Collects kiobufs and dispatches them together when it is finished or dropped.
pub struct Plug<'a> {
    volume: &'a Volume,
    map: Arc<ChunkMap>,
    lists: Lists,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    kiobufs: u64,
    bytes: u64,
    chains: u64,
    splits: u64,
    back_merges: u64,
    front_merges: u64,
}

impl<'a> Plug<'a> {
    pub(super) fn new(volume: &'a Volume) -> Plug<'a> {
        let mut lists = volume.plug_lists.lock().pop().unwrap_or_default();
        lists.per_device.resize_with(volume.queues.len(), Vec::new);
        Plug {
            volume,
            map: volume.map.read().clone(),
            lists,
            counts: Counts::default(),
        }
    }

    /// Reads into the kiobuf from `at` on. Of mirrored blocks `copy` names one to read and be told
    /// of its errors; without it any copy serves, and the other one steps in where it fails.
    pub fn read(&mut self, at: VolBlock, kiobuf: Kiobuf, copy: Option<u8>, class: Class) {
        let lane = if class == Class::Sync { 0 } else { 1 };
        self.add(Op::Read, at, kiobuf, copy, lane);
    }

    /// Writes the kiobuf to `at`, to every copy; it ends when all did. Writes that overlap and are
    /// under way at the same time land in any order.
    pub fn write(&mut self, at: VolBlock, kiobuf: Kiobuf, class: Class) {
        let lane = if class == Class::Sync { 1 } else { 2 };
        self.add(Op::Write, at, kiobuf, None, lane);
    }

    /// Writes the kiobuf to one copy of mirrored blocks, to mend it; the caller knows that the
    /// other one has the same content, and that nobody else writes these blocks meanwhile.
    pub fn write_copy(&mut self, at: VolBlock, kiobuf: Kiobuf, copy: u8, class: Class) {
        let lane = if class == Class::Sync { 1 } else { 2 };
        self.add(Op::Write, at, kiobuf, Some(copy), lane);
    }

    /// Dispatches everything; what dropping the plug does too.
    pub fn finish(self) {}

    fn add(&mut self, op: Op, at: VolBlock, kiobuf: Kiobuf, copy: Option<u8>, lane: u8) {
        self.counts.kiobufs += 1;
        self.counts.bytes += kiobuf.len();
        let (number, (file, offset)) = (kiobuf.number(), kiobuf.place());
        trace::kiobuf(&trace::Submitted {
            number,
            op,
            file,
            offset,
            address: at.bytes(),
            len: kiobuf.len(),
        });
        let begin = at;
        let mut view = kiobuf.into_view();
        if copy.is_some() {
            view.leg = Leg::Pinned;
        }
        let mut rest = Chain::of(view);
        if let Some(kind) = self.volume.refusal(op) {
            return rest.end_bad(no_device(kind, op, at));
        }
        let mut at = at;
        while !rest.is_empty() {
            let Some(index) = self.find(at) else {
                return rest.end_bad(no_device(ErrorKind::OutOfRange, op, at));
            };
            let chunk = &self.map.chunks[index];
            let within = at.bytes() - chunk.start.bytes();
            let len_max = rest
                .bytes()
                .min(chunk.len_bytes() - within)
                .min(IO_BYTES_MAX);
            let piece = Geometry::of(chunk).piece(within, len_max);
            let copies = usize::from(chunk.copies());
            let members = match (copies, op, copy) {
                (1, _, None | Some(0)) => piece.member..piece.member + 1,
                (_, Op::Write, None) => 0..copies,
                (_, _, Some(copy)) if usize::from(copy) < copies => {
                    usize::from(copy)..usize::from(copy) + 1
                }
                (1.., _, Some(_)) | (0, ..) => {
                    return rest.end_bad(no_device(ErrorKind::OutOfRange, op, at));
                }
                (_, _, None) => {
                    // Alternate by place, so that both copies work and streams stay sequential.
                    let first = crate::units::mem_len(within / IO_BYTES_MAX) % copies;
                    let queue_of = |copy: usize| {
                        let member = chunk.members.get(piece.member + copy)?;
                        self.volume.queues.get(usize::from(member.dev))
                    };
                    let is_silent = queue_of(first).is_some_and(|queue| queue.is_silent());
                    let first = if is_silent {
                        (first + 1) % copies
                    } else {
                        first
                    };
                    first..first + 1
                }
            };
            let places = Places::of(&chunk.members[members], piece.offset);
            let part = rest.split_to(piece.len);
            self.counts.splits += u64::from(!rest.is_empty());
            if at != begin || !rest.is_empty() || places.all().len() > 1 {
                for &(dev, offset) in places.all() {
                    let start = at.bytes() - begin.bytes();
                    trace::part(number, dev, start, piece.len, offset);
                }
            }
            for &(dev, offset) in places.all().iter().skip(1) {
                self.push(
                    Parts::new(op, dev, offset, part.duplicate(Leg::Further)),
                    lane,
                );
            }
            if let Some(&(dev, offset)) = places.all().first() {
                self.push(Parts::new(op, dev, offset, part), lane);
            }
            at = at.plus(piece.len / crate::units::BLOCK_SIZE);
        }
    }

    /// Chunk of a block; the map is renewed if the block is in a chunk that is younger than it.
    fn find(&mut self, at: VolBlock) -> Option<usize> {
        self.map.find(at).or_else(|| {
            self.map = self.volume.map.read().clone();
            self.map.find(at)
        })
    }

    fn push(&mut self, mut parts: Parts, lane: u8) {
        parts.lane = lane;
        self.counts.chains += 1;
        let list = &mut self.lists.per_device[usize::from(parts.dev)];
        if let Some(last) = list.last_mut() {
            if may_merge(last, &parts, IO_BYTES_MAX).is_ok() {
                self.counts.back_merges += 1;
                return merge_back(last, parts);
            }
            if may_merge(&parts, last, IO_BYTES_MAX).is_ok() {
                self.counts.front_merges += 1;
                return merge_front(last, parts);
            }
        }
        list.push(parts);
        self.lists.requests += 1;
        if self.lists.requests >= PLUG_REQUESTS_MAX {
            self.dispatch();
        }
    }

    fn dispatch(&mut self) {
        self.lists.requests = 0;
        let queues = &self.volume.queues;
        let mut used = 0u64;
        for (dev, list) in self.lists.per_device.iter_mut().enumerate() {
            if list.is_empty() {
                continue;
            }
            used |= 1 << (dev % 64);
            self.counts.back_merges += sort_and_merge(list, IO_BYTES_MAX);
            queues[dev].enqueue(list.drain(..));
        }
        for (dev, queue) in queues.iter().enumerate() {
            if used & (1 << (dev % 64)) != 0 {
                queue.kick();
            }
        }
    }
}

/// Where the copies of one piece go: one or two places, without an allocation.
#[derive(Default)]
struct Places {
    places: [(u16, u64); 2],
    len: usize,
}

impl Places {
    fn of(members: &[ChunkMember], offset: u64) -> Places {
        let mut places = Places::default();
        for (place, member) in places.places.iter_mut().zip(members) {
            *place = (member.dev, member.offset_bytes + offset);
            places.len += 1;
        }
        places
    }

    fn all(&self) -> &[(u16, u64)] {
        &self.places[..self.len]
    }
}

fn no_device(kind: ErrorKind, op: Op, at: VolBlock) -> BlockError {
    BlockError {
        kind,
        op,
        dev: BlockError::NO_DEVICE,
        at: at.bytes(),
    }
}

impl Drop for Plug<'_> {
    fn drop(&mut self) {
        self.dispatch();
        let Counters {
            kiobufs,
            kiobuf_bytes,
            chains,
            splits,
            plugs,
            back_merges,
            front_merges,
            ..
        } = &self.volume.counters;
        let counts = &self.counts;
        if counts.kiobufs > 0 {
            let add = |counter: &std::sync::atomic::AtomicU64, value| {
                counter.fetch_add(value, Ordering::Relaxed);
            };
            add(kiobufs, counts.kiobufs);
            add(kiobuf_bytes, counts.bytes);
            add(chains, counts.chains);
            add(splits, counts.splits);
            add(plugs, 1);
            add(back_merges, counts.back_merges);
            add(front_merges, counts.front_merges);
        }
        let lists = std::mem::take(&mut self.lists);
        let mut pool = self.volume.plug_lists.lock();
        if dev_len(pool.len()) < super::PLUG_LISTS_MAX {
            pool.push(lists);
        }
    }
}
