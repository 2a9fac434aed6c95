//! The io_uring backend: one ring and one thread per device.
//!
//! The thread alone touches the ring, so the kernel needs no lock for it and runs completions when
//! the thread asks (DEFER_TASKRUN), in batches. Submitters post requests to a mailbox and, only if
//! the thread sleeps, wake it through an eventfd that the ring polls; requests made by completions
//! on the thread itself cost no system call at all. So no request depends on the life of the thread
//! that submitted it.
//!
//! The table of slots owns each request, and the iovecs that the kernel reads, from before its
//! entry is pushed until its completion was reaped; the thread does not exit before it is empty.
#![expect(unsafe_code, reason = "shares memory with the kernel")]

mod entry;
mod fixed;

use super::BlockDevice;
use super::file::{DeviceFile, IOV_MAX};
use super::gate::Gate;
use super::mailbox::{Mailbox, Next};
use super::open::OpenError;
use super::pool::PoolDevice;
use crate::error::{ErrorKind, Op};
use crate::pages::PageRun;
use crate::request::DeviceRequest;
use crate::units::dev_len;
use entry::Target;
use fixed::FixedMemory;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use libc::iovec;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, sync_channel};
use std::time::Duration;

/// Requests with the kernel at once, and entries of the ring: the queue's depth, flushes and
/// discards, with room to spare.
const SLOTS: u32 = 64;
/// `user_data` of the eventfd's poll; slots have smaller numbers.
const WAKE: u64 = u64::MAX;
/// Ends handled before new submissions are looked at, so that the device does not run dry.
const ENDS_PER_ROUND: usize = 8;
/// Times in a row that the kernel may say "again" to one request.
const AGAIN_MAX: u32 = 1000;
enum Mail {
    Request(DeviceRequest),
    Memory(PageRun),
    /// Nothing is to be registered any more.
    Forget(Sender<()>),
}

struct Shared {
    file: DeviceFile,
    mailbox: Mailbox<Mail>,
    event: EventFd,
}

impl Shared {
    fn wake(&self) {
        if let Err(errno) = self.event.write(1) {
            log::error!("{}: waking the I/O thread: {errno}", self.file.name);
        }
    }
}

/// A file or block device served by one ring.
pub(super) struct UringDevice {
    /// Dropped by hand before the wait for the thread; `None` only then.
    shared: Option<Arc<Shared>>,
    gate: Arc<Gate>,
    /// Serves the discards of a block device, which a ring does not know (before Linux 6.12).
    discards: Option<PoolDevice>,
}

impl UringDevice {
    /// Hands the file back if the kernel does not offer what is needed.
    pub(super) fn new(file: DeviceFile) -> Result<UringDevice, (DeviceFile, i32)> {
        let discards = match file.is_block.then(|| file.share()).transpose() {
            Ok(same) => same.map(PoolDevice::new),
            Err(error) => return Err((file, error.raw_os_error().unwrap_or(libc::EIO))),
        };
        let event = match EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK) {
            Ok(event) => event,
            Err(errno) => return Err((file, errno as i32)),
        };
        let shared = Arc::new(Shared {
            file,
            mailbox: Mailbox::new(),
            event,
        });
        let gate = Arc::<Gate>::default();
        let (started, start) = sync_channel(1);
        let theirs = shared.clone();
        let mut inside = gate.enter();
        let run = move || {
            inside.adopt();
            serve(theirs, &started);
            drop(inside);
        };
        let spawned = std::thread::Builder::new()
            .name("braid-uring".into())
            .spawn(run);
        let errno = match spawned {
            Ok(thread) => match start.recv() {
                Ok(Ok(())) => {
                    return Ok(UringDevice {
                        shared: Some(shared),
                        gate,
                        discards,
                    });
                }
                Ok(Err(errno)) => {
                    thread.join().unwrap_or_default();
                    errno
                }
                Err(_) => libc::EIO,
            },
            Err(error) => error.raw_os_error().unwrap_or(libc::EAGAIN),
        };
        match Arc::try_unwrap(shared) {
            Ok(shared) => Err((shared.file, errno)),
            Err(_) => unreachable!("the thread that shared it has been joined"),
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        self.shared.as_ref().expect("only drop takes it")
    }

    fn post(&self, mail: impl Iterator<Item = Mail>) {
        if self.shared().mailbox.post(mail) {
            self.shared().wake();
        }
    }
}

impl BlockDevice for UringDevice {
    fn name(&self) -> &str {
        &self.shared().file.name
    }

    fn size_bytes(&self) -> u64 {
        self.shared().file.size_bytes
    }

