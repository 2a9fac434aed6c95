//! The volume: members with their queues, and the chunk table that maps logical blocks to them.
//!
//! Lock order: `durable` (held across label and table updates), then `map`, then a queue's lock.
//! Readers and writers of data only take `map` for a moment to copy an `Arc`.

mod describe;
mod discard;
mod elect;
mod journal;
mod labels;
mod map;
mod plug;
mod relabel;
mod space;
mod store;
mod transfer;
mod types;
mod wait;

pub use discard::DiscardError;
pub use journal::JournalCopies;
pub use labels::LabelFault;
pub use plug::Plug;
pub use types::*;

use crate::completion::FlushDone;
use crate::device::BlockDevice;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::{InDoubt, Leg, View};
use crate::label::{DEVICE_BYTES_MIN, DEVICES_MAX, INCOMPAT_JOURNAL, is_stripe_unit};
use crate::pages::PageRun;
use crate::queue::{DeviceQueue, FlushFanIn, FlushTicket, ReadFallback, Watchdog};
use crate::request::Parts;
use crate::stripe::Geometry;
use crate::table::Table;
use crate::units::{BLOCK_SIZE, VolBlock};
use map::ChunkMap;
use parking_lot::{Mutex, RwLock};
use space::{Plan, Space};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use store::Identity;

/// Bound on the wait for what is under way when the volume is closed.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(60);
/// Plug lists kept for reuse: more plugs than this are never open at once for long.
const PLUG_LISTS_MAX: u64 = 64;

#[derive(Default)]
struct Counters {
    kiobufs: AtomicU64,
    kiobuf_bytes: AtomicU64,
    chains: AtomicU64,
    splits: AtomicU64,
    plugs: AtomicU64,
    back_merges: AtomicU64,
    front_merges: AtomicU64,
    mirror_retries: AtomicU64,
}

/// What is on the devices.
struct Durable {
    table: Table,
    generation: u64,
    /// An update failed half way: which generation the members have is for the next assembly to
    /// say.
    failed: Option<BlockError>,
    /// Discards of space in no chunk that a device may still carry out.
    discarding: Vec<InDoubt>,
}

/// Assembled members with their chunk table and queues.
pub struct Volume {
    /// Dropped first, so that nothing looks at the queues of a volume that goes.
    _watchdog: Option<Watchdog>,
    identity: Identity,
    devices: Vec<Arc<dyn BlockDevice>>,
    queues: Vec<Arc<DeviceQueue>>,
    map: RwLock<Arc<ChunkMap>>,
    durable: Mutex<Durable>,
    /// See [`Volume::meta_growth_bytes`].
    meta_growth: AtomicU64,
    read_only: AtomicBool,
    /// Found bad and written again when it became writable.
    mended_labels: Mutex<Vec<LabelFault>>,
    was_clean: bool,
    closed: AtomicBool,
    plug_lists: Mutex<Vec<plug::Lists>>,
    counters: Counters,
}

impl Volume {
    /// Writes labels and a chunk table with one metadata chunk to `devices`, in this order of
    /// index, and returns the volume ready for use. What the devices held is lost: the caller has
    /// made sure that nobody misses it.
    pub fn format(
        devices: Vec<Arc<dyn BlockDevice>>,
        options: &FormatOptions,
    ) -> Result<Arc<Volume>, VolumeError> {
        if devices.is_empty() || devices.len() > DEVICES_MAX {
            let (given, max) = (devices.len(), DEVICES_MAX);
            return Err(VolumeError::Volume(VolumeErrorKind::DeviceCount {
                given,
                max,
            }));
        }
        if !is_stripe_unit(options.stripe_unit_bytes) {
            let kind = VolumeErrorKind::StripeUnit(options.stripe_unit_bytes);
            return Err(VolumeError::Volume(kind));
        }
        relabel::check_text(&options.label)?;
        for device in &devices {
            let (size, min) = (device.size_bytes(), DEVICE_BYTES_MIN);
            if size < min {
                return Err(VolumeError::on(
                    &**device,
                    VolumeErrorKind::TooSmall { size, min },
                ));
            }
        }
        let block_error = |error| block_error(&devices, error);
        let uuids = devices
            .iter()
            .map(|_| store::new_uuid())
            .collect::<Result<Vec<_>, _>>();
        let fs_uuid = options.fs_uuid.map_or_else(store::new_uuid, Ok);
        let identity = Identity {
            fs_uuid: fs_uuid.map_err(block_error)?,
            text: options.label.clone().into(),
            stripe_unit_bytes: options.stripe_unit_bytes,
            ro_compat: 0,
            incompat: INCOMPAT_JOURNAL,
            device_uuids: uuids.map_err(block_error)?,
            sizes: devices.iter().map(|device| device.size_bytes()).collect(),
        };
        let mut table = Table::default();
        let space = Space::new(&identity.sizes, identity.stripe_unit_bytes, &[]);
        let plan = space
            .plan_meta()
            .ok_or(VolumeError::Volume(VolumeErrorKind::NoSpace))?;
        table.add(plan, identity.stripe_unit_bytes);
        let generation = identity.format(&devices, &table).map_err(block_error)?;
        Ok(Self::start(
            identity, devices, table, generation, false, true,
        ))
    }

