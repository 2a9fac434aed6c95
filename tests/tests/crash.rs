//! The daemon killed under a mixed load, again and again: what fsync promised is there, nothing
//! is torn, and no repair is needed.
//!
//! Every round mounts in the other cache mode, lets everything work at once for part of a
//! second, kills the daemon with SIGKILL, has `fsck -n` find nothing, mounts, and checks each
//! load by its own rules:
//!
//! | load | after the kill |
//! | --- | --- |
//! | writes, overwrites, replacements, appends, unlinks, with fsync | a model of each file |
//! | files replaced and moved, no fsync | one moment, no older than the last fsync |
//! | fio with verify | every block that ended with fsync, or was overwritten in place |
//! | SQLite, both journals | `integrity_check`, and every row that was committed |
//! | git with `core.fsync=all` | `fsck --full --strict`, the last acknowledged commit |
//! | names made and removed as fast as they go | `fsck -n` |
//!
//! `KILL_ROUNDS` says how many rounds; `SEED` replays the choices, not the timing.

#[path = "crash/model.rs"]
mod model;
#[path = "crash/programs.rs"]
mod programs;
#[path = "crash/renames.rs"]
mod renames;

use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use braidfs_tests::env::{Env, Outcome, number_from_environment};
use braidfs_tests::pattern::{self, Random};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{CACHE_MODES, GIB, Volume};
use model::Worker;
use programs::Programs;
use renames::Renamer;

/// Rounds unless `KILL_ROUNDS` says otherwise.
const ROUNDS: u64 = 50;
const WORKERS: u64 = 2;
/// A round on busy cores, with much to spare.
const ROUND_SECS_MAX: u64 = 20;
/// A mount after a crash is quick, whatever was going on.
const MOUNT_LIMIT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let limit = 120 + rounds() * ROUND_SECS_MAX;
    let name = "a_mixed_load_survives_every_kill";
    runner::main("crash", &[Test::new(name, limit, survives_kills)])
}

fn rounds() -> u64 {
    number_from_environment("KILL_ROUNDS", ROUNDS)
}

/// How long the parts of the rounds took, summed up.
#[derive(Debug, Default)]
struct Times {
    fsck: Duration,
    mount: Duration,
    check: Duration,
}

/// All that goes on at once.
struct Loads {
    workers: Vec<Worker>,
    renamer: Renamer,
    programs: Programs,
}

fn survives_kills(env: &Env) -> Outcome {
    env.need_tools(&["fio", "git", "sqlite3", "stdbuf"])?;
    let seed = pattern::seed();
    let mut random = Random::new(seed);
    let mut volume = Volume::format(env, "v", &[GIB; 3], &[]);
    let mut mode = CACHE_MODES[0];
    volume.mount(&[mode]);
    let mut loads = Loads::new(env, &volume, seed);
    sync_dir(&volume.mountpoint);
    let mut times = Times::default();
    let (begun, rounds) = (Instant::now(), rounds());
    for round in 1..=rounds {
        let kernel_cached = mode == CACHE_MODES[1];
        work_until_killed(&mut volume, &mut loads, &mut random, round);
        volume.detach();
        let since = Instant::now();
        volume.fsck_clean();
        times.fsck += since.elapsed();
        mode = CACHE_MODES[usize::from(!kernel_cached)];
        let since = Instant::now();
        volume.mount(&[mode]);
        let took = since.elapsed();
        assert!(took < MOUNT_LIMIT, "the mount after a crash took {took:?}");
        times.mount += took;
        let since = Instant::now();
        loads.check(kernel_cached);
        sync_dir(&volume.mountpoint);
        times.check += since.elapsed();
        println!("round {round}, now {mode}: {loads}");
    }
    println!("{rounds} rounds in {:?}: {times:?}", begun.elapsed());
    volume.umount();
    volume.fsck_clean();
    let steps = loads.durable_steps();
    assert!(
        steps >= rounds,
        "only {steps} steps were durable in {rounds} rounds"
    );
    loads.programs.assert_all_worked();
    Ok(())
}

/// Everything at once, until the daemon is killed in the middle of it.
fn work_until_killed(volume: &mut Volume<'_>, loads: &mut Loads, random: &mut Random, round: u64) {
    let load = Duration::from_millis(random.below(500));
    let killing = AtomicBool::new(false);
    let mut running = loads.programs.start();
    std::thread::scope(|scope| {
        for worker in &mut loads.workers {
            scope.spawn(|| worker.work(&killing));
        }
        scope.spawn(|| loads.renamer.work(&killing));
        let mut storm_random = Random::new(random.next());
        let (storm_dir, killing) = (volume.path("storm"), &killing);
        scope.spawn(move || storm(&storm_dir, &mut storm_random, killing));
        running.wait_for_one(round);
        std::thread::sleep(load);
        killing.store(true, Ordering::SeqCst);
        loads.programs.take_down(&running);
        volume.kill_daemon_only();
    });
    running.end();
}

impl Loads {
    fn new(env: &Env, volume: &Volume<'_>, seed: u64) -> Self {
        let worker = |index| Worker::new(volume.path(&format!("worker-{index}")), index, seed);
        Self {
            workers: (0..WORKERS).map(worker).collect(),
            renamer: Renamer::new(volume.path("renames")),
            programs: Programs::new(env, &volume.mountpoint),
        }
    }

    /// Each load's own check. Whatever a cut left is cleaned up, so that the models are exact
    /// again.
    fn check(&mut self, kernel_cached: bool) {
        std::thread::scope(|scope| {
            for worker in &mut self.workers {
                scope.spawn(move || worker.verify(kernel_cached));
            }
            scope.spawn(|| self.renamer.verify());
            self.programs.verify(scope);
        });
    }

    fn durable_steps(&self) -> u64 {
        self.workers.iter().map(|worker| worker.steps).sum()
    }
}

impl fmt::Display for Loads {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (steps, renames) = (self.durable_steps(), self.renamer.steps());
        write!(
            out,
            "{steps} durable steps, {renames} renames, {}",
            self.programs
        )
    }
}

fn sync_dir(dir: &Path) {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.unwrap_or_else(|error| panic!("fsync of {}: {error}", dir.display()));
}

/// Names made, moved and removed as fast as they go, nothing of it durable on purpose: work for
/// the consistency check.
fn storm(dir: &Path, random: &mut Random, killing: &AtomicBool) {
    let mut step = || -> std::io::Result<()> {
        let pick = |random: &mut Random| dir.join(format!("n-{}", random.below(200)));
        let (one, other) = (pick(random), pick(random));
        let harmless = |result: std::io::Result<()>| match result {
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Err(error),
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Err(error),
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Err(error),
            _ => Ok(()),
        };
        harmless(fs::create_dir_all(dir))?;
        harmless(match random.below(6) {
            0 => fs::create_dir(&one),
            1 => fs::write(&one, random.bytes(20_000)),
            2 => fs::rename(&one, &other),
            3 => fs::hard_link(&one, &other),
            4 => fs::remove_dir(&one),
            _ => fs::remove_file(&one),
        })
    };
    while !killing.load(Ordering::SeqCst) {
        if let Err(error) = step() {
            assert!(
                killing.load(Ordering::SeqCst),
                "before the daemon was killed: {error}"
            );
            return;
        }
    }
}
