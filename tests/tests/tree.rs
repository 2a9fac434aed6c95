//! Real trees in by ordinary tools, and the same trees out after a remount.
//!
//! The tree: the Rust toolchain's installation, topped up from /usr where that is too small, and
//! a specimen of everything that a copy can lose (`specimen.rs`).

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::compare::{Leniency, assert_same, differences};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::specimen;
use braidfs_tests::volume::{GIB, Volume};

const TREE_ENTRIES_MIN: u64 = 20_000;
const TREE_BYTES_MIN: u64 = 1_000_000_000;
/// Room on the test folder's file system for a copy of the tree.
const SPACE_BYTES: u64 = 5 * GIB;

fn main() -> ExitCode {
    runner::main(
        "tree",
        &[
            Test::new(
                "the_comparison_notices_losses",
                60,
                the_comparison_notices_losses,
            ),
            Test::new("cp_archive_is_identical_after_remount", 400, cp_archive),
            Test::new("tar_is_identical_after_remount", 400, tar),
            Test::new("rsync_is_identical_after_remount", 400, rsync),
        ],
    )
}

/// Links to the parts of the real tree, each with a name of its own.
fn real_parts() -> Vec<(String, PathBuf)> {
    let sysroot = Cmd::new("rustc").args(["--print", "sysroot"]).quiet().run();
    let toolchain = PathBuf::from(sysroot.stdout.trim());
    let mut parts = Vec::new();
    let (mut entries, mut bytes) = (0, 0);
    for candidate in [
        toolchain,
        "/usr/share".into(),
        "/usr/lib".into(),
        "/usr/bin".into(),
    ] {
        if entries >= TREE_ENTRIES_MIN && bytes >= TREE_BYTES_MIN {
            break;
        }
        if candidate.is_absolute() && candidate.is_dir() {
            let (more_entries, more_bytes) = measure(&candidate);
            entries += more_entries;
            bytes += more_bytes;
            let name = candidate
                .file_name()
                .expect("no candidate is the root folder");
            parts.push((name.to_string_lossy().into_owned(), candidate));
        }
    }
    assert!(
        entries >= TREE_ENTRIES_MIN && bytes >= TREE_BYTES_MIN,
        "no tree is large enough"
    );
    println!(
        "real tree: {entries} entries, {} MB, {parts:?}",
        bytes / 1_000_000
    );
    parts
}

fn measure(dir: &Path) -> (u64, u64) {
    let (mut entries, mut bytes) = (0, 0);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        entries += 1;
        if meta.is_dir() {
            let inside = measure(&entry.path());
            entries += inside.0;
            bytes += inside.1;
        } else if meta.is_file() {
            bytes += meta.len();
        }
    }
    (entries, bytes)
}

/// Copies the real tree and the specimen onto a new volume with `copy(source, target)`, remounts,
/// compares, and checks the file system.
fn round_trip(env: &Env, leniency: Leniency, copy: fn(&Path, &Path)) -> Outcome {
    env.need_tools(&["setfattr", "getfattr", "setfacl"])?;
    env.need_space(SPACE_BYTES)?;
    let special = env.path("specimen");
    specimen::make(&special);
    let mut parts = real_parts();
    parts.push(("specimen".to_owned(), special));
    let mut volume = Volume::format(env, "v", &[2 * GIB; 4], &[]);
    volume.mount(&[]);
    for (name, source) in &parts {
        let target = volume.path(name);
        fs::create_dir(&target).expect("a folder on the volume");
        copy(source, &target);
    }
    volume.umount();
    volume.fsck_clean();
    volume.mount(&[]);
    for (name, source) in &parts {
        assert_same(source, &volume.path(name), leniency);
    }
    volume.umount();
    Ok(())
}

fn cp_archive(env: &Env) -> Outcome {
    round_trip(env, Leniency::default(), |source, target| {
        Cmd::new("cp")
            .arg("-a")
            .arg(source.join("."))
            .arg(target)
            .limit_secs(240)
            .ok();
    })
}

