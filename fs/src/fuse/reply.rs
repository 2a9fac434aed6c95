//! The answer to one request. It can be sent from any thread, once; a request that is dropped
//! unanswered fails with EIO, so that nobody waits for ever.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use braidfs_blockdev::trace;

use super::Shared;
use super::attr::{attr_out, entry_out, negative_entry_out, statx_out};
use super::channel::Channel;
use super::interrupt::Waiting;
use super::protocol::{Args, InHeader, Malformed, Opcode, Out};
use super::stats::Timer;
use crate::{Attr, Errno, OpenFile, ReadReply};

/// Where the answer to a request goes, and what is counted with it.
pub(super) struct Reply {
    shared: Arc<Shared>,
    channel: Arc<Channel>,
    unique: u64,
    /// In the table of unanswered requests.
    is_known: bool,
    timer: Option<Timer>,
    /// In traces, and the bytes that were read or written.
    context: u64,
    bytes: u32,
}

/// The bytes that a request is about: offset and length.
fn range(opcode: Opcode, mut args: Args<'_>) -> Result<(u64, u64), Malformed> {
    match opcode {
        Opcode::Read | Opcode::Write => {
            args.skip(8)?; // handle
            Ok((args.u64()?, args.u32()?.into()))
        }
        Opcode::Fallocate => {
            args.skip(8)?; // handle
            Ok((args.u64()?, args.u64()?))
        }
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
            args.skip(8)?; // handle
            let offset = args.u64()?;
            args.skip(24)?; // inode, handle and offset to write to
            Ok((offset, args.u64()?))
        }
        _ => Ok((0, 0)),
    }
}

/// Whether the kernel took an answer. It does not when nobody waits for it any more.
#[must_use]
enum Sent {
    Taken,
    Refused,
}

