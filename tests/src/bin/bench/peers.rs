//! Who is measured, and whether that can be done here.

use std::fs;
use std::path::PathBuf;

use braidfs_tests::env::find_program;

use crate::media::Kind as MediaKind;

/// Kinds of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The devices themselves, as one stripe set of fio's making.
    Raw,
    /// The null server, with FOPEN_DIRECT_IO or the kernel's write-back cache.
    Null { kernel_cache: bool },
    /// braidfs with mount options.
    Braidfs { options: String },
    /// `-d raid0 -m raid1` on all devices.
    Btrfs,
    /// On one device.
    Xfs,
    /// On one device.
    Ext4,
    /// ext4 through FUSE, on one device.
    Fuse2fs,
    /// libfuse's example, over a tmpfs.
    Passthrough,
}

/// Somebody to measure.
#[derive(Clone, Debug)]
pub struct Peer {
    /// As on the command line and in the tables.
    pub name: String,
    pub kind: Kind,
}

/// All that can be named on the command line, and what each is.
pub const NAMES: &[(&str, &str)] = &[
    ("raw", "the devices, striped by fio"),
    ("null", "the null FUSE server with FOPEN_DIRECT_IO"),
    (
        "null-wb",
        "the null FUSE server with the kernel's write-back cache",
    ),
    (
        "braidfs",
        "braidfs with its default options, on all devices",
    ),
    (
        "btrfs",
        "the kernel's btrfs, data raid0 and metadata raid1, on all devices",
    ),
    ("xfs", "the kernel's XFS on one device"),
    (
        "ext4",
        "the kernel's ext4 on one device (not among the default peers)",
    ),
    ("fuse2fs", "ext4 through FUSE on one device"),
    ("passthrough", "libfuse's passthrough_ll over a tmpfs"),
];

impl Peer {
    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        let kind = match name {
            "raw" => Kind::Raw,
            "null" => Kind::Null {
                kernel_cache: false,
            },
            "null-wb" => Kind::Null { kernel_cache: true },
            "braidfs" => Kind::Braidfs {
                options: String::new(),
            },
            "btrfs" => Kind::Btrfs,
            "xfs" => Kind::Xfs,
            "ext4" => Kind::Ext4,
            "fuse2fs" => Kind::Fuse2fs,
            "passthrough" => Kind::Passthrough,
            _ => return None,
        };
        Some(Self {
            name: name.to_owned(),
            kind,
        })
    }

    /// braidfs with options of the user's choice: a column of its own.
    pub fn with_options(options: &str) -> Self {
        Self {
            name: format!("braidfs:{options}"),
            kind: Kind::Braidfs {
                options: options.to_owned(),
            },
        }
    }

    /// Why it cannot be measured here, if so.
    pub fn obstacle(&self, programs: &Programs) -> Option<String> {
        let needs = |tool: &str, package: &str| {
            let missing = find_program(tool).is_none();
            missing.then(|| format!("{tool} is missing (apt-get install {package})"))
        };
        let kernel = |name: &str| {
            let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
            let missing = known.split_whitespace().all(|word| word != name);
            missing.then(|| format!("this kernel does not know {name} (modprobe {name})"))
        };
        match self.kind {
            Kind::Raw | Kind::Braidfs { .. } => None,
            Kind::Null { .. } => programs
                .null
                .is_none()
                .then(|| "it is not built".to_owned()),
            Kind::Btrfs => needs("mkfs.btrfs", "btrfs-progs").or_else(|| kernel("btrfs")),
            Kind::Xfs => needs("mkfs.xfs", "xfsprogs").or_else(|| kernel("xfs")),
            Kind::Ext4 => needs("mkfs.ext4", "e2fsprogs").or_else(|| kernel("ext4")),
            Kind::Fuse2fs => {
                needs("fuse2fs", "fuse2fs").or_else(|| needs("mkfs.ext4", "e2fsprogs"))
            }
            Kind::Passthrough => programs
                .passthrough
                .is_none()
                .then(|| "passthrough_ll is not built (libfuse3-dev has its source)".to_owned()),
        }
    }

    pub fn is_braidfs(&self) -> bool {
        matches!(self.kind, Kind::Braidfs { .. })
    }

    pub fn is_null(&self) -> bool {
        matches!(self.kind, Kind::Null { .. })
    }
}

/// The programs that are started.
#[derive(Clone, Debug)]
pub struct Programs {
    pub braidfs: PathBuf,
    pub null: Option<PathBuf>,
    pub passthrough: Option<PathBuf>,
}

/// Whether a peer can be measured on media of a kind.
pub fn fits(peer: &Peer, media: MediaKind) -> Result<(), &'static str> {
    match (media, &peer.kind) {
        (MediaKind::Throttled, Kind::Raw | Kind::Braidfs { .. }) => Ok(()),
        (MediaKind::Throttled, _) => {
            Err("the throttle only limits the I/O of a process of its own")
        }
        (MediaKind::Disk, Kind::Null { .. } | Kind::Passthrough) => {
            Err("it does not use the media; see tmpfs")
        }
        _ => Ok(()),
    }
}
