//! The command line as its users meet it: people, scripts, mount(8), fstab.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::daemon;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::machine::link_helpers;
use braidfs_tests::ordinary::{Ordinary, USER_ID};
use braidfs_tests::report::{list, number};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, joined, name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MEMBER_BYTES: u64 = 128 * MIB;

fn main() -> ExitCode {
    runner::main(
        "cli",
        &[
            Test::new("help_and_version", 30, help_and_version),
            Test::new("mkfs_makes_images_and_labels", 30, mkfs_makes_images),
            Test::new("mkfs_force_starts_afresh", 60, mkfs_starts_afresh),
            Test::new("mkfs_discards_when_asked", 60, mkfs_discards),
            Test::new("mount_returns_when_usable_and_lets_go", 60, mount_lets_go),
            Test::new("mount_stays_in_the_foreground_when_asked", 60, foreground),
            Test::new("stats_and_info_for_people_and_programs", 60, reports),
            Test::new("any_one_member_is_enough", 60, any_one_member),
            Test::new("members_in_one_word", 60, one_word),
            Test::new("answers_to_the_names_of_helpers", 60, multi_call),
            Test::new("read_only_mounts_change_nothing", 60, read_only),
            Test::new("options_are_accepted_and_shown", 60, options),
            Test::new("plain_umount_loses_nothing", 60, plain_umount),
            Test::new("a_polite_signal_unmounts", 60, polite_signal),
            Test::new("df_tells_the_truth", 60, df),
            Test::new("fsck_speaks_in_exit_codes", 60, fsck),
            Test::new("no_root_is_needed", 60, no_root),
        ],
    )
}

fn help_and_version(env: &Env) -> Outcome {
    let help = env.braidfs().arg("--help").ok().stdout;
    for verb in [
        "mkfs", "mount", "umount", "fsck", "scrub", "info", "stats", "probe", "doctor", "control",
        "label", "top", "bench",
    ] {
        assert!(help.contains(verb), "--help does not mention {verb}");
        let text = env.braidfs().args([verb, "--help"]).ok().stdout;
        assert!(
            text.to_lowercase().contains("usage"),
            "{verb} --help: {text}"
        );
    }
    assert!(env.braidfs().arg("--version").ok().stdout.contains("0.1.0"));
    let unknown = env.braidfs().arg("frobnicate").fails();
    assert!(
        unknown.stderr.contains("frobnicate"),
        "{}",
        unknown.describe()
    );
    env.braidfs().fails();
    Ok(())
}

fn mkfs_makes_images(env: &Env) -> Outcome {
    let devices = vec![env.path("a.img"), env.path("b.img")];
    let size = ["--size", "256M", "--label", "my label"];
    env.braidfs().arg("mkfs").args(size).args(&devices).ok();
    for device in &devices {
        let meta = fs::metadata(device).expect("mkfs made the image");
        assert_eq!(meta.len(), 256 * MIB);
        assert!(meta.blocks() * 512 < 32 * MIB, "the image is not sparse");
    }
    let info = Volume::on(env, "v", devices).info();
    assert_eq!(info["label"], "my label");
    assert_eq!(list(&info, "/devices").len(), 2);
    assert_eq!(number(&info, "/devices/1/size_bytes"), 256 * MIB);
    assert_eq!(number(&info, "/stripe_unit_bytes"), 256 << 10);
    Ok(())
}

/// What an image file held before is a hole afterwards.
fn mkfs_discards(env: &Env) -> Outcome {
    let devices = vec![env.path("a.img"), env.path("b.img")];
    for device in &devices {
        fs::write(device, vec![7; 64 << 20]).expect("an image full of something");
    }
    let mkfs = || env.braidfs().args(["mkfs", "--force"]);
    let used = || -> Vec<u64> {
        let blocks = |device| fs::metadata(device).expect("an image").blocks();
        devices.iter().map(|device| blocks(device) * 512).collect()
    };
    mkfs().args(&devices).ok();
    assert!(used().iter().all(|used| *used >= 64 * MIB), "kept");
    mkfs().arg("--discard").args(&devices).ok();
    assert!(used().iter().all(|used| *used < 16 * MIB), "{:?}", used());
    Volume::on(env, "v", devices.clone()).fsck_clean();
    Ok(())
}

