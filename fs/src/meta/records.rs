//! Keys and values of the metadata tables.
//!
//! Keys are big endian so that byte order is numeric order; values are little endian with fixed
//! offsets. Everything that is read from a device passes through a `decode` that checks lengths
//! and values and returns `None` for what cannot be.

use crate::{Attr, Ino, Timestamp};

/// Longest written extent, in blocks: 1 MiB of data with its checksums is one record.
pub(crate) const EXTENT_BLOCKS_MAX: u64 = 256;

/// More blocks than a volume can have: their byte addresses would not fit 63 bits.
pub(crate) const BLOCKS_MAX: u64 = (1 << 63) / 4096;

/// Name in the settings of the base of the journal.
pub(crate) const SETTING_JOURNAL: &[u8] = b"journal";

/// Key of an inode (and of an orphan).
pub(crate) fn ino_key(ino: Ino) -> [u8; 8] {
    ino.to_be_bytes()
}

/// Key of an extent or a cookie: inode and a second number.
pub(crate) fn pair_key(ino: Ino, second: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&ino.to_be_bytes());
    key[8..].copy_from_slice(&second.to_be_bytes());
    key
}

/// Key of a directory entry or an extended attribute: inode and a name.
pub(crate) fn name_key(ino: Ino, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(8 + name.len());
    key.extend_from_slice(&ino.to_be_bytes());
    key.extend_from_slice(name);
    key
}

/// Reads a big-endian number out of a key.
pub(crate) fn key_u64(key: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(at..at + 8)?.try_into().ok()?))
}

fn le_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A plain little-endian number as a value.
pub(crate) fn decode_u64(value: &[u8]) -> Option<u64> {
    if value.len() == 8 {
        le_u64(value, 0)
    } else {
        None
    }
}

/// What an inode's record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InodeRecord {
    pub attr: Attr,
    /// Directories: the cookie that the next entry gets.
    pub next_cookie: u64,
    /// Directories: the parent.
    pub parent: Ino,
}

const INODE_RECORD_LEN: usize = 128;

/// More blocks or directory cookies than an inode can ever have: counting on never overflows.
pub(crate) const COUNT_MAX: u64 = u64::MAX / 2;

fn put_time(out: &mut Vec<u8>, time: Timestamp) {
    out.extend_from_slice(&time.secs.to_le_bytes());
    out.extend_from_slice(&time.nanos.to_le_bytes());
}

fn time_at(value: &[u8], at: usize) -> Option<Timestamp> {
    let secs = i64::from_le_bytes(value.get(at..at + 8)?.try_into().ok()?);
    let nanos = le_u32(value, at + 8)?;
    (nanos < 1_000_000_000).then_some(Timestamp { secs, nanos })
}

impl InodeRecord {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let attr = &self.attr;
        let mut out = Vec::with_capacity(INODE_RECORD_LEN);
        out.extend_from_slice(&attr.mode.to_le_bytes()); // 0
        out.extend_from_slice(&attr.nlink.to_le_bytes()); // 4
        out.extend_from_slice(&attr.uid.to_le_bytes()); // 8
        out.extend_from_slice(&attr.gid.to_le_bytes()); // 12
        out.extend_from_slice(&attr.size.to_le_bytes()); // 16
        out.extend_from_slice(&attr.blocks.to_le_bytes()); // 24
        out.extend_from_slice(&attr.rdev.to_le_bytes()); // 32
        out.extend_from_slice(&attr.flags.to_le_bytes()); // 36
        out.extend_from_slice(&attr.generation.to_le_bytes()); // 40
        put_time(&mut out, attr.atime); // 48
        put_time(&mut out, attr.mtime); // 60
        put_time(&mut out, attr.ctime); // 72
        put_time(&mut out, attr.btime); // 84
        out.extend_from_slice(&self.next_cookie.to_le_bytes()); // 96
        out.extend_from_slice(&self.parent.to_le_bytes()); // 104
        out.resize(INODE_RECORD_LEN, 0); // 112: reserved
        out
    }

    pub(crate) fn decode(ino: Ino, value: &[u8]) -> Option<Self> {
        if value.len() != INODE_RECORD_LEN || value[112..].iter().any(|&byte| byte != 0) {
            return None;
        }
        let mode = le_u32(value, 0)?;
        let kinds = [
            libc::S_IFREG,
            libc::S_IFDIR,
            libc::S_IFLNK,
            libc::S_IFCHR,
            libc::S_IFBLK,
            libc::S_IFIFO,
            libc::S_IFSOCK,
        ];
        let size = le_u64(value, 16)?;
        let (blocks, next_cookie) = (le_u64(value, 24)?, le_u64(value, 96)?);
        if blocks.max(next_cookie) > COUNT_MAX {
            return None;
        }
        if !kinds.contains(&(mode & libc::S_IFMT)) || size > crate::FILE_SIZE_MAX {
            return None;
        }
        Some(Self {
            attr: Attr {
                ino,
                mode,
                nlink: le_u32(value, 4)?,
                uid: le_u32(value, 8)?,
                gid: le_u32(value, 12)?,
                size,
                blocks,
                rdev: le_u32(value, 32)?,
                flags: le_u32(value, 36)?,
                generation: le_u64(value, 40)?,
                atime: time_at(value, 48)?,
                mtime: time_at(value, 60)?,
                ctime: time_at(value, 72)?,
                btime: time_at(value, 84)?,
            },
            next_cookie,
            parent: le_u64(value, 104)?,
        })
    }
}

