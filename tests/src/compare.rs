//! Compares two trees the way somebody would who does not trust the copy.
//!
//! Names, types, contents, sizes, modes, owners, modification times to the nanosecond, targets of
//! symbolic links, device numbers, which names are one file, extended attributes (with access
//! control lists, which the kernel shows as such), and that holes are still holes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::unistd::{Whence, lseek};

use crate::command::Cmd;

/// What to leave out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Leniency {
    /// The copy may have data where the original has a hole.
    pub holes: bool,
}

/// What was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Names of any type.
    pub entries: u64,
    /// Bytes of regular files, holes included.
    pub bytes: u64,
}

/// Differences printed before giving up.
const DIFFERENCES_MAX: usize = 40;

/// Fails the test, with a list of differences, unless the trees are the same.
pub fn assert_same(original: &Path, copy: &Path, leniency: Leniency) -> Tally {
    let (differences, tally) = differences(original, copy, leniency);
    let shown: Vec<_> = differences
        .iter()
        .take(DIFFERENCES_MAX)
        .map(String::as_str)
        .collect();
    assert!(
        differences.is_empty(),
        "{} differences between {} and {}:\n{}",
        differences.len(),
        original.display(),
        copy.display(),
        shown.join("\n")
    );
    println!(
        "same: {} entries, {} MiB in {}",
        tally.entries,
        tally.bytes >> 20,
        copy.display()
    );
    tally
}

/// Each difference in a line that begins with the name.
pub fn differences(original: &Path, copy: &Path, leniency: Leniency) -> (Vec<String>, Tally) {
    let mut comparison = Comparison {
        leniency,
        ..Comparison::default()
    };
    comparison.folder(original, copy, Path::new(""));
    comparison.all_contents(original, copy);
    comparison.hard_links();
    comparison.xattrs(original, copy);
    (comparison.differences, comparison.tally)
}

/// Identity of a file: device and inode number.
type FileId = (u64, u64);

#[derive(Default)]
struct Comparison {
    leniency: Leniency,
    differences: Vec<String>,
    tally: Tally,
    /// Names of each file with more than one, by its identity in the original and in the copy.
    links: [BTreeMap<FileId, Vec<PathBuf>>; 2],
    /// Regular files whose contents are still to be compared.
    files: Vec<(PathBuf, Metadata, Metadata)>,
}

/// How many files are compared at a time.
const READERS: usize = 3;

impl Comparison {
    fn differ(&mut self, name: &Path, what: impl std::fmt::Display) {
        self.differences.push(format!("{}: {what}", name.display()));
    }

    fn folder(&mut self, original: &Path, copy: &Path, name: &Path) {
        let (Some(left), Some(right)) = (self.names(original, name), self.names(copy, name)) else {
            return;
        };
        for missing in left
            .iter()
            .filter(|entry| right.binary_search(entry).is_err())
        {
            self.differ(&name.join(missing), "missing in the copy");
        }
        for extra in right
            .iter()
            .filter(|entry| left.binary_search(entry).is_err())
        {
            self.differ(&name.join(extra), "only in the copy");
        }
        for entry in left
            .iter()
            .filter(|entry| right.binary_search(entry).is_ok())
        {
            let (original, copy) = (original.join(entry), copy.join(entry));
            self.entry(&original, &copy, &name.join(entry));
        }
    }

