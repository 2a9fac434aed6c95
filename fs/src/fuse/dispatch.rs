//! From the bytes of a request to the method that serves it.

use std::sync::Arc;
use std::time::Instant;

use braidfs_blockdev::trace;
use braidfs_cache::FrameVec;
use log::debug;

use super::blocking::Blocking;
use super::channel::{Channel, Landed};
use super::interrupt::Waiting;
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
    /// The payload of a WRITE, where it is not among the arguments.
    pub landed: Option<Landed<'a>>,
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
    landed: Option<Landed<'_>>,
) {
    let apart = landed.as_ref().map_or(0, |landed| landed.len);
    let Ok((header, args)) = InHeader::split(bytes, apart) else {
        return debug!("a request of {} bytes is no request", bytes.len());
    };
    let Some(opcode) = Opcode::from_wire(header.opcode) else {
        // The kernel does without it from now on; it is told even if it does not listen.
        let sent = channel.send_error(header.unique, libc::ENOSYS);
        return debug!("no request {} here ({sent:?})", header.opcode);
    };
    let parts = (&header, opcode, bytes, &landed);
    if changes(opcode) && wait_for_thaw(shared, blocking, channel, parts) {
        return;
    }
    let mut reply = Reply::new(shared, channel, &header, opcode);
    let _in = trace::enter(reply.begin_trace(&header, opcode, args));
    if !shared.admits(header.uid) && names_something(opcode) {
        return reply.empty(Err(Errno::ACCES));
    }
    let request = Request {
        shared,
        blocking,
        header,
        args,
        landed,
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

/// Requests that wait while the file system is frozen. Those that only may change something begin,
/// and wait inside the core when it comes to that.
fn changes(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::Setattr
            | Opcode::Symlink
            | Opcode::Mknod
            | Opcode::Mkdir
            | Opcode::Unlink
            | Opcode::Rmdir
            | Opcode::Rename
            | Opcode::Rename2
            | Opcode::Link
            | Opcode::Create
            | Opcode::Tmpfile
            | Opcode::Write
            | Opcode::Setxattr
            | Opcode::Removexattr
            | Opcode::Fallocate
            | Opcode::CopyFileRange
            | Opcode::CopyFileRange64
    )
}

/// Leaves a request until the thaw, so that no thread waits with it, and its caller can be killed;
/// then it is begun as if it came then. False if it need not wait.
fn wait_for_thaw(
    shared: &Arc<Shared>,
    blocking: &Blocking,
    channel: &Arc<Channel>,
    (header, opcode, bytes, landed): (&InHeader, Opcode, &[u8], &Option<Landed<'_>>),
) -> bool {
    let apart = landed.as_ref().map_or(0, |landed| landed.len);
    shared.fs.leave_until_thaw(bytes.len() + apart, || {
        let mut request = bytes.to_vec();
        let pages = landed.as_ref().and_then(|landed| landed.pages.as_ref());
        let mut left = apart;
        for slice in pages.into_iter().flat_map(FrameVec::slices) {
            let take = slice.len().min(left);
            request.extend_from_slice(&slice[..take]);
            left -= take;
        }
        let (unique, pid) = (header.unique, header.pid);
        if pid != 0 {
            let waiting = Waiting::new(header, (opcode, Instant::now()), channel);
            shared.unanswered.begin(unique, waiting);
        }
        let (shared, channel) = (Arc::clone(shared), Arc::clone(channel));
        let blocking = blocking.clone();
        Box::new(move || {
            let again = blocking.clone();
            blocking.run(move || {
                // Not if it has been answered because its caller is dead.
                if pid == 0 || shared.unanswered.claim(unique) {
                    dispatch(&shared, &again, &channel, &request, None);
                }
            });
        })
    })
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
        Opcode::Interrupt => request.interrupt(),
        // Answered before the session was served; never twice.
        Opcode::Init => {
            request.reply.empty(Err(Errno::INVAL));
            Ok(())
        }
    }
}

impl Request<'_> {
    /// The caller of another request got a signal. It has no answer, whatever it says.
    fn interrupt(mut self) -> Parsed {
        if let Ok(unique) = self.args.u64() {
            self.shared.unanswered.signalled(unique);
        }
        self.reply.none();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::bench::Bench;
    use super::super::protocol::Out;

    /// Numbers as they come in requests: handles, inodes, flags, offsets, lengths.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            8 => 0..8_u64,
            2 => 0..10_000_000_u64,
            2 => (0..64_u32).prop_map(|bit| 1 << bit),
            1 => Just(u64::MAX),
            1 => Just(i64::MAX.cast_unsigned()),
            1 => any::<u64>(),
        ]
    }

    /// Arguments that often begin as a request of some kind would.
    fn arguments() -> impl Strategy<Value = Vec<u8>> {
        let fields = proptest::collection::vec(number(), 0..8);
        let name = prop_oneof![
            Just(Vec::new()),
            "[ab]{1,2}".prop_map(|name| [name.as_bytes(), &[0]].concat()),
            "[ab]{1,2}".prop_map(|name| [name.as_bytes(), &[0], b"c\0"].concat()),
            proptest::collection::vec(any::<u8>(), 0..300),
        ];
        (fields, name).prop_map(|(fields, name)| {
            let mut bytes = Vec::new();
            for field in fields {
                bytes.extend_from_slice(Out::default().u64(field).as_slice());
            }
            bytes.extend_from_slice(&name);
            bytes
        })
    }

    #[test]
    fn whatever_is_asked_gets_one_answer() {
        let bench = Bench::new();
        let config = ProptestConfig {
            cases: 30_000,
            // The file system goes on from one request to the next, so none can be left out.
            max_shrink_iters: 0,
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        proptest!(config, |(opcode in 0..56_u32, node in number(), args in arguments())| {
            bench.ask(opcode, node, &args);
        });
        assert_eq!(bench.ask(3, 1, &[0; 16]), 0, "the root is still there");
        bench.shared.fs.unmount().unwrap();
    }

    #[test]
    fn requests_that_are_cut_short_or_unknown_are_refused() {
        let bench = Bench::new();
        assert_eq!(bench.ask(9, 1, &[0; 7]), libc::EIO);
        assert_eq!(bench.ask(9, 1, b"12345678no end"), libc::EIO);
        assert_eq!(bench.ask(9, 1, b"\xed\x01\0\0\0\0\0\0dir\0"), 0);
        assert_eq!(bench.ask(4000, 1, &[]), libc::ENOSYS);
        assert_eq!(bench.ask(15, 1, &[0; 40]), libc::EBADF);
        bench.shared.fs.unmount().unwrap();
    }
}
