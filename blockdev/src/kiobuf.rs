//! A kiobuf: a page vector with one offset, one length and its own completion.
//!
//! Submitting moves the kiobuf, so it cannot end twice. Inside the crate it lives on as *views*
//! (see [`crate::chain`]): each view holds an `Arc` of the shared state, and that count *is* the
//! kiobuf's I/O count. When the last view ends, the shared state is dropped and fires `end_io`
//! with the first error and the number of good bytes, and hands the pages back. A view that is
//! lost on an error path ends as aborted, so no kiobuf can hang or keep its pages.
//!
//! A view whose device does not answer is *expired*: the kiobuf ends at once, as timed out, but
//! without its pages. They stay with the shared state until the last view really ends, because
//! until then a device may still read or write them; [`InDoubt`] says when that is.
//!
//! `end_io` runs on whatever thread ended the last view, with no lock of this crate held. An
//! `end_io` that (directly or not) ends another kiobuf on the same thread does not recurse: the
//! inner completion waits until the outer one has returned.

use crate::completion::{self, Job};
use crate::error::{BlockError, ErrorKind, Op};
use crate::pages::PageVector;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use crate::trace;
use crate::units::{BLOCK_SIZE, dev_len, mem_len};
use libc::iovec;
use std::sync::PoisonError;

/// How a kiobuf ended.
pub struct Completion {
    /// Bytes that were transferred without error. Of a mirrored write, bytes of its first copy.
    pub bytes: u64,
    /// The first error that any piece met.
    pub error: Option<BlockError>,
    /// The pages, back to who built the kiobuf; `None` if a device still has them.
    pub pages: Option<Box<dyn PageVector>>,
    /// With a device that did not answer in time: tells when the transfer is really over.
    pub in_doubt: Option<InDoubt>,
}

/// A transfer that was given up and that a device may still carry out, at any time until it
/// answers: what it writes to must not be used for anything else before.
#[derive(Clone, Debug, Default)]
pub struct InDoubt(std::sync::Arc<std::sync::atomic::AtomicBool>);

impl InDoubt {
    /// No device has any part of the transfer any more. Once true it stays so.
    pub fn is_over(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Acquire)
    }

    /// The device is done.
    pub fn end(&self) {
        self.0.store(true, std::sync::atomic::Ordering::Release);
    }
}

/// Called exactly once per kiobuf. It may flip state, wake somebody, send a reply or submit more;
/// it must not wait.
pub type EndIo = Box<dyn FnOnce(Completion) + Send>;

/// Pages, a byte range in them, and what to call when all of it was transferred or failed.
///
/// A kiobuf that is dropped unsubmitted ends with [`ErrorKind::Aborted`].
pub struct Kiobuf {
    view: View,
    /// File, and byte offset in it; for tracing.
    place: (u64, u64),
}

impl Kiobuf {
    /// A kiobuf over `len` bytes from byte `offset` of `pages`.
    ///
    /// # Panics
    /// If the range is empty, not block aligned, or not inside the pages: a fault of the caller.
    pub fn new(pages: Box<dyn PageVector>, offset: usize, len: usize, end_io: EndIo) -> Kiobuf {
        assert!(len > 0, "empty kiobuf");
        assert!(
            dev_len(offset).is_multiple_of(BLOCK_SIZE) && dev_len(len).is_multiple_of(BLOCK_SIZE),
            "kiobuf of partial blocks"
        );
        let runs = pages.runs();
        let first = runs.first().map_or(0, |run| run.len());
        let uniform = runs.iter().rev().skip(1).all(|run| run.len() == first)
            && runs.last().is_none_or(|run| run.len() <= first);
        let total: usize = runs.iter().map(|run| run.len()).sum();
        assert!(
            offset <= total && len <= total - offset,
            "kiobuf reaches beyond its pages"
        );
        let shared = Shared {
            number: trace::kiobuf_number(),
            run_len: if uniform { first } else { 0 },
            good: AtomicU64::new(0),
            fate: Mutex::new(Fate {
                end_io: Some(end_io),
                error: None,
                in_doubt: None,
            }),
            pages: Some(pages),
        };
        Kiobuf {
            view: View {
                kiobuf: Some(Arc::new(shared)),
                start: offset,
                len,
                leg: Leg::Only,
            },
            place: (trace::NO_FILE, 0),
        }
    }

    /// The same, of bytes from `offset` of a file on: for tracing, which calls the file by this
    /// number.
    #[must_use]
    pub fn of_file(self, file: u64, offset: u64) -> Kiobuf {
        Kiobuf {
            place: (file, offset),
            ..self
        }
    }

    /// What [`Kiobuf::of_file`] said.
    pub(crate) fn place(&self) -> (u64, u64) {
        self.place
    }

