//! Goes through workloads on several threads, with a count of what was seen.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use braidfs_blockdev::device::sim::{SimDevice, SimLoss};

use crate::check::{Depth, check};
use crate::cuts::{Cut, Known, each_cut, losses};
use crate::ops::{OPS, Workload, name_of};
use crate::record::{Bases, History, NoHistory, Setup, devices_of, record};

/// A check that takes longer hangs.
const STATE_SECS_MAX: u64 = 120;

/// One state in so many is also worked on and cut a second time.
const WORK_EVERY: u64 = 32;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub threads: usize,
    pub seconds: Option<u64>,
    /// Stop after so many different states.
    pub states: Option<u64>,
    /// Only one state in so many is checked at all.
    pub thin: u64,
    /// One state in so many is checked by fsck before it is mounted.
    pub fsck_every: u64,
    pub keep_going: bool,
    pub quiet: bool,
}

/// What was seen.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Outcome {
    pub seed: u64,
    pub workloads: u64,
    /// Of the workloads that were to be run; those with a refused operation are the same as a
    /// shorter one.
    pub workloads_refused: u64,
    pub workloads_planned: u64,
    pub cuts: u64,
    pub states: u64,
    pub states_different: u64,
    pub states_cut_twice: u64,
    pub violations: u64,
    pub seconds: f64,
    pub states_per_second: f64,
}

#[derive(Default)]
struct Counters {
    workloads: AtomicU64,
    refused: AtomicU64,
    cuts: AtomicU64,
    states: AtomicU64,
    different: AtomicU64,
    twice: AtomicU64,
    violations: AtomicU64,
}

/// What a thread is at, for whoever waits for it.
type Now = Mutex<(String, Instant)>;

struct Run<'a> {
    plan: &'a Plan,
    bases: &'a Bases,
    workloads: &'a [Workload],
    next: AtomicUsize,
    stop: AtomicBool,
    counters: Counters,
    began: Instant,
}

/// All workloads of up to `ops` operations, and `sampled` of each of three and four, in an order
/// that the seed gives; those of one operation come first.
pub fn workloads(ops: usize, sampled: usize, seed: u64) -> Vec<Workload> {
    let mut all: Vec<Workload> = Vec::new();
    let mut last: Vec<Workload> = vec![Vec::new()];
    for _ in 0..ops {
        let longer = |workload: &Workload| {
            let ops = 0..OPS.len();
            let mut longer: Vec<Workload> = Vec::new();
            longer.extend(ops.map(|nth| [workload.as_slice(), &[nth]].concat()));
            longer
        };
        last = last.iter().flat_map(longer).collect();
        all.extend(last.iter().cloned());
    }
    let mut state = seed;
    let mut below = |bound: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((state >> 33) % bound.max(1) as u64).expect("below the bound")
    };
    for len in [3, 4] {
        all.extend((0..sampled).map(|_| (0..len).map(|_| below(OPS.len())).collect()));
    }
    let shuffled = OPS.len().min(all.len());
    for at in (shuffled + 1..all.len()).rev() {
        all.swap(at, shuffled + below(at + 1 - shuffled));
    }
    all
}

/// The command that repeats a state.
fn repeat(plan: &Plan, history: &History, cut: usize, loss: SimLoss) -> String {
    format!(
        "crashcheck one --seed {} --workload {} --cut {cut} --subset {loss}",
        plan.seed, history.name
    )
}

