//! The options after `-o`: names that mount(8) and fuse(8) users know.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use braidfs_blockdev::{ANSWER_TIME_DEFAULT, Backend, write_protected};

use super::metrics::Address;
use super::size::{format_size, parse_size};
use crate::fuse::{self, CacheMode, MsFlags};
use crate::{AtimeMode, CACHE_BYTES_MIN, MountOptions};

/// Longest commit interval, in seconds: the most that a crash may cost without fsync.
pub const COMMIT_SECONDS_MAX: u64 = 300;

/// Longest freeze, in seconds: an hour. A hang is worse than an error.
pub const FREEZE_SECONDS_MAX: u64 = 3_600;

/// Longest time that the kernel may believe names and attributes, in seconds: a year.
const TIMEOUT_SECONDS_MAX: u64 = 31_536_000;

/// Longest time that a device may be given to answer, in seconds: a day. Who wants more wants 0.
const ANSWER_SECONDS_MAX: u64 = 86_400;

/// Longest time to wait for members, in seconds: an hour.
const DEVICE_WAIT_SECONDS_MAX: u64 = 3_600;

/// Default cache: a quarter of the memory, between these.
const CACHE_DEFAULT_MIN: u64 = 64 << 20;
const CACHE_DEFAULT_MAX: u64 = 1 << 30;

/// What `-o` said, checked.
#[derive(Clone, Debug)]
pub struct ParsedOptions {
    /// For the core.
    pub core: MountOptions,
    /// Who caches file data.
    pub cache_mode: CacheMode,
    /// Threads that read requests.
    pub threads: usize,
    /// How long the kernel may believe names and attributes.
    pub timeout: Duration,
    /// How long a device may take to answer a request; zero: as long as it likes.
    pub answer_time_max: Duration,
    /// Device backend.
    pub backend: Backend,
    /// Bypass the kernel's cache on the members.
    pub member_direct: bool,
    /// Let other users in; `None`: as root yes, otherwise no.
    pub allow_other: Option<bool>,
    /// Let root in besides the owner.
    pub allow_root: bool,
    /// Source to show in the mount table in place of the devices.
    pub fsname: Option<String>,
    /// Subtype to show in the mount table.
    pub subtype: String,
    /// Where a background daemon logs; syslog otherwise.
    pub logfile: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics: Option<Address>,
    /// VFS flags.
    pub flags: MsFlags,
    /// Change the flags of a mount that exists.
    pub remount: bool,
    /// `rw` by name: rather fail than read only.
    pub insist_writable: bool,
    /// Recover nothing on the devices: what a read-only mount does anyway.
    pub no_recovery: bool,
    /// Devices that are not there are no error.
    pub no_fail: bool,
    /// How long to wait for members that are not there yet.
    pub device_wait: Duration,
    /// Directories in which members may lie as image files.
    pub search: Vec<PathBuf>,
}

impl ParsedOptions {
    /// What holds without any option.
    pub fn new() -> Self {
        Self {
            core: MountOptions {
                cache_bytes: cache_default(),
                ..MountOptions::default()
            },
            cache_mode: CacheMode::Auto,
            threads: fuse::threads_default(),
            timeout: fuse::TIMEOUT_DEFAULT,
            answer_time_max: ANSWER_TIME_DEFAULT,
            backend: Backend::Auto,
            member_direct: true,
            allow_other: None,
            allow_root: false,
            fsname: None,
            subtype: "braidfs".to_owned(),
            logfile: None,
            metrics: None,
            flags: MsFlags::empty(),
            remount: false,
            insist_writable: false,
            no_recovery: false,
            no_fail: false,
            device_wait: Duration::ZERO,
            search: Vec::new(),
        }
    }

