//! A volume of simulated devices, a backing that never overwrites, and the books it keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use braidfs_blockdev::{
    BlockDevice, BlockError, ChunkKind, DeviceRequest, FormatOptions, SimDevice, VolBlock, Volume,
};
use braidfs_cache::{
    AddressSpace, Backing, Cache, CacheConfig, CacheError, MapOut, PageRange, Placement, Segment,
    SegmentKind, SpaceClass,
};

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// A small, fast, seeded generator (xorshift64*).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.next().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// A simulated device whose requests end on a thread of its own, a little out of order.
pub struct AsyncSim {
    sim: Arc<SimDevice>,
    requests: Mutex<Sender<DeviceRequest>>,
}

impl AsyncSim {
    pub fn new(name: &str, size: u64, seed: u64) -> Arc<Self> {
        let sim = SimDevice::new(name, size);
        let (requests, waiting) = mpsc::channel::<DeviceRequest>();
        let device = Arc::clone(&sim);
        std::thread::spawn(move || {
            let mut rng = Rng::new(seed);
            let mut held = Vec::new();
            while let Ok(request) = waiting.recv() {
                held.push(request);
                if rng.below(4) == 0 {
                    std::thread::sleep(Duration::from_micros(rng.below(300)));
                }
                held.extend(waiting.try_iter());
                while !held.is_empty() {
                    let index = rng.below(held.len() as u64) as usize;
                    device.submit(held.swap_remove(index));
                }
            }
        });
        Arc::new(Self {
            sim,
            requests: Mutex::new(requests),
        })
    }
}

impl BlockDevice for AsyncSim {
    fn name(&self) -> &str {
        self.sim.name()
    }
    fn size_bytes(&self) -> u64 {
        self.sim.size_bytes()
    }
    fn kind(&self) -> &'static str {
        "async sim"
    }
    fn submit(&self, request: DeviceRequest) {
        self.requests.lock().unwrap().send(request).unwrap();
    }
}

/// Where the pages of each space live, and what was reported about them.
pub struct Store {
    volume: Arc<Volume>,
    state: Mutex<StoreState>,
    /// The errno that `allocate` fails with, if any.
    pub fail_allocate: Mutex<Option<i32>>,
    pub gate: Gate,
    pub allocated: AtomicU64,
    pub failed: AtomicU64,
    pub merged: AtomicU64,
    pub corrupt: Mutex<Vec<(u64, u64, u8)>>,
    pub calls: AtomicU64,
}

#[derive(Default)]
struct StoreState {
    homes: BTreeMap<(u64, u64), (VolBlock, u32)>,
    free: BTreeSet<u64>,
    cursor: u64,
    pending: BTreeSet<u64>,
}

/// Holds callers of `allocate` back while shut.
#[derive(Default)]
pub struct Gate {
    shut: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub fn shut(&self) {
        *self.shut.lock().unwrap() = true;
    }
    pub fn open(&self) {
        *self.shut.lock().unwrap() = false;
        self.opened.notify_all();
    }
    fn pass(&self) {
        let guard = self.shut.lock().unwrap();
        drop(self.opened.wait_while(guard, |shut| *shut).unwrap());
    }
}

impl Store {
    fn new(volume: Arc<Volume>, kind: ChunkKind) -> Arc<Self> {
        let mut free = BTreeSet::new();
        while let Ok(chunk) = volume.allocate_chunk(kind, 0) {
            free.extend(chunk.start.0..chunk.start.0 + chunk.len_blocks);
        }
        assert!(!free.is_empty());
        Arc::new(Self {
            volume,
            state: Mutex::new(StoreState {
                free,
                ..StoreState::default()
            }),
            fail_allocate: Mutex::default(),
            gate: Gate::default(),
            allocated: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            merged: AtomicU64::new(0),
            corrupt: Mutex::default(),
            calls: AtomicU64::new(0),
        })
    }

