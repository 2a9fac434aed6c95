//! One way to the kernel: a descriptor of the connection, from which requests are read and to
//! which their replies go.
//!
//! A request must be answered through the descriptor that it was read from. Replies come from any
//! thread: one writev(2) each, straight from the pages that they carry.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use braidfs_cache::FrameVec;
use log::debug;
use nix::errno::Errno;
use nix::sys::uio::{readv, writev};
use smallvec::SmallVec;

use super::protocol::{
    InHeader, NOTIFY_INVAL_INODE, Out, REQUEST_BYTES_MAX, WRITE_HEADERS, notify_header, out_header,
};

/// Pieces of a reply that need no allocation: its header, and 1 MiB in single pages that does not
/// begin at a page border.
const PIECES: usize = 1 + REQUEST_BYTES_MAX / PAGE + 1;
const PAGE: usize = 4096;

/// Pieces of a reply.
pub(super) type Pieces<'a> = SmallVec<[IoSlice<'a>; PIECES]>;

/// A descriptor of the connection.
pub(super) struct Channel(OwnedFd);

/// What a read brought.
pub(super) enum Received {
    /// A request of that many bytes.
    Request(usize),
    /// The connection has ended: unmounted, or aborted.
    Ended,
}

impl Channel {
    pub(super) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// The descriptor, to clone it.
    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.0
    }

    /// Waits for the next request.
    pub(super) fn receive(&self, buffer: &mut RequestBuffer) -> Result<Received, Errno> {
        loop {
            match buffer.fill(self.0.as_fd()) {
                Ok(len) => return Ok(Received::Request(len)),
                // ENOENT: the request was taken back while it was handed over.
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => {}
                Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(Received::Ended),
                Err(error) => return Err(error),
            }
        }
    }

    /// Answers a request with an errno, or 0 for success without anything more.
    pub(super) fn send_error(&self, unique: u64, error: i32) -> Result<(), Errno> {
        self.write(&[IoSlice::new(out_header(unique, error, 0).as_slice())])
    }

    /// Answers a request with bytes.
    pub(super) fn send(&self, unique: u64, payload: &[u8]) -> Result<(), Errno> {
        let header = out_header(unique, 0, payload.len());
        self.write(&[IoSlice::new(header.as_slice()), IoSlice::new(payload)])
    }

    /// Answers a request with bytes in pieces, `len` of them in all.
    pub(super) fn send_pieces<'a>(
        &self,
        unique: u64,
        len: usize,
        payload: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), Errno> {
        let header = out_header(unique, 0, len);
        let mut pieces = Pieces::new();
        pieces.push(IoSlice::new(header.as_slice()));
        for piece in payload {
            pieces.push(IoSlice::new(piece));
        }
        self.write(&pieces)
    }

    /// Has the kernel forget the attributes of an inode; its pages stay.
    pub(super) fn forget_attributes(&self, nodeid: u64) -> Result<(), Errno> {
        const NO_PAGES: i64 = -1;
        self.invalidate(nodeid, NO_PAGES, 0)
    }

    /// Has the kernel forget `len` bytes (`TO_THE_END`) of pages, and the attributes, of an inode;
    /// dirty pages come as WRITE requests first. Waits for reads and writes of
    /// these pages that are under way, so nobody may wait for the caller to serve those.
    pub(super) fn forget_pages(&self, nodeid: u64, offset: u64, len: u64) -> Result<(), Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let len = i64::try_from(len).map_err(|_| Errno::EINVAL)?;
        self.invalidate(nodeid, offset, len)
    }

    fn invalidate(&self, nodeid: u64, offset: i64, len: i64) -> Result<(), Errno> {
        let body = Out::default().u64(nodeid).i64(offset).i64(len);
        let header = notify_header(NOTIFY_INVAL_INODE, body.as_slice().len());
        self.write(&[
            IoSlice::new(header.as_slice()),
            IoSlice::new(body.as_slice()),
        ])
    }

    fn write(&self, pieces: &[IoSlice<'_>]) -> Result<(), Errno> {
        match writev(self.0.as_fd(), pieces) {
            Ok(_) => Ok(()),
            Err(error) => {
                // ENOENT: nobody waits for this reply any more.
                debug!("a reply was not taken: {error}");
                Err(error)
            }
        }
    }
}

/// The length of all pages from an offset on.
pub(super) const TO_THE_END: u64 = 0;

/// Where a thread reads requests: the payload of a WRITE to a page border, and, where the cache
/// gave a page to land on, into the very memory that it may then take over.
pub(super) struct RequestBuffer {
    memory: Vec<u8>,
    /// Where requests begin in `memory`.
    start: usize,
    landing: Option<FrameVec>,
    /// The request that was read last has its payload in `landing`.
    is_landed: bool,
}

