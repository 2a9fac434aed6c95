//! The place of the journal: blocks at fixed places of the first members, each in two copies.
//!
//! What they hold is not known here. Behind each of its two labels a member has room for 15 blocks.
//! Block `at` has copy 0 behind the first label of member `at mod m` and copy 1 behind the second
//! label of the next member, where `m` is the number of members that take part: so a few blocks in
//! a row go to different members at the same time, and a single member holds both copies.

use super::Volume;
use super::transfer::{self, Job};
use crate::chain::Chain;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::{EndIo, Kiobuf};
use crate::label::{INCOMPAT_JOURNAL, JOURNAL_LEN, JOURNAL_OFFSETS};
use crate::pages::AlignedBuf;
use crate::request::Parts;
use crate::units::{BLOCK_SIZE, dev_len, mem_len};

/// Members that take part: with more, a mount would have more to read than it gains.
const MEMBERS_MAX: u64 = 16;

/// Blocks of one place.
const PLACE_BLOCKS: u64 = JOURNAL_LEN as u64 / BLOCK_SIZE;

/// Copies of a block.
const COPIES: u64 = JOURNAL_OFFSETS.len() as u64;

const BLOCK_LEN: usize = BLOCK_SIZE as usize;

/// Order of preference in a queue: that of synchronous writes.
const LANE: u8 = 1;

/// The whole journal as it was read: the copies of each block.
pub struct JournalCopies(Vec<Result<AlignedBuf, BlockError>>);

/// Where a copy of a block lies: the member, and the block in its place.
fn place(members: u64, at: u64, copy: u64) -> (u64, u64) {
    ((at + copy) % members, at / members)
}

fn dev_of(member: u64) -> u16 {
    u16::try_from(member).unwrap_or(BlockError::NO_DEVICE)
}

impl JournalCopies {
    /// Blocks of the journal; 0 if there is none.
    pub fn blocks(&self) -> u64 {
        dev_len(self.0.len()) / COPIES
    }

    /// The copies of block `at`, which is below [`JournalCopies::blocks`].
    pub fn copies(&self, at: u64) -> impl Iterator<Item = Result<&[u8], BlockError>> {
        let copies = at * COPIES..(at + 1) * COPIES;
        copies.map(|nth| match &self.0[mem_len(nth)] {
            Ok(buf) => Ok(&buf[..]),
            Err(error) => Err(*error),
        })
    }
}

impl Volume {
    fn journal_members(&self) -> u64 {
        match self.identity.incompat & INCOMPAT_JOURNAL {
            0 => 0,
            _ => dev_len(self.devices.len()).min(MEMBERS_MAX),
        }
    }

    /// Blocks of the journal; 0 if the volume has none.
    pub fn journal_blocks(&self) -> u64 {
        self.journal_members() * PLACE_BLOCKS
    }

    /// Reads all of the journal; what cannot be read is an error in its place. It is for when a
    /// volume is opened, before anything is written.
    pub fn read_journal(&self) -> JournalCopies {
        let members = self.journal_members();
        let job = |(at, copy): (u64, u64)| {
            let (member, slot) = place(members, at, copy);
            Job {
                dev: mem_len(member),
                op: Op::Read,
                offset: JOURNAL_OFFSETS[mem_len(copy)] + slot * BLOCK_SIZE,
                buf: Some(AlignedBuf::zeroed(BLOCK_LEN)),
            }
        };
        let copies = |at| (0..COPIES).map(move |copy| (at, copy));
        let jobs: Vec<Job> = (0..self.journal_blocks())
            .flat_map(copies)
            .map(job)
            .collect();
        let lost = BlockError {
            kind: ErrorKind::Aborted,
            op: Op::Read,
            dev: BlockError::NO_DEVICE,
            at: 0,
        };
        let results = transfer::run(&self.devices, jobs).into_iter();
        JournalCopies(results.map(|result| result?.ok_or(lost)).collect())
    }

    /// Writes `blocks`, whole blocks, to those from `first` on, all copies at the same time. Each
    /// of the [`Volume::journal_writes`] kiobufs ends with what `end_io` makes. Durable only after
    /// a flush.
    ///
    /// # Panics
    /// If they are not all inside of the journal.
    pub fn write_journal(&self, first: u64, blocks: &[u8], mut end_io: impl FnMut() -> EndIo) {
        let count = dev_len(blocks.len()) / BLOCK_SIZE;
        assert!(
            first + count <= self.journal_blocks(),
            "beyond the end of the journal"
        );
        let members = self.journal_members();
        for (at, block) in (first..).zip(blocks.chunks_exact(BLOCK_LEN)) {
            for (copy, &start) in (0..).zip(&JOURNAL_OFFSETS) {
                let buf = Box::new(AlignedBuf::from_slice(block));
                let kiobuf = Kiobuf::new(buf, 0, BLOCK_LEN, end_io());
                let refusal = self.refusal(Op::Write);
                let (member, slot) = place(members, at, copy);
                let dev = dev_of(member);
                let (op, at) = (Op::Write, start + slot * BLOCK_SIZE);
                let chain = Chain::from(kiobuf);
                if let Some(kind) = refusal {
                    chain.end_bad(BlockError { kind, op, dev, at });
                    continue;
                }
                let parts = Parts {
                    lane: LANE,
                    ..Parts::new(op, dev, at, chain)
                };
                self.queues[mem_len(member)].enqueue(std::iter::once(parts));
            }
        }
        for queue in &self.queues[..mem_len(members)] {
            queue.kick();
        }
    }

    /// How many kiobufs a write of `blocks` blocks takes.
    pub fn journal_writes(blocks: usize) -> usize {
        blocks * JOURNAL_OFFSETS.len()
    }

    /// Where a block of the journal lies, for people.
    pub fn journal_places(&self, at: u64) -> String {
        let members = self.journal_members().max(1);
        let describe = |(copy, start): (u64, &u64)| {
            let (member, slot) = place(members, at, copy);
            let name = self.device_name(dev_of(member));
            format!("{name} at byte {}", start + slot * BLOCK_SIZE)
        };
        let places: Vec<_> = (0..).zip(&JOURNAL_OFFSETS).map(describe).collect();
        places.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_copies_share_a_place() {
        for members in 1..=MEMBERS_MAX {
            let blocks = members * PLACE_BLOCKS;
            let places: BTreeSet<_> = (0..blocks)
                .flat_map(|at| (0..COPIES).map(move |copy| (copy, place(members, at, copy))))
                .inspect(|(_, (member, slot))| {
                    assert!(*member < members && *slot < PLACE_BLOCKS);
                })
                .collect();
            assert_eq!(dev_len(places.len()), blocks * COPIES);
        }
    }

    #[test]
    fn the_copies_of_a_block_lie_on_two_members() {
        for at in 0..30 {
            assert_ne!(place(2, at, 0).0, place(2, at, 1).0);
        }
    }
}
