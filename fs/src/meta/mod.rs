//! Metadata: records, the transactional store that keeps them, and its home on the volume.
//!
//! | module | what |
//! | --- | --- |
//! | [`records`] | keys and values, encoded and decoded; no I/O |
//! | [`store`] | the tables: a durable snapshot, with the open and the committing group over it |
//! | [`backend`] | redb's file as one address space on mirrored chunks |
//! | [`checksums`] | a CRC32C for each block of that file |

pub(crate) mod backend;
mod checksums;
pub(crate) mod records;
pub(crate) mod store;
