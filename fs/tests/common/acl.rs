//! Access lists as the model knows them: the rules of POSIX.1e, draft 17, and of Linux, for the
//! values that the kernel passes as extended attributes.

use super::rng::Rng;

pub const ACCESS: &[u8] = b"system.posix_acl_access";
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;

/// Entries of tag, permissions and id.
pub struct List(Vec<(u16, u16, u32)>);

impl List {
    /// A valid one.
    pub fn random(rng: &mut Rng) -> Self {
        let mut list = vec![(USER_OBJ, 0, NO_ID)];
        let (users, groups) = (rng.below(3) as u32, rng.below(2) as u32);
        list.extend((0..users).map(|nth| (USER, 0, 10 + nth)));
        list.push((GROUP_OBJ, 0, NO_ID));
        list.extend((0..groups).map(|nth| (GROUP, 0, 20 + nth)));
        if users + groups > 0 || rng.one_in(3) {
            list.push((MASK, 0, NO_ID));
        }
        list.push((OTHER, 0, NO_ID));
        for entry in &mut list {
            entry.1 = rng.below(8) as u16;
        }
        Self(list)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut value = 2_u32.to_le_bytes().to_vec();
        for (tag, perm, id) in &self.0 {
            value.extend_from_slice(&tag.to_le_bytes());
            value.extend_from_slice(&perm.to_le_bytes());
            value.extend_from_slice(&id.to_le_bytes());
        }
        value
    }

    /// Of a value that the model stored, which is valid.
    pub fn decode(value: &[u8]) -> Self {
        let entries = value[4..].chunks_exact(8).map(|raw| {
            (
                u16::from_le_bytes([raw[0], raw[1]]),
                u16::from_le_bytes([raw[2], raw[3]]),
                u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]),
            )
        });
        Self(entries.collect())
    }

    /// Whether it says more than permission bits can.
    pub fn is_extended(&self) -> bool {
        self.0.len() > 3
    }

    /// The entry that stands for each three bits of the mode: owner, group class, others.
    fn classes(&mut self) -> [&mut u16; 3] {
        let has_mask = self.0.iter().any(|entry| entry.0 == MASK);
        let group = if has_mask { MASK } else { GROUP_OBJ };
        let mut found = self.0.iter_mut().filter_map(|(tag, perm, _)| {
            (*tag == USER_OBJ || *tag == group || *tag == OTHER).then_some(perm)
        });
        let mut next = || found.next().expect("a valid list has all three");
        [next(), next(), next()]
    }

    /// The permission bits that show in the mode.
    pub fn bits(&mut self) -> u32 {
        let [owner, group, other] = self.classes().map(|perm| u32::from(*perm));
        owner << 6 | group << 3 | other
    }

    /// After chmod.
    pub fn set_bits(&mut self, mode: u32) {
        for (class, shift) in self.classes().into_iter().zip([6, 3, 0]) {
            *class = (mode >> shift & 7) as u16;
        }
    }

    /// What something made with `mode` gets from this default list.
    pub fn limit_to(&mut self, mode: u32) {
        let bits = self.bits() & mode;
        self.set_bits(bits);
    }
}
