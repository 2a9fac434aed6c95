//! A peer on media: formatted, mounted, made cold, taken away.

use std::fs::{self, File};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, Running};
use braidfs_tests::daemon::{self, Daemon};
use braidfs_tests::env::find_program;
use braidfs_tests::volume::{MIB, is_mount_point, serve};
use serde_json::Value;

use crate::measure::{Cost, Counters, Work, fuse_inodes};
use crate::media::Media;
use crate::peers::{Kind, Peer, Programs};

/// How long anything of formatting and mounting may take.
const LIMIT_SECS: u64 = 300;

/// A peer on media, mounted; unmounted when dropped.
pub struct Stage<'b> {
    pub peer: &'b Peer,
    programs: &'b Programs,
    pub media: &'b Media,
    /// Where it is mounted.
    mount_point: PathBuf,
    devices: Vec<PathBuf>,
    extra_options: String,
    server: Option<Running>,
    daemon: Option<Daemon>,
    /// What the kernel remembered of other FUSE mounts when there was none here.
    inodes_of_others: u64,
}

impl<'b> Stage<'b> {
    /// Formats and mounts a peer; `count` devices where it takes several. `work` is a folder.
    pub fn new(
        peer: &'b Peer,
        programs: &'b Programs,
        media: &'b Media,
        work: &Path,
        count: usize,
        extra_options: &str,
    ) -> Self {
        let mount_point = work.join("mnt");
        fs::create_dir_all(&mount_point).expect("a mount point");
        media.warm();
        let devices = match peer.kind {
            Kind::Raw | Kind::Braidfs { .. } => media.members(count),
            Kind::Btrfs => media.block_devices(count),
            Kind::Xfs | Kind::Ext4 | Kind::Fuse2fs => media.block_devices(1),
            Kind::Null { .. } | Kind::Passthrough => Vec::new(),
        };
        let mut stage = Self {
            peer,
            programs,
            media,
            mount_point,
            devices,
            extra_options: extra_options.to_owned(),
            server: None,
            daemon: None,
            inodes_of_others: fuse_inodes(),
        };
        stage.format();
        stage.mount();
        stage.settle();
        stage
    }

    fn format(&self) {
        // Nobody discards: that would make holes in the images.
        let command = match self.peer.kind {
            Kind::Braidfs { .. } => Cmd::new(&self.programs.braidfs).args(["mkfs", "--force"]),
            Kind::Btrfs => {
                Cmd::new("mkfs.btrfs").args(["-q", "-f", "-K", "-d", "raid0", "-m", "raid1"])
            }
            Kind::Xfs => Cmd::new("mkfs.xfs").args(["-q", "-f", "-K"]),
            Kind::Ext4 | Kind::Fuse2fs => {
                Cmd::new("mkfs.ext4").args(["-q", "-F", "-E", "nodiscard"])
            }
            Kind::Raw | Kind::Null { .. } | Kind::Passthrough => return,
        };
        command
            .args(&self.devices)
            .limit_secs(LIMIT_SECS)
            .quiet()
            .ok();
    }

