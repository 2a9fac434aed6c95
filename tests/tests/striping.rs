//! Where the bytes really are: a large file's blocks, each of which says which one it is, are
//! looked for on the raw images, and must lie where the chunk table says, evenly.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use braidfs_tests::compare::data_runs;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::pattern::{self, BLOCK, Stamp};
use braidfs_tests::report::Chunk;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume};

const SEED: u64 = 0x5712_1be5;
const UNITS: [(&str, u64); 3] = [("64K", 16), ("256K", 64), ("1M", 256)];

fn main() -> ExitCode {
    runner::main(
        "striping",
        &[
            Test::new("one_device", 90, |env| matrix(env, 1)),
            Test::new("two_devices", 90, |env| matrix(env, 2)),
            Test::new("three_devices", 90, |env| matrix(env, 3)),
            Test::new("four_devices", 90, |env| matrix(env, 4)),
            Test::new("seven_devices", 120, |env| matrix(env, 7)),
        ],
    )
}

fn matrix(env: &Env, count: usize) -> Outcome {
    for (unit, unit_blocks) in UNITS {
        let equal = vec![1024 * MIB / count as u64; count];
        one_volume(env, &format!("equal-{unit}-"), &equal, unit, unit_blocks);
        if count > 1 {
            let unequal: Vec<u64> = (0..count as u64).map(|dev| (64 + 32 * dev) * MIB).collect();
            one_volume(
                env,
                &format!("unequal-{unit}-"),
                &unequal,
                unit,
                unit_blocks,
            );
        }
    }
    Ok(())
}

/// Formats, writes one file, unmounts, and looks at the raw devices. Images of equal size get a
/// file of a fifth of the volume, of unequal sizes one that needs the largest device to its end.
fn one_volume(env: &Env, name: &str, sizes: &[u64], unit: &str, unit_blocks: u64) {
    let equal = sizes.iter().all(|size| *size == sizes[0]);
    let mut volume = Volume::format(env, name, sizes, &["--stripe-unit", unit]);
    volume.mount(&[]);
    let blocks = if equal {
        192 * MIB / BLOCK as u64
    } else {
        let stat = nix::sys::statvfs::statvfs(&volume.mountpoint).expect("statvfs of the mount");
        let available = stat.blocks_available() * stat.fragment_size();
        let total: u64 = sizes.iter().sum();
        assert!(
            available > total / 2,
            "an empty volume of {total} bytes has {available} free"
        );
        available / 100 * 85 / BLOCK as u64
    };
    let mut file = File::create(volume.path("large")).expect("create a file on the volume");
    for first in (0..blocks).step_by(1024) {
        let count = 1024.min(blocks - first);
        file.write_all(&pattern::blocks(SEED, 1, first, count))
            .expect("write to the volume");
    }
    drop(file);
    volume.umount();
    let chunks = Chunk::table(&volume.info());
    let found = find_blocks(&volume, &chunks, unit_blocks);
    assert_eq!(
        found.logical.len() as u64,
        blocks,
        "blocks of the file found on the devices"
    );
    check_runs(&found.logical, blocks);
    check_evenness(&found, &chunks, sizes, unit_blocks, equal);
    for device in &volume.devices {
        std::fs::remove_file(device).expect("remove an image");
    }
}

/// Where the file's blocks turned up.
struct Found {
    /// Logical block of each block of the file.
    logical: HashMap<u64, u64>,
    /// Blocks of the file per chunk and member.
    per_member: HashMap<(usize, usize), u64>,
}

