//! Tracing: what single requests do on their way, as events for whoever looks.
//!
//! While nobody looks each place costs one relaxed load. While somebody does, an event of fixed
//! size goes into one of 16 rings, by thread: no allocation, no lock, no wait; an event that
//! finds its ring full is dropped and counted. The rings are made when tracing begins for the first
//! time, and stay.
//!
//! Each thread knows in whose interest it works, its *context*: a request, by the kernel's number,
//! or a chain of work in the background (a writeback, a readahead, a commit), by a number of its
//! own. A kiobuf belongs to the context in which it was built. Whoever hands work to another thread
//! carries the context over ([`current`], [`enter`]).
//!
//! One looks at a time: [`Session`]. It may ask for some requests only; then nothing is recorded in
//! the context of others, nor of their kiobufs.

mod blocks;
mod event;
mod ring;
#[cfg(all(test, not(loom)))]
mod tests;

pub use blocks::DEVICE_OPS;
pub(crate) use blocks::{Submitted, dispatched, done, kiobuf, kiobuf_ended, kiobuf_number, part};
pub use event::{EVENT_BYTES, Event, Kind};
use ring::Ring;
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Instant;

/// Rings; each is shared by one in so many threads.
const RINGS: usize = 16;

/// The context of work for nobody in particular.
pub const NOBODY: u64 = 0;
/// The context of requests that are not asked for.
const UNWANTED: u64 = u64::MAX;
/// The contexts of background work have this bit, the kernel's numbers of requests do not.
pub const BACKGROUND: u64 = 1 << 63;
/// The file of kiobufs that have none; metadata is file 0.
pub const NO_FILE: u64 = u64::MAX;

static ON: AtomicBool = AtomicBool::new(false);
static TAKEN: AtomicBool = AtomicBool::new(false);
/// Operations that are asked for, a bit for each; [`Filter::BACKGROUND_WORK`].
static OPS: AtomicU64 = AtomicU64::new(0);
/// The file that is asked for; [`NO_FILE`]: any.
static FILE: AtomicU64 = AtomicU64::new(NO_FILE);
/// Numbers of kiobufs and of background work; never 0.
static NEXT: AtomicU64 = AtomicU64::new(1);
static STORE: OnceLock<Store> = OnceLock::new();

/// What is there from the first tracing on.
struct Store {
    /// Times are nanoseconds since then.
    epoch: Instant,
    rings: [Ring; RINGS],
}

#[derive(Clone, Copy)]
struct Thread {
    id: u32,
    ring: usize,
}

thread_local! {
    static CONTEXT: Cell<u64> = const { Cell::new(NOBODY) };
    static THREAD: Cell<Option<Thread>> = const { Cell::new(None) };
}

fn store() -> &'static Store {
    STORE.get_or_init(|| Store {
        epoch: Instant::now(),
        rings: std::array::from_fn(|_| Ring::new()),
    })
}

/// Whether somebody looks.
#[inline]
pub fn is_on() -> bool {
    ON.load(Relaxed)
}

/// Nanoseconds since tracing began for the first time; 0 while nobody looks.
#[inline]
pub fn now() -> u64 {
    if is_on() { clock(Instant::now()) } else { 0 }
}

