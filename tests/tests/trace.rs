//! `braidfs trace`: what it tells of requests, that it ends as it should, and what it costs.

#[path = "trace/file.rs"]
mod file;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, Running, wait_until};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::report::{list, number};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::terminal::Terminal;
use braidfs_tests::volume::{MIB, Volume, name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const MEMBER_BYTES: u64 = 256 * MIB;
const MEMBERS: usize = 4;

fn main() -> ExitCode {
    runner::main(
        "trace",
        &[
            Test::new("a_file_shows_kiobufs_merges_and_splits", 120, file::whole),
            Test::new("only_what_was_asked_for", 120, filters),
            Test::new("a_request_as_text_on_a_terminal", 60, terminal),
            Test::new("reads_that_wait_for_devices", 60, reads),
            Test::new("one_at_a_time_and_none_when_it_is_dead", 60, one),
            Test::new("one_that_does_not_read_holds_nobody_up", 120, stopped),
            Test::new("the_end_of_the_mount_or_its_daemon_ends_it", 60, ends),
            Test::new("costs_little", 300, costs),
        ],
    )
}

fn mounted<'e>(env: &'e Env, options: &[&str]) -> Volume<'e> {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; MEMBERS], &[]);
    // No commit but those that are asked for.
    volume.mount(&[&["commit=300"], options].concat());
    volume
}

fn trace(env: &Env, volume: &Volume<'_>, words: &[&str]) -> Cmd {
    let command = env.braidfs().arg("trace").args(words);
    command.arg(&volume.mountpoint)
}

fn is_traced(volume: &Volume<'_>) -> bool {
    volume.stats()["fuse"]["traced"] == true
}

/// Starts it, and waits until it records.
fn start(env: &Env, volume: &Volume<'_>, words: &[&str]) -> Running {
    let running = trace(env, volume, words).spawn();
    wait_until("tracing", || is_traced(volume));
    running
}

fn signal(running: &Running, signal: Signal) {
    kill(Pid::from_raw(running.pid()), signal).expect("signal a tracer");
}

/// Writes 4 MiB in one call, past the cache.
fn write_direct(path: &Path) {
    let to = format!("of={}", path.display());
    let words = ["if=/dev/zero", "bs=4M", "count=1", "oflag=direct", &to];
    Cmd::new("dd").args(words).quiet().ok();
}

fn lines(text: &str) -> Vec<Value> {
    let parse = |line: &str| serde_json::from_str(line).expect("an object a line");
    text.lines().map(parse).collect()
}

/// The steps of that kind.
fn steps<'v>(chain: &'v Value, kind: &str) -> Vec<&'v Value> {
    let all = list(chain, "/steps").iter();
    all.filter(|step| step["step"] == kind).collect()
}

