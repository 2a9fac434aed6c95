//! Finding the members of a file system: by the devices that were given, beside these, among all
//! block devices, in folders of image files, and by tag (`UUID=`, `LABEL=`).
//!
//! Labels are read and nothing is locked. A device that does not answer is given up after the time
//! that any device has to answer. Devices that others are made of (a holder in sysfs: multipath,
//! software RAID, the device mapper) are passed over when looking around, since what lies on top
//! shows the same label; given by name they are taken.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use braidfs_blockdev::{ANSWER_TIME_DEFAULT, LabelError, LabelInfo, read_label};

use super::devices::io_text;

/// Most entries of a directory that are looked at for other members.
const SCAN_MAX: usize = 16_384;

/// Labels that are read at the same time.
const READERS_MAX: usize = 32;

/// How often devices are looked for while somebody waits for them.
const WAIT_POLL: Duration = Duration::from_millis(250);

/// A member with its label.
#[derive(Clone, Debug)]
pub struct Member {
    /// Path by which it will be opened.
    pub path: PathBuf,
    /// Its label.
    pub label: LabelInfo,
}

/// Why members were not found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FindError {
    /// Names the device or tag.
    pub message: String,
    /// It is not there, which may change, or be no error at all (`nofail`).
    pub absent: bool,
}

impl From<FindError> for String {
    fn from(error: FindError) -> Self {
        error.message
    }
}

fn refused(message: String) -> FindError {
    FindError {
        message,
        absent: false,
    }
}

/// What names a file system in place of its devices. In lower case (`uuid=`) mount(8) does not look
/// for the device itself, which it cannot without udev, but leaves it to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tag {
    /// UUID of the file system.
    Uuid(String),
    /// Its label.
    Label(String),
}

impl Tag {
    /// A word that is a tag.
    pub fn parse(word: &OsStr) -> Option<Self> {
        let (name, value) = word.to_str()?.split_once('=')?;
        let value = value.trim_matches('"');
        match name {
            "UUID" | "uuid" => Some(Self::Uuid(value.to_ascii_lowercase())),
            "LABEL" | "label" => Some(Self::Label(value.to_owned())),
            _ => None,
        }
    }

    /// Whether a device with this label belongs to what is named. An empty tag names nothing.
    pub fn names(&self, label: &LabelInfo) -> bool {
        match self {
            Self::Uuid(uuid) => *uuid == label.fs_uuid,
            Self::Label(text) => !text.is_empty() && *text == label.label,
        }
    }
}

/// The members of the file system that these devices, or this tag, name; nowhere else to look.
pub fn find_members(given: &[PathBuf]) -> Result<Vec<Member>, FindError> {
    find_members_in(given, &[])
}

/// Reads the labels of the devices given and finds the other members, if there are more: beside
/// them, among the block devices, in the directories to search. Members that are missing are left
/// to the volume to complain about.
pub fn find_members_in(given: &[PathBuf], search: &[PathBuf]) -> Result<Vec<Member>, FindError> {
    if let [word] = given
        && let Some(tag) = Tag::parse(word.as_os_str())
    {
        return find_tagged(&tag, word, search);
    }
    let mut members = Vec::new();
    for path in given {
        if Tag::parse(path.as_os_str()).is_some() {
            let word = path.display();
            return Err(refused(format!("{word}: must be given alone")));
        }
        let path = canonical(path)?;
        if members.iter().any(|member: &Member| member.path == path) {
            return Err(refused(format!("{}: given twice", path.display())));
        }
        let label = reading(&path).end().map_err(|error| FindError {
            message: format!("{}: {error}", path.display()),
            absent: matches!(
                error,
                LabelError::Io(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM)
            ),
        })?;
        members.push(Member { path, label });
    }
    let Some(first) = members.first() else {
        return Err(refused("no device given".to_owned()));
    };
    let uuid = first.label.fs_uuid.clone();
    if members.iter().all(|member| member.label.fs_uuid == uuid) {
        let mut beside: Vec<&Path> = members
            .iter()
            .filter_map(|member| member.path.parent())
            .collect();
        beside.sort();
        beside.dedup();
        let beside = beside.into_iter().flat_map(candidates).collect();
        if !missing(&members).is_empty() {
            add_siblings(&mut members, &uuid, beside)?;
        }
        if !missing(&members).is_empty() {
            add_siblings(&mut members, &uuid, all_candidates(search))?;
        }
    }
    members.sort_by_key(|member| member.label.device_index);
    Ok(members)
}

