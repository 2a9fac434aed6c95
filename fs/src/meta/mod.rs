//! Metadata: records, the transactional store that keeps them, and its home on the volume.
//!
//! | module | what |
//! | --- | --- |
//! | [`records`] | keys and values, encoded and decoded; no I/O |
//! | [`store`] | the tables: a durable snapshot, with the open and the committing group over it |
//! | [`backend`] | redb's file as one address space on mirrored chunks |
//! | [`state`] | that file's head, header, chunks and checksums, as loaded |
//! | [`head`], [`header`] | its length and chunks; redb's header, sealed |
//! | [`checksums`] | a CRC32C for each block of that file |
//! | [`mirrors`] | the two copies of all of this: reading each, mending a bad one |
//! | [`verify`] | verifying all of them where they lie |

pub(crate) mod backend;
mod checksums;
mod head;
mod header;
pub(crate) mod mirrors;
pub(crate) mod records;
mod state;
pub(crate) mod store;
pub(crate) mod verify;
