//! Measures braidfs beside the devices themselves, FUSE's ceiling, and other file systems.
//!
//! All peers are measured in the same run on the same media: round after round, workload after
//! workload, one peer after the other, each freshly formatted. Ratios are made within a round. See
//! `--help`; `scripts/bench` builds what is needed and starts this.
//!
//! | to find | open |
//! | --- | --- |
//! | the workloads, and how much of each is done | `plan.rs` |
//! | the command line | `cli.rs` |
//! | who is measured; formatting, mounting, making cold | `peers.rs`; `stage.rs` |
//! | loop devices and images | `media.rs` |
//! | workloads of large files; of many names | `large.rs`; `small.rs` |
//! | fio, and what it says | `fio.rs` |
//! | processor time, memory, device requests | `measure.rs` |
//! | what must be reached | `targets.rs` |
//! | medians and ratios; tables; charts | `numbers.rs`; `report.rs`; `svg.rs` |
//! | the process that cleans up | `guard.rs` |
//!
//! Two processes: one measures, in a mount namespace of its own; the other waits for it, and cleans
//! up whatever ends it.

mod cli;
mod fio;
mod guard;
mod large;
mod measure;
mod media;
mod numbers;
mod peers;
mod plan;
mod report;
mod run;
mod small;
mod stage;
mod svg;
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::Cmd;
use clap::Parser;
use serde_json::json;

use cli::{Cli, Plan};
use media::{Kind as MediaKind, Media};
use peers::Peer;
use plan::Workload;
use report::Report;
use run::Run;

/// Exit code of wrong usage.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.list {
        cli::list();
        return ExitCode::SUCCESS;
    }
    let plan = match cli::plan_of(&cli) {
        Ok(plan) => plan,
        Err(why) => {
            eprintln!("bench: {why}");
            return ExitCode::from(USAGE);
        }
    };
    match guard::inside() {
        Some(work) => measure_all(&cli, &plan, &work),
        None => guard::watch(cli.dir.as_deref()),
    }
}

/// Everything that is left to do, in its order.
struct Step<'p> {
    round: usize,
    workload: &'static Workload,
    peer: &'p Peer,
    /// About how long it takes.
    secs: f64,
}

fn steps<'p>(plan: &'p Plan, media: MediaKind, rounds: usize) -> Vec<Step<'p>> {
    let mut steps = Vec::new();
    for round in 1..=rounds {
        for workload in &plan.workloads {
            let peers = plan.peers.iter();
            for peer in peers.filter(|peer| plan.has(workload, peer, media)) {
                steps.push(Step {
                    round,
                    workload,
                    peer,
                    secs: plan.scale.secs_of(workload),
                });
            }
        }
    }
    steps
}

fn measure_all(cli: &Cli, plan: &Plan, work: &Path) -> ExitCode {
    let ram = work.join("ram");
    fs::create_dir(&ram).expect("a folder");
    Cmd::new("mount")
        .args(["-t", "tmpfs", "-o", "size=90%", "tmpfs"])
        .arg(&ram)
        .quiet()
        .ok();
    let mut report = Report {
        machine: report::machine(),
        run: json!({
            "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
            "rounds": cli.rounds,
            "quick": cli.quick,
            "large_bytes": plan.scale.large_bytes,
        }),
        skipped: plan.skipped.clone(),
        failures: Vec::new(),
        samples: Vec::new(),
        targets: Vec::new(),
    };
    for (peer, why) in &plan.skipped {
        println!("skipped: {peer}: {why}");
    }
    let rounds = usize::try_from(cli.rounds).unwrap_or(1);
    let all = plan
        .media
        .iter()
        .map(|media| (*media, steps(plan, *media, rounds)));
    let all: Vec<_> = all.filter(|(_, steps)| !steps.is_empty()).collect();
    let mut progress = Progress::new(all.iter().flat_map(|(_, steps)| steps));
    let mut is_written = true;
    for (kind, steps) in &all {
        for peer in &plan.peers {
            if let Err(why) = peers::fits(peer, *kind) {
                report
                    .skipped
                    .push((format!("{} on {}", peer.name, kind.name()), why.into()));
            }
        }
        let dir = match kind {
            MediaKind::Disk => work.join("images"),
            _ => ram.join("images"),
        };
        println!("media: {} (being prepared)", kind.name());
        let device_bytes = plan.scale.device_bytes(*kind);
        let media = match Media::new(*kind, &dir, device_bytes, work) {
            Ok(media) => media,
            Err(skip) => {
                println!("skipped: {}: {}", kind.name(), skip.0);
                report.skipped.push((kind.name().to_owned(), skip.0));
                continue;
            }
        };
        for step in steps {
            progress.show(step);
            measure(plan, step, &media, &ram, &mut report);
            progress.done(step);
            // What is measured is kept, also if the rest is interrupted.
            report.targets = targets::check(&report.samples);
            let written = report.write(&cli.out);
            is_written = written
                .inspect_err(|error| eprintln!("bench: {}: {error}", cli.out.display()))
                .is_ok();
        }
    }
    finish(cli, &report, is_written)
}

fn measure(plan: &Plan, step: &Step<'_>, media: &Media, ram: &Path, report: &mut Report) {
    let mut run = Run {
        workload: step.workload,
        peer: step.peer,
        round: step.round,
        plan,
        work: ram,
        samples: Vec::new(),
        media,
    };
    let done = catch_unwind(AssertUnwindSafe(|| run.perform()));
    for sample in &run.samples {
        let value = numbers::prefixed(sample.value);
        println!("    {:16} {value}{}", sample.row, sample.unit.symbol());
    }
    if let Err(payload) = done {
        let why = payload.downcast_ref::<String>().cloned();
        let why = why.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
        let what = format!("{} of {}", step.workload.name, step.peer.name);
        report
            .failures
            .push(format!("{what}: {}", why.unwrap_or_default()));
    }
    report.samples.append(&mut run.samples);
}

fn finish(cli: &Cli, report: &Report, is_written: bool) -> ExitCode {
    println!("\n{}", report.markdown());
    if is_written {
        println!(
            "bench.json, bench.md and charts are in {}",
            cli.out.display()
        );
    }
    let missed = report.targets.iter().any(|it| it.verdict == "missed");
    if !is_written || !report.failures.is_empty() || (cli.strict && missed) {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// How far it is, and how long it may still take.
struct Progress {
    begun: Instant,
    done: f64,
    total: f64,
}

impl Progress {
    fn new<'s>(steps: impl Iterator<Item = &'s Step<'s>>) -> Self {
        Self {
            begun: Instant::now(),
            done: 0.0,
            total: steps.map(|step| step.secs).sum(),
        }
    }

    fn show(&self, step: &Step<'_>) {
        let left = if self.done > 0.0 {
            let spent = self.begun.elapsed().as_secs_f64();
            let left = Duration::from_secs_f64(spent / self.done * (self.total - self.done));
            format!(", {} min left", left.as_secs().div_ceil(60))
        } else {
            String::new()
        };
        println!(
            "[{:3.0} %{left}] round {}: {}: {}",
            100.0 * self.done / self.total,
            step.round,
            step.workload.name,
            step.peer.name,
        );
    }

    fn done(&mut self, step: &Step<'_>) {
        self.done += step.secs;
    }
}