impl Reply {
    /// Begins to count a request.
    pub(super) fn new(
        shared: &Arc<Shared>,
        channel: &Arc<Channel>,
        header: &InHeader,
        opcode: Opcode,
    ) -> Self {
        let unanswered = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt];
        let is_known = header.pid != 0 && !unanswered.contains(&opcode);
        let timer = shared.stats.begin(opcode);
        if is_known {
            let waiting = Waiting::new(header, timer.begun(), channel);
            shared.unanswered.begin(header.unique, waiting);
        }
        Self {
            shared: Arc::clone(shared),
            channel: Arc::clone(channel),
            unique: header.unique,
            is_known,
            timer: Some(timer),
            context: trace::NOBODY,
            bytes: 0,
        }
    }

    /// Tells who traces of the request; gives its context.
    pub(super) fn begin_trace(&mut self, header: &InHeader, opcode: Opcode, args: Args<'_>) -> u64 {
        if trace::is_on() {
            let (offset, len) = range(opcode, args).unwrap_or_default();
            self.context = trace::begin_request(&trace::Begin {
                unique: header.unique,
                op: opcode as u8,
                file: header.nodeid,
                offset,
                len,
                pid: header.pid,
            });
        }
        self.context
    }

    /// Tells who traces of the answer, which began to be sent then.
    fn end_trace(&self, error: Option<i32>, since: u64) {
        let result = error.map_or(self.bytes.into(), |error| -i64::from(error));
        trace::reply(self.context, result, since);
    }

    fn count(&mut self, ok: bool) {
        if let Some(timer) = self.timer.take() {
            self.shared.stats.end(timer, ok);
        }
    }

    /// Whether the request has not been answered because its caller was killed.
    fn claim(&mut self) -> bool {
        !std::mem::take(&mut self.is_known) || self.shared.unanswered.claim(self.unique)
    }

    fn send(&mut self, result: Result<&[u8], Errno>) -> Sent {
        // Counted first: whoever has the answer may ask for the statistics next.
        self.count(result.is_ok());
        let since = trace::now();
        if !self.claim() {
            self.end_trace(Some(libc::EINTR), since);
            return Sent::Refused;
        }
        let sent = match result {
            Ok(payload) => self.channel.send(self.unique, payload),
            Err(error) => self.channel.send_error(self.unique, error.0),
        };
        self.end_trace(result.err().map(|error| error.0), since);
        match sent {
            Ok(()) => Sent::Taken,
            Err(_) => Sent::Refused,
        }
    }

    /// Success with nothing more to say, or an error.
    pub(super) fn empty(mut self, result: Result<(), Errno>) {
        let _sent = self.send(result.map(|()| &[][..]));
    }

    /// Bytes, or an error.
    pub(super) fn bytes(mut self, result: Result<impl AsRef<[u8]>, Errno>) {
        let result = result.as_ref().map(AsRef::as_ref);
        let _sent = self.send(result.map_err(|error| *error));
    }

    /// A fixed structure, or an error.
    pub(super) fn out(mut self, result: Result<Out, Errno>) {
        let result = result.as_ref().map(Out::as_slice);
        let _sent = self.send(result.map_err(|error| *error));
    }

    /// Nothing to answer: FORGET.
    pub(super) fn none(mut self) {
        self.count(true);
        self.end_trace(None, trace::now());
    }

    /// An inode that the caller now knows once more.
    pub(super) fn entry(mut self, result: Result<Attr, Errno>) {
        let timeout = self.shared.options.timeout;
        let blksize = self.shared.blksize();
        let out = result.map(|attr| entry_out(&attr, timeout, blksize));
        let sent = self.send(out.as_ref().map(Out::as_slice).map_err(|error| *error));
        if let (Sent::Refused, Ok(attr)) = (sent, result) {
            self.shared.fs.forget(attr.ino, 1);
        }
    }

    /// A name that does not exist, with a time for which that may be believed.
    pub(super) fn negative_entry(mut self) {
        let out = negative_entry_out(self.shared.options.timeout);
        let _sent = self.send(Ok(out.as_slice()));
    }

    /// Attributes.
    pub(super) fn attr(self, result: Result<Attr, Errno>) {
        let timeout = self.shared.options.timeout;
        let blksize = self.shared.blksize();
        self.out(result.map(|attr| attr_out(&attr, timeout, blksize)));
    }

    /// Attributes as statx(2) has them.
    pub(super) fn statx(self, result: Result<Attr, Errno>) {
        let timeout = self.shared.options.timeout;
        let blksize = self.shared.blksize();
        self.out(result.map(|attr| statx_out(&attr, timeout, blksize)));
    }

    /// An open file.
    pub(super) fn opened(mut self, result: Result<(Arc<OpenFile>, u32), Errno>) {
        let opened = result.map(|(file, flags)| {
            let handle = self.shared.handles.insert(file);
            (handle, open_out(Out::default(), handle, flags))
        });
        let sent = self.send(
            opened
                .as_ref()
                .map(|(_, out)| out.as_slice())
                .map_err(|e| *e),
        );
        if let (Sent::Refused, Ok((handle, _))) = (sent, opened) {
            self.abandon(handle);
        }
    }

    /// A new file, open.
    pub(super) fn created(mut self, result: Result<(Attr, Arc<OpenFile>, u32), Errno>) {
        let timeout = self.shared.options.timeout;
        let blksize = self.shared.blksize();
        let created = result.map(|(attr, file, flags)| {
            let handle = self.shared.handles.insert(file);
            let entry = entry_out(&attr, timeout, blksize);
            (attr.ino, handle, open_out(entry, handle, flags))
        });
        let sent = self.send(
            created
                .as_ref()
                .map(|(.., out)| out.as_slice())
                .map_err(|e| *e),
        );
        if let (Sent::Refused, Ok((ino, handle, _))) = (sent, created) {
            self.abandon(handle);
            self.shared.fs.forget(ino, 1);
        }
    }

    /// The kernel will not release a file whose open it gave up.
    fn abandon(&self, handle: u64) {
        if let Some(file) = self.shared.handles.remove(handle) {
            self.shared.fs.release(&file);
        }
    }

    /// Pages of a file, sent as they lie.
    pub(super) fn pages(mut self, result: Result<ReadReply, Errno>) {
        match result {
            Ok(data) => {
                let len = data.len();
                self.shared.stats.read_bytes.fetch_add(len as u64, Relaxed);
                self.bytes = u32::try_from(len).unwrap_or(u32::MAX);
                self.count(true);
                let since = trace::now();
                if !self.claim() {
                    return self.end_trace(Some(libc::EINTR), since);
                }
                let sent = self.channel.send_pieces(self.unique, len, data.slices());
                self.end_trace(None, since);
                log::trace!("{len} bytes: {sent:?}");
            }
            Err(error) => self.empty(Err(error)),
        }
    }

    /// How many bytes were written.
    pub(super) fn written(mut self, result: Result<u32, Errno>) {
        if let Ok(len) = result {
            self.bytes = len;
            self.shared
                .stats
                .write_bytes
                .fetch_add(u64::from(len), Relaxed);
        }
        self.out(result.map(|len| Out::default().u32(len).u32(0)));
    }

    /// An extended attribute or a list of them, or its length where `size` is 0.
    pub(super) fn xattr(self, result: Result<Vec<u8>, Errno>, size: u32) {
        match result {
            Ok(value) => match u32::try_from(value.len()) {
                Ok(len) if size == 0 => self.out(Ok(Out::default().u32(len).u32(0))),
                Ok(len) if len <= size => self.bytes(Ok(value)),
                _ => self.empty(Err(Errno::RANGE)),
            },
            Err(error) => self.empty(Err(error)),
        }
    }

    /// What an ioctl gives back.
    pub(super) fn ioctl(self, result: Result<Out, Errno>) {
        // Result, flags, and counts of vectors for retries, all zero.
        self.out(result.map(|data| Out::default().zeros(16).append(&data)));
    }
}

fn open_out(out: Out, handle: u64, flags: u32) -> Out {
    out.u64(handle).u32(flags).u32(0)
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.timer.is_some() {
            let _sent = self.send(Err(Errno::IO));
        }
    }
}