impl InodeRecord {
    /// A record that can be, from one that cannot: what is impossible is set to what says nothing.
    /// `None` if there is no telling what it was. Also says whether the size is the record's own;
    /// if not it is the largest there is.
    pub(crate) fn mend(ino: Ino, value: &[u8]) -> Option<(Self, bool)> {
        let mut value = value.to_vec();
        if value.len() != INODE_RECORD_LEN {
            return None;
        }
        value[112..].fill(0);
        for at in [24, 96] {
            if le_u64(&value, at)? > COUNT_MAX {
                value[at..at + 8].fill(0);
            }
        }
        for at in [48, 60, 72, 84] {
            if time_at(&value, at).is_none() {
                value[at..at + 12].fill(0);
            }
        }
        let has_size = le_u64(&value, 16)? <= crate::FILE_SIZE_MAX;
        if !has_size {
            value[16..24].copy_from_slice(&crate::FILE_SIZE_MAX.to_le_bytes());
        }
        Some((Self::decode(ino, &value)?, has_size))
    }
}

/// A directory entry, as found by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DentryRecord {
    pub ino: Ino,
    pub cookie: u64,
    pub kind: u8,
}

impl DentryRecord {
    /// The same entry, naming what `other` names.
    pub(crate) fn naming(&self, other: &Self) -> Self {
        Self {
            cookie: self.cookie,
            ..*other
        }
    }

    pub(crate) fn encode(&self) -> [u8; 17] {
        let mut out = [0; 17];
        out[..8].copy_from_slice(&self.ino.to_le_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_le_bytes());
        out[16] = self.kind;
        out
    }

    pub(crate) fn decode(value: &[u8]) -> Option<Self> {
        if value.len() != 17 {
            return None;
        }
        Some(Self {
            ino: le_u64(value, 0)?,
            cookie: le_u64(value, 8)?,
            kind: value[16],
        })
    }
}

/// A directory entry, as found by cookie: `ino`, `kind`, name.
pub(crate) fn encode_cookie_entry(ino: Ino, kind: u8, name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(9 + name.len());
    out.extend_from_slice(&ino.to_le_bytes());
    out.push(kind);
    out.extend_from_slice(name);
    out
}

pub(crate) fn decode_cookie_entry(value: &[u8]) -> Option<(Ino, u8, &[u8])> {
    let name = value.get(9..)?;
    if name.is_empty() || name.len() > crate::NAME_MAX {
        return None;
    }
    Some((le_u64(value, 0)?, value[8], name))
}

/// Where a run of a file's blocks lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First block in the file.
    pub start: u64,
    /// Blocks.
    pub len: u64,
    /// First block in the volume.
    pub block: u64,
    /// CRC32C of each block; empty for an unwritten extent, which reads as zeros.
    pub crcs: Vec<u32>,
}

const EXTENT_HEADER_LEN: usize = 16;
const EXTENT_UNWRITTEN: u32 = 1;

impl Extent {
    /// First block in the file after this extent.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Whether the extent is only set aside.
    pub(crate) fn unwritten(&self) -> bool {
        self.crcs.is_empty()
    }

