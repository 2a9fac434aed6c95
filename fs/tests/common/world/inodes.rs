//! Attributes, flags, extended attributes, access lists.

use braidfs::{
    Cred, Errno, FLAG_APPEND, FLAG_DIRSYNC, FLAG_IMMUTABLE, FLAG_NOATIME, FLAG_NODUMP, FLAG_NOTAIL,
    FLAG_SYNC, Ino, ROOT_INO, SetAttr, SetTime, Timestamp,
};

use super::World;
use crate::common::CRED;
use crate::common::acl::{self, List};
use crate::common::model::{Body, CAPABILITY, LOCKS, Stamp};

const XATTR_BYTES_MAX: u64 = 65_536;

impl World {
    fn time(&mut self) -> Timestamp {
        let secs = match self.rng.below(4) {
            0 => *self.rng.pick(&[
                i64::MIN,
                i64::MAX,
                -1,
                0,
                i64::from(i32::MIN) - 1,
                i64::from(i32::MAX) + 1,
                (1 << 34) - 1,
                1 << 34,
            ]),
            _ => self.rng.below(1 << 33) as i64 - (1 << 32),
        };
        let nanos = match self.rng.below(4) {
            0 => 0,
            1 => 999_999_999,
            _ => self.rng.below(1_000_000_000) as u32,
        };
        Timestamp { secs, nanos }
    }

    pub(super) fn attributes(&mut self) {
        let ino = self.ino();
        let mut set = SetAttr::default();
        match self.rng.below(3) {
            0 => set.mode = Some(self.rng.below(0o10000) as u32),
            1 => {
                (set.uid, set.gid) = (Some(self.rng.below(9) as u32), Some(7));
                set.kill_suidgid = self.rng.one_in(2);
            }
            _ => {
                let append = self.model.node(ino).flags & FLAG_APPEND != 0;
                let (one, two) = (SetTime::At(self.time()), SetTime::At(self.time()));
                (set.atime, set.mtime) = match self.rng.below(6) {
                    0 => (Some(SetTime::Now), Some(SetTime::Now)),
                    1 => (Some(one), None),
                    2 => (None, Some(one)),
                    // On an append-only file a kernel that keeps times itself may do this.
                    3 if !append => (Some(SetTime::Now), Some(one)),
                    4 if !append => (None, Some(SetTime::Now)),
                    _ => (Some(one), Some(two)),
                };
            }
        }
        self.say(format_args!("setattr {ino}: {}", shown(&set)));
        let touches = matches!(set.atime, Some(SetTime::Now)) && !set.kill_suidgid;
        let locks = if touches { FLAG_IMMUTABLE } else { LOCKS };
        let expected = self.model.node(ino).check_flags(locks);
        let found = self.fs.setattr(ino, &set, &CRED);
        if self.agrees(&found, expected)
            && let Ok(attr) = found
        {
            self.set_in_model(ino, &set);
            self.check_attr(&attr);
        }
    }

    fn set_in_model(&mut self, ino: Ino, set: &SetAttr) {
        self.model.touch(ino, false);
        let node = self.model.node(ino);
        let is_dir = node.is_dir();
        if set.kill_suidgid && !is_dir {
            node.kill_set_ids();
        }
        if let Some(mode) = set.mode {
            node.mode = node.mode & libc::S_IFMT | mode;
            if let Some(value) = node.xattrs.get_mut(acl::ACCESS) {
                let mut list = List::decode(value);
                list.set_bits(mode);
                *value = list.encode();
            }
        }
        if let (Some(uid), Some(gid)) = (set.uid, set.gid) {
            (node.uid, node.gid) = (uid, gid);
            if !is_dir {
                node.xattrs.remove(CAPABILITY);
            }
        }
        for (stamp, set) in [(&mut node.atime, set.atime), (&mut node.mtime, set.mtime)] {
            match set {
                Some(SetTime::At(time)) => *stamp = Stamp::At(time),
                Some(SetTime::Now) => *stamp = Stamp::Set,
                None => {}
            }
        }
    }

