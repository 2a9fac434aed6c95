//! Giving free space back to the devices: FITRIM, and the mount option `discard`.
//!
//! A block that is being discarded cannot be handed out: it is taken out of the free space and put
//! back when the devices know. Only space that is free in the durable state is discarded: what a
//! group freed becomes free after its commit, and after its readers are gone.

use braidfs_blockdev::{BLOCK_SIZE, ErrorKind, VolBlock};

use crate::Errno;
use crate::alloc::SpaceLog;
use crate::filesystem::FileSystem;

/// Blocks that are with the devices at a time: 1 GiB.
const STEP_BLOCKS: u64 = 1 << 18;

impl FileSystem {
    /// FITRIM: discards free space in the byte range `start..start + len` of the volume, in runs of
    /// at least `min_len` bytes. Returns how many bytes. Space that is in no chunk yet has no place
    /// in the volume and is left alone, as is what was freed and is not committed.
    pub fn trim(&self, start: u64, len: u64, min_len: u64) -> Result<u64, Errno> {
        self.check_writable()?;
        if len < BLOCK_SIZE || start / BLOCK_SIZE >= self.statfs().blocks {
            return Err(Errno::INVAL);
        }
        let from = start.div_ceil(BLOCK_SIZE);
        let to = (start.saturating_add(len) / BLOCK_SIZE).min(self.space.end());
        let least = min_len.div_ceil(BLOCK_SIZE).max(1);
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
            self.space.end_trim(first, count);
            match done {
                Ok(()) => trimmed += count * BLOCK_SIZE,
                Err(ErrorKind::Os(libc::EOPNOTSUPP)) => return Err(Errno::NOTSUP),
                Err(error) => {
                    log::warn!("discarding blocks {first}+{count}: {error:?}");
                    return Err(Errno::IO);
                }
            }
        }
        Ok(trimmed)
    }

    /// Discards what a durable group freed, before it can be handed out. Best effort.
    pub(crate) fn discard_freed(&self, log: &SpaceLog) {
        let freed = log.freed().iter();
        let ranges: Vec<_> = freed.map(|&(start, len)| (VolBlock(start), len)).collect();
        if let Err(error) = self.volume.discard_wait(&ranges) {
            log::debug!("discarding freed blocks: {error:?}");
        }
    }
}
