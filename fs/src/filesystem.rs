//! A mounted file system: its parts, mounting and unmounting.
//!
//! The operations are methods in the files of their kind: [`crate::namespace`] (names),
//! [`crate::attributes`], [`crate::file`] (reading, writing, mapping), [`crate::xattr`],
//! [`crate::reclaim`] (deletion), [`crate::commit`] (transaction groups).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use braidfs_blockdev::Volume;
use braidfs_cache::{Cache, CacheConfig};
use parking_lot::{Mutex, RwLock};

use crate::alloc::{Allocator, SpaceStats};
use crate::commit::{Committer, TxgStats};
use crate::freeze::Freezer;
use crate::inode::{Inode, InodeTable};
use crate::meta::backend::MetaFile;
use crate::meta::journal::Journal;
use crate::meta::mirrors::MetaStats;
use crate::meta::records::{InodeRecord, decode_u64, ino_key};
use crate::meta::store::{Store, Table};
use crate::reclaim::Reclaimer;
use crate::scrub::record::SETTING_SCRUB;
use crate::scrub::{ScrubSummary, Scrubber};
use crate::txg::{Gate, ReadEpoch};
use crate::{Attr, Errno, Ino, MountOptions, ROOT_INO, Timestamp};

/// Why a volume could not be mounted or formatted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The devices could not be assembled.
    #[error(transparent)]
    Volume(#[from] braidfs_blockdev::VolumeError),
    /// The metadata store is damaged or unreadable.
    #[error("metadata store: {0}; run 'braidfs fsck -n' on the devices")]
    Metadata(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nothing may change now.
    #[error("the file system is frozen; 'braidfs control MOUNTPOINT thaw' ends that")]
    Frozen,
    /// Not enough memory or threads.
    #[error("cannot set up: {0}")]
    System(#[from] std::io::Error),
}

impl From<redb::Error> for MountError {
    fn from(error: redb::Error) -> Self {
        Self::Metadata(Box::new(error))
    }
}

impl From<Errno> for MountError {
    fn from(error: Errno) -> Self {
        Self::Metadata(Box::new(error))
    }
}

/// Name in the settings of the number that the next inode gets.
pub(crate) const SETTING_NEXT_INO: &[u8] = b"next_ino";
/// Name in the settings of the number of inodes.
pub(crate) const SETTING_INODE_COUNT: &[u8] = b"inode_count";

/// Files named in a message about lost data.
const LOST_SHOWN_MAX: usize = 20;

/// A mounted file system.
pub struct FileSystem {
    pub(crate) me: Weak<FileSystem>,
    pub(crate) options: MountOptions,
    pub(crate) volume: Arc<Volume>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) store: Store,
    pub(crate) journal: Journal,
    pub(crate) meta: Arc<MetaFile>,
    pub(crate) space: Allocator,
    pub(crate) gate: Arc<Gate>,
    pub(crate) epoch: Arc<ReadEpoch>,
    pub(crate) inodes: InodeTable,
    /// Inodes whose record is to be written at the next freeze.
    pub(crate) dirty: Mutex<Vec<Arc<Inode>>>,
    /// Inodes whose access time alone is newer than their record.
    pub(crate) late_atimes: Mutex<Vec<Arc<Inode>>>,
    pub(crate) next_ino: AtomicU64,
    pub(crate) inode_count: AtomicU64,
    /// Up to which deletion the room that came free was waited for.
    pub(crate) settled_deletions: AtomicU64,
    /// Held to move a directory to another parent, so that no loop can arise.
    pub(crate) rename: Mutex<()>,
    /// Held shared while written blocks are mapped, exclusively while a group is frozen.
    pub(crate) mapping: RwLock<()>,
    pub(crate) committer: Committer,
    pub(crate) freezer: Arc<Freezer>,
    pub(crate) reclaimer: Reclaimer,
    pub(crate) scrubber: Scrubber,
    /// Mounted read-only, and not made writable since.
    read_only: AtomicBool,
    /// How often what changed is committed at least, in milliseconds.
    commit_millis: AtomicU64,
    /// Held to change that.
    remounting: Mutex<()>,
    /// A commit failed: nothing may change any more.
    pub(crate) failed: AtomicBool,
    unmounted: AtomicBool,
}

/// Counters of a mounted file system.
#[derive(Clone, Debug, serde::Serialize)]
pub struct FsStats {
    /// Mounted read-only, or so since a commit failed.
    pub read_only: bool,
    /// Transaction groups.
    pub txg: TxgStats,
    /// Space, in blocks of 4 KiB.
    pub space: SpaceStats,
    /// Inodes in memory.
    pub inodes_in_memory: u64,
    /// Bad copies of metadata.
    pub metadata: MetaStats,
    /// The last scrub.
    pub scrub: ScrubSummary,
    /// The page cache.
    pub cache: braidfs_cache::CacheStats,
    /// The volume and its devices.
    pub volume: braidfs_blockdev::VolumeStats,
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// Makes an empty file system on a freshly formatted volume.
pub fn format(volume: Arc<Volume>) -> Result<(), MountError> {
    let options = MountOptions {
        cache_bytes: crate::CACHE_BYTES_MIN,
        ..MountOptions::default()
    };
    let fs = FileSystem::start(volume, options, true)?;
    let now = Timestamp::now();
    let attr = Attr {
        ino: ROOT_INO,
        size: 0,
        blocks: 0,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        mode: libc::S_IFDIR | 0o755,
        nlink: 2,
        uid: nix::unistd::geteuid().as_raw(),
        gid: nix::unistd::getegid().as_raw(),
        rdev: 0,
        flags: 0,
        generation: 1,
    };
    let root = InodeRecord {
        attr,
        next_cookie: crate::listing::COOKIE_FIRST,
        parent: ROOT_INO,
    };
    {
        let _pass = fs.gate.enter();
        let root = Inode::new(root);
        fs.inodes.insert(&root);
        fs.next_ino.store(ROOT_INO + 1, Ordering::SeqCst);
        fs.inode_count.store(1, Ordering::SeqCst);
        fs.mark_dirty(&root);
    }
    fs.unmount().map_err(MountError::from)
}

impl FileSystem {
    /// Mounts an assembled volume. Completes the deletions and truncations that a crash cut off.
    pub fn mount(volume: Arc<Volume>, options: MountOptions) -> Result<Arc<Self>, MountError> {
        let fs = Self::start(volume, options, false)?;
        let root = fs.inode(ROOT_INO).and_then(|root| root.check_dir());
        if let Err(error) = root {
            fs.stop();
            return Err(MountError::Metadata(
                format!("the root directory cannot be read ({error})").into(),
            ));
        }
        if !fs.options.read_only
            && let Err(error) = fs.adopt_orphans()
        {
            fs.stop();
            return Err(error.into());
        }
        Ok(fs)
    }

    /// Everything but looking at what is there. `fresh`: there is nothing yet.
    pub(crate) fn start(
        volume: Arc<Volume>,
        options: MountOptions,
        fresh: bool,
    ) -> Result<Arc<Self>, MountError> {
        let config = CacheConfig {
            size_bytes: options.cache_bytes,
            ..CacheConfig::default()
        };
        let cache = Cache::new(config, Arc::clone(&volume))?;
        let meta = match MetaFile::open(Arc::clone(&volume), &cache, options.read_only, fresh) {
            Ok(meta) => meta,
            Err(error) => {
                cache.shutdown();
                return Err(MountError::Metadata(error.into()));
            }
        };
        let parts = Store::open(meta.storage()).and_then(|store| {
            let replayed = store.replay(&volume)?;
            let journal = Journal::new(Arc::clone(&volume), replayed.base);
            let space = Allocator::load(Arc::clone(&volume), |each| store.scan_free(each))?;
            Ok((store, journal, space))
        });
        let (store, journal, space) = match parts {
            Ok(parts) => parts,
            Err(error) => {
                cache.shutdown();
                return Err(error.into());
            }
        };
        let number = |name: &[u8]| {
            store.get(Table::Settings, name, |value| {
                value.and_then(decode_u64).unwrap_or(0)
            })
        };
        let (next_ino, inode_count) = (number(SETTING_NEXT_INO)?, number(SETTING_INODE_COUNT)?);
        let read_only = AtomicBool::new(options.read_only);
        let commit_millis = AtomicU64::new(millis(options.commit_interval));
        let scrubber = Scrubber::default();
        store.get(Table::Settings, SETTING_SCRUB, |value| scrubber.load(value))?;
        let fs = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            options,
            volume,
            cache,
            store,
            journal,
            meta,
            space,
            gate: Arc::default(),
            epoch: Arc::default(),
            inodes: InodeTable::default(),
            dirty: Mutex::default(),
            late_atimes: Mutex::default(),
            next_ino: AtomicU64::new(next_ino.max(ROOT_INO + 1)),
            inode_count: AtomicU64::new(inode_count),
            settled_deletions: AtomicU64::new(0),
            rename: Mutex::default(),
            mapping: RwLock::default(),
            committer: Committer::default(),
            freezer: Arc::default(),
            reclaimer: Reclaimer::default(),
            scrubber,
            read_only,
            commit_millis,
            remounting: Mutex::default(),
            failed: AtomicBool::new(false),
            unmounted: AtomicBool::new(false),
        });
        fs.start_threads()?;
        Ok(fs)
    }

    fn start_threads(&self) -> std::io::Result<()> {
        let spawn = |name: &str, run: fn(&FileSystem)| {
            let me = Weak::clone(&self.me);
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    if let Some(fs) = me.upgrade() {
                        run(&fs);
                    }
                })
        };
        let threads = [
            spawn("braidfs-commit", FileSystem::run_commits)?,
            spawn("braidfs-reclaim", FileSystem::run_reclaims)?,
        ];
        self.committer.keep_threads(threads);
        Ok(())
    }

    fn stop(&self) {
        self.reclaimer.stop();
        self.committer.stop();
        self.cache.shutdown();
    }

    /// Writes everything back, commits, closes the volume. Returns the first error; then what
    /// could be saved is saved. Calling it again does nothing.
    pub fn unmount(&self) -> Result<(), Errno> {
        if self.unmounted.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.thaw_at_end();
        self.end_scrubs();
        if !self.is_read_only() {
            if let Err(error) = self.release_orphans() {
                log::warn!("orphans stay until the next mount: {error}");
            }
            self.reclaim_all();
        }
        self.reclaimer.stop();
        let committed = if self.is_read_only() {
            Ok(())
        } else {
            self.commit_now().and(self.check_all_written())
        };
        self.committer.stop();
        let stored = self.close_metadata();
        self.stop();
        let closed = self.volume.close().map_err(|error| {
            log::error!("closing the volume: {error}");
            Errno(error.errno())
        });
        committed.and(stored).and(closed)
    }

    /// Ends its threads and saves nothing: for those who test what a power cut leaves. What is not
    /// durable is lost.
    pub fn abandon(&self) {
        if !self.unmounted.swap(true, Ordering::SeqCst) {
            self.thaw_at_end();
            self.stop();
        }
    }

    fn check_all_written(&self) -> Result<(), Errno> {
        match self.cache.dirty_bytes() {
            0 => Ok(()),
            bytes => {
                let inodes = self.cache.dirty_spaces();
                let shown: Vec<_> = inodes
                    .iter()
                    .take(LOST_SHOWN_MAX)
                    .map(Ino::to_string)
                    .collect();
                let more = if inodes.len() > shown.len() {
                    ", ..."
                } else {
                    ""
                };
                log::error!(
                    "{bytes} bytes of data could not be written and are lost, of inodes {}{more} \
                     (find -inum tells their names)",
                    shown.join(", ")
                );
                Err(Errno::IO)
            }
        }
    }

    /// redb writes once more when it is closed; then nothing may be left in memory. A read-only
    /// mount has nothing to lose: what redb cannot read then is logged alone.
    fn close_metadata(&self) -> Result<(), Errno> {
        let closed = self.store.close().map_err(|error| error.to_string());
        let synced = self.meta.close().map_err(|error| error.to_string());
        match closed.and(synced) {
            Err(error) if self.is_read_only() && !self.failed.load(Ordering::SeqCst) => {
                log::warn!("closing the metadata store: {error}");
                Ok(())
            }
            result => result.map_err(|error| {
                log::error!("closing the metadata store: {error}");
                Errno::IO
            }),
        }
    }

    /// The options it was mounted with.
    pub fn options(&self) -> &MountOptions {
        &self.options
    }

    /// The volume it lives on.
    pub fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    /// Whether it is mounted read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Goes on writing what was mounted read-only, from where a writing mount would have begun.
    /// Does nothing if it is writable already. After a failure it can be read as before, or, if the
    /// metadata store cannot be opened again, not used at all.
    pub fn make_writable(&self) -> Result<(), MountError> {
        let _one = self.remounting.lock();
        if self.failed.load(Ordering::SeqCst) {
            let why = "a commit failed; unmount it, mend the devices, mount it again";
            return Err(MountError::Metadata(why.into()));
        }
        if !self.is_read_only() {
            return Ok(());
        }
        if self.freezer.holds() {
            return Err(MountError::Frozen);
        }
        self.volume.make_writable()?;
        self.store.reopen(|| {
            self.meta.begin_again_to_write()?;
            Ok(self.meta.storage())
        })?;
        self.journal.restart(self.store.replay(&self.volume)?.base);
        self.read_only.store(false, Ordering::Release);
        Ok(self.adopt_orphans()?)
    }

    /// `ROFS` where nothing may change. Waits for the thaw of a frozen file system: call it without
    /// locks and without a pass.
    pub(crate) fn check_writable(&self) -> Result<(), Errno> {
        self.freezer.wait_open();
        self.check_may_write()
    }

    /// The same without a wait.
    pub(crate) fn check_may_write(&self) -> Result<(), Errno> {
        if self.is_read_only() || self.failed.load(Ordering::Relaxed) {
            return Err(Errno::ROFS);
        }
        Ok(())
    }

    /// The inode with this number.
    pub(crate) fn inode(&self, ino: Ino) -> Result<Arc<Inode>, Errno> {
        self.inodes.get_or_load(ino, || {
            let found = self.store.get(Table::Inodes, &ino_key(ino), |value| {
                value.map(|value| InodeRecord::decode(ino, value))
            })?;
            match found {
                None => Err(Errno::NOENT),
                Some(None) => {
                    log::error!("inode {ino}: its record is damaged; run 'braidfs fsck -n'");
                    Err(Errno::IO)
                }
                Some(Some(record)) => {
                    // It may have left memory after its group was frozen and before that group
                    // is durable: fsync has to wait for it all the same.
                    let unwritten = self.store.is_unwritten(Table::Inodes, &ino_key(ino));
                    let group = if unwritten {
                        self.committer.open_group()
                    } else {
                        0
                    };
                    Ok((record, group))
                }
            }
        })
    }

    /// Puts the inode on the list of those whose record the next freeze writes. The caller holds
    /// a pass of the gate.
    pub(crate) fn mark_dirty(&self, inode: &Arc<Inode>) {
        let group = self.committer.open_group();
        inode.changed_in.fetch_max(group, Ordering::SeqCst);
        if !inode.queued.swap(true, Ordering::SeqCst) {
            self.dirty.lock().push(Arc::clone(inode));
        }
    }

    /// Writes the records of all dirty inodes into the open group. The gate is closed.
    pub(crate) fn encode_dirty(&self) {
        let dirty = std::mem::take(&mut *self.dirty.lock());
        for inode in dirty {
            inode.queued.store(false, Ordering::SeqCst);
            if !inode.deleted.load(Ordering::SeqCst) {
                let record = *inode.state.lock();
                self.store
                    .put(Table::Inodes, &ino_key(inode.ino), &record.encode());
            }
        }
        self.put_settings();
    }

    fn put_settings(&self) {
        let put = |name: &[u8], value: &AtomicU64| {
            let value = value.load(Ordering::SeqCst).to_le_bytes();
            self.store.put(Table::Settings, name, &value);
        };
        put(SETTING_NEXT_INO, &self.next_ino);
        put(SETTING_INODE_COUNT, &self.inode_count);
    }

    /// Commits, also where nothing has changed. Call it without a pass.
    pub(crate) fn commit_settings(&self) -> Result<(), Errno> {
        let pass = self.gate.enter();
        self.put_settings();
        drop(pass);
        self.commit_now()
    }

    /// How often what changed is committed at least.
    pub fn commit_interval(&self) -> Duration {
        Duration::from_millis(self.commit_millis.load(Ordering::Relaxed))
    }

    /// Changes that, from the next commit on, which is soon.
    pub fn set_commit_interval(&self, interval: Duration) {
        self.commit_millis
            .store(millis(interval), Ordering::Relaxed);
        self.committer.nudge();
    }

    /// The page cache, for its size.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Gives the file system another label.
    pub fn set_label(&self, text: &str) -> Result<(), MountError> {
        if self.freezer.holds() {
            return Err(MountError::Frozen);
        }
        Ok(self.volume.set_label(text)?)
    }

    /// Counters.
    pub fn stats(&self) -> FsStats {
        FsStats {
            read_only: self.check_may_write().is_err(),
            txg: self.committer.stats(),
            space: self.space.stats(),
            inodes_in_memory: self.inodes.count(),
            metadata: self.meta.stats(),
            scrub: self.scrub_summary(),
            cache: self.cache.stats(),
            volume: self.volume.stats(),
        }
    }
}
