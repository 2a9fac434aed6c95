//! Orders to a mounted file system: freezing for backups, settings, labels; and its rates.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, Running, wait_until};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::machine::Machine;
use braidfs_tests::report::{list, number};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{CACHE_MODES, MIB, Volume, json, name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const MEMBER_BYTES: u64 = 256 * MIB;

fn main() -> ExitCode {
    runner::main(
        "control",
        &[
            Test::new("a_frozen_volume_changes_only_after_the_thaw", 120, freeze),
            Test::new("writers_of_a_frozen_volume_can_be_killed", 120, killed),
            Test::new("a_freeze_ends_by_itself", 60, limit),
            Test::new("a_frozen_volume_is_unmounted_in_bounded_time", 120, umount),
            Test::new("a_smaller_cache_gives_memory_back", 120, resize),
            Test::new("settings_are_changed_and_shown", 60, settings),
            Test::new("labels_change_mounted_or_not", 60, labels),
            Test::new("sync_and_drop_caches", 60, sync),
            Test::new("usr1_logs_a_summary", 60, summary),
            Test::new("stats_of_intervals", 60, intervals),
        ],
    )
}

fn control(env: &Env, volume: &Volume<'_>, words: &[&str]) -> Cmd {
    let command = env.braidfs().arg("control").arg(&volume.mountpoint);
    command.args(words)
}

fn get(env: &Env, volume: &Volume<'_>) -> Value {
    json(&control(env, volume, &["get", "--json"]).quiet().ok())
}

fn is_frozen(env: &Env, volume: &Volume<'_>) -> bool {
    get(env, volume)["frozen"] == true
}

/// A process that writes a line to a file.
fn writer(path: &Path) -> Running {
    Cmd::sh("echo written >\"$1\"", [path]).quiet().spawn()
}

fn images(volume: &Volume<'_>) -> Vec<Vec<u8>> {
    let read = |device| fs::read(device).expect("read an image");
    volume.devices.iter().map(read).collect()
}

/// More writers than there could ever be threads wait, and reading goes on; what lies on the
/// devices meanwhile is a whole file system.
fn freeze(env: &Env) -> Outcome {
    const WRITERS: usize = 200;
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[MEMBER_BYTES; 2], &[]);
        volume.mount(&[mode, "commit=1"]);
        let text = vec![b'x'; 5 << 20];
        fs::write(volume.path("before"), &text).expect("write to the volume");
        // The kernel lets one process at a time change a directory, so they change files.
        fs::create_dir(volume.path("new")).expect("a folder on the volume");
        for number in 0..WRITERS {
            fs::write(volume.path(&format!("new/{number}")), "old").expect("write");
        }
        control(env, &volume, &["freeze"]).ok();
        let before = images(&volume);
        let again = control(env, &volume, &["freeze"]).exits(1);
        assert!(
            again.stderr.contains("frozen already"),
            "{}",
            again.describe()
        );
        let mut writers: Vec<Running> = (0..WRITERS)
            .map(|number| writer(&volume.path(&format!("new/{number}"))))
            .collect();
        // Longer than a commit interval.
        std::thread::sleep(Duration::from_secs(2));
        assert!(fs::read(volume.path("before")).expect("read") == text);
        let old = volume.path(&format!("new/{}", WRITERS - 1));
        assert_eq!(fs::metadata(old).expect("stat").len(), 3);
        assert_eq!(fs::read_dir(&volume.mountpoint).expect("list").count(), 2);
        File::open(volume.path("before"))
            .and_then(|file| file.sync_all())
            .expect("what is durable can be made durable");
        assert!(
            writers.iter_mut().all(Running::is_running),
            "a writer did not wait"
        );
        assert!(images(&volume) == before, "a frozen volume was written to");
        let slow = json(
            &env.braidfs()
                .args(["stats", "-i", "0.2", "-c", "1", "--json"])
                .arg(&volume.mountpoint)
                .ok(),
        );
        assert_eq!(slow["frozen"], true);
        assert!(number(&slow, "/slowest/0/age_us") > 500_000, "{slow}");
        // A copy of the devices has everything up to the freeze.
        let copies: Vec<_> = before
            .iter()
            .zip(0..)
            .map(|(image, nth)| {
                let path = env.path(&format!("copy{nth}.img"));
                fs::write(&path, image).expect("copy an image");
                path
            })
            .collect();
        drop(before);
        control(env, &volume, &["thaw"]).ok();
        for writer in writers {
            let output = writer.wait();
            assert!(output.status.success(), "{}", output.describe());
        }
        let thawed = control(env, &volume, &["thaw"]).exits(1);
        assert!(
            thawed.stderr.contains("is not frozen"),
            "{}",
            thawed.describe()
        );
        volume.umount();
        volume.mount(&[]);
        for number in 0..WRITERS {
            let path = volume.path(&format!("new/{number}"));
            assert_eq!(fs::read_to_string(path).expect("read"), "written\n");
        }
        volume.umount();
        volume.fsck_clean();
        let mut copy = Volume::on(env, "copy", copies);
        copy.mount(&[]);
        assert!(fs::read(copy.path("before")).expect("read the copy") == text);
        copy.umount();
        copy.fsck_clean();
    }
    Ok(())
}

