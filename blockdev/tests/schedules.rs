//! Random schedules of merge, split and complete against a model that knows every block.

mod common;

use braidfs_blockdev::{
    AlignedBuf, BlockError, Chain, Completion, DeviceRequest, ErrorKind, Kiobuf, Op, PageRun,
    PageVector,
};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

const BLOCK: usize = 4096;

/// Pages in several runs that say when they are gone.
struct WatchedPages {
    bufs: Vec<AlignedBuf>,
    runs: Vec<PageRun>,
    gone: Arc<AtomicBool>,
}

// SAFETY: the runs are those of buffers that live as long as this value and that nobody accesses.
unsafe impl PageVector for WatchedPages {
    fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

impl Drop for WatchedPages {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::SeqCst);
        self.bufs.clear();
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A kiobuf over runs of so many blocks, without the first `skip` and the last `cut`.
    New {
        runs: Vec<usize>,
        skip: usize,
        cut: usize,
    },
    Append(usize, usize),
    Prepend(usize, usize),
    Split(usize, usize),
    Good(usize),
    Bad(usize),
    Short(usize, usize),
    Drop(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let any = 0usize..1000;
    prop_oneof![
        3 => (prop::collection::vec(1usize..5, 1..5), 0usize..3, 0usize..3)
            .prop_map(|(runs, skip, cut)| Step::New { runs, skip, cut }),
        4 => (any.clone(), any.clone()).prop_map(|(a, b)| Step::Append(a, b)),
        2 => (any.clone(), any.clone()).prop_map(|(a, b)| Step::Prepend(a, b)),
        5 => (any.clone(), any.clone()).prop_map(|(a, at)| Step::Split(a, at)),
        2 => any.clone().prop_map(Step::Good),
        1 => any.clone().prop_map(Step::Bad),
        1 => (any.clone(), any.clone()).prop_map(|(a, at)| Step::Short(a, at)),
        1 => any.prop_map(Step::Drop),
    ]
}

type Outcome = Arc<Mutex<Option<(u64, Option<BlockError>)>>>;

/// What the model knows of one kiobuf.
struct Known {
    /// Address of each block of its range.
    blocks: Vec<usize>,
    open: usize,
    good: u64,
    first_error: Option<(ErrorKind, u64)>,
    outcome: Outcome,
    gone: Arc<AtomicBool>,
}

#[derive(Default)]
struct Model {
    known: Vec<Known>,
    /// Each chain with the (kiobuf, block) pairs it must consist of.
    chains: Vec<(Chain, Vec<(usize, usize)>)>,
    requests: u64,
}

impl Model {
    fn new_kiobuf(&mut self, runs: &[usize], skip: usize, cut: usize) {
        let bufs: Vec<_> = runs
            .iter()
            .map(|&blocks| AlignedBuf::zeroed(blocks * BLOCK))
            .collect();
        let total: usize = runs.iter().sum();
        let start = skip.min(total - 1);
        let len = (total - start).saturating_sub(cut).max(1);
        let runs: Vec<PageRun> = bufs.iter().map(|buf| buf.runs()[0]).collect();
        let addresses = runs.iter().flat_map(|run| {
            (0..run.len())
                .step_by(BLOCK)
                .map(|at| run.as_ptr().addr() + at)
                .collect::<Vec<_>>()
        });
        let blocks: Vec<usize> = addresses.skip(start).take(len).collect();
        let gone = Arc::new(AtomicBool::new(false));
        let outcome: Outcome = Arc::default();
        let told = outcome.clone();
        let end_io = Box::new(move |done: Completion| {
            let before = told.lock().unwrap().replace((done.bytes, done.error));
            assert!(before.is_none(), "ended twice");
        });
        let pages = Box::new(WatchedPages {
            bufs,
            runs,
            gone: gone.clone(),
        });
        let kiobuf = Kiobuf::new(pages, start * BLOCK, len * BLOCK, end_io);
        let number = self.known.len();
        let (open, good, first_error) = (len, 0, None);
        self.known.push(Known {
            blocks,
            open,
            good,
            first_error,
            outcome,
            gone,
        });
        self.chains.push((
            Chain::from(kiobuf),
            (0..len).map(|block| (number, block)).collect(),
        ));
    }

    fn index(&self, any: usize) -> Option<usize> {
        any.checked_rem(self.chains.len())
    }

    fn join(&mut self, a: usize, b: usize, front: bool) {
        if self.chains.len() < 2 {
            return;
        }
        let (other, mut other_blocks) = self.chains.swap_remove(a % self.chains.len());
        let (chain, blocks) = self.index(b).map(|b| &mut self.chains[b]).unwrap();
        if front {
            chain.prepend(other);
            other_blocks.append(blocks);
            *blocks = other_blocks;
        } else {
            chain.append(other);
            blocks.append(&mut other_blocks);
        }
    }

