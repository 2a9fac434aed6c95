//! What /etc/fstab says of a mount point, so that `braidfs mount MOUNTPOINT` does what mount(8)
//! does with it, in the foreground too.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::devices::io_text;
use crate::fuse::mounts::unescape;

const FSTAB: &str = "/etc/fstab";

/// A line for a braidfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Devices, or a tag.
    pub source: OsString,
    /// Where it is to be mounted.
    pub target: PathBuf,
    /// Options, separated by commas.
    pub options: String,
}

/// The first line whose mount point, or source, is this.
pub fn find(place: &Path) -> Result<Line, String> {
    let table =
        fs::read(FSTAB).map_err(|error| format!("{FSTAB}: cannot be read: {}", io_text(&error)))?;
    let real = fs::canonicalize(place).ok();
    let is_it = |line: &Line| {
        line.target == place
            || Path::new(&line.source) == place
            || real.as_ref().is_some_and(|real| line.target == *real)
    };
    lines(&table).find(is_it).ok_or_else(|| {
        format!(
            "{}: {FSTAB} has no line of type braidfs for it; give the devices and the mount point",
            place.display()
        )
    })
}

/// Lines of type braidfs. Fields are separated by blanks; blanks in them are octal escapes.
fn lines(table: &[u8]) -> impl Iterator<Item = Line> {
    table.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line
            .split(|byte| byte.is_ascii_whitespace())
            .filter(|field| !field.is_empty());
        let source = fields.next().filter(|field| !field.starts_with(b"#"))?;
        let target = PathBuf::from(unescape(fields.next()?));
        let kind = fields.next()?;
        if kind != b"braidfs" && kind != b"fuse.braidfs" {
            return None;
        }
        let options = unescape(fields.next().unwrap_or_default());
        Some(Line {
            source: unescape(source),
            target,
            options: String::from_utf8_lossy(options.as_bytes()).into_owned(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_comments_and_escapes() {
        let table = b"# /dev/sdz /z braidfs ro 0 0\n\n/dev/sda1 / ext4 defaults 0 1\n\
            /d/a\\040b:/d/c\t/srv/my\\040tree braidfs\tro,x-a 0 0\n\
            LABEL=x /y fuse.braidfs\n/short /line\n";
        let lines = Vec::from_iter(lines(table));
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert_eq!(lines[0].source, "/d/a b:/d/c");
        assert_eq!(lines[0].target, Path::new("/srv/my tree"));
        assert_eq!(lines[0].options, "ro,x-a");
        assert_eq!(
            (lines[1].source.to_str(), &*lines[1].options),
            (Some("LABEL=x"), "")
        );
    }
}
