//! For callers that have nothing better to do than to wait.

use super::types::Class;
use super::{Plug, Volume};
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::{Completion, Kiobuf};
use crate::pages::AlignedBuf;
use crate::units::VolBlock;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// Bound on the wait for one transfer or flush.
const IO_WAIT_MAX: Duration = Duration::from_secs(120);

impl Volume {
    /// [`Self::flush`], waiting.
    pub fn flush_wait(&self) -> Result<(), BlockError> {
        let (to, from) = sync_channel(1);
        self.flush(Box::new(move |result| to.send(result).unwrap_or_default()));
        let (dev, at) = (BlockError::NO_DEVICE, 0);
        let late = BlockError {
            kind: ErrorKind::TimedOut,
            op: Op::Flush,
            dev,
            at,
        };
        from.recv_timeout(IO_WAIT_MAX).unwrap_or(Err(late))
    }

    /// Reads and waits; the buffer comes back full.
    pub fn read_wait(
        &self,
        at: VolBlock,
        buf: AlignedBuf,
        copy: Option<u8>,
    ) -> Result<AlignedBuf, BlockError> {
        self.transfer_wait(Op::Read, at, buf, |plug, kiobuf| {
            plug.read(at, kiobuf, copy, Class::Sync);
        })
    }

    /// Writes and waits; durable only after a flush.
    pub fn write_wait(&self, at: VolBlock, buf: AlignedBuf) -> Result<AlignedBuf, BlockError> {
        self.transfer_wait(Op::Write, at, buf, |plug, kiobuf| {
            plug.write(at, kiobuf, Class::Sync);
        })
    }

    /// Writes one copy of mirrored blocks and waits; see [`Plug::write_copy`].
    pub fn write_copy_wait(
        &self,
        at: VolBlock,
        buf: AlignedBuf,
        copy: u8,
    ) -> Result<AlignedBuf, BlockError> {
        self.transfer_wait(Op::Write, at, buf, |plug, kiobuf| {
            plug.write_copy(at, kiobuf, copy, Class::Sync);
        })
    }

    fn transfer_wait(
        &self,
        op: Op,
        at: VolBlock,
        buf: AlignedBuf,
        submit: impl FnOnce(&mut Plug<'_>, Kiobuf),
    ) -> Result<AlignedBuf, BlockError> {
        let (to, from) = sync_channel(1);
        let len = buf.len();
        let end_io = Box::new(move |done: Completion| to.send(done).unwrap_or_default());
        let mut plug = self.plug();
        submit(&mut plug, Kiobuf::new(Box::new(buf), 0, len, end_io));
        plug.finish();
        let (dev, at) = (BlockError::NO_DEVICE, at.bytes());
        let late = BlockError {
            kind: ErrorKind::TimedOut,
            op,
            dev,
            at,
        };
        let done = from.recv_timeout(IO_WAIT_MAX).map_err(|_| late)?;
        match (done.error, AlignedBuf::from_pages(done.pages)) {
            (None, Ok(buf)) => Ok(buf),
            (None, Err(_)) => Err(BlockError {
                kind: ErrorKind::Aborted,
                ..late
            }),
            (Some(error), _) => Err(error),
        }
    }
}
