//! What is negotiated with the kernel when the session begins.

use fuser::{InitFlags, KernelConfig};
use log::{debug, warn};

use super::{ACL_SUPPORTED, CacheMode};

/// Largest READ and WRITE: 256 pages, the kernel's default limit (fs.fuse.max_pages_limit).
const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// Requests that nobody waits for (readahead, write-back, asynchronous direct I/O) under way.
const BACKGROUND_MAX: u16 = 64;

/// Asks for what braidfs can use of what the kernel offers.
///
/// Left out on purpose: POSIX_LOCKS and FLOCK_LOCKS (the kernel keeps locks itself), SETXATTR_EXT
/// (fuser does not know its longer header), SPLICE_* (fuser reads and writes),
/// AUTO_INVAL_DATA (nobody else changes files).
pub(super) fn negotiate(config: &mut KernelConfig, cache_mode: CacheMode) {
    let mut wanted = vec![
        InitFlags::FUSE_ASYNC_READ,
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_BIG_WRITES,
        InitFlags::FUSE_MAX_PAGES,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_DO_READDIRPLUS,
        InitFlags::FUSE_READDIRPLUS_AUTO,
        InitFlags::FUSE_ATOMIC_O_TRUNC,
        InitFlags::FUSE_EXPORT_SUPPORT,
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        InitFlags::FUSE_CACHE_SYMLINKS,
        InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    ];
    if ACL_SUPPORTED {
        wanted.extend([InitFlags::FUSE_POSIX_ACL, InitFlags::FUSE_DONT_MASK]);
    }
    if cache_mode == CacheMode::Kernel {
        wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
    }
    for flag in wanted {
        if config.add_capabilities(flag).is_err() {
            match flag {
                InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP => {
                    warn!("this kernel refuses shared mmap with direct_io; use -o writeback_cache");
                }
                _ => debug!("the kernel does not offer {flag:?}"),
            }
        }
    }
    if let Err(nearest) = config.set_max_write(REQUEST_BYTES_MAX) {
        debug!("max_write {nearest}");
    }
    // The kernel offers what its bdi is set to; ask for all of it up to one request.
    if let Err(offered) = config.set_max_readahead(REQUEST_BYTES_MAX)
        && config.set_max_readahead(offered).is_err()
    {
        debug!("no readahead offered");
    }
    if config.set_max_background(BACKGROUND_MAX).is_err() {
        debug!("max_background stays as it was");
    }
}
