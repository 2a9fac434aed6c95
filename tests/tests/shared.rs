//! What several processes do to one file, or directory, at once: mappings, locks, appends.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::pattern::{Random, seed};
use braidfs_tests::peer::{self, Peer};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, in_both_modes};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::{ReadWriteFlags, pwritev2};

/// The file of the mapping test.
const MAPPED_BYTES: u64 = MIB;
/// Rounds of it, each at a place and of a length of its own.
const MAPPED_ROUNDS: u64 = 150;
/// Appending processes, the records of each, and the bytes of a record.
const APPENDERS: u64 = 4;
const APPENDED_RECORDS: u64 = 2000;
const RECORD_BYTES: usize = 37;

fn main() -> ExitCode {
    if let Some(code) = peer::run(&[("locker", locker), ("appender", appender)]) {
        return code;
    }
    runner::main(
        "shared",
        &[
            Test::new("mappings_and_calls_of_other_processes_agree", 120, mappings),
            Test::new("locks_exclude_other_processes", 60, locks),
            Test::new("appends_of_four_processes_lose_nothing", 120, appends),
            Test::new(
                "what_o_sync_wrote_survives_a_killed_daemon",
                60,
                synchronous,
            ),
        ],
    )
}

fn mappings(env: &Env) -> Outcome {
    env.need_tools(&["xfs_io", "stdbuf"])?;
    in_both_modes(env, mappings_in)
}

/// Two processes store through mappings of their own; a third one uses pread and pwrite, a fourth
/// O_DIRECT, and this one looks too. Whoever changes something, all see it at once.
fn mappings_in(volume: &mut Volume, mode: &str) {
    let path = volume.path("file");
    File::create(&path)
        .expect("create")
        .set_len(MAPPED_BYTES)
        .expect("size");
    let mut mapped = [(); 2].map(|()| Peer::xfs_io(&[], &path));
    for peer in &mut mapped {
        peer.command(&format!("mmap -rw 0 {MAPPED_BYTES}"));
    }
    let (mut plain, mut direct) = (Peer::xfs_io(&[], &path), Peer::xfs_io(&["-d"], &path));
    let own = File::open(&path).expect("open");
    let mut random = Random::new(seed());
    let mut expected = vec![0; usize::try_from(MAPPED_BYTES).expect("small")];
    for round in 0..MAPPED_ROUNDS {
        let byte = u8::try_from(1 + round % 255).expect("a byte");
        // O_DIRECT wants whole sectors, of memory and of file.
        let (way, sector) = (random.below(4), 4096);
        let (mut at, mut len) = (random.below(MAPPED_BYTES - 9000), 1 + random.below(9000));
        if way == 3 {
            (at, len) = (at / sector * sector, len.next_multiple_of(sector));
        }
        let what = format!("-S {byte} {at} {len}");
        match way {
            0 | 1 => mapped[usize::from(way == 1)].command(&format!("mwrite {what}")),
            2 => plain.command(&format!("pwrite -q {what}")),
            _ => direct.command(&format!("pwrite -q {what}")),
        };
        if random.below(8) == 0 {
            let flag = ["-a", "-s"][usize::from(random.below(2) == 0)];
            mapped[0].command(&format!("msync {flag} 0 {MAPPED_BYTES}"));
        }
        let range = |at: u64, len: u64| {
            let bound = |number: u64| usize::try_from(number).expect("small");
            bound(at)..bound(at + len)
        };
        expected[range(at, len)].fill(byte);
        let (from, count) = (
            at / sector * sector,
            (len + sector).next_multiple_of(sector),
        );
        let count = count.min(MAPPED_BYTES - from);
        let place = format!("{from} {count}");
        let mut seen = vec![0; usize::try_from(count).expect("small")];
        own.read_exact_at(&mut seen, from).expect("read");
        let views = [
            ("one mapping", mapped[0].dump(&format!("mread -v {place}"))),
            (
                "the other mapping",
                mapped[1].dump(&format!("mread -v {place}")),
            ),
            ("pread", plain.dump(&format!("pread -q -v {place}"))),
            ("O_DIRECT", direct.dump(&format!("pread -q -v {place}"))),
            ("read here", seen),
        ];
        for (who, view) in views {
            let same = view == expected[range(from, count)];
            assert!(
                same,
                "{mode}, round {round}: {who} misses what way {way} wrote at {what}"
            );
        }
    }
    for mut peer in mapped {
        peer.command("munmap");
        peer.finish();
    }
    plain.finish();
    direct.finish();
    drop(own);
    volume.remount(&[mode]);
    assert!(
        fs::read(&path).expect("read") == expected,
        "{mode}: lost over a remount"
    );
}

