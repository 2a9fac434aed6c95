//! The device label: who a device is, and which chunk table is in force.
//!
//! Two copies live at fixed places; generation `g` is written to copy `g % 2`, so the other one
//! stays whole whatever happens to the write. FORMAT.md has the layout and argues the protocol.

use crate::codec::{Decoder, Encoder, crc_without, uuid_text};
use crate::units::BLOCK_SIZE;
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// First bytes of every label.
pub const MAGIC: [u8; 8] = *b"BRAIDFS\0";
/// The format that this code writes.
pub const VERSION: u32 = 2;
/// Size of one label copy.
pub const LABEL_LEN: usize = 4096;
/// Where the copies live, by slot.
pub const LABEL_OFFSETS: [u64; 2] = [0, 512 << 10];
/// Where the chunk tables live, by slot.
pub const TABLE_OFFSETS: [u64; 2] = [64 << 10, 576 << 10];
/// Where the journal lives on each member that has a part of it: behind each label.
pub(crate) const JOURNAL_OFFSETS: [u64; 2] = [4 << 10, 516 << 10];
/// Bytes of each of these places.
pub(crate) const JOURNAL_LEN: usize = 60 << 10;
/// Room for a chunk table.
pub const TABLE_LEN_MAX: usize = 448 << 10;
/// Where chunks may start.
pub const CHUNK_SPACE_START: u64 = 1 << 20;
/// The smallest member: it must hold a label area and two copies of a metadata chunk.
pub const DEVICE_BYTES_MIN: u64 = 16 << 20;
/// Longest text of a label, in bytes of UTF-8.
pub const LABEL_TEXT_MAX: usize = 64;
/// Members of a volume; the device index is 16 bits and `u16::MAX` means none.
pub const DEVICES_MAX: usize = 1024;
/// Stripe units that make sense: one block, up to what still spreads a 64 MiB file.
pub const STRIPE_UNIT_MAX: u32 = 16 << 20;

/// Offset of the checksum in label and table alike: right after the magic.
pub(crate) const CRC_AT: usize = 8;

/// There is a journal, and what it holds counts.
pub(crate) const INCOMPAT_JOURNAL: u64 = 1;

/// Features that a reader must know. One that only a writer must know is not defined yet.
const INCOMPAT_KNOWN: u64 = INCOMPAT_JOURNAL;

/// The slot of a generation.
pub(crate) fn slot_of(generation: u64) -> usize {
    usize::from(!generation.is_multiple_of(2))
}

/// A label's content; what differs between members is `device_uuid`, `device_index`, `size_bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub generation: u64,
    pub ro_compat: u64,
    pub incompat: u64,
    pub fs_uuid: [u8; 16],
    pub device_uuid: [u8; 16],
    pub device_index: u16,
    pub device_count: u16,
    pub stripe_unit_bytes: u32,
    pub size_bytes: u64,
    /// No writer has the volume open, and none died with it.
    pub is_clean: bool,
    pub table_len: u32,
    pub table_crc: u32,
    pub text: String,
}

/// What a label says, for people and for finding members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LabelInfo {
    /// UUID of the file system.
    pub fs_uuid: String,
    /// UUID of this device.
    pub device_uuid: String,
    /// Index of this device among the members.
    pub device_index: u16,
    /// Number of members.
    pub device_count: u16,
    /// Size of this member as labelled.
    pub size_bytes: u64,
    /// Generation of the label.
    pub generation: u64,
    /// Stripe unit in bytes.
    pub stripe_unit_bytes: u32,
    /// The label that the user gave.
    pub label: String,
    /// Whether the volume was closed properly.
    pub clean: bool,
}