    /// Reads the labels of `devices` (in any order), checks that they are one whole volume, and
    /// starts it. To write, it first repairs damaged or lagging label copies and marks the volume
    /// as in use.
    pub fn assemble(
        devices: Vec<Arc<dyn BlockDevice>>,
        read_only: bool,
    ) -> Result<Arc<Volume>, VolumeError> {
        let elected = elect::elect(devices)?;
        let mut generation = elected.generation;
        if !read_only {
            elected.check_known()?;
            let block_error = |error| block_error(&elected.devices, error);
            elected.repair().map_err(block_error)?;
            generation += 1;
            elected
                .identity
                .update(&elected.devices, &elected.table, generation, false)
                .map_err(block_error)?;
        }
        let elect::Elected {
            identity,
            devices,
            table,
            is_clean,
            ..
        } = elected;
        Ok(Self::start(
            identity, devices, table, generation, read_only, is_clean,
        ))
    }

    fn start(
        identity: Identity,
        devices: Vec<Arc<dyn BlockDevice>>,
        table: Table,
        generation: u64,
        read_only: bool,
        was_clean: bool,
    ) -> Arc<Volume> {
        let queue = |(index, device): (usize, &Arc<dyn BlockDevice>)| {
            let index = u16::try_from(index).expect("bounded by DEVICES_MAX");
            DeviceQueue::new(index, device.clone())
        };
        let queues: Vec<_> = devices.iter().enumerate().map(queue).collect();
        let volume = Arc::new(Volume {
            _watchdog: Watchdog::start(&queues),
            map: RwLock::new(Arc::new(ChunkMap::new(&table.chunks, devices.len()))),
            durable: Mutex::new(Durable {
                table,
                generation,
                failed: None,
                discarding: Vec::new(),
            }),
            meta_growth: AtomicU64::new(0),
            identity,
            devices,
            queues,
            read_only: AtomicBool::new(read_only),
            mended_labels: Mutex::default(),
            was_clean,
            closed: AtomicBool::new(false),
            plug_lists: Mutex::default(),
            counters: Counters::default(),
        });
        let fallback: Weak<dyn ReadFallback> = Arc::<Volume>::downgrade(&volume);
        for queue in &volume.queues {
            queue.set_fallback(fallback.clone());
        }
        volume.note_meta_growth(&volume.durable.lock().table);
        volume
    }

    /// UUID of the file system, as bytes.
    pub fn fs_uuid(&self) -> [u8; 16] {
        self.identity.fs_uuid
    }

    /// Whether the volume was assembled read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Goes on writing with a volume that was assembled read-only, as [`Volume::assemble`] would
    /// have begun. If that fails, it is still read-only; members may stay locked against other
    /// readers.
    pub fn make_writable(&self) -> Result<(), VolumeError> {
        let mut durable = self.durable.lock();
        if !self.is_read_only() {
            return Ok(());
        }
        for device in &self.devices {
            let refused = |why| VolumeError::on(&**device, VolumeErrorKind::NotWritable(why));
            device.make_writable().map_err(refused)?;
        }
        let elected = elect::elect(self.devices.clone())?;
        if elected.generation != durable.generation {
            let (found, newest) = (durable.generation, elected.generation);
            let kind = VolumeErrorKind::Stale { found, newest };
            return Err(VolumeError::Volume(kind));
        }
        elected.check_known()?;
        let failed = |error| block_error(&self.devices, error);
        let faults = self.faults(&durable);
        elected.repair().map_err(failed)?;
        let table = durable.table.clone();
        self.update(&mut durable, table, false).map_err(failed)?;
        *self.mended_labels.lock() = faults;
        self.read_only.store(false, Ordering::Release);
        Ok(())
    }

    /// The chunks in order of their logical place.
    pub fn chunks(&self) -> Vec<Chunk> {
        self.map.read().chunks.clone()
    }

