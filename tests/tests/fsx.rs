//! fsx: random operations on one file, each read compared with what fsx remembers.
//!
//! Ten configurations: the file opened as usual and with O_DIRECT, mapped and not, with `direct_io`
//! and `writeback_cache`; opened as usual with the default, `cache=auto`, mapped and not. Each with
//! four shapes of files and operations, on three members, with a cache of 32 MiB. Several times in
//! a run, while fsx has the file closed, the volume is unmounted, checked and mounted anew, and has
//! to show the same bytes; then fsx goes on, with what it remembers.
//! `tests/preload/fsx.c` brings what fsx lacks: O_DIRECT, zeroed ranges, the remounts.
//!
//! Environment: `FSX_OPS` (operations of a run), `FSX_SEEDS` (runs of a configuration, of seeds
//! `SEED` and up), `FSX_PROGRESS` (a file to which a line is added with each remount).
//! `scripts/campaign fsx` sets them.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, Output};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::pattern;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume};

const CACHE_BYTES: u64 = 32 * MIB;
const CACHE_OPTION: &str = "cache_size=32M";
/// Operations of a run unless told otherwise: a sample that takes seconds.
const OPS_DEFAULT: u64 = 2000;
/// Runs of a configuration unless told otherwise: one of each shape.
const SEEDS_DEFAULT: u64 = 4;
/// Fewer operations a second than this are taken for a hang.
const OPS_PER_SEC_MIN: u64 = 40;
/// What a run may take beside its operations.
const OVERHEAD_SECS: u64 = 60;
/// Operations between two remounts: so many that the cache has had its say, and not more.
const REMOUNT_OPS: RangeInclusive<u64> = 500..=25_000;
/// How often fsx closes and opens the file, among all its operations.
const CLOSE_OPEN_WEIGHT: u64 = 10;

/// How the file is cached by the kernel, opened and accessed.
#[derive(Clone, Copy)]
struct Setup {
    mode: &'static str,
    o_direct: bool,
    mapped: bool,
}

const DIRECT_IO: Setup = Setup {
    mode: "direct_io",
    o_direct: false,
    mapped: false,
};
const AUTO: Setup = Setup {
    mode: "cache=auto",
    ..DIRECT_IO
};
const WRITEBACK: Setup = Setup {
    mode: "writeback_cache",
    ..DIRECT_IO
};

fn main() -> ExitCode {
    let limit = Duration::from_secs(OVERHEAD_SECS + seeds() * run_limit_secs());
    let test = |name, run| Test { name, limit, run };
    runner::main(
        "fsx",
        &[
            test("buffered", |env| DIRECT_IO.exercise(env)),
            test("buffered_mmap", |env| DIRECT_IO.mapped().exercise(env)),
            test("o_direct", |env| DIRECT_IO.o_direct().exercise(env)),
            test("o_direct_mmap", |env| {
                DIRECT_IO.o_direct().mapped().exercise(env)
            }),
            test("auto_buffered", |env| AUTO.exercise(env)),
            test("auto_buffered_mmap", |env| AUTO.mapped().exercise(env)),
            test("writeback_buffered", |env| WRITEBACK.exercise(env)),
            test("writeback_buffered_mmap", |env| {
                WRITEBACK.mapped().exercise(env)
            }),
            test("writeback_o_direct", |env| {
                WRITEBACK.o_direct().exercise(env)
            }),
            test("writeback_o_direct_mmap", |env| {
                WRITEBACK.o_direct().mapped().exercise(env)
            }),
        ],
    )
}

/// A positive number from the environment.
fn number(key: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(key) else {
        return default;
    };
    match text.parse() {
        Ok(number) if number > 0 => number,
        _ => panic!("{key}={text}: not a positive number"),
    }
}

fn ops() -> u64 {
    number("FSX_OPS", OPS_DEFAULT)
}

fn seeds() -> u64 {
    number("FSX_SEEDS", SEEDS_DEFAULT)
}

fn run_limit_secs() -> u64 {
    OVERHEAD_SECS + ops() / OPS_PER_SEC_MIN
}

/// How large file and operations are.
struct Shape {
    file_bytes: u64,
    op_bytes_max: u64,
    align: u64,
    /// How often the file is cut or grown, among all operations.
    truncate_weight: u64,
    /// Whether each store to a mapping is followed by msync.
    msync: bool,
}

