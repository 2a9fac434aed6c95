//! The workloads by name, and how much of each is done.

use braidfs_tests::volume::{GIB, MIB};

use crate::media::Kind as MediaKind;
use crate::peers::{Kind as PeerKind, Peer};

/// What a workload does; its rows are told by the module that does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Sequential write with a final fsync, cold read, warm read.
    Sequential {
        block: u64,
        direct: bool,
        depth: u32,
    },
    /// 4 KiB, buffered, one after the other.
    Tiny,
    /// 4 KiB at random: write, warm read, cold read.
    Random { direct: bool, jobs: u32 },
    /// A file that exists is written again: in order, and at random.
    Overwrite,
    /// 4 KiB and an fsync, again and again.
    Fsync { jobs: u32 },
    /// 70 reads and 30 writes of 4 KiB of 100.
    Mixed { jobs: u32 },
    /// Through a mapping.
    Mmap,
    /// dd, with the block sizes that people use.
    Dd,
    /// cp -a of a tree there, and back when cold.
    Copy,
    /// Many small files: create and write, stat, list, read, rename, unlink.
    Files,
    /// A million files in so many directories.
    Million { dirs: u64 },
    /// 64 sequential streams at a time.
    Streams,
    /// A working set that does not fit into the cache.
    SmallCache,
    /// 1 to 4 devices.
    Scaling,
}

/// A workload.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    pub name: &'static str,
    pub about: &'static str,
    pub kind: Kind,
    /// On these media.
    pub media: &'static [MediaKind],
    /// Part of `--quick`.
    pub is_quick: bool,
    /// About how long one peer takes in a full run, in seconds: for the estimate of what is left.
    weight: f64,
}

const T: &[MediaKind] = &[MediaKind::Tmpfs];
const TD: &[MediaKind] = &[MediaKind::Tmpfs, MediaKind::Disk];

const fn full(
    name: &'static str,
    about: &'static str,
    kind: Kind,
    media: &'static [MediaKind],
    weight: f64,
) -> Workload {
    Workload {
        name,
        about,
        kind,
        media,
        is_quick: false,
        weight,
    }
}

const fn quick(
    name: &'static str,
    about: &'static str,
    kind: Kind,
    media: &'static [MediaKind],
    weight: f64,
) -> Workload {
    let mut workload = full(name, about, kind, media, weight);
    workload.is_quick = true;
    workload
}

const fn seq(block: u64, direct: bool, depth: u32) -> Kind {
    Kind::Sequential {
        block,
        direct,
        depth,
    }
}

const SMALL: u64 = 128 << 10;

/// All workloads, in the order in which they run.
#[rustfmt::skip]
pub const ALL: &[Workload] = &[
    quick("seq-1m", "1 MiB, buffered", seq(MIB, false, 1), TD, 14.0),
    full("seq-1m-qd4", "1 MiB, buffered, 4 under way", seq(MIB, false, 4), T, 14.0),
    full("seq-1m-direct", "1 MiB, O_DIRECT", seq(MIB, true, 1), T, 14.0),
    quick("seq-1m-direct-qd4", "1 MiB, O_DIRECT, 4 under way", seq(MIB, true, 4), TD, 14.0),
    full("seq-128k", "128 KiB, buffered", seq(SMALL, false, 1), T, 14.0),
    full("seq-128k-qd4", "128 KiB, buffered, 4 under way", seq(SMALL, false, 4), T, 14.0),
    full("seq-128k-direct", "128 KiB, O_DIRECT", seq(SMALL, true, 1), T, 14.0),
    full("seq-128k-direct-qd4", "128 KiB, O_DIRECT, 4 under way", seq(SMALL, true, 4), T, 14.0),
    quick("tiny", "4 KiB, sequential, buffered", Kind::Tiny, T, 8.0),
    quick("random", "4 KiB at random, buffered", Kind::Random { direct: false, jobs: 1 }, T, 16.0),
    quick("random-4", "the same, 4 jobs", Kind::Random { direct: false, jobs: 4 }, T, 16.0),
    quick("random-direct", "random, O_DIRECT", Kind::Random { direct: true, jobs: 1 }, T, 16.0),
    quick("random-direct-4", "the same, 4 jobs", Kind::Random { direct: true, jobs: 4 }, T, 16.0),
    full("overwrite", "a file is written again", Kind::Overwrite, T, 10.0),
    quick("fsync", "4 KiB write and fsync", Kind::Fsync { jobs: 1 }, TD, 6.0),
    quick("fsync-4", "the same, 4 jobs", Kind::Fsync { jobs: 4 }, TD, 6.0),
    full("mixed", "4 KiB at random, 70 reads to 30 writes", Kind::Mixed { jobs: 1 }, T, 8.0),
    full("mixed-4", "the same, 4 jobs", Kind::Mixed { jobs: 4 }, T, 8.0),
    full("mmap", "reads through a mapping", Kind::Mmap, T, 10.0),
    full("dd", "dd with 512 bytes, 4 KiB, 64 KiB, 1 MiB", Kind::Dd, T, 12.0),
    full("copy", "cp -a of a tree, there and back", Kind::Copy, T, 8.0),
    quick("files", "small files: create, stat, list, read...", Kind::Files, T, 40.0),
    quick("million", "1,000,000 files in a directory; mounts", Kind::Million { dirs: 1 }, T, 200.0),
    quick("million-1000", "as many in 1,000 directories", Kind::Million { dirs: 1000 }, T, 200.0),
    full("streams", "64 sequential streams", Kind::Streams, T, 14.0),
    full("small-cache", "a cache smaller than the working set", Kind::SmallCache, T, 14.0),
    quick("scaling", "sequential, 1 to 4 devices", Kind::Scaling, &[MediaKind::Throttled], 40.0),
];

