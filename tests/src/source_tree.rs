//! A tree like that of an operating system's source: thousands of folders, many small files.
//!
//! The plan follows from a seed: names, sizes and contents. It can be written as a tar archive
//! without a tree to make it from, and a tree on disk can be held against it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::pattern::Random;

/// Bytes of a tar archive come in blocks of this size.
const TAR_BLOCK: usize = 512;
/// How deep folders go.
const DEPTH_MAX: usize = 6;
/// What names are made of.
const WORDS: &[&str] = &[
    "arch", "block", "bus", "clock", "core", "crypto", "debug", "driver", "event", "firmware",
    "gpu", "host", "init", "irq", "kernel", "lib", "media", "net", "phy", "power", "queue",
    "sched", "sound", "trace", "usb", "virt",
];
/// What file names end with.
const ENDINGS: &[&str] = &[".c", ".c", ".c", ".h", ".h", ".rst", ".dts", ".S", ".txt"];

/// A file of the plan.
#[derive(Debug)]
struct Planned {
    path: String,
    len: usize,
    seed: u64,
}

/// What the tree holds.
#[derive(Debug)]
pub struct SourceTree {
    dirs: Vec<String>,
    files: Vec<Planned>,
}

fn word<'w>(random: &mut Random, words: &[&'w str]) -> &'w str {
    let index = random.below(words.len() as u64);
    words[usize::try_from(index).expect("a small number")]
}

/// Mostly 1 to 30 KiB, small ones more often; some are empty, some large.
fn file_len(random: &mut Random) -> usize {
    let scale = 1024 << random.below(5);
    let len = match random.below(100) {
        0 => 0,
        1..4 => random.below(1024),
        4 => random.below(300 << 10),
        _ => (scale + random.below(scale)).min(30 << 10),
    };
    usize::try_from(len).expect("a small number")
}

impl SourceTree {
    /// A plan of so many folders and files.
    pub fn plan(seed: u64, dir_count: usize, file_count: usize) -> Self {
        let mut random = Random::new(seed);
        let mut dirs = vec!["source".to_owned()];
        while dirs.len() < dir_count {
            let parent = &dirs[usize::try_from(random.below(dirs.len() as u64)).expect("small")];
            if parent.split('/').count() < DEPTH_MAX {
                let name = word(&mut random, WORDS);
                dirs.push(format!("{parent}/{name}-{}", dirs.len()));
            }
        }
        let file = |index: usize| {
            let dir = &dirs[usize::try_from(random.below(dirs.len() as u64)).expect("small")];
            let (first, second) = (word(&mut random, WORDS), word(&mut random, WORDS));
            let ending = word(&mut random, ENDINGS);
            Planned {
                path: format!("{dir}/{first}_{second}_{index}{ending}"),
                len: file_len(&mut random),
                seed: random.next(),
            }
        };
        let files = (0..file_count).map(file).collect();
        Self { dirs, files }
    }

    /// How many files there are.
    pub fn file_count(&self) -> usize {
        self.files.len()
    }

    /// The sum of their lengths.
    pub fn bytes(&self) -> usize {
        self.files.iter().map(|file| file.len).sum()
    }

    /// Writes the tree as a tar archive.
    pub fn write_tar(&self, mut to: impl Write) -> io::Result<()> {
        let zeros = [0; 2 * TAR_BLOCK];
        for dir in &self.dirs {
            to.write_all(&tar_header(&format!("{dir}/"), 0, b'5'))?;
        }
        for file in &self.files {
            to.write_all(&tar_header(&file.path, file.len, b'0'))?;
            to.write_all(&Random::new(file.seed).bytes(file.len))?;
            to.write_all(&zeros[..file.len.next_multiple_of(TAR_BLOCK) - file.len])?;
        }
        to.write_all(&zeros)?;
        to.flush()
    }

    /// Fails the test unless a tree is exactly this one, each file with so many hard links.
    pub fn assert_is_at(&self, top: &Path, links: u64) {
        let mut planned: BTreeMap<&str, &Planned> = BTreeMap::new();
        planned.extend(self.files.iter().map(|file| (file.path.as_str(), file)));
        let mut pending = vec!["source".to_owned()];
        let mut dir_count = 0;
        while let Some(dir) = pending.pop() {
            dir_count += 1;
            for entry in fs::read_dir(top.join(&dir)).expect("list a folder") {
                let entry = entry.expect("an entry");
                let name = entry.file_name().into_string().expect("planned in ASCII");
                let path = format!("{dir}/{name}");
                let metadata = entry.metadata().expect("stat of an entry");
                if metadata.is_dir() {
                    pending.push(path);
                    continue;
                }
                let file = planned.remove(path.as_str());
                let file = file.unwrap_or_else(|| panic!("{path} is not of the plan, or twice"));
                assert_eq!(metadata.nlink(), links, "links of {path}");
                let content = fs::read(entry.path()).expect("read a file");
                let same = content == Random::new(file.seed).bytes(file.len);
                assert!(same, "{path} differs from what was written");
            }
        }
        assert!(planned.is_empty(), "missing: {:?}", planned.keys().next());
        assert_eq!(dir_count, self.dirs.len(), "folders");
    }

    /// Fails the test unless each file of the tree at `other` is the same file as the one at `top`.
    pub fn assert_is_linked_at(&self, top: &Path, other: &Path) {
        for file in &self.files {
            let at = |top: &Path| fs::metadata(top.join(&file.path)).expect("stat of a file");
            let (one, two) = (at(top), at(other));
            assert!(
                one.dev() == two.dev() && one.ino() == two.ino() && two.len() == file.len as u64,
                "{} is not one file",
                file.path
            );
        }
    }
}

/// The header of an entry, as POSIX's ustar has it.
fn tar_header(path: &str, len: usize, kind: u8) -> [u8; TAR_BLOCK] {
    let mut header = [0; TAR_BLOCK];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    assert!(path.len() <= 100, "{path} does not fit a header");
    put(0, path);
    put(100, if kind == b'5' { "0000755" } else { "0000644" });
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{len:011o}"));
    put(136, "14000000000");
    put(148, "        ");
    put(257, "ustar\x0000");
    header[156] = kind;
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Cmd;

    #[test]
    fn tar_reads_what_is_planned_and_losses_are_seen() {
        let tree = SourceTree::plan(3, 20, 100);
        let dir = tempfile::tempdir().expect("a temporary folder");
        let archive = dir.path().join("tree.tar");
        tree.write_tar(fs::File::create(&archive).expect("create"))
            .expect("write an archive");
        let extract = Cmd::new("tar").arg("-xf").arg(&archive).arg("-C");
        extract.arg(dir.path()).quiet().ok();
        tree.assert_is_at(dir.path(), 1);
        let largest = tree.files.iter().max_by_key(|file| file.len);
        let largest = dir.path().join(&largest.expect("a file").path);
        let mut content = fs::read(&largest).expect("read");
        content[0] ^= 1;
        fs::write(&largest, content).expect("damage");
        let noticed = std::panic::catch_unwind(|| tree.assert_is_at(dir.path(), 1));
        assert!(noticed.is_err(), "a damaged file went unnoticed");
    }
}
