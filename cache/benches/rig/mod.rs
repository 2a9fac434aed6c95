//! A cache on four devices that do nothing, for what measures the cache by itself.
#![allow(dead_code, reason = "each program uses a part of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use braidfs_blockdev::{
    BlockDevice, BlockError, ChunkKind, DeviceRequest, FormatOptions, Op, SimDevice, VolBlock,
    Volume,
};
use braidfs_cache::{
    AddressSpace, Backing, Cache, CacheConfig, CacheError, MapOut, PageRange, Placement, Segment,
    SegmentKind, SpaceClass,
};

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One page.
pub const PAGE: u64 = 4096;

/// Labels are kept, everything behind them is forgotten.
struct Null {
    head: Arc<SimDevice>,
    size: u64,
}

impl BlockDevice for Null {
    fn name(&self) -> &str {
        "null"
    }
    fn size_bytes(&self) -> u64 {
        self.size
    }
    fn kind(&self) -> &'static str {
        "null"
    }
    fn submit(&self, request: DeviceRequest) {
        if request.op() != Op::Flush && request.offset() >= MIB {
            let len = request.len();
            request.end(Ok(len));
        } else {
            self.head.submit(request);
        }
    }
}

/// Homes in sequence, without checksums to verify.
struct Homes {
    next: AtomicU64,
    start: u64,
    blocks: u64,
}

impl Backing for Homes {
    fn map(&self, _space: u64, pages: PageRange, out: &mut MapOut) -> Result<(), CacheError> {
        let block = VolBlock(self.start + pages.start % (self.blocks / 2));
        let kind = SegmentKind::Data {
            block,
            crc_index: None,
        };
        out.segments.push(Segment { pages, kind });
        Ok(())
    }
    fn allocate(
        &self,
        _space: u64,
        runs: &[PageRange],
        out: &mut Vec<Placement>,
    ) -> Result<(), CacheError> {
        for &pages in runs {
            let mut next = self.next.fetch_add(pages.count(), Ordering::Relaxed) % self.blocks;
            if next + pages.count() > self.blocks {
                self.next.store(pages.count(), Ordering::Relaxed);
                next = 0;
            }
            out.push(Placement {
                pages,
                block: VolBlock(self.start + next),
            });
        }
        Ok(())
    }
    fn written(&self, _: u64, _: Placement, _: &[u32], _: Result<(), BlockError>) {}
}

/// A cache on such devices.
pub struct Rig {
    pub cache: Arc<Cache>,
    homes: Arc<Homes>,
    pub volume: Arc<Volume>,
}

impl Rig {
    /// A file.
    pub fn space(&self, id: u64) -> Arc<AddressSpace> {
        self.cache.new_space(
            id,
            SpaceClass::Data,
            Arc::clone(&self.homes) as Arc<dyn Backing>,
        )
    }
}

/// A cache of so many bytes.
pub fn rig(cache_bytes: u64) -> Rig {
    rig_with(CacheConfig {
        size_bytes: cache_bytes,
        ..CacheConfig::default()
    })
}

/// A cache as it is told.
pub fn rig_with(config: CacheConfig) -> Rig {
    let devices = (0..4)
        .map(|_| {
            let (head, size) = (SimDevice::new("head", 2 * MIB), 8 << 30);
            Arc::new(Null { head, size }) as Arc<dyn BlockDevice>
        })
        .collect();
    let volume = Volume::format(devices, &FormatOptions::default()).expect("format");
    let chunk = volume.allocate_chunk(ChunkKind::Data, 0).expect("room");
    let homes = Homes {
        next: AtomicU64::new(0),
        start: chunk.start.0,
        blocks: chunk.len_blocks,
    };
    let cache = Cache::new(config, Arc::clone(&volume)).expect("memory");
    Rig {
        cache,
        homes: Arc::new(homes),
        volume,
    }
}
