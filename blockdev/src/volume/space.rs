//! Where the next chunk goes. Pure: sizes and chunks in, a plan out.
//!
//! Device space is cut from the first gap that serves, so with nothing freed it grows upwards.
//! Data stripes over all devices that still have room, then over fewer, and at last lies on one, so
//! unequal devices are used to the end. Data leaves a reserve for metadata on the two emptiest
//! devices, because a mirror needs both.

use super::types::{Chunk, ChunkKind, ChunkMember, Profile};
use crate::label::CHUNK_SPACE_START;
use crate::units::{BLOCK_SIZE, round_down};

/// Shares of a chunk on a device are at least this long, but for what the end of a device leaves.
const SHARE_MIN: u64 = 1 << 20;
/// Shares are at most this long, so that moving one is a matter of seconds.
const SHARE_MAX: u64 = 1 << 30;
/// Shares of an unclamped size: this many on the whole volume.
const SHARES_WANTED: u64 = 256;
/// Metadata grows in steps of at most this.
const META_SHARE_MAX: u64 = 64 << 20;

/// Free space of one device: gaps as (start, end), ordered, each at least [`SHARE_MIN`] long.
#[derive(Clone, Debug, Default)]
pub(crate) struct Free {
    gaps: Vec<(u64, u64)>,
}

impl Free {
    fn bytes(&self) -> u64 {
        self.gaps.iter().map(|(start, end)| end - start).sum()
    }

    fn largest(&self) -> u64 {
        self.gaps
            .iter()
            .map(|(start, end)| end - start)
            .max()
            .unwrap_or(0)
    }

    fn first_fit(&self, len: u64) -> Option<u64> {
        self.gaps
            .iter()
            .find(|(start, end)| end - start >= len)
            .map(|&(start, _)| start)
    }

    fn take(&mut self, at: u64, len: u64) {
        for gap in &mut self.gaps {
            if gap.0 == at {
                gap.0 += len;
            }
        }
        self.gaps.retain(|(start, end)| end - start >= SHARE_MIN);
    }
}

/// The devices' sizes and what the chunks leave of them.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    free: Vec<Free>,
    share_max: u64,
    stripe_unit: u64,
}

/// A chunk to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub kind: ChunkKind,
    pub profile: Profile,
    pub members: Vec<ChunkMember>,
    pub member_len_bytes: u64,
}

impl Space {
    pub(crate) fn new(sizes: &[u64], stripe_unit: u32, chunks: &[Chunk]) -> Space {
        let mut taken: Vec<Vec<(u64, u64)>> = vec![Vec::new(); sizes.len()];
        for chunk in chunks {
            for member in &chunk.members {
                let end = member.offset_bytes + chunk.member_len_bytes;
                taken[usize::from(member.dev)].push((member.offset_bytes, end));
            }
        }
        let gaps_of = |(size, mut taken): (&u64, Vec<(u64, u64)>)| {
            taken.sort_unstable();
            let end = round_down(*size, BLOCK_SIZE);
            taken.push((end, end));
            let mut gaps = Vec::new();
            let mut at = CHUNK_SPACE_START;
            for (start, end) in taken {
                if start.saturating_sub(at) >= SHARE_MIN {
                    gaps.push((at, start));
                }
                at = at.max(end);
            }
            Free { gaps }
        };
        let total: u64 = sizes.iter().sum();
        let wanted = pow2_floor(total / SHARES_WANTED).clamp(4 << 20, SHARE_MAX);
        let stripe_unit = u64::from(stripe_unit);
        Space {
            free: sizes.iter().zip(taken).map(gaps_of).collect(),
            share_max: wanted.max(stripe_unit),
            stripe_unit,
        }
    }

    /// Device bytes that a chunk could still use.
    pub(crate) fn unallocated(&self) -> u64 {
        self.free.iter().map(Free::bytes).sum()
    }