    fn names(&mut self, dir: &Path, name: &Path) -> Option<Vec<std::ffi::OsString>> {
        let list = fs::read_dir(dir).and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<Result<Vec<_>, _>>()
        });
        match list {
            Ok(mut names) => {
                names.sort();
                Some(names)
            }
            Err(error) => {
                self.differ(name, format!("cannot list {}: {error}", dir.display()));
                None
            }
        }
    }

    fn entry(&mut self, original: &Path, copy: &Path, name: &Path) {
        self.tally.entries += 1;
        let (left, right) = match (fs::symlink_metadata(original), fs::symlink_metadata(copy)) {
            (Ok(left), Ok(right)) => (left, right),
            (left, right) => {
                return self.differ(name, format!("stat: {:?} {:?}", left.err(), right.err()));
            }
        };
        self.attributes(&left, &right, name);
        if left.file_type() != right.file_type() {
            return;
        }
        for (links, meta) in self.links.iter_mut().zip([&left, &right]) {
            if !meta.is_dir() && meta.nlink() > 1 {
                links
                    .entry((meta.dev(), meta.ino()))
                    .or_default()
                    .push(name.to_owned());
            }
        }
        if left.is_dir() {
            self.folder(original, copy, name);
        } else if left.is_symlink() {
            let (left, right) = (fs::read_link(original), fs::read_link(copy));
            if left.as_ref().ok() != right.as_ref().ok() {
                self.differ(name, format!("link target {left:?} {right:?}"));
            }
        } else if left.is_file() {
            self.tally.bytes += left.len();
            self.files.push((name.to_owned(), left, right));
        }
    }

    fn attributes(&mut self, left: &Metadata, right: &Metadata, name: &Path) {
        let mut check = |what: &str, left: String, right: String| {
            if left != right {
                self.differ(name, format!("{what} was {left}, is {right}"));
            }
        };
        let time = |meta: &Metadata| format!("{}.{:09}", meta.mtime(), meta.mtime_nsec());
        check(
            "type and mode",
            format!("{:o}", left.mode()),
            format!("{:o}", right.mode()),
        );
        check("owner", left.uid().to_string(), right.uid().to_string());
        check("group", left.gid().to_string(), right.gid().to_string());
        check("mtime", time(left), time(right));
        if !left.is_dir() {
            check("size", left.len().to_string(), right.len().to_string());
            check(
                "link count",
                left.nlink().to_string(),
                right.nlink().to_string(),
            );
        }
        if left.file_type().is_char_device() || left.file_type().is_block_device() {
            check(
                "device number",
                left.rdev().to_string(),
                right.rdev().to_string(),
            );
        }
    }

    /// Contents of all the regular files that the walk found, several at a time.
    fn all_contents(&mut self, original: &Path, copy: &Path) {
        let files = std::mem::take(&mut self.files);
        let next = AtomicUsize::new(0);
        let this = &*self;
        let read = || {
            let mut found = Vec::new();
            while let Some((name, left, right)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                let paths = [original, copy].map(|root| root.join(name));
                if let Err(why) = this.contents(&paths[0], &paths[1], left, right) {
                    found.push((name, why));
                }
            }
            found
        };
        let found: Vec<_> = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
            let joined = readers
                .into_iter()
                .map(|reader| reader.join().expect("a reader"));
            joined.flatten().collect()
        });
        for (name, why) in found {
            self.differ(name, why);
        }
    }

    fn contents(
        &self,
        original: &Path,
        copy: &Path,
        left: &Metadata,
        right: &Metadata,
    ) -> Result<(), String> {
        let text = |error: std::io::Error| format!("read: {error}");
        let mut left_file = File::open(original).map_err(text)?;
        let mut right_file = File::open(copy).map_err(text)?;
        let sparse = left.blocks() * 512 < left.len() / 2;
        if !sparse {
            return same_bytes(&mut left_file, &mut right_file, left.len());
        }
        let (left_runs, right_runs) = (data_runs(&left_file)?, data_runs(&right_file)?);
        if !self.leniency.holes {
            let bytes = |runs: &[(u64, u64)]| runs.iter().map(|run| run.1 - run.0).sum::<u64>();
            // A copy may round a run of data up to its own granularity, but not fill the holes.
            let allowed = bytes(&left_runs) + (left_runs.len() as u64 + 1) * 65_536;
            if bytes(&right_runs) > allowed {
                return Err(format!("holes became data: {left_runs:?} {right_runs:?}"));
            }
            if right.blocks() * 512 > allowed * 2 {
                return Err(format!("holes take space: {} blocks", right.blocks()));
            }
        }
        // Only where either has data can they differ.
        for (start, end) in left_runs.into_iter().chain(right_runs) {
            same_range(&left_file, &right_file, start, end)?;
        }
        Ok(())
    }

    /// The same names must be one file on both sides.
    fn hard_links(&mut self) {
        let [left, right] = self.links.each_ref().map(|groups| {
            let mut groups: Vec<_> = groups.values().cloned().collect();
            groups.sort();
            groups
        });
        for group in left.iter().filter(|group| !right.contains(group)) {
            self.differ(&group[0], format!("hard links lost: {group:?}"));
        }
        for group in right.iter().filter(|group| !left.contains(group)) {
            self.differences
                .push(format!("hard links made up: {group:?}"));
        }
    }

    /// `getfattr`'s dump of both trees, attribute by attribute.
    fn xattrs(&mut self, original: &Path, copy: &Path) {
        let (left, right) = (xattr_dump(original), xattr_dump(copy));
        for (file, attribute) in left.difference(&right) {
            self.differ(Path::new(file), format!("attribute lost: {attribute:.60}"));
        }
        for (file, attribute) in right.difference(&left) {
            self.differ(
                Path::new(file),
                format!("attribute made up: {attribute:.60}"),
            );
        }
    }
}

