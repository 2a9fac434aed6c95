//! READDIR and READDIRPLUS.
//!
//! Cookies are the core's: they stay valid while other entries come and go. READDIRPLUS counts one
//! lookup for each entry that it hands to the kernel, except "." and ".."; the kernel forgets them
//! one by one later. The core lists entries first and looks them up after, so that it is never
//! called back from inside its own listing.

use super::Shared;
use super::attr::{ENTRY_BYTES, entry_out};
use super::dispatch::{Parsed, Request};
use super::protocol::{Malformed, Out, REQUEST_BYTES_MAX};
use crate::{Errno, Ino};

/// Entries listed at a time for READDIRPLUS: about what fits into one page of reply.
const BATCH: usize = 24;

/// Bytes of `struct fuse_dirent` before the name.
const DIRENT_BYTES: usize = 24;

/// The reply to a READDIR or READDIRPLUS, which fills up.
pub struct Listing {
    pub(super) bytes: Vec<u8>,
    size: usize,
}

impl Listing {
    /// A listing of at most `size` bytes.
    pub fn new(size: u32) -> Self {
        let size = (size as usize).min(REQUEST_BYTES_MAX);
        Self {
            bytes: Vec::with_capacity(size),
            size,
        }
    }

    /// Whether there is room for an entry, with its attributes ([`Listing::add_plus`]) or without.
    pub fn has_room(&self, plus: bool, name: &[u8]) -> bool {
        self.fits(if plus { ENTRY_BYTES } else { 0 }, name)
    }

    fn fits(&self, extra: usize, name: &[u8]) -> bool {
        let len = (DIRENT_BYTES + name.len()).next_multiple_of(8);
        self.bytes.len() + extra + len <= self.size
    }

    /// Adds an entry; there is room for it.
    pub fn add(&mut self, ino: Ino, cookie: u64, kind: u8, name: &[u8]) {
        let len = u32::try_from(name.len()).unwrap_or(0);
        let head = Out::default().u64(ino).u64(cookie).u32(len);
        self.bytes
            .extend_from_slice(head.u32(u32::from(kind)).as_slice());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }
}

/// The arguments of both: where to go on, and how much fits.
fn arguments(request: &mut Request<'_>) -> Result<(u64, u32), Malformed> {
    request.args.skip(8)?; // handle
    Ok((request.args.u64()?, request.args.u32()?))
}

/// READDIR.
pub(super) fn readdir(mut request: Request<'_>) -> Parsed {
    let (after, size) = arguments(&mut request)?;
    let mut listing = Listing::new(size);
    let ino = request.header.nodeid;
    let result = request.shared.fs.readdir(ino, after, &mut |entry| {
        let fits = listing.fits(0, entry.name);
        if fits {
            listing.add(entry.ino, entry.cookie, entry.kind, entry.name);
        }
        fits
    });
    request.reply.bytes(result.map(|()| listing.bytes));
    Ok(())
}

/// READDIRPLUS.
pub(super) fn readdirplus(mut request: Request<'_>) -> Parsed {
    let (after, size) = arguments(&mut request)?;
    let mut listing = Listing::new(size);
    let result = list_plus(request.shared, request.header.nodeid, after, &mut listing);
    request.reply.bytes(result.map(|()| listing.bytes));
    Ok(())
}

/// A listed entry, copied out of the core.
struct Listed {
    ino: Ino,
    kind: u8,
    name: Vec<u8>,
    cookie: u64,
}

/// Fills a listing with entries and their attributes. An error after the first entries ends it
/// early; the kernel asks again from there and gets to see it.
fn list_plus(shared: &Shared, ino: Ino, after: u64, listing: &mut Listing) -> Result<(), Errno> {
    let mut after = after;
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        batch.clear();
        let listed = shared.fs.readdir(ino, after, &mut |entry| {
            batch.push(Listed {
                ino: entry.ino,
                kind: entry.kind,
                name: entry.name.to_vec(),
                cookie: entry.cookie,
            });
            batch.len() < BATCH
        });
        match listed {
            Err(_) if !listing.bytes.is_empty() => return Ok(()),
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        for entry in &batch {
            if !listing.fits(ENTRY_BYTES, &entry.name) {
                return Ok(());
            }
            add_plus(shared, entry, listing);
            after = entry.cookie;
        }
        if batch.len() < BATCH {
            return Ok(());
        }
    }
}

/// Adds one entry, if it is still there.
fn add_plus(shared: &Shared, entry: &Listed, listing: &mut Listing) {
    let dots = entry.name == b"." || entry.name == b"..";
    let head = if dots {
        // No node: the kernel does not look these up.
        Out::default().zeros(ENTRY_BYTES)
    } else {
        match shared.fs.lookup_ino(entry.ino) {
            Ok(attr) => entry_out(&attr, shared.options.timeout, shared.blksize()),
            Err(_) => return,
        }
    };
    listing.bytes.extend_from_slice(head.as_slice());
    listing.add(entry.ino, entry.cookie, entry.kind, &entry.name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_never_beyond_the_size() {
        let mut listing = Listing::new(100);
        assert!(listing.fits(0, b"name"));
        listing.add(5, 6, 8, b"name");
        assert_eq!(listing.bytes.len(), 32);
        assert_eq!(&listing.bytes[24..29], b"name\0");
        assert!(listing.fits(0, &[b'x'; 40]));
        assert!(!listing.fits(0, &[b'x'; 41]));
        assert!(!listing.fits(ENTRY_BYTES, b"x"));
    }
}
