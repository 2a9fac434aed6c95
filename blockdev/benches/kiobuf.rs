//! Micro-benchmarks of building kiobufs, and of merging and splitting what they become.
//!
//! `cargo bench -p braidfs-blockdev`. `examples/chain_bench.rs` compares chains with other ways.

use std::cell::Cell;
use std::hint::black_box;

use braidfs_blockdev::{AlignedBuf, Chain, Completion, Kiobuf, PAGE_SIZE, PageVector};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

/// Pages of a kiobuf: stripe borders then lie inside.
const PAGES: usize = 17;
/// A stripe.
const STRIPE: u64 = 256 << 10;

fn memory(pages: usize) -> Box<AlignedBuf> {
    Box::new(AlignedBuf::zeroed(pages * PAGE_SIZE))
}

fn ended(completion: Completion) {
    black_box(completion.bytes);
}

fn chain(memory: Box<AlignedBuf>) -> Chain {
    let len = memory.len();
    Chain::from(Kiobuf::new(memory, 0, len, Box::new(ended)))
}

thread_local! {
    /// Pages that came back from a kiobuf, for the next.
    static PAGES_BACK: Cell<Option<Box<dyn PageVector>>> = const { Cell::new(None) };
}

fn give_back(completion: Completion) {
    PAGES_BACK.set(completion.pages);
}

fn build(criterion: &mut Criterion) {
    for (name, pages) in [("4 KiB", 1), ("1 MiB", 256)] {
        criterion.bench_function(&format!("kiobuf, build and end, {name}"), |bencher| {
            PAGES_BACK.set(Some(memory(pages)));
            bencher.iter(|| {
                let memory = PAGES_BACK.take().expect("they came back");
                let len = pages * PAGE_SIZE;
                let kiobuf = Kiobuf::new(memory, 0, len, Box::new(give_back));
                black_box(Chain::from(kiobuf)).end_good();
            });
        });
    }
}

fn merged(chains: Vec<Chain>) -> Chain {
    let mut all = Chain::new();
    chains.into_iter().for_each(|one| all.append(one));
    all
}

fn chains(count: usize) -> Vec<Chain> {
    (0..count).map(|_| chain(memory(PAGES))).collect()
}

fn merge_and_split(criterion: &mut Criterion) {
    for count in [1, 16, 128] {
        criterion.bench_function(&format!("chain, merge {count} kiobufs"), |bencher| {
            bencher.iter_batched(|| chains(count), merged, BatchSize::SmallInput);
        });
        criterion.bench_function(&format!("chain, split {count} kiobufs"), |bencher| {
            let split = |mut all: Chain| {
                let mut pieces = Vec::with_capacity(64);
                while !all.is_empty() {
                    pieces.push(all.split_to(all.bytes().min(STRIPE)));
                }
                pieces
            };
            bencher.iter_batched(|| merged(chains(count)), split, BatchSize::SmallInput);
        });
    }
}

criterion_group!(benches, build, merge_and_split);
criterion_main!(benches);