impl RequestBuffer {
    pub(super) fn new() -> Self {
        let memory = vec![0; 2 * PAGE + REQUEST_BYTES_MAX];
        let payload = memory.as_ptr().align_offset(PAGE);
        // Room for the headers in front; a vector cannot be so oddly placed that there is no
        // aligned byte within a page.
        let payload = if payload >= WRITE_HEADERS {
            payload
        } else {
            payload + PAGE
        };
        let start = payload.saturating_sub(WRITE_HEADERS);
        Self {
            memory,
            start,
            landing: None,
            is_landed: false,
        }
    }

    /// Takes a piece of `REQUEST_BYTES_MAX` for payloads, if the last one was taken away.
    pub(super) fn land_on(&mut self, alloc: impl FnOnce() -> Option<FrameVec>) {
        if self.landing.is_none() {
            self.landing = alloc().filter(|frames| frames.len() == REQUEST_BYTES_MAX);
        }
    }

    /// Gives that piece back.
    pub(super) fn land_nowhere(&mut self) {
        self.landing = None;
    }

    /// Reads one request; gives its length.
    fn fill(&mut self, from: BorrowedFd<'_>) -> Result<usize, Errno> {
        self.is_landed = false;
        let memory = &mut self.memory[self.start..];
        let (head, rest) = memory.split_at_mut(WRITE_HEADERS);
        let Some(payload) = self.landing.as_mut().and_then(|to| to.slices_mut().next()) else {
            let space = &mut self.memory[self.start..][..WRITE_HEADERS + REQUEST_BYTES_MAX];
            return nix::unistd::read(from, space);
        };
        let len = readv(from, &mut [IoSliceMut::new(head), IoSliceMut::new(payload)])?;
        if let Some(behind) = len.checked_sub(WRITE_HEADERS) {
            self.is_landed = InHeader::is_write(head);
            if !self.is_landed {
                rest[..behind].copy_from_slice(&payload[..behind]);
            }
        }
        Ok(len)
    }

    /// The request of `len` bytes that was read last; of a WRITE whose payload lies apart, what is
    /// in front of that, and the payload.
    pub(super) fn request(&mut self, len: usize) -> (&[u8], Option<Landed<'_>>) {
        let memory = &self.memory[self.start..];
        if !self.is_landed {
            return (&memory[..len], None);
        }
        let landed = Landed {
            pages: &mut self.landing,
            len: len - WRITE_HEADERS,
        };
        (&memory[..WRITE_HEADERS], Some(landed))
    }
}

/// The payload of a WRITE, at the beginning of pages that may be taken away.
pub(super) struct Landed<'a> {
    pub pages: &'a mut Option<FrameVec>,
    /// Bytes.
    pub len: usize,
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

    use super::*;

    #[test]
    fn payloads_lie_at_page_borders() {
        for _ in 0..8 {
            let mut buffer = RequestBuffer::new();
            let (request, _) = buffer.request(WRITE_HEADERS + REQUEST_BYTES_MAX);
            let payload = request[WRITE_HEADERS..].as_ptr();
            assert_eq!(payload.align_offset(PAGE), 0);
        }
    }

    #[test]
    fn payloads_of_writes_land_and_other_requests_are_in_one_piece() {
        let bench = super::super::bench::Bench::new();
        let (ours, kernel) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let channel = Channel::new(ours);
        let mut buffer = RequestBuffer::new();
        let payload: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
        for (opcode, lands) in [(16, true), (21, false)] {
            for len in [0, 1, WRITE_HEADERS, WRITE_HEADERS + 1, payload.len()] {
                buffer.land_on(|| bench.shared.fs.alloc_landing());
                let head = Out::default().u32(0).u32(opcode);
                let mut request = head.as_slice().to_vec();
                request.extend_from_slice(&payload);
                request.truncate(len);
                nix::sys::socket::send(kernel.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
                let Ok(Received::Request(received)) = channel.receive(&mut buffer) else {
                    panic!("no request of {len} bytes");
                };
                assert_eq!(received, len);
                let (bytes, landed) = buffer.request(len);
                let apart = landed.as_ref().map_or(0, |landed| landed.len);
                assert_eq!(apart > 0, lands && len > WRITE_HEADERS, "{len} bytes");
                let tail = landed.and_then(|landed| landed.pages.take());
                let tail = tail.as_ref().and_then(FrameVec::as_single).unwrap_or(&[]);
                assert!([bytes, &tail[..apart]].concat() == request, "{len} bytes");
            }
        }
        drop(buffer);
        bench.shared.fs.unmount().unwrap();
    }

    #[test]
    fn a_reply_goes_out_in_one_piece() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let channel = Channel::new(write);
        let pieces = [&b"one"[..], b"two"];
        channel.send_pieces(5, 6, pieces.into_iter()).unwrap();
        let mut bytes = [0; 64];
        assert_eq!(nix::unistd::read(read.as_fd(), &mut bytes), Ok(22));
        assert_eq!(&bytes[16..22], b"onetwo");
    }
}
