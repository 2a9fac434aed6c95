//! A device that hangs, dies or comes back in the middle of load, on real mounts in both cache
//! modes: what can be served is served, nothing waits for ever, and nothing that fsync
//! acknowledged is lost.
//!
//! The member at fault is a file on another mount of braidfs, whose daemon is stopped, continued or
//! killed. So its requests hang, are answered after all, or fail with ECONNABORTED.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::report::list;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{
    CACHE_MODES, GIB, MIB, Volume, drop_kernel_caches, json, name, sparse_image,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// The time to answer that the mounts under test give their devices, and how long a call may then
/// take on a busy machine: it may wait for two requests in a row.
const TIMEOUT_OPTION: &str = "timeout=2";
const CALL_MAX: Duration = Duration::from_secs(20);
const FILE_LEN: usize = 96 << 10;
const WRITERS: u64 = 3;

fn main() -> ExitCode {
    let tests = [
        Test::new(
            "a_device_that_hangs_and_comes_back_loses_nothing",
            300,
            hangs_and_comes_back,
        ),
        Test::new(
            "a_device_that_dies_loses_nothing_that_was_fsynced",
            300,
            dies,
        ),
        Test::new(
            "umount_ends_while_a_device_hangs",
            300,
            umount_while_it_hangs,
        ),
        Test::new(
            "processes_that_wait_for_a_hanging_device_can_be_killed",
            300,
            can_be_killed,
        ),
        Test::new("a_daemon_that_was_stopped_blames_no_device", 200, stopped),
    ];
    runner::main("faults", &tests)
}

/// A volume of two members, of which the second lies on a mount that can be stopped.
struct Rig<'e> {
    outer: Volume<'e>,
    inner: Volume<'e>,
    acknowledged: Mutex<Vec<(PathBuf, u64)>>,
    failed_calls: AtomicU64,
    next: AtomicU64,
}