/// Extended attributes of a whole tree: pairs of file name and `name=value`.
fn xattr_dump(root: &Path) -> BTreeSet<(String, String)> {
    let dump = Cmd::new("getfattr").args(["-R", "-P", "-h", "-d", "-m", "-", "-e", "hex", "."]);
    let output = dump.cwd(root).limit_secs(120).quiet().ok();
    let mut pairs = BTreeSet::new();
    for block in output.stdout.split("\n\n") {
        let mut lines = block.trim().lines();
        let name = lines
            .next()
            .unwrap_or_default()
            .trim_start_matches("# file: ");
        pairs.extend(lines.map(|line| (name.to_owned(), line.to_owned())));
    }
    pairs
}

fn same_bytes(left: &mut File, right: &mut File, len: u64) -> Result<(), String> {
    // One byte more than expected, so that a longer file is seen at once.
    let size = usize::try_from(len + 1).map_or(1 << 18, |len| len.min(1 << 18));
    let mut buffers = [vec![0; size], vec![0; size]];
    let mut at = 0;
    loop {
        let counts = [
            fill(left, &mut buffers[0]).map_err(|error| format!("original: {error}"))?,
            fill(right, &mut buffers[1]).map_err(|error| format!("copy, near {at}: {error}"))?,
        ];
        let [a, b] = [&buffers[0][..counts[0]], &buffers[1][..counts[1]]];
        if a != b {
            let inside = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            return Err(format!("contents differ at byte {}", at + inside));
        }
        if counts[0] == 0 {
            return Ok(());
        }
        at += counts[0];
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn same_range(left: &File, right: &File, start: u64, end: u64) -> Result<(), String> {
    use std::os::unix::fs::FileExt;
    let mut at = start;
    while at < end {
        let len = usize::try_from((end - at).min(1 << 20)).expect("at most 1 MiB");
        let mut buffers = [vec![0; len], vec![0; len]];
        for (file, buffer) in [left, right].into_iter().zip(&mut buffers) {
            file.read_exact_at(buffer, at)
                .map_err(|error| format!("read at {at}: {error}"))?;
        }
        if buffers[0] != buffers[1] {
            return Err(format!(
                "contents differ between {at} and {}",
                at + len as u64
            ));
        }
        at += len as u64;
    }
    Ok(())
}

/// Where a file has data, as half-open byte ranges, going by SEEK_DATA and SEEK_HOLE.
pub fn data_runs(file: &File) -> Result<Vec<(u64, u64)>, String> {
    let mut runs = Vec::new();
    let mut at = 0;
    loop {
        let start = match lseek(file.as_fd(), at, Whence::SeekData) {
            Ok(start) => start,
            Err(nix::Error::ENXIO) => return Ok(runs),
            Err(error) => return Err(format!("SEEK_DATA: {error}")),
        };
        let hole = lseek(file.as_fd(), start, Whence::SeekHole);
        at = hole.map_err(|error| format!("SEEK_HOLE: {error}"))?;
        if at <= start {
            return Err(format!("SEEK_HOLE went from {start} to {at}"));
        }
        let [start, end] = [start, at].map(|offset| u64::try_from(offset).expect("an offset"));
        runs.push((start, end));
    }
}