/// What the devices held before, an older braidfs for one, must not shine through.
fn mkfs_starts_afresh(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &[]);
    for round in 1..=3 {
        volume.mount(&[]);
        let left = fs::read_dir(&volume.mountpoint)
            .expect("list the volume")
            .count();
        assert_eq!(left, 0, "round {round}: a new file system is not empty");
        fs::write(volume.path(&format!("file-{round}")), vec![round; 50 << 20]).expect("write");
        for index in 0..500 {
            fs::write(volume.path(&format!("small-{index}")), "small").expect("write");
        }
        volume.umount();
        volume.fsck_clean();
        env.braidfs()
            .args(["mkfs", "--force"])
            .args(&volume.devices)
            .ok();
        volume.fsck_clean();
    }
    // Fewer members than before, and another stripe unit.
    let fewer = volume.devices[..2].to_vec();
    env.braidfs()
        .args(["mkfs", "--force", "--stripe-unit", "64K"])
        .args(&fewer)
        .ok();
    let mut volume = Volume::on(env, "w", fewer);
    volume.mount(&[]);
    assert_eq!(
        fs::read_dir(&volume.mountpoint)
            .expect("list the volume")
            .count(),
        0
    );
    fs::write(volume.path("file"), vec![9; 50 << 20]).expect("write to the volume");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn mount_lets_go(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    // A pipe that the daemon kept open would keep `cat` waiting.
    let script = "\"$@\" 2>&1 | cat; touch \"$MNT/first\"";
    let mount = Cmd::sh(script, [&env.bin])
        .arg("mount")
        .args(&volume.devices);
    let output = mount
        .arg(&volume.mountpoint)
        .env("MNT", &volume.mountpoint)
        .limit_secs(20)
        .ok();
    assert_eq!(
        output.text().trim(),
        "",
        "a mount that went well says nothing"
    );
    volume.adopt();
    let daemon = volume.daemon();
    let link = |name: &str| fs::read_link(format!("/proc/{}/{name}", daemon.pid));
    assert_eq!(link("cwd").expect("the daemon's folder"), Path::new("/"));
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid)).expect("its stat");
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let session = after_name
        .split(' ')
        .nth(3)
        .and_then(|word| word.parse().ok());
    assert_eq!(
        session,
        Some(daemon.pid),
        "the daemon is not the leader of its own session"
    );
    assert!(volume.path("first").exists());
    volume.umount();
    Ok(())
}

fn foreground(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let command = env.braidfs().args(["mount", "-f"]).args(&volume.devices);
    let mut running = command.arg(&volume.mountpoint).spawn();
    wait_until("mounted", || {
        volume.is_mount_point() && fs::read_dir(&volume.mountpoint).is_ok()
    });
    let found = daemon::find(&env.bin, &volume.mountpoint).map(|daemon| daemon.pid);
    assert_eq!(found, Some(running.pid()));
    fs::write(volume.path("file"), "text").expect("write to the volume");
    assert!(running.is_running());
    env.braidfs().arg("umount").arg(&volume.mountpoint).ok();
    let output = running.wait();
    assert!(output.status.success(), "{}", output.describe());
    volume.mount(&[]);
    assert_eq!(
        fs::read_to_string(volume.path("file")).expect("read it back"),
        "text"
    );
    volume.umount();
    Ok(())
}

fn reports(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &["--label", "abc"]);
    volume.mount(&[]);
    fs::write(volume.path("file"), vec![1; 20 << 20]).expect("write to the volume");
    File::open(volume.path("file"))
        .and_then(|file| file.sync_all())
        .expect("fsync");
    let stats = volume.stats();
    for section in ["volume", "cache", "txg", "space"] {
        assert!(
            stats[section].is_object(),
            "stats has no section {section}: {stats}"
        );
    }
    assert_eq!(list(&stats, "/volume/devices").len(), 3);
    assert!(number(&stats, "/volume/kiobufs") > 0);
    let text = env
        .braidfs()
        .arg("stats")
        .arg(&volume.mountpoint)
        .ok()
        .stdout;
    for word in ["kiobufs", "merges", "splits", "hits", "dirty", "commits"] {
        assert!(
            text.to_lowercase().contains(word),
            "stats does not show {word}:\n{text}"
        );
    }
    volume.umount();
    let info = volume.info();
    assert_eq!(list(&info, "/devices").len(), 3);
    assert!(!list(&info, "/chunks").is_empty());
    let text = env.braidfs().arg("info").args(&volume.devices).ok().stdout;
    for word in ["abc", "v0.img", "v2.img"] {
        assert!(text.contains(word), "info does not show {word}:\n{text}");
    }
    Ok(())
}

fn any_one_member(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &[]);
    for member in &volume.devices.clone() {
        env.braidfs()
            .arg("mount")
            .arg(member)
            .arg(&volume.mountpoint)
            .ok();
        volume.adopt();
        fs::write(volume.path("file"), name(member)).expect("write to the volume");
        volume.umount();
        let info = env.braidfs().args(["info", "--json"]).arg(member).ok();
        assert_eq!(
            list(&braidfs_tests::volume::json(&info), "/devices").len(),
            3
        );
        env.braidfs().args(["fsck", "-n"]).arg(member).ok();
    }
    volume.mount(&[]);
    let last = name(&volume.devices[2]);
    assert_eq!(fs::read_to_string(volume.path("file")).expect("read"), last);
    volume.umount();
    Ok(())
}

