//! An unmounted volume with its metadata store, opened to be read, and later perhaps to be written.
//! Less than a mount: no allocator, no threads of the file system, and nothing is believed but the
//! labels and the store's own pages.

use std::sync::Arc;

use braidfs_blockdev::{BLOCK_SIZE, ChunkKind, Volume};
use braidfs_cache::{Cache, CacheConfig};

use crate::MountError;
use crate::meta::backend::MetaFile;
use crate::meta::offline::Offline;
use crate::meta::salvage::{self, Loss, Salvage};

/// Page cache of a check, in bytes: as much as the metadata takes, between these.
const CACHE_BYTES_MIN: u64 = crate::CACHE_BYTES_MIN;
const CACHE_BYTES_MAX: u64 = 64 << 20;

/// Opens the store with what the journal holds, and says why that is not all of it.
fn open_store(
    meta: &Arc<MetaFile>,
    volume: &Arc<Volume>,
) -> Result<(Offline, Option<String>), redb::Error> {
    let store = Offline::open(meta.storage())?;
    let error = match store.replay(volume) {
        Ok(replayed) => return Ok((store, replayed.damage)),
        Err(error) => error,
    };
    // redb refuses everything once it met an error.
    if let Err(error) = store.close() {
        log::info!("metadata: closing what cannot take the journal over: {error}");
    }
    let damage = format!("cannot be taken over: {error}");
    Ok((Offline::open(meta.storage())?, Some(damage)))
}

/// An open volume.
pub(super) struct Session {
    pub volume: Arc<Volume>,
    cache: Arc<Cache>,
    meta: Arc<MetaFile>,
    /// `None` between closing it and opening it again.
    store: Option<Offline>,
    /// Why not all of the journal could be taken over.
    journal_damage: Option<String>,
}

impl Session {
    /// Opens what was assembled, to read or to write.
    pub(super) fn open(volume: Arc<Volume>) -> Result<Self, MountError> {
        let chunks = volume.chunks();
        let metadata = chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Meta);
        let metadata_bytes: u64 = metadata.map(|chunk| chunk.len_blocks * BLOCK_SIZE).sum();
        let config = CacheConfig {
            size_bytes: metadata_bytes.clamp(CACHE_BYTES_MIN, CACHE_BYTES_MAX),
            ..CacheConfig::default()
        };
        let cache = Cache::new(config, Arc::clone(&volume))?;
        let read_only = volume.is_read_only();
        let opened = MetaFile::open(Arc::clone(&volume), &cache, read_only, false)
            .map_err(|error| MountError::Metadata(error.into()))
            .and_then(|meta| Ok((open_store(&meta, &volume)?, meta)));
        match opened {
            Ok(((store, journal_damage), meta)) => Ok(Self {
                journal_damage,
                volume,
                cache,
                meta,
                store: Some(store),
            }),
            Err(error) => {
                cache.shutdown();
                Err(error)
            }
        }
    }

    /// Why not all of the journal could be taken over when the store was opened.
    pub(super) fn journal_damage(&self) -> Option<&str> {
        self.journal_damage.as_deref()
    }

    /// What was repaired holds without the rest of the journal.
    pub(super) fn forget_journal_damage(&mut self) {
        self.journal_damage = None;
    }

    /// The metadata store.
    pub(super) fn store(&self) -> Result<&Offline, redb::Error> {
        self.store.as_ref().ok_or(redb::Error::DatabaseClosed)
    }

    /// What can be read where redb gives up; `None` if not even the list of tables can.
    pub(super) fn salvage(&self) -> Option<Salvage> {
        Salvage::open(self.meta.storage())
    }

    /// See [`salvage::blank`].
    pub(super) fn blank(&self, losses: &[Loss]) -> std::io::Result<()> {
        salvage::blank(&self.meta.storage(), losses)
    }

    /// Takes the devices for writing, and opens the store anew. No reader is left.
    pub(super) fn make_writable(&mut self) -> Result<(), MountError> {
        if !self.volume.is_read_only() {
            return Ok(());
        }
        self.volume.make_writable()?;
        if let Some(Err(error)) = self.store.take().map(Offline::close) {
            // It had nothing to write, and what it has in memory is forgotten.
            log::info!("metadata: closing what was only read: {error}");
        }
        self.meta
            .begin_again_to_write()
            .map_err(|error| MountError::Metadata(error.into()))?;
        let (store, journal_damage) = open_store(&self.meta, &self.volume)?;
        (self.store, self.journal_damage) = (Some(store), journal_damage);
        Ok(())
    }

    /// Ends it; a volume that was written is marked clean.
    pub(super) fn close(mut self) -> Result<(), MountError> {
        let mut stored = self.store.take().map_or(Ok(()), Offline::close);
        if let Err(error) = &stored
            && self.volume.is_read_only()
        {
            // Nothing was to be written; redb may have given up on a page.
            log::info!("metadata: closing what was only read: {error}");
            stored = Ok(());
        }
        let synced = self.meta.close();
        self.cache.shutdown();
        stored?;
        synced.map_err(|error| MountError::Metadata(error.into()))?;
        self.volume
            .close()
            .map_err(|error| MountError::Metadata(Box::new(error)))
    }
}
