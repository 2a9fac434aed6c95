//! The question of 2001: what does it cost to merge kiobufs and to split the result for stripes?
//!
//! Three ways to hold the same N kiobufs of 17 pages (so that stripe borders fall inside them):
//! - chain with views: what braidfs does;
//! - flat list: one scatter-gather array of (page, length) with the owner of each kiobuf's part;
//! - duplicated chain: a list of kiobufs, where a split copies the page vectors of both sides.
//!
//! *Merge* joins N one-kiobuf I/Os into one; *split* cuts it at every 256 KiB and deals the pieces
//! to four devices. Steady state; times are the median of several runs, per operation (not per
//! kiobuf); bytes are what the allocator handed out meanwhile.
//!
//! `cargo run --release -p braidfs-blockdev --example chain_bench` prints a Markdown table.

use braidfs_blockdev::{AlignedBuf, Chain, Kiobuf, PageRun, PageVector};
use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const PAGES: usize = 17;
const PAGE: usize = 4096;
const STRIPE: usize = 256 << 10;
const DEVICES: usize = 4;
const RUNS: usize = 15;

static ALLOCATED: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: everything is passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The pages of one kiobuf: all kiobufs share one piece of memory, which nobody accesses.
#[derive(Clone)]
struct Pages {
    memory: Arc<AlignedBuf>,
    runs: Arc<[PageRun]>,
}

// SAFETY: the runs lie in memory that this value keeps alive; no device accesses it here.
unsafe impl PageVector for Pages {
    fn runs(&self) -> &[PageRun] {
        black_box(&self.memory);
        &self.runs
    }
}

impl Pages {
    fn new() -> Pages {
        let memory = Arc::new(AlignedBuf::zeroed(PAGES * PAGE));
        let base = memory.runs()[0].as_ptr();
        let run = |index: usize| {
            let at = std::ptr::NonNull::new(base.wrapping_add(index * PAGE)).expect("not null");
            // SAFETY: a page of `memory`, which lives as long as the runs.
            unsafe { PageRun::new(at, PAGE) }
        };
        Pages {
            runs: (0..PAGES).map(run).collect(),
            memory,
        }
    }
}

/// One way to hold merged I/Os. `One` is a single kiobuf's I/O, `Many` a merged one.
trait Way {
    type Io;
    const NAME: &'static str;
    fn one(pages: &Pages) -> Self::Io;
    fn merge(ios: Vec<Self::Io>) -> Self::Io;
    fn split(io: Self::Io) -> [Self::Io; DEVICES];
    fn end(io: Self::Io);
}

struct Views;

impl Way for Views {
    type Io = Chain;
    const NAME: &'static str = "chain with views";
    fn one(pages: &Pages) -> Chain {
        let pages = Box::new(pages.clone());
        Chain::from(Kiobuf::new(pages, 0, PAGES * PAGE, Box::new(|_| ())))
    }
    fn merge(ios: Vec<Chain>) -> Chain {
        let mut all = Chain::new();
        ios.into_iter().for_each(|io| all.append(io));
        all
    }
    fn split(mut io: Chain) -> [Chain; DEVICES] {
        let mut devices = [(); DEVICES].map(|()| Chain::new());
        let mut device = 0;
        while !io.is_empty() {
            let piece = io.split_to(io.bytes().min(STRIPE as u64));
            devices[device % DEVICES].append(piece);
            device += 1;
        }
        devices
    }
    fn end(io: Chain) {
        io.end_good();
    }
}

/// Scatter-gather entries and, per owner, how many bytes of the list are its own.
#[derive(Default)]
struct Flat {
    entries: Vec<(usize, usize)>,
    owners: Vec<(Arc<Pages>, usize)>,
}

impl Way for Flat {
    type Io = Flat;
    const NAME: &'static str = "flat list";
    fn one(pages: &Pages) -> Flat {
        let entry = |run: &PageRun| (run.as_ptr().addr(), run.len());
        Flat {
            entries: pages.runs.iter().map(entry).collect(),
            owners: vec![(Arc::new(pages.clone()), PAGES * PAGE)],
        }
    }
    fn merge(ios: Vec<Flat>) -> Flat {
        let mut ios = ios.into_iter();
        let mut all = ios.next().unwrap_or_default();
        for mut io in ios {
            all.entries.append(&mut io.entries);
            all.owners.append(&mut io.owners);
        }
        all
    }
    fn split(io: Flat) -> [Flat; DEVICES] {
        let mut devices = [(); DEVICES].map(|()| Flat::default());
        let mut owners = io.owners.into_iter();
        let mut owner = owners.next();
        for (index, piece) in io.entries.chunks(STRIPE / PAGE).enumerate() {
            let device = &mut devices[index % DEVICES];
            device.entries.extend_from_slice(piece);
            let mut left = piece.len() * PAGE;
            while let (true, Some((who, bytes))) = (left > 0, &mut owner) {
                let take = left.min(*bytes);
                device.owners.push((who.clone(), take));
                left -= take;
                *bytes -= take;
                if *bytes == 0 {
                    owner = owners.next();
                }
            }
        }
        devices
    }
    fn end(io: Flat) {
        drop(io);
    }
}

