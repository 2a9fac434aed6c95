//! `braidfs fsck` on image files: exit codes, questions, progress, JSON, the front end fsck(8),
//! being stopped, lost+found, and how much memory it takes.
//!
//! `INODES=n` sets how many inodes the memory is measured with.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use braidfs::fsck::raw::{self, Record};
use braidfs_blockdev::{OpenMode, open_device};
use braidfs_tests::command::{Cmd, Output};
use braidfs_tests::env::{Env, Outcome, number_from_environment};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, json};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MEMBER_BYTES: u64 = 128 * MIB;
/// Where a label's second copy lies.
const LABEL_COPY: u64 = 512 << 10;

fn main() -> ExitCode {
    runner::main(
        "fsck",
        &[
            Test::new("exit_codes_are_those_of_fsck", 120, exit_codes),
            Test::new("at_boot_only_what_is_safe_is_done", 120, preen),
            Test::new(
                "what_was_lost_is_found_in_lost_and_found",
                120,
                lost_and_found,
            ),
            Test::new("a_mounted_volume_is_not_touched", 120, mounted),
            Test::new("progress_is_told_in_lines", 120, progress),
            Test::new("json_tells_what_was_found_and_what_is_left", 120, as_json),
            Test::new("on_a_terminal_it_asks", 120, questions),
            Test::new("a_signal_stops_it_and_nothing_has_changed", 120, stopped),
            Test::new("fsck_finds_it_by_its_name", 120, front_end),
            Test::new("memory_is_bounded", 600, memory),
        ],
    )
}

/// A volume with some files, cleanly unmounted.
fn settled<'e>(env: &'e Env, name: &str) -> Volume<'e> {
    let mut volume = Volume::format(env, name, &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    fs::create_dir_all(volume.path("a/b")).expect("make folders");
    fs::write(volume.path("a/b/file"), vec![7; 300_000]).expect("write a file");
    fs::write(volume.path("other"), "other").expect("write a file");
    volume.umount();
    volume
}

fn fsck(env: &Env, volume: &Volume, args: &[&str]) -> Cmd {
    env.braidfs().arg("fsck").args(args).args(&volume.devices)
}

/// Runs it; the exit code must be this one.
fn expect(command: Cmd, code: i32) -> Output {
    let output = command.run();
    assert_eq!(output.status.code(), Some(code), "{}", output.describe());
    let panicked = output.stderr.contains("panicked");
    assert!(!panicked, "{}", output.describe());
    output
}

/// Turns a bit over in the second copy of the first member's label.
fn damage_label(volume: &Volume) {
    let image = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&volume.devices[0])
        .expect("open an image");
    let mut byte = [0];
    image
        .read_exact_at(&mut byte, LABEL_COPY + 70)
        .expect("read a label");
    byte[0] ^= 4;
    image
        .write_all_at(&byte, LABEL_COPY + 70)
        .expect("damage a label");
}

fn assembled(volume: &Volume, read_only: bool) -> Arc<braidfs_blockdev::Volume> {
    let mode = OpenMode {
        read_only,
        ..OpenMode::default()
    };
    let devices = volume
        .devices
        .iter()
        .map(|path| open_device(path, mode).expect("open a member"));
    braidfs_blockdev::Volume::assemble(devices.collect(), read_only).expect("assemble")
}

/// Gives the records of a volume to `change`, and writes what it makes of them.
fn damage_records(volume: &Volume, change: impl FnOnce(&[Record]) -> Vec<Record>) {
    let records = raw::read(assembled(volume, true)).expect("read the records");
    raw::write(assembled(volume, false), &change(&records)).expect("write the records");
}

/// Takes every entry of that name away.
fn lose_name(volume: &Volume, name: &str) {
    damage_records(volume, |records| {
        let named = |record: &&Record| match record.0 {
            "dentries" => record.1[8..] == *name.as_bytes(),
            "cookies" => record
                .2
                .as_ref()
                .is_some_and(|v| v[9..] == *name.as_bytes()),
            _ => false,
        };
        let lost = records.iter().filter(named);
        lost.map(|(table, key, _)| (*table, key.clone(), None))
            .collect()
    });
}

