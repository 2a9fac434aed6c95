//! Metadata: records, the transactional store that keeps them, and its home on the volume.
//!
//! | module | what |
//! | --- | --- |
//! | [`records`] | keys and values, encoded and decoded; no I/O |
//! | [`store`] | the tables: a durable snapshot, with the open and the committing group over it |
//! | [`offline`] | the same tables as a check of an unmounted volume reads and mends them |
//! | [`salvage`] | the same tables where pages of them cannot be read |
//! | [`journal`] | small groups that are durable before redb has them |
//! | [`contain`] | redb's panics as errors |
//! | [`page`], [`system`] | whether its pages make sense: one by itself, and its own tables |
//! | [`backend`] | redb's file as one address space on mirrored chunks |
//! | [`state`] | that file's head, header, chunks and checksums, as loaded |
//! | [`head`], [`header`] | its length and chunks; redb's header, sealed |
//! | [`checksums`] | a CRC32C for each block of that file |
//! | [`mirrors`] | the two copies of all of this: reading each, mending a bad one |
//! | [`verify`] | verifying all of them where they lie |

pub(crate) mod backend;
mod checksums;
pub(crate) mod contain;
#[cfg(test)]
mod crafted;
mod head;
mod header;
pub(crate) mod journal;
pub(crate) mod mirrors;
pub(crate) mod offline;
mod page;
pub(crate) mod records;
pub(crate) mod salvage;
mod state;
pub(crate) mod store;
mod system;
pub(crate) mod verify;