    /// Adds a chunk, durable on all members when this returns. A data chunk leaves `reserve_bytes`
    /// of device space to metadata.
    pub fn allocate_chunk(
        &self,
        kind: ChunkKind,
        reserve_bytes: u64,
    ) -> Result<Chunk, VolumeError> {
        if self.is_read_only() {
            return Err(VolumeError::Volume(VolumeErrorKind::ReadOnly));
        }
        self.check_answering()?;
        let mut durable = self.durable.lock();
        durable.discarding.retain(|in_doubt| !in_doubt.is_over());
        if !durable.discarding.is_empty() {
            return Err(VolumeError::Volume(VolumeErrorKind::NoSpace));
        }
        let space = self.space(&durable.table);
        let plan = match kind {
            ChunkKind::Data => space.plan_data(reserve_bytes),
            ChunkKind::Meta => space.plan_meta(),
        };
        let plan = plan.filter(|plan| durable.table.has_room_for(plan.members.len()));
        let plan = plan.ok_or(VolumeError::Volume(VolumeErrorKind::NoSpace))?;
        let mut table = durable.table.clone();
        let chunk = table.add(plan, self.identity.stripe_unit_bytes);
        self.update(&mut durable, table, false)
            .map_err(|e| block_error(&self.devices, e))?;
        *self.map.write() = Arc::new(ChunkMap::new(&durable.table.chunks, self.devices.len()));
        self.note_meta_growth(&durable.table);
        Ok(chunk)
    }

    /// An update had better not be begun than fail half way.
    fn check_answering(&self) -> Result<(), VolumeError> {
        let Some(dev) = self.silent_device() else {
            return Ok(());
        };
        let (kind, op, at) = (ErrorKind::TimedOut, Op::Write, 0);
        let error = BlockError { kind, op, dev, at };
        Err(block_error(&self.devices, error))
    }

    fn space(&self, table: &Table) -> Space {
        Space::new(
            &self.identity.sizes,
            self.identity.stripe_unit_bytes,
            &table.chunks,
        )
    }

    /// Once an update failed, nobody knows which generation the members have, so none follows.
    fn update(
        &self,
        durable: &mut Durable,
        table: Table,
        is_clean: bool,
    ) -> Result<(), BlockError> {
        if let Some(error) = durable.failed {
            return Err(error);
        }
        let generation = durable.generation + 1;
        let result = self
            .identity
            .update(&self.devices, &table, generation, is_clean);
        match result {
            Ok(()) => (durable.table, durable.generation) = (table, generation),
            Err(error) => durable.failed = Some(error),
        }
        result
    }

    /// Raw device bytes in no chunk that a data chunk could still use.
    pub fn unallocated_bytes(&self) -> u64 {
        self.space(&self.durable.lock().table).unallocated()
    }

    /// Bytes by which metadata can surely grow: what its next chunks would hold, of which no more
    /// than 64 are looked at. Cheap.
    pub fn meta_growth_bytes(&self) -> u64 {
        self.meta_growth.load(Ordering::Relaxed)
    }

    fn note_meta_growth(&self, table: &Table) {
        const CHUNKS_LOOKED_AT: usize = 64;
        let growth = self.space(table).meta_growth(CHUNKS_LOOKED_AT);
        self.meta_growth.store(growth, Ordering::Relaxed);
    }

    /// Raw device bytes that the next metadata chunk would take, both copies; 0 if none fits.
    pub fn meta_chunk_bytes(&self) -> u64 {
        let plan = self.space(&self.durable.lock().table).plan_meta();
        plan.map_or(0, |plan| 2 * plan.member_len_bytes)
    }