/// The same, waiting until all members are there, but not for longer than `patience`.
pub fn find_members_in_time(
    given: &[PathBuf],
    search: &[PathBuf],
    patience: Duration,
) -> Result<Vec<Member>, FindError> {
    let until = Instant::now() + patience;
    loop {
        let found = find_members_in(given, search);
        let absent = match &found {
            Ok(members) => !missing(members).is_empty(),
            Err(error) => error.absent,
        };
        if !absent || Instant::now() >= until {
            return found;
        }
        thread::sleep(WAIT_POLL);
    }
}

/// Indices of members that were not found.
pub fn missing(members: &[Member]) -> Vec<u16> {
    let count = members
        .first()
        .map_or(0, |member| member.label.device_count);
    let found: BTreeSet<u16> = members
        .iter()
        .map(|member| member.label.device_index)
        .collect();
    (0..count).filter(|index| !found.contains(index)).collect()
}

/// All members that can be found, of whatever file systems, in the order of the kernel's table.
pub fn all_members() -> Vec<Member> {
    let read = read_labels(all_candidates(&[]));
    let member = |(path, label): (PathBuf, Result<_, _>)| {
        Some(Member {
            path,
            label: label.ok()?,
        })
    };
    read.into_iter().filter_map(member).collect()
}

fn find_tagged(tag: &Tag, word: &Path, search: &[PathBuf]) -> Result<Vec<Member>, FindError> {
    let word = word.display();
    let candidates = all_candidates(search);
    let count = candidates.len();
    let mut closed = 0;
    let mut members: Vec<Member> = Vec::new();
    let mut uuids = BTreeSet::new();
    for (path, label) in read_labels(candidates) {
        match label {
            Ok(label) if tag.names(&label) => {
                uuids.insert(label.fs_uuid.clone());
                members.push(Member { path, label });
            }
            Err(LabelError::Io(libc::EACCES | libc::EPERM)) => closed += 1,
            _ => {}
        }
    }
    if uuids.is_empty() {
        let hint = match closed {
            0 => String::new(),
            closed => format!(", {closed} of which may not be read"),
        };
        return Err(FindError {
            message: format!("{word}: no such file system on {count} devices{hint}"),
            absent: true,
        });
    }
    if uuids.len() > 1 {
        let uuids = Vec::from_iter(uuids).join(", ");
        return Err(refused(format!(
            "{word}: several file systems have this label; name one by UUID=: {uuids}"
        )));
    }
    members.sort_by_key(|member| member.label.device_index);
    if let Some([one, two]) = members
        .array_windows()
        .find(|[one, two]| one.label.device_index == two.label.device_index)
    {
        return Err(twins(one.label.device_index, &one.path, &two.path));
    }
    Ok(members)
}

fn twins(index: u16, one: &Path, two: &Path) -> FindError {
    refused(format!(
        "{} and {} both say that they are member {index} of this file system; \
         name all members on the command line",
        one.display(),
        two.display(),
    ))
}

/// Adds members with this UUID from among `candidates`.
fn add_siblings(
    members: &mut Vec<Member>,
    uuid: &str,
    mut candidates: Vec<PathBuf>,
) -> Result<(), FindError> {
    candidates.retain(|path| members.iter().all(|member| member.path != *path));
    let mut found: BTreeMap<u16, Member> = BTreeMap::new();
    for (path, label) in read_labels(candidates) {
        let Ok(label) = label else {
            continue;
        };
        let index = label.device_index;
        let known = members.iter().any(|m| m.label.device_index == index);
        if label.fs_uuid != uuid || known {
            continue;
        }
        if let Some(other) = found.get(&index) {
            return Err(twins(index, &other.path, &path));
        }
        found.insert(index, Member { path, label });
    }
    members.extend(found.into_values());
    Ok(())
}

/// A label that is being read by a thread of its own.
struct Reading {
    path: PathBuf,
    result: Option<Receiver<Result<LabelInfo, LabelError>>>,
    until: Instant,
}

fn reading(path: &Path) -> Reading {
    let (to, from) = mpsc::channel();
    let of = path.to_owned();
    let spawned = thread::Builder::new()
        .name("braidfs-label".into())
        .spawn(move || to.send(read_label(&of)).unwrap_or_default());
    Reading {
        path: path.to_owned(),
        result: spawned.is_ok().then_some(from),
        until: Instant::now() + ANSWER_TIME_DEFAULT,
    }
}

impl Reading {
    /// The label, of a device that answers.
    fn end(&self) -> Result<LabelInfo, LabelError> {
        let Some(result) = &self.result else {
            return read_label(&self.path);
        };
        let late = Err(LabelError::Io(libc::ETIMEDOUT));
        let left = self.until.saturating_duration_since(Instant::now());
        result.recv_timeout(left).unwrap_or(late)
    }
}

