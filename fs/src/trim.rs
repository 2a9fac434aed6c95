//! Giving free space back to the devices: FITRIM, and the mount option `discard`.
//!
//! A block that is being discarded cannot be handed out: it is taken out of the free space and put
//! back when the devices know. Only space that is free in the durable state is discarded: what a
//! group freed becomes free after its commit, and after its readers are gone.

use braidfs_blockdev::{BLOCK_SIZE, DiscardError, ErrorKind, VolBlock};

use crate::Errno;
use crate::alloc::SpaceLog;
use crate::filesystem::FileSystem;

/// Blocks that are with the devices at a time: 1 GiB.
const STEP_BLOCKS: u64 = 1 << 18;

fn refused(what: &str, first: u64, count: u64, kind: ErrorKind) -> Errno {
    if kind == ErrorKind::Os(libc::EOPNOTSUPP) {
        return Errno::NOTSUP;
    }
    log::warn!("discarding {what} {first}+{count}: {kind}");
    Errno::IO
}

impl FileSystem {
    /// FITRIM: discards free space in the byte range `start..start + len` of the volume, in runs of
    /// at least `min_len` bytes. Returns how many bytes. The blocks of chunks come first, as they
    /// are numbered, and then the space that is in no chunk, without the reserve of metadata. What
    /// was freed and is not committed is left alone.
    pub fn trim(&self, start: u64, len: u64, min_len: u64) -> Result<u64, Errno> {
        self.check_writable()?;
        let (chunks_end, space) = (self.space.end(), self.space.stats());
        // As much as statfs calls free.
        let unallocated = space.unallocated_blocks.saturating_sub(space.float_blocks);
        let end = chunks_end + unallocated;
        if len < BLOCK_SIZE || start / BLOCK_SIZE >= end {
            return Err(Errno::INVAL);
        }
        let from = start.div_ceil(BLOCK_SIZE);
        let to = (start.saturating_add(len) / BLOCK_SIZE).min(end);
        let least = min_len.div_ceil(BLOCK_SIZE).max(1);
        let trimmed = self.trim_chunks(from, to.min(chunks_end), least)?;
        let beyond = |block: u64| block.saturating_sub(chunks_end);
        Ok(trimmed + self.trim_unallocated(beyond(from), beyond(to), least)?)
    }

    fn trim_unallocated(&self, from: u64, to: u64, least: u64) -> Result<u64, Errno> {
        if to.saturating_sub(from) < least {
            return Ok(0);
        }
        let (mut at, mut trimmed) = (from, 0);
        while at < to {
            let next = (at + STEP_BLOCKS).min(to);
            let done = self
                .volume
                .discard_unallocated(at * BLOCK_SIZE, next * BLOCK_SIZE);
            trimmed +=
                done.map_err(|error| refused("space in no chunk", at, next - at, error.kind))?;
            at = next;
        }
        Ok(trimmed)
    }

    /// Discards free blocks in `from..to`, in runs of at least `least`.
    fn trim_chunks(&self, from: u64, to: u64, least: u64) -> Result<u64, Errno> {
        let (mut at, mut trimmed) = (from, 0);
        // A rest that is shorter than `least` belongs to the run of the step before.
        let most = STEP_BLOCKS.max(least);
        let mut run_end = 0;
        while at < to {
            let goes_on = if at == run_end { 1 } else { least };
            let Some((first, count)) = self.space.begin_trim(at, to, goes_on, most) else {
                break;
            };
            at = first + count;
            if goes_on < least && first != run_end && count < least {
                self.space.end_trim(first, count);
                continue;
            }
            run_end = if count == most { at } else { 0 };
            let done = self.volume.discard_wait(&[(VolBlock(first), count)]);
            if let Err(error) = &done {
                self.doubt_all(&[(first, count)], error);
            }
            self.space.end_trim(first, count);
            done.map_err(|error| refused("blocks", first, count, error.kind))?;
            trimmed += count * BLOCK_SIZE;
        }
        Ok(trimmed)
    }

    /// Discards what a durable group freed, before it can be handed out. Best effort.
    pub(crate) fn discard_freed(&self, log: &SpaceLog) {
        let freed = log.freed().iter();
        let ranges: Vec<_> = freed.map(|&(start, len)| (VolBlock(start), len)).collect();
        if let Err(error) = self.volume.discard_wait(&ranges) {
            log::debug!("discarding freed blocks: {}", error.kind);
            self.doubt_all(log.freed(), &error);
        }
    }

    /// Which of the ranges a device may still discard is not known.
    fn doubt_all(&self, ranges: &[(u64, u64)], error: &DiscardError) {
        for in_doubt in &error.in_doubt {
            for &(start, len) in ranges {
                self.space.doubt(start, len, in_doubt.clone());
            }
        }
    }
}
