//! Workloads of few large files, by fio and dd.

use braidfs_tests::command::Cmd;
use braidfs_tests::volume::MIB;

use crate::fio::Job;
use crate::measure::{Unit, Work};
use crate::peers::Kind as PeerKind;
use crate::run::Run;
use crate::stage::Stage;

/// The file.
const FILE: &str = "large";
/// Bytes that are asked for at random.
const BLOCK: u64 = 4096;

/// Requests under way on all raw devices together.
const RAW_DEPTH: u32 = 16;

/// Makes the file, so that what follows reads or overwrites. The null server needs no bytes.
fn lay_out(stage: &Stage<'_>, bytes: u64) {
    match stage.peer.kind {
        PeerKind::Raw => {}
        PeerKind::Null { .. } => {
            let file = std::fs::File::create(stage.path(FILE)).expect("create a file");
            file.set_len(bytes).expect("size a file");
        }
        _ => {
            writing(MIB, bytes).run(&stage.fio_file(FILE), None);
        }
    }
}

/// Reads it once, so that who caches has it.
fn warm_up(stage: &Stage<'_>, bytes: u64) {
    if !stage.peer.is_null() {
        let job = Job {
            block: MIB,
            size: bytes,
            ..Job::default()
        };
        job.run(&stage.fio_file(FILE), None);
    }
}

fn fio(stage: &mut Stage<'_>, job: &Job<'_>) -> Work {
    let job = match stage.peer.kind {
        // Devices have no cache of their own to measure; in order, they are to show all they can.
        PeerKind::Raw if ["read", "write"].contains(&job.pattern) => Job {
            engine: "libaio",
            depth: RAW_DEPTH,
            direct: true,
            ..job.clone()
        },
        PeerKind::Raw => Job {
            direct: true,
            ..job.clone()
        },
        _ => job.clone(),
    };
    job.run(&stage.fio_file(FILE), stage.fio_group().as_deref())
}

fn record(run: &mut Run<'_>, stage: &mut Stage<'_>, row: &str, unit: Unit, job: &Job<'_>) {
    let (work, cost) = stage.measured(|stage| fio(stage, job));
    run.record(row, unit, &work, cost);
}

/// A job that writes all of a file, and fsyncs it; the file is made by it.
fn writing(block: u64, size: u64) -> Job<'static> {
    Job {
        pattern: "write",
        block,
        size,
        extra: &["--end_fsync=1"],
        ..Job::default()
    }
}

/// The same with reads.
fn reading<'a>(write: &Job<'a>) -> Job<'a> {
    Job {
        pattern: if write.pattern == "write" {
            "read"
        } else {
            "randread"
        },
        extra: &[],
        ..write.clone()
    }
}

/// Sequential write with a final fsync, cold read, warm read.
pub fn sequential(run: &mut Run<'_>, block: u64, direct: bool, depth: u32) {
    let engine = match (depth, direct) {
        (1, _) => "psync",
        (_, true) => "libaio",
        // Only this one has several buffered requests under way.
        (_, false) => "io_uring",
    };
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().large_bytes);
    let write = Job {
        engine,
        depth,
        direct,
        ..writing(block, bytes)
    };
    record(run, &mut stage, "write", Unit::BytesPerSecond, &write);
    let read = reading(&write);
    if !stage.peer.is_null() && run.wants("read cold") {
        stage.cold();
        record(run, &mut stage, "read cold", Unit::BytesPerSecond, &read);
    }
    if stage.peer.kind == PeerKind::Raw || !run.wants("read warm") {
        return;
    }
    let bytes = bytes.min(run.scale().warm_bytes);
    stage.cold();
    warm_up(&stage, bytes);
    let warm = Job {
        size: bytes,
        secs: Some(run.scale().secs),
        again: true,
        ..read
    };
    record(run, &mut stage, "read warm", Unit::BytesPerSecond, &warm);
}

/// 4 KiB, buffered, one after the other.
pub fn tiny(run: &mut Run<'_>) {
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().warm_bytes);
    let write = writing(BLOCK, bytes);
    record(run, &mut stage, "write", Unit::PerSecond, &write);
    let read = reading(&write);
    if run.wants("read cold") {
        stage.cold();
        record(run, &mut stage, "read cold", Unit::PerSecond, &read);
        record(run, &mut stage, "read warm", Unit::PerSecond, &read);
    }
}

/// 4 KiB at random: write, warm read, cold read.
pub fn random(run: &mut Run<'_>, direct: bool, jobs: u32) {
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().warm_bytes);
    lay_out(&stage, bytes);
    let write = Job {
        pattern: "randwrite",
        block: BLOCK,
        jobs,
        direct,
        size: bytes,
        secs: Some(run.scale().secs),
        again: true,
        extra: if direct { &[] } else { &["--end_fsync=1"] },
        ..Job::default()
    };
    if run.wants("write") {
        record(run, &mut stage, "write", Unit::PerSecond, &write);
    }
    let read = reading(&write);
    if run.wants("read warm") {
        warm_up(&stage, bytes);
        record(run, &mut stage, "read warm", Unit::PerSecond, &read);
    }
    if !stage.peer.is_null() && run.wants("read cold") {
        // Each block once: a second time it would be warm.
        let cold = Job {
            again: false,
            ..read
        };
        stage.cold();
        record(run, &mut stage, "read cold", Unit::PerSecond, &cold);
    }
}

