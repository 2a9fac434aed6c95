//! An unmounted volume with its metadata store, opened to be read, and later perhaps to be written.
//! Less than a mount: no allocator, no threads of the file system, and nothing is believed but the
//! labels and the store's own pages.

use std::sync::Arc;

use braidfs_blockdev::Volume;
use braidfs_cache::{Cache, CacheConfig};

use crate::MountError;
use crate::meta::backend::MetaFile;
use crate::meta::store::Store;

/// Page cache of a check, in bytes.
const CACHE_BYTES: u64 = 64 << 20;

/// An open volume.
pub(super) struct Session {
    pub volume: Arc<Volume>,
    pub store: Store,
    cache: Arc<Cache>,
    meta: Arc<MetaFile>,
}

impl Session {
    /// Opens what was assembled, to read or to write.
    pub(super) fn open(volume: Arc<Volume>) -> Result<Self, MountError> {
        let config = CacheConfig {
            size_bytes: CACHE_BYTES,
            ..CacheConfig::default()
        };
        let cache = Cache::new(config, Arc::clone(&volume))?;
        let read_only = volume.is_read_only();
        let opened = MetaFile::open(Arc::clone(&volume), &cache, read_only, false)
            .map_err(|error| MountError::Metadata(error.into()))
            .and_then(|meta| Ok((Store::open(meta.storage())?, meta)));
        match opened {
            Ok((store, meta)) => Ok(Self {
                volume,
                store,
                cache,
                meta,
            }),
            Err(error) => {
                cache.shutdown();
                Err(error)
            }
        }
    }

    /// Takes the devices for writing, and opens the store anew. No reader is left.
    pub(super) fn make_writable(&self) -> Result<(), MountError> {
        if !self.volume.is_read_only() {
            return Ok(());
        }
        self.volume.make_writable()?;
        self.store.reopen(|| {
            self.meta.begin_again_to_write()?;
            Ok(self.meta.storage())
        })?;
        Ok(())
    }

    /// Ends it; a volume that was written is marked clean.
    pub(super) fn close(self) -> Result<(), MountError> {
        let stored = self.store.close();
        let synced = self.meta.close();
        self.cache.shutdown();
        stored?;
        synced.map_err(|error| MountError::Metadata(error.into()))?;
        self.volume
            .close()
            .map_err(|error| MountError::Metadata(Box::new(error)))
    }
}
