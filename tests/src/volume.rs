//! A volume under test: image files, mkfs, mount, umount, kill, reports; cleans up when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Cmd, Output, Running};
use crate::daemon::{self, Daemon};
use crate::env::{Env, Outcome};

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;
/// The mount options of two ways to cache file data: the default, where the kernel caches what is
/// read, and the one where it caches writes, too.
pub const CACHE_MODES: [&str; 2] = ["cache=auto", "writeback_cache"];

/// How long after `umount` returned the daemon's process may still be there.
const EXIT_LIMIT: Duration = Duration::from_secs(10);
/// How long `umount` may take: it writes back everything that is dirty.
const UMOUNT_LIMIT_SECS: u64 = 120;

/// A path as it is typed.
pub fn name(path: &Path) -> String {
    path.display().to_string()
}

/// Devices in one word, as in fstab.
pub fn joined(devices: &[PathBuf]) -> String {
    let names: Vec<String> = devices.iter().map(|device| name(device)).collect();
    names.join(":")
}

/// Devices that are, or will be, one volume, and where it is mounted.
#[derive(Debug)]
pub struct Volume<'e> {
    env: &'e Env,
    /// The members, in order.
    pub devices: Vec<PathBuf>,
    /// Where it is, or will be, mounted.
    pub mountpoint: PathBuf,
    daemon: Option<Daemon>,
}

/// Runs a test on a fresh mount in each cache mode, and checks the volume after it.
pub fn in_both_modes(env: &Env, test: fn(&mut Volume<'_>, &str)) -> Outcome {
    for mode in CACHE_MODES {
        println!("{mode}");
        let mut volume = Volume::format(env, mode, &[256 * MIB; 3], &[]);
        volume.mount(&[mode]);
        test(&mut volume, mode);
        volume.umount();
        volume.fsck_clean();
    }
    Ok(())
}

/// Makes a sparse file.
pub fn sparse_image(path: &Path, bytes: u64) {
    let file = File::create(path).expect("create an image file");
    file.set_len(bytes).expect("size an image file");
}

impl<'e> Volume<'e> {
    /// Sparse images `NAME0.img`... of the given sizes, formatted with `mkfs_args`.
    pub fn format(env: &'e Env, name: &str, sizes: &[u64], mkfs_args: &[&str]) -> Self {
        let volume = Self::unformatted(env, name, sizes);
        env.braidfs()
            .arg("mkfs")
            .args(mkfs_args)
            .args(&volume.devices)
            .ok();
        volume
    }

    /// The same without the mkfs.
    pub fn unformatted(env: &'e Env, name: &str, sizes: &[u64]) -> Self {
        let image = |(index, bytes): (usize, &u64)| {
            let path = env.path(&format!("{name}{index}.img"));
            sparse_image(&path, *bytes);
            path
        };
        let devices = sizes.iter().enumerate().map(image).collect();
        Self::on(env, name, devices)
    }

    /// Devices that exist already.
    pub fn on(env: &'e Env, name: &str, devices: Vec<PathBuf>) -> Self {
        let mountpoint = env.mkdir(&format!("{name}.mnt"));
        Self {
            env,
            devices,
            mountpoint,
            daemon: None,
        }
    }

    /// The mount command, not yet run: `options` as after `-o`.
    pub fn mount_command(&self, options: &[&str]) -> Cmd {
        let mut command = self.env.braidfs().arg("mount");
        if !options.is_empty() {
            command = command.arg("-o").arg(options.join(","));
        }
        command.args(&self.devices).arg(&self.mountpoint)
    }

    /// Mounts it; it must be usable at once.
    pub fn mount(&mut self, options: &[&str]) -> Output {
        let output = self.mount_command(options).ok();
        self.adopt();
        output
    }

    /// Finds the daemon after a mount made in some other way.
    pub fn adopt(&mut self) {
        assert!(
            self.is_mount_point(),
            "{} is no mount point",
            self.mountpoint.display()
        );
        let found = daemon::find(&self.env.bin, &self.mountpoint);
        self.daemon = Some(found.expect("a daemon that names the mount point"));
    }

    /// Unmounts it and waits for the daemon's end.
    pub fn umount(&mut self) -> Output {
        let command = self.env.braidfs().arg("umount").arg(&self.mountpoint);
        let output = command.limit_secs(UMOUNT_LIMIT_SECS).ok();
        assert!(!self.is_mount_point(), "still mounted after umount");
        if let Some(daemon) = self.daemon.take() {
            assert!(
                daemon.wait_gone(EXIT_LIMIT),
                "the daemon is still there after umount"
            );
        }
        output
    }

    /// Unmounts and mounts again: what is there now came from the devices.
    pub fn remount(&mut self, options: &[&str]) {
        self.umount();
        self.mount(options);
    }

    /// Kills the daemon as a crash would, then detaches the dead mount.
    pub fn kill_daemon(&mut self) {
        let daemon = self.daemon.take().expect("it is mounted");
        daemon.kill_now();
        assert!(daemon.wait_gone(EXIT_LIMIT), "the daemon survived SIGKILL");
        self.detach();
    }

    /// Kills the daemon and leaves the dead mount in place.
    pub fn kill_daemon_only(&mut self) {
        let daemon = self.daemon.take().expect("it is mounted");
        daemon.kill_now();
        assert!(daemon.wait_gone(EXIT_LIMIT), "the daemon survived SIGKILL");
    }

    /// Takes a dead mount away.
    pub fn detach(&self) {
        // Processes that still hold files there do not matter: the daemon is gone.
        let deadline = Instant::now() + EXIT_LIMIT;
        while self.is_mount_point() && Instant::now() < deadline {
            Cmd::new("umount")
                .arg("--lazy")
                .arg(&self.mountpoint)
                .quiet()
                .run();
        }
        assert!(
            !self.is_mount_point(),
            "cannot detach {}",
            self.mountpoint.display()
        );
    }

    /// Whether something is mounted there, going by the kernel's table.
    pub fn is_mount_point(&self) -> bool {
        is_mount_point(&self.mountpoint)
    }

    /// The running daemon.
    pub fn daemon(&self) -> Daemon {
        self.daemon.expect("it is mounted")
    }

    /// A path on the mounted volume.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mountpoint.join(name)
    }

    /// `stats --json`.
    pub fn stats(&self) -> Value {
        json(
            &self
                .env
                .braidfs()
                .args(["stats", "--json"])
                .arg(&self.mountpoint)
                .quiet()
                .ok(),
        )
    }

    /// The UUID of the file system.
    pub fn uuid(&self) -> String {
        let uuid = self.info()["fs_uuid"].as_str().map(str::to_owned);
        uuid.expect("a UUID")
    }

    /// `info --json` of the members.
    pub fn info(&self) -> Value {
        json(
            &self
                .env
                .braidfs()
                .args(["info", "--json"])
                .args(&self.devices)
                .ok(),
        )
    }

    /// `fsck -n` must find nothing.
    pub fn fsck_clean(&self) {
        let command = self.env.braidfs().args(["fsck", "-n"]).args(&self.devices);
        command.limit_secs(180).ok();
    }

    /// Fails if the daemon ever had more memory resident than the bound the project promises:
    /// the cache and 256 MiB.
    pub fn assert_memory_bounded(&self, cache_bytes: u64) {
        let (peak, bound) = (self.daemon().peak_rss_bytes(), cache_bytes + 256 * MIB);
        println!(
            "peak resident memory: {} MiB of at most {}",
            peak / MIB,
            bound / MIB
        );
        assert!(
            peak <= bound,
            "the daemon had {peak} bytes resident; the bound is {bound}"
        );
    }
}