    /// Takes lists of options, each separated by commas; later ones win. `sloppy` passes over
    /// options that are not known (mount -s). The error names the option.
    pub fn parse(lists: &[String], sloppy: bool) -> Result<Self, String> {
        let mut parsed = Self::new();
        let mut all = lists.iter().flat_map(|list| split_commas(list));
        parsed.remount = all.any(|option| option.trim() == "remount");
        for option in lists.iter().flat_map(|list| split_commas(list)) {
            let option = option.trim();
            if option.is_empty() {
                continue;
            }
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option, None),
            };
            let known = match value {
                None => parsed.take_flag(name),
                Some(value) => parsed.take_value(name, value)?,
            };
            let generic = name.starts_with("x-") || name.starts_with("X-");
            if !known && !generic && !sloppy {
                return Err(unknown(name, value));
            }
        }
        if parsed.allow_root && parsed.allow_other == Some(true) {
            return Err("options 'allow_other' and 'allow_root' exclude each other".to_owned());
        }
        if parsed.no_recovery && parsed.insist_writable {
            return Err("options 'norecovery' and 'rw' exclude each other".to_owned());
        }
        Ok(parsed)
    }

    /// Options without a value; false if unknown.
    fn take_flag(&mut self, name: &str) -> bool {
        match name {
            "ro" => self.set_read_only(true),
            "rw" => self.set_read_only(false),
            "noatime" => self.set_atime(AtimeMode::Noatime),
            "relatime" | "atime" | "nostrictatime" => self.set_atime(AtimeMode::Relatime),
            "strictatime" | "norelatime" => self.set_atime(AtimeMode::Strictatime),
            // Directories and files share one transaction, so both come to the same.
            "sync" | "dirsync" => self.core.sync = true,
            "async" => self.core.sync = false,
            "discard" => self.core.discard = true,
            "nodiscard" => self.core.discard = false,
            "allow_other" => self.allow_other = Some(true),
            "noallow_other" => self.allow_other = Some(false),
            "allow_root" => self.allow_root = true,
            "direct_io" => self.cache_mode = CacheMode::Direct,
            "writeback_cache" | "kernel_cache" => self.cache_mode = CacheMode::Kernel,
            "nodirect" => self.member_direct = false,
            "remount" => self.remount = true,
            "suid" => self.flags.remove(MsFlags::MS_NOSUID),
            "nosuid" => self.flags.insert(MsFlags::MS_NOSUID),
            "dev" => self.flags.remove(MsFlags::MS_NODEV),
            "nodev" => self.flags.insert(MsFlags::MS_NODEV),
            "exec" => self.flags.remove(MsFlags::MS_NOEXEC),
            "noexec" => self.flags.insert(MsFlags::MS_NOEXEC),
            "diratime" | "nodiratime" => {
                self.core.nodiratime = name == "nodiratime";
                self.flags.set(MsFlags::MS_NODIRATIME, self.core.nodiratime);
            }
            // mount(8): ordinary users' mounts are restricted, unless a later option undoes it.
            "user" | "users" => self
                .flags
                .insert(MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC),
            "owner" | "group" => self.flags.insert(MsFlags::MS_NOSUID | MsFlags::MS_NODEV),
            "norecovery" | "noload" => self.no_recovery = true,
            "nofail" => self.no_fail = true,
            // Always on, or meant for mount(8) and for others who read fstab.
            "default_permissions"
            | "defaults"
            | "nouser"
            | "nousers"
            | "noowner"
            | "nogroup"
            | "auto"
            | "noauto"
            | "_netdev"
            | "lazytime"
            | "nolazytime"
            | "iversion"
            | "noiversion"
            | "mand"
            | "nomand"
            | "silent"
            | "loud"
            | "nosymfollow"
            | "symfollow"
            | "big_writes"
            | "auto_cache"
            | "noauto_cache" => {}
            _ => return false,
        }
        true
    }

    /// Options with a value; false if unknown.
    fn take_value(&mut self, name: &str, value: &str) -> Result<bool, String> {
        let impossible = |expected: &str| {
            Err(format!(
                "option '{name}={value}': expected {expected}; nothing was mounted"
            ))
        };
        match name {
            "commit" => match value.parse() {
                Ok(seconds @ 1..=COMMIT_SECONDS_MAX) => {
                    self.core.commit_interval = Duration::from_secs(seconds);
                }
                _ => return impossible(&format!("seconds from 1 to {COMMIT_SECONDS_MAX}")),
            },
            "cache_size" => {
                let memory = memory_bytes();
                match parse_size(value) {
                    Some(size) if size >= CACHE_BYTES_MIN && size <= memory => {
                        self.core.cache_bytes = size;
                    }
                    _ => {
                        let (min, max) = (format_size(CACHE_BYTES_MIN), format_size(memory));
                        return impossible(&format!(
                            "a size from {min} to {max}, the memory there is"
                        ));
                    }
                }
            }
            "backend" => match value {
                "auto" => self.backend = Backend::Auto,
                "uring" | "io_uring" => self.backend = Backend::Uring,
                "threads" => self.backend = Backend::Threads,
                _ => return impossible("auto, uring or threads"),
            },
            "cache" => match value {
                "auto" => self.cache_mode = CacheMode::Auto,
                "direct" => self.cache_mode = CacheMode::Direct,
                "writeback" => self.cache_mode = CacheMode::Kernel,
                _ => return impossible("auto, direct or writeback"),
            },
            "threads" => match value.parse() {
                Ok(threads @ 1..=fuse::THREADS_MAX) => self.threads = threads,
                _ => return impossible(&format!("1 to {}", fuse::THREADS_MAX)),
            },
            "attr_timeout" => match value.parse() {
                Ok(seconds @ 0..=TIMEOUT_SECONDS_MAX) => {
                    self.timeout = Duration::from_secs(seconds);
                }
                _ => return impossible(&format!("seconds from 0 to {TIMEOUT_SECONDS_MAX}")),
            },
            "timeout" => match value.parse() {
                Ok(seconds @ 0..=ANSWER_SECONDS_MAX) => {
                    self.answer_time_max = Duration::from_secs(seconds);
                }
                _ => {
                    return impossible(&format!(
                        "seconds to {ANSWER_SECONDS_MAX}, or 0 for no limit"
                    ));
                }
            },
            "device_wait" => match value.parse() {
                Ok(seconds @ 0..=DEVICE_WAIT_SECONDS_MAX) => {
                    self.device_wait = Duration::from_secs(seconds);
                }
                _ => return impossible(&format!("seconds from 0 to {DEVICE_WAIT_SECONDS_MAX}")),
            },
            "search" => {
                let directories: Vec<PathBuf> = value.split(':').map(PathBuf::from).collect();
                if !directories.iter().all(|path| path.is_absolute()) {
                    return impossible("directories, absolute, separated by colons");
                }
                self.search.extend(directories);
            }
            "fsname" if !value.is_empty() => self.fsname = Some(value.to_owned()),
            "fsname" => return impossible("a name"),
            "subtype" if value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                self.subtype = value.to_owned();
            }
            "subtype" => return impossible("a word"),
            "logfile" if !value.is_empty() => self.logfile = Some(PathBuf::from(value)),
            "logfile" => return impossible("a file"),
            "metrics" => match Address::parse(value) {
                Some(address) => self.metrics = Some(address),
                None => {
                    return impossible(
                        "unix:/PATH, 127.0.0.1:PORT or [::1]:PORT, which this machine alone can \
                         reach",
                    );
                }
            },
            "uid" | "gid" => {
                return Err(format!(
                    "option '{name}' is not supported: each file keeps its owner; use chown"
                ));
            }
            "comment" | "uhelper" | "helper" | "user" => {}
            // What the kernel's mount table says of any FUSE mount: mount(8) repeats it when it is
            // told to remount. A new mount has these of its own.
            "user_id" | "group_id" | "max_read" | "blksize" if self.remount => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Decides between reading and writing, now that the members are known: where one of them is
    /// write-protected, the mount is read-only. `rw` by name insists, as with mount(8).
    pub fn settle_access(&mut self, members: &[PathBuf]) -> Result<(), String> {
        if self.core.read_only {
            return Ok(());
        }
        if let Some(path) = members.iter().find(|path| write_protected(path)) {
            let path = path.display();
            if self.insist_writable {
                return Err(format!(
                    "{path}: is write-protected, and option 'rw' was given; leave that out, or \
                     make the device writable (blockdev --setrw); nothing was mounted"
                ));
            }
            log::warn!("{path}: is write-protected, mounting read-only");
            self.set_read_only(true);
        } else if self.no_recovery {
            return Err("option 'norecovery' needs 'ro'; nothing was mounted".to_owned());
        }
        Ok(())
    }

    fn set_read_only(&mut self, read_only: bool) {
        self.insist_writable = !read_only;
        self.core.read_only = read_only;
        self.flags.set(MsFlags::MS_RDONLY, read_only);
    }

    fn set_atime(&mut self, mode: AtimeMode) {
        self.core.atime = mode;
        self.flags
            .set(MsFlags::MS_NOATIME, mode == AtimeMode::Noatime);
        self.flags
            .set(MsFlags::MS_STRICTATIME, mode == AtimeMode::Strictatime);
    }
}