fn filters(env: &Env) -> Outcome {
    let mut volume = mounted(env, &["cache=direct"]);
    let (one, other) = (volume.path("one"), volume.path("other"));
    for path in [&one, &other] {
        fs::write(path, [0; 100]).expect("write to the volume");
    }
    let open = |path: &Path| File::options().read(true).write(true).open(path);
    let (a, b) = (open(&one).expect("open"), open(&other).expect("open"));
    let work = || {
        for at in 0..5 {
            for file in [&a, &b] {
                file.write_all_at(&[1; 5000], at * 5000).expect("write");
                file.read_exact_at(&mut [0; 10], 0).expect("read");
            }
        }
    };
    // So many of a kind, and it ends by itself.
    let running = start(env, &volume, &["--json", "--op", "write", "--count", "3"]);
    work();
    let output = running.wait();
    assert_eq!(output.status.code(), Some(0), "{}", output.describe());
    let writes = lines(&output.stdout);
    assert_eq!(writes.len(), 3, "{}", output.describe());
    // Their answers may overtake each other on the way out.
    for write in &writes {
        assert_eq!(
            (&write["op"], &write["errno"]),
            (&"write".into(), &0.into())
        );
        assert_eq!(number(write, "/bytes"), 5000);
        assert!([0, 5000, 10_000, 15_000, 20_000].contains(&number(write, "/offset")));
        assert_eq!(number(write, "/pid"), u64::from(std::process::id()));
        assert_eq!(steps(write, "dirtied").len(), 1, "{write}");
        assert_eq!(steps(write, "reply").len(), 1, "{write}");
    }
    assert!(!is_traced(&volume));
    // Of one file; several kinds; until interrupted.
    let path = name(&other);
    let words = ["--json", "--op", "write", "--op", "read", "--file", &path];
    let running = start(env, &volume, &words);
    work();
    std::thread::sleep(Duration::from_millis(200));
    signal(&running, Signal::SIGINT);
    let output = running.wait();
    assert_eq!(output.status.code(), Some(0), "{}", output.describe());
    let found = lines(&output.stdout);
    let inode = fs::metadata(&other).expect("stat").ino();
    assert!(found.iter().all(|line| line["inode"] == inode));
    let count = |op: &str| found.iter().filter(|line| line["op"] == op).count();
    assert_eq!((count("write"), count("read"), found.len()), (5, 5, 10));
    let hits = found.iter().filter(|line| !steps(line, "hit").is_empty());
    assert_eq!(hits.count(), 5);
    // An fsync, and the writeback that it waited for.
    let words = [
        "--json",
        "--op",
        "fsync",
        "--op",
        "writeback",
        "--file",
        &path,
    ];
    let running = start(env, &volume, &[&words[..], &["--count", "1"]].concat());
    b.sync_all().expect("fsync");
    let found = lines(&running.wait().stdout);
    let op = |op: &str| found.iter().find(|line| line["op"] == op);
    let (fsync, writeback) = (op("fsync").expect("fsync"), op("writeback").expect("it"));
    assert_eq!(found.len(), 2);
    let waited = steps(fsync, "writeback");
    assert_eq!(waited.len(), 1, "{fsync}");
    assert_eq!(waited[0]["writeback"], writeback["number"]);
    assert_eq!(steps(fsync, "durable").len(), 1, "{fsync}");
    assert_eq!(writeback["inode"], inode);
    assert_eq!(number(writeback, "/bytes"), 7 * 4096);
    assert!(!steps(writeback, "request_end").is_empty(), "{writeback}");
    // For so long.
    let began = Instant::now();
    trace(env, &volume, &["--for", "0.5"]).ok();
    assert!(began.elapsed() < Duration::from_secs(10));
    drop((a, b));
    volume.umount();
    Ok(())
}

fn terminal(env: &Env) -> Outcome {
    let terminal = Terminal::open(env)?;
    let mut volume = mounted(env, &["cache=direct"]);
    let (bin, place) = (env.bin.display(), volume.mountpoint.display());
    terminal.type_line("clear");
    terminal.type_line(&format!(
        "{bin} trace --op write --op writeback {place}; echo code=$?"
    ));
    wait_until("tracing", || is_traced(&volume));
    write_direct(&volume.path("file"));
    // What each of the four did, and what came of it; the last lines are on the screen.
    let done = |screen: &str| screen.contains("answered, sending took");
    let screen = terminal.wait_for("a request", done);
    println!("{screen}");
    for part in ["kiobuf", "256 KiB", "v0.img", "v3.img", "ended", " us"] {
        assert!(screen.contains(part), "{part} is missing:\n{screen}");
    }
    terminal.keys(&["C-c"]);
    terminal.wait_for("end", |screen| screen.contains("code=0"));
    assert!(!is_traced(&volume));
    volume.umount();
    Ok(())
}

