//! Names: lookup, creation, links, renames and deletion.
//!
//! An entry stands twice: by name, for lookup, and by cookie, for listing (see
//! [`crate::listing`]). Cookies only grow within a directory, and a name keeps its cookie when it
//! comes to stand for something else. A directory's size is twice the bytes of its names: 0 means
//! empty.
//!
//! Order of locks: the gate, `rename` (a directory changes its parent), directories by number.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use crate::file::OpenFile;
use crate::filesystem::FileSystem;
use crate::flags;
use crate::inode::Inode;
use crate::listing::COOKIE_FIRST;
use crate::meta::records::{
    DentryRecord, InodeRecord, Orphan, dt_of_mode, encode_cookie_entry, ino_key, name_key, pair_key,
};
use crate::meta::store::Table;
use crate::{Attr, Cred, Errno, Ino, LINK_MAX, NAME_MAX, ROOT_INO, SYMLINK_MAX, Timestamp};

/// Most links of a directory: two, and one for each directory in it.
const DIR_LINK_MAX: u32 = i32::MAX as u32;

fn check_name(name: &[u8]) -> Result<(), Errno> {
    if name.len() > NAME_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

fn check_new_name(name: &[u8]) -> Result<(), Errno> {
    check_name(name)?;
    if name == b"." || name == b".." {
        Err(Errno::EXIST)
    } else {
        Ok(())
    }
}

/// What a new inode is to be.
struct NewNode<'a> {
    mode: u32,
    rdev: u32,
    target: Option<&'a [u8]>,
}

/// What RENAME_WHITEOUT leaves behind.
const WHITEOUT: NewNode<'static> = NewNode {
    mode: libc::S_IFCHR,
    rdev: 0,
    target: None,
};

/// Locks directories in the order of their numbers, each once.
fn lock_dirs<'a>(dirs: &mut Vec<&'a Arc<Inode>>) -> Vec<MutexGuard<'a, ()>> {
    dirs.sort_by_key(|dir| dir.ino);
    dirs.dedup_by_key(|dir| dir.ino);
    dirs.iter().map(|dir| dir.dir.lock()).collect()
}

impl FileSystem {
    fn entry(&self, dir: &Inode, name: &[u8]) -> Result<Option<DentryRecord>, Errno> {
        let key = name_key(dir.ino, name);
        let found = self.store.get(Table::Dentries, &key, |value| {
            value.map(DentryRecord::decode)
        })?;
        match found {
            Some(None) => {
                log::error!(
                    "directory {}: an entry is damaged; run 'braidfs fsck -n'",
                    dir.ino
                );
                Err(Errno::IO)
            }
            found => Ok(found.flatten()),
        }
    }

    fn insert_entry(&self, dir: &Arc<Inode>, name: &[u8], ino: Ino, kind: u8) {
        let cookie = {
            let mut state = dir.state.lock();
            let cookie = state.next_cookie;
            state.next_cookie += 1;
            cookie
        };
        self.add_entry(dir, name, &DentryRecord { ino, cookie, kind });
    }

    /// Adds a name at a place in the listing that is free.
    fn add_entry(&self, dir: &Arc<Inode>, name: &[u8], record: &DentryRecord) {
        dir.state.lock().attr.size += 2 * name.len() as u64;
        self.put_entry(dir, name, record);
    }

    /// Sets what a name stands for. The caller has counted the name.
    fn put_entry(&self, dir: &Arc<Inode>, name: &[u8], record: &DentryRecord) {
        self.store
            .put(Table::Dentries, &name_key(dir.ino, name), &record.encode());
        let entry = encode_cookie_entry(record.ino, record.kind, name);
        self.store
            .put(Table::Cookies, &pair_key(dir.ino, record.cookie), &entry);
        dir.touch_modified();
        self.mark_dirty(dir);
    }

    fn remove_entry(&self, dir: &Arc<Inode>, name: &[u8], record: &DentryRecord) {
        self.store
            .delete(Table::Cookies, &pair_key(dir.ino, record.cookie));
        self.remove_name(dir, name);
    }