fn killed(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    fs::write(volume.path("file"), "old").expect("write to the volume");
    control(env, &volume, &["freeze"]).ok();
    let mut writer = writer(&volume.path("file"));
    std::thread::sleep(Duration::from_millis(500));
    assert!(writer.is_running());
    kill(Pid::from_raw(writer.pid()), Signal::SIGTERM).expect("signal a writer");
    let began = Instant::now();
    wait_until("the writer's end", || !writer.is_running());
    assert!(began.elapsed() < Duration::from_secs(5));
    control(env, &volume, &["thaw"]).ok();
    fs::write(volume.path("later"), "text").expect("write to the volume");
    volume.remount(&[]);
    let text = fs::read_to_string(volume.path("file")).expect("read");
    assert_eq!(text, "old", "what the dead one wanted was done");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn limit(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let log = env.path("log");
    volume.mount(&[&format!("logfile={}", log.display())]);
    control(env, &volume, &["freeze", "--timeout", "2"]).ok();
    let left = number(&get(env, &volume), "/thaws_in_seconds");
    assert!(left <= 2, "{left}");
    fs::write(volume.path("file"), "text").expect("it thaws");
    assert!(!is_frozen(env, &volume));
    let said = fs::read_to_string(&log).expect("the log");
    assert!(
        said.contains("warning: frozen for as long as was allowed"),
        "{said}"
    );
    volume.umount();
    Ok(())
}

fn umount(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let frozen = |volume: &mut Volume<'_>, mode: &str| {
        volume.mount(&[mode]);
        fs::write(volume.path("file"), mode).expect("write to the volume");
        control(env, volume, &["freeze", "--timeout", "3600"]).ok();
    };
    for mode in CACHE_MODES {
        frozen(&mut volume, mode);
        let output = volume.umount();
        assert!(output.elapsed < Duration::from_secs(10));
        assert!(
            output.stderr.contains("was frozen, and is thawed"),
            "{}",
            output.describe()
        );
        // As the kernel and a service manager do it.
        frozen(&mut volume, mode);
        let daemon = volume.daemon();
        Cmd::new("umount")
            .arg("-i")
            .arg(&volume.mountpoint)
            .limit_secs(20)
            .ok();
        assert!(
            daemon.wait_gone(Duration::from_secs(20)),
            "the daemon is still there"
        );
        frozen(&mut volume, mode);
        let daemon = volume.daemon();
        let mut waits = writer(&volume.path("late"));
        std::thread::sleep(Duration::from_millis(300));
        assert!(waits.is_running());
        kill(Pid::from_raw(daemon.pid), Signal::SIGTERM).expect("end the daemon");
        assert!(
            daemon.wait_gone(Duration::from_secs(20)),
            "the daemon is still there"
        );
        assert!(waits.wait().elapsed < Duration::from_secs(20));
        assert!(!volume.is_mount_point());
    }
    volume.fsck_clean();
    // By its helper's name, as mount(8)'s umount calls it.
    if Machine::set_up(env).is_ok() {
        frozen(&mut volume, "cache=auto");
        Cmd::new("umount")
            .arg(&volume.mountpoint)
            .limit_secs(20)
            .ok();
    }
    Ok(())
}