fn tar(env: &Env) -> Outcome {
    env.need_tools(&["tar"])?;
    round_trip(env, Leniency::default(), |source, target| {
        let script = "tar --format=posix --sparse --acls --xattrs --xattrs-include='*' \
                      -C \"$1\" -cf - . | \
                      tar --acls --xattrs --xattrs-include='*' -C \"$2\" -xpf - 2>&1";
        // tar cannot keep what it does not know of: the names of sockets are warned about.
        Cmd::sh(script, [source, target]).limit_secs(240).ok();
    })
}

fn rsync(env: &Env) -> Outcome {
    env.need_tools(&["rsync"])?;
    // Without -S rsync writes zeros where the original has holes.
    round_trip(env, Leniency { holes: true }, |source, target| {
        let slashed = |path: &Path| format!("{}/", path.display());
        let (from, to) = (slashed(source), slashed(target));
        // The specimen's largest hole would be gigabytes of zeros.
        let rsync = |flags: &[&str]| {
            let large = ["--exclude", "sparse/only-a-hole"];
            Cmd::new("rsync")
                .args(flags)
                .args(large)
                .args([&from, &to])
                .limit_secs(240)
                .ok()
        };
        rsync(&["-aHAX"]);
        let again = rsync(&["-aHAX", "--dry-run", "--itemize-changes"]);
        assert_eq!(again.stdout, "", "a second rsync found differences");
        let hole = source.join("sparse/only-a-hole");
        if hole.exists() {
            Cmd::new("rsync")
                .arg("-aHAXS")
                .arg(&hole)
                .arg(target.join("sparse"))
                .ok();
            // That touched the folder.
            Cmd::new("touch")
                .arg("-r")
                .arg(source.join("sparse"))
                .arg(target.join("sparse"))
                .ok();
        }
    })
}

/// The canary: a comparison that cannot fail proves nothing.
fn the_comparison_notices_losses(env: &Env) -> Outcome {
    env.need_tools(&["setfattr", "getfattr", "setfacl"])?;
    let (original, copy) = (env.path("original"), env.path("copy"));
    specimen::make(&original);
    Cmd::new("cp")
        .arg("-a")
        .arg(&original)
        .arg(&copy)
        .quiet()
        .ok();
    assert_same(&original, &copy, Leniency::default());

    let at = |name: &str| copy.join(name);
    let mode = |name, mode| fs::set_permissions(at(name), fs::Permissions::from_mode(mode));
    fs::write(at("sizes/size-4097"), [0; 4097]).expect("lose content");
    mode("modes/mode-4755", 0o755).expect("lose a mode");
    std::os::unix::fs::chown(at("names"), Some(5), None).expect("lose an owner");
    let touch = Cmd::new("touch").args(["-d", "@1234567890.123456788"]);
    touch.arg(at("times/folder-3")).ok();
    fs::remove_file(at("links/sym-1")).expect("lose a link");
    symlink("../links/c", at("links/sym-1")).expect("make another link");
    fs::copy(at("links/a/hard-9"), at("links/hard")).expect("copy a hard link");
    fs::rename(at("links/hard"), at("links/a/hard-9")).expect("lose a hard link");
    Cmd::new("setfattr")
        .args(["-x", "user.empty"])
        .arg(at("xattrs/file"))
        .ok();
    Cmd::new("setfacl")
        .args(["-x", "u:1234"])
        .arg(at("acls/file"))
        .ok();
    let filled = fs::read(at("sparse/odd-end")).expect("read a sparse file");
    fs::write(at("sparse/odd-end"), filled).expect("lose a hole");
    fs::remove_file(at("crowd/member-01234")).expect("lose a file");

    let (differences, _) = differences(&original, &copy, Leniency::default());
    let expected = [
        "sizes/size-4097: contents",
        "modes/mode-4755: type and mode",
        "names: owner",
        "times/folder-3: mtime was 1234567890.123456789",
        "links/sym-1: link target",
        "links/a/hard-9: hard links lost",
        "xattrs/file: attribute lost: user.empty",
        "acls/file: attribute lost: system.posix_acl_access",
        "sparse/odd-end: holes became data",
        "crowd/member-01234: missing",
    ];
    for start in expected {
        let noticed = differences
            .iter()
            .any(|difference| difference.starts_with(start));
        assert!(noticed, "not noticed: {start}, only {differences:#?}");
    }
    Ok(())
}