/// Makes the link count of every file wrong.
fn damage_counts(volume: &Volume) {
    damage_records(volume, |records| {
        let inodes = records.iter().filter(|record| record.0 == "inodes");
        inodes
            .map(|(table, key, value)| {
                let mut value = value.clone().expect("records have values");
                value[4] += 3;
                (*table, key.clone(), Some(value))
            })
            .collect()
    });
}

fn images(volume: &Volume) -> Vec<Vec<u8>> {
    let read = |path| fs::read(path).expect("read an image");
    volume.devices.iter().map(read).collect()
}

fn exit_codes(env: &Env) -> Outcome {
    let volume = settled(env, "v");
    for args in [
        &["-n"][..],
        &["-y"],
        &[],
        &["-f", "-y"],
        &["-r"],
        &["-T", "-n", "-v"],
    ] {
        let before = images(&volume);
        expect(fsck(env, &volume, args), 0);
        assert!(before == images(&volume), "a clean volume is not written");
    }
    damage_label(&volume);
    let before = images(&volume);
    let output = expect(fsck(env, &volume, &["-n"]), 4);
    assert!(
        output.stdout.contains("label is damaged"),
        "{}",
        output.describe()
    );
    // Nobody to ask.
    let output = expect(fsck(env, &volume, &[]), 4);
    assert!(
        output.stdout.contains("nothing was changed"),
        "{}",
        output.describe()
    );
    assert!(before == images(&volume), "a check changes nothing");
    expect(fsck(env, &volume, &["-y"]), 1);
    expect(fsck(env, &volume, &["-n"]), 0);
    // Any one member is enough to name it.
    let one = env.braidfs().args(["fsck", "-n"]).arg(&volume.devices[1]);
    expect(one, 0);
    for args in [
        &["-n", "-y"][..],
        &["-p", "-y"],
        &["-r", "-n"],
        &["--none"],
        &["-Cx"],
    ] {
        expect(fsck(env, &volume, args), 16);
    }
    expect(fsck(env, &volume, &["-C", "99"]), 16);
    expect(env.braidfs().arg("fsck"), 16);
    expect(env.braidfs().args(["fsck", "-V"]), 0);
    expect(env.braidfs().args(["fsck", "-y"]).arg(env.path("none")), 8);
    // What cannot be written cannot be repaired.
    damage_counts(&volume);
    let before = images(&volume);
    let frozen = env.mkdir("frozen");
    Cmd::new("mount")
        .arg("--bind")
        .arg(&env.dir)
        .arg(&frozen)
        .ok();
    let remount = ["-o", "remount,bind,ro"];
    Cmd::new("mount").args(remount).arg(&frozen).ok();
    let member = frozen.join(volume.devices[0].file_name().expect("a name"));
    let command = env.braidfs().args(["fsck", "-y"]).arg(&member);
    let output = expect(command.arg(&volume.devices[1]), 8);
    let told = output.stderr.contains(&member.display().to_string());
    assert!(told, "{}", output.describe());
    assert!(before == images(&volume), "refused, yet changed");
    Cmd::new("umount").arg(&frozen).ok();
    expect(fsck(env, &volume, &["-y"]), 1);
    expect(fsck(env, &volume, &["-n"]), 0);
    Ok(())
}

fn preen(env: &Env) -> Outcome {
    let volume = settled(env, "v");
    for args in [&["-p"][..], &["-a"], &["-a", "-T"]] {
        let output = expect(fsck(env, &volume, args), 0);
        assert!(output.stdout.contains("clean"), "{}", output.describe());
    }
    damage_counts(&volume);
    let output = expect(fsck(env, &volume, &["-p", "-f"]), 1);
    assert!(output.stdout.contains("repaired"), "{}", output.describe());
    expect(fsck(env, &volume, &["-n"]), 0);
    // What moves files is for somebody to decide.
    lose_name(&volume, "file");
    let output = expect(fsck(env, &volume, &["-a", "-f"]), 5);
    assert!(
        output.stdout.contains("lost: inode"),
        "{}",
        output.describe()
    );
    expect(fsck(env, &volume, &["-y"]), 1);
    expect(fsck(env, &volume, &["-p", "-f"]), 0);
    Ok(())
}

