//! Labels and chunk tables on the devices: format, read back, repair, update.
//!
//! An update to generation g writes the table to slot g % 2 of every member, flushes all, writes the
//! label to slot g % 2 of every member, flushes all. So a label of generation g on *any* member means
//! that the table of generation g is durable on *every* member, and generation g - 1 is untouched
//! everywhere until the next update. Hence after a cut anywhere in between, members differ by at
//! most one generation, and rolling those that lag forward is right: see [`Found::elect`].

use super::types::{VolumeError, VolumeErrorKind};
use crate::chain::Chain;
use crate::codec::uuid_text;
use crate::device::BlockDevice;
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::Kiobuf;
use crate::label::{
    DEVICE_BYTES_MIN, LABEL_LEN, LABEL_OFFSETS, Label, LabelError, TABLE_LEN_MAX, TABLE_OFFSETS,
    newest, slot_of,
};
use crate::pages::AlignedBuf;
use crate::request::{DeviceRequest, Parts, RequestOwner};
use crate::table::{Table, TableError};
use crate::units::{BLOCK_SIZE, dev_len};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// Bound on the wait for one label or table transfer on all members.
pub(super) const STORE_WAIT_MAX: Duration = Duration::from_secs(120);

type Device = Arc<dyn BlockDevice>;
pub(super) type Devices = [Device];

/// One transfer on one member.
struct Job {
    dev: usize,
    op: Op,
    offset: u64,
    buf: Option<AlignedBuf>,
}

type Outcome = (usize, Result<Option<AlignedBuf>, BlockError>);

/// Tells the end of a flush, which has no kiobuf.
struct FlushWaiter {
    job: usize,
    to: parking_lot::Mutex<Sender<Outcome>>,
}

impl RequestOwner for FlushWaiter {
    fn request_ended(self: Arc<Self>, parts: Parts, result: Result<u64, ErrorKind>) {
        let result = result.map(|_| None).map_err(|kind| parts.error(kind, 0));
        // The receiver may have given up; then nobody wants to know.
        self.to.lock().send((self.job, result)).unwrap_or_default();
    }
}

/// Runs one transfer per member at the same time; results in the order of `jobs`.
fn run(devices: &Devices, jobs: Vec<Job>) -> Vec<Result<Option<AlignedBuf>, BlockError>> {
    let (to, from): (Sender<Outcome>, Receiver<Outcome>) = channel();
    let mut results: Vec<_> = jobs
        .iter()
        .map(|job| {
            let dev = u16::try_from(job.dev).unwrap_or(BlockError::NO_DEVICE);
            Err(BlockError {
                kind: ErrorKind::TimedOut,
                op: job.op,
                dev,
                at: job.offset,
            })
        })
        .collect();
    let count = jobs.len();
    for (number, job) in jobs.into_iter().enumerate() {
        let dev = u16::try_from(job.dev).unwrap_or(BlockError::NO_DEVICE);
        let to = to.clone();
        let request = match job.buf {
            Some(buf) => {
                let len = buf.len();
                let end_io = Box::new(move |done: crate::kiobuf::Completion| {
                    let result = match (done.error, AlignedBuf::from_pages(done.pages)) {
                        (None, Ok(buf)) => Ok(Some(buf)),
                        (None, Err(_)) => Ok(None),
                        (Some(error), _) => Err(error),
                    };
                    to.send((number, result)).unwrap_or_default();
                });
                let chain = Chain::from(Kiobuf::new(Box::new(buf), 0, len, end_io));
                DeviceRequest::with_owner(Parts::new(job.op, dev, job.offset, chain), None)
            }
            None => {
                let to = parking_lot::Mutex::new(to);
                let owner: Arc<dyn RequestOwner> = Arc::new(FlushWaiter { job: number, to });
                DeviceRequest::with_owner(Parts::new(job.op, dev, 0, Chain::new()), Some(owner))
            }
        };
        devices[job.dev].submit(request);
    }
    let deadline = Instant::now() + STORE_WAIT_MAX;
    for _ in 0..count {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok((number, result)) = from.recv_timeout(left) else {
            break;
        };
        results[number] = result;
    }
    results
}

fn all_good(results: Vec<Result<Option<AlignedBuf>, BlockError>>) -> Result<(), BlockError> {
    results
        .into_iter()
        .try_for_each(|result| result.map(|_| ()))
}

fn flush_all(devices: &Devices) -> Result<(), BlockError> {
    let job = |dev| Job {
        dev,
        op: Op::Flush,
        offset: 0,
        buf: None,
    };
    all_good(run(devices, (0..devices.len()).map(job).collect()))
}

fn write_all(devices: &Devices, jobs: Vec<(usize, u64, AlignedBuf)>) -> Result<(), BlockError> {
    let job = |(dev, offset, buf)| Job {
        dev,
        op: Op::Write,
        offset,
        buf: Some(buf),
    };
    all_good(run(devices, jobs.into_iter().map(job).collect()))
}