    /// Its number in traces; 0 if it is not traced.
    pub(crate) fn number(&self) -> u64 {
        self.view.number()
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a kiobuf is never empty")]
    pub fn len(&self) -> u64 {
        dev_len(self.view.len)
    }

    pub(crate) fn into_view(self) -> View {
        self.view
    }
}

/// What is decided by the last view to end. The mutex is only contended when two pieces of one
/// kiobuf fail at once; the good path does not take it before the end.
struct Fate {
    end_io: Option<EndIo>,
    error: Option<BlockError>,
    /// The kiobuf ended before its views did.
    in_doubt: Option<InDoubt>,
}

/// The state that all views of one kiobuf share; dropping it is the completion.
pub(crate) struct Shared {
    /// Its number in traces; 0 if it is not traced.
    number: u64,
    pages: Option<Box<dyn PageVector>>,
    /// Length of every run but the last, if they are all alike; else 0. Makes finding a byte O(1).
    run_len: usize,
    good: AtomicU64,
    fate: Mutex<Fate>,
}

impl Shared {
    /// Appends the memory of `len` bytes from byte `start`, joining neighbours in memory.
    fn fill_iovecs(&self, start: usize, len: usize, out: &mut Vec<iovec>) {
        let runs = self.pages.as_ref().map_or(&[][..], |pages| pages.runs());
        let (mut index, mut skip) = match self.run_len {
            0 => (0, start),
            run_len => (start / run_len, start % run_len),
        };
        let mut left = len;
        while left > 0 {
            let run = runs[index];
            index += 1;
            if skip >= run.len() {
                skip -= run.len();
                continue;
            }
            let take = left.min(run.len() - skip);
            let base = run.as_ptr().wrapping_add(skip);
            match out.last_mut() {
                Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
                    last.iov_len += take;
                }
                _ => out.push(iovec {
                    iov_base: base.cast(),
                    iov_len: take,
                }),
            }
            left -= take;
            skip = 0;
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The Arc's count gives the order: every view's counts and errors happened before.
        let bytes = self.good.load(Ordering::Relaxed);
        let mut fate = self.fate.lock().unwrap_or_else(PoisonError::into_inner);
        let error = fate.error;
        let end_io = fate.end_io.take();
        let in_doubt = fate.in_doubt.take();
        drop(fate);
        let pages = self.pages.take();
        if let Some(end_io) = end_io {
            trace::kiobuf_ended(self.number, bytes, error.as_ref());
            completion::run(Job::Kiobuf(
                end_io,
                Completion {
                    bytes,
                    error,
                    pages,
                    in_doubt: None,
                },
            ));
        } else {
            drop(pages);
        }
        if let Some(in_doubt) = in_doubt {
            in_doubt.end();
        }
    }
}

/// Which copy of a mirrored range a view serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// The only transfer of these bytes; a read that fails may go to another copy.
    Only,
    /// The only transfer, of a copy that the caller named or that was the last to try.
    Pinned,
    /// A further copy of a write: its errors count, its bytes were counted by the first copy.
    Further,
}

/// A byte range of one kiobuf. Ends its part of the kiobuf exactly once; dropped, it is aborted.
pub(crate) struct View {
    /// Taken when the view ends.
    kiobuf: Option<Arc<Shared>>,
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) leg: Leg,
}

impl View {
    /// The part was transferred.
    pub(crate) fn end_good(mut self) {
        if let Some(kiobuf) = self.kiobuf.take()
            && self.leg != Leg::Further
        {
            // Relaxed: the drop of the Arc orders it before the completion.
            kiobuf.good.fetch_add(dev_len(self.len), Ordering::Relaxed);
        }
    }

    /// The part failed.
    pub(crate) fn end_bad(mut self, error: BlockError) {
        self.fail(error);
    }

    fn fail(&mut self, error: BlockError) {
        if let Some(kiobuf) = self.kiobuf.take() {
            let mut fate = kiobuf.fate.lock().unwrap_or_else(PoisonError::into_inner);
            fate.error.get_or_insert(error);
        }
    }

    /// The device does not answer: ends the whole kiobuf with `error`, unless it has ended, while
    /// this view and the pages stay with the device. The caller runs what is returned, with no lock
    /// held.
    pub(crate) fn expire(&self, error: BlockError) -> Option<Job> {
        let kiobuf = self.kiobuf.as_ref()?;
        let mut fate = kiobuf.fate.lock().unwrap_or_else(PoisonError::into_inner);
        let end_io = fate.end_io.take()?;
        let in_doubt = InDoubt::default();
        fate.in_doubt = Some(in_doubt.clone());
        let completion = Completion {
            bytes: kiobuf.good.load(Ordering::Relaxed),
            error: Some(*fate.error.get_or_insert(error)),
            pages: None,
            in_doubt: Some(in_doubt),
        };
        trace::kiobuf_ended(kiobuf.number, completion.bytes, completion.error.as_ref());
        Some(Job::Kiobuf(end_io, completion))
    }

    /// Cuts the view: `self` keeps the first `bytes`, the rest is returned. One more count on the
    /// kiobuf, nothing else.
    pub(crate) fn cut(&mut self, bytes: usize) -> View {
        assert!(
            0 < bytes && bytes < self.len,
            "a cut leaves both sides non-empty"
        );
        let rest = View {
            kiobuf: self.kiobuf.clone(),
            start: self.start + bytes,
            len: self.len - bytes,
            leg: self.leg,
        };
        self.len = bytes;
        rest
    }

    /// A second transfer of the same bytes (the other copy of a mirror).
    pub(crate) fn duplicate(&self, leg: Leg) -> View {
        View {
            kiobuf: self.kiobuf.clone(),
            start: self.start,
            len: self.len,
            leg,
        }
    }

    /// The kiobuf's number in traces; 0 if it is not traced, or the view has ended.
    pub(crate) fn number(&self) -> u64 {
        self.kiobuf.as_ref().map_or(0, |kiobuf| kiobuf.number)
    }

    pub(crate) fn is_same_kiobuf(&self, other: &View) -> bool {
        match (&self.kiobuf, &other.kiobuf) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Appends the view's memory after its first `skip` bytes.
    pub(crate) fn fill_iovecs(&self, skip: u64, out: &mut Vec<iovec>) {
        if let Some(kiobuf) = &self.kiobuf {
            let skip = mem_len(skip);
            kiobuf.fill_iovecs(self.start + skip, self.len - skip, out);
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let (dev, at) = (BlockError::NO_DEVICE, 0);
        self.fail(BlockError {
            kind: ErrorKind::Aborted,
            op: Op::Read,
            dev,
            at,
        });
    }
}
