//! `braidfs mkfs`: makes a file system. All checks come before the first write.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use braidfs_blockdev::label::{DEVICE_BYTES_MIN, DEVICES_MAX, LABEL_TEXT_MAX, STRIPE_UNIT_MAX};
use braidfs_blockdev::{
    BlockDevice, FormatOptions, OpenMode, Volume, VolumeInfo, foreign_signature, read_label,
};

use super::devices::{device_list, display_list, in_use_by, io_text, open_all};
use super::exit::{self, CliError};
use super::print;
use super::progress::ByteProgress;
use super::size::{format_size, parse_size};

/// Smallest stripe unit: one block.
const STRIPE_UNIT_MIN: u64 = braidfs_blockdev::BLOCK_SIZE;

/// Bytes that are discarded at a time.
const DISCARD_STEP: u64 = 1 << 30;

/// Make a file system on devices or image files.
#[derive(clap::Args, Debug)]
pub struct MkfsArgs {
    /// Name of the file system
    #[arg(short = 'L', long, default_value = "")]
    pub label: String,
    /// Bytes in a row on one device: a power of two from 4K to 16M
    #[arg(long, value_name = "SIZE", default_value = "256K")]
    pub stripe_unit: String,
    /// Size of image files that do not exist yet (K, M, G, T); they are made sparse
    #[arg(long, value_name = "SIZE")]
    pub size: Option<String>,
    /// Overwrite what the devices hold
    #[arg(short, long)]
    pub force: bool,
    /// Give all space back to the devices first: image files get holes, disks are trimmed
    #[arg(long)]
    pub discard: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Devices, partitions or image files
    #[arg(required = true, value_name = "DEV")]
    pub devices: Vec<OsString>,
}

/// `braidfs mkfs`.
pub fn run(args: &MkfsArgs) -> Result<(), CliError> {
    let options = format_options(args)?;
    let size = image_size(args)?;
    let paths = device_list(&args.devices).map_err(exit::usage)?;
    if paths.len() > DEVICES_MAX {
        return Err(exit::usage(format!(
            "{} devices; a file system has {DEVICES_MAX} at most",
            paths.len()
        )));
    }
    for path in &paths {
        check_path(path, size)?;
    }
    check_distinct(&paths)?;
    let mut images = NewImages::default();
    for path in paths.iter().filter(|path| !path.exists()) {
        images.create(path, size.unwrap_or(DEVICE_BYTES_MIN))?;
    }
    let info = format(&paths, &options, args)?;
    images.keep();
    report(args, &info)
}

fn format_options(args: &MkfsArgs) -> Result<FormatOptions, CliError> {
    if args.label.len() > LABEL_TEXT_MAX || args.label.contains('\0') {
        return Err(exit::usage(format!(
            "--label: {} bytes; at most {LABEL_TEXT_MAX} are possible",
            args.label.len()
        )));
    }
    let unit = parse_size(&args.stripe_unit)
        .filter(|unit| unit.is_power_of_two() && *unit >= STRIPE_UNIT_MIN)
        .and_then(|unit| u32::try_from(unit).ok())
        .filter(|unit| *unit <= STRIPE_UNIT_MAX);
    let Some(stripe_unit_bytes) = unit else {
        return Err(exit::usage(format!(
            "--stripe-unit {}: must be a power of two from {} to {}",
            args.stripe_unit,
            format_size(STRIPE_UNIT_MIN),
            format_size(u64::from(STRIPE_UNIT_MAX))
        )));
    };
    Ok(FormatOptions {
        label: args.label.clone(),
        stripe_unit_bytes,
        ..FormatOptions::default()
    })
}

fn image_size(args: &MkfsArgs) -> Result<Option<u64>, CliError> {
    let Some(text) = &args.size else {
        return Ok(None);
    };
    let min = format_size(DEVICE_BYTES_MIN);
    match parse_size(text) {
        Some(size) if size >= DEVICE_BYTES_MIN && i64::try_from(size).is_ok() => Ok(Some(size)),
        Some(_) => Err(exit::usage(format!(
            "--size {text}: a member needs at least {min}"
        ))),
        None => Err(exit::usage(format!(
            "--size {text}: is not a size such as 512M or 10G"
        ))),
    }
}

