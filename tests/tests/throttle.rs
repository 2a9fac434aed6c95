//! What striping is for: devices that are slow each are fast together.
//!
//! Loop devices, each limited by a cgroup to 100 MB/s in each direction for the daemon.

use std::fs;
use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::loopdev::LoopDevice;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::throttle::Throttle;
use braidfs_tests::volume::{GIB, MIB, Volume, drop_kernel_caches, sparse_image};

/// What each device may move in a second.
const DEVICE_BYTES_PER_SEC: u64 = 100_000_000;
/// What is moved per device.
const BYTES_PER_DEVICE: u64 = 500 * MIB;
/// Of linear.
const SCALING_MIN: f64 = 0.9;
/// Of what the devices are allowed.
const LIMIT_SHARE_MIN: f64 = 0.8;
/// How many devices.
const COUNTS: [usize; 3] = [1, 2, 4];
/// The machine may be busy with something else: the best of so many tries counts.
const TRIES: usize = 3;

fn main() -> ExitCode {
    let test = Test::new(
        "throughput_scales_with_devices",
        400,
        throughput_scales_with_devices,
    );
    runner::main("throttle", &[test])
}

/// Bytes per second of a sequential write with fsync, and of a cold sequential read.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    write: f64,
    read: f64,
}

fn throughput_scales_with_devices(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    env.need_space(5 * GIB)?;
    let mut best = [Rates::default(); COUNTS.len()];
    for attempt in 1..=TRIES {
        for (slot, count) in best.iter_mut().zip(COUNTS) {
            let rates = measure(env, count, attempt)?;
            slot.write = slot.write.max(rates.write);
            slot.read = slot.read.max(rates.read);
        }
        if complaints(&best).is_empty() {
            break;
        }
    }
    for (rates, count) in best.iter().zip(COUNTS) {
        let (write, read) = (rates.write / 1e6, rates.read / 1e6);
        println!("{count} devices: write {write:.0} MB/s, read {read:.0} MB/s");
    }
    let complaints = complaints(&best);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// What is not as it should be about rates at 1, 2, 4 devices.
fn complaints(rates: &[Rates]) -> Vec<String> {
    let mut complaints = Vec::new();
    for (at, count) in rates.iter().zip(COUNTS) {
        for (what, rate, one) in [
            ("write", at.write, rates[0].write),
            ("read", at.read, rates[0].read),
        ] {
            let per_device = rate / count as f64;
            let (linear, limit) = (per_device / one, per_device / DEVICE_BYTES_PER_SEC as f64);
            if linear < SCALING_MIN {
                complaints.push(format!("{what} on {count} devices: {linear:.2} of linear"));
            }
            // Scaling from a device that is far below its own limit would say little.
            if limit < LIMIT_SHARE_MIN {
                complaints.push(format!(
                    "{what} on {count} devices: {limit:.2} of the limit"
                ));
            }
        }
    }
    complaints
}

fn measure(env: &Env, count: usize, attempt: usize) -> Result<Rates, braidfs_tests::env::Skip> {
    let name = format!("t{attempt}-{count}-");
    let images: Vec<_> = (0..count)
        .map(|dev| env.path(&format!("{name}{dev}.loop")))
        .collect();
    for image in &images {
        sparse_image(image, 2 * BYTES_PER_DEVICE);
    }
    let loops: Vec<_> = images
        .iter()
        .map(|image| LoopDevice::attach(image))
        .collect();
    let devices: Vec<_> = loops.iter().map(|device| device.path.clone()).collect();
    env.braidfs().arg("mkfs").args(&devices).ok();
    let limited: Vec<_> = loops.iter().collect();
    let throttle = Throttle::new(&env.dir, &limited, DEVICE_BYTES_PER_SEC)?;
    let mut volume = Volume::on(env, &name, devices.clone());
    let bytes = BYTES_PER_DEVICE * count as u64;
    let blocks = format!("count={}", bytes / MIB);
    let file = volume.path("large");

    mount_throttled(env, &mut volume, &throttle);
    let of = format!("of={}", file.display());
    let write = Cmd::new("dd")
        .args(["if=/dev/zero", &of, "bs=1M", &blocks, "conv=fsync"])
        .ok();
    volume.umount();
    drop_kernel_caches();
    mount_throttled(env, &mut volume, &throttle);
    let from = format!("if={}", file.display());
    let read = Cmd::new("dd").args([&from, "of=/dev/null", "bs=1M"]).ok();
    volume.umount();
    drop(loops);
    for image in &images {
        fs::remove_file(image).expect("remove an image");
    }
    let rate = |secs: f64| bytes as f64 / secs;
    let rates = Rates {
        write: rate(write.elapsed.as_secs_f64()),
        read: rate(read.elapsed.as_secs_f64()),
    };
    println!("try {attempt}, {count} devices: {rates:.0?} bytes/s");
    Ok(rates)
}

/// The daemon joins the cgroup before it starts; the readers and writers of the mount do not.
fn mount_throttled(env: &Env, volume: &mut Volume, throttle: &Throttle) {
    let script = "echo $$ > \"$1\"; shift; exec \"$@\"";
    let mount = Cmd::sh(script, [throttle.procs()])
        .arg(&env.bin)
        .arg("mount");
    mount.args(&volume.devices).arg(&volume.mountpoint).ok();
    volume.adopt();
}