impl Workload {
    /// By its name.
    pub fn named(name: &str) -> Option<&'static Self> {
        ALL.iter().find(|workload| workload.name == name)
    }

    /// Whether a peer has a part in it.
    pub fn takes(&self, peer: &Peer) -> bool {
        let files_only = matches!(
            self.kind,
            Kind::Mmap | Kind::Dd | Kind::Copy | Kind::Files | Kind::Million { .. } | Kind::Tiny
        );
        match peer.kind {
            PeerKind::Braidfs { .. } => true,
            PeerKind::Passthrough => matches!(self.kind, Kind::Files | Kind::Copy),
            PeerKind::Raw => {
                let syncs = matches!(self.kind, Kind::Fsync { .. } | Kind::SmallCache);
                !(files_only || syncs || self.kind == Kind::Streams)
            }
            PeerKind::Null { .. } => !matches!(self.kind, Kind::Scaling | Kind::SmallCache),
            // It is slow; what it is compared in is enough.
            PeerKind::Fuse2fs => {
                matches!(
                    self.kind,
                    Kind::Files | Kind::Copy | Kind::Sequential { .. }
                )
            }
            PeerKind::Btrfs | PeerKind::Xfs | PeerKind::Ext4 => {
                !matches!(self.kind, Kind::Scaling | Kind::SmallCache)
            }
        }
    }
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Bytes of one device on a tmpfs, and on the disk.
    pub device_bytes: u64,
    pub disk_device_bytes: u64,
    /// Bytes of a large file.
    pub large_bytes: u64,
    /// Bytes that fit into any cache.
    pub warm_bytes: u64,
    /// Of what is repeated until the time is over.
    pub secs: u64,
    /// Small files.
    pub files: u64,
    /// As many as a large directory has.
    pub million: u64,
    /// Bytes per throttled device.
    pub throttled_bytes: u64,
    /// How many of these there are, one measurement after the other.
    pub throttled_counts: &'static [usize],
}

impl Scale {
    /// About how long a workload takes for one peer, in seconds.
    pub fn secs_of(&self, workload: &Workload) -> f64 {
        let share = match workload.kind {
            Kind::Million { .. } => self.million as f64 / FULL.million as f64,
            Kind::Files => self.files as f64 / FULL.files as f64,
            _ => self.secs as f64 / FULL.secs as f64,
        };
        workload.weight * share
    }

    /// Bytes of one device on media of a kind.
    pub fn device_bytes(&self, media: MediaKind) -> u64 {
        match media {
            MediaKind::Tmpfs => self.device_bytes,
            MediaKind::Disk => self.disk_device_bytes,
            MediaKind::Throttled => 2 * self.throttled_bytes,
        }
    }
}

/// By default.
pub const FULL: Scale = Scale {
    device_bytes: 5 * GIB / 2,
    disk_device_bytes: 5 * GIB / 2,
    large_bytes: 4 * GIB,
    warm_bytes: 512 * MIB,
    secs: 4,
    files: 100_000,
    million: 1_000_000,
    throttled_bytes: 500 * MIB,
    throttled_counts: &[1, 2, 3, 4],
};

/// With `--quick`.
pub const QUICK: Scale = Scale {
    device_bytes: GIB,
    disk_device_bytes: GIB / 2,
    large_bytes: GIB,
    warm_bytes: 128 * MIB,
    secs: 1,
    files: 5_000,
    million: 50_000,
    throttled_bytes: 150 * MIB,
    throttled_counts: &[1, 4],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (index, workload) in ALL.iter().enumerate() {
            assert!(ALL[..index].iter().all(|other| other.name != workload.name));
            assert_eq!(
                Workload::named(workload.name).unwrap().about,
                workload.about
            );
        }
        assert!(Workload::named("nothing").is_none());
    }
}
