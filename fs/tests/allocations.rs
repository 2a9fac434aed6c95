//! How often the core's path allocates, counted by the allocator: reads and writes of 1 MiB, in
//! steady state, on image files behind the real backend, without a mount.
//!
//! *Steady* is: what is done was done before, so pools and tables have their size. Two counts: that
//! of the calling thread is the path that somebody waits for, and must be nothing where the cache
//! serves; that of all threads has the writing back and the commits beside it, and must stay below
//! a bound. Whoever calls brings a callback; here it is one that needs no memory.
//!
//! `ALLOCATIONS=trace cargo test -p braidfs --test allocations -- --nocapture` shows from where.
#![allow(missing_docs)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use braidfs::{Errno, FileSystem, MountOptions, OpenFile, ROOT_INO, ReadReply, WriteFlags};
use braidfs_blockdev::trace::{self, Begin, Filter, Session};
use braidfs_blockdev::{Backend, BlockDevice, OpenMode, open_device};
use common::*;

const MIB: u64 = 1 << 20;
/// Operations that are counted, and as many before them.
const OPERATIONS: u64 = 256;
/// Bytes of the file: it fits into the cache, and is gone through several times.
const FILE_BYTES: u64 = 64 * MIB;
/// So much of it can be dirty for a while without being written back.
const DIRTY_BYTES: u64 = 8 * MIB;

static ALL: AtomicU64 = AtomicU64::new(0);
static IS_TRACING: AtomicBool = AtomicBool::new(false);
static TRACES: Mutex<Option<HashMap<String, u64>>> = Mutex::new(None);

thread_local! {
    static OWN: Cell<u64> = const { Cell::new(0) };
    /// Inside: making a backtrace allocates.
    static IS_INSIDE: Cell<bool> = const { Cell::new(false) };
    /// The thread that is counted as the calling one.
    static IS_CALLER: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

fn count() {
    ALL.fetch_add(1, SeqCst);
    let is_nested = IS_INSIDE.try_with(Cell::get).unwrap_or(true);
    if is_nested {
        return;
    }
    let _dying_thread = OWN.try_with(|own| own.set(own.get() + 1));
    if IS_TRACING.load(SeqCst) {
        IS_INSIDE.set(true);
        let trace = Backtrace::force_capture().to_string();
        if let Ok(mut traces) = TRACES.lock() {
            let traces = traces.get_or_insert_default();
            let who = if IS_CALLER.get() { "caller" } else { "other" };
            let places = format!("{who}: {}", own_frames(&trace));
            *traces.entry(places).or_default() += 1;
        }
        IS_INSIDE.set(false);
    }
}

/// Of a backtrace, what is the project's, or the metadata store's.
fn own_frames(trace: &str) -> String {
    let places = trace
        .lines()
        .filter_map(|line| line.trim().strip_prefix("at "));
    let places = places.filter_map(|place| place.rsplit_once(':').map(|found| found.0));
    let ours = places.filter(|place| {
        let crates = ["blockdev/src/", "cache/src/", "fs/src/", "redb"];
        crates.iter().any(|name| place.contains(name))
    });
    let short = ours.map(|place| place.rsplit_once("index").map_or(place, |found| found.1));
    short.take(6).collect::<Vec<_>>().join(" <- ")
}

// SAFETY: everything is passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A file system on image files that go with it.
struct Images {
    fs: Arc<FileSystem>,
    file: Arc<OpenFile>,
    data: Vec<u8>,
    _dir: tempfile::TempDir,
}

impl Images {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let mode = OpenMode {
            backend: Backend::Auto,
            ..OpenMode::default()
        };
        let members: Vec<Arc<dyn BlockDevice>> = (0..2)
            .map(|number| {
                let path = dir.path().join(format!("image{number}"));
                let image = File::create(&path).expect("an image");
                image.set_len(16 << 30).expect("room for an image");
                open_device(&path, mode).expect("open an image")
            })
            .collect();
        format_members(members.clone());
        let options = MountOptions {
            cache_bytes: 256 * MIB,
            commit_interval: Duration::from_secs(300),
            ..MountOptions::default()
        };
        let fs = mount_members(members, options);
        let file = create(&fs, ROOT_INO, "file");
        Self {
            fs,
            file,
            data: pattern(1, MIB as usize),
            _dir: dir,
        }
    }

    fn fill(&self) {
        for at in (0..FILE_BYTES).step_by(MIB as usize) {
            write(&self.fs, &self.file, at, &self.data);
        }
    }

    /// Within the first `bytes` of the file.
    fn write(&self, number: u64, bytes: u64, direct: bool) {
        let done = Box::new(|result: Result<u32, Errno>| {
            assert_eq!(result, Ok(MIB as u32));
            ENDED.fetch_add(1, SeqCst);
        });
        let at = number * MIB % bytes;
        let flags = WriteFlags::default();
        self.fs
            .write(&self.file, at, self.data.as_slice(), direct, flags, done);
    }

    fn read(&self, number: u64, len: u64, direct: bool) {
        fn ended(result: Result<ReadReply, Errno>) {
            let reply = result.expect("a read");
            assert!(!reply.is_empty());
            drop(reply);
            ENDED.fetch_add(1, SeqCst);
        }
        let at = number * 7919 * len % FILE_BYTES;
        let done = Box::new(ended);
        self.fs.read(&self.file, at, len as usize, direct, done);
    }
}