    fn kind(&self) -> &'static str {
        if self.shared().file.direct {
            "io_uring+O_DIRECT"
        } else {
            "io_uring"
        }
    }

    fn answer_time_max(&self) -> Duration {
        self.shared().file.answer_time_max
    }

    fn make_writable(&self) -> Result<(), OpenError> {
        self.shared().file.make_writable()
    }

    fn submit(&self, request: DeviceRequest) {
        match &self.discards {
            Some(discards) if request.op() == Op::Discard => discards.submit(request),
            _ => self.post(std::iter::once(Mail::Request(request))),
        }
    }

    fn submit_batch(&self, requests: &mut Vec<DeviceRequest>) {
        if let Some(discards) = &self.discards {
            let only = requests.extract_if(.., |request| request.op() == Op::Discard);
            only.for_each(|request| discards.submit(request));
        }
        self.post(requests.drain(..).map(Mail::Request));
    }

    fn register_memory(&self, arena: PageRun) {
        self.post(std::iter::once(Mail::Memory(arena)));
    }

    fn forget_memory(&self, done: Sender<()>) {
        self.post(std::iter::once(Mail::Forget(done)));
    }
}

impl Drop for UringDevice {
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else {
            return;
        };
        if shared.mailbox.close() {
            shared.wake();
        }
        let name = shared.file.name.clone();
        drop(shared);
        self.gate.wait_empty(&name);
    }
}

/// A request with the kernel, and the memory that its entry points to.
#[derive(Default)]
struct Slot {
    request: Option<DeviceRequest>,
    iovecs: Vec<iovec>,
    done: u64,
    again: u32,
    /// Its entry names registered memory.
    is_fixed: bool,
}

struct Ring {
    shared: Arc<Shared>,
    ring: IoUring,
    /// Registered under index 0.
    fixed_file: bool,
    fixed_vectors: bool,
    fixed: Option<FixedMemory>,
    /// Who waits until no registered memory is in use, and then is unregistered.
    forgetting: Vec<Sender<()>>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Requests that wait for a slot.
    backlog: VecDeque<DeviceRequest>,
    /// Slots that need an entry: new ones, and those with a remainder to transfer.
    ready: VecDeque<usize>,
    ended: VecDeque<(usize, i32)>,
    poll_armed: bool,
}

/// The thread. Its share of the file is gone when this returns.
fn serve(shared: Arc<Shared>, started: &SyncSender<Result<(), i32>>) {
    let (ring, result) = match Ring::new(shared) {
        Ok(ring) => (Some(ring), Ok(())),
        Err(error) => (None, Err(error.raw_os_error().unwrap_or(libc::EIO))),
    };
    // A receiver that is gone would mean that `new` panicked.
    started.send(result).unwrap_or_default();
    if let Some(ring) = ring {
        ring.run();
    }
}