    /// Starts to collect kiobufs; they are dispatched when the plug is finished or dropped.
    pub fn plug(&self) -> Plug<'_> {
        Plug::new(self)
    }

    /// Makes all writes durable that have *ended* by now, on all members, then calls `done`. Only
    /// members that were written since their last flush are asked. A flush that failed fails all
    /// later ones too.
    pub fn flush(&self, done: FlushDone) {
        let fan_in = FlushFanIn::new(done);
        for queue in &self.queues {
            queue.flush(FlushTicket::new(&fan_in));
        }
    }

    /// How many places hold a block; 0 if it lies in no chunk.
    pub fn copies(&self, at: VolBlock) -> u8 {
        let map = self.map.read();
        map.find(at).map_or(0, |index| map.chunks[index].copies())
    }

    /// Device and byte offset of one copy of a block.
    pub fn locate(&self, at: VolBlock, copy: u8) -> Option<(u16, u64)> {
        let map = self.map.read().clone();
        let chunk = &map.chunks[map.find(at)?];
        let piece = Geometry::of(chunk).piece(at.bytes() - chunk.start.bytes(), BLOCK_SIZE);
        let copy = Some(usize::from(copy)).filter(|&copy| copy < usize::from(chunk.copies()))?;
        let member = chunk.members.get(piece.member + copy)?;
        Some((member.dev, member.offset_bytes + piece.offset))
    }

    /// What messages call a member.
    pub fn device_name(&self, dev: u16) -> String {
        match self.devices.get(usize::from(dev)) {
            Some(device) => device.name().to_owned(),
            None => "no device".to_owned(),
        }
    }

    /// Tells the devices where most I/O memory lies. Once, before I/O; see
    /// [`BlockDevice::register_memory`] for what must hold then.
    pub fn register_memory(&self, arena: PageRun) {
        for device in &self.devices {
            device.register_memory(arena);
        }
    }

    /// Has the devices let go of what [`Volume::register_memory`] showed them; they do without from
    /// then on. False if one of them did not within `patience`.
    pub fn forget_memory(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let (told, forgotten) = channel();
        for device in &self.devices {
            device.forget_memory(told.clone());
        }
        drop(told);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match forgotten.recv_timeout(left) {
                Ok(()) => {}
                // Each has dropped its end after its word.
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    /// The first member that does not answer at the moment.
    pub fn silent_device(&self) -> Option<u16> {
        let silent = self.queues.iter().position(|queue| queue.is_silent())?;
        u16::try_from(silent).ok()
    }

    /// Waits for what is under way, flushes, and marks the volume clean. Later I/O is refused. Only
    /// the first call does anything.
    pub fn close(&self) -> Result<(), BlockError> {
        if self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let mut late = None;
        for (queue, dev) in self.queues.iter().zip(0u16..) {
            if !queue.drain(DRAIN_WAIT_MAX) {
                let (kind, op) = (ErrorKind::TimedOut, Op::Flush);
                late = late.or(Some(BlockError {
                    kind,
                    op,
                    dev,
                    at: 0,
                }));
            }
        }
        self.flush_wait()?;
        if let Some(error) = late {
            return Err(error);
        }
        if self.is_read_only() {
            return Ok(());
        }
        let mut durable = self.durable.lock();
        let table = durable.table.clone();
        self.update(&mut durable, table, true)
    }

    /// Why an operation is not even tried.
    fn refusal(&self, op: Op) -> Option<ErrorKind> {
        if self.closed.load(Ordering::Relaxed) {
            return Some(ErrorKind::DeviceGone);
        }
        (op != Op::Read && self.is_read_only()).then_some(ErrorKind::Os(libc::EROFS))
    }
}

impl ReadFallback for Volume {
    fn read_failed(&self, mut view: View, error: BlockError) {
        let map = self.map.read().clone();
        let share = map.share_at(error.dev, error.at);
        let other = share.and_then(|share| {
            let chunk = &map.chunks[share.chunk];
            let others = chunk
                .members
                .iter()
                .enumerate()
                .filter(|(n, _)| *n != share.member);
            let (_, other) = others.take(usize::from(chunk.copies()) - 1).next()?;
            Some((other.dev, other.offset_bytes + (error.at - share.start)))
        });
        let Some((dev, offset)) = other else {
            return view.end_bad(error);
        };
        log::warn!(
            "{}: {error}; reading the other copy",
            self.device_name(error.dev)
        );
        self.counters.mirror_retries.fetch_add(1, Ordering::Relaxed);
        view.leg = Leg::Pinned;
        let parts = Parts::of_view(Op::Read, dev, offset, view);
        let queue = &self.queues[usize::from(dev)];
        queue.enqueue(std::iter::once(Parts {
            is_retry: true,
            ..parts
        }));
        queue.kick();
    }
}

impl Table {
    /// Adds a planned chunk at the end of the logical space.
    fn add(&mut self, plan: Plan, stripe_unit_bytes: u32) -> Chunk {
        let width = match plan.profile {
            Profile::Stripe => crate::units::dev_len(plan.members.len()),
            Profile::Single | Profile::Mirror => 1,
        };
        let unit = u64::from(stripe_unit_bytes) / BLOCK_SIZE;
        let chunk = Chunk {
            id: self.next_chunk_id,
            start: VolBlock(self.next_block),
            len_blocks: plan.member_len_bytes / BLOCK_SIZE * width,
            kind: plan.kind,
            profile: plan.profile,
            stripe_unit_blocks: u32::try_from(unit).unwrap_or(u32::MAX),
            members: plan.members,
            member_len_bytes: plan.member_len_bytes,
        };
        self.next_chunk_id += 1;
        self.next_block += chunk.len_blocks;
        self.chunks.push(chunk.clone());
        chunk
    }
}

/// An error of a device, with its name.
fn block_error(devices: &[Arc<dyn BlockDevice>], error: BlockError) -> VolumeError {
    match devices.get(usize::from(error.dev)) {
        Some(device) => VolumeError::on(&**device, error),
        None => VolumeError::Volume(error.into()),
    }
}
