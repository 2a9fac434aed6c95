//! Programs that are hard on a file system, at work on the mount: git, cargo, SQLite.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, Running};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::pattern::Random;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::sqlite;
use braidfs_tests::volume::{GIB, Volume};

fn main() -> ExitCode {
    runner::main(
        "programs",
        &[
            Test::new("git_clone_fsck_and_gc", 180, git),
            Test::new("cargo_build_stays_fresh_over_a_remount", 180, cargo),
            Test::new(
                "sqlite_survives_its_writer_killed",
                120,
                sqlite_writer_killed,
            ),
            Test::new(
                "sqlite_survives_the_daemon_killed",
                180,
                sqlite_daemon_killed,
            ),
        ],
    )
}

fn git_in(dir: &Path, args: &[&str]) -> String {
    let identity = [
        "-c",
        "user.name=T",
        "-c",
        "user.email=t@localhost",
        "-c",
        "gc.auto=0",
    ];
    let git = Cmd::new("git")
        .args(identity)
        .args(args)
        .cwd(dir)
        .limit_secs(120);
    git.env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .ok()
        .stdout
}

/// A repository with a history: some files change with every commit, some come, some go.
fn make_history(dir: &Path) {
    fs::create_dir(dir).expect("a folder for the repository");
    git_in(dir, &["init", "--quiet", "--initial-branch=main"]);
    let mut random = Random::new(5);
    for commit in 0..25 {
        for _ in 0..40 {
            let (sub, name) = (random.below(20), random.below(100));
            let sub = dir.join(format!("part-{sub}"));
            fs::create_dir_all(&sub).expect("a folder in the repository");
            let lines = (0..random.below(400)).map(|_| format!("{:x}\n", random.next()));
            fs::write(
                sub.join(format!("file-{name}.txt")),
                lines.collect::<String>(),
            )
            .expect("a file in the repository");
        }
        let binary = random.bytes(300_000);
        fs::write(dir.join("large.bin"), binary).expect("a file in the repository");
        git_in(dir, &["add", "--all"]);
        git_in(
            dir,
            &[
                "commit",
                "--quiet",
                "--message",
                &format!("change {commit}"),
            ],
        );
    }
}