fn lost_and_found(env: &Env) -> Outcome {
    let mut volume = settled(env, "v");
    for lost in ["file", "a"] {
        lose_name(&volume, lost);
        expect(fsck(env, &volume, &["-n"]), 4);
        expect(fsck(env, &volume, &["-y"]), 1);
        expect(fsck(env, &volume, &["-n"]), 0);
    }
    volume.mount(&[]);
    let place = volume.path("lost+found");
    let stat = fs::metadata(&place).expect("lost+found");
    assert_eq!((stat.mode() & 0o7777, stat.uid()), (0o700, 0));
    let entries = fs::read_dir(&place).expect("list lost+found");
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    found.sort_by_key(|path| path.is_dir());
    for path in &found {
        let ino = fs::metadata(path).expect("stat").ino();
        assert_eq!(path, &place.join(format!("#{ino}")));
    }
    let [file, folder] = &found[..] else {
        panic!("{found:?} are not what was lost");
    };
    let data = fs::read(file).expect("read what was found");
    assert!(data == vec![7; 300_000], "what was found has other data");
    assert!(folder.join("b").is_dir());
    // It goes on as any file system.
    fs::rename(file, volume.path("file")).expect("take it out");
    fs::remove_dir_all(&place).expect("remove lost+found");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn mounted(env: &Env) -> Outcome {
    let mut volume = settled(env, "v");
    damage_label(&volume);
    for options in [&[][..], &["ro"]] {
        volume.mount(options);
        let output = expect(fsck(env, &volume, &["-y"]), 8);
        let told = output.stderr.contains("mounted") || output.stderr.contains("in use");
        assert!(told, "{}", output.describe());
        let file = fs::read(volume.path("a/b/file")).expect("read a file");
        assert!(file == vec![7; 300_000]);
        volume.umount();
        if options.is_empty() {
            // The mount for writing has mended it.
            damage_label(&volume);
        }
    }
    expect(fsck(env, &volume, &["-y"]), 1);
    Ok(())
}

fn progress(env: &Env) -> Outcome {
    let volume = settled(env, "v");
    let lines = env.path("lines");
    for option in ["-C5", "-C 5"] {
        let script = format!("\"$1\" fsck -n {option} \"$2\" 5>\"$3\"");
        let args = [
            env.bin.as_os_str(),
            volume.devices[0].as_os_str(),
            lines.as_os_str(),
        ];
        expect(Cmd::sh(&script, args), 0);
        let text = fs::read_to_string(&lines).expect("read the lines");
        let mut last = BTreeMap::new();
        let mut former = (0, 0);
        for line in text.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let [pass, done, total, device] = words[..] else {
                panic!("'{line}' is no line of progress");
            };
            let number = |word: &str| word.parse::<u64>().expect("a number");
            let (pass, done, total) = (number(pass), number(done), number(total));
            assert!(done <= total && (pass, done) >= former, "{line}");
            assert_eq!(Path::new(device), volume.devices[0]);
            former = (pass, done);
            last.insert(pass, (done, total));
        }
        assert!(last.keys().copied().eq(1..=6), "{text}");
        assert!(last.values().all(|(done, total)| done == total), "{text}");
    }
    // With nobody to look at a bar there is none.
    let output = expect(fsck(env, &volume, &["-n", "-C"]), 0);
    assert!(!output.stdout.contains("ETA"), "{}", output.describe());
    let output = expect(fsck(env, &volume, &["-n", "-v"]), 0);
    assert_eq!(
        output.stderr.matches("pass ").count(),
        6,
        "{}",
        output.describe()
    );
    if env.need_tools(&["script"]).is_ok() {
        let output = on_terminal(env, &volume, "-n -C", "");
        assert!(
            output.stdout.contains("pass 6/6 counts"),
            "{}",
            output.describe()
        );
        assert!(output.stdout.contains("ETA"), "{}", output.describe());
    }
    Ok(())
}