fn resize(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&["cache_size=256M", "cache=direct", "threads=4"]);
    let bytes = 200 << 20;
    let mut file = File::create(volume.path("file")).expect("a file on the volume");
    for piece in 0..bytes >> 20 {
        file.write_all(&vec![piece as u8; 1 << 20]).expect("write");
    }
    let daemon = volume.daemon();
    let full = daemon.rss_bytes();
    assert!(full > 200 * MIB, "{} MiB resident", full >> 20);
    control(env, &volume, &["set", "cache_size=32M"]).ok();
    let small = daemon.rss_bytes();
    println!("{} MiB resident before, {} after", full >> 20, small >> 20);
    assert!(small < 100 * MIB, "{} MiB resident", small >> 20);
    assert_eq!(number(&get(env, &volume), "/cache_size_bytes"), 32 * MIB);
    let check = || {
        let read = fs::read(volume.path("file")).expect("read");
        assert_eq!(read.len(), bytes);
        let right = |(at, byte): (usize, &u8)| *byte == (at >> 20) as u8;
        assert!(read.iter().enumerate().all(right), "wrong bytes");
    };
    check();
    assert!(daemon.rss_bytes() < 100 * MIB, "it grew again");
    control(env, &volume, &["set", "cache_size=256M"]).ok();
    check();
    assert!(daemon.rss_bytes() > 150 * MIB, "it is used again");
    let more = control(env, &volume, &["set", "cache_size=257M"]).exits(1);
    assert!(
        more.stderr
            .contains("more than the 256 MiB that it was mounted with")
    );
    let less = control(env, &volume, &["set", "cache_size=16M"]).exits(1);
    assert!(
        less.stderr.contains("less than the least, 20 MiB"),
        "{}",
        less.describe()
    );
    drop(file);
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn settings(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &["--label", "a b"]);
    let log = env.path("log");
    volume.mount(&[&format!("logfile={}", log.display()), "commit=300"]);
    let view = get(env, &volume);
    assert_eq!(
        (&view["label"], &view["log"]),
        (&"a b".into(), &"warn".into())
    );
    assert_eq!(number(&view, "/commit_seconds"), 300);
    assert_eq!(
        (&view["frozen"], &view["read_only"]),
        (&false.into(), &false.into())
    );
    let text = control(env, &volume, &["get"]).ok().stdout;
    assert!(text.contains("commit seconds    300"), "{text}");
    // Shorter from now on, not only after the old interval.
    fs::write(volume.path("file"), "text").expect("write to the volume");
    control(env, &volume, &["set", "commit=1", "log=debug"]).ok();
    let view = get(env, &volume);
    assert_eq!(
        (number(&view, "/commit_seconds"), &view["log"]),
        (1, &"debug".into())
    );
    fs::write(volume.path("file"), "new text").expect("write to the volume");
    let commits = || number(&volume.stats(), "/txg/commits");
    let before = commits();
    wait_until("a commit", || commits() > before);
    volume.umount();
    volume.mount(&["ro"]);
    assert_eq!(get(env, &volume)["read_only"], true);
    volume.umount();
    Ok(())
}

fn labels(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &[]);
    let device = name(&volume.devices[1]);
    let label = |place: &str, words: &[&str]| {
        env.braidfs()
            .arg("label")
            .arg(place)
            .args(words)
            .ok()
            .stdout
    };
    assert_eq!(label(&device, &[]), "\n");
    assert_eq!(label(&device, &["first"]), "");
    assert_eq!(label(&device, &[]), "first\n");
    assert_eq!(volume.info()["label"], "first");
    let folder = name(&env.dir);
    volume.mount(&[]);
    let place = name(&volume.mountpoint);
    assert_eq!(label(&place, &[]), "first\n");
    let text = "\"two\" \\ words";
    assert_eq!(label(&place, &[text]), "");
    assert_eq!(label(&place, &[]), format!("{text}\n"));
    let busy = env.braidfs().args(["label", &device, "x"]).exits(1);
    assert!(
        busy.stderr.contains("it is mounted on"),
        "{}",
        busy.describe()
    );
    control(env, &volume, &["freeze"]).ok();
    let frozen = env.braidfs().args(["label", &place, "x"]).exits(1);
    assert!(frozen.stderr.contains("is frozen"), "{}", frozen.describe());
    volume.umount();
    for device in &volume.devices {
        assert_eq!(label(&name(device), &[]), format!("{text}\n"));
    }
    label(&device, &["found"]);
    let search = format!("search={folder}");
    let by_label = env.braidfs().args(["mount", "-o", &search, "LABEL=found"]);
    by_label.arg(&volume.mountpoint).ok();
    volume.adopt();
    volume.umount();
    label(&device, &[""]);
    assert_eq!(label(&device, &[]), "\n");
    volume.mount(&["ro"]);
    let refused = env.braidfs().args(["label", &place, "x"]).exits(1);
    assert!(
        refused.stderr.contains("read-only"),
        "{}",
        refused.describe()
    );
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn sync(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&["writeback_cache", "commit=300"]);
    fs::write(volume.path("file"), vec![7; 20 << 20]).expect("write to the volume");
    control(env, &volume, &["sync"]).ok();
    volume.kill_daemon();
    volume.mount(&["cache=direct"]);
    let read = fs::read(volume.path("file")).expect("read");
    assert!(read.len() == 20 << 20 && read.iter().all(|&byte| byte == 7));
    let used = || {
        let stats = volume.stats();
        number(&stats, "/cache/size_bytes") - number(&stats, "/cache/free_bytes")
    };
    assert!(used() > 15 * MIB);
    control(env, &volume, &["drop-caches"]).ok();
    assert!(used() < 15 * MIB, "{} bytes are cached", used());
    volume.umount();
    Ok(())
}

