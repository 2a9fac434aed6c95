//! POSIX access control lists, as the extended attributes that the kernel sends.
//!
//! The kernel checks permissions; braidfs keeps list and mode in step. The owner's, the group's
//! (with a mask: the mask's) and the others' entries are the mode's permission bits. A list that
//! says no more than the mode is not stored. A new inode inherits its directory's default list.
//!
//! Format (include/uapi/linux/posix_acl_xattr.h): version 2 (4 bytes), then entries of 8 bytes:
//! tag (2), permissions (2), id (4), in order of tag and id.

use crate::Errno;

/// Name of the attribute that limits access.
pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of the attribute that new entries of a directory inherit.
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    perm: u16,
    id: u32,
}

/// A valid list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acl {
    entries: Vec<Entry>,
}

impl Acl {
    /// `Ok(None)` for a list without entries, which means: no list.
    pub(crate) fn decode(value: &[u8]) -> Result<Option<Acl>, Errno> {
        let (version, body) = value.split_at_checked(4).ok_or(Errno::INVAL)?;
        if version != VERSION.to_le_bytes() || !body.len().is_multiple_of(8) {
            return Err(Errno::INVAL);
        }
        let entries: Vec<Entry> = body
            .chunks_exact(8)
            .map(|raw| Entry {
                tag: u16::from_le_bytes([raw[0], raw[1]]),
                perm: u16::from_le_bytes([raw[2], raw[3]]),
                id: u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]),
            })
            .collect();
        if entries.is_empty() {
            return Ok(None);
        }
        let acl = Acl { entries };
        if acl.is_valid() {
            Ok(Some(acl))
        } else {
            Err(Errno::INVAL)
        }
    }

    fn is_valid(&self) -> bool {
        let count = |tag| self.entries.iter().filter(|entry| entry.tag == tag).count();
        let named = count(USER) + count(GROUP);
        let ordered = self.entries.windows(2).all(|pair| {
            let key = |entry: &Entry| match entry.tag {
                USER | GROUP => (entry.tag, entry.id),
                tag => (tag, 0),
            };
            key(&pair[0]) < key(&pair[1])
        });
        let known = |entry: &Entry| {
            matches!(
                entry.tag,
                USER_OBJ | USER | GROUP_OBJ | GROUP | MASK | OTHER
            ) && entry.perm & !0o7 == 0
        };
        ordered
            && self.entries.iter().all(known)
            && [USER_OBJ, GROUP_OBJ, OTHER]
                .iter()
                .all(|&tag| count(tag) == 1)
            && (named == 0 || count(MASK) == 1)
    }

    /// The value of the attribute.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        for entry in &self.entries {
            out.extend_from_slice(&entry.tag.to_le_bytes());
            out.extend_from_slice(&entry.perm.to_le_bytes());
            out.extend_from_slice(&entry.id.to_le_bytes());
        }
        out
    }

    /// Whether the mode says all that the list says.
    pub(crate) fn is_mode_only(&self) -> bool {
        self.entries.len() == 3
    }

    fn group_class(&self) -> u16 {
        let has_mask = self.entries.iter().any(|entry| entry.tag == MASK);
        if has_mask { MASK } else { GROUP_OBJ }
    }

    /// `mode` with the permission bits of the list.
    pub(crate) fn mode(&self, mode: u32) -> u32 {
        let perm = |tag| {
            let entry = self.entries.iter().find(|entry| entry.tag == tag);
            u32::from(entry.map_or(0, |entry| entry.perm))
        };
        let bits = perm(USER_OBJ) << 6 | perm(self.group_class()) << 3 | perm(OTHER);
        mode & !0o777 | bits
    }

    fn update(&mut self, change: impl Fn(u16, u32) -> u32, mode: u32) {
        let group_class = self.group_class();
        for entry in &mut self.entries {
            let bits = match entry.tag {
                USER_OBJ => mode >> 6 & 0o7,
                OTHER => mode & 0o7,
                tag if tag == group_class => mode >> 3 & 0o7,
                _ => continue,
            };
            entry.perm = u16::try_from(change(entry.perm, bits)).expect("three bits");
        }
    }

    /// After chmod: the list takes the mode's bits.
    pub(crate) fn set_mode(&mut self, mode: u32) {
        self.update(|_, bits| bits, mode);
    }

    /// The list of a new inode, made with `mode` in a directory that has this default list.
    pub(crate) fn inherited(mut self, mode: u32) -> Acl {
        self.update(|perm, bits| u32::from(perm) & bits, mode);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn acl(entries: &[(u16, u16, u32)]) -> Acl {
        let entries = entries
            .iter()
            .map(|&(tag, perm, id)| Entry { tag, perm, id })
            .collect();
        Acl { entries }
    }

    const NONE: u32 = u32::MAX;

    #[test]
    fn the_mask_is_the_groups_part_of_the_mode() {
        let mut list = acl(&[
            (USER_OBJ, 7, NONE),
            (USER, 6, 1000),
            (GROUP_OBJ, 7, NONE),
            (MASK, 4, NONE),
            (OTHER, 1, NONE),
        ]);
        assert_eq!(Acl::decode(&list.encode()), Ok(Some(list.clone())));
        assert_eq!(list.mode(0o100_000), 0o100_741);
        list.set_mode(0o100_620);
        assert_eq!(list.mode(0o100_000), 0o100_620);
        assert_eq!(list.entries[2].perm, 7);
        assert_eq!(list.inherited(0o644).mode(0), 0o600);
    }

    #[test]
    fn three_entries_are_the_mode() {
        let list = acl(&[(USER_OBJ, 6, NONE), (GROUP_OBJ, 4, NONE), (OTHER, 4, NONE)]);
        assert!(list.is_mode_only());
        assert_eq!(list.mode(0o100_000), 0o100_644);
    }

    #[test]
    fn impossible_lists_are_refused() {
        let bad = [
            acl(&[(USER_OBJ, 7, NONE), (GROUP_OBJ, 7, NONE)]),
            acl(&[(USER_OBJ, 8, NONE), (GROUP_OBJ, 7, NONE), (OTHER, 0, NONE)]),
            acl(&[(GROUP_OBJ, 7, NONE), (USER_OBJ, 7, NONE), (OTHER, 0, NONE)]),
            acl(&[
                (USER_OBJ, 7, NONE),
                (USER, 7, 1),
                (GROUP_OBJ, 7, NONE),
                (OTHER, 0, NONE),
            ]),
        ];
        for list in bad {
            assert_eq!(Acl::decode(&list.encode()), Err(Errno::INVAL));
        }
        assert_eq!(Acl::decode(&VERSION.to_le_bytes()), Ok(None));
    }

    proptest! {
        #[test]
        fn decode_takes_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(Some(list)) = Acl::decode(&bytes) {
                prop_assert_eq!(list.encode(), bytes);
            }
        }
    }
}
