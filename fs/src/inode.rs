//! Inodes in memory, and the table of them.
//!
//! Attributes live here while an inode is in memory; its record is written when its transaction
//! group is frozen. An inode stays in memory while the kernel knows it, somebody has it open, it
//! is dirty, or pages of it are cached.
//!
//! Lock order inside one inode: `dir` (structure of a directory), `ranges`, `map`, `state`. Two
//! directories are locked in the order of their numbers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use braidfs_cache::AddressSpace;
use parking_lot::{Mutex, RwLock};

use crate::filesystem::FileSystem;
use crate::meta::records::InodeRecord;
use crate::range_lock::RangeLock;
use crate::{Attr, Errno, FLAG_SYNC, Ino, Timestamp};

/// Bytes of a page and of a block.
pub(crate) const PAGE: u64 = braidfs_blockdev::BLOCK_SIZE;

/// An inode in memory.
pub(crate) struct Inode {
    pub ino: Ino,
    /// What its record holds.
    pub state: Mutex<InodeRecord>,
    /// Directories: held to change or list the entries.
    pub dir: Mutex<()>,
    /// Guards the extents.
    pub map: RwLock<()>,
    /// Orders reads and writes of bytes.
    pub ranges: Arc<RangeLock>,
    space: OnceLock<Arc<AddressSpace>>,
    /// The file system, set before `space` is.
    pub owner: OnceLock<Weak<FileSystem>>,
    /// How often the kernel was told of it and has not forgotten.
    pub lookups: AtomicU64,
    /// Open files.
    pub opens: AtomicU32,
    /// Those of them that may write.
    pub writers: AtomicU32,
    /// Stands in the list of dirty inodes.
    pub queued: AtomicBool,
    /// Stands in the list of those with an access time that is not in their record.
    pub atime_late: AtomicBool,
    /// Gone from the tables; only memory is left.
    pub deleted: AtomicBool,
    /// Made without a name, and may still get its first one.
    pub linkable: AtomicBool,
    /// The goal of a truncation in steps; `u64::MAX`: none is under way. Changes under `state`.
    pub truncating: AtomicU64,
    /// The last transaction group that changed it.
    pub changed_in: AtomicU64,
    /// When a write from a cache in front found no room, and how many blocks were free then.
    pub no_room: Mutex<Option<(Instant, u64)>>,
    /// A cache in front has, or once had, pages that it read.
    pub cached_in_front: AtomicBool,
    /// When flags were last set (chattr), which a kernel that keeps times itself does not notice.
    pub flags_set: Mutex<Timestamp>,
    /// Certainly has no file capabilities, so that a write need not look. Changes under `map`.
    pub no_capabilities: AtomicBool,
}

impl Inode {
    pub(crate) fn new(record: InodeRecord) -> Arc<Self> {
        Arc::new(Self {
            ino: record.attr.ino,
            state: Mutex::new(record),
            dir: Mutex::new(()),
            map: RwLock::new(()),
            ranges: Arc::new(RangeLock::default()),
            space: OnceLock::new(),
            owner: OnceLock::new(),
            lookups: AtomicU64::new(0),
            opens: AtomicU32::new(0),
            writers: AtomicU32::new(0),
            queued: AtomicBool::new(false),
            atime_late: AtomicBool::new(false),
            deleted: AtomicBool::new(false),
            linkable: AtomicBool::new(false),
            truncating: AtomicU64::new(u64::MAX),
            changed_in: AtomicU64::new(0),
            no_room: Mutex::default(),
            cached_in_front: AtomicBool::new(false),
            flags_set: Mutex::default(),
            no_capabilities: AtomicBool::new(false),
        })
    }

    /// Its pages; `make` builds the address space at first use.
    pub(crate) fn space_or(&self, make: impl FnOnce() -> Arc<AddressSpace>) -> &Arc<AddressSpace> {
        self.space.get_or_init(make)
    }

    /// Its pages, if it has had any.
    pub(crate) fn space(&self) -> Option<&Arc<AddressSpace>> {
        self.space.get()
    }