fn summary(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let log = env.path("log");
    volume.mount(&[&format!("logfile={}", log.display())]);
    fs::write(volume.path("file"), vec![7; 1 << 20]).expect("write to the volume");
    let daemon = volume.daemon();
    kill(Pid::from_raw(daemon.pid), Signal::SIGUSR1).expect("signal the daemon");
    let said = || fs::read_to_string(&log).unwrap_or_default();
    wait_until("the summary", || said().contains("v1.img: read"));
    assert!(said().contains("summary: mounted for"), "{}", said());
    assert!(said().contains("1 MiB written"), "{}", said());
    assert!(volume.is_mount_point() && daemon.is_alive());
    volume.umount();
    Ok(())
}

fn intervals(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&["cache=direct"]);
    let stats = |words: &[&str]| {
        let command = env
            .braidfs()
            .args(["stats", "--interval", "0.5"])
            .args(words);
        command.arg(&volume.mountpoint)
    };
    let running = stats(&["--count", "4", "--json"]).spawn();
    std::thread::sleep(Duration::from_millis(200));
    let mut file = File::create(volume.path("file")).expect("a file on the volume");
    for _ in 0..30 {
        file.write_all(&vec![1; 1 << 20]).expect("write");
    }
    file.sync_all().expect("fsync");
    drop(file);
    let output = running.wait();
    assert!(output.status.success(), "{}", output.describe());
    let parse = |line: &str| serde_json::from_str::<Value>(line).expect("an object a line");
    let lines: Vec<Value> = output.stdout.lines().map(parse).collect();
    assert_eq!(lines.len(), 4);
    let real = |value: &Value, pointer: &str| {
        let found = value.pointer(pointer).and_then(Value::as_f64);
        found.unwrap_or_else(|| panic!("no number at {pointer} in {value}"))
    };
    let sum = |pointer: &str| {
        let each = lines
            .iter()
            .map(|line| real(line, pointer) * real(line, "/seconds"));
        each.sum::<f64>()
    };
    let mib = MIB as f64;
    let written = sum("/fuse/write_bytes_per_s") / mib;
    assert!((29.9..30.1).contains(&written), "{written} MiB");
    let on_devices = (0..2).map(|nth| sum(&format!("/devices/{nth}/write_bytes_per_s")));
    let on_devices = on_devices.sum::<f64>() / mib;
    assert!((30.0..40.0).contains(&on_devices), "{on_devices} MiB");
    let write = lines.iter().flat_map(|line| list(line, "/fuse/requests"));
    let write = write.filter(|op| op["op"] == "write");
    assert!(write.map(|op| number(op, "/p99_us")).max() > Some(0));
    let text = stats(&["-c", "2"]).ok().stdout;
    assert_eq!(text.matches("interval ").count(), 2, "{text}");
    for word in ["v1.img", "hits", "dirty", "readahead", "requests/s"] {
        assert!(text.contains(word), "{word}\n{text}");
    }
    assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    // Whoever does not listen any more ends it; so does the end of the mount.
    let script = "\"$1\" stats -i 0.2 \"$2\" | head -n 1";
    let head = Cmd::sh(script, [&env.bin, &volume.mountpoint])
        .limit_secs(20)
        .ok();
    assert!(head.stdout.starts_with("interval"), "{}", head.describe());
    let running = stats(&[]).spawn();
    std::thread::sleep(Duration::from_millis(700));
    volume.umount();
    let output = running.wait();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(
        output.stderr.contains("not mounted"),
        "{}",
        output.describe()
    );
    Ok(())
}