fn git(env: &Env) -> Outcome {
    env.need_tools(&["git"])?;
    let mut volume = Volume::format(env, "v", &[GIB; 3], &[]);
    volume.mount(&[]);
    let (origin, clone) = (volume.path("origin"), volume.path("clone"));
    make_history(&origin);
    let url = format!("file://{}", origin.display());
    git_in(&volume.mountpoint, &["clone", "--quiet", &url, "clone"]);
    let head = git_in(&origin, &["rev-parse", "HEAD"]);
    let check = |dir: &Path| {
        git_in(dir, &["fsck", "--full", "--strict", "--no-dangling"]);
        assert_eq!(git_in(dir, &["rev-parse", "HEAD"]), head);
        assert_eq!(git_in(dir, &["status", "--porcelain"]), "");
        assert_eq!(git_in(dir, &["rev-list", "--count", "HEAD"]).trim(), "25");
    };
    check(&clone);
    git_in(&origin, &["gc", "--quiet", "--aggressive", "--prune=now"]);
    git_in(&clone, &["repack", "-a", "-d", "--quiet"]);
    check(&origin);
    volume.remount(&[]);
    check(&origin);
    check(&clone);
    git_in(
        &volume.mountpoint,
        &["clone", "--quiet", "origin", "local-clone"],
    );
    check(&volume.path("local-clone"));
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn cargo(env: &Env) -> Outcome {
    env.need_tools(&["cargo"])?;
    let mut volume = Volume::format(env, "v", &[GIB; 2], &[]);
    volume.mount(&[]);
    let dir = volume.path("small");
    fs::create_dir_all(dir.join("src")).expect("a folder for the crate");
    let manifest = "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
                    [workspace]\n";
    let build = "fn main() {\n    let out = std::env::var(\"OUT_DIR\").unwrap();\n    \
                 let text = \"pub const N: u32 = 42;\";\n    \
                 std::fs::write(format!(\"{out}/n.rs\"), text).unwrap();\n}\n";
    let main = "include!(concat!(env!(\"OUT_DIR\"), \"/n.rs\"));\n\nfn main() {\n    \
                println!(\"the number is {N}\");\n}\n\n#[test]\nfn number() {\n    \
                assert_eq!(N, 42);\n}\n";
    for (name, text) in [
        ("Cargo.toml", manifest),
        ("build.rs", build),
        ("src/main.rs", main),
    ] {
        fs::write(dir.join(name), text).expect("a file of the crate");
    }
    let target = dir.join("target");
    let cargo = |verb: &[&str]| {
        let cargo = Cmd::new("cargo")
            .args(verb)
            .arg("--offline")
            .cwd(&dir)
            .limit_secs(100);
        cargo
            .env("CARGO_TARGET_DIR", &target)
            .env("RUSTFLAGS", "")
            .ok()
    };
    assert!(cargo(&["build"]).stderr.contains("Compiling"));
    assert_eq!(cargo(&["run", "--quiet"]).stdout, "the number is 42\n");
    assert!(cargo(&["test"]).stdout.contains("1 passed"));
    volume.remount(&[]);
    let again = cargo(&["build"]);
    assert!(
        !again.stderr.contains("Compiling"),
        "cargo built again: {}",
        again.stderr
    );
    assert_eq!(cargo(&["run", "--quiet"]).stdout, "the number is 42\n");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

/// The last row that the writer saw durable.
fn durable(writer: &Running) -> u64 {
    let last = writer.last_durable();
    last.map_or(0, |number| number.parse().expect("a row number"))
}

fn wait_for_rows(writer: &mut Running, rows: u64) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while durable(writer) < rows {
        assert!(
            Instant::now() < deadline,
            "only {} rows in 30 s",
            durable(writer)
        );
        assert!(
            writer.is_running(),
            "the writer ended early: {}",
            writer.stdout_so_far()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn sqlite_writer_killed(env: &Env) -> Outcome {
    env.need_tools(&["sqlite3"])?;
    let mut volume = Volume::format(env, "v", &[GIB; 2], &[]);
    volume.mount(&[]);
    for journal in ["delete", "wal"] {
        let database = volume.path(&format!("{journal}.db"));
        let script = env.path("writer.sql");
        sqlite::write_script(&script, journal);
        sqlite::create(&database, journal);
        let mut rows = 0;
        for round in 1..=3 {
            let mut writer = sqlite::start_writer(&script, &database);
            wait_for_rows(&mut writer, round * 40);
            writer.kill();
            rows = durable(&writer).max(rows);
            sqlite::assert_intact(&database, rows);
        }
        volume.remount(&[]);
        sqlite::assert_intact(&database, rows);
    }
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn sqlite_daemon_killed(env: &Env) -> Outcome {
    env.need_tools(&["sqlite3"])?;
    let mut volume = Volume::format(env, "v", &[GIB; 2], &[]);
    volume.mount(&[]);
    for journal in ["delete", "wal"] {
        let database = volume.path(&format!("{journal}.db"));
        let script = env.path("writer.sql");
        sqlite::write_script(&script, journal);
        sqlite::create(&database, journal);
        for round in 1..=3 {
            let mut writer = sqlite::start_writer(&script, &database);
            wait_for_rows(&mut writer, round * 40);
            volume.kill_daemon_only();
            writer.kill();
            let rows = durable(&writer);
            volume.detach();
            volume.fsck_clean();
            volume.mount(&[]);
            sqlite::assert_intact(&database, rows);
        }
    }
    volume.umount();
    volume.fsck_clean();
    Ok(())
}