/// Runs it on a terminal, with these lines typed.
fn on_terminal(env: &Env, volume: &Volume, args: &str, typed: &str) -> Output {
    let command = format!(
        "{} fsck {args} {}",
        env.bin.display(),
        volume.devices[0].display()
    );
    let input = env.path("typed");
    fs::write(&input, typed).expect("write what is typed");
    let input = fs::File::open(&input).expect("open what is typed");
    let script = Cmd::new("script").args(["-q", "-e", "-c"]).arg(command);
    script.arg("/dev/null").stdin(input).run()
}

fn questions(env: &Env) -> Outcome {
    env.need_tools(&["script"])?;
    let volume = settled(env, "v");
    damage_counts(&volume);
    lose_name(&volume, "file");
    let output = on_terminal(env, &volume, "", "n\nn\n");
    assert_eq!(output.status.code(), Some(4), "{}", output.describe());
    assert!(output.stdout.contains("[y/n]"), "{}", output.describe());
    // The first question is about lost+found, the second about counts.
    let output = on_terminal(env, &volume, "", "y\nwhat\nn\n");
    assert_eq!(output.status.code(), Some(5), "{}", output.describe());
    let output = on_terminal(env, &volume, "-r", "y\n");
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    let output = on_terminal(env, &volume, "-r", "");
    assert_eq!(output.status.code(), Some(0), "{}", output.describe());
    Ok(())
}

fn as_json(env: &Env) -> Outcome {
    let volume = settled(env, "v");
    let clean = json(&expect(fsck(env, &volume, &["-n", "--json"]), 0));
    assert_eq!(clean["clean"], true);
    assert_eq!(clean["problem_count"], 0);
    assert!(
        clean["inodes"].as_u64().is_some_and(|count| count == 5),
        "{clean}"
    );
    damage_counts(&volume);
    let found = json(&expect(fsck(env, &volume, &["-n", "--json"]), 4));
    assert_eq!(
        (&found["clean"], &found["repaired"]),
        (&false.into(), &false.into())
    );
    assert_eq!(found["problems"][0]["kind"], "count");
    assert_eq!(found["problems"][0]["object"], "inode 1");
    let repaired = json(&expect(fsck(env, &volume, &["-y", "--json"]), 1));
    assert_eq!(
        (&repaired["clean"], &repaired["repaired"]),
        (&true.into(), &true.into())
    );
    assert_eq!(repaired["problem_count"], 5);
    assert_eq!(repaired["left"]["problem_count"], 0);
    Ok(())
}

fn stopped(env: &Env) -> Outcome {
    let volume = settled(env, "v");
    damage_counts(&volume);
    let before = images(&volume);
    let lines = env.path("lines");
    Cmd::new("mkfifo").arg(&lines).ok();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // So full that it waits where it tells of the first pass.
        let mut pipe = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&lines)
            .expect("open the pipe");
        while pipe.write(&[b'\n'; 4096]).is_ok() {}
        while pipe.write(b"\n").is_ok() {}
        let script = "exec \"$1\" fsck -y -C5 \"$2\" 5>\"$3\"";
        let args = [
            env.bin.as_os_str(),
            volume.devices[0].as_os_str(),
            lines.as_os_str(),
        ];
        let mut running = Cmd::sh(script, args).spawn();
        wait_for_write(running.pid());
        kill(Pid::from_raw(running.pid()), signal).expect("send a signal");
        thread::sleep(Duration::from_millis(200));
        assert!(running.is_running(), "it ended before it could tell");
        let mut rest = [0; 4096];
        while running.is_running() {
            while pipe.read(&mut rest).is_ok_and(|len| len > 0) {}
            thread::sleep(Duration::from_millis(10));
        }
        let output = running.wait();
        assert_eq!(output.status.code(), Some(32), "{}", output.describe());
        assert!(
            output.stderr.contains("nothing was changed"),
            "{}",
            output.describe()
        );
        assert!(before == images(&volume), "stopped, yet changed");
    }
    expect(fsck(env, &volume, &["-y"]), 1);
    Ok(())
}

