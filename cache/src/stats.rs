//! Counters.

/// What the cache has done and holds.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct CacheStats {
    /// Reads answered from the cache.
    pub hits: u64,
}