impl Ring {
    fn new(shared: Arc<Shared>) -> std::io::Result<Ring> {
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .dontfork()
            .build(SLOTS * 2);
        let ring = match modern {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(SLOTS * 2)?,
            other => other?,
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        let needed_too = [opcode::Fallocate::CODE, opcode::PollAdd::CODE];
        if !needed
            .iter()
            .chain(&needed_too)
            .all(|&code| probe.is_supported(code))
        {
            return Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let fd = shared.file.file.as_raw_fd();
        let slots = (0..SLOTS).map(|_| Slot::default()).collect::<Vec<_>>();
        Ok(Ring {
            fixed_file: ring.submitter().register_files(&[fd]).is_ok(),
            fixed_vectors: probe.is_supported(opcode::ReadvFixed::CODE)
                && probe.is_supported(opcode::WritevFixed::CODE),
            free: (0..slots.len()).rev().collect(),
            slots,
            shared,
            ring,
            fixed: None,
            forgetting: Vec::new(),
            backlog: VecDeque::new(),
            ready: VecDeque::new(),
            ended: VecDeque::new(),
            poll_armed: false,
        })
    }

    fn run(mut self) {
        loop {
            self.take_mail();
            self.push_entries();
            let idle = self.free.len() == self.slots.len() && self.backlog.is_empty();
            let next = match self.ended.is_empty() && self.ready.is_empty() {
                true => self.shared.mailbox.next(),
                false => Next::Work,
            };
            let wait = match next {
                Next::Work => false,
                Next::Closed if idle => break,
                Next::Sleep | Next::Closed => true,
            };
            self.enter(wait);
            if next == Next::Sleep {
                self.shared.mailbox.awake();
            }
            self.reap();
            for _ in 0..ENDS_PER_ROUND {
                let Some((slot, result)) = self.ended.pop_front() else {
                    break;
                };
                self.end(slot, result);
            }
        }
        // The ring is torn down in the background; the file must be closed now.
        if self.fixed_file {
            self.ring.submitter().unregister_files().unwrap_or_default();
        }
    }

    fn take_mail(&mut self) {
        let mut memory = None;
        let (backlog, forgetting) = (&mut self.backlog, &mut self.forgetting);
        self.shared.mailbox.take(|mail| {
            for item in mail {
                match item {
                    Mail::Request(request) => backlog.push_back(request),
                    Mail::Memory(arena) => memory = Some(arena),
                    Mail::Forget(done) => forgetting.push(done),
                }
            }
        });
        if let Some(arena) = memory {
            self.adopt_memory(arena);
        }
        if !self.forgetting.is_empty() {
            self.forget_memory();
        }
        while !self.backlog.is_empty() {
            let Some(index) = self.free.pop() else { return };
            let slot = &mut self.slots[index];
            slot.request = self.backlog.pop_front();
            (slot.done, slot.again, slot.is_fixed) = (0, 0, false);
            self.ready.push_back(index);
        }
    }

    fn push_entries(&mut self) {
        if !self.poll_armed {
            let poll = opcode::PollAdd::new(
                types::Fd(self.shared.event.as_raw_fd()),
                u32::from(libc::POLLIN.unsigned_abs()),
            );
            let entry = poll.multi(true).build().user_data(WAKE);
            // SAFETY: the entry refers to no memory; the eventfd lives as long as `shared`.
            self.poll_armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        }
        while let Some(index) = self.ready.pop_front() {
            let Some(entry) = self.entry(index) else {
                self.ended.push_back((index, 0));
                continue;
            };
            // SAFETY: the slot owns the request, whose kiobufs own the pages, and the iovecs, and
            // is not touched until the completion of this entry was reaped.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                self.ready.push_front(index);
                return;
            }
        }
    }

    /// The submission entry for what is left of a slot's request.
    fn entry(&mut self, index: usize) -> Option<squeue::Entry> {
        let slot = &mut self.slots[index];
        let request = slot.request.as_ref()?;
        let (op, offset) = (request.op(), request.offset() + slot.done);
        let fd = self.shared.file.file.as_raw_fd();
        let target = if self.fixed_file {
            Target::Fixed
        } else {
            Target::Fd(fd)
        };
        let entry = match op {
            Op::Flush => target.fsync(),
            Op::Discard => target.punch_hole(offset, request.len() - slot.done),
            Op::Read | Op::Write => {
                slot.iovecs.clear();
                request.fill_iovecs_from(slot.done, &mut slot.iovecs);
                slot.iovecs.truncate(IOV_MAX);
                let single = slot.iovecs.len() == 1;
                let fixed = self.fixed.as_mut().filter(|_| single || self.fixed_vectors);
                let fixed = fixed.filter(|_| self.forgetting.is_empty());
                let fixed = fixed.and_then(|fixed| fixed.index_of(&slot.iovecs, &self.ring));
                slot.is_fixed = fixed.is_some();
                target.transfer(op == Op::Write, offset, &slot.iovecs, fixed)
            }
        };
        Some(entry.user_data(dev_len(index)))
    }

    fn enter(&mut self, wait: bool) {
        if !wait && self.ring.submission().is_empty() {
            return;
        }
        if let Err(error) = self.ring.submitter().submit_and_wait(usize::from(wait)) {
            match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                _ => {
                    log::error!("{}: io_uring_enter: {error}", self.shared.file.name);
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn reap(&mut self) {
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE {
                self.poll_armed &= io_uring::cqueue::more(entry.flags());
            } else {
                let index = crate::units::mem_len(entry.user_data());
                self.ended.push_back((index, entry.result()));
            }
        }
    }

    /// The kernel is done with a slot: continue a short transfer, or end the request.
    fn end(&mut self, index: usize, result: i32) {
        let slot = &mut self.slots[index];
        let Some(request) = &slot.request else { return };
        let transfers = matches!(request.op(), Op::Read | Op::Write);
        let verdict = match u32::try_from(result) {
            Ok(_) if !transfers => Ok(request.len()),
            Ok(bytes) => {
                slot.done += u64::from(bytes);
                if bytes > 0 && slot.done < request.len() {
                    return self.ready.push_back(index);
                }
                Ok(slot.done)
            }
            Err(_) => {
                let errno = -result;
                if matches!(errno, libc::EINTR | libc::EAGAIN) && slot.again < AGAIN_MAX {
                    slot.again += 1;
                    return self.ready.push_back(index);
                }
                Err(ErrorKind::Os(errno))
            }
        };
        let request = slot.request.take();
        slot.is_fixed = false;
        self.free.push(index);
        if let Some(request) = request {
            request.end(verdict);
        }
    }

    /// Once no entry names registered memory, there is none.
    fn forget_memory(&mut self) {
        if self.slots.iter().any(|slot| slot.is_fixed) {
            return;
        }
        if self.fixed.take().is_some()
            && let Err(error) = self.ring.submitter().unregister_buffers()
        {
            log::warn!("{}: unregistering buffers: {error}", self.shared.file.name);
        }
        for done in self.forgetting.drain(..) {
            // Nobody may wait for it any more.
            done.send(()).unwrap_or_default();
        }
    }

    fn adopt_memory(&mut self, arena: PageRun) {
        if self.fixed.take().is_some() {
            self.ring
                .submitter()
                .unregister_buffers()
                .unwrap_or_default();
        }
        self.fixed = FixedMemory::new(arena, &self.ring);
    }
}
