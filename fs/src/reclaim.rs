//! Deletion: what happens to an inode that has no name and no user any more.
//!
//! An inode that loses its last name enters the orphan table in the same transaction group. When
//! the last user lets go, a thread of its own removes blocks, attributes and record in bounded
//! steps. A crash in between leaves the orphan row, and the next mount goes on from there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use braidfs_blockdev::BLOCK_SIZE;
use parking_lot::{Condvar, Mutex};

use crate::filesystem::FileSystem;
use crate::inode::Inode;
use crate::meta::records::{Orphan, ino_key, key_u64};
use crate::meta::store::Table;
use crate::{Errno, Ino};

#[derive(Default)]
struct State {
    /// Inodes, and the blocks that each takes.
    queue: VecDeque<(Ino, u64)>,
    queue_blocks: u64,
    busy: bool,
    stop: bool,
    /// Blocks of the one whose turn has come, until it is looked at.
    next_blocks: u64,
    /// The one that is being deleted.
    current: Option<Arc<Inode>>,
}

/// Inodes to be deleted.
#[derive(Default)]
pub(crate) struct Reclaimer {
    state: Mutex<State>,
    changed: Condvar,
}

impl Reclaimer {
    /// Sets which one is being deleted, if any.
    fn turn_to(&self, inode: Option<&Arc<Inode>>) {
        let mut state = self.state.lock();
        state.next_blocks = 0;
        state.current = inode.cloned();
    }

    /// Blocks that deletion is about to free: statfs counts them as free.
    pub(crate) fn doomed_blocks(&self) -> u64 {
        let (queued, current) = {
            let state = self.state.lock();
            let queued = state.queue_blocks + state.next_blocks;
            (queued, state.current.clone())
        };
        queued + current.map_or(0, |inode| inode.attr().blocks / UNITS)
    }

    fn push(&self, ino: Ino, blocks: u64) {
        let mut state = self.state.lock();
        state.queue.push_back((ino, blocks));
        state.queue_blocks += blocks;
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the thread after what it is doing now.
    pub(crate) fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
    }
}

/// Units of `st_blocks` in a block.
const UNITS: u64 = BLOCK_SIZE / 512;

impl FileSystem {
    /// Hands the inode to the reclaiming thread if it has neither name nor user.
    pub(crate) fn maybe_reclaim(&self, inode: &Inode) {
        if inode.opens.load(Ordering::SeqCst) > 0
            || inode.lookups.load(Ordering::SeqCst) > 0
            || inode.state.lock().attr.nlink > 0
            || inode.deleted.load(Ordering::SeqCst)
            || self.is_read_only()
        {
            return;
        }
        self.reclaimer
            .push(inode.ino, self.blocks_of(inode) / UNITS);
    }

    /// Waits until everything handed over so far is deleted. Call it without a pass.
    pub(crate) fn reclaim_all(&self) {
        let mut state = self.reclaimer.state.lock();
        while !state.stop && (state.busy || !state.queue.is_empty()) {
            self.reclaimer.changed.wait(&mut state);
        }
    }

    /// The reclaiming thread.
    pub(crate) fn run_reclaims(&self) {
        loop {
            let ino = {
                let mut state = self.reclaimer.state.lock();
                state.busy = false;
                state.next_blocks = 0;
                self.reclaimer.changed.notify_all();
                loop {
                    if state.stop {
                        return;
                    }
                    if let Some((ino, blocks)) = state.queue.pop_front() {
                        state.busy = true;
                        state.queue_blocks -= blocks;
                        state.next_blocks = blocks;
                        break ino;
                    }
                    self.reclaimer.changed.wait(&mut state);
                }
            };
            if let Err(error) = self.reclaim(ino)
                && error != Errno::ROFS
            {
                log::error!("inode {ino}: deletion stopped: {error}; it goes on at the next mount");
            }
        }
    }

    fn reclaim(&self, ino: Ino) -> Result<(), Errno> {
        let inode = match self.inode(ino) {
            Err(Errno::NOENT) => return Ok(()),
            found => found?,
        };
        let in_use = inode.lookups.load(Ordering::SeqCst) > 0
            || inode.opens.load(Ordering::SeqCst) > 0
            || inode.state.lock().attr.nlink > 0;
        if in_use || inode.deleted.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.reclaimer.turn_to(Some(&inode));
        let deleted = self.delete(&inode);
        self.reclaimer.turn_to(None);
        deleted?;
        drop(inode);
        self.inodes.try_evict(ino);
        Ok(())
    }

    fn delete(&self, inode: &Arc<Inode>) -> Result<(), Errno> {
        self.discard_pages(inode, 0, u64::MAX >> 12);
        if inode.state.lock().attr.is_file() {
            self.truncate(inode, 0)?;
        } else {
            self.balance_group()?;
        }
        self.check_writable()?;
        let _pass = self.gate.enter();
        if inode.state.lock().attr.is_file() {
            // What was set aside behind the end of file.
            self.remove_blocks(inode, 0, u64::MAX >> 12)?;
        }
        self.delete_records(inode)
    }

    fn delete_records(&self, inode: &Arc<Inode>) -> Result<(), Errno> {
        let mut keys = Vec::new();
        let (from, to) = (ino_key(inode.ino), ino_key(inode.ino + 1));
        self.store.scan(Table::Xattrs, &from, &to, &mut |key, _| {
            keys.push(key.to_vec());
            true
        })?;
        for key in keys {
            self.store.delete(Table::Xattrs, &key);
        }
        self.store.delete(Table::Inodes, &from);
        self.store.delete(Table::Orphans, &from);
        inode.deleted.store(true, Ordering::SeqCst);
        self.inode_count.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    fn orphans(&self) -> Result<Vec<(Ino, Option<Orphan>)>, Errno> {
        let mut found = Vec::new();
        self.store.scan(
            Table::Orphans,
            &ino_key(0),
            &ino_key(u64::MAX),
            &mut |key, value| {
                found.extend(key_u64(key, 0).map(|ino| (ino, Orphan::decode(value))));
                true
            },
        )?;
        Ok(found)
    }

    /// At mount: completes what a crash cut off.
    pub(crate) fn adopt_orphans(&self) -> Result<(), Errno> {
        for (ino, orphan) in self.orphans()? {
            match orphan {
                Some(Orphan::Delete) => self.reclaimer.push(ino, 0),
                Some(Orphan::Truncate(size)) => {
                    match self.inode(ino) {
                        Ok(inode) => self.truncate(&inode, size)?,
                        Err(error) => log::error!("inode {ino}: to be truncated, but: {error}"),
                    }
                    let _pass = self.gate.enter();
                    self.store.delete(Table::Orphans, &ino_key(ino));
                }
                None => log::error!("inode {ino}: its orphan record is damaged; run fsck"),
            }
        }
        Ok(())
    }

    /// At unmount nobody uses anything any more: unlinked files go now, not at the next mount.
    pub(crate) fn release_orphans(&self) -> Result<(), Errno> {
        for (ino, orphan) in self.orphans()? {
            if orphan == Some(Orphan::Delete) {
                if let Some(inode) = self.inodes.get(ino) {
                    inode.lookups.store(0, Ordering::SeqCst);
                    inode.opens.store(0, Ordering::SeqCst);
                }
                self.reclaimer.push(ino, 0);
            }
        }
        Ok(())
    }
}