    /// Removes a name whose place in the listing another one has now.
    fn remove_name(&self, dir: &Arc<Inode>, name: &[u8]) {
        self.store.delete(Table::Dentries, &name_key(dir.ino, name));
        {
            let mut state = dir.state.lock();
            state.attr.size = state.attr.size.saturating_sub(2 * name.len() as u64);
        }
        dir.touch_modified();
        self.mark_dirty(dir);
    }

    fn add_links(&self, inode: &Arc<Inode>, links: i32) {
        {
            let mut state = inode.state.lock();
            state.attr.nlink = state.attr.nlink.saturating_add_signed(links);
            state.attr.ctime = Timestamp::now();
        }
        self.mark_dirty(inode);
    }

    /// An inode lost its last name (a directory: was removed).
    fn make_orphan(&self, inode: &Arc<Inode>) {
        let mut state = inode.state.lock();
        state.attr.nlink = 0;
        state.attr.ctime = Timestamp::now();
        self.store.put(
            Table::Orphans,
            &ino_key(inode.ino),
            &Orphan::Delete.encode(),
        );
        drop(state);
        self.mark_dirty(inode);
    }

    /// Looks a name up and counts one more reference to the inode.
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr, Errno> {
        let dir = self.inode(parent)?;
        dir.check_dir()?;
        let ino = match name {
            b"." => parent,
            b".." => dir.state.lock().parent,
            name => {
                check_name(name)?;
                self.entry(&dir, name)?.ok_or(Errno::NOENT)?.ino
            }
        };
        self.lookup_ino(ino)
    }

    /// Counts one more reference to an inode.
    pub fn lookup_ino(&self, ino: Ino) -> Result<Attr, Errno> {
        let inode = self.inode(ino)?;
        inode.lookups.fetch_add(1, Ordering::SeqCst);
        Ok(inode.attr())
    }

