//! Workers that make files durable in the ways programs do, each with a model of its folder.
//!
//! A step is one of: write and fsync a new file; overwrite in place and fsync; write a new file,
//! fsync, rename it over the old one, fsync the folder; append and fsync; unlink and fsync the
//! folder. A step that was cut off may have happened or not; the model says what each may look
//! like. With the kernel's cache, bytes that nobody fsynced reach the daemon in any order, so
//! blocks that a cut step would have added may be holes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use braidfs_tests::pattern::{self, BLOCK, Random, Stamp};

const FILES_MAX: u64 = 30;
const BLOCKS_MAX: u64 = 96;

/// What a step that was under way may leave.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// A new file: nothing, or any part of it.
    Create,
    /// Each block old or new.
    Overwrite,
    /// All old or all new.
    Replace,
    /// Any number of the appended blocks.
    Append,
    /// There or not.
    Unlink,
}

/// A file as it was last made durable.
#[derive(Clone, Debug)]
struct Known {
    seed: u64,
    version: u64,
    blocks: u64,
    /// The step that was cut off: its version and length.
    cut: Option<(Cut, u64, u64)>,
}

/// One who makes files durable.
pub struct Worker {
    dir: PathBuf,
    random: Random,
    files: BTreeMap<String, Known>,
    next: u64,
    /// Steps that were durable when they returned.
    pub steps: u64,
}

impl Worker {
    /// A worker with an empty folder of its own.
    pub fn new(dir: PathBuf, index: u64, seed: u64) -> Self {
        fs::create_dir(&dir).expect("a folder for each worker");
        Self {
            dir,
            random: Random::new(seed + 1 + index),
            files: BTreeMap::new(),
            next: index << 32,
            steps: 0,
        }
    }

    /// Steps until the daemon is gone. An error before it was killed is a failure.
    pub fn work(&mut self, killing: &AtomicBool) {
        loop {
            match self.step() {
                Ok(()) => self.steps += 1,
                Err(_) if killing.load(Ordering::SeqCst) => return,
                Err(error) => panic!("a step failed before the daemon was killed: {error}"),
            }
        }
    }

    fn step(&mut self) -> std::io::Result<()> {
        let count = self.files.len() as u64;
        if count == 0 || (count < FILES_MAX && self.random.below(3) == 0) {
            return self.create();
        }
        let pick = usize::try_from(self.random.below(count)).expect("a small number");
        let name = self
            .files
            .keys()
            .nth(pick)
            .expect("below the count")
            .clone();
        match self.random.below(5) {
            0 | 1 => self.overwrite(&name),
            2 => self.replace(&name),
            3 => self.append(&name),
            _ => self.unlink(&name),
        }
    }

    fn cut(&mut self, name: &str, cut: Cut, version: u64, blocks: u64) {
        let known = self.files.get_mut(name).expect("a known file");
        known.cut = Some((cut, version, blocks));
    }

    fn durable(&mut self, name: &str) {
        let known = self.files.get_mut(name).expect("a known file");
        if let Some((_, version, blocks)) = known.cut.take() {
            (known.version, known.blocks) = (version, blocks);
        }
    }

    fn sync_dir(&self) -> std::io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn create(&mut self) -> std::io::Result<()> {
        self.next += 1;
        let (seed, name) = (self.next, format!("file-{}", self.next));
        let blocks = 1 + self.random.below(BLOCKS_MAX);
        let known = Known {
            seed,
            version: 0,
            blocks: 0,
            cut: Some((Cut::Create, 1, blocks)),
        };
        self.files.insert(name.clone(), known);
        let mut file = File::create_new(self.dir.join(&name))?;
        file.write_all(&pattern::blocks(seed, 1, 0, blocks))?;
        file.sync_all()?;
        self.durable(&name);
        Ok(())
    }

    fn overwrite(&mut self, name: &str) -> std::io::Result<()> {
        let known = self.files[name].clone();
        self.cut(name, Cut::Overwrite, known.version + 1, known.blocks);
        let file = OpenOptions::new().write(true).open(self.dir.join(name))?;
        let data = pattern::blocks(known.seed, known.version + 1, 0, known.blocks);
        file.write_all_at(&data, 0)?;
        file.sync_data()?;
        self.durable(name);
        Ok(())
    }

    fn replace(&mut self, name: &str) -> std::io::Result<()> {
        let known = self.files[name].clone();
        let blocks = 1 + self.random.below(BLOCKS_MAX);
        let fresh = self.dir.join("new");
        let mut file = File::create(&fresh)?;
        file.write_all(&pattern::blocks(known.seed, known.version + 1, 0, blocks))?;
        file.sync_all()?;
        self.cut(name, Cut::Replace, known.version + 1, blocks);
        fs::rename(&fresh, self.dir.join(name))?;
        self.sync_dir()?;
        self.durable(name);
        Ok(())
    }

