//! Throughput of a volume over the given devices. It FORMATS them.
//!
//! `cargo run --release -p braidfs-blockdev --example volume_bench -- [--threads] [--buffered]
//! [--io BYTES] DEV...`

use braidfs_blockdev::{
    AlignedBuf, Backend, ChunkKind, Class, Completion, FormatOptions, Kiobuf, OpenMode, Volume,
    open_device,
};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

/// kiobufs under way at once.
const IN_FLIGHT_BYTES: usize = 64 << 20;

struct Run<'a> {
    volume: &'a Volume,
    io_len: usize,
    ended: (SyncSender<Completion>, Receiver<Completion>),
}

impl Run<'_> {
    fn submit(&self, plug: &mut braidfs_blockdev::Plug<'_>, write: bool, at: u64, buf: AlignedBuf) {
        let to = self.ended.0.clone();
        let end_io = Box::new(move |done: Completion| to.send(done).unwrap_or_default());
        let kiobuf = Kiobuf::new(Box::new(buf), 0, self.io_len, end_io);
        let at = braidfs_blockdev::VolBlock(at);
        match write {
            true => plug.write(at, kiobuf, Class::Background),
            false => plug.read(at, kiobuf, None, Class::Sync),
        }
    }

    /// Moves `blocks` from block `start` on, a window under way at a time; bytes per second.
    fn pass(&self, write: bool, start: u64, blocks: u64) -> f64 {
        let step = (self.io_len / 4096) as u64;
        let begun = Instant::now();
        let window = (IN_FLIGHT_BYTES / self.io_len) as u64;
        let batch = (window / 4).max(1);
        let (mut next, mut under_way) = (0, 0);
        let mut spare: Vec<_> = (0..window)
            .map(|_| AlignedBuf::zeroed(self.io_len))
            .collect();
        while next < blocks / step || under_way > 0 {
            let mut plug = self.volume.plug();
            for _ in 0..batch.min(blocks / step - next) {
                let Some(buf) = spare.pop() else { break };
                self.submit(&mut plug, write, start + next * step, buf);
                (next, under_way) = (next + 1, under_way + 1);
            }
            plug.finish();
            while under_way > window - batch || (next == blocks / step && under_way > 0) {
                let done = self.ended.1.recv().expect("the sender lives");
                assert_eq!(done.error, None);
                spare.extend(
                    done.pages
                        .and_then(|pages| AlignedBuf::from_pages(pages).ok()),
                );
                under_way -= 1;
            }
        }
        (blocks * 4096) as f64 / begun.elapsed().as_secs_f64()
    }
}

fn main() {
    let mut mode = OpenMode {
        read_only: false,
        direct: true,
        backend: Backend::Auto,
        ..OpenMode::default()
    };
    let mut io_len = 1usize << 20;
    let mut paths = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--threads" => mode.backend = Backend::Threads,
            "--buffered" => mode.direct = false,
            "--io" => {
                io_len = args
                    .next()
                    .and_then(|n| n.parse().ok())
                    .expect("--io BYTES")
            }
            path => paths.push(path.to_owned()),
        }
    }
    let open = |path: &String| open_device(Path::new(path), mode).expect("open");
    let devices: Vec<_> = paths.iter().map(open).collect();
    let kind = devices.first().map_or("none", |device| device.kind());
    let volume = Volume::format(devices, &FormatOptions::default()).expect("format");
    let mut chunks = Vec::new();
    while let Ok(chunk) = volume.allocate_chunk(ChunkKind::Data, 0) {
        chunks.push(chunk);
    }
    let start = chunks.first().expect("a data chunk").start.0;
    let blocks = chunks.iter().map(|chunk| chunk.len_blocks).sum::<u64>();
    let window = IN_FLIGHT_BYTES / io_len;
    let run = Run {
        volume: &volume,
        io_len,
        ended: sync_channel(window + 1),
    };
    for (name, write) in [
        ("write", true),
        ("write", true),
        ("read", false),
        ("read", false),
    ] {
        let rate = run.pass(write, start, blocks) / 1e9;
        println!("{kind} {name} {io_len} bytes per kiobuf: {rate:.2} GB/s");
    }
    let stats = volume.stats();
    for device in &stats.devices {
        println!(
            "{}: write {} requests, mean {} KiB, {} kiobufs each, {} us; \
             read {} requests, mean {} KiB, {} us; most in flight {}",
            device.name,
            device.write.requests,
            device.write.request_bytes.mean() >> 10,
            device.write.kiobufs_per_request.mean(),
            device.write.latency_ns.mean() / 1000,
            device.read.requests,
            device.read.request_bytes.mean() >> 10,
            device.read.latency_ns.mean() / 1000,
            device.in_flight_max,
        );
    }
    volume.close().expect("close");
}