/// Reads every member's share of every data chunk straight from the images.
fn find_blocks(volume: &Volume, chunks: &[Chunk], unit_blocks: u64) -> Found {
    let mut found = Found {
        logical: HashMap::new(),
        per_member: HashMap::new(),
    };
    let images: Vec<File> = volume
        .devices
        .iter()
        .map(|path| File::open(path).expect("open an image"))
        .collect();
    let written: Vec<_> = images
        .iter()
        .map(|file| data_runs(file).expect("runs"))
        .collect();
    for (number, chunk) in chunks
        .iter()
        .enumerate()
        .filter(|(_, chunk)| chunk.kind == "data")
    {
        assert_eq!(
            chunk.profile == "stripe",
            chunk.members.len() > 1,
            "{chunk:?}"
        );
        if chunk.profile == "stripe" {
            assert_eq!(
                chunk.unit_blocks, unit_blocks,
                "the unit that mkfs was given"
            );
        }
        let share_blocks = chunk.member_len_bytes / BLOCK as u64;
        assert_eq!(
            share_blocks * chunk.members.len() as u64,
            chunk.len_blocks,
            "{chunk:?}"
        );
        for (column, (dev, offset)) in chunk.members.iter().enumerate() {
            let share = *offset..*offset + chunk.member_len_bytes;
            for run in &written[*dev] {
                let (start, end) = (run.0.max(share.start), run.1.min(share.end));
                let mut at = start;
                while at < end {
                    let len = (end - at).min(MIB);
                    let mut data = vec![0; usize::try_from(len).expect("at most 1 MiB")];
                    images[*dev]
                        .read_exact_at(&mut data, at)
                        .expect("read an image");
                    for (block, place) in data.chunks(BLOCK).zip((at..).step_by(BLOCK)) {
                        let Some(stamp) = Stamp::decode(block) else {
                            continue;
                        };
                        assert_eq!(
                            (stamp.seed, stamp.version),
                            (SEED, 1),
                            "whose block is this?"
                        );
                        let logical = chunk.logical_block(column, place - share.start);
                        let before = found.logical.insert(stamp.index, logical);
                        assert_eq!(before, None, "block {} is there twice", stamp.index);
                        *found.per_member.entry((number, column)).or_default() += 1;
                    }
                    at += len;
                }
            }
        }
    }
    found
}

/// Blocks that follow each other in the file must follow each other in the volume, in runs far
/// longer than a stripe unit: had the bytes been striped in any other way than the table says,
/// the runs that the table makes of them would break at every unit.
fn check_runs(logical: &HashMap<u64, u64>, blocks: u64) {
    let breaks = (1..blocks)
        .filter(|index| logical[index] != logical[&(index - 1)] + 1)
        .count();
    let mean = blocks / (breaks as u64 + 1);
    println!(
        "{blocks} blocks in {} runs, {mean} blocks each on average",
        breaks + 1
    );
    assert!(
        mean >= 1024,
        "runs of {mean} blocks: not striped as the chunk table says"
    );
}

/// Within each chunk that is striped, every member has its share of what the file has there; with
/// devices of equal size, every device has its share of the whole.
fn check_evenness(found: &Found, chunks: &[Chunk], sizes: &[u64], unit_blocks: u64, equal: bool) {
    let mut per_device = vec![0; sizes.len()];
    for (number, chunk) in chunks.iter().enumerate() {
        let count = |column| {
            found
                .per_member
                .get(&(number, column))
                .copied()
                .unwrap_or(0)
        };
        let counts: Vec<u64> = (0..chunk.members.len()).map(count).collect();
        for (count, (dev, _)) in counts.iter().zip(&chunk.members) {
            per_device[*dev] += count;
        }
        let (most, least) = (counts.iter().max().copied(), counts.iter().min().copied());
        let spread = most.unwrap_or(0) - least.unwrap_or(0);
        // A file's runs may begin and end anywhere in a row of the stripe.
        assert!(
            spread <= 4 * unit_blocks,
            "chunk {number}: {counts:?} blocks per member"
        );
    }
    println!("blocks per device: {per_device:?}");
    let total: u64 = per_device.iter().sum();
    if equal {
        let fair = total / sizes.len() as u64;
        let worst = per_device
            .iter()
            .map(|count| count.abs_diff(fair))
            .max()
            .unwrap_or(0);
        assert!(
            worst <= fair / 20 + 4 * unit_blocks,
            "uneven: {per_device:?}"
        );
    } else {
        let pairs = per_device.windows(2).zip(sizes.windows(2));
        for (blocks, sizes) in pairs.filter(|(_, sizes)| sizes[0] < sizes[1]) {
            assert!(
                blocks[0] < blocks[1] + 4 * unit_blocks,
                "{per_device:?} {sizes:?}"
            );
        }
        let largest = sizes.len() - 1;
        let used = per_device[largest] * BLOCK as u64;
        assert!(
            used > sizes[largest] / 2,
            "the largest device was not used: {per_device:?}"
        );
    }
}