    fn append(&mut self, name: &str) -> std::io::Result<()> {
        let known = self.files[name].clone();
        let more = 1 + self.random.below(32);
        self.cut(name, Cut::Append, known.version, known.blocks + more);
        let mut file = OpenOptions::new().append(true).open(self.dir.join(name))?;
        file.write_all(&pattern::blocks(
            known.seed,
            known.version,
            known.blocks,
            more,
        ))?;
        file.sync_data()?;
        self.durable(name);
        Ok(())
    }

    fn unlink(&mut self, name: &str) -> std::io::Result<()> {
        let known = self.files[name].clone();
        self.cut(name, Cut::Unlink, known.version, known.blocks);
        fs::remove_file(self.dir.join(name))?;
        self.sync_dir()?;
        self.files.remove(name);
        Ok(())
    }

    /// After a mount: every file is what the model allows. Files that a cut step touched are then
    /// removed, so that the model is exact again. Returns how many blocks were read.
    ///
    /// `holes`: whether what a cut step would have added may have holes.
    pub fn verify(&mut self, holes: bool) -> u64 {
        let mut checked = 0;
        for (name, known) in &self.files {
            checked += verify_file(&self.dir.join(name), known, holes);
        }
        for entry in fs::read_dir(&self.dir).expect("list the worker's folder") {
            let name = entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("an ASCII name");
            let expected = self.files.contains_key(&name) || name == "new";
            assert!(
                expected,
                "{} was never made, or its removal was durable",
                name
            );
        }
        let touched: Vec<String> = self
            .files
            .iter()
            .filter(|(_, known)| known.cut.is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in touched {
            self.files.remove(&name);
            match fs::remove_file(self.dir.join(&name)) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => panic!("cannot remove {name}: {error}"),
            }
        }
        self.sync_dir().expect("fsync of the worker's folder");
        checked
    }
}

fn verify_file(path: &Path, known: &Known, holes: bool) -> u64 {
    let at = path.display();
    let mut data = Vec::new();
    match File::open(path).and_then(|mut file| file.read_to_end(&mut data)) {
        Ok(_) => {}
        Err(error) => {
            let may_be_gone = matches!(known.cut, Some((Cut::Create | Cut::Unlink, ..)));
            let gone = error.kind() == std::io::ErrorKind::NotFound;
            assert!(gone && may_be_gone, "{at}: {error}; {known:?}");
            return 0;
        }
    }
    assert_eq!(
        data.len() % BLOCK,
        0,
        "{at} has a part of a block: {known:?}"
    );
    let blocks = (data.len() / BLOCK) as u64;
    let mut versions = Vec::new();
    let mut holes_from = u64::MAX;
    for (index, block) in (0..).zip(data.chunks(BLOCK)) {
        if block.iter().all(|byte| *byte == 0) {
            holes_from = holes_from.min(index);
            continue;
        }
        let stamp = Stamp::decode(block);
        let stamp = stamp.unwrap_or_else(|| panic!("{at}: block {index} torn; {known:?}"));
        let place = (stamp.seed, stamp.index);
        assert_eq!(place, (known.seed, index), "{at}: another's block");
        versions.push(stamp.version);
    }
    let all = |version: u64| versions.iter().all(|found| *found == version);
    let (old, old_blocks) = (known.version, known.blocks);
    // Holes may only be among blocks that a cut step was adding.
    let may_be_holes_from = match known.cut {
        Some((Cut::Create, ..)) if holes => 0,
        Some((Cut::Append, ..)) if holes => old_blocks,
        _ => u64::MAX,
    };
    assert!(
        holes_from >= may_be_holes_from,
        "{at}: a hole at block {holes_from}; {known:?}"
    );
    let allowed = match known.cut {
        None | Some((Cut::Unlink, ..)) => all(old) && blocks == old_blocks,
        Some((Cut::Create, version, most)) => all(version) && blocks <= most,
        Some((Cut::Append, version, most)) => all(version) && (old_blocks..=most).contains(&blocks),
        Some((Cut::Overwrite, version, _)) => {
            let either = |found: &u64| [old, version].contains(found);
            versions.iter().all(either) && blocks == old_blocks
        }
        Some((Cut::Replace, version, new_blocks)) => {
            (all(old) && blocks == old_blocks) || (all(version) && blocks == new_blocks)
        }
    };
    assert!(
        allowed,
        "{at}: {blocks} blocks of versions {versions:?}, the model has {known:?}"
    );
    blocks
}
