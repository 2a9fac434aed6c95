//! What is negotiated with the kernel when the session begins.

use log::{debug, warn};
use nix::errno::Errno;

use super::CacheMode;
use super::channel::{Channel, Received, RequestBuffer};
use super::protocol::{
    InHeader, MAJOR, MINOR, MINOR_MIN, Malformed, Opcode, Out, REQUEST_BYTES_MAX, init_flags as f,
};

/// Requests that nobody waits for (readahead, write-back, asynchronous direct I/O) under way.
const BACKGROUND_MAX: u16 = 64;
/// From how many of them on the kernel calls the connection congested.
const CONGESTION: u16 = 48;
/// Times are exact to the nanosecond.
const TIME_GRANULARITY: u32 = 1;

/// What braidfs uses of what the kernel can offer.
///
/// Left out on purpose: POSIX_LOCKS and FLOCK_LOCKS (the kernel keeps locks itself),
/// ATOMIC_O_TRUNC (a running program's file would be cut before the kernel refuses to open it),
/// AUTO_INVAL_DATA (nobody else changes files), SPLICE_* (pages are read and written as they lie),
/// CREATE_SUPP_GROUP (the kernel has settled the set-group-id bit before it asks).
const WANTED: u64 = f::ASYNC_READ
    | f::EXPORT_SUPPORT
    | f::BIG_WRITES
    | f::DONT_MASK
    | f::HAS_IOCTL_DIR
    | f::DO_READDIRPLUS
    | f::READDIRPLUS_AUTO
    | f::ASYNC_DIO
    | f::PARALLEL_DIROPS
    | f::POSIX_ACL
    | f::MAX_PAGES
    | f::CACHE_SYMLINKS
    | f::HANDLE_KILLPRIV_V2
    | f::SETXATTR_EXT
    | f::INIT_EXT
    | f::DIRECT_IO_ALLOW_MMAP;

/// Why a session could not begin.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The kernel's first request did not come.
    #[error("the kernel does not begin the session: {0}")]
    System(#[from] Errno),
    /// The mount went away first.
    #[error("unmounted before the session began")]
    Ended,
    /// What came is not how a session begins.
    #[error("the kernel begins with something else than INIT")]
    Unexpected,
    /// Too old a kernel.
    #[error(
        "the kernel speaks version {0}.{1} of the FUSE protocol; \
         braidfs needs {MAJOR}.{MINOR_MIN} (Linux 5.4) or newer"
    )]
    Version(u32, u32),
}

impl From<Malformed> for InitError {
    fn from(_: Malformed) -> Self {
        Self::Unexpected
    }
}

/// Waits for INIT and answers it.
pub(super) fn handshake(channel: &Channel, cache_mode: CacheMode) -> Result<(), InitError> {
    let mut buffer = RequestBuffer::new();
    loop {
        let len = match channel.receive(&mut buffer)? {
            Received::Request(len) => len,
            Received::Ended => return Err(InitError::Ended),
        };
        let (header, mut args) = InHeader::split(buffer.request(len).0, 0)?;
        if Opcode::from_wire(header.opcode) != Some(Opcode::Init) {
            return Err(InitError::Unexpected);
        }
        let (major, minor) = (args.u32()?, args.u32()?);
        if major > MAJOR {
            // It asks again, in a version that both know.
            channel.send(
                header.unique,
                Out::default().u32(MAJOR).u32(MINOR).as_slice(),
            )?;
            continue;
        }
        if major < MAJOR || minor < MINOR_MIN {
            channel.send_error(header.unique, libc::EPROTO)?;
            return Err(InitError::Version(major, minor));
        }
        let (readahead, flags) = (args.u32()?, u64::from(args.u32()?));
        // Kernels before 5.17 end here.
        let offered = if flags & f::INIT_EXT != 0 {
            flags | u64::from(args.u32()?) << 32
        } else {
            flags
        };
        let out = answer(offered, readahead, cache_mode);
        return Ok(channel.send(header.unique, out.as_slice())?);
    }
}

/// `struct fuse_init_out`.
fn answer(offered: u64, readahead: u32, cache_mode: CacheMode) -> Out {
    let wanted = match cache_mode {
        CacheMode::Auto | CacheMode::Direct => WANTED,
        CacheMode::Kernel => WANTED | f::WRITEBACK_CACHE,
    };
    let flags = offered & wanted;
    if wanted & !offered != 0 {
        debug!("the kernel does not offer {:#x}", wanted & !offered);
    }
    if cache_mode != CacheMode::Kernel && flags & f::DIRECT_IO_ALLOW_MMAP == 0 {
        warn!(
            "this kernel refuses shared mmap without its write-back cache; use -o writeback_cache"
        );
    }
    let [low, high] = [flags, flags >> 32].map(|half| (half & u64::from(u32::MAX)) as u32);
    let request_max = u32::try_from(REQUEST_BYTES_MAX).unwrap_or(u32::MAX);
    let max_pages = u16::try_from(REQUEST_BYTES_MAX / 4096).unwrap_or(u16::MAX);
    Out::default()
        .u32(MAJOR)
        .u32(MINOR)
        // What its bdi is set to; the session raises that afterwards.
        .u32(readahead.min(request_max))
        .u32(low)
        .u16(BACKGROUND_MAX)
        .u16(CONGESTION)
        .u32(request_max)
        .u32(TIME_GRANULARITY)
        .u16(max_pages)
        .u16(0)
        .u32(high)
        .zeros(28)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_and_wanted_is_taken() {
        let out = answer(u64::MAX, 4096, CacheMode::Direct);
        let bytes = out.as_slice();
        assert_eq!(bytes.len(), 64);
        let word = |at: usize| u64::from(bytes[at + 2]) << 16 | u64::from(bytes[at]);
        assert_eq!(word(12), WANTED & 0x00ff_00ff);
        let cached = answer(u64::MAX, 4096, CacheMode::Kernel);
        assert_eq!(cached.as_slice()[14] & 1, 1, "write-back cache");
        let nothing = answer(0, 4096, CacheMode::Kernel);
        assert_eq!(&nothing.as_slice()[12..16], [0; 4]);
    }
}
