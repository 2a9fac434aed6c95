//! Metadata: records, the transactional store that keeps them, and its home on the volume.
//!
//! | module | what |
//! | --- | --- |
//! | [`records`] | keys and values, encoded and decoded; no I/O |
//! | [`store`] | the tables: a durable snapshot, with the open and the committing group over it |
//! | [`offline`] | the same tables as a check of an unmounted volume reads and mends them |
//! | [`salvage`] | the same tables where pages of them cannot be read |
//! | [`backend`] | redb's file as one address space on mirrored chunks |
//! | [`checksums`] | a CRC32C for each block of that file |

pub(crate) mod backend;
mod checksums;
pub(crate) mod offline;
pub(crate) mod records;
pub(crate) mod salvage;
pub(crate) mod store;
