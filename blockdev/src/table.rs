//! The chunk table on disk.