    /// Where a page lives.
    pub fn home(&self, space: u64, page: u64) -> Option<VolBlock> {
        self.state
            .lock()
            .unwrap()
            .homes
            .get(&(space, page))
            .map(|home| home.0)
    }

    /// Device and byte offset of a copy of a page.
    pub fn place(&self, space: u64, page: u64, copy: u8) -> (usize, u64) {
        let (dev, at) = self
            .volume
            .locate(self.home(space, page).unwrap(), copy)
            .unwrap();
        (usize::from(dev), at)
    }

    /// Forgets pages, as truncate does after `discard`.
    pub fn forget(&self, space: u64, pages: PageRange) {
        let mut state = self.state.lock().unwrap();
        let range = (space, pages.start)..(space, pages.end);
        let gone: Vec<_> = state
            .homes
            .range(range)
            .map(|(&key, home)| (key, home.0))
            .collect();
        for (key, block) in gone {
            state.homes.remove(&key);
            state.free.insert(block.0);
        }
    }
}

impl Backing for Store {
    fn map(&self, space: u64, pages: PageRange, out: &mut MapOut) -> Result<(), CacheError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let state = self.state.lock().unwrap();
        for page in pages.start..pages.end {
            let kind = match state.homes.get(&(space, page)) {
                None => SegmentKind::Hole,
                Some(&(block, crc)) => {
                    out.crcs.push(crc);
                    SegmentKind::Data {
                        block,
                        crc_index: Some(out.crcs.len() - 1),
                    }
                }
            };
            out.segments.push(Segment {
                pages: PageRange::single(page),
                kind,
            });
        }
        Ok(())
    }

    fn allocate(
        &self,
        _space: u64,
        runs: &[PageRange],
        out: &mut Vec<Placement>,
    ) -> Result<(), CacheError> {
        self.gate.pass();
        let fails = *self.fail_allocate.lock().unwrap();
        if let Some(errno) = fails {
            return Err(CacheError::Backing(errno));
        }
        let mut state = self.state.lock().unwrap();
        for run in runs {
            let mut page = run.start;
            while page < run.end {
                // Next fit, so that what is written together lies together.
                let cursor = state.cursor;
                let first = state
                    .free
                    .range(cursor..)
                    .next()
                    .or(state.free.first())
                    .copied();
                let first = first.expect("the test volume is large enough");
                let mut count = 0;
                while count < run.end - page && state.free.remove(&(first + count)) {
                    state.pending.insert(first + count);
                    count += 1;
                }
                state.cursor = first + count;
                let pages = PageRange {
                    start: page,
                    end: page + count,
                };
                out.push(Placement {
                    pages,
                    block: VolBlock(first),
                });
                page += count;
            }
            self.allocated.fetch_add(run.count(), Ordering::SeqCst);
        }
        Ok(())
    }

    fn written(
        &self,
        space: u64,
        placement: Placement,
        crcs: &[u32],
        result: Result<(), BlockError>,
    ) {
        assert_eq!(crcs.len() as u64, placement.pages.count());
        let mut state = self.state.lock().unwrap();
        let pages = placement.pages.start..placement.pages.end;
        for ((page, block), &crc) in pages.zip(placement.block.0..).zip(crcs) {
            assert!(state.pending.remove(&block), "reported once");
            if result.is_ok() {
                let old = state.homes.insert((space, page), (VolBlock(block), crc));
                state.free.extend(old.map(|old| old.0.0));
            } else {
                state.free.insert(block);
            }
        }
        if result.is_err() {
            self.failed
                .fetch_add(placement.pages.count(), Ordering::SeqCst);
        }
    }

    fn dirty_merged(&self, _space: u64, pages: u64) {
        self.merged.fetch_add(pages, Ordering::SeqCst);
    }

    fn corrupt(&self, space: u64, page: u64, _block: VolBlock, copy: u8) {
        self.corrupt.lock().unwrap().push((space, page, copy));
    }
}

