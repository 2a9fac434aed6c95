//! Member devices: lists on the command line, opening them, who else uses them.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::members::Tag;
use crate::fuse::mounts::{MountEntry, mounts};
use braidfs_blockdev::{BlockDevice, OpenError, OpenMode, open_device, read_label};

/// A device may be held a moment longer by somebody who just looked at it, or just let go of it.
const IN_USE_TRIES: usize = 10;
const IN_USE_PAUSE: Duration = Duration::from_millis(100);

/// Splits words into device paths: `dev0:dev1` in one word (fstab has one word) or several words.
/// A word that exists as it stands is one path, whatever it contains; so is a tag (`LABEL=a:b`).
pub fn device_list(words: &[OsString]) -> Result<Vec<PathBuf>, String> {
    let mut paths = Vec::new();
    for word in words {
        let is_one = !word.as_bytes().contains(&b':') || Tag::parse(word).is_some();
        if is_one || Path::new(word).exists() {
            paths.push(PathBuf::from(word));
            continue;
        }
        for part in word.as_bytes().split(|&byte| byte == b':') {
            paths.push(PathBuf::from(OsString::from_vec(part.to_vec())));
        }
    }
    if paths.is_empty() || paths.iter().any(|path| path.as_os_str().is_empty()) {
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        return Err(format!("'{}': a device name is empty", words.join(" ")));
    }
    Ok(paths)
}

/// What the mount table shows for these words: the devices, joined by colons. Absolute paths and
/// tags stay as they were given, to the byte: mount(8) compares them with fstab.
pub fn source_name(words: &[OsString]) -> String {
    /// The kernel takes up to a page for the source; mount tables are read by people.
    const SOURCE_BYTES_MAX: usize = 1024;
    let Ok(paths) = device_list(words) else {
        return words
            .first()
            .map(|word| word.to_string_lossy().into_owned())
            .unwrap_or_default();
    };
    let absolute = |path: &PathBuf| {
        let absolute = match path.is_relative() && Tag::parse(path.as_os_str()).is_none() {
            true => std::path::absolute(path).unwrap_or_else(|_| path.clone()),
            false => path.clone(),
        };
        absolute.to_string_lossy().into_owned()
    };
    let joined = paths.iter().map(absolute).collect::<Vec<_>>().join(":");
    if joined.len() <= SOURCE_BYTES_MAX {
        return joined;
    }
    paths.first().map(absolute).unwrap_or_default()
}

/// An operating system error without Rust's "(os error N)".
pub fn io_text(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_owned(),
        None => error.to_string(),
    }
}

/// Opens and locks devices; what an error says includes the device and what to do.
pub fn open_all(paths: &[PathBuf], mode: OpenMode) -> Result<Vec<Arc<dyn BlockDevice>>, String> {
    paths.iter().map(|path| open_one(path, mode)).collect()
}

fn open_one(path: &Path, mode: OpenMode) -> Result<Arc<dyn BlockDevice>, String> {
    let mut tries = 1;
    let error = loop {
        match open_device(path, mode) {
            Ok(device) => return Ok(device),
            Err(OpenError::InUse) if tries < IN_USE_TRIES => tries += 1,
            Err(error) => break error,
        }
        thread::sleep(IN_USE_PAUSE);
    };
    let hint = match error {
        OpenError::InUse => in_use_by(path).map_or_else(
            || ": mounted or opened by another process".to_owned(),
            |by| format!(": {by}"),
        ),
        OpenError::Os(libc::EROFS) if !mode.read_only => "; it can only be read".to_owned(),
        OpenError::Os(libc::EACCES | libc::EPERM) => "; check its permissions".to_owned(),
        _ => String::new(),
    };
    Err(format!("{} {error}{hint}", path.display()))
}

/// Who else uses a device, as far as the kernel's tables tell: a mount, swap, or a loop device on
/// an image file.
pub fn in_use_by(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    let mounted = mounts().unwrap_or_default();
    if meta.file_type().is_block_device() {
        use std::os::unix::fs::MetadataExt;
        let rdev = meta.rdev();
        let dev = (libc::major(rdev), libc::minor(rdev));
        let uses = |entry: &&MountEntry| entry.dev == dev || entry.source == path.as_os_str();
        if let Some(entry) = mounted.iter().find(uses) {
            let (place, fs_type) = (entry.mount_point.display(), &entry.fs_type);
            return Some(format!("it is mounted on {place} ({fs_type})"));
        }
    }
    if let Some(entry) = mounted
        .iter()
        .find(|entry| entry.is_fuse() && entry.names_device(path))
    {
        return Some(format!("it is mounted on {}", entry.mount_point.display()));
    }
    let tagged = |entry: &&MountEntry| {
        let tag = Tag::parse(&entry.source).filter(|_| entry.is_fuse());
        tag.is_some_and(|tag| read_label(path).is_ok_and(|label| tag.names(&label)))
    };
    if let Some(entry) = mounted.iter().find(tagged) {
        return Some(format!("it is mounted on {}", entry.mount_point.display()));
    }
    let swaps = fs::read("/proc/swaps").unwrap_or_default();
    let name = path.as_os_str().as_bytes();
    if swaps.split(|&byte| byte == b'\n').any(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| matches!(rest.first(), Some(b' ' | b'\t')))
    }) {
        return Some("it is used as swap space".to_owned());
    }
    loop_device_of(path).map(|device| format!("loop device {device} uses it"))
}

/// The loop device whose backing file this is.
fn loop_device_of(path: &Path) -> Option<String> {
    for entry in fs::read_dir("/sys/block").ok()?.flatten() {
        if !entry.file_name().as_bytes().starts_with(b"loop") {
            continue;
        }
        let Ok(backing) = fs::read(entry.path().join("loop/backing_file")) else {
            continue;
        };
        if backing.strip_suffix(b"\n").unwrap_or(&backing) == path.as_os_str().as_bytes() {
            return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    None
}

/// How a volume shows devices that were given as words.
pub fn display_list<P: AsRef<OsStr>>(paths: &[P]) -> String {
    paths
        .iter()
        .map(|path| path.as_ref().to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(words: &[&str]) -> Result<Vec<PathBuf>, String> {
        device_list(&words.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn lists_in_one_word_and_in_several() {
        let both = vec![PathBuf::from("/d/0"), PathBuf::from("/d/1")];
        assert_eq!(list(&["/d/0:/d/1"]), Ok(both.clone()));
        assert_eq!(list(&["/d/0", "/d/1"]), Ok(both));
        assert_eq!(list(&["/d/0:/d/1", "/d/2"]).unwrap().len(), 3);
    }

    #[test]
    fn empty_names_are_refused() {
        for words in [&["/d/0:"][..], &[":"], &["a::b"], &[""], &[]] {
            assert!(list(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn a_path_with_a_colon_that_exists_is_one_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pci-0000:00:1f");
        fs::write(&path, b"").unwrap();
        assert_eq!(
            device_list(&[path.clone().into_os_string()]),
            Ok(vec![path])
        );
    }

    #[test]
    fn sources_stay_as_given_or_are_joined() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(source_name(&words(&["/a//x:/b"])), "/a//x:/b");
        assert!(source_name(&words(&["a"])).starts_with('/'));
        assert_eq!(source_name(&words(&["/a", "/b"])), "/a:/b");
        assert_eq!(source_name(&words(&["label=a:b"])), "label=a:b");
        let long = "/".to_owned() + &"x".repeat(600);
        assert_eq!(source_name(&words(&[&long, &long])), long);
    }
}