/// A file that exists is written again.
pub fn overwrite(run: &mut Run<'_>) {
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().large_bytes / 4);
    lay_out(&stage, bytes);
    let in_order = Job {
        pattern: "write",
        block: MIB,
        size: bytes,
        extra: &["--end_fsync=1", "--overwrite=1"],
        ..Job::default()
    };
    record(run, &mut stage, "in order", Unit::BytesPerSecond, &in_order);
    let scattered = Job {
        pattern: "randwrite",
        block: 64 << 10,
        ..in_order
    };
    record(
        run,
        &mut stage,
        "scattered 64k",
        Unit::BytesPerSecond,
        &scattered,
    );
}

/// 4 KiB and an fsync, again and again; each job has a file of its own.
pub fn fsync(run: &mut Run<'_>, jobs: u32) {
    let mut stage = run.stage("");
    let job = Job {
        pattern: "write",
        jobs,
        size: 64 * MIB,
        secs: Some(run.scale().secs),
        again: true,
        extra: &["--fsync=1"],
        ..Job::default()
    };
    let folder = format!("--directory={}", stage.path("").display());
    let (work, cost) = stage.measured(|_| job.run(&folder, None));
    run.record("write+fsync", Unit::PerSecond, &work, cost);
}

/// 70 reads and 30 writes of 100.
pub fn mixed(run: &mut Run<'_>, jobs: u32) {
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().warm_bytes);
    lay_out(&stage, bytes);
    let job = Job {
        pattern: "randrw",
        jobs,
        size: bytes,
        secs: Some(run.scale().secs),
        again: true,
        extra: &["--rwmixread=70"],
        ..Job::default()
    };
    record(run, &mut stage, "70/30", Unit::PerSecond, &job);
}

/// Reads through a mapping.
pub fn mmap(run: &mut Run<'_>) {
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().warm_bytes);
    lay_out(&stage, bytes);
    stage.cold();
    let in_order = Job {
        engine: "mmap",
        size: bytes,
        ..Job::default()
    };
    record(
        run,
        &mut stage,
        "in order, cold",
        Unit::BytesPerSecond,
        &in_order,
    );
    let at_random = Job {
        pattern: "randread",
        secs: Some(run.scale().secs),
        again: true,
        ..in_order
    };
    record(run, &mut stage, "random, warm", Unit::PerSecond, &at_random);
}

/// dd with the block sizes that people use; what is written is fsynced.
pub fn dd(run: &mut Run<'_>) {
    let sizes = [
        ("512", 512, 8),
        ("4k", 4096, 4),
        ("64k", 64 << 10, 1),
        ("1M", MIB, 1),
    ];
    let mut stage = run.stage("");
    let most = stage.file_bytes(run.scale().large_bytes / 4);
    for (name, block, part) in sizes {
        let bytes = most / part / 4;
        let path = stage.path(&format!("dd{name}"));
        let (size, count) = (format!("bs={block}"), format!("count={}", bytes / block));
        let timed = |words: [String; 5]| {
            let output = Cmd::new("dd").args(words).limit_secs(600).quiet().ok();
            Work {
                bytes: bytes as f64,
                operations: (bytes / block) as f64,
                secs: output.elapsed.as_secs_f64(),
                ..Work::default()
            }
        };
        let (zeros, to) = ("if=/dev/zero".to_owned(), format!("of={}", path.display()));
        let sync = "conv=fsync".to_owned();
        let words = [zeros, to, size.clone(), count.clone(), sync];
        let (work, cost) = stage.measured(|_| timed(words));
        run.record(&format!("write {name}"), Unit::BytesPerSecond, &work, cost);
        stage.drop_kernel_caches();
        let from = format!("if={}", path.display());
        let none = "of=/dev/null".to_owned();
        let words = [from, none, size, count, "status=none".to_owned()];
        let (work, cost) = stage.measured(|_| timed(words));
        run.record(&format!("read {name}"), Unit::BytesPerSecond, &work, cost);
    }
}

/// 64 streams at a time, each with a file of its own.
pub fn streams(run: &mut Run<'_>) {
    const STREAMS: u32 = 64;
    let mut stage = run.stage("");
    let bytes = stage.file_bytes(run.scale().large_bytes / 2) / u64::from(STREAMS);
    let write = Job {
        jobs: STREAMS,
        ..writing(MIB, bytes >> 20 << 20)
    };
    let folder = format!("--directory={}", stage.path("").display());
    let (work, cost) = stage.measured(|_| write.run(&folder, None));
    run.record("write", Unit::BytesPerSecond, &work, cost);
    let read = reading(&write);
    stage.cold();
    let (work, cost) = stage.measured(|_| read.run(&folder, None));
    run.record("read cold", Unit::BytesPerSecond, &work, cost);
}

/// A working set that does not fit into braidfs's cache.
pub fn small_cache(run: &mut Run<'_>) {
    let mut stage = run.stage("cache_size=128M");
    let bytes = stage.file_bytes(run.scale().large_bytes / 4);
    let write = writing(MIB, bytes);
    record(run, &mut stage, "write", Unit::BytesPerSecond, &write);
    let read = reading(&write);
    warm_up(&stage, bytes);
    record(run, &mut stage, "read again", Unit::BytesPerSecond, &read);
    let scattered = Job {
        pattern: "randread",
        size: bytes,
        secs: Some(run.scale().secs),
        again: true,
        ..Job::default()
    };
    record(run, &mut stage, "random 4k", Unit::PerSecond, &scattered);
}

/// 1 to 4 devices.
pub fn scaling(run: &mut Run<'_>) {
    for &count in run.scale().throttled_counts {
        let mut stage = run.stage_on(count, "");
        let write = writing(MIB, run.scale().throttled_bytes * count as u64);
        let row = format!("write on {count}");
        record(run, &mut stage, &row, Unit::BytesPerSecond, &write);
        let read = reading(&write);
        stage.cold();
        let row = format!("read on {count}");
        record(run, &mut stage, &row, Unit::BytesPerSecond, &read);
    }
}
