//! What the volume's callers see: chunks, options, descriptions, errors.

use crate::device::BlockDevice;
use crate::device::open::OpenError;
use crate::error::BlockError;
use crate::label::LabelError;
use crate::table::TableError;
use crate::units::{BLOCK_SIZE, VolBlock};
use serde::Serialize;

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ChunkKind {
    /// File data.
    Data,
    /// Metadata, mirrored.
    Meta,
}

/// How a chunk's bytes are laid over its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// On one device.
    Single,
    /// Round robin over several, one stripe unit at a time.
    Stripe,
    /// The same bytes in two places.
    Mirror,
}

/// One member's share of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ChunkMember {
    /// Index of the device.
    pub dev: u16,
    /// Where the share starts on it, in bytes.
    pub offset_bytes: u64,
}

/// A range of the logical space and where it lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chunk {
    /// Number of the chunk, never reused.
    pub id: u32,
    /// First logical block.
    #[serde(serialize_with = "serialize_block")]
    pub start: VolBlock,
    /// Logical length.
    pub len_blocks: u64,
    /// What it holds.
    pub kind: ChunkKind,
    /// How it is laid out.
    pub profile: Profile,
    /// Unit of striping in blocks (of a chunk that is not striped: without effect).
    pub stripe_unit_blocks: u32,
    /// The members in stripe order (of a mirror: the copies).
    pub members: Vec<ChunkMember>,
    /// Bytes of each member's share.
    pub member_len_bytes: u64,
}

fn serialize_block<S: serde::Serializer>(block: &VolBlock, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(block.0)
}

impl Chunk {
    /// The logical block after the last one.
    pub fn end(&self) -> VolBlock {
        self.start.plus(self.len_blocks)
    }

    /// Whether a logical block lies in the chunk.
    pub fn contains(&self, at: VolBlock) -> bool {
        self.start <= at && at < self.end()
    }

    /// Logical length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_blocks * BLOCK_SIZE
    }

    /// Device bytes that the chunk takes on all its members.
    pub fn raw_bytes(&self) -> u64 {
        self.member_len_bytes * self.members.iter().map(|_| 1).sum::<u64>()
    }

    /// How many places hold each byte.
    pub fn copies(&self) -> u8 {
        match self.profile {
            Profile::Mirror => u8::try_from(self.members.len()).unwrap_or(u8::MAX),
            Profile::Single | Profile::Stripe => 1,
        }
    }
}

/// What `mkfs` decides.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// Free text, at most 64 bytes of UTF-8.
    pub label: String,
    /// Power of two, 4 KiB to 16 MiB.
    pub stripe_unit_bytes: u32,
    /// Given for reproducible images; else random.
    pub fs_uuid: Option<[u8; 16]>,
}

impl Default for FormatOptions {
    fn default() -> Self {
        FormatOptions {
            label: String::new(),
            stripe_unit_bytes: 256 << 10,
            fs_uuid: None,
        }
    }
}

/// Whether somebody waits for the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Somebody waits.
    Sync,
    /// Writeback, readahead.
    Background,
}

/// A member, described.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceInfo {
    /// Its path, or what else it is called.
    pub name: String,
    /// Its index among the members.
    pub index: u16,
    /// Its UUID.
    pub uuid: String,
    /// Its size.
    pub size_bytes: u64,
    /// Bytes that belong to chunks.
    pub allocated_bytes: u64,
    /// How it does I/O.
    pub backend: &'static str,
}

/// A volume, described.
#[derive(Clone, Debug, Serialize)]
pub struct VolumeInfo {
    /// UUID of the file system.
    pub uuid: String,
    /// The label that the user gave.
    pub label: String,
    /// Generation of label and chunk table.
    pub generation: u64,
    /// Stripe unit of new chunks.
    pub stripe_unit_bytes: u32,
    /// Whether the volume was closed properly before this assembly.
    pub was_clean: bool,
    /// The members in order of their index.
    pub devices: Vec<DeviceInfo>,
    /// The chunks in order of their logical place.
    pub chunks: Vec<Chunk>,
}

/// Why a volume cannot be formatted, assembled or grown. The message names the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// One device is at fault.
    #[error("{device}: {kind}")]
    Device {
        /// The device's name.
        device: String,
        /// What is wrong with it.
        kind: VolumeErrorKind,
    },
    /// The whole set is at fault.
    #[error("{0}")]
    Volume(VolumeErrorKind),
}

impl VolumeError {
    pub(crate) fn on(device: &dyn BlockDevice, kind: impl Into<VolumeErrorKind>) -> VolumeError {
        VolumeError::Device {
            device: device.name().to_owned(),
            kind: kind.into(),
        }
    }

    /// The cause, whichever device it concerns.
    pub fn kind(&self) -> &VolumeErrorKind {
        match self {
            VolumeError::Device { kind, .. } | VolumeError::Volume(kind) => kind,
        }
    }
}

/// Causes of a [`VolumeError`]. Each message continues the device's name, where there is one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeErrorKind {
    /// No device was given, or more than the format holds.
    #[error("a volume has 1 to {max} devices, not {given}")]
    DeviceCount {
        /// Devices given.
        given: usize,
        /// Devices possible.
        max: usize,
    },
    /// Too small to be a member.
    #[error("is too small: {size} bytes, at least {min} are needed")]
    TooSmall {
        /// Its size.
        size: u64,
        /// What is needed.
        min: u64,
    },
    /// An option of `format` makes no sense.
    #[error("stripe unit {0}: must be a power of two from 4096 to 16777216 bytes")]
    StripeUnit(u32),
    /// The label text is too long.
    #[error("label is longer than {0} bytes")]
    LabelText(usize),
    /// No usable label in either place.
    #[error("{0}")]
    Label(LabelError),
    /// No usable chunk table.
    #[error("{0}")]
    Table(TableError),
    /// A member of another file system.
    #[error("belongs to another file system ({found}, the others to {wanted})")]
    Foreign {
        /// UUID on this device.
        found: String,
        /// UUID of the others.
        wanted: String,
    },
    /// The same member was given before.
    #[error("is given twice: {other} is the same member (number {index})")]
    Twice {
        /// The other name.
        other: String,
        /// Index of the member.
        index: u16,
    },
    /// A member is not there.
    #[error("member number {index} of {count} is missing (file system {fs_uuid})")]
    Missing {
        /// Index of the member.
        index: u16,
        /// Number of members.
        count: u16,
        /// UUID of the file system.
        fs_uuid: String,
    },
    /// The member missed updates that the others have.
    #[error(
        "is stale: its generation is {found}, the newest is {newest}, so it missed what was \
         written meanwhile; give the current device, or restore all members from one backup"
    )]
    Stale {
        /// Generation of this member.
        found: u64,
        /// Generation of the newest.
        newest: u64,
    },
    /// The device is shorter than when it was formatted.
    #[error("is truncated: {found} bytes, its label says {wanted}")]
    Truncated {
        /// Size now.
        found: u64,
        /// Size by the label.
        wanted: u64,
    },
    /// A member that was opened for reading cannot be had for writing.
    #[error("cannot be written: it {0}")]
    NotWritable(OpenError),
    /// The volume was assembled read-only.
    #[error("the volume is read-only")]
    ReadOnly,
    /// No room for another chunk.
    #[error("no space for another chunk")]
    NoSpace,
    /// A device failed.
    #[error(transparent)]
    Block(#[from] BlockError),
}