/// The shape of a run is its seed modulo four.
const SHAPES: [Shape; 4] = [
    // More than the cache holds, and rarely cut, so that folios are evicted and read again.
    Shape {
        file_bytes: 48 * MIB,
        op_bytes_max: 256 << 10,
        align: 1,
        truncate_weight: 1,
        msync: false,
    },
    // fsx's own default.
    Shape {
        file_bytes: 256 << 10,
        op_bytes_max: 64 << 10,
        align: 1,
        truncate_weight: 40,
        msync: true,
    },
    // Whole blocks: with O_DIRECT, those of 64 KiB and more go past the cache.
    Shape {
        file_bytes: 16 * MIB,
        op_bytes_max: 256 << 10,
        align: 4096,
        truncate_weight: 10,
        msync: true,
    },
    // Sectors.
    Shape {
        file_bytes: 4 * MIB,
        op_bytes_max: 128 << 10,
        align: 512,
        truncate_weight: 20,
        msync: false,
    },
];

impl Shape {
    /// The weights of fsx's operations.
    fn weights(&self, mapped: bool) -> [(&'static str, u64); 14] {
        let map = |weight| if mapped { weight } else { 0 };
        [
            ("close_open", CLOSE_OPEN_WEIGHT),
            ("read", 100),
            ("write", 100),
            ("mapread", map(100)),
            ("mapwrite", map(100)),
            ("invalidate", map(10)),
            ("truncate", self.truncate_weight),
            ("fsync", 5),
            ("fdatasync", 5),
            // fsx asks for zero bytes at times if it has to align, which is an error.
            ("posix_fallocate", if self.align == 1 { 30 } else { 0 }),
            ("punch_hole", 50),
            ("sendfile", 30),
            ("posix_fadvise", 20),
            ("copy_file_range", 40),
        ]
    }

    fn configuration(&self, mapped: bool) -> String {
        let Self {
            file_bytes,
            op_bytes_max,
            align,
            ..
        } = self;
        let mut text = format!(
            "flen = {file_bytes}\nnomsyncafterwrite = {}\n\
             [opsize]\nmin = {align}\nmax = {op_bytes_max}\nalign = {align}\n[weights]\n",
            !self.msync
        );
        for (op, weight) in self.weights(mapped) {
            text.push_str(&format!("{op} = {weight}\n"));
        }
        text
    }

    /// Operations between two openings of the file, on average.
    fn ops_per_open(&self, mapped: bool) -> u64 {
        let all: u64 = self.weights(mapped).iter().map(|entry| entry.1).sum();
        all / CLOSE_OPEN_WEIGHT
    }
}

impl Setup {
    const fn o_direct(self) -> Self {
        Self {
            o_direct: true,
            ..self
        }
    }

    const fn mapped(self) -> Self {
        Self {
            mapped: true,
            ..self
        }
    }

    /// All runs of one configuration.
    fn exercise(self, env: &Env) -> Outcome {
        let fsx = env.need_crate("fsx")?;
        let preload = env.preload_library("fsx.c", &[])?;
        env.need_space(1024 * MIB)?;
        let first = pattern::seed();
        let mut volume = Volume::format(env, "v", &[256 * MIB; 3], &[]);
        volume.mount(&[self.mode, CACHE_OPTION]);
        for seed in first..first + seeds() {
            let mut run = Run {
                env,
                setup: self,
                shape: &SHAPES[usize::try_from(seed % 4).expect("below four")],
                seed,
                file: volume.path(&format!("file{seed}")),
                ask: env.path("remount"),
                started: Instant::now(),
                remounts: 0,
            };
            run.go(&fsx, &preload, &mut volume);
            volume.assert_memory_bounded(CACHE_BYTES);
            fs::remove_file(&run.file).expect("remove the file");
        }
        volume.umount();
        volume.fsck_clean();
        Ok(())
    }
}

/// One run of fsx.
struct Run<'a> {
    env: &'a Env,
    setup: Setup,
    shape: &'a Shape,
    seed: u64,
    /// The file under test.
    file: PathBuf,
    /// Made by the preloaded library when it waits for a remount.
    ask: PathBuf,
    started: Instant,
    remounts: u64,
}