/// What all labels of a volume have in common, and each member's own part, by index.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub fs_uuid: [u8; 16],
    pub text: String,
    pub stripe_unit_bytes: u32,
    pub ro_compat: u64,
    pub device_uuids: Vec<[u8; 16]>,
    pub sizes: Vec<u64>,
}

impl Identity {
    fn device_count(&self) -> u16 {
        u16::try_from(self.sizes.len()).expect("bounded by DEVICES_MAX")
    }

    fn label(&self, dev: usize, state: &State) -> Label {
        Label {
            generation: state.generation,
            ro_compat: self.ro_compat,
            fs_uuid: self.fs_uuid,
            device_uuid: self.device_uuids[dev],
            device_index: u16::try_from(dev).expect("bounded by DEVICES_MAX"),
            device_count: self.device_count(),
            stripe_unit_bytes: self.stripe_unit_bytes,
            size_bytes: self.sizes[dev],
            is_clean: state.is_clean,
            table_len: u32::try_from(state.table_bytes.len()).expect("bounded by TABLE_LEN_MAX"),
            table_crc: state.table_crc,
            text: self.text.clone(),
        }
    }

    /// Writes a generation to members, `tables` and `labels` (all of them but for a repair).
    fn write(
        &self,
        devices: &Devices,
        state: &State,
        tables: &[usize],
        labels: &[usize],
    ) -> Result<(), BlockError> {
        let slot = slot_of(state.generation);
        let table = |&dev: &usize| {
            (
                dev,
                TABLE_OFFSETS[slot],
                AlignedBuf::from_slice(&state.table_bytes),
            )
        };
        write_all(devices, tables.iter().map(table).collect())?;
        flush_all(devices)?;
        let label = |&dev: &usize| {
            let block = self.label(dev, state).encode(slot);
            (dev, LABEL_OFFSETS[slot], AlignedBuf::from_slice(&block))
        };
        write_all(devices, labels.iter().map(label).collect())?;
        flush_all(devices)
    }

    /// Makes `table` the one in force, durably on all members.
    pub(super) fn update(
        &self,
        devices: &Devices,
        table: &Table,
        generation: u64,
        is_clean: bool,
    ) -> Result<(), BlockError> {
        let all: Vec<usize> = (0..devices.len()).collect();
        self.write(
            devices,
            &State::new(self, table, generation, is_clean),
            &all,
            &all,
        )
    }

    /// First write to new members: removes what was there, then two updates, so that both copies
    /// are whole. Returns the generation.
    pub(super) fn format(&self, devices: &Devices, table: &Table) -> Result<u64, BlockError> {
        /// Both label areas, and at the end the backup structures of other formats.
        const WIPED: usize = 1 << 20;
        let wipe = |dev: usize| {
            let end = self.sizes[dev] - dev_len(WIPED);
            [0, end].map(|offset| (dev, offset, AlignedBuf::zeroed(WIPED)))
        };
        write_all(devices, (0..devices.len()).flat_map(wipe).collect())?;
        flush_all(devices)?;
        for generation in [1, 2] {
            self.update(devices, table, generation, false)?;
        }
        Ok(2)
    }
}

/// One generation, encoded.
struct State {
    generation: u64,
    is_clean: bool,
    table_bytes: Vec<u8>,
    table_crc: u32,
}

impl State {
    fn new(identity: &Identity, table: &Table, generation: u64, is_clean: bool) -> State {
        let devices = identity.device_count();
        let (table_bytes, table_crc) = table.encode(&identity.fs_uuid, generation, devices);
        State {
            generation,
            is_clean,
            table_bytes,
            table_crc,
        }
    }
}

/// What was read from one device: its label copies, and tables only as far as asked.
struct Member {
    copies: [Result<Label, LabelError>; 2],
    label: Label,
}

/// What assembly needs, elected from what the members say.
pub(super) struct Elected {
    pub identity: Identity,
    /// The devices in order of their index.
    pub devices: Vec<Arc<dyn BlockDevice>>,
    pub table: Table,
    pub generation: u64,
    pub is_clean: bool,
    /// Members (by index) whose table or label of this generation must be written again.
    bad_tables: Vec<usize>,
    bad_labels: Vec<usize>,
}

impl Elected {
    /// Brings every member to the elected generation. Must be durable before the next update,
    /// which overwrites the only good label of a member that lags.
    pub(super) fn repair(&self) -> Result<(), BlockError> {
        if self.bad_tables.is_empty() && self.bad_labels.is_empty() {
            return Ok(());
        }
        for &dev in self.bad_tables.iter().chain(&self.bad_labels) {
            log::warn!(
                "{}: rewriting a damaged or lagging label copy",
                self.devices[dev].name()
            );
        }
        let state = State::new(&self.identity, &self.table, self.generation, self.is_clean);
        self.identity
            .write(&self.devices, &state, &self.bad_tables, &self.bad_labels)
    }
}