    /// chattr. Locks are mostly taken away again, so that the run does not come to a halt.
    pub(super) fn flags(&mut self) {
        let locked = self.model.nodes.iter();
        let locked = locked.filter(|(_, node)| node.flags & LOCKS != 0);
        let locked = locked.filter(|(_, node)| node.lookups > 0 || node.opens > 0);
        let locked = locked.map(|(&ino, node)| (node.label, ino));
        let ino = match self.rng.pick_labelled(locked) {
            Some(ino) if self.rng.below(4) > 0 => ino,
            _ => self.ino(),
        };
        let mut flags = 0;
        let slow = if self.limits.wide { 24 } else { u64::MAX };
        for (flag, chance) in [
            (FLAG_IMMUTABLE, 4),
            (FLAG_APPEND, 4),
            (FLAG_NOATIME, 3),
            (FLAG_NODUMP, 3),
            (FLAG_NOTAIL, 3),
            (FLAG_SYNC, slow),
            (FLAG_DIRSYNC, slow),
        ] {
            if self.rng.one_in(chance) {
                flags |= flag;
            }
        }
        let node = self.model.node(ino);
        let (before, owner) = (node.flags, node.uid);
        let mut expected = Ok(());
        let mut cred = Cred { uid: owner, ..CRED };
        let kind = self.rng.below(12);
        let allowed = self.model.node(ino).flags_allowed();
        match kind {
            // What this type does not have. Otherwise only what it does.
            0 if flags & !allowed != 0 => expected = Err(Errno::NOTSUP),
            _ => flags &= allowed,
        }
        if ino == ROOT_INO && !self.limits.wide {
            // Whoever looks at it afterwards is to be able to make something there.
            flags &= !LOCKS;
        }
        let changed = before ^ flags;
        match kind {
            1 => (cred.uid, expected) = (owner + 1, Err(Errno::PERM)),
            2 => cred.capable_immutable = false,
            3 => cred.uid = 0,
            _ => {}
        }
        let refused = (!cred.capable_immutable && changed & LOCKS != 0)
            || (before & flags & FLAG_IMMUTABLE != 0 && changed != 0);
        if expected.is_ok() && refused {
            expected = Err(Errno::PERM);
        }
        self.say(format_args!(
            "chattr {ino} from {before:#x} to {flags:#x}, as {}, capable: {}",
            cred.uid, cred.capable_immutable
        ));
        let found = self.fs.set_flags(ino, flags, &cred);
        if self.agrees(&found, expected) {
            self.model.touch(ino, false);
            self.model.node(ino).flags = flags;
        }
        assert_eq!(self.fs.flags(ino), Ok(self.model.node(ino).flags));
    }

    pub(super) fn xattr(&mut self) {
        let ino = self.ino();
        let name = match self.rng.below(40) {
            0 => Vec::new(),
            1 => vec![b'x'; 256],
            n if n % 6 == 5 => CAPABILITY.to_vec(),
            n => format!("user.{}", n % 6).into_bytes(),
        };
        let bad = match name.len() {
            0 => Err(Errno::INVAL),
            256 => Err(Errno::RANGE),
            _ => Ok(()),
        };
        let node = self.model.node(ino);
        let known = node.xattrs.get(&name).cloned();
        let locked = node.check_flags(LOCKS);
        let there = known.as_ref().map(|_| ()).ok_or(Errno::NODATA);
        match self.rng.below(6) {
            0..3 => self.set_xattr(ino, &name, bad),
            3 => {
                self.say(format_args!("removexattr of {ino}"));
                let expected = bad.and(locked).and(there);
                let found = self.fs.removexattr(ino, &name);
                if self.agrees(&found, expected) {
                    self.model.node(ino).xattrs.remove(&name);
                    self.model.touch(ino, false);
                }
            }
            4 => {
                self.say(format_args!("getxattr of {ino}"));
                let expected = bad.and(there).map(|()| known.unwrap_or_default());
                assert_eq!(self.fs.getxattr(ino, &name), expected);
            }
            _ => {
                self.say(format_args!("listxattr of {ino}"));
                self.check_xattrs(ino);
            }
        }
    }

