//! The volume in words and numbers.

use super::Volume;
use super::types::{Chunk, DeviceInfo, VolumeInfo};
use crate::codec::uuid_text;
use crate::stats::VolumeStats;
use std::sync::atomic::{AtomicU64, Ordering};

impl Volume {
    /// The volume, described.
    pub fn info(&self) -> VolumeInfo {
        let durable = self.durable.lock();
        let (generation, chunks) = (durable.generation, durable.table.chunks.clone());
        drop(durable);
        let devices = self.devices.iter().zip(0u16..).map(|(device, index)| {
            let on_it = |chunk: &Chunk| {
                let shares = chunk.members.iter().filter(|member| member.dev == index);
                shares.map(|_| chunk.member_len_bytes).sum::<u64>()
            };
            DeviceInfo {
                name: device.name().to_owned(),
                index,
                uuid: uuid_text(&self.identity.device_uuids[usize::from(index)]),
                size_bytes: self.identity.sizes[usize::from(index)],
                allocated_bytes: chunks.iter().map(on_it).sum(),
                backend: device.kind(),
            }
        });
        VolumeInfo {
            uuid: uuid_text(&self.identity.fs_uuid),
            label: self.label_text(),
            generation,
            stripe_unit_bytes: self.identity.stripe_unit_bytes,
            was_clean: self.was_clean,
            devices: devices.collect(),
            chunks,
        }
    }

    /// What the volume did since it was assembled.
    pub fn stats(&self) -> VolumeStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let devices: Vec<_> = self.queues.iter().map(|queue| queue.stats()).collect();
        let counters = &self.counters;
        VolumeStats {
            kiobufs: get(&counters.kiobufs),
            kiobuf_bytes: get(&counters.kiobuf_bytes),
            chains: get(&counters.chains),
            splits: get(&counters.splits),
            plugs: get(&counters.plugs),
            back_merges: get(&counters.back_merges)
                + devices.iter().map(|device| device.back_merges).sum::<u64>(),
            front_merges: get(&counters.front_merges)
                + devices
                    .iter()
                    .map(|device| device.front_merges)
                    .sum::<u64>(),
            mirror_retries: get(&counters.mirror_retries),
            devices,
        }
    }
}
