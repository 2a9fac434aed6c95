//! Names: lookup, creation, links, renames, deletion and listing.
//!
//! An entry stands twice: by name, for lookup, and by cookie, for listing. Cookies only grow
//! within a directory, so a listing that others change meanwhile neither repeats nor skips the
//! entries that stay. A directory's size is twice the bytes of its names: 0 means empty.
//!
//! Order of locks: the gate, `rename` (a directory changes its parent), directories by number.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use crate::file::OpenFile;
use crate::filesystem::FileSystem;
use crate::inode::Inode;
use crate::meta::records::{
    DentryRecord, InodeRecord, Orphan, decode_cookie_entry, dt_of_mode, encode_cookie_entry,
    ino_key, key_u64, name_key, pair_key,
};
use crate::meta::store::Table;
use crate::{
    Attr, Cred, DirEntry, Errno, Ino, LINK_MAX, NAME_MAX, ROOT_INO, SYMLINK_MAX, Timestamp,
};

const COOKIE_DOT: u64 = 1;
const COOKIE_DOTDOT: u64 = 2;

/// The first entry of a directory has this cookie; "." and ".." stand before it.
pub(crate) const COOKIE_FIRST: u64 = 3;

/// Entries that one step of a listing fetches.
const LIST_BATCH: usize = 128;

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
            state.attr.size += 2 * name.len() as u64;
            cookie
        };
        let record = DentryRecord { ino, cookie, kind };
        self.store
            .put(Table::Dentries, &name_key(dir.ino, name), &record.encode());
        let entry = encode_cookie_entry(ino, kind, name);
        self.store
            .put(Table::Cookies, &pair_key(dir.ino, cookie), &entry);
        dir.touch_modified();
        self.mark_dirty(dir);
    }

    fn remove_entry(&self, dir: &Arc<Inode>, name: &[u8], record: &DentryRecord) {
        self.store.delete(Table::Dentries, &name_key(dir.ino, name));
        self.store
            .delete(Table::Cookies, &pair_key(dir.ino, record.cookie));
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
        inode.state.lock().attr.nlink = 0;
        self.store.put(
            Table::Orphans,
            &ino_key(inode.ino),
            &Orphan::Delete.encode(),
        );
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
        let _pass = self.gate.enter();
        let _dir = dir.dir.lock();
        let inode = self.make_locked(&dir, name, node, cred)?;
        inode.lookups.fetch_add(1, Ordering::SeqCst);
        Ok(inode)
    }

    /// Makes an inode and its entry. The caller holds a pass and the directory's lock.
    fn make_locked(
        &self,
        dir: &Arc<Inode>,
        name: &[u8],
        node: &NewNode<'_>,
        cred: &Cred,
    ) -> Result<Arc<Inode>, Errno> {
        let dir_attr = dir.state.lock().attr;
        if dir_attr.nlink == 0 {
            return Err(Errno::NOENT);
        }
        if self.entry(dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
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
            flags: 0,
            generation: 1,
        };
        let inode = Inode::new(InodeRecord {
            attr,
            next_cookie: COOKIE_FIRST,
            parent: dir.ino,
        });
        if let Some(target) = node.target {
            self.store.put(Table::Xattrs, &name_key(ino, b""), target);
        }
        self.inodes.insert(&inode);
        self.inode_count.fetch_add(1, Ordering::SeqCst);
        self.insert_entry(dir, name, ino, dt_of_mode(mode));
        if is_dir {
            self.add_links(dir, 1);
        }
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
        if inode.state.lock().attr.mode & libc::S_IFMT != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
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
        let _pass = self.gate.enter();
        let _dir = dir.dir.lock();
        let attr = inode.state.lock().attr;
        if attr.is_dir() {
            return Err(Errno::PERM);
        }
        if attr.nlink == 0 || dir.state.lock().attr.nlink == 0 {
            return Err(Errno::NOENT);
        }
        if attr.nlink >= LINK_MAX {
            return Err(Errno::MLINK);
        }
        if self.entry(&dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        {
            // Its other names are in directories that may not be locked: count before there is one
            // more, and not from 0.
            let mut state = inode.state.lock();
            if state.attr.nlink == 0 {
                return Err(Errno::NOENT);
            }
            state.attr.nlink += 1;
            state.attr.ctime = Timestamp::now();
        }
        self.mark_dirty(&inode);
        self.insert_entry(&dir, name, ino, dt_of_mode(attr.mode));
        inode.lookups.fetch_add(1, Ordering::SeqCst);
        Ok(inode.attr())
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
            if inode.state.lock().attr.is_dir() {
                return Err(Errno::ISDIR);
            }
            self.remove_entry(&dir, name, &record);
            self.drop_link(&inode);
            inode
        };
        self.maybe_reclaim(&inode);
        Ok(())
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
        let _pass = self.gate.enter();
        loop {
            let record = self.entry(&dir, name)?.ok_or(Errno::NOENT)?;
            let inode = self.inode(record.ino)?;
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
            drop(locks);
            self.maybe_reclaim(&inode);
            return Ok(());
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
        let _pass = self.gate.enter();
        let _rename = (parent != new_parent).then(|| self.rename.lock());
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
            self.check_rename(&plan, flags)?;
            if replaced
                .as_ref()
                .is_some_and(|replaced| Arc::ptr_eq(replaced, &moved))
            {
                return Ok(());
            }
            if exchange {
                self.exchange(&plan);
            } else {
                self.replace(&plan);
            }
            if flags & libc::RENAME_WHITEOUT != 0 {
                let node = NewNode {
                    mode: libc::S_IFCHR,
                    rdev: 0,
                    target: None,
                };
                self.make_locked(&from, name, &node, cred)?;
            }
            drop(locks);
            if let Some(replaced) = &replaced {
                self.maybe_reclaim(replaced);
            }
            return Ok(());
        }
    }

    fn check_rename(&self, plan: &Rename<'_>, flags: u32) -> Result<(), Errno> {
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let moved_is_dir = plan.moved.check_dir().is_ok();
        let crosses = plan.from.ino != plan.to.ino;
        if plan.to.state.lock().attr.nlink == 0 {
            return Err(Errno::NOENT);
        }
        if moved_is_dir && crosses && self.is_ancestor(plan.moved.ino, plan.to)? {
            return Err(Errno::INVAL);
        }
        let Some((_, replaced)) = plan.replaced else {
            return if exchange { Err(Errno::NOENT) } else { Ok(()) };
        };
        if flags & libc::RENAME_NOREPLACE != 0 {
            return Err(Errno::EXIST);
        }
        let replaced_attr = replaced.state.lock().attr;
        if exchange {
            let loops =
                replaced_attr.is_dir() && crosses && self.is_ancestor(replaced.ino, plan.from)?;
            return if loops { Err(Errno::INVAL) } else { Ok(()) };
        }
        match (moved_is_dir, replaced_attr.is_dir()) {
            (true, false) => Err(Errno::NOTDIR),
            (false, true) => Err(Errno::ISDIR),
            (true, true) if replaced_attr.size != 0 => Err(Errno::NOTEMPTY),
            _ => Ok(()),
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

    fn replace(&self, plan: &Rename<'_>) {
        let kind = plan.source.kind;
        if let Some((target, replaced)) = plan.replaced {
            self.remove_entry(plan.to, plan.new_name, &target);
            if replaced.check_dir().is_ok() {
                self.add_links(plan.to, -1);
                self.make_orphan(replaced);
            } else {
                self.drop_link(replaced);
            }
        }
        self.remove_entry(plan.from, plan.name, &plan.source);
        self.insert_entry(plan.to, plan.new_name, plan.moved.ino, kind);
        self.reparent(plan.moved, plan.from, plan.to);
        plan.moved.touch_changed();
        self.mark_dirty(plan.moved);
    }

    fn exchange(&self, plan: &Rename<'_>) {
        let Some((target, other)) = plan.replaced else {
            return;
        };
        self.remove_entry(plan.from, plan.name, &plan.source);
        self.remove_entry(plan.to, plan.new_name, &target);
        self.insert_entry(plan.from, plan.name, other.ino, target.kind);
        self.insert_entry(plan.to, plan.new_name, plan.moved.ino, plan.source.kind);
        self.reparent(plan.moved, plan.from, plan.to);
        self.reparent(other, plan.to, plan.from);
        for inode in [plan.moved, other] {
            inode.touch_changed();
            self.mark_dirty(inode);
        }
    }

    /// Calls `each` for the entries after `after_cookie` (0: from the start, with "." and "..")
    /// until it returns false.
    pub fn readdir(
        &self,
        ino: Ino,
        after_cookie: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        let dir = self.inode(ino)?;
        dir.check_dir()?;
        let parent = dir.state.lock().parent;
        let dots: [(u64, Ino, &[u8]); 2] =
            [(COOKIE_DOT, ino, b"."), (COOKIE_DOTDOT, parent, b"..")];
        for (cookie, ino, name) in dots {
            let entry = DirEntry {
                ino,
                kind: libc::DT_DIR,
                name,
                cookie,
            };
            if after_cookie < cookie && !each(entry) {
                return Ok(());
            }
        }
        let mut next = after_cookie.max(COOKIE_DOTDOT).saturating_add(1);
        loop {
            let mut batch: Vec<(u64, Vec<u8>)> = Vec::with_capacity(LIST_BATCH);
            let (from, to) = (pair_key(ino, next), ino_key(ino + 1));
            self.store
                .scan(Table::Cookies, &from, &to, &mut |key, value| {
                    batch.push((key_u64(key, 8).unwrap_or(u64::MAX), value.to_vec()));
                    batch.len() < LIST_BATCH
                })?;
            for (cookie, value) in &batch {
                let Some((ino, kind, name)) = decode_cookie_entry(value) else {
                    log::error!("directory {ino}: an entry is damaged; run 'braidfs fsck -n'");
                    return Err(Errno::IO);
                };
                if !each(DirEntry {
                    ino,
                    kind,
                    name,
                    cookie: *cookie,
                }) {
                    return Ok(());
                }
            }
            match batch.last() {
                Some((cookie, _)) if batch.len() == LIST_BATCH => next = cookie.saturating_add(1),
                _ => return Ok(()),
            }
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
