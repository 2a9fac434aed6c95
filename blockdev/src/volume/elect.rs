//! Assembly: reads labels and tables, checks membership, and elects the generation in force.
//!
//! An update to generation g touches labels only when table g is durable on every member (see
//! [`super::store`]). So the highest generation that any label shows is complete; a member that is
//! one behind was cut off during the update, or lost a label copy, and is rolled forward; a member
//! two or more behind was away for at least one whole update, and its data cannot be trusted.

use super::store::{Identity, State};
use super::transfer::{Device, Devices, Job, run};
use super::types::{VolumeError, VolumeErrorKind};
use crate::codec::uuid_text;
use crate::error::{BlockError, Op};
use crate::label::{
    DEVICE_BYTES_MIN, LABEL_LEN, LABEL_OFFSETS, Label, LabelError, TABLE_LEN_MAX, TABLE_OFFSETS,
    newest, slot_of,
};
use crate::pages::AlignedBuf;
use crate::table::{Table, TableError};
use crate::units::PAGE_SIZE;

/// What was read from one device: its label copies, and tables only as far as asked.
struct Member {
    copies: [Result<Label, LabelError>; 2],
    label: Label,
}

/// What assembly needs, elected from what the members say.
pub(super) struct Elected {
    pub identity: Identity,
    /// The devices in order of their index.
    pub devices: Vec<Device>,
    pub table: Table,
    pub generation: u64,
    pub is_clean: bool,
    /// Members (by index) whose table or label of this generation must be written again.
    bad_tables: Vec<usize>,
    bad_labels: Vec<usize>,
}

impl Elected {
    /// Whether we know all that one must know to write.
    pub(super) fn check_known(&self) -> Result<(), VolumeError> {
        match self.identity.ro_compat {
            0 => Ok(()),
            unknown => Err(VolumeError::Volume(VolumeErrorKind::Label(
                LabelError::Features(unknown),
            ))),
        }
    }

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

/// Both label copies of each device.
pub(super) fn read_labels(devices: &Devices) -> Vec<[Result<Label, LabelError>; 2]> {
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

/// The table of `generation` on each of `devices`. Few are longer than a block: the place of a
/// table is read as a whole only where its first block is not all of it, or is damaged.
pub(super) fn read_tables(
    devices: &Devices,
    fs_uuid: &[u8; 16],
    generation: u64,
    sizes: &[u64],
) -> Vec<Result<(Table, u32), TableError>> {
    let job = |dev: usize, len: usize| Job {
        dev,
        op: Op::Read,
        offset: TABLE_OFFSETS[slot_of(generation)],
        buf: Some(AlignedBuf::zeroed(len)),
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
    let read = |which: &[usize], len: usize| {
        let jobs = which.iter().map(|&dev| job(dev, len)).collect();
        run(devices, jobs).into_iter().map(decode)
    };
    let all: Vec<usize> = (0..devices.len()).collect();
    let mut tables: Vec<_> = read(&all, PAGE_SIZE).collect();
    let is_cut = |dev: &usize| matches!(tables[*dev], Err(TableError::Checksum));
    let cut: Vec<usize> = all.into_iter().filter(is_cut).collect();
    for (dev, table) in cut.iter().zip(read(&cut, TABLE_LEN_MAX)) {
        tables[*dev] = table;
    }
    tables
}

/// Reads labels and tables, checks membership, and elects the generation in force. Writes nothing.
pub(super) fn elect(devices: Vec<Device>) -> Result<Elected, VolumeError> {
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
        text: reference.text.clone().into(),
        stripe_unit_bytes: reference.stripe_unit_bytes,
        ro_compat: members
            .iter()
            .fold(0, |flags, member| flags | member.label.ro_compat),
        incompat: members
            .iter()
            .fold(0, |flags, member| flags | member.label.incompat),
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
    devices: Vec<Device>,
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
    let mut by_index: Vec<Option<(Device, Member)>> = Vec::new();
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
    devices: Vec<Device>,
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
