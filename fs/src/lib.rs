//! braidfs: several devices as one striped, checksummed, crash-consistent file system.
//!
//! This crate is the file system's core, a plain library (operations in, replies out), with its
//! FUSE front end in [`fuse`]. The layers below are `braidfs_cache` (pages) and
//! `braidfs_blockdev` (kiobufs and devices).

#![deny(unsafe_code)]

mod acl;
mod alloc;
mod atime;
mod attributes;
pub mod cli;
mod commit;
mod copy;
mod data_backing;
mod direct;
mod extent_map;
mod file;
mod file_ranges;
mod filesystem;
mod flags;
mod freeze;
pub mod fsck;
pub mod fuse;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod inode;
mod latch;
mod listing;
mod meta;
mod namespace;
mod options;
mod pace;
mod range_lock;
mod reclaim;
mod room;
pub mod scrub;
mod seek;
mod trim;
mod txg;
mod types;
mod xattr;

pub use alloc::SpaceStats;
pub use atime::AccessTime;
pub use commit::TxgStats;
pub use file::{IO_BYTES_MAX, OpenFile, ReadDone, ReadReply, WriteData, WriteDone};
pub use filesystem::{FileSystem, FsStats, MountError, format};
pub use flags::{
    FLAG_APPEND, FLAG_DIRSYNC, FLAG_IMMUTABLE, FLAG_NOATIME, FLAG_NODUMP, FLAG_NOTAIL, FLAG_SYNC,
    FLAGS_KNOWN,
};
pub use freeze::{FreezeError, ThawJob};
pub use meta::mirrors::MetaStats;
pub use options::*;
pub use pace::MemberPace;
pub use types::*;