/// The labels of many devices.
fn read_labels(paths: Vec<PathBuf>) -> Vec<(PathBuf, Result<LabelInfo, LabelError>)> {
    let mut labels = Vec::with_capacity(paths.len());
    for some in paths.chunks(READERS_MAX) {
        let readings: Vec<Reading> = some.iter().map(|path| reading(path)).collect();
        labels.extend(readings.into_iter().map(|reading| {
            let label = reading.end();
            (reading.path, label)
        }));
    }
    labels
}

/// The block devices, and what lies in these directories.
fn all_candidates(search: &[PathBuf]) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/partitions").unwrap_or_default();
    let mut paths: Vec<PathBuf> = block_device_names(&table)
        .map(|name| Path::new("/dev").join(name))
        .filter(|path| is_on_top(path))
        .collect();
    paths.extend(search.iter().flat_map(|directory| candidates(directory)));
    let mut seen = BTreeSet::new();
    paths.retain(|path| seen.insert(path.clone()));
    paths
}

/// Names below /dev, from the kernel's table: a head line, an empty one, then four columns.
fn block_device_names(table: &str) -> impl Iterator<Item = String> {
    table.lines().skip(1).filter_map(|line| {
        let name = line.split_ascii_whitespace().nth(3)?;
        Some(name.replace('!', "/"))
    })
}

/// Whether a block device is there and nothing is made of it that would show the same label.
fn is_on_top(path: &Path) -> bool {
    let Ok(meta) = fs::metadata(path) else {
        return false;
    };
    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    let holders = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders"));
    holders.map_or(true, |mut holders| holders.next().is_none())
}

/// Regular files and block devices of a directory, by their real path.
fn candidates(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .take(SCAN_MAX)
        .flatten()
        .filter(|entry| {
            entry.file_type().is_ok_and(|kind| {
                kind.is_file() || kind.is_block_device() && is_on_top(&entry.path())
            })
        })
        .filter_map(|entry| fs::canonicalize(entry.path()).ok())
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// The real path of a device, or why there is none.
fn canonical(path: &Path) -> Result<PathBuf, FindError> {
    fs::canonicalize(path).map_err(|error| FindError {
        message: format!("{}: {}", path.display(), io_text(&error)),
        absent: error.kind() == ErrorKind::NotFound,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(uuid: &str, text: &str) -> LabelInfo {
        LabelInfo {
            fs_uuid: uuid.to_owned(),
            device_uuid: String::new(),
            device_index: 0,
            device_count: 2,
            size_bytes: 0,
            generation: 1,
            stripe_unit_bytes: 4096,
            label: text.to_owned(),
            clean: true,
        }
    }

    #[test]
    fn tags() {
        let tag = |word: &str| Tag::parse(OsStr::new(word));
        assert_eq!(tag("UUID=AB-1"), Some(Tag::Uuid("ab-1".into())));
        assert_eq!(tag("uuid=\"ab-1\""), Some(Tag::Uuid("ab-1".into())));
        assert_eq!(tag("LABEL=a=b c"), Some(Tag::Label("a=b c".into())));
        for word in ["/dev/sda", "PARTUUID=1", "./UUID=1", "a/label=x", "UUID"] {
            assert_eq!(tag(word), None, "{word}");
        }
    }

    #[test]
    fn an_empty_tag_names_nothing() {
        assert!(!Tag::Label(String::new()).names(&label("u", "")));
        assert!(Tag::Label("x".into()).names(&label("u", "x")));
        assert!(!Tag::Uuid(String::new()).names(&label("u", "")));
        assert!(Tag::Uuid("u".into()).names(&label("u", "")));
    }

    #[test]
    fn what_is_not_there_is_told_from_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let error = |word: &Path| find_members(&[word.to_owned()]).unwrap_err();
        assert!(error(&path).absent);
        fs::write(&path, b"no label").unwrap();
        assert!(!error(&path).absent);
        assert!(error(Path::new("UUID=none")).absent);
        let both = [path, PathBuf::from("UUID=none")];
        assert!(!find_members(&both).unwrap_err().absent);
    }

    #[test]
    fn names_of_the_kernel_table() {
        let table =
            "major minor  #blocks  name\n\n   7        0     131072 loop0\n 104 1 9 cciss!c0d0\n";
        assert_eq!(
            Vec::from_iter(block_device_names(table)),
            ["loop0", "cciss/c0d0"]
        );
    }
}
