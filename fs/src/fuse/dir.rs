//! READDIR and READDIRPLUS.
//!
//! Cookies are the core's: they stay valid while other entries come and go. READDIRPLUS counts one
//! lookup for each entry that it hands to the kernel, except "." and ".."; the kernel forgets them
//! one by one later. The core lists entries first and looks them up after, so that it is never
//! called back from inside its own listing.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::Shared;
use super::attr::{bare_attr, dirent_type};
use crate::{Errno, Ino};

/// Entries listed at a time for READDIRPLUS: about what fits into one page of reply.
const BATCH: usize = 24;

/// A listed entry, copied out of the core.
struct Listed {
    ino: Ino,
    kind: u8,
    name: OsString,
    cookie: u64,
}

/// Fills a READDIR reply.
pub(super) fn list(
    shared: &Shared,
    ino: Ino,
    after: u64,
    reply: &mut ReplyDirectory,
) -> Result<(), Errno> {
    shared.fs.readdir(ino, after, &mut |entry| {
        let kind = dirent_type(entry.kind);
        !reply.add(
            INodeNo(entry.ino),
            entry.cookie,
            kind,
            OsStr::from_bytes(entry.name),
        )
    })
}

/// Fills a READDIRPLUS reply. An error after the first entries ends the reply early; the kernel
/// asks again from there and gets to see it.
pub(super) fn list_plus(
    shared: &Shared,
    ino: Ino,
    after: u64,
    reply: &mut ReplyDirectoryPlus,
) -> Result<(), Errno> {
    let mut after = after;
    let mut added = false;
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        batch.clear();
        let listed = shared.fs.readdir(ino, after, &mut |entry| {
            batch.push(Listed {
                ino: entry.ino,
                kind: entry.kind,
                name: OsString::from_vec(entry.name.to_vec()),
                cookie: entry.cookie,
            });
            batch.len() < BATCH
        });
        match listed {
            Err(_) if added => return Ok(()),
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        for entry in &batch {
            if !add_plus(shared, entry, reply) {
                return Ok(());
            }
            added = true;
            after = entry.cookie;
        }
        if batch.len() < BATCH {
            return Ok(());
        }
    }
}

/// Adds one entry; false when the reply is full.
fn add_plus(shared: &Shared, entry: &Listed, reply: &mut ReplyDirectoryPlus) -> bool {
    let ttl = shared.options.timeout;
    let dots = entry.name == "." || entry.name == "..";
    if dots {
        let attr = bare_attr(entry.ino, dirent_type(entry.kind));
        let zero = Generation(0);
        return !reply.add(
            INodeNo(entry.ino),
            entry.cookie,
            &entry.name,
            &ttl,
            &attr,
            zero,
        );
    }
    // An entry that went away since it was listed is left out.
    let Ok(attr) = shared.fs.lookup_ino(entry.ino) else {
        return true;
    };
    let generation = Generation(attr.generation);
    let (ino, attr) = (INodeNo(attr.ino), shared.file_attr(&attr));
    let full = reply.add(ino, entry.cookie, &entry.name, &ttl, &attr, generation);
    if full {
        shared.fs.forget(entry.ino, 1);
    }
    !full
}