/// Checks that need no open device.
fn check_path(path: &Path, size: Option<u64>) -> Result<(), CliError> {
    let name = path.display();
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            if !parent.unwrap_or(Path::new(".")).is_dir() {
                return Err(exit::usage(format!("{name}: its directory does not exist")));
            }
            return match size {
                Some(_) => Ok(()),
                None => Err(exit::usage(format!(
                    "{name}: does not exist; --size SIZE makes an image file"
                ))),
            };
        }
        Err(error) => return Err(exit::usage(format!("{name}: {}", io_text(&error)))),
    };
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(exit::usage(format!(
            "{name}: is neither a regular file nor a block device"
        )));
    }
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if let Some(by) = in_use_by(&real) {
        return Err(exit::usage(format!(
            "{name} is in use: {by}; nothing was written"
        )));
    }
    if meta.is_file() && meta.len() < DEVICE_BYTES_MIN {
        return Err(too_small(&name.to_string(), meta.len()));
    }
    Ok(())
}

fn too_small(name: &str, size: u64) -> CliError {
    exit::usage(format!(
        "{name}: {} is too small; a member needs at least {}; nothing was written",
        format_size(size),
        format_size(DEVICE_BYTES_MIN)
    ))
}

/// No device may be given twice, under whatever name.
fn check_distinct(paths: &[PathBuf]) -> Result<(), CliError> {
    let identity = |path: &Path| match fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => (u64::MAX, meta.rdev(), PathBuf::new()),
        Ok(meta) => (meta.dev(), meta.ino(), PathBuf::new()),
        Err(_) => (
            0,
            0,
            std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        ),
    };
    let mut seen = std::collections::BTreeMap::new();
    for path in paths {
        if let Some(other) = seen.insert(identity(path), path) {
            let (one, two) = (other.display(), path.display());
            return Err(exit::usage(if other == path {
                format!("{one}: given twice")
            } else {
                format!("{one} and {two} are the same device")
            }));
        }
    }
    Ok(())
}

/// Opens, looks at what is there, formats.
fn format(
    paths: &[PathBuf],
    options: &FormatOptions,
    args: &MkfsArgs,
) -> Result<VolumeInfo, CliError> {
    let mode = OpenMode {
        read_only: false,
        direct: true,
        ..OpenMode::default()
    };
    let devices = open_all(paths, mode)
        .map_err(|error| exit::usage(format!("{error}; nothing was written")))?;
    for (device, path) in devices.iter().zip(paths) {
        check_content(device, path, args.force)?;
    }
    let failed = |error: &dyn std::fmt::Display| exit::usage(format!("mkfs failed: {error}"));
    let volume = Volume::format(devices, options).map_err(|error| failed(&error))?;
    if args.discard {
        discard(&volume, args.json);
    }
    crate::format(Arc::clone(&volume)).map_err(|error| failed(&error))?;
    Ok(volume.info())
}

/// Discards what no chunk has: all but the labels, as long as there is no chunk. Devices that
/// cannot do it are no reason to make no file system.
fn discard(volume: &Volume, quiet: bool) {
    // Also what no chunk could use, on a member that is larger than the others.
    let total = volume
        .info()
        .devices
        .iter()
        .map(|device| device.size_bytes)
        .sum();
    let mut progress = (!quiet).then(|| ByteProgress::new(0));
    let mut at = 0;
    while at < total {
        let next = (at + DISCARD_STEP).min(total);
        if let Err(error) = volume.discard_unallocated(at, next) {
            drop(progress);
            return log::warn!("--discard: the devices do not take it: {}", error.kind);
        }
        at = next;
        if let Some(progress) = &mut progress {
            progress.show(at, total, " discarded");
        }
    }
}

fn check_content(device: &Arc<dyn BlockDevice>, path: &Path, force: bool) -> Result<(), CliError> {
    let name = path.display();
    if device.size_bytes() < DEVICE_BYTES_MIN {
        return Err(too_small(&name.to_string(), device.size_bytes()));
    }
    if force {
        return Ok(());
    }
    if let Ok(label) = read_label(path) {
        return Err(exit::usage(format!(
            "{name}: holds member {} of a braidfs file system ({}); --force overwrites it; \
             nothing was written",
            label.device_index, label.fs_uuid
        )));
    }
    if let Some(signature) = foreign_signature(device.as_ref()) {
        return Err(exit::usage(format!(
            "{name}: seems to hold {signature}; --force overwrites it; nothing was written"
        )));
    }
    Ok(())
}

