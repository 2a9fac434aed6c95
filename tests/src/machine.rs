//! A machine as an administrator has it: the mount helpers where mount(8) looks for them, an fstab,
//! links in /dev/disk. All of it lies over the real one in the test's own mount namespace.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::command::Cmd;
use crate::env::{Env, Skip};

/// The names under which mount(8), umount(8), mkfs(8) and fsck(8) look for helpers.
pub const HELPERS: [&str; 6] = [
    "mkfs",
    "mount",
    "umount",
    "fsck",
    "mount.fuse",
    "umount.fuse",
];

/// Where udev keeps its links.
const DISK: &str = "/dev/disk";

/// The program under all its helpers' names, in a folder.
pub fn link_helpers(env: &Env, folder: &Path) {
    for verb in HELPERS {
        symlink(&env.bin, folder.join(format!("{verb}.braidfs"))).expect("a helper's name");
    }
}

/// Lays a folder of the test's over one of the machine's, so that what is written there goes into
/// the test's; gives it.
pub fn lay_over(env: &Env, folder: &str) -> Result<PathBuf, Skip> {
    let name = folder.trim_matches('/').replace('/', "-");
    let (upper, work) = (
        env.mkdir(&format!("{name}.upper")),
        env.mkdir(&format!("{name}.work")),
    );
    let folder = fs::canonicalize(folder).expect("a folder of the machine");
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        folder.display(),
        upper.display(),
        work.display()
    );
    let overlay = Cmd::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &layers])
        .arg(&folder)
        .run();
    if overlay.status.success() {
        return Ok(upper);
    }
    let why = overlay.stderr.trim().to_owned();
    Err(Skip(format!(
        "no overlay over {} here: {why}",
        folder.display()
    )))
}

/// What lies over the real machine.
#[derive(Debug)]
pub struct Machine {
    fstab: PathBuf,
    made_disk: bool,
}

impl Machine {
    /// Installs the helpers and an empty fstab.
    pub fn set_up(env: &Env) -> Result<Self, Skip> {
        env.need_tools(&["mount", "findmnt"])?;
        link_helpers(env, &lay_over(env, "/sbin")?);
        let fstab = env.path("fstab");
        fs::write(&fstab, "").expect("an fstab");
        if !Path::new("/etc/fstab").exists() {
            return Err(Skip("there is no /etc/fstab to cover".to_owned()));
        }
        Cmd::new("mount")
            .arg("--bind")
            .arg(&fstab)
            .arg("/etc/fstab")
            .ok();
        let made_disk = fs::create_dir(DISK).is_ok();
        Cmd::new("mount").args(["-t", "tmpfs", "tmpfs", DISK]).ok();
        Ok(Self { fstab, made_disk })
    }

    /// Replaces the fstab.
    pub fn write_fstab(&self, lines: &[String]) {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        print!("fstab:\n{text}");
        fs::write(&self.fstab, text).expect("write the fstab");
    }

    /// Makes the link /dev/disk/by-KIND/NAME that udev would make.
    pub fn link_disk(&self, kind: &str, name: &str, device: &Path) {
        let folder = Path::new(DISK).join(format!("by-{kind}"));
        fs::create_dir_all(&folder).expect("a folder of links");
        symlink(device, folder.join(name)).expect("a link to a device");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        Cmd::new("umount").arg(DISK).quiet().run();
        if self.made_disk {
            // Somebody else may use it by now.
            let _stays = fs::remove_dir(DISK);
        }
    }
}