/// Everything a test needs.
pub struct Rig {
    pub sims: Vec<Arc<SimDevice>>,
    pub volume: Arc<Volume>,
    pub store: Arc<Store>,
    pub cache: Arc<Cache>,
}

pub struct RigOptions {
    pub devices: usize,
    pub device_bytes: u64,
    pub cache: CacheConfig,
    pub kind: ChunkKind,
    pub is_async: bool,
}

impl Default for RigOptions {
    fn default() -> Self {
        Self {
            devices: 2,
            device_bytes: 48 * MIB,
            cache: quiet(8 * MIB),
            kind: ChunkKind::Data,
            is_async: false,
        }
    }
}

/// A cache that writes back only when told to, or when memory is short.
pub fn quiet(size_bytes: u64) -> CacheConfig {
    CacheConfig {
        size_bytes,
        dirty_background_percent: 90,
        dirty_hard_percent: 90,
        dirty_expire: Duration::from_secs(3600),
        flusher_threads: 2,
        ..CacheConfig::default()
    }
}

impl Rig {
    pub fn new(options: RigOptions) -> Self {
        let mut sims = Vec::new();
        let mut devices: Vec<Arc<dyn BlockDevice>> = Vec::new();
        for index in 0..options.devices {
            let name = format!("sim{index}");
            if options.is_async {
                let device = AsyncSim::new(&name, options.device_bytes, index as u64);
                sims.push(Arc::clone(&device.sim));
                devices.push(device);
            } else {
                let sim = SimDevice::new(&name, options.device_bytes);
                sims.push(Arc::clone(&sim));
                devices.push(sim);
            }
        }
        let volume = Volume::format(devices, &FormatOptions::default()).unwrap();
        let store = Store::new(Arc::clone(&volume), options.kind);
        let cache = Cache::new(options.cache, Arc::clone(&volume)).unwrap();
        Self {
            sims,
            volume,
            store,
            cache,
        }
    }

    pub fn space(&self, id: u64) -> Arc<AddressSpace> {
        self.cache.new_space(
            id,
            SpaceClass::Data,
            Arc::clone(&self.store) as Arc<dyn Backing>,
        )
    }

    /// No writes under way: dirty pages are what the reports add up to.
    pub fn check_books(&self, newly_dirty: u64, dropped: u64, dirty: u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let store = &self.store;
        assert_eq!(
            newly_dirty + count(&store.failed),
            dirty + dropped + count(&store.allocated) + count(&store.merged),
            "newly dirty {newly_dirty} dropped {dropped} dirty {dirty}; \
             failed {} allocated {} merged {}",
            count(&store.failed),
            count(&store.allocated),
            count(&store.merged)
        );
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.store.gate.open();
        self.cache.shutdown();
    }
}

/// Runs `work`; a hang fails the test instead of the whole run.
pub fn within(limit: Duration, work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(work);
    let began = Instant::now();
    while !thread.is_finished() {
        assert!(
            began.elapsed() < limit,
            "still running after {limit:?}: deadlock?"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    thread.join().expect("the work succeeded");
}

/// Waits for a condition, with a bound.
pub fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_true() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "waiting for {what}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Reads by the asynchronous path and waits.
pub fn read_async(
    space: &Arc<AddressSpace>,
    ra: &braidfs_cache::ReadaheadState,
    offset: u64,
    len: usize,
    eof: u64,
) -> Result<Vec<u8>, CacheError> {
    if let Some(data) = space.read_cached(offset, len, ra) {
        return Ok(data.slices().collect::<Vec<_>>().concat());
    }
    let (send, receive) = mpsc::channel();
    let done = move |result: Result<braidfs_cache::ReadData, CacheError>| {
        let bytes = result.map(|data| {
            let bytes = data.slices().collect::<Vec<_>>().concat();
            assert_eq!(bytes.len(), data.len());
            bytes
        });
        send.send(bytes).unwrap();
    };
    space.read(offset, len, ra, eof, Box::new(done));
    receive
        .recv_timeout(Duration::from_secs(30))
        .expect("a read ends")
}