/// A lock on bytes of a file.
fn byte_lock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).expect("a small constant"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("a small constant"),
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// A process that takes and drops locks as told: `flock sh|ex|un`, `posix` or `ofd` with
/// `sh|ex|un START LEN`, `reopen`. The answer is `ok` or an error's number.
fn locker(arguments: &[String]) {
    let open = || {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .open(&arguments[0])
            .expect("open the file to lock")
    };
    let mut file = open();
    peer::answer_each(|words| {
        let number = |index: usize| words[index].parse::<i64>().expect("a number");
        let kind = |sh: i32, ex: i32, un: i32| match words[1] {
            "sh" => sh,
            "ex" => ex,
            _ => un,
        };
        let range = || {
            let kind = kind(libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK);
            byte_lock(kind, number(2), number(3))
        };
        let result = match words[0] {
            "reopen" => {
                file = open();
                Ok(0)
            }
            "posix" => fcntl(&file, FcntlArg::F_SETLK(&range())),
            "ofd" => fcntl(&file, FcntlArg::F_OFD_SETLK(&range())),
            "wait" => fcntl(&file, FcntlArg::F_OFD_SETLKW(&range())),
            _ => match words[1] {
                "sh" => file
                    .try_lock_shared()
                    .map(|()| 0)
                    .map_err(|_| Errno::EWOULDBLOCK),
                "ex" => file.try_lock().map(|()| 0).map_err(|_| Errno::EWOULDBLOCK),
                _ => file.unlock().map(|()| 0).map_err(|_| Errno::EIO),
            },
        };
        match result {
            Ok(_) => "ok".to_owned(),
            Err(errno) => (errno as i32).to_string(),
        }
    });
}

fn locks(env: &Env) -> Outcome {
    in_both_modes(env, |volume, _| locks_in(&volume.mountpoint))
}

fn locks_in(dir: &Path) {
    let path = dir.join("locked");
    fs::write(&path, "text").expect("a file to lock");
    let start = || Peer::play("locker", [&path]);
    let (mut one, mut two) = (start(), start());
    let busy = libc::EAGAIN.to_string();
    for (lock, apart) in [("flock", ""), ("posix", " 0 0"), ("ofd", " 0 0")] {
        let mut expect = |who: usize, how: &str, answer: &str| {
            let peer = if who == 1 { &mut one } else { &mut two };
            let line = match how {
                "reopen" => how.to_owned(),
                _ => format!("{lock} {how}{apart}"),
            };
            assert_eq!(peer.ask(&line), answer, "process {who}: {line}");
        };
        expect(1, "ex", "ok");
        expect(2, "ex", &busy);
        expect(2, "sh", &busy);
        expect(1, "un", "ok");
        expect(2, "sh", "ok");
        expect(1, "sh", "ok");
        expect(1, "ex", &busy);
        expect(2, "un", "ok");
        expect(1, "ex", "ok");
        // Closing is enough.
        expect(1, "reopen", "ok");
        expect(2, "ex", "ok");
        expect(2, "un", "ok");
    }
    for lock in ["posix", "ofd"] {
        assert_eq!(one.ask(&format!("{lock} ex 10 10")), "ok");
        for (range, answer) in [
            ("0 10", "ok"),
            ("20 5", "ok"),
            ("19 1", &*busy),
            ("0 0", &*busy),
        ] {
            assert_eq!(
                two.ask(&format!("{lock} ex {range}")),
                answer,
                "{lock} {range}"
            );
        }
        // Splitting a lock in the middle.
        assert_eq!(one.ask(&format!("{lock} un 13 2")), "ok");
        assert_eq!(two.ask(&format!("{lock} ex 13 2")), "ok");
        assert_eq!(two.ask(&format!("{lock} sh 12 1")), busy);
        assert_eq!(two.ask(&format!("{lock} un 0 0")), "ok");
        assert_eq!(one.ask(&format!("{lock} un 0 0")), "ok");
    }
    // One that waits gets the lock when its owner is killed.
    assert_eq!(one.ask("ofd ex 0 0"), "ok");
    two.tell("wait ex 0 0");
    one.kill();
    assert_eq!(two.hear(), "ok");
    for lock in ["flock ex", "posix ex 0 0"] {
        let mut three = start();
        assert_eq!(
            three.ask(lock),
            if lock == "flock ex" { "ok" } else { &busy },
            "{lock}"
        );
        three.finish();
    }
    two.finish();
}

/// A process that appends records which name it: the file and its number.
fn appender(arguments: &[String]) {
    let mut options = OpenOptions::new();
    let mut file = options
        .append(true)
        .open(&arguments[0])
        .expect("open for appending");
    for index in 0..APPENDED_RECORDS {
        let record = format!(
            "{:>2} {index:>width$}\n",
            arguments[1],
            width = RECORD_BYTES - 4
        );
        let count = file.write(record.as_bytes()).expect("append");
        assert_eq!(count, RECORD_BYTES, "a short write");
    }
}

fn appends(env: &Env) -> Outcome {
    in_both_modes(env, |volume, mode| {
        let path = volume.path("log");
        File::create(&path).expect("create");
        let start = |me: u64| Peer::play("appender", [path.as_os_str(), me.to_string().as_ref()]);
        let peers: Vec<Peer> = (0..APPENDERS).map(start).collect();
        peers.into_iter().for_each(Peer::finish);
        for _ in 0..2 {
            let text = fs::read_to_string(&path).expect("read");
            let mut next = [0; APPENDERS as usize];
            for line in text.lines() {
                assert_eq!(line.len() + 1, RECORD_BYTES, "a torn record: {line:?}");
                let mut words = line.split_whitespace().map(|word| word.parse::<u64>());
                let mut word = || words.next().expect("two words").expect("a number");
                let (who, index) = (usize::try_from(word()).expect("small"), word());
                assert_eq!(index, next[who], "process {who} out of order");
                next[who] += 1;
            }
            assert_eq!(next, [APPENDED_RECORDS; APPENDERS as usize], "records lost");
            volume.remount(&[mode]);
        }
        let truncated = OpenOptions::new().append(true).open(&path).expect("open");
        drop(File::create(&path).expect("open with O_TRUNC"));
        assert_eq!(truncated.metadata().expect("stat").len(), 0, "O_TRUNC");
    })
}

/// Writes that returned from O_SYNC and O_DSYNC descriptors are on the devices.
fn synchronous(env: &Env) -> Outcome {
    use std::os::unix::fs::OpenOptionsExt;
    in_both_modes(env, |volume, mode| {
        let blocks: Vec<Vec<u8>> = (0..20).map(|n| Random::new(n).bytes(5000)).collect();
        let flags = [("sync", libc::O_SYNC), ("dsync", libc::O_DSYNC)];
        for (name, flag) in flags {
            let mut options = OpenOptions::new();
            let options = options.write(true).create_new(true).custom_flags(flag);
            let mut file = options.open(volume.path(name)).expect("create");
            blocks
                .iter()
                .for_each(|block| file.write_all(block).expect("write"));
        }
        // Single writes can ask for it, too.
        let single = File::create_new(volume.path("single")).expect("create");
        for (block, offset) in blocks.iter().zip((0..).step_by(5000)) {
            let block = [IoSlice::new(block)];
            let count = pwritev2(&single, &block, offset, ReadWriteFlags::DSYNC).expect("write");
            assert_eq!(count, 5000, "a short write");
        }
        drop(single);
        fs::write(volume.path("other"), "not synchronous").expect("write");
        volume.kill_daemon();
        volume.fsck_clean();
        volume.mount(&[mode]);
        for name in ["sync", "dsync", "single"] {
            let found = fs::read(volume.path(name)).expect("read");
            assert!(found == blocks.concat(), "{mode}: {name} lost something");
        }
    })
}