/// Operations that have ended.
static ENDED: AtomicU64 = AtomicU64::new(0);

/// Allocations per operation.
#[derive(Debug)]
struct Counted {
    own: f64,
    all: f64,
}

/// Does something again and again, one after the other. The best of some runs counts: beside the
/// others somebody may have written back or committed.
fn counted(what: &str, act: impl Fn(u64)) -> Counted {
    const RUNS: usize = 4;
    IS_CALLER.set(true);
    let run = || {
        let begun = (OWN.get(), ALL.load(SeqCst));
        for number in 0..OPERATIONS {
            let before = ENDED.load(SeqCst);
            act(number);
            let deadline = Instant::now() + Duration::from_secs(60);
            while ENDED.load(SeqCst) == before {
                assert!(Instant::now() < deadline, "{what}: it does not end");
                std::thread::yield_now();
            }
        }
        let per = |count: u64| count as f64 / OPERATIONS as f64;
        Counted {
            own: per(OWN.get() - begun.0),
            all: per(ALL.load(SeqCst) - begun.1),
        }
    };
    run();
    let runs = [(); RUNS].map(|()| run());
    let [own, all] = [|run: &Counted| run.own, |run: &Counted| run.all].map(|field| {
        let values = runs.iter().map(field);
        (
            values.clone().fold(f64::MAX, f64::min),
            values.fold(0.0, f64::max),
        )
    });
    println!(
        "{what}: allocations per operation: {:.2}..{:.2} of the calling thread, {:.2}..{:.2} of \
         all threads",
        own.0, own.1, all.0, all.1
    );
    let counted = Counted {
        own: own.0,
        all: all.0,
    };
    if std::env::var_os("ALLOCATIONS").is_some() {
        show_places(run);
    }
    counted
}

/// From where a run allocates.
fn show_places(run: impl Fn() -> Counted) {
    IS_TRACING.store(true, SeqCst);
    run();
    IS_TRACING.store(false, SeqCst);
    let traces = TRACES.lock().expect("no panic").take().unwrap_or_default();
    let mut traces: Vec<_> = traces.into_iter().collect();
    traces.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (places, count) in traces.iter().take(60) {
        println!("{count:5} in {OPERATIONS} operations, {places}");
    }
}

fn assert_within(what: &str, counted: Counted, own_max: f64, all_max: f64) {
    let Counted { own, all } = counted;
    assert!(
        own <= own_max && all <= all_max,
        "{what}: {own} allocations of the calling thread (at most {own_max}), {all} of all threads \
         (at most {all_max}) for each operation; ALLOCATIONS=trace shows from where"
    );
}

/// The same while somebody traces: the rings are there from the beginning.
fn traced(images: &Images) {
    let session = Session::begin(Filter::ALL).expect("nobody else traces");
    let events = Cell::new(0_u64);
    let check = |what: &str, act: &dyn Fn(u64)| {
        events.set(0);
        let act = |number: u64| {
            let begin = Begin {
                unique: 2 * number + 2,
                op: 0,
                file: images.file.ino(),
                offset: 0,
                len: 0,
                pid: 0,
            };
            let _in = trace::enter(trace::begin_request(&begin));
            act(number);
            let dropped = session.drain(|_| events.set(events.get() + 1));
            assert_eq!(dropped, 0);
        };
        assert_within(what, counted(what, act), 0.0, 0.1);
        // Its begin, at least one step, and from the second one on, that the one before is over.
        assert!(events.get() >= 3 * OPERATIONS, "{} events", events.get());
    };
    check("read of 1 MiB, warm, traced", &|number| {
        images.read(number, MIB, false);
    });
    check("read of 4 KiB, warm, traced", &|number| {
        images.read(number, 4096, false);
    });
    check("write of 1 MiB into the cache, traced", &|number| {
        images.write(number, DIRTY_BYTES, false);
    });
}

/// One test: what other threads do would count.
#[test]
fn reads_and_writes_in_steady_state_allocate_nothing() {
    let images = Images::new();
    images.fill();
    let check = |what: &str, own_max: f64, all_max: f64, act: &dyn Fn(u64)| {
        assert_within(what, counted(what, act), own_max, all_max);
    };
    check("read of 1 MiB, warm", 0.0, 0.1, &|number| {
        images.read(number, MIB, false);
    });
    check("read of 4 KiB, warm", 0.0, 0.1, &|number| {
        images.read(number, 4096, false);
    });
    check("write of 1 MiB into the cache", 0.0, 0.1, &|number| {
        images.write(number, DIRTY_BYTES, false);
    });
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(SeqCst) {
                images.fs.fsync(&images.file, true).expect("fsync");
            }
        });
        let what = "write of 1 MiB while all is written back again and again";
        let counted = counted(what, |number| images.write(number, FILE_BYTES, false));
        is_over.store(true, SeqCst);
        assert_within(what, counted, 8.0, 1000.0);
    });
    traced(&images);
    // Extents, homes and kiobufs are made for each of these.
    check("write of 1 MiB, O_DIRECT", 60.0, 100.0, &|number| {
        images.write(number, FILE_BYTES, true);
    });
    check("read of 1 MiB, O_DIRECT, cold", 40.0, 60.0, &|number| {
        images.read(number, MIB, true);
    });
}
