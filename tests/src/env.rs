//! What a test has: a folder of its own, the program under test, and the tools it asked for.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;
use nix::unistd::Uid;

use crate::command::Cmd;

/// Why a test cannot run here. Skipped tests are counted and their reasons printed.
#[derive(Debug)]
pub struct Skip(pub String);

/// How a test ends if it does not panic.
pub type Outcome = Result<(), Skip>;

/// Tools by command name, and the Debian package of each.
const PACKAGES: &[(&str, &str)] = &[
    ("fio", "fio"),
    ("stress-ng", "stress-ng"),
    ("dbench", "dbench"),
    ("xfs_io", "xfsprogs"),
    ("chattr", "e2fsprogs"),
    ("lsattr", "e2fsprogs"),
    ("fstrim", "util-linux"),
    ("stdbuf", "coreutils"),
    ("fusermount3", "fuse3"),
    ("setfattr", "attr"),
    ("getfattr", "attr"),
    ("setfacl", "acl"),
    ("getfacl", "acl"),
    ("rsync", "rsync"),
    ("git", "git"),
    ("sqlite3", "sqlite3"),
    ("tar", "tar"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("fsck", "util-linux"),
    ("script", "bsdutils"),
    ("losetup", "mount"),
    ("swapon", "mount"),
    ("blockdev", "util-linux"),
    ("setpriv", "util-linux"),
    ("sfdisk", "fdisk"),
    ("cargo", "cargo"),
    ("cc", "build-essential"),
    ("mount", "mount"),
    ("findmnt", "util-linux"),
    ("systemd-analyze", "systemd"),
    ("udevadm", "udev"),
    ("zsh", "zsh"),
    ("fish", "fish"),
    ("promtool", "prometheus"),
    ("prometheus", "prometheus"),
    ("tmux", "tmux"),
    ("pgrep", "procps"),
    ("groff", "groff-base"),
    ("man", "man-db"),
    ("dpkg-deb", "dpkg"),
    ("unshare", "util-linux"),
    ("which", "debianutils"),
];

/// Tools that are crates, and the version of each that the tests know.
const CRATES: &[(&str, &str)] = &[("fsx", "0.3.2"), ("pjdfstest", "0.2.2")];

/// A test's surroundings.
#[derive(Debug)]
pub struct Env {
    /// An empty folder that goes away after the test.
    pub dir: PathBuf,
    /// The `braidfs` program.
    pub bin: PathBuf,
}

impl Env {
    /// `braidfs` with nothing but its name.
    pub fn braidfs(&self) -> Cmd {
        Cmd::new(&self.bin)
    }

    /// Skips the test unless these programs can be found.
    pub fn need_tools(&self, tools: &[&str]) -> Outcome {
        for tool in tools {
            if find_program(tool).is_none() {
                let package = PACKAGES.iter().find(|entry| entry.0 == *tool);
                let package = package.map_or(*tool, |entry| entry.1);
                return Err(Skip(format!(
                    "{tool} is missing (apt-get install {package})"
                )));
            }
        }
        Ok(())
    }

    /// Skips the test unless this tool from crates.io is there, in the version the tests know.
    pub fn need_crate(&self, name: &str) -> Result<PathBuf, Skip> {
        let known = CRATES.iter().find(|entry| entry.0 == name);
        let version = known.expect("a crate of the list").1;
        let install = format!("(cargo install --locked {name}@{version}, or scripts/test)");
        let Some(tool) = find_program(name) else {
            return Err(Skip(format!("{name} is missing {install}")));
        };
        let told = Cmd::new(&tool).arg("--version").quiet().run().stdout;
        if told.trim() == format!("{name} {version}") {
            return Ok(tool);
        }
        let path = tool.display();
        Err(Skip(format!("{path} is not version {version} {install}")))
    }

    /// Compiles a library that is loaded ahead of the C library, from `tests/preload`.
    pub fn preload_library(&self, name: &str, flags: &[&str]) -> Result<PathBuf, Skip> {
        self.need_tools(&["cc"])?;
        let source = project_root().join("tests/preload").join(name);
        let library = self.path(name).with_extension("so");
        let fixed = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"];
        let cc = Cmd::new("cc").args(fixed).args(flags).arg("-o");
        cc.arg(&library).arg(source).ok();
        Ok(library)
    }

    /// Skips the test unless the test folder's file system has this much room.
    pub fn need_space(&self, bytes: u64) -> Outcome {
        let stat = statvfs(&self.dir).expect("statvfs of the test folder");
        let free = stat.blocks_available() * stat.fragment_size();
        if free < bytes {
            let (want, have) = (bytes >> 20, free >> 20);
            let dir = self.dir.display();
            return Err(Skip(format!(
                "{dir} has {have} MiB free, the test needs {want} MiB"
            )));
        }
        Ok(())
    }

    /// Skips the test unless loop devices can be made.
    pub fn need_loop_devices(&self) -> Outcome {
        self.need_tools(&["losetup"])?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control");
        control
            .map(drop)
            .map_err(|error| Skip(format!("/dev/loop-control: {error}")))
    }

    /// A path inside the test's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A new folder inside the test's folder.
    pub fn mkdir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(&path).expect("a folder for the test");
        path
    }
}

/// Why no test that mounts can run here, if so.
pub fn mount_obstacle() -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("real mounts are tested as root".to_owned());
    }
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => None,
        Err(error) => Some(format!("/dev/fuse: {error}")),
    }
}

/// Finds a program in PATH, in the places only root has in it, or among the tools from crates.io.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(extra)
        .chain(crate_tools())
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// Where `scripts/test` installs tools from crates.io: `tools/bin` in the target folder, in which
/// the running test lies too.
fn crate_tools() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    let target = exe.ancestors().nth(3)?;
    Some(target.join("tools/bin"))
}

/// How much of something a test does: from an environment variable, or so much.
pub fn number_from_environment(key: &str, default: u64) -> u64 {
    let given = std::env::var(key).ok();
    given.map_or(default, |text| match text.parse() {
        Ok(number) => number,
        Err(error) => panic!("{key}={text}: {error}"),
    })
}

/// The top folder of the project.
pub fn project_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
}

/// The program under test: `BRAIDFS_BIN`, else a release build made now.
pub fn program_under_test() -> Result<PathBuf, String> {
    if let Some(bin) = std::env::var_os("BRAIDFS_BIN") {
        let bin = PathBuf::from(bin);
        return bin
            .canonicalize()
            .map_err(|error| format!("{}: {error}", bin.display()));
    }
    release_build("--bin", "braidfs")
}

/// The null FUSE server (`fs/examples/null.rs`): a release build made now.
pub fn null_server() -> Result<PathBuf, String> {
    release_build("--example", "null")
}

fn release_build(kind: &str, name: &str) -> Result<PathBuf, String> {
    let words = ["build", "--release", "--quiet", "--package", "braidfs"];
    let build = Cmd::new("cargo")
        .args(words)
        .args([kind, name, "--message-format=json"])
        .cwd(project_root())
        .limit_secs(1200)
        .quiet()
        .run();
    if !build.status.success() {
        return Err(build.describe());
    }
    let executable = build.stdout.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == name).then_some(())?;
        message["executable"].as_str().map(PathBuf::from)
    });
    executable.ok_or_else(|| format!("the build made no program named {name}"))
}