fn caught(action: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(action)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

impl Run<'_> {
    fn is_over(&self) -> bool {
        let late = |seconds: u64| self.began.elapsed() >= Duration::from_secs(seconds);
        let seen = self.counters.different.load(Ordering::Relaxed);
        self.stop.load(Ordering::Relaxed)
            || self.plan.seconds.is_some_and(late)
            || self.plan.states.is_some_and(|states| seen >= states)
    }

    fn fail(&self, what: &str) {
        self.counters.violations.fetch_add(1, Ordering::Relaxed);
        eprintln!("\nVIOLATION: {what}");
        if !self.plan.keep_going {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn work(&self, now: &Now) {
        while !self.is_over() {
            let nth = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(workload) = self.workloads.get(nth) else {
                return;
            };
            let name = name_of(workload);
            *now.lock().expect("nobody panics with it") =
                (format!("running {name}"), Instant::now());
            let setup = Setup::of(workload, self.plan.seed);
            match record(self.bases, workload, setup) {
                Ok(history) => {
                    self.counters.workloads.fetch_add(1, Ordering::Relaxed);
                    self.cut_everywhere(&history, now);
                }
                Err(NoHistory::Refused) => {
                    self.counters.refused.fetch_add(1, Ordering::Relaxed);
                }
                Err(NoHistory::Failed(what)) => self.fail(&format!("{name}: {what}")),
            }
        }
    }

    fn cut_everywhere(&self, history: &History, now: &Now) {
        let mut known = Known::default();
        let ended = each_cut(history, |cut| {
            self.counters.cuts.fetch_add(1, Ordering::Relaxed);
            for loss in losses(cut, self.plan.seed) {
                if self.is_over() {
                    return Err(());
                }
                let nth = self.counters.states.fetch_add(1, Ordering::Relaxed);
                if !nth.is_multiple_of(self.plan.thin) {
                    continue;
                }
                let images = cut.replay.images(loss);
                if !known.is_new(&images, cut) {
                    continue;
                }
                let number = self.counters.different.fetch_add(1, Ordering::Relaxed);
                let command = repeat(self.plan, history, cut.behind, loss);
                *now.lock().expect("nobody panics with it") = (command.clone(), Instant::now());
                let twice = number.is_multiple_of(WORK_EVERY);
                if twice {
                    self.counters.twice.fetch_add(1, Ordering::Relaxed);
                }
                let depth = Depth {
                    fsck: twice || number.is_multiple_of(self.plan.fsck_every),
                    work: twice.then_some(number ^ self.plan.seed << 32),
                };
                if let Err(what) = check_one(history, cut, &devices_of(&images), depth) {
                    self.fail(&format!("{what}\n  repeat it with: {command}"));
                    return Err(());
                }
            }
            Ok(())
        });
        // Stopped early or not: what was seen is counted.
        ended.unwrap_or_default();
    }

    fn outcome(&self) -> Outcome {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        let seconds = self.began.elapsed().as_secs_f64();
        Outcome {
            seed: self.plan.seed,
            workloads: load(&counters.workloads),
            workloads_refused: load(&counters.refused),
            workloads_planned: self.workloads.len() as u64,
            cuts: load(&counters.cuts),
            states: load(&counters.states),
            states_different: load(&counters.different),
            states_cut_twice: load(&counters.twice),
            violations: load(&counters.violations),
            seconds,
            states_per_second: load(&counters.different) as f64 / seconds.max(0.001),
        }
    }

    /// A line now and then, and an end to what hangs.
    fn watch(&self, threads: &[Now], ended: &AtomicUsize) {
        let mut last = Instant::now();
        while ended.load(Ordering::SeqCst) < threads.len() {
            std::thread::sleep(Duration::from_millis(20));
            for now in threads {
                let (what, since) = now.lock().expect("nobody panics with it").clone();
                if !what.is_empty() && since.elapsed() > Duration::from_secs(STATE_SECS_MAX) {
                    eprintln!("\nVIOLATION: no end after {STATE_SECS_MAX} s: {what}");
                    std::process::exit(1);
                }
            }
            if !self.plan.quiet && last.elapsed() >= Duration::from_secs(5) {
                last = Instant::now();
                eprintln!("{}", progress(&self.outcome(), self.plan));
            }
        }
    }
}

fn progress(seen: &Outcome, plan: &Plan) -> String {
    let done = seen.workloads + seen.workloads_refused;
    let shares = [
        Some(done as f64 / (seen.workloads_planned as f64).max(1.0)),
        plan.seconds.map(|seconds| seen.seconds / seconds as f64),
        plan.states
            .map(|states| seen.states_different as f64 / states as f64),
    ];
    let share = shares.into_iter().flatten().fold(0.0, f64::max);
    let left = seen.seconds * (1.0 - share).max(0.0) / share.max(1e-6);
    format!(
        "{:3.0} %, about {left:.0} s left: {done} of {} workloads, {} different states, {:.0}/s",
        share * 100.0,
        seen.workloads_planned,
        seen.states_different,
        seen.states_per_second
    )
}

fn check_one(
    history: &History,
    cut: &Cut,
    devices: &[Arc<SimDevice>],
    depth: Depth,
) -> Result<(), String> {
    caught(|| check(history, devices, cut.oldest..=cut.youngest, depth))
}

/// Goes through the workloads.
pub fn run(plan: &Plan, bases: &Bases, workloads: &[Workload]) -> Outcome {
    let run = Run {
        plan,
        bases,
        workloads,
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        counters: Counters::default(),
        began: Instant::now(),
    };
    let idle = || Mutex::new((String::new(), Instant::now()));
    let threads: Vec<Now> = (0..plan.threads).map(|_| idle()).collect();
    let ended = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for now in &threads {
            let (run, ended) = (&run, &ended);
            scope.spawn(move || {
                let worked = caught(|| {
                    run.work(now);
                    Ok(())
                });
                if let Err(what) = worked {
                    run.fail(&what);
                }
                *now.lock().expect("nobody panics with it") = (String::new(), Instant::now());
                ended.fetch_add(1, Ordering::SeqCst);
            });
        }
        run.watch(&threads, &ended);
    });
    run.outcome()
}

/// Checks one state, as often as asked: what runs beside a step may fall out differently.
pub fn one(
    plan: &Plan,
    bases: &Bases,
    workload: &Workload,
    behind: usize,
    loss: SimLoss,
) -> Result<(), String> {
    let setup = Setup::of(workload, plan.seed);
    let history = match record(bases, workload, setup) {
        Ok(history) => history,
        Err(NoHistory::Refused) => return Err("an operation of the workload is refused".into()),
        Err(NoHistory::Failed(what)) => return Err(what),
    };
    let mut outcome = Err(format!(
        "the record has {} events, none to cut behind number {behind}",
        history.events.len()
    ));
    each_cut(&history, |cut| {
        if cut.behind != behind {
            return Ok(());
        }
        println!(
            "{} devices, {} of {} events, {} writes at stake, {} steps: {:?}",
            history.devices,
            behind,
            history.events.len(),
            cut.replay.pending(),
            history.steps.len(),
            history.steps
        );
        println!(
            "may be found: the trees after steps {}..={}",
            cut.oldest, cut.youngest
        );
        let depth = Depth {
            fsck: true,
            work: Some(plan.seed),
        };
        outcome = check_one(&history, cut, &cut.replay.wreck(loss), depth);
        Err(())
    })
    .unwrap_or_default();
    outcome
}