/// Image files made by this run; removed again unless all went well.
#[derive(Default)]
struct NewImages {
    paths: Vec<PathBuf>,
}

impl NewImages {
    fn create(&mut self, path: &Path, size: u64) -> Result<(), CliError> {
        let failed = |error: std::io::Error| {
            exit::usage(format!(
                "{}: cannot be made: {}",
                path.display(),
                io_text(&error)
            ))
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(failed)?;
        self.paths.push(path.to_owned());
        file.set_len(size).map_err(failed)?;
        file.sync_all().map_err(failed)
    }

    fn keep(&mut self) {
        self.paths.clear();
    }
}

impl Drop for NewImages {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = fs::remove_file(path) {
                log::warn!("{}: could not be removed again: {error}", path.display());
            }
        }
    }
}

fn report(args: &MkfsArgs, info: &VolumeInfo) -> Result<(), CliError> {
    let value =
        serde_json::to_value(info).map_err(|error| exit::system(format!("report: {error}")))?;
    if args.json {
        return print::json(&value);
    }
    let mut text = String::new();
    let uuid = value.get("uuid").or_else(|| value.get("fs_uuid"));
    if let Some(uuid) = uuid.and_then(serde_json::Value::as_str) {
        text.push_str(&format!("file system  {uuid}\n"));
    }
    if !args.label.is_empty() {
        text.push_str(&format!("label        {}\n", args.label));
    }
    let unit = parse_size(&args.stripe_unit).unwrap_or(0);
    text.push_str(&format!("stripe unit  {}\n", format_size(unit)));
    text.push_str(&format!("devices      {}\n", display_list(&args.devices)));
    print::text(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(extra: &[&str]) -> MkfsArgs {
        #[derive(clap::Parser)]
        struct Wrapper {
            #[command(flatten)]
            args: MkfsArgs,
        }
        let words = ["mkfs"].iter().chain(extra).chain(["/dev/none"].iter());
        <Wrapper as clap::Parser>::try_parse_from(words)
            .unwrap()
            .args
    }

    #[test]
    fn stripe_units() {
        for (text, bytes) in [("4K", 4096), ("256K", 262_144), ("16M", 16_777_216)] {
            let options = format_options(&args(&["--stripe-unit", text])).unwrap();
            assert_eq!(options.stripe_unit_bytes, bytes);
        }
        for text in ["0", "2K", "6K", "32M", "x", "8192P"] {
            let error = format_options(&args(&["--stripe-unit", text])).unwrap_err();
            assert!(error.message.contains("power of two"), "{text}");
        }
    }

    #[test]
    fn image_sizes() {
        assert_eq!(image_size(&args(&[])), Ok(None));
        assert_eq!(image_size(&args(&["--size", "16M"])), Ok(Some(16 << 20)));
        assert!(
            image_size(&args(&["--size", "1M"]))
                .unwrap_err()
                .message
                .contains("16 MiB")
        );
        assert!(
            image_size(&args(&["--size", "lots"]))
                .unwrap_err()
                .message
                .contains("lots")
        );
    }

    #[test]
    fn labels_have_a_length() {
        assert!(format_options(&args(&["-L", &"x".repeat(LABEL_TEXT_MAX)])).is_ok());
        assert!(format_options(&args(&["-L", &"x".repeat(LABEL_TEXT_MAX + 1)])).is_err());
    }

    #[test]
    fn the_same_device_by_two_names_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (folder.path().join("one"), folder.path().join("two"));
        fs::write(&one, b"").unwrap();
        fs::hard_link(&one, &two).unwrap();
        let error = check_distinct(&[one.clone(), two]).unwrap_err();
        assert!(error.message.contains("same device"));
        assert!(check_distinct(&[one.clone(), one]).is_err());
        let new = folder.path().join("new");
        assert!(check_distinct(&[new.clone(), new]).is_err());
    }

    #[test]
    fn images_are_removed_unless_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut images = NewImages::default();
        images.create(&path, 4096).unwrap();
        assert!(path.exists());
        drop(images);
        assert!(!path.exists());
    }
}