    fn mount(&mut self) {
        let point = self.mount_point.clone();
        let device = self.devices.first().cloned().unwrap_or_default();
        let kernel = |fs_type: &str, options: &str| {
            let mount = Cmd::new("mount").args(["-t", fs_type, "-o", options]);
            mount
                .arg(&device)
                .arg(&point)
                .limit_secs(LIMIT_SECS)
                .quiet()
                .ok();
        };
        match &self.peer.kind {
            Kind::Raw => {}
            Kind::Braidfs { options } => {
                let words = [options.as_str(), &self.extra_options];
                let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
                self.mount_braidfs(&words.join(","));
                self.daemon = daemon::find(&self.programs.braidfs, &point);
            }
            Kind::Btrfs => kernel("btrfs", "nodiscard"),
            Kind::Xfs => kernel("xfs", "nodiscard"),
            Kind::Ext4 => kernel("ext4", "nodiscard"),
            Kind::Fuse2fs => {
                let program = find_program("fuse2fs").expect("it was looked for");
                let command = Cmd::new(program).args(["-f", "-o", "rw,allow_other"]);
                self.serve(command.arg(&device).arg(&point));
            }
            Kind::Null { kernel_cache } => {
                let cache = if *kernel_cache { "kernel" } else { "direct" };
                let program = self.programs.null.as_ref().expect("it was looked for");
                self.serve(Cmd::new(program).args(["--cache", cache]).arg(&point));
            }
            Kind::Passthrough => {
                let below = point.with_file_name("below");
                fs::create_dir_all(&below).expect("a folder");
                let options = "size=2g,nr_inodes=3m";
                let mount = Cmd::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]);
                mount.arg(&below).quiet().ok();
                let source = format!("source={}", below.display());
                let program = self
                    .programs
                    .passthrough
                    .as_ref()
                    .expect("it was looked for");
                let command = Cmd::new(program).args(["-f", "-o", &source]);
                self.serve(command.arg(&point));
            }
        }
    }

    fn mount_braidfs(&self, options: &str) {
        let script = "echo $$ > \"$1\"; shift; exec \"$@\"";
        let command = match self.media.group() {
            Some(procs) => Cmd::sh(script, [&procs, &self.programs.braidfs]),
            None => Cmd::new(&self.programs.braidfs),
        };
        let command = match options {
            "" => command.arg("mount"),
            options => command.args(["mount", "-o", options]),
        };
        let command = command.args(&self.devices).arg(&self.mount_point);
        command.limit_secs(LIMIT_SECS).quiet().ok();
    }

    /// Starts a server that stays in the foreground.
    fn serve(&mut self, command: Cmd) {
        let server = serve(command, &self.mount_point);
        self.daemon = Some(Daemon { pid: server.pid() });
        self.server = Some(server);
    }

    fn unmount(&mut self) {
        if is_mount_point(&self.mount_point) {
            let command = if self.peer.is_braidfs() {
                Cmd::new(&self.programs.braidfs).arg("umount")
            } else {
                Cmd::new("umount")
            };
            command
                .arg(&self.mount_point)
                .limit_secs(LIMIT_SECS)
                .quiet()
                .ok();
        }
        if let Some(mut server) = self.server.take() {
            // It ends with its mount, and writes back what it has first.
            let deadline = Instant::now() + Duration::from_secs(LIMIT_SECS);
            while server.is_running() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if let Some(daemon) = self.daemon.take() {
            daemon.wait_gone(Duration::from_secs(60));
        }
        let below = self.mount_point.with_file_name("below");
        if self.peer.kind == Kind::Passthrough && is_mount_point(&below) {
            Cmd::new("umount").arg(&below).quiet().ok();
        }
    }

    /// A path on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mount_point.join(name)
    }

    /// A file on it, or its devices, as fio wants them.
    pub fn fio_file(&self, name: &str) -> String {
        match self.peer.kind {
            Kind::Raw => {
                let names: Vec<_> = self
                    .devices
                    .iter()
                    .map(|it| it.display().to_string())
                    .collect();
                format!("--filename={}", names.join(":"))
            }
            _ => format!("--filename={}", self.path(name).display()),
        }
    }

    /// What makes fio's own requests count against the throttle.
    pub fn fio_group(&self) -> Option<PathBuf> {
        self.media.group().filter(|_| self.peer.kind == Kind::Raw)
    }

    /// Bytes of a file that fits, if so many are wanted.
    pub fn file_bytes(&self, wanted: u64) -> u64 {
        let room = self.media.device_bytes() * self.devices.len() as u64;
        if room == 0 {
            return wanted;
        }
        wanted.min(room / 10 * 7 / MIB * MIB)
    }

    /// What is written is on the devices, and nothing of it is in memory. Peers that keep
    /// everything in memory by nature stay as they are, but for what the kernel has of them.
    pub fn cold(&mut self) {
        self.drop_kernel_caches();
        if matches!(
            self.peer.kind,
            Kind::Raw | Kind::Null { .. } | Kind::Passthrough
        ) {
            return;
        }
        self.unmount();
        fs::write("/proc/sys/vm/drop_caches", "3").expect("root may drop the caches");
        self.mount();
        self.settle();
    }

    /// Waits until the daemon has touched its memory: a mount can be used before that.
    fn settle(&self) {
        const STEP: Duration = Duration::from_millis(100);
        let Some(daemon) = self.daemon.filter(|_| self.peer.is_braidfs()) else {
            return;
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut before = 0;
        while Instant::now() < deadline {
            std::thread::sleep(STEP);
            let now = daemon.rss_bytes();
            if now == before {
                return;
            }
            before = now;
        }
    }

    /// The kernel has forgotten its names, inodes and clean pages.
    pub fn drop_kernel_caches(&self) {
        if let Ok(root) = File::open(&self.mount_point) {
            let _not_supported = nix::unistd::syncfs(&root);
        }
        fs::write("/proc/sys/vm/drop_caches", "3").expect("root may drop the caches");
        // FUSE servers are told of each forgotten inode.
        std::thread::sleep(Duration::from_millis(100));
    }

    /// Unmounts and mounts again; how long the latter took.
    pub fn remount_secs(&mut self) -> f64 {
        self.unmount();
        let begun = Instant::now();
        self.mount();
        begun.elapsed().as_secs_f64()
    }

    /// Kills braidfs's daemon, and mounts again; how long the latter took.
    pub fn kill_and_mount_secs(&mut self) -> f64 {
        let daemon = self.daemon.take().expect("it has a daemon");
        daemon.kill_now();
        assert!(
            daemon.wait_gone(Duration::from_secs(20)),
            "it survived SIGKILL"
        );
        Cmd::new("umount")
            .arg("--lazy")
            .arg(&self.mount_point)
            .quiet()
            .ok();
        let begun = Instant::now();
        self.mount();
        begun.elapsed().as_secs_f64()
    }

    /// `braidfs stats --json`.
    pub fn stats(&self) -> Option<Value> {
        let command = Cmd::new(&self.programs.braidfs).args(["stats", "--json"]);
        let is_mounted = self.peer.is_braidfs() && self.daemon.is_some();
        is_mounted.then(|| {
            let output = command.arg(&self.mount_point).quiet().ok();
            serde_json::from_str(&output.stdout).expect("statistics are JSON")
        })
    }

    /// All counters, now.
    pub fn counters(&self) -> Counters {
        let inodes = fuse_inodes().saturating_sub(self.inodes_of_others);
        Counters::read(self.daemon, self.stats().as_ref(), inodes)
    }

    /// Does something, and tells what it cost.
    pub fn measured(&mut self, act: impl FnOnce(&mut Self) -> Work) -> (Work, Cost) {
        if let Some(daemon) = self.daemon {
            daemon.forget_peak_rss();
        }
        let before = self.counters();
        let work = act(self);
        let cost = before.cost(&self.counters(), &work, self.daemon);
        (work, cost)
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        let stage = std::panic::AssertUnwindSafe(|| self.unmount());
        if catch_unwind(stage).is_err() {
            if let Some(daemon) = self.daemon {
                daemon.kill_now();
            }
            Cmd::new("umount")
                .arg("--lazy")
                .arg(&self.mount_point)
                .quiet()
                .run();
        }
    }
}