    fn split(&mut self, a: usize, at: usize) {
        let Some(a) = self.index(a) else { return };
        let (chain, mut blocks) = self.chains.swap_remove(a);
        let at = at % (blocks.len() + 1);
        let (front, rest) = chain.split_at((at * BLOCK) as u64);
        let rest_blocks = blocks.split_off(at);
        for part in [(front, blocks), (rest, rest_blocks)] {
            assert_eq!(part.0.is_empty(), part.1.is_empty());
            if !part.0.is_empty() {
                self.chains.push(part);
            }
        }
    }

    /// Ends a chain; the first `good` blocks well, the rest with an error (of a known kind).
    fn complete(&mut self, a: usize, good: Option<usize>, kind: Option<ErrorKind>) {
        let Some(a) = self.index(a) else { return };
        let (chain, blocks) = self.chains.swap_remove(a);
        self.requests += 1;
        let offset = self.requests << 32;
        let good = good.map_or(0, |good| good % (blocks.len() + 1));
        let at = match kind {
            Some(ErrorKind::ShortTransfer) => offset + (good * BLOCK) as u64,
            Some(ErrorKind::Aborted) => 0,
            _ => offset,
        };
        for (index, &(number, _)) in blocks.iter().enumerate() {
            let known = &mut self.known[number];
            known.open -= 1;
            if index < good {
                known.good += BLOCK as u64;
            } else if let Some(kind) = kind {
                known.first_error.get_or_insert((kind, at));
            }
        }
        match kind {
            Some(ErrorKind::Aborted) => drop(chain),
            Some(ErrorKind::ShortTransfer) => {
                DeviceRequest::new(Op::Read, offset, chain).end(Ok((good * BLOCK) as u64));
            }
            Some(kind) => DeviceRequest::new(Op::Write, offset, chain).end(Err(kind)),
            None => DeviceRequest::new(Op::Write, offset, chain).end(Ok(u64::MAX)),
        }
    }

    /// Every chain has exactly the model's blocks; a kiobuf has ended if and only if none is open,
    /// and its pages live exactly as long.
    fn check(&self) {
        for (chain, blocks) in &self.chains {
            let mut iovecs = Vec::new();
            chain.fill_iovecs(0, &mut iovecs);
            let found: Vec<usize> = iovecs
                .iter()
                .flat_map(|part| {
                    (0..part.iov_len)
                        .step_by(BLOCK)
                        .map(|at| part.iov_base.addr() + at)
                })
                .collect();
            let wanted: Vec<usize> = blocks
                .iter()
                .map(|&(number, block)| self.known[number].blocks[block])
                .collect();
            assert_eq!(found, wanted);
            assert_eq!(chain.bytes(), (blocks.len() * BLOCK) as u64);
        }
        for known in &self.known {
            let outcome = *known.outcome.lock().unwrap();
            assert_eq!(outcome.is_some(), known.open == 0);
            assert_eq!(known.gone.load(Ordering::SeqCst), known.open == 0);
            if let Some((bytes, error)) = outcome {
                assert_eq!(bytes, known.good);
                assert_eq!(error.map(|error| (error.kind, error.at)), known.first_error);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    /// Each byte ends once, each kiobuf ends once with its first error and its good bytes, and no
    /// view outlives its pages, whatever was merged and split in between.
    #[test]
    fn every_schedule_ends_each_byte_once(steps in prop::collection::vec(step(), 1..40)) {
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::New { runs, skip, cut } => model.new_kiobuf(&runs, skip, cut),
                Step::Append(a, b) => model.join(a, b, false),
                Step::Prepend(a, b) => model.join(a, b, true),
                Step::Split(a, at) => model.split(a, at),
                Step::Good(a) => {
                    let Some(index) = model.index(a) else { continue };
                    let all = model.chains[index].1.len();
                    model.complete(a, Some(all), None);
                }
                Step::Bad(a) => model.complete(a, None, Some(ErrorKind::Os(5))),
                Step::Short(a, good) => {
                    let Some(index) = model.index(a) else { continue };
                    let good = good % model.chains[index].1.len();
                    model.complete(a, Some(good), Some(ErrorKind::ShortTransfer));
                }
                Step::Drop(a) => model.complete(a, None, Some(ErrorKind::Aborted)),
            }
            model.check();
        }
        while !model.chains.is_empty() {
            model.complete(0, None, Some(ErrorKind::Aborted));
        }
        model.check();
    }
}
