//! Extended attributes: one row each. (The row with the empty name is a symbolic link's target.)

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::acl::{self, Acl};
use crate::filesystem::FileSystem;
use crate::flags;
use crate::inode::Inode;
use crate::meta::records::{ino_key, name_key};
use crate::meta::store::Table;
use crate::{Errno, Ino, NAME_MAX, XATTR_SIZE_MAX};

/// Capabilities that a program file gives to whoever runs it.
const CAPABILITIES: &[u8] = b"security.capability";

/// Prefixes of names that may be followed by anything. Who may use them is the kernel's business.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

pub(crate) fn check_xattr_name(name: &[u8]) -> Result<(), Errno> {
    match name.len() {
        0 => return Err(Errno::INVAL),
        len if len > NAME_MAX => return Err(Errno::RANGE),
        _ => {}
    }
    if is_acl(name) {
        return Ok(());
    }
    let prefix = NAMESPACES.iter().find(|&&prefix| name.starts_with(prefix));
    match prefix {
        None => Err(Errno::NOTSUP),
        Some(prefix) if prefix.len() == name.len() => Err(Errno::INVAL),
        Some(_) => Ok(()),
    }
}

pub(crate) fn is_acl(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}

impl FileSystem {
    /// Sets an attribute. `flags`: XATTR_CREATE, XATTR_REPLACE. `clear_sgid`: drop the
    /// set-group-id bit as well, as the kernel asks when an ACL changes.
    pub fn setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        flags: i32,
        clear_sgid: bool,
    ) -> Result<(), Errno> {
        check_xattr_name(name)?;
        if value.len() > XATTR_SIZE_MAX {
            return Err(Errno::TOOBIG);
        }
        self.check_writable()?;
        self.check_meta_room()?;
        self.balance_group()?;
        let inode = self.inode(ino)?;
        flags::check_change(&inode.state.lock().attr)?;
        let key = name_key(ino, name);
        let pass = self.gate.enter();
        let map = inode.map.write();
        let exists = self
            .store
            .get(Table::Xattrs, &key, |value| value.is_some())?;
        if exists && flags & libc::XATTR_CREATE != 0 {
            return Err(Errno::EXIST);
        }
        if !exists && flags & libc::XATTR_REPLACE != 0 {
            return Err(Errno::NODATA);
        }
        match name {
            acl::ACCESS => self.set_access_acl(&inode, value)?,
            acl::DEFAULT => self.set_default_acl(&inode, value)?,
            _ => self.store.put(Table::Xattrs, &key, value),
        }
        if name == CAPABILITIES {
            inode.no_capabilities.store(false, Ordering::SeqCst);
        }
        if clear_sgid {
            inode.state.lock().attr.mode &= !libc::S_ISGID;
        }
        inode.touch_changed();
        self.mark_dirty(&inode);
        drop((map, pass));
        self.end_change(&inode)
    }

    fn put_acl(&self, ino: Ino, name: &[u8], acl: Option<&Acl>) {
        let key = name_key(ino, name);
        match acl {
            Some(acl) => self.store.put(Table::Xattrs, &key, &acl.encode()),
            None => self.store.delete(Table::Xattrs, &key),
        }
    }

    fn set_access_acl(&self, inode: &Inode, value: &[u8]) -> Result<(), Errno> {
        let acl = Acl::decode(value)?;
        if let Some(acl) = &acl {
            let mut state = inode.state.lock();
            state.attr.mode = acl.mode(state.attr.mode);
        }
        self.put_acl(
            inode.ino,
            acl::ACCESS,
            acl.as_ref().filter(|acl| !acl.is_mode_only()),
        );
        Ok(())
    }

    fn set_default_acl(&self, inode: &Inode, value: &[u8]) -> Result<(), Errno> {
        let acl = Acl::decode(value)?;
        if acl.is_some() && inode.check_dir().is_err() {
            return Err(Errno::ACCES);
        }
        self.put_acl(inode.ino, acl::DEFAULT, acl.as_ref());
        Ok(())
    }

    fn acl(&self, ino: Ino, name: &[u8]) -> Result<Option<Acl>, Errno> {
        let key = name_key(ino, name);
        let found = self
            .store
            .get(Table::Xattrs, &key, |value| value.map(Acl::decode))?;
        found.transpose().map(Option::flatten)
    }

    /// After chmod: a stored access list follows the mode. The caller holds a pass.
    pub(crate) fn acl_follow_mode(&self, ino: Ino, mode: u32) -> Result<(), Errno> {
        if let Some(mut acl) = self.acl(ino, acl::ACCESS)? {
            acl.set_mode(mode);
            self.put_acl(ino, acl::ACCESS, Some(&acl));
        }
        Ok(())
    }

    /// What a new inode inherits: its mode. A default list takes the place of the umask. The
    /// caller holds a pass.
    pub(crate) fn inherit_acl(
        &self,
        dir: &Arc<Inode>,
        ino: Ino,
        mode: u32,
        umask: u32,
    ) -> Result<u32, Errno> {
        if mode & libc::S_IFMT == libc::S_IFLNK {
            return Ok(mode);
        }
        let Some(default) = self.acl(dir.ino, acl::DEFAULT)? else {
            return Ok(mode & !(umask & 0o777));
        };
        if mode & libc::S_IFMT == libc::S_IFDIR {
            self.put_acl(ino, acl::DEFAULT, Some(&default));
        }
        let acl = default.inherited(mode);
        self.put_acl(
            ino,
            acl::ACCESS,
            Some(&acl).filter(|acl| !acl.is_mode_only()),
        );
        Ok(acl.mode(mode))
    }

    /// The value of an attribute.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>, Errno> {
        check_xattr_name(name)?;
        self.store
            .get(Table::Xattrs, &name_key(ino, name), |value| {
                value.map(<[u8]>::to_vec)
            })?
            .ok_or(Errno::NODATA)
    }

    /// The names of all attributes, each ended by a zero byte.
    pub fn listxattr(&self, ino: Ino) -> Result<Vec<u8>, Errno> {
        let next = ino.checked_add(1).ok_or(Errno::NOENT)?;
        let mut names = Vec::new();
        self.store.scan(
            Table::Xattrs,
            &ino_key(ino),
            &ino_key(next),
            &mut |key, _| {
                if let Some(name) = key.get(8..).filter(|name| !name.is_empty()) {
                    names.extend_from_slice(name);
                    names.push(0);
                }
                true
            },
        )?;
        Ok(names)
    }

    /// Removes an attribute.
    pub fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<(), Errno> {
        check_xattr_name(name)?;
        self.check_writable()?;
        self.balance_group()?;
        let inode = self.inode(ino)?;
        flags::check_change(&inode.state.lock().attr)?;
        let key = name_key(ino, name);
        let pass = self.gate.enter();
        let map = inode.map.write();
        if !self
            .store
            .get(Table::Xattrs, &key, |value| value.is_some())?
        {
            // No list is what was asked for.
            return if is_acl(name) {
                Ok(())
            } else {
                Err(Errno::NODATA)
            };
        }
        self.store.delete(Table::Xattrs, &key);
        inode.touch_changed();
        self.mark_dirty(&inode);
        drop((map, pass));
        self.end_change(&inode)
    }

    /// Takes file capabilities away: the content or the owner changed, so whoever granted them did
    /// not grant them to this. The kernel leaves that to us (HANDLE_KILLPRIV_V2). The caller holds
    /// a pass, and marks the inode dirty.
    pub(crate) fn drop_capabilities(&self, inode: &Inode) {
        if inode.no_capabilities.load(Ordering::SeqCst) {
            return;
        }
        let key = name_key(inode.ino, CAPABILITIES);
        let _map = inode.map.write();
        let found = self.store.get(Table::Xattrs, &key, |value| value.is_some());
        // What cannot be read goes, too.
        if found.unwrap_or(true) {
            self.store.delete(Table::Xattrs, &key);
            inode.touch_changed();
        }
        inode.no_capabilities.store(true, Ordering::SeqCst);
    }
}