fn read_labels(devices: &Devices) -> Vec<[Result<Label, LabelError>; 2]> {
    let job = |dev: usize, slot: usize| Job {
        dev,
        op: Op::Read,
        offset: LABEL_OFFSETS[slot],
        buf: Some(AlignedBuf::zeroed(LABEL_LEN)),
    };
    let jobs = (0..devices.len())
        .flat_map(|dev| [job(dev, 0), job(dev, 1)])
        .collect();
    let mut results = run(devices, jobs).into_iter();
    let mut decode = |slot: usize| match results.next() {
        Some(Ok(Some(block))) => Label::decode(&block, LABEL_OFFSETS[slot]),
        Some(Err(error)) => Err(LabelError::Io(error.errno())),
        _ => Err(LabelError::Io(libc::EIO)),
    };
    devices.iter().map(|_| [decode(0), decode(1)]).collect()
}

/// The table of `generation` on each of `devices`.
fn read_tables(
    devices: &Devices,
    fs_uuid: &[u8; 16],
    generation: u64,
    sizes: &[u64],
) -> Vec<Result<(Table, u32), TableError>> {
    let job = |dev: usize| Job {
        dev,
        op: Op::Read,
        offset: TABLE_OFFSETS[slot_of(generation)],
        buf: Some(AlignedBuf::zeroed(TABLE_LEN_MAX)),
    };
    let decode = |result: Result<Option<AlignedBuf>, BlockError>| match result {
        Ok(Some(bytes)) => {
            let table = Table::decode(&bytes, fs_uuid, generation, sizes)?;
            let crc = table
                .encode(fs_uuid, generation, u16::try_from(sizes.len()).unwrap_or(0))
                .1;
            Ok((table, crc))
        }
        Ok(None) => Err(TableError::Io(libc::EIO)),
        Err(error) => Err(TableError::Io(error.errno())),
    };
    run(devices, (0..devices.len()).map(job).collect())
        .into_iter()
        .map(decode)
        .collect()
}

/// Reads labels and tables, checks membership, and elects the generation in force. Writes nothing.
pub(super) fn elect(devices: Vec<Arc<dyn BlockDevice>>) -> Result<Elected, VolumeError> {
    let mut members = Vec::new();
    for (device, copies) in devices.iter().zip(read_labels(&devices)) {
        let label = newest(copies.clone()).map_err(|error| {
            let too_small = error == LabelError::Missing && device.size_bytes() < DEVICE_BYTES_MIN;
            let kind = if too_small {
                LabelError::TooSmall
            } else {
                error
            };
            VolumeError::on(&**device, VolumeErrorKind::Label(kind))
        })?;
        members.push(Member { copies, label });
    }
    let (devices, members) = check_membership(devices, members)?;
    let newest_label = members
        .iter()
        .map(|member| &member.label)
        .max_by_key(|l| l.generation);
    let reference = newest_label.expect("at least one member").clone();
    let identity = Identity {
        fs_uuid: reference.fs_uuid,
        text: reference.text.clone(),
        stripe_unit_bytes: reference.stripe_unit_bytes,
        ro_compat: members
            .iter()
            .fold(0, |flags, member| flags | member.label.ro_compat),
        device_uuids: members
            .iter()
            .map(|member| member.label.device_uuid)
            .collect(),
        sizes: members
            .iter()
            .map(|member| member.label.size_bytes)
            .collect(),
    };
    // A member whose newer label copy is damaged shows by its table that it has that generation.
    let ahead = reference.generation + 1;
    let slot = slot_of(ahead);
    let mut generation = reference.generation;
    if members
        .iter()
        .any(|m| m.label.generation + 1 == ahead && m.copies[slot].is_err())
    {
        let tables = read_tables(&devices, &identity.fs_uuid, ahead, &identity.sizes);
        let is_ahead = |(member, table): (&Member, &Result<_, _>)| {
            member.copies[slot].is_err() && table.is_ok()
        };
        if members.iter().zip(&tables).any(is_ahead) {
            generation = ahead;
        }
    }
    check_generations(&devices, &members, generation)?;
    choose_table(identity, devices, &members, generation)
}

