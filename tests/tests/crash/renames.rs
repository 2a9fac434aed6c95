//! Files replaced by rename and moved between folders, nothing of it fsynced.
//!
//! Step `n` writes a new file of version `n`, closes it, renames it over target `n mod TARGETS`,
//! and moves a file from one folder to the other under the name `ball-n`. After a crash the
//! targets must be whole and together show one moment: the versions of `TARGETS` steps in a row,
//! and the ball where the last of them, or the one before, left it. Now and then a folder is
//! fsynced; the moment is never before that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use braidfs_tests::pattern::{self, BLOCK, Stamp};

const TARGETS: u64 = 8;
/// Steps from one fsync to the next.
const SYNC_EVERY: u64 = 50;

/// The one who renames.
pub struct Renamer {
    dir: PathBuf,
    /// The last step that was begun.
    begun: u64,
    /// The last step that an fsync made durable.
    durable: u64,
}

/// How many blocks the file of a step has.
fn blocks_of(step: u64) -> u64 {
    1 + step % 5
}

impl Renamer {
    /// Makes the folders and the first `TARGETS` steps.
    pub fn new(dir: PathBuf) -> Self {
        for side in ["left", "right"] {
            fs::create_dir_all(dir.join(side)).expect("folders for renames");
        }
        File::create(dir.join("right/ball-0")).expect("a ball");
        let mut renamer = Self {
            dir,
            begun: 0,
            durable: 0,
        };
        for _ in 0..TARGETS {
            renamer.step().expect("the first steps");
        }
        renamer.sync().expect("fsync of the folder");
        renamer
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.begun
    }

    /// Steps until the daemon is gone. An error before it was killed is a failure.
    pub fn work(&mut self, killing: &AtomicBool) {
        loop {
            let synced = self.begun - self.durable >= SYNC_EVERY;
            match if synced { self.sync() } else { self.step() } {
                Ok(()) => {}
                Err(_) if killing.load(Ordering::SeqCst) => return,
                Err(error) => panic!("a rename failed before the daemon was killed: {error}"),
            }
        }
    }

    fn target(&self, step: u64) -> PathBuf {
        self.dir.join(format!("target-{}", step % TARGETS))
    }

    fn ball(&self, step: u64) -> PathBuf {
        let side = if step.is_multiple_of(2) {
            "right"
        } else {
            "left"
        };
        self.dir.join(format!("{side}/ball-{step}"))
    }

    fn step(&mut self) -> std::io::Result<()> {
        self.begun += 1;
        let step = self.begun;
        let fresh = self.dir.join("fresh");
        fs::write(
            &fresh,
            pattern::blocks(step % TARGETS, step, 0, blocks_of(step)),
        )?;
        fs::rename(&fresh, self.target(step))?;
        fs::rename(self.ball(step - 1), self.ball(step))
    }

    fn sync(&mut self) -> std::io::Result<()> {
        File::open(&self.dir)?.sync_all()?;
        self.durable = self.begun;
        Ok(())
    }

    /// After a mount: the folder shows one moment, and the steps go on from there.
    pub fn verify(&mut self) {
        let mut versions: Vec<u64> = (0..TARGETS)
            .map(|index| whole(&self.target(index), index))
            .collect();
        versions.sort_unstable();
        let last = versions[versions.len() - 1];
        let row: Vec<u64> = (last + 1 - TARGETS..=last).collect();
        assert_eq!(versions, row, "the targets show no single moment");
        let range = self.durable..=self.begun;
        assert!(
            range.contains(&last),
            "step {last} is shown, durable and begun are {range:?}"
        );
        let balls: Vec<String> = ["left", "right"]
            .iter()
            .flat_map(|side| names(&self.dir.join(side)))
            .collect();
        let at_last = balls == [format!("ball-{last}")] && self.ball(last).exists();
        let before = balls == [format!("ball-{}", last - 1)] && self.ball(last - 1).exists();
        // The last step was made durable as a whole or cut off.
        assert!(
            at_last || (before && last > self.durable),
            "after step {last} there is {balls:?}"
        );
        if before {
            fs::rename(self.ball(last - 1), self.ball(last)).expect("complete the last step");
        }
        let _never_made = fs::remove_file(self.dir.join("fresh"));
        (self.begun, self.durable) = (last, last);
        self.sync().expect("fsync of the folder");
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir)
        .expect("list a folder")
        .map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Reads a target: all its blocks are there and of one step. Which one.
fn whole(path: &Path, index: u64) -> u64 {
    let at = path.display();
    let data = fs::read(path).unwrap_or_else(|error| panic!("{at}: {error}"));
    let first = data.get(..BLOCK).and_then(Stamp::decode);
    let first =
        first.unwrap_or_else(|| panic!("{at}: {} bytes, the first block is torn", data.len()));
    let expected = pattern::blocks(index, first.version, 0, blocks_of(first.version));
    assert!(
        data == expected,
        "{at}: not what step {} wrote",
        first.version
    );
    first.version
}