fn one_word(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &[]);
    let word = joined(&volume.devices);
    env.braidfs()
        .arg("mount")
        .arg(&word)
        .arg(&volume.mountpoint)
        .ok();
    volume.adopt();
    fs::write(volume.path("file"), "text").expect("write to the volume");
    volume.umount();
    env.braidfs().args(["fsck", "-n"]).arg(&word).ok();
    let info = env.braidfs().args(["info", "--json"]).arg(&word).ok();
    assert_eq!(
        list(&braidfs_tests::volume::json(&info), "/devices").len(),
        3
    );
    Ok(())
}

fn multi_call(env: &Env) -> Outcome {
    let bin = env.mkdir("sbin");
    link_helpers(env, &bin);
    let mut volume = Volume::unformatted(env, "v", &[MEMBER_BYTES; 2]);
    let helper = |name: &str| Cmd::new(bin.join(format!("{name}.braidfs")));
    helper("mkfs").args(&volume.devices).ok();
    let word = joined(&volume.devices);
    for mount in ["mount", "mount.fuse"] {
        // As mount(8) calls it: source, folder, flags, options.
        let command = helper(mount).arg(&word).arg(&volume.mountpoint);
        command.args(["-o", "rw,noatime,commit=3"]).ok();
        volume.adopt();
        fs::write(volume.path(mount), mount).expect("write to the volume");
        helper(&mount.replace("mount", "umount"))
            .arg(&volume.mountpoint)
            .ok();
        assert!(!volume.is_mount_point());
        wait_until("the daemon's end", || !volume.daemon().is_alive());
    }
    helper("fsck").arg("-n").arg(&word).ok();
    volume.mount(&[]);
    assert_eq!(
        fs::read_to_string(volume.path("mount.fuse")).expect("read"),
        "mount.fuse"
    );
    volume.umount();
    Ok(())
}

fn read_only(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    fs::write(volume.path("file"), "text").expect("write to the volume");
    volume.umount();
    let images = || -> Vec<Vec<u8>> {
        volume
            .devices
            .iter()
            .map(|device| fs::read(device).expect("read an image"))
            .collect()
    };
    let before = images();
    let mut again = Volume::on(env, "v", volume.devices.clone());
    again.mount(&["ro"]);
    assert_eq!(
        fs::read_to_string(again.path("file")).expect("read"),
        "text"
    );
    for attempt in [
        fs::write(again.path("file"), "other"),
        fs::write(again.path("new"), "new"),
        fs::remove_file(again.path("file")),
        fs::create_dir(again.path("folder")),
    ] {
        let error = attempt.expect_err("a change on a read-only mount");
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }
    again.umount();
    assert!(before == images(), "a read-only mount changed the devices");
    Ok(())
}

fn options(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let sets: [&[&str]; 7] = [
        &["rw", "relatime"],
        &["noatime", "nosuid", "nodev", "noexec"],
        &["strictatime", "commit=1"],
        &["cache_size=64M", "default_permissions", "allow_other"],
        &["direct_io"],
        &["sync"],
        &[
            "defaults",
            "noauto",
            "user",
            "_netdev",
            "x-systemd.automount",
        ],
    ];
    for set in sets {
        volume.mount(set);
        fs::write(volume.path("file"), set.join(",")).expect("write to the volume");
        let table = fs::read_to_string("/proc/self/mounts").expect("the mount table");
        let target = name(&volume.mountpoint);
        let line = table
            .lines()
            .find(|line| line.contains(&target))
            .expect("the mount's line");
        for shown in set
            .iter()
            .filter(|word| ["noatime", "nosuid", "nodev"].contains(word))
        {
            assert!(line.contains(shown), "{shown} is not in effect: {line}");
        }
        assert!(
            line.contains("braidfs"),
            "the mount table does not say braidfs: {line}"
        );
        volume.umount();
        volume.mount(&["ro"]);
        assert_eq!(
            fs::read_to_string(volume.path("file")).expect("read"),
            set.join(",")
        );
        volume.umount();
    }
    Ok(())
}

fn plain_umount(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let commands = [("umount", &[][..]), ("fusermount3", &["-u"][..])];
    for (program, args) in commands {
        env.need_tools(&[program])?;
        volume.mount(&[]);
        fs::write(volume.path(program), vec![3; 30 << 20]).expect("write to the volume");
        Cmd::new(program).args(args).arg(&volume.mountpoint).ok();
        wait_until("the daemon's end", || !volume.daemon().is_alive());
        volume.fsck_clean();
        volume.mount(&[]);
        let back = fs::read(volume.path(program)).expect("read from the volume");
        assert!(back == vec![3; 30 << 20], "{program} lost data");
        volume.umount();
    }
    Ok(())
}