impl Run<'_> {
    fn go(&mut self, fsx: &Path, preload: &Path, volume: &mut Volume) {
        let config = self.env.path("fsx.toml");
        fs::write(&config, self.shape.configuration(self.setup.mapped))
            .expect("write the settings");
        let every = (self.remount_ops() / self.shape.ops_per_open(self.setup.mapped)).max(1);
        let mut command = Cmd::new(fsx)
            .env("LD_PRELOAD", preload)
            .env("FSX_FILE", &self.file)
            .env("FSX_ASK", &self.ask)
            .env("FSX_EVERY", every.to_string());
        if self.setup.o_direct {
            command = command.env("FSX_DIRECT", "1");
        }
        let numbers = [ops().to_string(), self.seed.to_string()];
        let command = command.args(["-N", &numbers[0], "-S", &numbers[1], "-f"]);
        let command = command.arg(&config).arg("-P").arg(&self.env.dir);
        let limit = Duration::from_secs(run_limit_secs());
        let mut running = command.arg(&self.file).limit_secs(limit.as_secs()).spawn();
        while running.is_running() {
            assert!(self.started.elapsed() < limit, "no end after {limit:?}");
            if self.ask.exists() {
                self.remount_and_compare(volume);
                self.remounts += 1;
                self.tell(self.remounts * every * self.shape.ops_per_open(self.setup.mapped));
                fs::remove_file(&self.ask).expect("answer fsx");
            } else {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        self.judge(&running.wait());
        self.tell(ops());
        self.remount_and_compare(volume);
    }

    fn remount_ops(&self) -> u64 {
        (ops() / 4).clamp(*REMOUNT_OPS.start(), *REMOUNT_OPS.end())
    }

    /// What is on the devices is what was to be seen before.
    fn remount_and_compare(&self, volume: &mut Volume) {
        let before = fs::read(&self.file).expect("read the file");
        volume.umount();
        volume.fsck_clean();
        volume.mount(&[self.setup.mode, CACHE_OPTION]);
        let after = fs::read(&self.file).expect("read the file again");
        assert_eq!(before.len(), after.len(), "length after the remount");
        let differs = before.iter().zip(&after).position(|pair| pair.0 != pair.1);
        assert!(
            differs.is_none(),
            "after the remount, byte {differs:?} differs"
        );
    }

    /// Fails unless fsx was content and the preloaded library did its part.
    fn judge(&self, output: &Output) {
        let lines: Vec<&str> = output.stderr.lines().collect();
        if !output.status.success() {
            // What is wrong comes first, and what led to it last.
            let skipped = lines.len().saturating_sub(50).max(10).min(lines.len());
            for line in lines[..10.min(skipped)].iter().chain(&lines[skipped..]) {
                println!("{line}");
            }
            let (mode, seed) = (self.setup.mode, self.seed);
            panic!("-o {mode}, SEED={seed}: fsx: {}", output.status);
        }
        assert!(output.stdout.contains("A-OK"), "{}", output.describe());
        let told = lines.iter().find_map(|line| line.strip_prefix("preload: "));
        let told = told.expect("the preloaded library was loaded");
        println!("{told}");
        let count = |key: &str| -> u64 {
            let words = told.split_whitespace();
            let mut values = words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            let value = values.next().and_then(|text| text.parse().ok());
            value.unwrap_or_else(|| panic!("no {key} in '{told}'"))
        };
        let opens_direct = u64::from(self.setup.o_direct) * count("opens");
        assert_eq!(count("direct"), opens_direct);
        assert_eq!(count("remounts"), self.remounts);
        let few = ops() < OPS_DEFAULT;
        assert!(few || (self.remounts > 0 && count("holes") > 0 && count("zeroed") > 0));
    }

    /// Says how far it is. fsx does not tell; how often it opened the file does, nearly.
    fn tell(&self, done: u64) {
        let (ops, seed) = (ops(), self.seed);
        let done = done.min(ops);
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let rate = done * 1000 / millis.max(1);
        let left = (ops - done) / rate.max(1);
        let line = format!(
            "seed {seed}: {done} of {ops} operations, {rate}/s, {} remounts, {}:{:02} to go\n",
            self.remounts,
            left / 60,
            left % 60
        );
        print!("{line}");
        if let Some(path) = std::env::var_os("FSX_PROGRESS") {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let mut file = file.expect("open FSX_PROGRESS");
            file.write_all(line.as_bytes()).expect("tell the progress");
        }
    }
}