fn clock(time: Instant) -> u64 {
    let since = time.saturating_duration_since(store().epoch);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// In whose interest this thread works.
#[inline]
pub fn current() -> u64 {
    if is_on() { CONTEXT.get() } else { NOBODY }
}

/// A context until it is dropped; then the former one again.
pub struct Entered(Option<Stay>);

struct Stay {
    context: u64,
    former: u64,
    since: u64,
}

/// Works in the interest of `context` from here on.
#[inline]
pub fn enter(context: u64) -> Entered {
    if context == NOBODY || !is_on() {
        return Entered(None);
    }
    Entered(Some(Stay {
        context,
        former: CONTEXT.replace(context),
        since: now(),
    }))
}

impl Drop for Entered {
    #[inline]
    fn drop(&mut self) {
        if let Some(stay) = &self.0 {
            CONTEXT.set(stay.former);
            if stay.context & BACKGROUND == 0 {
                record_in(stay.context, Kind::Served, [stay.since, 0, 0, 0, 0]);
            }
        }
    }
}

/// A new context for work in the background on a file. [`NOBODY`] while nobody looks.
#[inline]
pub fn background(file: u64) -> u64 {
    if !is_on() {
        return NOBODY;
    }
    let wanted = FILE.load(Relaxed);
    let is_wanted =
        OPS.load(Relaxed) & Filter::BACKGROUND_WORK != 0 && (wanted == NO_FILE || wanted == file);
    match is_wanted {
        true => BACKGROUND | NEXT.fetch_add(1, Relaxed),
        false => UNWANTED,
    }
}

/// A request that begins.
#[derive(Clone, Copy, Debug)]
pub struct Begin {
    /// The kernel's number of it.
    pub unique: u64,
    /// What it asks for, below 63.
    pub op: u8,
    /// The inode that it is about.
    pub file: u64,
    /// The bytes that it is about, where it is about bytes.
    pub offset: u64,
    /// See `offset`.
    pub len: u64,
    /// Who asks.
    pub pid: u32,
}

/// Records it; gives its context.
pub fn begin_request(begin: &Begin) -> u64 {
    if !is_on() {
        return NOBODY;
    }
    let wanted = FILE.load(Relaxed);
    let is_wanted = OPS.load(Relaxed) & (1 << (begin.op & 63)) != 0
        && (wanted == NO_FILE || wanted == begin.file);
    if !is_wanted {
        return UNWANTED;
    }
    push(
        Instant::now(),
        Event {
            kind: Kind::Begin,
            op: begin.op,
            context: begin.unique,
            values: [begin.file, begin.offset, begin.len, u64::from(begin.pid), 0],
            ..Event::default()
        },
    );
    begin.unique
}

/// Records a step in the current context, if that is a request that is asked for.
#[inline]
pub fn step(kind: Kind, values: [u64; 5]) {
    if is_on() {
        step_in(CONTEXT.get(), kind, values);
    }
}

/// The same in this context.
#[inline]
pub fn step_in(context: u64, kind: Kind, values: [u64; 5]) {
    if context & BACKGROUND == 0 && is_on() {
        record_in(context, kind, values);
    }
}

/// Records what background work did.
#[inline]
pub fn background_step(context: u64, kind: Kind, values: [u64; 5]) {
    if is_on() {
        record_in(context, kind, values);
    }
}

/// The current request has waited since then, by [`now`]: slowed down ([`Kind::Held`]), or until
/// something was durable ([`Kind::Durable`]).
#[inline]
pub fn waited(kind: Kind, since: u64) {
    // 0: nobody looked then.
    if since > 0 {
        step(kind, [since, 0, 0, 0, 0]);
    }
}

/// A commit while it is under way: a context of its own.
pub struct Commit {
    context: u64,
    since: u64,
    _in: Entered,
}

impl Commit {
    /// It begins.
    pub fn begin() -> Commit {
        const METADATA: u64 = 0;
        let context = background(METADATA);
        Commit {
            context,
            since: now(),
            _in: enter(context),
        }
    }
}

impl Drop for Commit {
    fn drop(&mut self) {
        background_step(self.context, Kind::Commit, [self.since, 0, 0, 0, 0]);
    }
}

#[cold]
fn record_in(context: u64, kind: Kind, values: [u64; 5]) {
    if context == NOBODY || context == UNWANTED {
        return;
    }
    push(
        Instant::now(),
        Event {
            kind,
            context,
            values,
            ..Event::default()
        },
    );
}

/// The answer to a request: the bytes of it, or the errno, negated; `since`: when it began to be
/// sent.
#[inline]
pub fn reply(context: u64, result: i64, since: u64) {
    step_in(
        context,
        Kind::Reply,
        [result.cast_unsigned(), since, 0, 0, 0],
    );
}

#[cold]
fn push(at: Instant, event: Event) {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    let thread = THREAD.get().unwrap_or_else(|| {
        let thread = Thread {
            id: nix::unistd::gettid().as_raw().unsigned_abs(),
            ring: THREADS.fetch_add(1, Relaxed) % RINGS,
        };
        THREAD.set(Some(thread));
        thread
    });
    let event = Event {
        at: clock(at),
        thread: thread.id,
        ..event
    };
    store().rings[thread.ring].push(event.to_words());
}

/// What is of interest.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// Requests, a bit for each operation, and [`Filter::BACKGROUND_WORK`].
    pub ops: u64,
    /// One file by its inode, or [`NO_FILE`] for all.
    pub file: u64,
}

impl Filter {
    /// Writeback, readahead and commits.
    pub const BACKGROUND_WORK: u64 = 1 << 63;
    /// Everything.
    pub const ALL: Filter = Filter {
        ops: u64::MAX,
        file: NO_FILE,
    };

    fn is_set() -> bool {
        OPS.load(Relaxed) != u64::MAX || FILE.load(Relaxed) != NO_FILE
    }
}

/// The right to look; there is one. Tracing ends when it is dropped.
pub struct Session {
    since: u64,
}

impl Session {
    /// `None` if somebody looks already.
    pub fn begin(filter: Filter) -> Option<Session> {
        if TAKEN.swap(true, SeqCst) {
            return None;
        }
        let session = Session {
            since: clock(Instant::now()),
        };
        for ring in &store().rings {
            // What the last session left, and some thread put there late.
            while ring.pop().is_some() {}
            ring.take_dropped();
        }
        OPS.store(filter.ops, SeqCst);
        FILE.store(filter.file, SeqCst);
        ON.store(true, SeqCst);
        Some(session)
    }

    /// Nothing more is recorded.
    pub fn stop(&self) {
        ON.store(false, SeqCst);
    }

    /// Hands over the events that are there; gives how many were dropped since it was asked last.
    /// What it gives is not in order of time. It waits for nobody, and takes no more than fits.
    pub fn drain(&self, mut take: impl FnMut(Event)) -> u64 {
        let mut dropped = 0;
        for ring in &store().rings {
            dropped += ring.take_dropped();
            for _ in 0..ring::EVENTS {
                let Some(words) = ring.pop() else { break };
                // An unknown kind cannot be here.
                if let Some(event) = Event::from_words(words).filter(|e| e.at >= self.since) {
                    take(event);
                }
            }
        }
        dropped
    }

    /// A time for events of the session's own.
    pub fn now(&self) -> u64 {
        clock(Instant::now())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
        TAKEN.store(false, SeqCst);
    }
}
