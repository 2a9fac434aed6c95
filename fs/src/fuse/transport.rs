//! The transport without a file system behind it: requests come to a function of yours, which
//! answers each on the same thread. For servers that show what FUSE itself costs
//! (`null.rs`); braidfs's own mounts go through `session.rs`.
//!
//! It is what braidfs uses: the same INIT, one descriptor for each thread, payloads at page
//! borders, a reply in one writev(2). What is not here is what braidfs adds for each request: the
//! table of unanswered requests, and statistics.
//!
//! ```no_run
//! # fn example(spec: &braidfs::fuse::MountSpec) -> Result<(), braidfs::fuse::AttachError> {
//! use braidfs::fuse::{CacheMode, transport};
//! transport::serve(spec, CacheMode::Direct, 4, |request| request.fail(libc::ENOSYS))
//! # }
//! ```

use std::sync::Arc;
use std::thread;

use log::{debug, warn};
use nix::errno::Errno;

use super::attach::{self, AttachError, MountSpec, Unmount};
use super::attr::{BLKSIZE_DIRECT, attr_out, entry_out, negative_entry_out};
use super::channel::{Channel, Received, RequestBuffer};
pub use super::dir::Listing;
use super::init::{InitError, handshake};
pub use super::protocol::{Args, Malformed, Opcode, REQUEST_BYTES_MAX, open_reply};
use super::protocol::{InHeader, Out};
use super::session::{own_channel, tune_kernel_cache};
use super::{CacheMode, TIMEOUT_DEFAULT, mounts};
use crate::Attr;

/// Mounts, and has `handler` answer requests on `threads` threads until the file system is
/// unmounted. The handler may keep nothing of a request: its bytes are overwritten by the next.
pub fn serve(
    spec: &MountSpec,
    cache_mode: CacheMode,
    threads: usize,
    handler: impl Fn(Request<'_>) + Sync,
) -> Result<(), AttachError> {
    let channel = Arc::new(Channel::new(attach::attach(spec)?));
    let served = begin(spec, cache_mode, &channel).and_then(|()| {
        thread::scope(|scope| {
            let workers: Vec<_> = (1..threads)
                .map(|_| scope.spawn(|| answer_all(&own_channel(&channel), &handler)))
                .collect();
            let mut served = answer_all(&channel, &handler);
            for worker in workers {
                served = served.and(worker.join().unwrap_or(Err(Errno::EIO)));
            }
            served.map_err(InitError::System)
        })
    });
    if served.is_err() {
        let undone = attach::unmount(&spec.mount_point, Unmount::Lazy);
        debug!("unmounted after a failure: {undone:?}");
    }
    Ok(served?)
}

fn begin(spec: &MountSpec, cache_mode: CacheMode, channel: &Channel) -> Result<(), InitError> {
    handshake(channel, cache_mode)?;
    if let Ok(Some(entry)) = mounts::mount_at(&spec.mount_point) {
        tune_kernel_cache(entry.dev);
    }
    Ok(())
}

fn answer_all(channel: &Channel, handler: &impl Fn(Request<'_>)) -> Result<(), Errno> {
    let mut buffer = RequestBuffer::new();
    loop {
        let len = match channel.receive(&mut buffer)? {
            Received::Request(len) => len,
            Received::Ended => return Ok(()),
        };
        let Ok((header, args)) = InHeader::split(buffer.request(len).0, 0) else {
            warn!("a request of {len} bytes is no request");
            continue;
        };
        handler(Request {
            channel,
            header,
            args,
        });
    }
}

/// A request to answer. Its replies consume it; one that the kernel does not take (because its
/// caller was killed) is forgotten. A request that is dropped is never answered: do that to FORGET,
/// BATCH_FORGET and INTERRUPT only.
pub struct Request<'a> {
    channel: &'a Channel,
    header: InHeader,
    /// What comes behind the header, field by field.
    pub args: Args<'a>,
}

impl Request<'_> {
    /// What is asked for; `None` for something that braidfs does not know either.
    pub fn opcode(&self) -> Option<Opcode> {
        Opcode::from_wire(self.header.opcode)
    }

    /// The inode it is about.
    pub fn ino(&self) -> u64 {
        self.header.nodeid
    }

    /// User and group that ask.
    pub fn ids(&self) -> (u32, u32) {
        (self.header.uid, self.header.gid)
    }

    /// Answers with an errno, or 0 for success with nothing more to say.
    pub fn fail(self, errno: i32) {
        let sent = self.channel.send_error(self.header.unique, errno);
        log_refused(sent);
    }

    /// Answers with bytes.
    pub fn bytes(self, payload: &[u8]) {
        log_refused(self.channel.send(self.header.unique, payload));
    }

    /// Answers a LOOKUP, MKNOD and their like: an inode, or none of that name. The kernel may
    /// believe either for a day.
    pub fn entry(self, found: Option<&Attr>) {
        let out = match found {
            Some(attr) => entry_out(attr, TIMEOUT_DEFAULT, BLKSIZE_DIRECT),
            None => negative_entry_out(TIMEOUT_DEFAULT),
        };
        self.bytes(out.as_slice());
    }

    /// Answers a GETATTR or SETATTR.
    pub fn attr(self, attr: &Attr) {
        self.bytes(attr_out(attr, TIMEOUT_DEFAULT, BLKSIZE_DIRECT).as_slice());
    }

    /// Answers an OPEN, with flags of [`open_reply`].
    pub fn opened(self, handle: u64, flags: u32) {
        self.bytes(Out::default().u64(handle).u32(flags).u32(0).as_slice());
    }

    /// Answers a CREATE, likewise.
    pub fn created(self, attr: &Attr, handle: u64, flags: u32) {
        let entry = entry_out(attr, TIMEOUT_DEFAULT, BLKSIZE_DIRECT);
        let out = entry.u64(handle).u32(flags).u32(0);
        self.bytes(out.as_slice());
    }

    /// Answers a WRITE: so many bytes were taken.
    pub fn written(self, bytes: u32) {
        self.bytes(Out::default().u32(bytes).u32(0).as_slice());
    }

    /// Answers a READDIR or READDIRPLUS.
    pub fn listing(self, listing: &Listing) {
        self.bytes(&listing.bytes);
    }

    /// Answers a STATFS: `blocks` free blocks of 4 KiB, and as many inodes.
    pub fn statfs(self, blocks: u64) {
        const NAME_BYTES_MAX: u32 = 255;
        let counts = (0..5).fold(Out::default(), |out, _| out.u64(blocks));
        let sizes = counts.u32(4096).u32(NAME_BYTES_MAX).u32(4096);
        self.bytes(sizes.zeros(28).as_slice());
    }
}

impl Listing {
    /// Adds an entry with its attributes, which the kernel may believe for `timeout`; there is room
    /// for it. The kernel then knows the inode once more.
    pub fn add_plus(&mut self, attr: &Attr, cookie: u64, kind: u8, name: &[u8]) {
        let head = entry_out(attr, TIMEOUT_DEFAULT, BLKSIZE_DIRECT);
        self.bytes.extend_from_slice(head.as_slice());
        self.add(attr.ino, cookie, kind, name);
    }
}

fn log_refused(sent: Result<(), Errno>) {
    if let Err(error) = sent {
        debug!("the kernel did not take an answer: {error}");
    }
}
