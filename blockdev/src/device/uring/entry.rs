//! Submission entries: one place that knows which opcode serves which transfer.

use io_uring::{opcode, squeue, types};
use libc::iovec;
use std::os::fd::RawFd;

/// The device's file as the ring knows it.
#[derive(Clone, Copy)]
pub(super) enum Target {
    Fixed,
    Fd(RawFd),
}

/// Builds an entry for whichever kind of file it is.
macro_rules! on_target {
    ($target:expr, $fd:ident => $build:expr) => {
        match $target {
            Target::Fixed => {
                let $fd = types::Fixed(0);
                $build
            }
            Target::Fd(raw) => {
                let $fd = types::Fd(raw);
                $build
            }
        }
    };
}

impl Target {
    pub(super) fn fsync(self) -> squeue::Entry {
        let flags = types::FsyncFlags::DATASYNC;
        on_target!(self, fd => opcode::Fsync::new(fd).flags(flags).build())
    }

    pub(super) fn punch_hole(self, offset: u64, len: u64) -> squeue::Entry {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        on_target!(self, fd => opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
    }

    pub(super) fn transfer(
        self,
        write: bool,
        offset: u64,
        iovecs: &[iovec],
        fixed: Option<u16>,
    ) -> squeue::Entry {
        let (vector, count) = (iovecs.as_ptr(), u32::try_from(iovecs.len()).unwrap_or(0));
        let part = iovecs.first().copied();
        let single = part.filter(|_| count == 1).and_then(|part| {
            Some((
                part.iov_base.cast::<u8>(),
                u32::try_from(part.iov_len).ok()?,
            ))
        });
        on_target!(self, fd => match (single, fixed, write) {
            (Some((at, len)), Some(index), false) => {
                opcode::ReadFixed::new(fd, at, len, index).offset(offset).build()
            }
            (Some((at, len)), Some(index), true) => {
                opcode::WriteFixed::new(fd, at, len, index).offset(offset).build()
            }
            (Some((at, len)), None, false) => opcode::Read::new(fd, at, len).offset(offset).build(),
            (Some((at, len)), None, true) => opcode::Write::new(fd, at, len).offset(offset).build(),
            (None, Some(index), false) => {
                opcode::ReadvFixed::new(fd, vector, count, index).offset(offset).build()
            }
            (None, Some(index), true) => {
                opcode::WritevFixed::new(fd, vector, count, index).offset(offset).build()
            }
            (None, None, false) => opcode::Readv::new(fd, vector, count).offset(offset).build(),
            (None, None, true) => opcode::Writev::new(fd, vector, count).offset(offset).build(),
        })
    }
}
