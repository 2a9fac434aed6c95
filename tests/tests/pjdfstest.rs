//! pjdfstest: what POSIX says of each call on names and attributes, in both cache modes.
//!
//! All features that exist on Linux are on, a second file system and two users are there, and so
//! is the helper that mount(8) wants for a remount. The cases about read-only mounts run in a
//! process of their own: the suite's posix_fallocate cases leave a file open for writing, and a
//! mount with such a file cannot turn read-only. A case that fails, or is skipped without being
//! in [`SKIPS`], fails the test.
//!
//! What is mounted over /sbin, /etc and /mnt is seen by the test's mount namespace alone.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume};

/// Cases that may be skipped, and why. None: LINK_MAX, which the C library does not know for
/// FUSE, is told by a preloaded library.
const SKIPS: &[(&str, &str)] = &[];

/// The least number of cases that there must be: of all, and of those about read-only mounts.
const CASES_MIN: usize = 398;
const EROFS_CASES_MIN: usize = 13;
/// How many names a file of braidfs can have.
const NAMES_MAX: u32 = 65_000;
/// What the cases about read-only mounts have in their names.
const EROFS: &str = "erofs";

fn main() -> ExitCode {
    runner::main(
        "pjdfstest",
        &[
            Test::new("auto", 300, |env| suite(env, "cache=auto")),
            Test::new("direct_io", 300, |env| suite(env, "direct_io")),
            Test::new("writeback_cache", 300, |env| suite(env, "writeback_cache")),
        ],
    )
}

/// What became of one case.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Case {
    Passed,
    Skipped(String),
    Failed(String),
}

type Cases = BTreeMap<String, Case>;

fn suite(env: &Env, mode: &str) -> Outcome {
    let pjdfstest = env.need_crate("pjdfstest")?;
    env.need_tools(&["unshare", "mount", "which"])?;
    let names_max = format!("-DNAMES_MAX={NAMES_MAX}");
    let preload = env.preload_library("pathconf.c", &[&names_max])?;
    add_users(env);
    add_mount_helper(env);
    // Paths of sockets are short, so the mount point must be.
    let base = PathBuf::from("/mnt");
    let second = base.join("second");
    Cmd::sh("mount -t tmpfs pjdfstest /mnt && mkdir \"$1\"", [&second]).ok();
    let mut volume = Volume::format(env, "v", &[256 * MIB; 3], &[]);
    // pjdfstest overflows when its base path has 31 bytes, as it has with three digits here.
    volume.mountpoint = base.join(format!("b{:05}", std::process::id()));
    fs::create_dir(&volume.mountpoint).expect("a mount point");
    volume.mount(&[mode, "cache_size=64M"]);
    let run = |name: &str, allow_remount: bool, words: &[&str]| {
        let config = env.path(name);
        fs::write(&config, configuration(&second, allow_remount)).expect("write the settings");
        let program = Cmd::new(&pjdfstest).env("LD_PRELOAD", &preload);
        let program = program.arg("-c").arg(&config).arg("-p");
        let program = program.arg(&volume.mountpoint).args(words);
        let output = program.limit_secs(140).run();
        let cases = cases_of(&output.stdout);
        if cases.is_empty() {
            panic!("no case was run: {}", output.describe());
        }
        cases
    };
    let mut cases = run("all.toml", false, &[]);
    let erofs = run("erofs.toml", true, &[EROFS]);
    assert!(erofs.len() >= EROFS_CASES_MIN, "{} cases", erofs.len());
    cases.extend(erofs);
    volume.umount();
    volume.fsck_clean();
    judge(&cases);
    Ok(())
}

/// Fails unless all cases passed, or are in the list of those that may be skipped.
fn judge(cases: &Cases) {
    let mut bad = Vec::new();
    let mut passed = 0;
    for (name, case) in cases {
        let known = SKIPS.iter().find(|entry| entry.0 == name);
        match case {
            Case::Passed => passed += 1,
            Case::Skipped(_) if known.is_some() => {
                println!("skipped: {name}: {}", known.expect("just found").1);
            }
            Case::Skipped(why) => bad.push(format!("{name}: skipped, which is new: {why}")),
            Case::Failed(why) => bad.push(format!("{name}: failed: {why}")),
        }
    }
    let skipped = cases.len() - passed - bad.len();
    let failed = bad.len();
    println!("pjdfstest: {passed} passed, {failed} failed, {skipped} skipped");
    assert!(bad.is_empty(), "\n{}", bad.join("\n"));
    assert!(cases.len() >= CASES_MIN, "only {} cases", cases.len());
}

/// Reads what the suite printed: a case and its end on a line, and reasons indented below.
fn cases_of(output: &str) -> Cases {
    let mut cases = Cases::new();
    let mut last = None;
    for line in output.lines() {
        if let Some(reason) = line.strip_prefix('\t') {
            let case = last.as_ref().and_then(|name| cases.get_mut(name));
            if let Some(Case::Skipped(why) | Case::Failed(why)) = case {
                why.push_str(reason);
            }
            continue;
        }
        let case = match line.split_whitespace().collect::<Vec<_>>()[..] {
            [name, "ok"] => (name, Case::Passed),
            [name, "skipped"] => (name, Case::Skipped(String::new())),
            [name, "FAILED"] => (name, Case::Failed(String::new())),
            _ => continue,
        };
        cases.insert(case.0.to_owned(), case.1);
        last = Some(case.0.to_owned());
    }
    cases
}

/// The suite's settings. What is left out (chflags, NFSv4 ACLs) does not exist on Linux.
fn configuration(second: &Path, allow_remount: bool) -> String {
    let second = second.display();
    format!(
        "[features]\n\
         posix_fallocate = {{}}\n\
         rename_ctime = {{}}\n\
         stat_st_birthtime = {{}}\n\
         utime_now = {{}}\n\
         utimensat = {{}}\n\
         secondary_fs = \"{second}\"\n\
         [settings]\n\
         naptime = 0.01\n\
         allow_remount = {allow_remount}\n\
         [dummy_auth]\n\
         entries = [[\"braid1\", \"braid1\"], [\"braid2\", \"braid2\"]]\n"
    )
}

/// Two users with groups of their own, in this mount namespace.
fn add_users(env: &Env) {
    let script = "
        cp /etc/passwd /etc/group \"$1\"
        for number in 1 2; do
            echo \"braid$number:x:6110$number:6110$number::/:/bin/sh\" >>\"$1/passwd\"
            echo \"braid$number:x:6110$number:\" >>\"$1/group\"
        done
        mount --bind \"$1/passwd\" /etc/passwd
        mount --bind \"$1/group\" /etc/group";
    Cmd::sh(script, [env.mkdir("etc")]).ok();
}

/// `mount.fuse.braidfs` where mount(8) looks for it, in this mount namespace.
fn add_mount_helper(env: &Env) {
    let (helpers, real) = (env.mkdir("helpers"), env.mkdir("real"));
    symlink(&env.bin, helpers.join("mount.fuse.braidfs")).expect("a link to the program");
    // Without overlayfs: a folder of links.
    let script = "
        sbin=$(realpath /sbin)
        mount -t overlay -o \"lowerdir=$1:$sbin\" helpers \"$sbin\" && exit
        mount --bind \"$sbin\" \"$2\"
        mount -t tmpfs -o mode=755 helpers \"$sbin\"
        ln -s \"$2\"/* \"$sbin/\"
        ln -sf \"$1\"/* \"$sbin/\"";
    Cmd::sh(script, [&helpers, &real]).ok();
}