fn polite_signal(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        volume.mount(&[]);
        fs::write(volume.path("file"), signal.as_str()).expect("write to the volume");
        kill(Pid::from_raw(volume.daemon().pid), signal).expect("signal the daemon");
        wait_until("the daemon's end", || !volume.daemon().is_alive());
        assert!(!volume.is_mount_point(), "{signal} left a dead mount");
        volume.fsck_clean();
        volume.mount(&[]);
        let text = fs::read_to_string(volume.path("file")).expect("read from the volume");
        assert_eq!(text, signal.as_str());
        volume.umount();
    }
    Ok(())
}

fn df(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 4], &[]);
    volume.mount(&[]);
    let stat = || nix::sys::statvfs::statvfs(&volume.mountpoint).expect("statvfs of the mount");
    let available = || stat().blocks_available() * stat().fragment_size();
    let total = stat().blocks() * stat().fragment_size();
    assert!(total <= 4 * MEMBER_BYTES, "df shows {total} bytes");
    let before = available();
    assert!(
        before > 2 * MEMBER_BYTES,
        "an empty volume has {before} bytes available"
    );
    let data = vec![5; 100 << 20];
    fs::write(volume.path("file"), &data).expect("write to the volume");
    let used = before.saturating_sub(available());
    let expected = data.len() as u64;
    assert!(
        used.abs_diff(expected) < 16 * MIB,
        "writing {expected} bytes used {used}"
    );
    fs::remove_file(volume.path("file")).expect("remove a file");
    wait_until("space back", || available().abs_diff(before) < 16 * MIB);
    // What df calls available can be written, give or take the metadata for it.
    let promised = available();
    let data = vec![6; 1 << 20];
    let mut file = File::create(volume.path("fill")).expect("create a file");
    let mut written = 0;
    let error = loop {
        match std::io::Write::write(&mut file, &data) {
            Ok(count) => written += count as u64,
            Err(error) => break error,
        }
        assert!(written <= total, "more was written than there is room");
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    file.sync_all()
        .expect("what was accepted can be made durable");
    assert!(
        written * 100 >= promised * 90,
        "{written} bytes of {promised} could be written"
    );
    drop(file);
    fs::remove_file(volume.path("fill")).expect("a full volume can still delete");
    wait_until("space back", || available().abs_diff(before) < 16 * MIB);
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn fsck(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    fs::write(volume.path("file"), vec![9; 5 << 20]).expect("write to the volume");
    volume.umount();
    let fsck = |args: &[&str]| env.braidfs().arg("fsck").args(args).args(&volume.devices);
    fsck(&["-n"]).ok();
    let json = fsck(&["-n", "--json"]).ok();
    assert!(
        braidfs_tests::volume::json(&json).is_object(),
        "{}",
        json.describe()
    );
    // fsck(8): 8 is an operational error, 16 a usage error.
    let missing = env
        .braidfs()
        .args(["fsck", "-n"])
        .arg(env.path("none"))
        .fails();
    assert_eq!(missing.status.code(), Some(8), "{}", missing.describe());
    let usage = env.braidfs().args(["fsck", "--no-such-option"]).fails();
    assert_eq!(usage.status.code(), Some(16), "{}", usage.describe());
    // On a mounted volume it must not run.
    volume.mount(&[]);
    let mounted = env
        .braidfs()
        .args(["fsck", "-n"])
        .args(&volume.devices)
        .fails();
    assert_eq!(mounted.status.code(), Some(8), "{}", mounted.describe());
    volume.umount();
    Ok(())
}

fn no_root(env: &Env) -> Outcome {
    let user = Ordinary::new(env)?;
    let volume = user.volume(env, &[MEMBER_BYTES; 2]);
    let script = "echo text >\"$1/file\"; cat \"$1/file\"; mkdir \"$1/d\"; stat -c %u \"$1/file\"";
    let shell = user.command().args(["sh", "-euc", script, "sh"]);
    let output = shell.arg(&volume.mountpoint).ok();
    assert_eq!(output.stdout, format!("text\n{USER_ID}\n"));
    user.braidfs().arg("stats").arg(&volume.mountpoint).ok();
    user.braidfs().arg("umount").arg(&volume.mountpoint).ok();
    assert!(!volume.is_mount_point());
    wait_until("the daemon's end", || {
        daemon::find(&user.bin, &volume.mountpoint).is_none()
    });
    let fsck = user.braidfs().args(["fsck", "-n"]);
    fsck.args(&volume.devices).ok();
    Ok(())
}