/// A read that misses waits for kiobufs, and is told when they arrive; so is a direct one.
fn reads(env: &Env) -> Outcome {
    let mut volume = mounted(env, &["cache=direct"]);
    let path = volume.path("file");
    fs::write(&path, vec![7; 32 << 20]).expect("write to the volume");
    volume.remount(&["cache=direct", "commit=300"]);
    let running = start(env, &volume, &["--json", "--op", "read"]);
    let file = File::open(&path).expect("open");
    let mut block = vec![0; 1 << 20];
    file.read_exact_at(&mut block, 0).expect("read");
    let from = format!("if={}", path.display());
    let words = [&from, "of=/dev/null", "bs=1M", "skip=31", "iflag=direct"];
    Cmd::new("dd").args(words).ok();
    std::thread::sleep(Duration::from_millis(200));
    signal(&running, Signal::SIGINT);
    let found = lines(&running.wait().stdout);
    let at = |offset: u64| {
        let read = found.iter().find(|read| read["offset"] == offset);
        read.unwrap_or_else(|| panic!("no read at {offset} in {found:?}"))
    };
    let buffered = at(0);
    let own = |kind: &str| -> Vec<&Value> {
        let all = steps(buffered, kind).into_iter();
        all.filter(|step| step["inode"] == buffered["inode"])
            .collect()
    };
    assert_eq!(own("miss").len(), 1, "{buffered}");
    let arrived = own("arrived");
    assert_eq!(arrived.len(), 1, "{buffered}");
    assert!(number(arrived[0], "/waited_ns") > 0);
    let direct = at(31 << 20);
    assert!(steps(direct, "miss").iter().all(|miss| miss["inode"] == 0));
    for read in [buffered, direct] {
        let length = |kind: &str, field: &str| -> u64 {
            let own = steps(read, kind).into_iter();
            let own = own.filter(|step| step["inode"] == read["inode"]);
            own.map(|step| number(step, field)).sum()
        };
        assert!(
            length("kiobuf", "/length") >= number(read, "/bytes"),
            "{read}"
        );
        let (begun, ended) = (steps(read, "kiobuf"), steps(read, "kiobuf_end"));
        assert_eq!(begun.len(), ended.len(), "{read}");
        let last = ended.iter().map(|end| number(end, "/at_ns")).max();
        assert!(last <= Some(number(read, "/took_ns")), "{read}");
    }
    drop(file);
    volume.umount();
    Ok(())
}

fn one(env: &Env) -> Outcome {
    let mut volume = mounted(env, &[]);
    assert!(!is_traced(&volume));
    let running = start(env, &volume, &["--op", "mkdir"]);
    let second = trace(env, &volume, &[]).exits(1);
    let refused = format!("{}: is traced already", volume.mountpoint.display());
    assert!(second.stderr.contains(&refused), "{}", second.describe());
    signal(&running, Signal::SIGKILL);
    running.wait();
    wait_until("the end of tracing", || !is_traced(&volume));
    let running = start(env, &volume, &["--count", "1", "--op", "mkdir"]);
    fs::create_dir(volume.path("folder")).expect("a folder on the volume");
    let output = running.wait();
    assert!(output.stdout.starts_with("mkdir "), "{}", output.describe());
    // As a service manager ends it.
    let running = start(env, &volume, &[]);
    signal(&running, Signal::SIGTERM);
    assert_eq!(running.wait().status.code(), Some(143));
    // A reader that goes away ends it too.
    let script = "\"$1\" trace \"$2\" | head -n 1";
    let head = Cmd::sh(script, [&env.bin, &volume.mountpoint]).spawn();
    wait_until("tracing", || is_traced(&volume));
    wait_until("the end of tracing", || {
        let _seen = fs::metadata(volume.path("nothing"));
        fs::write(volume.path("file"), "text").expect("write to the volume");
        !is_traced(&volume)
    });
    assert!(head.wait().status.success());
    volume.umount();
    Ok(())
}