fn unknown(name: &str, value: Option<&str>) -> String {
    const WITH_VALUE: [&str; 13] = [
        "commit",
        "cache_size",
        "backend",
        "threads",
        "attr_timeout",
        "timeout",
        "fsname",
        "subtype",
        "logfile",
        "metrics",
        "cache",
        "device_wait",
        "search",
    ];
    if value.is_none() && WITH_VALUE.contains(&name) {
        return format!("option '{name}' needs a value: {name}=...; nothing was mounted");
    }
    match value {
        Some(value) => format!("unknown option '{name}={value}'; nothing was mounted"),
        None => format!("unknown option '{name}'; nothing was mounted"),
    }
}

/// Splits at commas, except those after a backslash or within double quotes (SELinux contexts).
fn split_commas(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut quoted = false;
    let mut chars = list.chars();
    while let Some(char) = chars.next() {
        let last = parts.len() - 1;
        match char {
            '\\' => parts[last].extend(chars.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => parts.push(String::new()),
            _ => parts[last].push(char),
        }
    }
    parts
}

/// Memory that this process may have: the machine's, or its control group's if that is less.
fn memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .map_or(CACHE_DEFAULT_MAX, |kib: u64| kib << 10);
    control_group_bytes().map_or(machine, |limit| limit.min(machine))
}