/// A kiobuf with page vector of its own, in a linked list as the kernel patches had it.
struct Copied {
    owner: Arc<Pages>,
    pages: Vec<usize>,
}

struct Duplicated;

impl Way for Duplicated {
    type Io = std::collections::LinkedList<Box<Copied>>;
    const NAME: &'static str = "duplicated chain";
    fn one(pages: &Pages) -> Self::Io {
        let addresses = pages.runs.iter().map(|run| run.as_ptr().addr()).collect();
        [Box::new(Copied {
            owner: Arc::new(pages.clone()),
            pages: addresses,
        })]
        .into()
    }
    fn merge(ios: Vec<Self::Io>) -> Self::Io {
        let mut all = Self::Io::new();
        ios.into_iter().for_each(|mut io| all.append(&mut io));
        all
    }
    fn split(io: Self::Io) -> [Self::Io; DEVICES] {
        let mut devices = [(); DEVICES].map(|()| Self::Io::new());
        let mut at = 0;
        for kiobuf in &io {
            let mut pages = &kiobuf.pages[..];
            while !pages.is_empty() {
                let room = STRIPE / PAGE - at % (STRIPE / PAGE);
                let (now, rest) = pages.split_at(room.min(pages.len()));
                let copy = Copied {
                    owner: kiobuf.owner.clone(),
                    pages: now.to_vec(),
                };
                devices[at / (STRIPE / PAGE) % DEVICES].push_back(Box::new(copy));
                at += now.len();
                pages = rest;
            }
        }
        devices
    }
    fn end(io: Self::Io) {
        drop(
            io.into_iter()
                .map(|kiobuf| kiobuf.owner.clone())
                .collect::<Vec<_>>(),
        );
    }
}

/// Nanoseconds and allocated bytes per operation.
type Cost = (f64, u64);

fn measure<A, B>(inputs: Vec<A>, mut operation: impl FnMut(A) -> B) -> (Vec<B>, Cost) {
    let count = inputs.len();
    let mut outputs = Vec::with_capacity(count);
    let (before, begun) = (ALLOCATED.load(Ordering::Relaxed), Instant::now());
    for input in inputs {
        outputs.push(black_box(operation(input)));
    }
    let nanoseconds = begun.elapsed().as_nanos() as f64 / count as f64;
    let bytes = (ALLOCATED.load(Ordering::Relaxed) - before) / count as u64;
    (outputs, (nanoseconds, bytes))
}

fn median(mut costs: Vec<Cost>) -> Cost {
    costs.sort_by(|a, b| a.0.total_cmp(&b.0));
    costs[costs.len() / 2]
}

fn run<W: Way>(pages: &Pages, kiobufs: usize) {
    let sets = (8192 / kiobufs).max(8);
    let (mut merges, mut splits) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let inputs: Vec<Vec<W::Io>> = (0..sets)
            .map(|_| (0..kiobufs).map(|_| W::one(pages)).collect())
            .collect();
        let (merged, cost) = measure(inputs, W::merge);
        merges.push(cost);
        let (pieces, cost) = measure(merged, W::split);
        splits.push(cost);
        pieces.into_iter().flatten().for_each(W::end);
    }
    let ((merge_ns, merge_bytes), (split_ns, split_bytes)) = (median(merges), median(splits));
    println!(
        "| {kiobufs} | {} | {merge_ns:.0} | {merge_bytes} | {split_ns:.0} | {split_bytes} |",
        W::NAME
    );
}

fn main() {
    let pages = Pages::new();
    println!("| kiobufs | way | merge ns | merge bytes | split ns | split bytes |");
    println!("| ---: | --- | ---: | ---: | ---: | ---: |");
    for kiobufs in [1, 16, 128, 1024] {
        run::<Views>(&pages, kiobufs);
        run::<Flat>(&pages, kiobufs);
        run::<Duplicated>(&pages, kiobufs);
    }
}
