//! What else may live on a device: asked before formatting, so that nobody loses data by a typo.
//!
//! Each signature is a magic number at a fixed place. The list favours what people have on disks.

use crate::chain::Chain;
use crate::device::{BlockDevice, patience};
use crate::error::Op;
use crate::kiobuf::{Completion, Kiobuf};
use crate::pages::AlignedBuf;
use crate::request::DeviceRequest;
use crate::units::mem_len;
use std::sync::mpsc::sync_channel;

/// A magic number at a byte offset, counted from the start or, if negative, from the end.
struct Signature {
    name: &'static str,
    at: i64,
    magic: &'static [u8],
}

const fn at(name: &'static str, at: i64, magic: &'static [u8]) -> Signature {
    Signature { name, at, magic }
}

/// Version 1.0 of md puts its superblock 8 KiB before the end, on a 4 KiB border; 0.90 in the last
/// whole 64 KiB but one. Both are looked for in the last 128 KiB, see [`find_near_end`].
const MD_MAGIC: [u8; 4] = 0xa92b_4efc_u32.to_le_bytes();

/// More specific ones first: a boot sector's 55 AA comes last.
const SIGNATURES: &[Signature] = &[
    at("braidfs", 0, &crate::label::MAGIC),
    at("braidfs", 512 << 10, &crate::label::MAGIC),
    at("XFS", 0, b"XFSB"),
    at("LUKS", 0, b"LUKS\xba\xbe"),
    at("squashfs", 0, b"hsqs"),
    at("bcachefs", 4096 + 24, &BCACHEFS_MAGIC),
    at("btrfs", 0x1_0040, b"_BHRfS_M"),
    at("LVM2 physical volume", 0x200, b"LABELONE"),
    at("LVM2 physical volume", 0, b"LABELONE"),
    at("Linux md RAID member", 0, &MD_MAGIC),
    at("Linux md RAID member", 4096, &MD_MAGIC),
    at("f2fs", 1024, &0xf2f5_2010_u32.to_le_bytes()),
    at("swap", 4086, b"SWAPSPACE2"),
    at("swap", 4086, b"SWAP-SPACE"),
    at("ISO 9660", 0x8001, b"CD001"),
    at("ReiserFS", 0x1_0034, b"ReIsEr"),
    at("ZFS", (128 << 10) + 4096, &ZFS_UBERBLOCK),
    at("ZFS", 128 << 10, &ZFS_UBERBLOCK),
    at("NTFS", 3, b"NTFS    "),
    at("exFAT", 3, b"EXFAT   "),
    at("FAT", 82, b"FAT32   "),
    at("FAT", 54, b"FAT16   "),
    at("FAT", 54, b"FAT12   "),
    at("GPT partition table", 512, b"EFI PART"),
    at("GPT partition table", 4096, b"EFI PART"),
    at("GPT partition table", -512, b"EFI PART"),
    at("DOS partition table or boot sector", 510, b"\x55\xaa"),
];

const BCACHEFS_MAGIC: [u8; 16] =
    *b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef";
const ZFS_UBERBLOCK: [u8; 8] = 0x00ba_b10c_u64.to_le_bytes();

/// Bytes looked at, from the start and from the end.
const HEAD_LEN: u64 = 1 << 20;
const TAIL_LEN: u64 = 128 << 10;

/// Names what a device seems to hold already. `None`: nothing that is known here. A device that
/// cannot be read has no known content either; formatting it will say why.
pub fn foreign_signature(device: &dyn BlockDevice) -> Option<&'static str> {
    let size = device.size_bytes();
    let head = read(device, 0, HEAD_LEN.min(size))?;
    let tail_len = TAIL_LEN.min(size);
    let tail = read(device, size - tail_len, tail_len)?;
    recognise(&head, &tail)
}

fn recognise(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    if let Some(ext) = recognise_ext(head) {
        return Some(ext);
    }
    let found = SIGNATURES.iter().find(|signature| {
        let place = match u64::try_from(signature.at) {
            Ok(offset) => head.get(mem_len(offset)..),
            Err(_) => {
                let back = mem_len(signature.at.unsigned_abs());
                tail.len().checked_sub(back).and_then(|at| tail.get(at..))
            }
        };
        place.is_some_and(|bytes| bytes.starts_with(signature.magic))
    });
    found
        .map(|signature| signature.name)
        .or_else(|| find_near_end(tail))
}

/// ext2, 3 and 4 share a magic number; feature flags tell them apart.
fn recognise_ext(head: &[u8]) -> Option<&'static str> {
    let superblock = head.get(1024..2048)?;
    let u32_at = |at: usize| {
        let field = superblock[at..].first_chunk().copied().unwrap_or_default();
        u32::from_le_bytes(field)
    };
    if superblock[56..58] != [0x53, 0xef] {
        return None;
    }
    let (compat, incompat, ro_compat) = (u32_at(92), u32_at(96), u32_at(100));
    /// Extents, 64-bit, flexible groups; huge files, extra inode size and the like.
    const EXT4_INCOMPAT: u32 = 0x40 | 0x80 | 0x200;
    const EXT4_RO_COMPAT: u32 = 0x8 | 0x10 | 0x20 | 0x40 | 0x400;
    const HAS_JOURNAL: u32 = 0x4;
    Some(
        if incompat & EXT4_INCOMPAT != 0 || ro_compat & EXT4_RO_COMPAT != 0 {
            "ext4"
        } else if compat & HAS_JOURNAL != 0 {
            "ext3"
        } else {
            "ext2"
        },
    )
}

fn find_near_end(tail: &[u8]) -> Option<&'static str> {
    let md = tail.chunks(4096).any(|block| block.starts_with(&MD_MAGIC));
    md.then_some("Linux md RAID member")
}

fn read(device: &dyn BlockDevice, offset: u64, len: u64) -> Option<AlignedBuf> {
    if len == 0 {
        return None;
    }
    let (to, from) = sync_channel(1);
    let end_io = Box::new(move |done: Completion| to.send(done).unwrap_or_default());
    let kiobuf = Kiobuf::new(
        Box::new(AlignedBuf::zeroed(mem_len(len))),
        0,
        mem_len(len),
        end_io,
    );
    device.submit(DeviceRequest::new(Op::Read, offset, Chain::from(kiobuf)));
    let done = from
        .recv_timeout(patience(device.answer_time_max(), 1))
        .ok()?;
    if let Some(error) = done.error {
        log::warn!("{}: {error}", device.name());
        return None;
    }
    AlignedBuf::from_pages(done.pages?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::SimDevice;

    #[test]
    fn every_signature_is_found_where_it_belongs() {
        let size = 4u64 << 20;
        for signature in SIGNATURES {
            let sim = SimDevice::new("sim", size);
            let offset = match u64::try_from(signature.at) {
                Ok(offset) => offset,
                Err(_) => size - signature.at.unsigned_abs(),
            };
            sim.poke(offset, signature.magic);
            assert_eq!(foreign_signature(&*sim), Some(signature.name));
        }
    }

    #[test]
    fn ext_versions_are_told_apart_and_an_empty_device_has_none() {
        for (compat, incompat, name) in [(0, 0, "ext2"), (4, 2, "ext3"), (4, 0x42, "ext4")] {
            let sim = SimDevice::new("sim", 1 << 20);
            sim.poke(1024 + 56, &[0x53, 0xef]);
            sim.poke(1024 + 92, &[compat, 0, 0, 0, incompat]);
            assert_eq!(foreign_signature(&*sim), Some(name));
        }
        assert_eq!(foreign_signature(&*SimDevice::new("sim", 1 << 20)), None);
    }
}