/// What is wrong with a label. Messages continue the device's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The device could not be opened or read.
    #[error("label cannot be read: {}", std::io::Error::from_raw_os_error(*.0))]
    Io(i32),
    /// Too short to hold labels.
    #[error("is too small for a braidfs device")]
    TooSmall,
    /// Nothing like a label.
    #[error("is not a braidfs device (no label)")]
    Missing,
    /// The content does not match its checksum.
    #[error("label is damaged: checksum {got:#010x}, expected {want:#010x}")]
    Checksum {
        /// What the label says.
        want: u32,
        /// What its bytes give.
        got: u32,
    },
    /// Written by a format that this version does not know.
    #[error("has format version {0}, this program knows {VERSION}")]
    Version(u32),
    /// Feature flags that this version does not know.
    #[error("uses features unknown to this program (flags {0:#x})")]
    Features(u64),
    /// A label written for another place.
    #[error("label found at byte {at} was written for byte {home}")]
    Misplaced {
        /// Where it was read.
        at: u64,
        /// Where it says it lives.
        home: u64,
    },
    /// A field has an impossible value.
    #[error("label is damaged: impossible {0}")]
    Value(&'static str),
}

impl Label {
    /// The block to write to `slot`.
    pub(crate) fn encode(&self, slot: usize) -> [u8; LABEL_LEN] {
        let mut block = [0; LABEL_LEN];
        let mut text = [0; LABEL_TEXT_MAX];
        let len = self.text.len().min(LABEL_TEXT_MAX);
        text[..len].copy_from_slice(&self.text.as_bytes()[..len]);
        Encoder::new(&mut block)
            .bytes(&MAGIC)
            .u32(0) // checksum
            .u32(VERSION)
            .u64(LABEL_OFFSETS[slot])
            .u64(self.generation)
            .u64(0) // compatible features
            .u64(self.ro_compat)
            .u64(self.incompat)
            .bytes(&self.fs_uuid)
            .bytes(&self.device_uuid)
            .u16(self.device_index)
            .u16(self.device_count)
            .u32(self.stripe_unit_bytes)
            .u64(self.size_bytes)
            .u32(u32::from(!self.is_clean))
            .u32(self.table_len)
            .u32(self.table_crc)
            .u32(0) // reserved
            .bytes(&text);
        let crc = crc_without(&block, CRC_AT);
        block[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// The only way in from disk. Each check may rely on the ones above it.
    pub(crate) fn decode(block: &[u8], at: u64) -> Result<Label, LabelError> {
        let mut from = Decoder::new(block);
        if from.bytes() != MAGIC {
            return Err(LabelError::Missing);
        }
        let (want, got) = (from.u32(), crc_without(block, CRC_AT));
        if want != got {
            return Err(LabelError::Checksum { want, got });
        }
        let version = from.u32();
        if version != VERSION {
            return Err(LabelError::Version(version));
        }
        let home = from.u64();
        if home != at {
            return Err(LabelError::Misplaced { at, home });
        }
        let generation = from.u64();
        let _compatible = from.u64();
        let ro_compat = from.u64();
        let incompat = from.u64();
        if incompat & !INCOMPAT_KNOWN != 0 {
            return Err(LabelError::Features(incompat));
        }
        let (fs_uuid, device_uuid) = (from.bytes(), from.bytes());
        let (device_index, device_count) = (from.u16(), from.u16());
        let stripe_unit_bytes = from.u32();
        let size_bytes = from.u64();
        let state = from.u32();
        let (table_len, table_crc, reserved) = (from.u32(), from.u32(), from.u32());
        let text: [u8; LABEL_TEXT_MAX] = from.bytes();
        let check = |good: bool, field| {
            if good {
                Ok(())
            } else {
                Err(LabelError::Value(field))
            }
        };
        check(from.ends_in_zeros() && reserved == 0, "reserved bytes")?;
        check(generation > 0, "generation")?;
        check(
            device_count > 0 && usize::from(device_count) <= DEVICES_MAX,
            "device count",
        )?;
        check(device_index < device_count, "device index")?;
        check(is_stripe_unit(stripe_unit_bytes), "stripe unit")?;
        check(
            size_bytes >= DEVICE_BYTES_MIN && size_bytes.is_multiple_of(BLOCK_SIZE),
            "device size",
        )?;
        check(state <= 1, "state")?;
        check(
            usize::try_from(table_len).is_ok_and(|len| len <= TABLE_LEN_MAX),
            "table length",
        )?;
        let end = text
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(LABEL_TEXT_MAX);
        check(text[end..].iter().all(|&byte| byte == 0), "label text")?;
        let text =
            std::str::from_utf8(&text[..end]).map_err(|_| LabelError::Value("label text"))?;
        Ok(Label {
            generation,
            ro_compat,
            incompat,
            fs_uuid,
            device_uuid,
            device_index,
            device_count,
            stripe_unit_bytes,
            size_bytes,
            is_clean: state == 0,
            table_len,
            table_crc,
            text: text.to_owned(),
        })
    }

    pub(crate) fn info(&self) -> LabelInfo {
        LabelInfo {
            fs_uuid: uuid_text(&self.fs_uuid),
            device_uuid: uuid_text(&self.device_uuid),
            device_index: self.device_index,
            device_count: self.device_count,
            size_bytes: self.size_bytes,
            generation: self.generation,
            stripe_unit_bytes: self.stripe_unit_bytes,
            label: self.text.clone(),
            clean: self.is_clean,
        }
    }
}

/// Whether a stripe unit is one that the format allows.
pub(crate) fn is_stripe_unit(bytes: u32) -> bool {
    bytes.is_power_of_two() && u64::from(bytes) >= BLOCK_SIZE && bytes <= STRIPE_UNIT_MAX
}

/// Of two copies: the newest valid label, or the error that says most.
pub(crate) fn newest(copies: [Result<Label, LabelError>; 2]) -> Result<Label, LabelError> {
    match copies {
        [Ok(a), Ok(b)] => Ok(if a.generation >= b.generation { a } else { b }),
        [Ok(label), Err(_)] | [Err(_), Ok(label)] => Ok(label),
        [Err(LabelError::Missing), Err(error)] | [Err(error), Err(_)] => Err(error),
    }
}

/// Reads the newest valid label of a file or block device, without locking or assembling.
pub fn read_label(path: &Path) -> Result<LabelInfo, LabelError> {
    let os_error =
        |error: std::io::Error| LabelError::Io(error.raw_os_error().unwrap_or(libc::EIO));
    let file = File::open(path).map_err(os_error)?;
    let read = |slot: usize| {
        let mut block = [0; LABEL_LEN];
        let at = LABEL_OFFSETS[slot];
        match file.read_exact_at(&mut block, at) {
            Ok(()) => Label::decode(&block, at),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(LabelError::Missing)
            }
            Err(error) => Err(os_error(error)),
        }
    };
    newest([read(0), read(1)]).map(|label| label.info())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Label {
        Label {
            generation: 7,
            ro_compat: 0,
            incompat: INCOMPAT_JOURNAL,
            fs_uuid: [1; 16],
            device_uuid: [2; 16],
            device_index: 1,
            device_count: 3,
            stripe_unit_bytes: 256 << 10,
            size_bytes: 64 << 20,
            is_clean: false,
            table_len: 160,
            table_crc: 0x1234,
            text: "scratch".into(),
        }
    }

    #[test]
    fn encode_and_decode_agree() {
        for (slot, &at) in LABEL_OFFSETS.iter().enumerate() {
            assert_eq!(Label::decode(&sample().encode(slot), at), Ok(sample()));
        }
    }

    #[test]
    fn a_label_in_another_place_is_refused() {
        let block = sample().encode(1);
        let (at, home) = (0, LABEL_OFFSETS[1]);
        assert_eq!(
            Label::decode(&block, 0),
            Err(LabelError::Misplaced { at, home })
        );
    }

    /// Any single flipped bit is noticed.
    #[test]
    fn every_flipped_bit_is_noticed() {
        let block = sample().encode(0);
        for bit in 0..LABEL_LEN * 8 {
            let mut damaged = block;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Label::decode(&damaged, 0).is_err(), "bit {bit}");
        }
    }

    /// A label with a right checksum and wrong content does not get in.
    #[test]
    fn impossible_values_are_refused() {
        let wrong: [fn(&mut Label); 6] = [
            |label| label.device_index = 3,
            |label| label.device_count = 0,
            |label| label.stripe_unit_bytes = 5000,
            |label| label.size_bytes = 1 << 20,
            |label| label.generation = 0,
            |label| label.table_len = 1 << 30,
        ];
        for change in wrong {
            let mut label = sample();
            change(&mut label);
            let refused = Label::decode(&label.encode(0), 0);
            assert!(matches!(refused, Err(LabelError::Value(_))), "{refused:?}");
        }
    }
}