/// Waits until the process waits to write to the pipe.
fn wait_for_write(pid: i32) {
    for _ in 0..1000 {
        let place = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "braidfs" && place.contains("pipe_w") {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("process {pid} does not get to its first line");
}

fn front_end(env: &Env) -> Outcome {
    env.need_tools(&["fsck"])?;
    let volume = settled(env, "v");
    let bin = env.mkdir("sbin");
    symlink(&env.bin, bin.join("fsck.braidfs")).expect("a helper's name");
    let path = format!(
        "{}:{}",
        bin.display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let front = |args: &[&str]| {
        let command = Cmd::new("fsck").args(["-T", "-t", "braidfs"]);
        let command = command.arg(&volume.devices[0]).args(args);
        command.env("PATH", &path)
    };
    expect(front(&["-a"]), 0);
    expect(front(&["-n"]), 0);
    damage_counts(&volume);
    let output = expect(front(&["-n"]), 4);
    assert!(
        output.stdout.contains("link count"),
        "{}",
        output.describe()
    );
    expect(front(&["-a", "-f"]), 1);
    damage_counts(&volume);
    expect(front(&["-y"]), 1);
    expect(front(&["-n", "-f"]), 0);
    Ok(())
}

/// Makes so many files, by their records, with an extent each.
fn make_files(volume: &Volume, count: u64) {
    const BATCH: u64 = 50_000;
    let records = raw::read(assembled(volume, true)).expect("read the records");
    let of_other = records
        .iter()
        .find(|r| r.0 == "dentries" && r.1.ends_with(b"other"));
    let other = of_other.and_then(|r| r.2.as_ref()).expect("the file")[..8].to_vec();
    let other: Vec<u8> = other.into_iter().rev().collect();
    let model = records.iter().find(|r| r.0 == "inodes" && r.1 == other);
    let mut model = model.and_then(|r| r.2.clone()).expect("its record");
    // Empty, and without blocks.
    model[16..32].fill(0);
    let first = 1000;
    for from in (first..first + count).step_by(usize::try_from(BATCH).expect("small")) {
        let mut batch = Vec::new();
        for ino in from..(from + BATCH).min(first + count) {
            let (name, root) = (format!("made{ino}"), 1u64.to_be_bytes());
            batch.push(("inodes", ino.to_be_bytes().to_vec(), Some(model.clone())));
            let entry = [&ino.to_le_bytes()[..], &ino.to_le_bytes(), &[8]].concat();
            let key = [&root[..], name.as_bytes()].concat();
            batch.push(("dentries", key, Some(entry)));
            let row = [&ino.to_le_bytes()[..], &[8], name.as_bytes()].concat();
            let key = [root, ino.to_be_bytes()].concat();
            batch.push(("cookies", key, Some(row)));
        }
        raw::write(assembled(volume, false), &batch).expect("write the records");
    }
}

/// The most memory that any child has had, in bytes.
fn peak_of_children() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage");
    u64::try_from(usage.max_rss()).expect("no less than nothing") * 1024
}

fn memory(env: &Env) -> Outcome {
    /// Bytes for an inode, all told.
    const INODE_BYTES_MAX: u64 = 150;
    /// What a check of nothing varies by.
    const SLACK_BYTES: u64 = 16 * MIB;
    let count = number_from_environment("INODES", 100_000);
    let volume = Volume::format(env, "v", &[(count / 100).max(256) * MIB; 2], &[]);
    let mut volume = volume;
    volume.mount(&[]);
    fs::write(volume.path("other"), "other").expect("write a file");
    volume.umount();
    expect(fsck(env, &volume, &["-n"]), 0);
    make_files(&volume, count);
    // The cache of pages has its full size in both.
    let small = peak_of_children() + 64 * MIB + 32 * MIB;
    // The root's size and counts, and the volume's counters, are not right yet.
    expect(fsck(env, &volume, &["-y"]).limit_secs(300), 1);
    let output = expect(fsck(env, &volume, &["-n"]).limit_secs(300), 0);
    let peak = peak_of_children();
    let bound = small + SLACK_BYTES + count * INODE_BYTES_MAX;
    println!(
        "{count} inodes: {} MiB of at most {} MiB, {:?}",
        peak / MIB,
        bound / MIB,
        output.elapsed
    );
    assert!(
        peak <= bound,
        "fsck had {peak} bytes resident, the bound is {bound}"
    );
    Ok(())
}
