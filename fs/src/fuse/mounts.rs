//! The mount table of this process's mount namespace, as /proc/self/mountinfo tells it.
//!
//! Asking the table never asks a file system, so it works on a mount whose daemon is dead or busy.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number, (major, minor).
    pub dev: (u32, u32),
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// File system type, for FUSE with its subtype.
    pub fs_type: String,
    /// What is mounted.
    pub source: OsString,
    /// Options of the file system.
    pub super_options: String,
}

impl MountEntry {
    /// Whether this is a FUSE mount.
    pub fn is_fuse(&self) -> bool {
        self.fs_type == "fuse" || self.fs_type.starts_with("fuse.")
    }

    /// Whether the source is this device or a list with this device in it.
    pub fn names_device(&self, path: &Path) -> bool {
        let path = path.as_os_str().as_bytes();
        let source = self.source.as_bytes();
        source == path || source.split(|&byte| byte == b':').any(|part| part == path)
    }

    /// Who mounted a FUSE file system.
    pub fn user_id(&self) -> Option<u32> {
        self.super_options
            .split(',')
            .find_map(|option| option.strip_prefix("user_id=")?.parse().ok())
    }
}

/// All mounts, in the order they were made.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|&byte| byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// The mount that is on top at this mount point.
pub fn mount_at(mount_point: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?
        .into_iter()
        .rfind(|entry| entry.mount_point == mount_point))
}

/// A line: `id parent major:minor root mountpoint options [tags...] - type source super-options`.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let dev = fields.nth(2)?;
    let mount_point = fields.nth(1)?;
    fields.find(|field| *field == b"-")?;
    let (fs_type, source) = (fields.next()?, fields.next()?);
    let super_options = fields.next().unwrap_or_default();
    let (major, minor) = std::str::from_utf8(dev).ok()?.split_once(':')?;
    Some(MountEntry {
        dev: (major.parse().ok()?, minor.parse().ok()?),
        mount_point: PathBuf::from(unescape(mount_point)),
        fs_type: unescape(fs_type).into_string().ok()?,
        source: unescape(source),
        super_options: String::from_utf8_lossy(super_options).into_owned(),
    })
}

/// Undoes the octal escapes (space, tab, newline, backslash) of mount tables.
pub fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) if byte == b'\\' => {
                out.push(code);
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// A path with symbolic links resolved, but without asking what is mounted on its last component
/// (which may be a mount that does not answer, or not to us).
pub fn resolve_mount_point(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(error);
            };
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            Ok(fs::canonicalize(parent)?.join(name))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_tags_and_escapes() {
        let line = b"98 29 0:52 / /mnt/a\\040b rw,nosuid shared:7 master:1 - fuse.braidfs \
            /d/0:/d/1 rw,user_id=1000,group_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(entry.dev, (0, 52));
        assert_eq!(entry.mount_point, Path::new("/mnt/a b"));
        assert_eq!(entry.fs_type, "fuse.braidfs");
        assert_eq!(entry.source, "/d/0:/d/1");
        assert_eq!(entry.user_id(), Some(1000));
        assert!(entry.is_fuse());
    }

    #[test]
    fn damaged_lines_are_left_out() {
        for line in [
            &b""[..],
            b"1 2 3",
            b"1 2 a:b / /m rw - t s o",
            b"1 2 0:1 / /m rw -",
        ] {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn escapes_at_the_end_stay() {
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"\\134"), "\\");
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(mount_at(Path::new("/")).unwrap().is_some());
    }
}