/// `memory.max` of this process's control group and the groups around it, the least of them.
fn control_group_bytes() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut path = PathBuf::from("/sys/fs/cgroup").join(own);
    let mut least: Option<u64> = None;
    while path.starts_with("/sys/fs/cgroup") {
        let limit = fs::read_to_string(path.join("memory.max")).ok();
        if let Some(limit) = limit.and_then(|limit| limit.trim().parse().ok()) {
            least = Some(least.map_or(limit, |least| least.min(limit)));
        }
        path.pop();
    }
    least
}

fn cache_default() -> u64 {
    (memory_bytes() / 4).clamp(CACHE_DEFAULT_MIN, CACHE_DEFAULT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &str) -> Result<ParsedOptions, String> {
        ParsedOptions::parse(&[options.to_owned()], false)
    }

    #[test]
    fn nothing_given() {
        let parsed = parse("").unwrap();
        assert!(!parsed.core.read_only);
        assert_eq!(parsed.cache_mode, CacheMode::Auto);
        assert!(parsed.core.cache_bytes >= CACHE_DEFAULT_MIN);
        assert!(parsed.flags.is_empty());
    }

    #[test]
    fn options_of_the_core() {
        let parsed = parse("ro,noatime,commit=30,cache_size=32M,sync,discard").unwrap();
        assert!(parsed.core.read_only && parsed.core.sync && parsed.core.discard);
        assert_eq!(parsed.core.atime, AtimeMode::Noatime);
        assert_eq!(parsed.core.commit_interval, Duration::from_secs(30));
        assert_eq!(parsed.core.cache_bytes, 32 << 20);
        assert_eq!(parsed.flags, MsFlags::MS_RDONLY | MsFlags::MS_NOATIME);
    }

    #[test]
    fn the_cache_has_three_modes_and_older_names() {
        let mode = |options| parse(options).unwrap().cache_mode;
        assert_eq!(mode("direct_io,cache=auto"), CacheMode::Auto);
        assert_eq!(mode("cache=direct"), mode("direct_io"));
        assert_eq!(mode("cache=writeback"), mode("writeback_cache"));
        assert!(parse("cache=none").unwrap_err().contains("auto, direct"));
    }

    #[test]
    fn the_time_to_answer_is_30_seconds_or_what_was_said() {
        let seconds = |options| parse(options).unwrap().answer_time_max.as_secs();
        assert_eq!((seconds(""), seconds("timeout=5")), (30, 5));
        assert_eq!(seconds("timeout=0"), 0);
    }

    #[test]
    fn no_recovery_is_for_reading() {
        assert!(parse("norecovery,ro").unwrap().core.read_only);
        assert!(parse("norecovery,rw").unwrap_err().contains("'rw'"));
        let folder = tempfile::tempdir().unwrap();
        let mut parsed = parse("noload").unwrap();
        let refused = parsed.settle_access(&[folder.path().to_owned()]);
        assert!(refused.unwrap_err().contains("needs 'ro'"));
    }

    #[test]
    fn later_options_win() {
        let parsed = parse("ro,rw,noatime,relatime,sync,async,kernel_cache,direct_io").unwrap();
        assert!(!parsed.core.read_only && !parsed.core.sync);
        assert_eq!(parsed.core.atime, AtimeMode::Relatime);
        assert_eq!(parsed.cache_mode, CacheMode::Direct);
        assert!(parsed.flags.is_empty());
        let parsed = parse("user,exec").unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
    }

    #[test]
    fn a_remount_may_repeat_the_mount_table() {
        let table = "user_id=0,group_id=0,default_permissions,allow_other,max_read=1048576";
        let parsed = parse(&format!("rw,relatime,{table},blksize=4096,remount,ro")).unwrap();
        assert!(parsed.remount && parsed.core.read_only);
        assert!(parse(table).unwrap_err().contains("user_id=0"));
    }

    #[test]
    fn generic_options_pass() {
        let generic = "defaults,user,users,noauto,nofail,_netdev,x-systemd.automount,\
            X-mount.mkdir=0755,\
            suid,nosuid,dev,nodev,exec,noexec,lazytime,default_permissions,rw,comment=systemd,\
            user=alice";
        assert!(parse(generic).unwrap().no_fail);
    }

    #[test]
    fn errors_name_the_option() {
        for (options, part) in [
            ("bogus", "'bogus'"),
            ("ro,bogus=1", "'bogus=1'"),
            ("commit=0", "'commit=0'"),
            ("commit=301", "1 to 300"),
            ("commit=soon", "'commit=soon'"),
            ("commit", "needs a value"),
            ("cache_size=1M", "16 MiB"),
            ("cache_size=1E", "'cache_size=1E'"),
            ("cache_size=8192P", "'cache_size=8192P'"),
            ("backend=magic", "auto, uring or threads"),
            ("threads=0", "'threads=0'"),
            ("threads=100000", "'threads=100000'"),
            ("attr_timeout=-1", "'attr_timeout=-1'"),
            ("timeout=86401", "to 86400, or 0"),
            ("timeout", "needs a value"),
            ("uid=5", "chown"),
            ("device_wait=3601", "0 to 3600"),
            ("device_wait", "needs a value"),
            ("cache", "needs a value"),
            ("metrics", "needs a value"),
            ("metrics=0.0.0.0:9100", "this machine alone"),
            ("search=images", "absolute"),
            ("search=", "absolute"),
            ("fsname=", "'fsname='"),
            ("allow_other,allow_root", "exclude each other"),
            ("ro=1", "'ro=1'"),
        ] {
            let error = parse(options).unwrap_err();
            assert!(error.contains(part), "{options}: {error}");
        }
    }

    #[test]
    fn sloppy_passes_over_the_unknown_but_not_the_impossible() {
        let sloppy = |options: &str| ParsedOptions::parse(&[options.to_owned()], true);
        assert!(sloppy("bogus,bogus=2,ro").unwrap().core.read_only);
        assert!(sloppy("commit=0").is_err());
    }

    #[test]
    fn commas_can_be_kept() {
        assert_eq!(split_commas("a,fsname=x\\,y,b"), ["a", "fsname=x,y", "b"]);
        assert_eq!(split_commas("c=\"p,q\",d"), ["c=p,q", "d"]);
        assert_eq!(split_commas("end\\"), ["end"]);
        assert_eq!(
            parse("fsname=/a\\,b").unwrap().fsname.as_deref(),
            Some("/a,b")
        );
    }
}