    fn set_xattr(&mut self, ino: Ino, name: &[u8], bad: Result<(), Errno>) {
        let flags = [0, 0, libc::XATTR_CREATE, libc::XATTR_REPLACE];
        let flags = *self.rng.pick(&flags);
        let len = match self.rng.below(30) {
            0 => XATTR_BYTES_MAX + 1,
            1 => self.rng.below(XATTR_BYTES_MAX + 1),
            _ => self.rng.below(200),
        };
        self.say(format_args!(
            "setxattr of {ino}: {len} bytes, flags {flags}"
        ));
        let value = self.rng.bytes(len as usize);
        let node = self.model.node(ino);
        let expected = match (node.xattrs.contains_key(name), flags) {
            _ if bad.is_err() => bad,
            _ if len > XATTR_BYTES_MAX => Err(Errno::TOOBIG),
            _ if node.flags & LOCKS != 0 => Err(Errno::PERM),
            (true, libc::XATTR_CREATE) => Err(Errno::EXIST),
            (false, libc::XATTR_REPLACE) => Err(Errno::NODATA),
            _ => Ok(()),
        };
        let found = self.fs.setxattr(ino, name, &value, flags, false);
        if self.agrees(&found, expected) {
            self.model.node(ino).xattrs.insert(name.to_vec(), value);
            self.model.touch(ino, false);
        }
    }

    pub(super) fn access_list(&mut self) {
        let ino = self.ino();
        let node = self.model.node(ino);
        if matches!(node.body, Body::Link(_)) {
            return;
        }
        let (is_dir, locked) = (node.is_dir(), node.check_flags(LOCKS));
        let name = *self.rng.pick(&[acl::ACCESS, acl::DEFAULT]);
        if self.rng.one_in(4) {
            self.say(format_args!("remove the access list of {ino}"));
            let found = self.fs.removexattr(ino, name);
            if self.agrees(&found, locked) && self.model.node(ino).xattrs.remove(name).is_some() {
                self.model.touch(ino, false);
            }
            return;
        }
        let mut list = List::random(&mut self.rng);
        let clear_sgid = name == acl::ACCESS && self.rng.one_in(4);
        let is_default = name == acl::DEFAULT;
        self.say(format_args!(
            "set the access list of {ino}, default: {is_default}, clear set-gid: {clear_sgid}"
        ));
        let expected = match locked {
            Ok(()) if is_default && !is_dir => Err(Errno::ACCES),
            locked => locked,
        };
        let found = self.fs.setxattr(ino, name, &list.encode(), 0, clear_sgid);
        if !self.agrees(&found, expected) {
            return;
        }
        self.model.touch(ino, false);
        let node = self.model.node(ino);
        if !is_default {
            node.mode = node.mode & !0o777 | list.bits();
        }
        if clear_sgid {
            node.mode &= !libc::S_ISGID;
        }
        if is_default || list.is_extended() {
            node.xattrs.insert(name.to_vec(), list.encode());
        } else {
            node.xattrs.remove(name);
        }
    }
}

fn shown(set: &SetAttr) -> String {
    let time = |time: Option<SetTime>| match time {
        Some(SetTime::At(time)) => format!("{}.{}", time.secs, time.nanos),
        Some(SetTime::Now) => "now".to_owned(),
        None => "-".to_owned(),
    };
    let mode = set.mode.map_or("-".to_owned(), |mode| format!("{mode:o}"));
    format!(
        "mode {mode}, owner {:?}, atime {}, mtime {}, kill set-ids: {}",
        set.uid,
        time(set.atime),
        time(set.mtime),
        set.kill_suidgid
    )
}
