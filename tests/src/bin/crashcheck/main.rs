//! Cuts the power everywhere in small workloads and checks what is left.
//!
//! Every workload of up to two operations (and a sample of longer ones) runs on simulated devices
//! with volatile caches. At each write and each flush the power is cut; any subset of the writes
//! since each device's last flush may have landed, whole or torn, differently on each device. Each
//! state that this gives is mounted, read whole, and compared with the contract: see `check.rs`.
//!
//! | to find | open |
//! | --- | --- |
//! | the operations | `ops.rs` |
//! | how they are done to the file system | `session.rs` |
//! | what a tree is | `tree.rs` |
//! | running a workload, and what it promised | `record.rs` |
//! | where the power is cut, and what is lost | `cuts.rs` |
//! | checking a state | `check.rs` |
//! | threads, progress, counts | `run.rs` |
//! | long workloads of several threads, with faults | `long.rs` |

mod check;
mod cuts;
mod long;
mod ops;
mod record;
mod run;
mod session;
mod tree;

use std::process::ExitCode;
use std::time::Duration;

use braidfs_blockdev::device::sim::SimLoss;
use clap::{Args, Parser, Subcommand};

use record::Bases;
use run::{Outcome, Plan};

/// Cuts the power everywhere in small workloads and checks what is left.
#[derive(Parser)]
#[command(name = "crashcheck", version)]
struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    all: All,
}

#[derive(Subcommand)]
enum Verb {
    /// Repeat one state.
    One(One),
    /// Long random workloads of several threads on failing devices, cut at random points.
    Long(Long),
    /// Show the operations.
    List,
}

#[derive(Args)]
struct Common {
    /// What random choices begin with.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Say only how it ended.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Args)]
struct All {
    #[command(flatten)]
    common: Common,
    /// Try all workloads of up to so many operations.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=3))]
    ops: u8,
    /// And so many workloads of three, and as many of four.
    #[arg(long, default_value_t = 0)]
    sample: usize,
    /// Only these workloads; operations are separated by commas. May be given again.
    #[arg(long)]
    workload: Vec<String>,
    /// Stop after this time.
    #[arg(long)]
    seconds: Option<u64>,
    /// Stop after so many different states.
    #[arg(long)]
    states: Option<u64>,
    /// Threads; by default as many as there are processors.
    #[arg(long)]
    threads: Option<usize>,
    /// Check only one state in so many: a quick look at many workloads.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    thin: u64,
    /// Check the metadata as a whole of one state in so many before it is mounted.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    fsck_every: u64,
    /// Go on after a violation.
    #[arg(long)]
    keep_going: bool,
    /// Print the outcome as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct One {
    #[command(flatten)]
    common: Common,
    /// The operations, separated by commas.
    #[arg(long)]
    workload: String,
    /// The power fails behind so many events.
    #[arg(long)]
    cut: usize,
    /// What is lost then, as crashcheck printed it.
    #[arg(long)]
    subset: SimLoss,
    /// Run the workload and check so many times.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
}

#[derive(Args)]
struct Long {
    #[command(flatten)]
    common: Common,
    /// Stop after this time.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Threads that change things.
    #[arg(long, default_value_t = 3)]
    threads: u64,
    /// Print the outcome as JSON.
    #[arg(long)]
    json: bool,
}

impl Long {
    fn run(&self) -> Result<bool, String> {
        let seen = long::run(&long::Plan {
            seed: self.common.seed,
            seconds: self.seconds,
            threads: self.threads.max(1),
            round: Duration::from_millis(700),
            quiet: self.common.quiet || self.json,
        });
        if self.json {
            println!(
                "{}",
                serde_json::to_string_pretty(&seen).map_err(|e| e.to_string())?
            );
        } else {
            println!("crashcheck long: {seen:?}");
        }
        Ok(seen.violations == 0)
    }
}

impl All {
    fn plan(&self) -> Plan {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Plan {
            seed: self.common.seed,
            threads: self.threads.unwrap_or(cores).max(1),
            seconds: self.seconds,
            states: self.states,
            thin: self.thin,
            fsck_every: self.fsck_every,
            keep_going: self.keep_going,
            quiet: self.common.quiet || self.json,
        }
    }

    fn run(&self) -> Result<bool, String> {
        let workloads = match self.workload.as_slice() {
            [] => run::workloads(usize::from(self.ops), self.sample, self.common.seed),
            names => names
                .iter()
                .map(|name| ops::parse(name))
                .collect::<Result<_, _>>()?,
        };
        let seen = run::run(&self.plan(), &Bases::make()?, &workloads);
        if self.json {
            println!(
                "{}",
                serde_json::to_string_pretty(&seen).map_err(|e| e.to_string())?
            );
        } else {
            print(&seen);
        }
        Ok(seen.violations == 0)
    }
}

fn print(seen: &Outcome) {
    println!(
        "crashcheck, seed {}: {} workloads ({} planned, {} with an operation that was refused), \
         {} cuts, {} states, {} of them different ({} cut twice), {:.0} s, {:.0} states/s: {} \
         violations",
        seen.seed,
        seen.workloads,
        seen.workloads_planned,
        seen.workloads_refused,
        seen.cuts,
        seen.states,
        seen.states_different,
        seen.states_cut_twice,
        seen.seconds,
        seen.states_per_second,
        seen.violations
    );
}

impl One {
    fn run(&self) -> Result<bool, String> {
        let plan = Plan {
            seed: self.common.seed,
            threads: 1,
            seconds: None,
            states: None,
            thin: 1,
            fsck_every: 1,
            keep_going: false,
            quiet: self.common.quiet,
        };
        let workload = ops::parse(&self.workload)?;
        let bases = Bases::make()?;
        for _ in 0..self.repeat.max(1) {
            if let Err(what) = run::one(&plan, &bases, &workload, self.cut, self.subset) {
                eprintln!("VIOLATION: {what}");
                return Ok(false);
            }
        }
        println!("as it should be");
        Ok(true)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Each state mounts a cache of its own and uses a few of its pages: to touch whole huge pages
    // for that would take most of the time.
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        eprintln!("crashcheck: huge pages stay in use, which is slow: {error}");
    }
    let good = match cli.verb {
        Some(Verb::One(one)) => one.run(),
        Some(Verb::Long(long)) => long.run(),
        Some(Verb::List) => {
            ops::OPS
                .iter()
                .for_each(|op| println!("{:18} {:?}", op.name, op.steps));
            Ok(true)
        }
        None => cli.all.run(),
    };
    match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(what) => {
            eprintln!("crashcheck: {what}");
            ExitCode::from(2)
        }
    }
}
