//! What the members can do, seen from the daemon: no FUSE, no page cache, no checksums.
//!
//! The blocks belong to a file without a name and are set aside, not written, as far as its extents
//! say. So nobody else writes them meanwhile, nothing needs their bytes to be right, and they are
//! free again when the file is gone, after a crash too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::filesystem::FileSystem;
use crate::{Cred, Errno, Ino, OpenFile, ROOT_INO};
use braidfs_blockdev::{AlignedBuf, BLOCK_SIZE, BlockError, ErrorKind, Op, VolBlock};

/// Bytes of a large transfer for each member: one device request.
const PIECE_BYTES: u64 = 1 << 20;
/// The longest large transfer.
const TRANSFER_BYTES_MAX: u64 = 16 << 20;
/// Large transfers under way at the same time.
const DEPTH: usize = 4;
/// Least to measure with.
const BYTES_MIN: u64 = 16 << 20;
/// Most to measure with.
const BYTES_MAX: u64 = 64 << 30;

/// What the members do together.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct MemberPace {
    /// Large writes with a flush at the end, bytes a second.
    pub write_bytes_per_s: f64,
    /// Large reads, bytes a second.
    pub read_bytes_per_s: f64,
    /// Reads of 4 KiB at random, one at a time, a second.
    pub random_reads_per_s: f64,
    /// Writes of 4 KiB with a flush each, one at a time, a second.
    pub syncs_per_s: f64,
}

/// A run of blocks to be written and read.
type Run = (VolBlock, u64);

impl FileSystem {
    /// Measures the members with `bytes` of free space, and `limit` for each of four steps. The
    /// space is taken for that long. `INVAL` if `bytes` is too little or too much, `BUSY` if the
    /// file system is frozen, `NOSPC` if the space is not there.
    pub fn member_pace(&self, bytes: u64, limit: Duration) -> Result<MemberPace, Errno> {
        if !(BYTES_MIN..=BYTES_MAX).contains(&bytes) {
            return Err(Errno::INVAL);
        }
        if self.frozen_for().is_some() {
            return Err(Errno::BUSY);
        }
        let cred = Cred {
            uid: 0,
            gid: 0,
            umask: 0,
            pid: std::process::id(),
            capable_immutable: false,
        };
        let flags = libc::O_RDWR | libc::O_EXCL;
        let (attr, file) = self.tmpfile(ROOT_INO, 0o600, flags, &cred)?;
        let pace = self.measure(&file, attr.ino, bytes, limit);
        self.release(&file);
        self.forget(attr.ino, 1);
        pace
    }

    fn measure(
        &self,
        file: &Arc<OpenFile>,
        ino: Ino,
        bytes: u64,
        limit: Duration,
    ) -> Result<MemberPace, Errno> {
        self.fallocate(file, 0, 0, bytes)?;
        let set_aside = {
            let _map = file.inode.map.read();
            self.extents(ino).unwritten(0, bytes / BLOCK_SIZE)?
        };
        let members = self.volume.info().devices.len() as u64;
        let longest = (members * PIECE_BYTES).min(TRANSFER_BYTES_MAX) / BLOCK_SIZE;
        let pieces = pieces(&set_aside, longest);
        let failed = |error: BlockError| {
            let name = self.volume.device_name(error.dev);
            log::error!("{name}: measuring failed: {error}; run 'braidfs scrub'");
            Errno::IO
        };
        let write = |block, buf| self.volume.write_wait(block, buf);
        let read = |block, buf| self.volume.read_wait(block, buf, None);
        let flush = || self.volume.flush_wait();
        let write_and_flush = |block, buf| {
            let buf = write(block, buf)?;
            flush().map(|()| buf)
        };
        let written = stream(&pieces, limit, write, flush).map_err(failed)?;
        let back = stream(&pieces, limit, read, || Ok(())).map_err(failed)?;
        Ok(MemberPace {
            write_bytes_per_s: written,
            read_bytes_per_s: back,
            random_reads_per_s: singles(&pieces, limit, read).map_err(failed)?,
            syncs_per_s: singles(&pieces, limit, write_and_flush).map_err(failed)?,
        })
    }
}

/// Runs of `longest` blocks at the most.
fn pieces(set_aside: &[(u64, u64, u64)], longest: u64) -> Vec<Run> {
    let mut pieces = Vec::new();
    for &(_, block, len) in set_aside {
        let mut at = 0;
        while at < len {
            let count = longest.min(len - at);
            pieces.push((VolBlock(block + at), count));
            at += count;
        }
    }
    pieces
}

/// What is done with a buffer at a place; it comes back.
trait Transfer: Fn(VolBlock, AlignedBuf) -> Result<AlignedBuf, BlockError> + Sync {}

impl<T: Fn(VolBlock, AlignedBuf) -> Result<AlignedBuf, BlockError> + Sync> Transfer for T {}

/// A buffer of so many blocks, all of it touched, and nothing that a device might leave out.
fn buffer(blocks: u64) -> AlignedBuf {
    let len = usize::try_from(blocks * BLOCK_SIZE).expect("at most the longest transfer");
    AlignedBuf::from_slice(&vec![0x5a; len])
}

/// Bytes a second of several transfers at a time, in order, until all is done or the time is over.
fn stream(
    pieces: &[Run],
    limit: Duration,
    transfer: impl Transfer,
    end: impl FnOnce() -> Result<(), BlockError>,
) -> Result<f64, BlockError> {
    let longest = pieces.iter().map(|piece| piece.1).max().unwrap_or(0);
    let buffers: Vec<AlignedBuf> = (0..DEPTH).map(|_| buffer(longest)).collect();
    let next = AtomicUsize::new(0);
    let begun = Instant::now();
    let work = |mut buf: AlignedBuf| {
        let mut bytes = 0;
        while begun.elapsed() < limit
            && let Some(&(block, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed))
        {
            if buf.len() as u64 != len * BLOCK_SIZE {
                buf = buffer(len);
            }
            buf = transfer(block, buf)?;
            bytes += len * BLOCK_SIZE;
        }
        Ok(bytes)
    };
    let work = &work;
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = buffers
            .into_iter()
            .map(|buf| scope.spawn(move || work(buf)))
            .collect();
        let results = workers.into_iter().map(|worker| {
            let aborted = BlockError {
                kind: ErrorKind::Aborted,
                op: Op::Flush,
                dev: BlockError::NO_DEVICE,
                at: 0,
            };
            worker.join().unwrap_or(Err(aborted))
        });
        results.sum::<Result<u64, BlockError>>()
    });
    let bytes = done?;
    end()?;
    Ok(bytes as f64 / begun.elapsed().as_secs_f64().max(1e-9))
}

/// Transfers of single blocks a second, one at a time, here and there.
fn singles(pieces: &[Run], limit: Duration, transfer: impl Transfer) -> Result<f64, BlockError> {
    /// Odd, and far from simple fractions of the number of pieces.
    const STRIDE: u64 = 7919;
    let count = pieces.len() as u64;
    let (mut buf, mut done) = (buffer(1), 0);
    let begun = Instant::now();
    while begun.elapsed() < limit && count > 0 {
        let nth = usize::try_from(done * STRIDE % count).expect("an index");
        let (block, len) = pieces[nth];
        buf = transfer(VolBlock(block.0 + done * STRIDE % len), buf)?;
        done += 1;
    }
    Ok(done as f64 / begun.elapsed().as_secs_f64().max(1e-9))
}