    /// Attributes, with the blocks that dirty pages will take.
    pub(crate) fn attr(&self) -> Attr {
        let blocks = self.owner.get().and_then(Weak::upgrade);
        let blocks = blocks.map(|fs| fs.blocks_of(self));
        let mut attr = self.state.lock().attr;
        attr.blocks = blocks.unwrap_or(attr.blocks);
        attr
    }

    /// `NOTDIR` unless it is a directory.
    pub(crate) fn check_dir(&self) -> Result<(), Errno> {
        if self.state.lock().attr.is_dir() {
            Ok(())
        } else {
            Err(Errno::NOTDIR)
        }
    }

    /// Sets mtime and ctime (a directory whose entries changed, a file whose bytes did).
    pub(crate) fn touch_modified(&self) {
        let now = Timestamp::now();
        let mut state = self.state.lock();
        state.attr.mtime = now;
        state.attr.ctime = now;
    }

    /// Whether each change of it is to be durable at once.
    pub(crate) fn is_sync(&self) -> bool {
        self.state.lock().attr.flags & FLAG_SYNC != 0
    }

    /// Sets ctime.
    pub(crate) fn touch_changed(&self) {
        self.state.lock().attr.ctime = Timestamp::now();
    }

    fn may_leave(&self) -> bool {
        self.lookups.load(Ordering::SeqCst) == 0
            && self.opens.load(Ordering::SeqCst) == 0
            && !self.queued.load(Ordering::SeqCst)
            && !self.atime_late.load(Ordering::SeqCst)
            && self
                .space()
                .is_none_or(|space| space.page_count() == 0 && Arc::strong_count(space) <= 1)
    }
}

const SHARD_COUNT: usize = 16;

type Shard = Mutex<HashMap<Ino, Arc<Inode>>>;

/// All inodes in memory, by number.
#[derive(Default)]
pub(crate) struct InodeTable {
    shards: [Shard; SHARD_COUNT],
}

impl InodeTable {
    fn shard(&self, ino: Ino) -> &Shard {
        &self.shards[usize::try_from(ino % SHARD_COUNT as u64).expect("below the count")]
    }

    /// The inode, loaded by `load` if it is not in memory, with the last group that changed it (0:
    /// one that is durable). Never two for one number.
    pub(crate) fn get_or_load(
        &self,
        ino: Ino,
        load: impl FnOnce() -> Result<(InodeRecord, u64), Errno>,
    ) -> Result<Arc<Inode>, Errno> {
        let mut shard = self.shard(ino).lock();
        if let Some(inode) = shard.get(&ino) {
            return Ok(Arc::clone(inode));
        }
        let (record, changed_in) = load()?;
        let inode = Inode::new(record);
        inode.changed_in.store(changed_in, Ordering::SeqCst);
        shard.insert(ino, Arc::clone(&inode));
        Ok(inode)
    }

    /// The inode, if it is in memory.
    pub(crate) fn get(&self, ino: Ino) -> Option<Arc<Inode>> {
        self.shard(ino).lock().get(&ino).cloned()
    }

    /// Takes in a new inode.
    pub(crate) fn insert(&self, inode: &Arc<Inode>) {
        self.shard(inode.ino)
            .lock()
            .insert(inode.ino, Arc::clone(inode));
    }

    /// Lets the inode go if nothing holds it; returns whether it is gone.
    pub(crate) fn try_evict(&self, ino: Ino) -> bool {
        let mut shard = self.shard(ino).lock();
        match shard.get(&ino) {
            None => true,
            Some(inode) if Arc::strong_count(inode) == 1 && inode.may_leave() => {
                shard.remove(&ino);
                true
            }
            Some(_) => false,
        }
    }

    /// Lets go of every inode that nothing holds.
    pub(crate) fn sweep(&self) {
        for shard in &self.shards {
            shard
                .lock()
                .retain(|_, inode| Arc::strong_count(inode) > 1 || !inode.may_leave());
        }
    }

    /// How many are in memory.
    pub(crate) fn count(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| shard.lock().len() as u64)
            .sum()
    }
}