/// Every member there once, of one file system, as long as it was. Returns them by index.
fn check_membership(
    devices: Vec<Arc<dyn BlockDevice>>,
    members: Vec<Member>,
) -> Result<(Vec<Device>, Vec<Member>), VolumeError> {
    let votes = |uuid: &[u8; 16]| members.iter().filter(|m| &m.label.fs_uuid == uuid).count();
    // The first of the most frequent: `max_by_key` returns the last, so from the back.
    let chosen = members
        .iter()
        .rev()
        .max_by_key(|member| votes(&member.label.fs_uuid));
    let Some(chosen) = chosen else {
        let max = crate::label::DEVICES_MAX;
        return Err(VolumeError::Volume(VolumeErrorKind::DeviceCount {
            given: 0,
            max,
        }));
    };
    let (fs_uuid, count) = (chosen.label.fs_uuid, chosen.label.device_count);
    let mut by_index: Vec<Option<(Arc<dyn BlockDevice>, Member)>> = Vec::new();
    by_index.resize_with(usize::from(count), || None);
    for (device, member) in devices.into_iter().zip(members) {
        let label = &member.label;
        if label.fs_uuid != fs_uuid {
            let (found, wanted) = (uuid_text(&label.fs_uuid), uuid_text(&fs_uuid));
            return Err(VolumeError::on(
                &*device,
                VolumeErrorKind::Foreign { found, wanted },
            ));
        }
        let index = label.device_index;
        let Some(place) = by_index.get_mut(usize::from(index)) else {
            let error = VolumeErrorKind::Label(LabelError::Value("device index"));
            return Err(VolumeError::on(&*device, error));
        };
        if let Some((other, _)) = place {
            let other = other.name().to_owned();
            return Err(VolumeError::on(
                &*device,
                VolumeErrorKind::Twice { other, index },
            ));
        }
        let (found, wanted) = (device.size_bytes(), label.size_bytes);
        if found < wanted {
            return Err(VolumeError::on(
                &*device,
                VolumeErrorKind::Truncated { found, wanted },
            ));
        }
        *place = Some((device, member));
    }
    if let Some(index) = by_index.iter().position(Option::is_none) {
        let index = u16::try_from(index).unwrap_or(u16::MAX);
        let fs_uuid = uuid_text(&fs_uuid);
        return Err(VolumeError::Volume(VolumeErrorKind::Missing {
            index,
            count,
            fs_uuid,
        }));
    }
    Ok(by_index.into_iter().flatten().unzip())
}

/// One behind is a torn update or a damaged copy; more is a member that was away.
fn check_generations(
    devices: &Devices,
    members: &[Member],
    generation: u64,
) -> Result<(), VolumeError> {
    for (device, member) in devices.iter().zip(members) {
        let found = member.label.generation;
        if found + 1 < generation {
            let newest = generation;
            return Err(VolumeError::on(
                &**device,
                VolumeErrorKind::Stale { found, newest },
            ));
        }
    }
    Ok(())
}

/// All tables of one generation are alike, so any whole one serves.
fn choose_table(
    identity: Identity,
    devices: Vec<Arc<dyn BlockDevice>>,
    members: &[Member],
    generation: u64,
) -> Result<Elected, VolumeError> {
    let tables = read_tables(&devices, &identity.fs_uuid, generation, &identity.sizes);
    let slot = slot_of(generation);
    let at_generation = |member: &Member| {
        let label = member.copies[slot].as_ref().ok();
        label
            .filter(|label| label.generation == generation)
            .cloned()
    };
    let bad = |good: &dyn Fn(usize) -> bool| (0..devices.len()).filter(|&i| !good(i)).collect();
    let bad_tables: Vec<usize> = bad(&|index| tables[index].is_ok());
    let bad_labels: Vec<usize> = bad(&|index| at_generation(&members[index]).is_some());
    let is_clean = members
        .iter()
        .all(|member| at_generation(member).is_some_and(|label| label.is_clean));
    let mut first_error = None;
    let mut chosen = None;
    for (index, table) in tables.into_iter().enumerate() {
        match table {
            Ok((table, _)) => chosen = chosen.or(Some(table)),
            Err(error) => first_error = first_error.or(Some((index, error))),
        }
    }
    match (chosen, first_error) {
        (Some(table), _) => Ok(Elected {
            identity,
            devices,
            table,
            generation,
            is_clean,
            bad_tables,
            bad_labels,
        }),
        (None, Some((index, error))) => Err(VolumeError::on(
            &*devices[index],
            VolumeErrorKind::Table(error),
        )),
        (None, None) => Err(VolumeError::Volume(VolumeErrorKind::NoSpace)),
    }
}

/// A random UUID (version 4).
pub(super) fn new_uuid() -> Result<[u8; 16], BlockError> {
    use std::io::Read;
    let mut uuid = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut from| from.read_exact(&mut uuid));
    read.map_err(|error| BlockError {
        kind: ErrorKind::Os(error.raw_os_error().unwrap_or(libc::EIO)),
        op: Op::Read,
        dev: BlockError::NO_DEVICE,
        at: 0,
    })?;
    uuid[6] = (uuid[6] & 0x0f) | 0x40;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    Ok(uuid)
}

const _: () = assert!((LABEL_LEN as u64).is_multiple_of(BLOCK_SIZE));