impl Drop for Volume<'_> {
    fn drop(&mut self) {
        if self.is_mount_point() && !std::thread::panicking() {
            let command = self.env.braidfs().arg("umount").arg(&self.mountpoint);
            command.limit_secs(UMOUNT_LIMIT_SECS).run();
        }
        let daemon = self.daemon.take();
        if let Some(daemon) = daemon.filter(|daemon| !daemon.wait_gone(Duration::from_secs(2))) {
            daemon.kill_now();
        }
        if self.is_mount_point() {
            Cmd::new("umount")
                .arg("--lazy")
                .arg(&self.mountpoint)
                .quiet()
                .run();
        }
    }
}

/// Whether something is mounted there, going by the kernel's table.
pub fn is_mount_point(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mounts").expect("the mount table");
    let target = path.to_string_lossy();
    table
        .lines()
        .any(|line| line.split(' ').nth(1) == Some(&*target))
}

/// Starts a FUSE server that stays in the foreground, and waits until it is mounted.
pub fn serve(command: Cmd, mountpoint: &Path) -> Running {
    const MOUNT_LIMIT: Duration = Duration::from_secs(20);
    let mut server = command.quiet().spawn();
    let deadline = Instant::now() + MOUNT_LIMIT;
    while !is_mount_point(mountpoint) {
        let said = server.text_so_far();
        assert!(server.is_running(), "a server did not start: {said}");
        assert!(Instant::now() < deadline, "a server does not mount: {said}");
        std::thread::sleep(Duration::from_millis(5));
    }
    server
}

/// Standard output as JSON.
pub fn json(output: &Output) -> Value {
    match serde_json::from_str(&output.stdout) {
        Ok(value) => value,
        Err(error) => panic!("not JSON: {error}: {}", output.describe()),
    }
}

/// Empties the kernel's page, entry and inode caches.
pub fn drop_kernel_caches() {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root may drop the caches");
}
