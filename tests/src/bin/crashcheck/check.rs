//! Checks one state after a power cut against the contract: it mounts, it is sound, every byte can
//! be read, and the tree is the one after some step, not older than what was promised.

use std::ops::RangeInclusive;
use std::sync::Arc;

use braidfs::{FileSystem, ROOT_INO, WriteFlags};
use braidfs_blockdev::device::sim::{SimDevice, SimHistory, SimLoss, SimReplay};

use crate::record::{History, assemble, mount};
use crate::session::{Abandoned, CRED, bytes_of, read, write};
use crate::tree::Tree;

/// What is to be done with a state.
#[derive(Clone, Copy)]
pub struct Depth {
    /// Check the metadata as a whole before it is mounted.
    pub fsck: bool,
    /// Work on it, cut the power once more, and look again; by a seed.
    pub work: Option<u64>,
}

/// The metadata as a whole.
pub fn fsck(devices: &[Arc<SimDevice>]) -> Result<braidfs::fsck::Report, String> {
    let volume = assemble(devices, true)?;
    let report = braidfs::fsck::check(volume).map_err(|error| format!("fsck: {error}"))?;
    if report.problems.is_empty() {
        Ok(report)
    } else {
        Err(format!("fsck: {:#?}", report.problems))
    }
}

/// Checks the state; `range`: the steps after which the tree may be.
pub fn check(
    history: &History,
    wrecks: &[Arc<SimDevice>],
    range: RangeInclusive<u64>,
    depth: Depth,
) -> Result<(), String> {
    if depth.fsck {
        fsck(wrecks)?;
    }
    let again = depth.work.map(|seed| (seed, SimReplay::new(wrecks)));
    let recorder = again.as_ref().map(|_| SimHistory::of(wrecks));
    let fs = Abandoned(mount(wrecks)?);
    let fs = &fs.0;
    let found = Tree::of(fs);
    let found = found.and_then(|found| compare(history, found, range));
    let (Ok(found), Some((seed, base)), Some(recorder)) = (&found, again, recorder) else {
        // What it leaves when it goes is of no interest.
        return found.map(|_| ());
    };
    let file = work(fs).map_err(|error| format!("working on it: {error}"))?;
    fs.unmount().map_err(|error| format!("unmount: {error}"))?;
    let report = fsck(wrecks).map_err(|error| format!("after unmount: {error}"))?;
    if report.orphans != 0 {
        return Err(format!("{} orphans are left after unmount", report.orphans));
    }
    cut_again(base, &recorder, seed, found, file)
}

fn compare(history: &History, found: Tree, range: RangeInclusive<u64>) -> Result<Tree, String> {
    let tree = |n: u64| &history.trees[usize::try_from(n).expect("an index")];
    if range.clone().any(|n| *tree(n) == found) {
        return Ok(found);
    }
    let last = history.trees.len() as u64;
    let elsewhere: Vec<u64> = (0..last).filter(|n| *tree(*n) == found).collect();
    let mut text = format!("the tree is none of those after steps {range:?}");
    if !elsewhere.is_empty() {
        text += &format!(", but that after {elsewhere:?}");
    }
    for n in range.rev().take(3) {
        let differences = tree(n).differences(&found);
        text += &format!("\n  against step {n}:\n    {}", differences.join("\n    "));
    }
    Err(text)
}

/// Changes things, so that what the first cut left is used. Returns the inode of a file that is
/// made, synced and deleted again.
fn work(fs: &Arc<FileSystem>) -> Result<u64, braidfs::Errno> {
    let flags = libc::O_RDWR | libc::O_CREAT;
    let (attr, file) = fs.create(ROOT_INO, b"after", 0o644, flags, &CRED)?;
    let bytes = bytes_of(attr.ino, 70_000);
    write(fs, &file, 0, &bytes, false, WriteFlags::default())?;
    fs.fsync(&file, false)?;
    if read(fs, &file, 0, bytes.len() + 1)? != bytes {
        return Err(braidfs::Errno::IO);
    }
    fs.unlink(ROOT_INO, b"after")?;
    fs.release(&file);
    fs.forget(attr.ino, 1);
    Ok(attr.ino)
}

/// The power fails once more while the mount after the first cut is at work.
fn cut_again(
    mut base: SimReplay,
    recorder: &SimHistory,
    seed: u64,
    found: &Tree,
    file: u64,
) -> Result<(), String> {
    let events = recorder.events();
    let end = usize::try_from(seed % (events.len() as u64 + 1)).expect("an index");
    events[..end].iter().for_each(|event| base.step(event));
    let loss = SimLoss::draw(seed, base.pending(), base.devices());
    let when = format!(
        "after a second cut behind event {end} of {}, {loss}",
        events.len()
    );
    let wrecks = base.wreck(loss);
    let looked = || {
        fsck(&wrecks)?;
        let fs = Abandoned(mount(&wrecks)?);
        let mut now = Tree::of(&fs.0)?;
        now.0.remove(&file);
        if let Some(root) = now.0.get_mut(&ROOT_INO) {
            root.entries.remove(&b"after"[..]);
        }
        match found.differences(&now).as_slice() {
            [] => Ok(()),
            some => Err(some.join("\n    ")),
        }
    };
    looked().map_err(|error: String| format!("{when}: {error}"))
}