    /// Device space in no chunk, in order: device, first byte and end.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = (usize, u64, u64)> {
        let gaps_of = |(dev, free): (usize, &Free)| {
            let gaps = free.gaps.clone().into_iter();
            gaps.map(move |(start, end)| (dev, start, end))
        };
        self.free.iter().enumerate().flat_map(gaps_of)
    }

    /// The next chunk of metadata: two places, on two devices where two have room.
    pub(crate) fn plan_meta(&self) -> Option<Plan> {
        let want = self.share_max.min(META_SHARE_MAX);
        let mut order: Vec<usize> = (0..self.free.len()).collect();
        order.sort_by_key(|&dev| std::cmp::Reverse(self.free[dev].bytes()));
        let (first, second) = (*order.first()?, order.get(1).copied());
        if let Some(second) = second {
            let room = self.free[first].largest().min(self.free[second].largest());
            if room >= SHARE_MIN {
                let len = want.min(round_down(room, BLOCK_SIZE));
                return self.plan(ChunkKind::Meta, Profile::Mirror, &[first, second], len);
            }
        }
        let free = &self.free[first];
        let fits_twice = |len: u64| {
            let mut rest = free.clone();
            let places = [(); 2].map(|()| rest.first_fit(len).inspect(|&at| rest.take(at, len)));
            places[0].is_some() && places[1].is_some()
        };
        let mut len = want.min(round_down(free.largest(), BLOCK_SIZE));
        while !fits_twice(len) {
            len = round_down(len / 2, BLOCK_SIZE);
            if len < SHARE_MIN {
                return None;
            }
        }
        self.plan(ChunkKind::Meta, Profile::Mirror, &[first, first], len)
    }

    /// The next chunk of data, leaving `reserve` bytes for metadata.
    pub(crate) fn plan_data(&self, reserve: u64) -> Option<Plan> {
        let room = self.data_room(reserve);
        let unit = self.stripe_unit;
        let least = unit.max(SHARE_MIN);
        let wide: Vec<usize> = (0..room.len()).filter(|&dev| room[dev] >= least).collect();
        if wide.len() >= 2 {
            let len = wide
                .iter()
                .map(|&dev| room[dev])
                .min()
                .unwrap_or(0)
                .min(self.share_max);
            let len = round_down(len, unit);
            return self.plan(ChunkKind::Data, Profile::Stripe, &wide, len);
        }
        let single = (0..room.len()).max_by_key(|&dev| room[dev])?;
        let len = round_down(room[single].min(self.share_max), BLOCK_SIZE);
        if len < SHARE_MIN {
            return None;
        }
        self.plan(ChunkKind::Data, Profile::Single, &[single], len)
    }

    /// Longest share that data may take of each device. The reserve is held back on the two
    /// emptiest; what the second cannot hold of its half, the first does.
    fn data_room(&self, reserve: u64) -> Vec<u64> {
        let mut held = vec![0; self.free.len()];
        let mut order: Vec<usize> = (0..self.free.len()).collect();
        order.sort_by_key(|&dev| std::cmp::Reverse(self.free[dev].bytes()));
        if let Some(&second) = order.get(1) {
            held[second] = (reserve / 2).min(self.free[second].bytes());
        }
        if let Some(&first) = order.first() {
            held[first] = reserve - order.get(1).map_or(0, |&second| held[second]);
        }
        let room =
            |(free, held): (&Free, u64)| free.largest().min(free.bytes().saturating_sub(held));
        self.free.iter().zip(held).map(room).collect()
    }

    /// Bytes that the next `count` chunks of metadata would hold, or as many of them as fit.
    pub(crate) fn meta_growth(&self, count: usize) -> u64 {
        let (mut rest, mut bytes) = (self.clone(), 0);
        for _ in 0..count {
            let Some(plan) = rest.plan_meta() else { break };
            for member in &plan.members {
                let free = &mut rest.free[usize::from(member.dev)];
                free.take(member.offset_bytes, plan.member_len_bytes);
            }
            bytes += plan.member_len_bytes;
        }
        bytes
    }

    fn plan(&self, kind: ChunkKind, profile: Profile, devs: &[usize], len: u64) -> Option<Plan> {
        let mut free = self.free.clone();
        let mut members = Vec::new();
        for &dev in devs {
            let offset_bytes = free[dev].first_fit(len)?;
            free[dev].take(offset_bytes, len);
            members.push(ChunkMember {
                dev: u16::try_from(dev).ok()?,
                offset_bytes,
            });
        }
        Some(Plan {
            kind,
            profile,
            members,
            member_len_bytes: len,
        })
    }
}

fn pow2_floor(value: u64) -> u64 {
    value.checked_ilog2().map_or(0, |bits| 1 << bits)
}