/// The rings overflow, which is told; reading and writing go on as if there were nobody.
fn stopped(env: &Env) -> Outcome {
    const READS: u64 = 60_000;
    let mut volume = mounted(env, &["cache=direct"]);
    let path = volume.path("file");
    fs::write(&path, vec![7; 1 << 20]).expect("write to the volume");
    let running = start(env, &volume, &["--json"]);
    signal(&running, Signal::SIGSTOP);
    let file = File::open(&path).expect("open");
    let began = Instant::now();
    for nth in 0..READS {
        let at = nth % 256 * 4096;
        file.read_exact_at(&mut [0; 4096], at).expect("read");
    }
    println!("{READS} reads in {:?}", began.elapsed());
    fs::write(volume.path("new"), "text").expect("write to the volume");
    assert!(is_traced(&volume), "a while is allowed");
    signal(&running, Signal::SIGCONT);
    signal(&running, Signal::SIGINT);
    let output = running.wait();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        output
            .stderr
            .contains("events came faster than they could be taken"),
        "{}",
        output.stderr
    );
    lines(&output.stdout);
    drop(file);
    volume.umount();
    Ok(())
}

fn ends(env: &Env) -> Outcome {
    let mut volume = mounted(env, &[]);
    let path = env.path("trace.json");
    let running = start(env, &volume, &["--perfetto", &name(&path)]);
    fs::write(volume.path("file"), "text").expect("write to the volume");
    volume.umount();
    let output = running.wait();
    assert_eq!(output.status.code(), Some(0), "{}", output.describe());
    let told = output.stderr.contains("is being unmounted");
    assert!(told, "{}", output.describe());
    assert!(
        file::slices(&path)
            .iter()
            .any(|slice| slice.name == "write")
    );
    volume.mount(&[]);
    let running = start(env, &volume, &["--perfetto", &name(&path)]);
    fs::write(volume.path("file"), "text").expect("write to the volume");
    std::thread::sleep(Duration::from_millis(200));
    volume.kill_daemon();
    let output = running.wait();
    assert_eq!(output.status.code(), Some(2), "{}", output.describe());
    let told = output.stderr.contains("its daemon has gone");
    assert!(told, "{}", output.describe());
    assert!(
        file::slices(&path)
            .iter()
            .any(|slice| slice.name == "write")
    );
    Ok(())
}

/// Seconds for 128 MiB written past the cache in requests of 1 MiB.
fn time_writes(volume: &Volume<'_>) -> f64 {
    let to = format!("of={}", volume.path("large").display());
    let words = [
        "if=/dev/zero",
        "bs=1M",
        "count=128",
        "oflag=direct",
        "conv=notrunc",
        &to,
    ];
    let began = Instant::now();
    Cmd::new("dd").args(words).quiet().ok();
    began.elapsed().as_secs_f64()
}

/// Seconds for reads of 4 KiB that hit.
fn time_reads(volume: &Volume<'_>) -> f64 {
    let file = File::open(volume.path("small")).expect("open");
    let began = Instant::now();
    for nth in 0..10_000 {
        let at = nth * 7919 % 256 * 4096;
        file.read_exact_at(&mut [0; 4096], at).expect("read");
    }
    began.elapsed().as_secs_f64()
}

/// What is done, and how long it takes.
type Thing = (&'static str, fn(&Volume<'_>) -> f64);

/// With a tracer and without in turns; the best ratio counts, and the bound is generous, since the
/// tracer needs a processor too.
fn costs(env: &Env) -> Outcome {
    const ROUNDS: usize = 5;
    const SHARE_MIN: f64 = 0.6;
    let mut volume = mounted(env, &["cache=direct"]);
    fs::write(volume.path("small"), vec![7; 1 << 20]).expect("write to the volume");
    let path = name(&env.path("trace.json"));
    let things: [Thing; 2] = [
        ("1 MiB direct writes", time_writes),
        ("4 KiB reads", time_reads),
    ];
    for (what, time) in things {
        time(&volume);
        let mut best = 0.0_f64;
        for round in 1..=ROUNDS {
            let off = time(&volume);
            let running = start(env, &volume, &["--perfetto", &path]);
            let on = time(&volume);
            signal(&running, Signal::SIGINT);
            let output = running.wait();
            assert_eq!(output.stderr, "", "nothing was lost");
            println!("round {round}: {what}: {:.3} of the pace without", off / on);
            best = best.max(off / on);
        }
        assert!(best > SHARE_MIN, "{what}: {best:.3} of the pace without");
    }
    volume.umount();
    Ok(())
}