impl<'e> Rig<'e> {
    fn new(env: &'e Env, mode: &str, options: &[&str]) -> Self {
        println!("{mode}");
        let mut outer = Volume::format(env, &format!("{mode}-outer"), &[GIB], &[]);
        outer.mount(&[]);
        let near = env.path(&format!("{mode}-near.img"));
        let far = outer.path("far.img");
        sparse_image(&near, 256 * MIB);
        sparse_image(&far, 256 * MIB);
        let mut inner = Volume::on(env, mode, vec![near, far]);
        env.braidfs().arg("mkfs").args(&inner.devices).ok();
        inner.mount(&[&[mode], options].concat());
        Self {
            outer,
            inner,
            acknowledged: Mutex::default(),
            failed_calls: AtomicU64::new(0),
            next: AtomicU64::new(0),
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.outer.daemon().pid), signal).expect("signal the outer daemon");
    }

    /// Writes and fsyncs files until told to stop; counts the failures.
    fn write_files(&self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            let seed = self.next.fetch_add(1, Ordering::SeqCst);
            let path = self.inner.path(&format!("file-{seed}"));
            let begun = Instant::now();
            let done = File::create(&path).and_then(|mut file| {
                file.write_all(&bytes(seed))?;
                file.sync_all()
            });
            assert!(begun.elapsed() < CALL_MAX, "{:?}", begun.elapsed());
            match done {
                Ok(()) => self.acknowledged.lock().unwrap().push((path, seed)),
                Err(error) => {
                    assert!(
                        matches!(
                            error.raw_os_error(),
                            Some(libc::EIO | libc::EROFS | libc::ENOSPC)
                        ),
                        "{error}"
                    );
                    self.failed_calls.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    /// Load, with something happening in the middle of it.
    fn under_load(&self, happens: impl FnOnce()) {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(|| self.write_files(&stop));
            }
            std::thread::sleep(Duration::from_millis(1500));
            happens();
            stop.store(true, Ordering::SeqCst);
        });
    }

    /// Reads everything that was acknowledged: right bytes, or, where `may_fail`, EIO. Returns how
    /// many files could be read.
    fn read_all(&self, may_fail: bool) -> usize {
        let known = self.acknowledged.lock().unwrap().clone();
        assert!(!known.is_empty(), "nothing was acknowledged");
        let mut good = 0;
        for (path, seed) in &known {
            let begun = Instant::now();
            match read(path) {
                Ok(found) => {
                    assert!(found == bytes(*seed), "{}: wrong bytes", path.display());
                    good += 1;
                }
                Err(error) => assert!(
                    may_fail && error.raw_os_error() == Some(libc::EIO),
                    "{}: {error}",
                    path.display()
                ),
            }
            assert!(begun.elapsed() < CALL_MAX, "{:?}", begun.elapsed());
        }
        println!("{good} of {} files read", known.len());
        good
    }

    /// The doctor names the device that hangs, and no other, and does not hang himself.
    fn diagnose(&self, env: &Env) {
        let doctor = env.braidfs().args(["doctor", "--json"]).limit_secs(30);
        let found = json(&doctor.arg(&self.inner.mountpoint).exits(4));
        for check in ["errors", "no-answer"] {
            let findings = list(&found, "/findings").iter();
            let about: Vec<&Value> = findings
                .filter(|finding| finding["check"] == check)
                .map(|finding| &finding["about"])
                .collect();
            assert_eq!(about, [&name(&self.inner.devices[1])], "{check}: {found}");
        }
    }

    fn is_silent(&self) -> bool {
        let stats = self.inner.stats();
        let devices = stats["volume"]["devices"].as_array().expect("devices");
        devices.iter().any(|device| device["silent"] == true)
    }

    /// Waits until the devices are, or are not, silent.
    fn wait_silent(&self, wanted: bool) {
        let until = Instant::now() + CALL_MAX;
        while self.is_silent() != wanted {
            assert!(Instant::now() < until, "still {}", !wanted);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Unmounts, whatever it says; returns whether all was safe.
    fn umount(&mut self, env: &Env) -> bool {
        let daemon = self.inner.daemon();
        let command = env.braidfs().arg("umount").arg(&self.inner.mountpoint);
        let output = command.limit_secs(90).run();
        println!("umount: {} {}", output.status, output.stderr.trim());
        assert!(!self.inner.is_mount_point(), "still mounted");
        let safe = output.status.success();
        assert!(safe || !output.stderr.is_empty(), "a failure has a reason");
        if self.outer.is_mount_point() {
            // A stopped device keeps the process until it answers.
            self.signal(Signal::SIGCONT);
        }
        assert!(
            daemon.wait_gone(Duration::from_secs(30)),
            "it is still there"
        );
        safe
    }

    /// Everything that was acknowledged is on the devices, and the volume is whole.
    fn verify(&mut self, mode: &str) {
        self.inner.fsck_clean();
        self.inner.mount(&[mode]);
        assert_eq!(
            self.read_all(false),
            self.acknowledged.lock().unwrap().len()
        );
        fs::write(self.inner.path("later"), "works").expect("it is writable");
        self.inner.umount();
        self.inner.fsck_clean();
        self.outer.umount();
    }
}

fn bytes(seed: u64) -> Vec<u8> {
    let words = (0..FILE_LEN as u64 / 8).map(|word| (seed << 32 | word).to_le_bytes());
    words.flatten().collect()
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut found = Vec::new();
    File::open(path)?.read_to_end(&mut found)?;
    Ok(found)
}

fn hangs_and_comes_back(env: &Env) -> Outcome {
    for mode in CACHE_MODES {
        let mut rig = Rig::new(env, mode, &[TIMEOUT_OPTION]);
        rig.under_load(|| {
            rig.signal(Signal::SIGSTOP);
            rig.wait_silent(true);
            rig.diagnose(env);
            rig.read_all(true);
            std::thread::sleep(Duration::from_secs(2));
            rig.signal(Signal::SIGCONT);
            rig.wait_silent(false);
            rig.read_all(false);
        });
        assert!(
            rig.failed_calls.load(Ordering::SeqCst) > 0,
            "nobody noticed"
        );
        drop_kernel_caches();
        rig.read_all(false);
        rig.umount(env);
        rig.verify(mode);
    }
    Ok(())
}

fn dies(env: &Env) -> Outcome {
    for mode in CACHE_MODES {
        let mut rig = Rig::new(env, mode, &[TIMEOUT_OPTION]);
        rig.under_load(|| {
            rig.signal(Signal::SIGKILL);
            std::thread::sleep(Duration::from_secs(3));
            rig.read_all(true);
        });
        assert!(
            rig.failed_calls.load(Ordering::SeqCst) > 0,
            "nobody noticed"
        );
        drop_kernel_caches();
        rig.read_all(true);
        rig.outer.detach();
        rig.umount(env);
        rig.outer.mount(&[]);
        rig.verify(mode);
    }
    Ok(())
}

fn umount_while_it_hangs(env: &Env) -> Outcome {
    for mode in CACHE_MODES {
        let mut rig = Rig::new(env, mode, &[TIMEOUT_OPTION]);
        rig.under_load(|| rig.signal(Signal::SIGSTOP));
        fs::write(rig.inner.path("dirty"), bytes(0)).unwrap_or_default();
        let begun = Instant::now();
        assert!(!rig.umount(env), "data was in memory alone");
        println!("umount took {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(75));
        rig.verify(mode);
    }
    Ok(())
}

/// A program of its own that waits for the device.
fn waiting(script: &str, path: &Path) -> braidfs_tests::command::Running {
    Cmd::sh(script, [path]).spawn()
}

fn can_be_killed(env: &Env) -> Outcome {
    for mode in CACHE_MODES {
        // Longer than the test: only a signal can end the waits.
        let mut rig = Rig::new(env, mode, &["timeout=200", "cache_size=64M"]);
        rig.under_load(|| ());
        let known: Vec<_> = rig.acknowledged.lock().unwrap().clone();
        rig.inner.remount(&[mode, "timeout=200"]);
        drop_kernel_caches();
        // What is known of these files is in memory.
        let new: Vec<_> = (0..12)
            .map(|number| rig.inner.path(&format!("new-{number}")))
            .collect();
        for path in &new {
            let mut file = File::create(path).expect("a new file");
            file.write_all(&bytes(0)).expect("write");
            file.sync_all().expect("fsync");
        }
        rig.signal(Signal::SIGSTOP);
        let mut all = Vec::new();
        for (path, _) in known.iter().take(12) {
            all.push(waiting("exec cat \"$1\" > /dev/null", path));
        }
        // The kernel does not look at signals while it hands its own dirty pages over.
        let direct = mode == CACHE_MODES[0];
        for path in new.iter().filter(|_| direct) {
            let script = "exec dd if=/dev/zero of=\"$1\" bs=64k count=8 conv=notrunc,fsync";
            all.push(waiting(script, path));
        }
        std::thread::sleep(Duration::from_secs(3));
        let stuck = all
            .iter_mut()
            .filter_map(|each| each.is_running().then_some(each));
        let mut stuck: Vec<_> = stuck.collect();
        let least = if direct { 12 } else { 2 };
        assert!(stuck.len() >= least, "only {} wait", stuck.len());
        let mut longest = Duration::ZERO;
        for one in &mut stuck {
            let begun = Instant::now();
            one.kill();
            longest = longest.max(begun.elapsed());
        }
        println!(
            "{} killed, the slowest was gone after {longest:?}",
            stuck.len()
        );
        assert!(longest < Duration::from_secs(1), "{longest:?}");
        rig.signal(Signal::SIGCONT);
        rig.umount(env);
        rig.verify(mode);
    }
    Ok(())
}

/// A process that is stopped (frozen, starved) has no idea what its devices did meanwhile.
fn stopped(env: &Env) -> Outcome {
    for mode in CACHE_MODES {
        let rig = Rig::new(env, mode, &[TIMEOUT_OPTION]);
        for _ in 0..3 {
            rig.under_load(|| {
                let daemon = Pid::from_raw(rig.inner.daemon().pid);
                kill(daemon, Signal::SIGSTOP).expect("stop the daemon");
                std::thread::sleep(Duration::from_secs(4));
                kill(daemon, Signal::SIGCONT).expect("continue the daemon");
                std::thread::sleep(Duration::from_millis(500));
            });
        }
        assert_eq!(rig.failed_calls.load(Ordering::SeqCst), 0);
        rig.read_all(false);
    }
    Ok(())
}