    /// The part of the extent inside `from..to`, which must overlap it.
    pub(crate) fn slice(&self, from: u64, to: u64) -> Extent {
        let (from, to) = (from.max(self.start), to.min(self.end()));
        let skip = from - self.start;
        let crcs = if self.unwritten() {
            Vec::new()
        } else {
            let skip = usize::try_from(skip).expect("an extent with checksums is short");
            let len = usize::try_from(to - from).expect("an extent with checksums is short");
            self.crcs[skip..skip + len].to_vec()
        };
        Extent {
            start: from,
            len: to - from,
            block: self.block + skip,
            crcs,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(EXTENT_HEADER_LEN + 4 * self.crcs.len());
        out.extend_from_slice(&self.block.to_le_bytes());
        let len = u32::try_from(self.len).expect("extents are cut to 32 bit lengths");
        out.extend_from_slice(&len.to_le_bytes());
        let flags = if self.unwritten() {
            EXTENT_UNWRITTEN
        } else {
            0
        };
        out.extend_from_slice(&flags.to_le_bytes());
        for crc in &self.crcs {
            out.extend_from_slice(&crc.to_le_bytes());
        }
        out
    }

    pub(crate) fn decode(start: u64, value: &[u8]) -> Option<Self> {
        let (block, len, flags) = (le_u64(value, 0)?, le_u32(value, 8)?, le_u32(value, 12)?);
        let body = value.get(EXTENT_HEADER_LEN..)?;
        if len == 0
            || start.checked_add(u64::from(len)).is_none()
            || block.saturating_add(u64::from(len)) > BLOCKS_MAX
        {
            return None;
        }
        let crcs: Vec<u32> = match flags {
            0 if body.len() == 4 * len as usize && u64::from(len) <= EXTENT_BLOCKS_MAX => body
                .chunks_exact(4)
                .map(|crc| u32::from_le_bytes(crc.try_into().expect("chunks of four")))
                .collect(),
            EXTENT_UNWRITTEN if body.is_empty() => Vec::new(),
            _ => return None,
        };
        Some(Self {
            start,
            len: u64::from(len),
            block,
            crcs,
        })
    }
}

/// Why an inode stands in the orphan table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Orphan {
    /// No name left: delete it once nobody has it open.
    Delete,
    /// A truncation in bounded steps was under way: bring the size down to this many bytes.
    Truncate(u64),
}

impl Orphan {
    pub(crate) fn encode(self) -> Vec<u8> {
        match self {
            Orphan::Delete => vec![0],
            Orphan::Truncate(size) => {
                let mut out = vec![1];
                out.extend_from_slice(&size.to_le_bytes());
                out
            }
        }
    }

    pub(crate) fn decode(value: &[u8]) -> Option<Self> {
        match value {
            [0] => Some(Orphan::Delete),
            [1, size @ ..] => decode_u64(size).map(Orphan::Truncate),
            _ => None,
        }
    }
}

/// The DT_* type of a mode.
pub(crate) fn dt_of_mode(mode: u32) -> u8 {
    u8::try_from((mode & libc::S_IFMT) >> 12).expect("four bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn inode_record_round_trips() {
        let time = Timestamp {
            secs: -2_177_452_800,
            nanos: 999_999_999,
        };
        let record = InodeRecord {
            attr: Attr {
                ino: 7,
                size: 1 << 40,
                blocks: 8,
                atime: time,
                mtime: time,
                ctime: time,
                btime: Timestamp { secs: 1, nanos: 2 },
                mode: libc::S_IFREG | 0o4755,
                nlink: 3,
                uid: 1000,
                gid: 1001,
                rdev: 5,
                flags: 0x10,
                generation: 99,
            },
            next_cookie: 3,
            parent: 1,
        };
        assert_eq!(InodeRecord::decode(7, &record.encode()), Some(record));
    }

    proptest! {
        #[test]
        fn decoders_take_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = InodeRecord::decode(1, &bytes);
            let _ = DentryRecord::decode(&bytes);
            let _ = decode_cookie_entry(&bytes);
            let _ = Extent::decode(3, &bytes);
            let _ = Orphan::decode(&bytes);
        }

        #[test]
        fn extents_round_trip(start in 0u64..1 << 40, block in 0u64..1 << 40,
                              crcs in proptest::collection::vec(any::<u32>(), 1..257)) {
            let extent = Extent { start, len: crcs.len() as u64, block, crcs };
            prop_assert_eq!(Extent::decode(start, &extent.encode()), Some(extent));
        }
    }
}
