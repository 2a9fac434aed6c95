//! An ordinary user, with a copy of the program and a folder of his own.

use std::fs;
use std::path::{Path, PathBuf};

use crate::command::Cmd;
use crate::env::{Env, Skip};
use crate::volume::Volume;

/// Everybody knows this one.
pub const USER_ID: u32 = 65534;

/// Someone who is not root.
pub struct Ordinary {
    /// A copy of the program: it may lie where only root can go.
    pub bin: PathBuf,
    run: PathBuf,
}

impl Ordinary {
    /// Lets him into the test's folder and, in the test's own mount namespace, have /dev/fuse.
    pub fn new(env: &Env) -> Result<Self, Skip> {
        env.need_tools(&["setpriv", "fusermount3"])?;
        let node = env.path("fuse-node");
        let script = "mknod -m 666 \"$1\" c 10 229; mount --bind \"$1\" /dev/fuse";
        Cmd::sh(script, [&node]).ok();
        Cmd::new("chmod").arg("711").arg(&env.dir).ok();
        let bin = env.path("braidfs");
        fs::copy(&env.bin, &bin).expect("copy the program");
        let user = Self {
            bin,
            run: env.mkdir("run"),
        };
        user.own([user.run.as_path()]);
        Ok(user)
    }

    /// Makes these his.
    pub fn own<P: AsRef<Path>>(&self, paths: impl IntoIterator<Item = P>) {
        let chown = Cmd::new("chown").arg(format!("{USER_ID}:{USER_ID}"));
        let add = |chown: Cmd, path: P| chown.arg(path.as_ref());
        paths.into_iter().fold(chown, add).ok();
    }

    /// A volume of image files that are his, made and mounted by him.
    pub fn volume<'e>(&self, env: &'e Env, sizes: &[u64]) -> Volume<'e> {
        let volume = Volume::unformatted(env, "v", sizes);
        self.own(volume.devices.iter().chain([&volume.mountpoint]));
        self.braidfs().arg("mkfs").args(&volume.devices).ok();
        let mount = self.braidfs().arg("mount").args(&volume.devices);
        mount.arg(&volume.mountpoint).ok();
        assert!(volume.is_mount_point(), "not mounted");
        volume
    }

    /// A command of his, to be completed.
    pub fn command(&self) -> Cmd {
        let ids = [
            format!("--reuid={USER_ID}"),
            format!("--regid={USER_ID}"),
            "--clear-groups".to_owned(),
            "--".to_owned(),
        ];
        let setpriv = Cmd::new("setpriv").env("XDG_RUNTIME_DIR", &self.run);
        setpriv.env("TMPDIR", &self.run).args(ids)
    }

    /// The program, run by him.
    pub fn braidfs(&self) -> Cmd {
        self.command().arg(&self.bin)
    }
}