    /// Takes `count` references back.
    pub fn forget(&self, ino: Ino, count: u64) {
        let Some(inode) = self.inodes.get(ino) else {
            return;
        };
        let before = inode
            .lookups
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| {
                Some(n.saturating_sub(count))
            })
            .unwrap_or(0);
        if before <= count {
            self.maybe_reclaim(&inode);
            drop(inode);
            self.inodes.try_evict(ino);
        }
    }

    fn make(
        &self,
        parent: Ino,
        name: &[u8],
        node: &NewNode<'_>,
        cred: &Cred,
    ) -> Result<Arc<Inode>, Errno> {
        check_new_name(name)?;
        self.check_writable()?;
        self.check_meta_room()?;
        self.balance_group()?;
        let dir = self.inode(parent)?;
        dir.check_dir()?;
        let inode = {
            let _pass = self.gate.enter();
            let _dir = dir.dir.lock();
            let dir_attr = dir.state.lock().attr;
            if dir_attr.nlink == 0 {
                return Err(Errno::NOENT);
            }
            if self.entry(&dir, name)?.is_some() {
                return Err(Errno::EXIST);
            }
            flags::check_grow(&dir_attr)?;
            let is_dir = node.mode & libc::S_IFMT == libc::S_IFDIR;
            if is_dir && dir_attr.nlink >= DIR_LINK_MAX {
                return Err(Errno::MLINK);
            }
            let inode = self.new_inode(&dir, node, cred)?;
            self.insert_entry(&dir, name, inode.ino, dt_of_mode(node.mode));
            if is_dir {
                self.add_links(&dir, 1);
            }
            inode.lookups.fetch_add(1, Ordering::SeqCst);
            inode
        };
        self.end_counted(&[&dir], inode)
    }

    /// After an operation that counted a reference to `inode`: durable where that was asked for.
    fn end_counted(&self, dirs: &[&Arc<Inode>], inode: Arc<Inode>) -> Result<Arc<Inode>, Errno> {
        if let Err(error) = self.end_names(dirs) {
            self.forget(inode.ino, 1);
            return Err(error);
        }
        Ok(inode)
    }

    /// Makes an inode with one link (a directory: two), but no entry. The caller holds a pass and
    /// the lock of the directory that it is for.
    fn new_inode(
        &self,
        dir: &Arc<Inode>,
        node: &NewNode<'_>,
        cred: &Cred,
    ) -> Result<Arc<Inode>, Errno> {
        let dir_attr = dir.state.lock().attr;
        let is_dir = node.mode & libc::S_IFMT == libc::S_IFDIR;
        let inherits = dir_attr.mode & libc::S_ISGID != 0;
        let mut mode = node.mode;
        if inherits && is_dir {
            mode |= libc::S_ISGID;
        }
        let now = Timestamp::now();
        let ino = self.next_ino.fetch_add(1, Ordering::SeqCst);
        let mode = self.inherit_acl(dir, ino, mode, cred.umask)?;
        let attr = Attr {
            ino,
            size: node.target.map_or(0, |target| target.len() as u64),
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            mode,
            nlink: if is_dir { 2 } else { 1 },
            uid: cred.uid,
            gid: if inherits { dir_attr.gid } else { cred.gid },
            rdev: node.rdev,
            flags: flags::inherited(dir_attr.flags, mode),
            generation: 1,
        };
        let inode = Inode::new(InodeRecord {
            attr,
            next_cookie: COOKIE_FIRST,
            parent: dir.ino,
        });
        inode.no_capabilities.store(true, Ordering::SeqCst);
        if let Some(target) = node.target {
            self.store.put(Table::Xattrs, &name_key(ino, b""), target);
        }
        self.inodes.insert(&inode);
        self.inode_count.fetch_add(1, Ordering::SeqCst);
        self.mark_dirty(&inode);
        Ok(inode)
    }

    /// Makes a regular file, device node, FIFO or socket. Counts a reference.
    pub fn mknod(
        &self,
        parent: Ino,
        name: &[u8],
        mode: u32,
        rdev: u32,
        cred: &Cred,
    ) -> Result<Attr, Errno> {
        let mode = if mode & libc::S_IFMT == 0 {
            mode | libc::S_IFREG
        } else {
            mode
        };
        match mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => {}
            _ => return Err(Errno::INVAL),
        }
        let node = NewNode {
            mode,
            rdev,
            target: None,
        };
        Ok(self.make(parent, name, &node, cred)?.attr())
    }

    /// Makes a directory. Counts a reference.
    pub fn mkdir(&self, parent: Ino, name: &[u8], mode: u32, cred: &Cred) -> Result<Attr, Errno> {
        let mode = mode & !libc::S_IFMT | libc::S_IFDIR;
        let node = NewNode {
            mode,
            rdev: 0,
            target: None,
        };
        Ok(self.make(parent, name, &node, cred)?.attr())
    }

    /// Makes a regular file and opens it. Counts a reference.
    pub fn create(
        &self,
        parent: Ino,
        name: &[u8],
        mode: u32,
        flags: i32,
        cred: &Cred,
    ) -> Result<(Attr, Arc<OpenFile>), Errno> {
        let mode = mode & !libc::S_IFMT | libc::S_IFREG;
        let inode = self.make(
            parent,
            name,
            &NewNode {
                mode,
                rdev: 0,
                target: None,
            },
            cred,
        )?;
        Ok((inode.attr(), self.open_inode(&inode, flags)))
    }

    /// Makes a regular file without a name and opens it. [`FileSystem::link`] may give it its first
    /// name, unless `flags` has O_EXCL; without one it goes with its last user, or with a crash.
    /// Counts a reference.
    pub fn tmpfile(
        &self,
        parent: Ino,
        mode: u32,
        flags: i32,
        cred: &Cred,
    ) -> Result<(Attr, Arc<OpenFile>), Errno> {
        self.check_writable()?;
        self.check_meta_room()?;
        self.balance_group()?;
        let dir = self.inode(parent)?;
        dir.check_dir()?;
        let _pass = self.gate.enter();
        let _dir = dir.dir.lock();
        let dir_attr = dir.state.lock().attr;
        if dir_attr.nlink == 0 {
            return Err(Errno::NOENT);
        }
        flags::check_grow(&dir_attr)?;
        let node = NewNode {
            mode: mode & !libc::S_IFMT | libc::S_IFREG,
            rdev: 0,
            target: None,
        };
        let inode = self.new_inode(&dir, &node, cred)?;
        inode.lookups.fetch_add(1, Ordering::SeqCst);
        inode
            .linkable
            .store(flags & libc::O_EXCL == 0, Ordering::SeqCst);
        self.make_orphan(&inode);
        Ok((inode.attr(), self.open_inode(&inode, flags)))
    }

    /// Makes a symbolic link. Counts a reference.
    pub fn symlink(
        &self,
        parent: Ino,
        name: &[u8],
        target: &[u8],
        cred: &Cred,
    ) -> Result<Attr, Errno> {
        if target.is_empty() {
            return Err(Errno::NOENT);
        }
        if target.len() > SYMLINK_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let node = NewNode {
            mode: libc::S_IFLNK | 0o777,
            rdev: 0,
            target: Some(target),
        };
        Ok(self.make(parent, name, &node, cred)?.attr())
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, ino: Ino) -> Result<Vec<u8>, Errno> {
        let inode = self.inode(ino)?;
        let attr = inode.state.lock().attr;
        if attr.mode & libc::S_IFMT != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        self.touch_accessed(&inode, &attr);
        self.store
            .get(Table::Xattrs, &name_key(ino, b""), |value| {
                value.map(<[u8]>::to_vec)
            })?
            .ok_or(Errno::IO)
    }

    /// Gives an inode one more name. Counts a reference.
    pub fn link(&self, ino: Ino, parent: Ino, name: &[u8]) -> Result<Attr, Errno> {
        check_new_name(name)?;
        self.check_writable()?;
        self.check_meta_room()?;
        self.balance_group()?;
        let inode = self.inode(ino)?;
        let dir = self.inode(parent)?;
        dir.check_dir()?;
        let pass = self.gate.enter();
        let locked = dir.dir.lock();
        let attr = inode.state.lock().attr;
        if attr.is_dir() {
            return Err(Errno::PERM);
        }
        let gone = attr.nlink == 0 && !inode.linkable.load(Ordering::SeqCst);
        let dir_attr = dir.state.lock().attr;
        if gone || dir_attr.nlink == 0 {
            return Err(Errno::NOENT);
        }
        if self.entry(&dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        flags::check_grow(&dir_attr)?;
        self.add_name(&inode)?;
        self.insert_entry(&dir, name, ino, dt_of_mode(attr.mode));
        inode.lookups.fetch_add(1, Ordering::SeqCst);
        drop((locked, pass));
        Ok(self.end_counted(&[&dir], inode)?.attr())
    }

    /// Counts one more name of `inode`. Its other names are in directories that may not be locked,
    /// so this is decided and done in one step. The caller holds a pass.
    fn add_name(&self, inode: &Arc<Inode>) -> Result<(), Errno> {
        {
            let mut state = inode.state.lock();
            flags::check_change(&state.attr)?;
            if state.attr.nlink >= LINK_MAX {
                return Err(Errno::MLINK);
            }
            if state.attr.nlink == 0 {
                // A file that was made without a name has one chance; a deleted one has none.
                if !inode.linkable.swap(false, Ordering::SeqCst) {
                    return Err(Errno::NOENT);
                }
                let key = ino_key(inode.ino);
                match inode.truncating.load(Ordering::SeqCst) {
                    u64::MAX => self.store.delete(Table::Orphans, &key),
                    goal => {
                        let row = Orphan::Truncate(goal).encode();
                        self.store.put(Table::Orphans, &key, &row);
                    }
                }
            }
            state.attr.nlink += 1;
            state.attr.ctime = Timestamp::now();
        }
        self.mark_dirty(inode);
        Ok(())
    }

    /// One name of `inode` is gone.
    fn drop_link(&self, inode: &Arc<Inode>) {
        let left = {
            let mut state = inode.state.lock();
            state.attr.nlink = state.attr.nlink.saturating_sub(1);
            state.attr.ctime = Timestamp::now();
            state.attr.nlink
        };
        self.mark_dirty(inode);
        if left == 0 {
            self.make_orphan(inode);
        }
    }

    /// Removes a name of something that is no directory.
    pub fn unlink(&self, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        check_name(name)?;
        self.check_writable()?;
        self.balance_group()?;
        let dir = self.inode(parent)?;
        dir.check_dir()?;
        let inode = {
            let _pass = self.gate.enter();
            let _dir = dir.dir.lock();
            let record = self.entry(&dir, name)?.ok_or(Errno::NOENT)?;
            let inode = self.inode(record.ino)?;
            flags::check_removal(&dir, &inode)?;
            if inode.state.lock().attr.is_dir() {
                return Err(Errno::ISDIR);
            }
            self.remove_entry(&dir, name, &record);
            self.drop_link(&inode);
            inode
        };
        self.maybe_reclaim(&inode);
        self.end_names(&[&dir])
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<(), Errno> {
        match name {
            b"." => return Err(Errno::INVAL),
            b".." => return Err(Errno::NOTEMPTY),
            name => check_name(name)?,
        }
        self.check_writable()?;
        self.balance_group()?;
        let dir = self.inode(parent)?;
        dir.check_dir()?;
        let pass = self.gate.enter();
        loop {
            let record = self.entry(&dir, name)?.ok_or(Errno::NOENT)?;
            let inode = self.inode(record.ino)?;
            flags::check_removal(&dir, &inode)?;
            inode.check_dir()?;
            let mut dirs = vec![&dir, &inode];
            let locks = lock_dirs(&mut dirs);
            if self.entry(&dir, name)? != Some(record) {
                continue;
            }
            if inode.state.lock().attr.size != 0 {
                return Err(Errno::NOTEMPTY);
            }
            self.remove_entry(&dir, name, &record);
            self.add_links(&dir, -1);
            self.make_orphan(&inode);
            drop((locks, pass));
            self.maybe_reclaim(&inode);
            return self.end_names(&[&dir]);
        }
    }

    /// Whether `ancestor` is `dir` or above it. The caller holds `rename`.
    fn is_ancestor(&self, ancestor: Ino, dir: &Arc<Inode>) -> Result<bool, Errno> {
        let mut at = dir.ino;
        for _ in 0..=self.inode_count.load(Ordering::SeqCst) {
            if at == ancestor {
                return Ok(true);
            }
            if at == ROOT_INO {
                return Ok(false);
            }
            at = self.inode(at)?.state.lock().parent;
        }
        log::error!(
            "directory {} does not lead to the root; run 'braidfs fsck -n'",
            dir.ino
        );
        Err(Errno::IO)
    }

    /// Renames. `flags`: RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT.
    pub fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: u32,
        cred: &Cred,
    ) -> Result<(), Errno> {
        check_name(name)?;
        check_name(new_name)?;
        const KNOWN: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        if flags & !KNOWN != 0 || exchange && flags != libc::RENAME_EXCHANGE {
            return Err(Errno::INVAL);
        }
        self.check_writable()?;
        self.check_meta_room()?;
        self.balance_group()?;
        let from = self.inode(parent)?;
        let to = self.inode(new_parent)?;
        from.check_dir()?;
        to.check_dir()?;
        let pass = self.gate.enter();
        let rename = (parent != new_parent).then(|| self.rename.lock());
        loop {
            let source = self.entry(&from, name)?.ok_or(Errno::NOENT)?;
            let target = self.entry(&to, new_name)?;
            let moved = self.inode(source.ino)?;
            let replaced = target.map(|target| self.inode(target.ino)).transpose()?;
            let mut dirs = vec![&from, &to];
            dirs.extend(replaced.as_ref().filter(|inode| inode.check_dir().is_ok()));
            let locks = lock_dirs(&mut dirs);
            if self.entry(&from, name)? != Some(source) || self.entry(&to, new_name)? != target {
                continue;
            }
            let plan = Rename {
                from: &from,
                name,
                source,
                moved: &moved,
                to: &to,
                new_name,
                replaced: target.zip(replaced.as_ref()),
            };
            if !self.check_rename(&plan, flags)? {
                return Ok(());
            }
            if exchange {
                self.exchange(&plan);
            } else {
                let whiteout = (flags & libc::RENAME_WHITEOUT != 0)
                    .then(|| self.new_inode(&from, &WHITEOUT, cred))
                    .transpose()?;
                self.replace(&plan, whiteout.as_deref());
            }
            drop((locks, rename, pass));
            if let Some(replaced) = &replaced {
                self.maybe_reclaim(replaced);
            }
            return self.end_names(&[&from, &to]);
        }
    }

    /// Whether there is anything to do: two names of one inode stay as they are.
    fn check_rename(&self, plan: &Rename<'_>, flags: u32) -> Result<bool, Errno> {
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let moved_is_dir = plan.moved.check_dir().is_ok();
        let crosses = plan.from.ino != plan.to.ino;
        let to_attr = plan.to.state.lock().attr;
        if to_attr.nlink == 0 {
            return Err(Errno::NOENT);
        }
        if moved_is_dir && crosses && self.is_ancestor(plan.moved.ino, plan.to)? {
            return Err(Errno::INVAL);
        }
        let is_full = to_attr.nlink >= DIR_LINK_MAX;
        let Some((_, replaced)) = plan.replaced else {
            if exchange {
                return Err(Errno::NOENT);
            }
            flags::check_removal(plan.from, plan.moved)?;
            flags::check_grow(&to_attr)?;
            return if moved_is_dir && crosses && is_full {
                Err(Errno::MLINK)
            } else {
                Ok(true)
            };
        };
        if flags & libc::RENAME_NOREPLACE != 0 {
            return Err(Errno::EXIST);
        }
        let replaced_attr = replaced.state.lock().attr;
        let replaced_is_dir = replaced_attr.is_dir();
        if exchange && replaced_is_dir && crosses && self.is_ancestor(replaced.ino, plan.from)? {
            return Err(Errno::INVAL);
        }
        if Arc::ptr_eq(replaced, plan.moved) {
            return Ok(false);
        }
        flags::check_removal(plan.from, plan.moved)?;
        flags::check_removal(plan.to, replaced)?;
        match (moved_is_dir, replaced_is_dir) {
            (true, false) if exchange && crosses && is_full => Err(Errno::MLINK),
            _ if exchange => Ok(true),
            (true, false) => Err(Errno::NOTDIR),
            (false, true) => Err(Errno::ISDIR),
            (true, true) if replaced_attr.size != 0 => Err(Errno::NOTEMPTY),
            _ => Ok(true),
        }
    }

    /// A directory has a new parent.
    fn reparent(&self, inode: &Arc<Inode>, from: &Arc<Inode>, to: &Arc<Inode>) {
        if from.ino != to.ino && inode.check_dir().is_ok() {
            inode.state.lock().parent = to.ino;
            self.add_links(from, -1);
            self.add_links(to, 1);
        }
    }

    /// `whiteout`: what the old name is to stand for afterwards.
    fn replace(&self, plan: &Rename<'_>, whiteout: Option<&Inode>) {
        let Rename { from, to, .. } = plan;
        let keeps_place = from.ino == to.ino && plan.replaced.is_none() && whiteout.is_none();
        match plan.replaced {
            Some((target, replaced)) => {
                self.put_entry(to, plan.new_name, &target.naming(&plan.source));
                if replaced.check_dir().is_ok() {
                    self.add_links(to, -1);
                    self.make_orphan(replaced);
                } else {
                    self.drop_link(replaced);
                }
            }
            // Whoever renames what a listing gives him must not be given it again and again.
            None if keeps_place => self.add_entry(to, plan.new_name, &plan.source),
            None => self.insert_entry(to, plan.new_name, plan.source.ino, plan.source.kind),
        }
        match whiteout {
            Some(whiteout) => {
                let record = DentryRecord {
                    ino: whiteout.ino,
                    kind: dt_of_mode(WHITEOUT.mode),
                    cookie: plan.source.cookie,
                };
                self.put_entry(from, plan.name, &record);
            }
            None if keeps_place => self.remove_name(from, plan.name),
            None => self.remove_entry(from, plan.name, &plan.source),
        }
        self.reparent(plan.moved, from, to);
        plan.moved.touch_changed();
        self.mark_dirty(plan.moved);
    }

    fn exchange(&self, plan: &Rename<'_>) {
        let Some((target, other)) = plan.replaced else {
            return;
        };
        let source = plan.source;
        self.put_entry(plan.from, plan.name, &source.naming(&target));
        self.put_entry(plan.to, plan.new_name, &target.naming(&source));
        self.reparent(plan.moved, plan.from, plan.to);
        self.reparent(other, plan.to, plan.from);
        for inode in [plan.moved, other] {
            inode.touch_changed();
            self.mark_dirty(inode);
        }
    }
}

/// A rename, looked up and locked.
struct Rename<'a> {
    from: &'a Arc<Inode>,
    name: &'a [u8],
    source: DentryRecord,
    moved: &'a Arc<Inode>,
    to: &'a Arc<Inode>,
    new_name: &'a [u8],
    replaced: Option<(DentryRecord, &'a Arc<Inode>)>,
}
