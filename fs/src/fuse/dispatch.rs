//! From the bytes of a request to the method that serves it.

use std::sync::Arc;

use log::debug;

use super::blocking::Blocking;
use super::channel::Channel;
use super::protocol::{Args, InHeader, Malformed, Opcode};
use super::reply::Reply;
use super::{Shared, dir};
use crate::Errno;

/// One request under way.
pub(super) struct Request<'a> {
    pub shared: &'a Arc<Shared>,
    pub blocking: &'a Blocking,
    pub header: InHeader,
    pub args: Args<'a>,
    pub reply: Reply,
}

/// What a method returns: an error only if the request could not be understood. Its reply is then
/// dropped, which answers EIO.
pub(super) type Parsed = Result<(), Malformed>;

/// Serves one request. The answer may come later, from another thread.
pub(super) fn dispatch(
    shared: &Arc<Shared>,
    blocking: &Blocking,
    channel: &Arc<Channel>,
    bytes: &[u8],
) {
    let Ok((header, args)) = InHeader::split(bytes) else {
        return debug!("a request of {} bytes is no request", bytes.len());
    };
    let Some(opcode) = Opcode::from_wire(header.opcode) else {
        // The kernel does without it from now on; it is told even if it does not listen.
        let sent = channel.send_error(header.unique, libc::ENOSYS);
        return debug!("no request {} here ({sent:?})", header.opcode);
    };
    let reply = Reply::new(shared, channel, header.unique, opcode);
    if !shared.admits(header.uid) && names_something(opcode) {
        return reply.empty(Err(Errno::ACCES));
    }
    let request = Request {
        shared,
        blocking,
        header,
        args,
        reply,
    };
    if serve(opcode, request).is_err() {
        debug!(
            "{} request with {} bytes is malformed",
            Opcode::NAMES[opcode as usize],
            bytes.len()
        );
    }
}

/// Requests that begin an access. Those that go on with one (by a handle that an admitted user may
/// have passed on) and the kernel's own are always served.
fn names_something(opcode: Opcode) -> bool {
    !matches!(
        opcode,
        Opcode::Read
            | Opcode::Write
            | Opcode::Fsync
            | Opcode::Fsyncdir
            | Opcode::Flush
            | Opcode::Release
            | Opcode::Releasedir
            | Opcode::Readdir
            | Opcode::Readdirplus
            | Opcode::Forget
            | Opcode::BatchForget
            | Opcode::Interrupt
            | Opcode::Syncfs
            | Opcode::Destroy
    )
}

fn serve(opcode: Opcode, request: Request<'_>) -> Parsed {
    match opcode {
        Opcode::Lookup => request.lookup(),
        Opcode::Forget => request.forget(),
        Opcode::BatchForget => request.batch_forget(),
        Opcode::Getattr => request.getattr(),
        Opcode::Statx => request.statx(),
        Opcode::Setattr => request.setattr(),
        Opcode::Readlink => request.readlink(),
        Opcode::Symlink => request.symlink(),
        Opcode::Mknod => request.mknod(),
        Opcode::Mkdir => request.mkdir(),
        Opcode::Unlink => request.unlink(),
        Opcode::Rmdir => request.rmdir(),
        Opcode::Rename => request.rename(),
        Opcode::Rename2 => request.rename2(),
        Opcode::Link => request.link(),
        Opcode::Open => request.open(),
        Opcode::Create => request.create(),
        Opcode::Tmpfile => request.tmpfile(),
        Opcode::Read => request.read(),
        Opcode::Write => request.write(),
        Opcode::Statfs => request.statfs(),
        Opcode::Release => request.release(),
        Opcode::Flush => request.flush(),
        Opcode::Fsync => request.fsync(),
        Opcode::Fsyncdir => request.fsyncdir(),
        Opcode::Syncfs => request.syncfs(),
        Opcode::Opendir => request.opendir(),
        Opcode::Releasedir | Opcode::Destroy => request.done(),
        Opcode::Readdir => dir::readdir(request),
        Opcode::Readdirplus => dir::readdirplus(request),
        Opcode::Setxattr => request.setxattr(),
        Opcode::Getxattr => request.getxattr(),
        Opcode::Listxattr => request.listxattr(),
        Opcode::Removexattr => request.removexattr(),
        Opcode::Ioctl => request.ioctl(),
        Opcode::Fallocate => request.fallocate(),
        Opcode::Lseek => request.lseek(),
        Opcode::CopyFileRange => request.copy_file_range(false),
        Opcode::CopyFileRange64 => request.copy_file_range(true),
        // Nothing waits without a bound, so nothing needs to be interrupted; it has no answer.
        Opcode::Interrupt => {
            request.reply.none();
            Ok(())
        }
        // Answered before the session was served; never twice.
        Opcode::Init => {
            request.reply.empty(Err(Errno::INVAL));
            Ok(())
        }
    }
}
