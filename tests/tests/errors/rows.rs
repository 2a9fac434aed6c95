//! The rows: a command line, the exit code, and what the message must contain.

/// One of them.
pub type Row = (&'static str, i32, &'static str);

/// Wrong usage of the program itself. clap's messages say "error:", ours "braidfs:".
pub const PROGRAM: &[Row] = &[
    ("", 1, "usage"),
    ("frobnicate", 1, "'frobnicate'"),
    ("--no-such-option", 1, "--no-such-option"),
    ("generate-manual", 1, "<dir>"),
    (
        "generate-manual {file}/below",
        1,
        "{file}/below: not a directory",
    ),
];

pub const MKFS: &[Row] = &[
    ("mkfs", 1, "<dev>"),
    ("mkfs --no-such-option {new}", 1, "--no-such-option"),
    (
        "mkfs --stripe-unit 3K {new}",
        1,
        "--stripe-unit 3k: must be a power of two",
    ),
    ("mkfs --stripe-unit 32M {new}", 1, "--stripe-unit 32m"),
    (
        "mkfs --size 1M {new}",
        1,
        "--size 1m: a member needs at least 16 mib",
    ),
    ("mkfs --size much {new}", 1, "--size much: is not a size"),
    (
        "mkfs --label {long} {new}",
        1,
        "--label: 65 bytes; at most 64",
    ),
    ("mkfs {new}:", 1, "a device name is empty"),
    ("mkfs {new}", 1, "{new}: does not exist; --size size makes"),
    (
        "mkfs --size 64M {none}/x",
        1,
        "{none}/x: its directory does not exist",
    ),
    ("mkfs --size 64M {file}/x", 1, "{file}/x: not a directory"),
    (
        "mkfs --size 64M /proc/x.img",
        1,
        "/proc/x.img: cannot be made",
    ),
    (
        "mkfs {folder}",
        1,
        "{folder}: is neither a regular file nor a block device",
    ),
    ("mkfs /dev/null", 1, "/dev/null: is neither"),
    (
        "mkfs {small}",
        1,
        "{small}: 1 mib is too small; a member needs at least 16 mib",
    ),
    ("mkfs {blank} {blank}", 1, "{blank}: given twice"),
    ("mkfs {blank} {twin}", 1, "are the same device"),
    ("mkfs {m0}", 1, "{m0} is in use: it is mounted on {mnt}"),
    ("mkfs {taken}", 1, "{taken} is in use"),
    ("mkfs {v0}", 1, "{v0}: holds member 0 of a braidfs"),
    ("mkfs {foreign}", 1, "{foreign}: seems to hold"),
];

pub const MOUNT: &[Row] = &[
    ("mount", 1, "required"),
    (
        "mount --no-such-option {v0} {folder}",
        1,
        "--no-such-option",
    ),
    (
        "mount {folder}",
        1,
        "{folder}: /etc/fstab has no line of type braidfs",
    ),
    ("mount {v0}: {folder}", 1, "a device name is empty"),
    (
        "mount {v0} {none}",
        32,
        "mount point {none}: no such file or directory",
    ),
    (
        "mount {v0} {file}",
        32,
        "mount point {file}: is not a directory",
    ),
    (
        "mount {none} {folder}",
        32,
        "{none}: no such file or directory",
    ),
    ("mount {folder} {folder}", 32, "{folder}: "),
    (
        "mount {file} {folder}",
        32,
        "{file}: is not a braidfs device (no label)",
    ),
    (
        "mount {foreign} {folder}",
        32,
        "{foreign}: is not a braidfs device",
    ),
    ("mount {v0} {v0} {folder}", 32, "{v0}: given twice"),
    ("mount {v0} {m0} {folder}", 32, "{m0}"),
    (
        "mount {lone} {folder}",
        32,
        "member number 1 of 2 is missing",
    ),
    ("mount {m0} {folder}", 32, "{m0} is in use"),
    ("mount {v0} {mnt}/none", 32, "mount point {mnt}/none"),
    (
        "mount UUID=12 {folder}",
        32,
        "uuid=12: no such file system on",
    ),
    (
        "mount LABEL= {folder}",
        32,
        "label=: no such file system on",
    ),
    (
        "mount UUID=12 {v0} {folder}",
        32,
        "uuid=12: must be given alone",
    ),
    ("mount -o remount,ro {folder}", 32, "{folder}: not mounted"),
    (
        "mount -o remount,ro /proc",
        32,
        "/proc: is not a braidfs mount but proc",
    ),
    ("as:mount.braidfs", 1, "usage"),
    ("as:mount.braidfs {v0}", 1, "<mountpoint>"),
    ("as:mount.braidfs {v0} {folder} -Z", 1, "-z"),
    (
        "as:mount.braidfs {v0} {folder} -N {none}",
        2,
        "namespace {none}: no such file",
    ),
    (
        "as:mount.braidfs {v0} {folder} -N {file}",
        2,
        "namespace {file}: ",
    ),
    (
        "as:mount.braidfs {lone} {folder} -f",
        32,
        "member number 1 of 2 is missing",
    ),
    (
        "as:mount.fuse.braidfs {none} {folder} -o rw",
        32,
        "{none}: no such file",
    ),
];

pub const OPTIONS: &[Row] = &[
    (
        "mount -o bogus {v0} {folder}",
        1,
        "unknown option 'bogus'; nothing was mounted",
    ),
    (
        "mount -o ro,bogus=1 {v0} {folder}",
        1,
        "unknown option 'bogus=1'",
    ),
    (
        "mount -o commit {v0} {folder}",
        1,
        "option 'commit' needs a value",
    ),
    (
        "mount -o commit=0 {v0} {folder}",
        1,
        "'commit=0': expected seconds from 1 to 300",
    ),
    (
        "mount -o cache_size=1M {v0} {folder}",
        1,
        "'cache_size=1m': expected a size from 16 mib",
    ),
    (
        "mount -o backend=magic {v0} {folder}",
        1,
        "expected auto, uring or threads",
    ),
    (
        "mount -o threads=0 {v0} {folder}",
        1,
        "'threads=0': expected 1 to",
    ),
    (
        "mount -o attr_timeout=-1 {v0} {folder}",
        1,
        "'attr_timeout=-1': expected seconds",
    ),
    (
        "mount -o timeout=soon {v0} {folder}",
        1,
        "'timeout=soon': expected seconds",
    ),
    (
        "mount -o device_wait=9999 {v0} {folder}",
        1,
        "'device_wait=9999': expected seconds",
    ),
    (
        "mount -o search=here {v0} {folder}",
        1,
        "'search=here': expected directories, absolute",
    ),
    (
        "mount -o fsname= {v0} {folder}",
        1,
        "'fsname=': expected a name",
    ),
    (
        "mount -o logfile= {v0} {folder}",
        1,
        "'logfile=': expected a file",
    ),
    (
        "mount -o logfile={folder} {v0} {folder}",
        32,
        "option 'logfile': {folder}: ",
    ),
    (
        "mount -o metrics=0.0.0.0:9100 {v0} {folder}",
        1,
        "'metrics=0.0.0.0:9100': expected unix:/path, 127.0.0.1:port or",
    ),
    (
        "mount -o metrics=localhost:9100 {v0} {folder}",
        1,
        "which this machine alone can reach; nothing was mounted",
    ),
    (
        "mount -o metrics {v0} {folder}",
        1,
        "option 'metrics' needs a value",
    ),
    (
        "mount -o metrics=unix:{none}/m.sock {v0} {folder}",
        32,
        "option 'metrics=unix:{none}/m.sock': no such file",
    ),
    (
        "mount -o metrics=unix:{file} {v0} {folder}",
        32,
        "option 'metrics=unix:{file}': address already in use",
    ),
    ("mount -o uid=5 {v0} {folder}", 1, "'uid' is not supported"),
    (
        "mount -o allow_other,allow_root {v0} {folder}",
        1,
        "exclude each other",
    ),
    (
        "mount -o norecovery {v0} {folder}",
        32,
        "option 'norecovery' needs 'ro'",
    ),
    (
        "mount -o user_id=0 {v0} {folder}",
        1,
        "unknown option 'user_id=0'",
    ),
];

pub const UMOUNT: &[Row] = &[
    ("umount", 1, "<mountpoint>"),
    ("umount {folder}", 32, "{folder}: not mounted"),
    ("umount {none}", 32, "{none}: not mounted"),
    ("umount /proc", 32, "/proc: is not a braidfs mount but proc"),
    ("umount {busy}", 32, "{busy} is in use"),
    ("as:umount.braidfs {folder}", 32, "{folder}: not mounted"),
    (
        "as:umount.fuse.braidfs {mnt} -N {none}",
        2,
        "namespace {none}",
    ),
];

pub const FSCK: &[Row] = &[
    ("fsck", 16, "<dev>"),
    ("fsck --no-such-option {v0}", 16, "--no-such-option"),
    ("fsck -n -y {v0}", 16, "cannot be used with"),
    ("fsck -C99 {v0}", 16, "-c 99: not a descriptor to write to"),
    ("fsck -n {v0}:", 16, "a device name is empty"),
    ("fsck -n {none}", 8, "{none}: no such file"),
    ("fsck -n {file}", 8, "{file}: is not a braidfs device"),
    ("fsck -n {lone}", 8, "member number 1 of 2 is missing"),
    ("fsck -n {m0}", 8, "{m0} is in use"),
    ("fsck -n UUID=12", 8, "uuid=12: no such file system"),
    (
        "as:fsck.braidfs -a {file}",
        8,
        "{file}: is not a braidfs device",
    ),
    ("scrub", 16, "<mountpoint|dev>"),
    ("scrub --rate fast {v0}", 16, "--rate fast: is no size"),
    ("scrub --rate 0 {v0}", 16, "--rate 0: is no size"),
    ("scrub --pause --cancel {mnt}", 16, "cannot be used with"),
    (
        "scrub --pause {folder}",
        16,
        "{folder}: no braidfs is mounted there",
    ),
    (
        "scrub --background {v0}",
        16,
        "{v0}: no braidfs is mounted there",
    ),
    (
        "scrub --pause {mnt}",
        8,
        "{mnt}: there is no scrub to pause",
    ),
    ("scrub --resume {mnt}", 8, "{mnt}: there is no scrub"),
    ("scrub {none}", 8, "{none}: no such file"),
    ("scrub {lone}", 8, "member number 1 of 2 is missing"),
];

pub const LOOK: &[Row] = &[
    ("info", 1, "<dev>"),
    ("info {none}", 1, "{none}: no such file"),
    ("info {file}", 1, "{file}: is not a braidfs device"),
    ("info {v0}:", 1, "a device name is empty"),
    ("info {v0} {m0}", 1, "belong to different file systems"),
    (
        "info LABEL=none-has-this",
        1,
        "label=none-has-this: no such file system",
    ),
    ("stats", 1, "<mountpoint>"),
    ("stats {folder}", 1, "{folder}: not mounted"),
    ("stats /proc", 1, "/proc: is not a braidfs mount but proc"),
    ("stats -i 0 {mnt}", 1, "expected seconds from 0.1 to 86400"),
    ("stats -i soon {mnt}", 1, "expected seconds from 0.1"),
    ("stats -c 3 {mnt}", 1, "--interval"),
    ("stats -i 1 -c 0 {mnt}", 1, "'0'"),
    ("stats -i 1 {folder}", 1, "{folder}: not mounted"),
    ("top", 1, "<mountpoint>"),
    ("top -i 0 {mnt}", 1, "expected seconds from 0.1"),
    ("top {folder}", 1, "{folder}: not mounted"),
    ("top /proc", 1, "/proc: is not a braidfs mount but proc"),
    ("trace", 1, "<mountpoint>"),
    ("trace {folder}", 1, "{folder}: not mounted"),
    ("trace /proc", 1, "/proc: is not a braidfs mount but proc"),
    ("trace --op dance {mnt}", 1, "fsync"),
    ("trace --op dance {mnt}", 1, "'dance'"),
    ("trace --for 0 {mnt}", 1, "expected seconds from 0.1"),
    ("trace --count 0 {mnt}", 1, "'0'"),
    ("trace --file {none} {mnt}", 1, "{none}: no such file"),
    (
        "trace --file {file} {mnt}",
        1,
        "{file}: is not in the file system that is mounted at {mnt}",
    ),
    (
        "trace --perfetto {folder} {mnt}",
        1,
        "{folder}: is a directory",
    ),
    ("trace --perfetto {none}/x {mnt}", 1, "{none}/x: no such"),
    ("trace --json --perfetto {new} {mnt}", 1, "--perfetto"),
    ("doctor", 16, "<mountpoint|dev>"),
    ("doctor {v0}:", 16, "a device name is empty"),
    ("doctor {none}", 8, "{none}: no such file"),
    ("doctor {file}", 8, "{file}: is not a braidfs device"),
    ("probe --output other {v0}", 4, "'other'"),
    ("probe {v0}:", 4, "a device name is empty"),
    ("probe {none}", 2, "{none}: label cannot be read"),
    ("probe {damaged}", 2, "{damaged}: label is damaged"),
];

pub const BENCH: &[Row] = &[
    ("bench", 1, "<mountpoint>"),
    ("bench {folder}", 1, "{folder}: not mounted"),
    ("bench /proc", 1, "/proc: is not a braidfs mount but proc"),
    ("bench {mnt} --size 1M", 1, "expected a size from 16 mib to"),
    (
        "bench {mnt} --size much",
        1,
        "expected a size from 16 mib to",
    ),
    ("bench {mnt} --seconds 0", 1, "1..=3600"),
    (
        "bench {mnt} --size 1G",
        1,
        "are free, and 2 gib are needed; use a smaller --size",
    ),
    (
        "bench {mnt} --directory {folder}",
        1,
        "{folder}: is not a directory in {mnt}",
    ),
    (
        "bench {mnt} --directory {none}",
        1,
        "{none}: no such file or directory",
    ),
];

pub const CONTROL: &[Row] = &[
    ("control", 1, "<mountpoint>"),
    ("control {mnt}", 1, "<action>"),
    ("control {mnt} dance", 1, "'dance'"),
    ("control {folder} get", 1, "{folder}: not mounted"),
    (
        "control /proc get",
        1,
        "/proc: is not a braidfs mount but proc",
    ),
    ("control {mnt} thaw", 1, "{mnt}: is not frozen"),
    ("control {mnt} thaw now", 1, "'now' belongs to set"),
    (
        "control {mnt} sync --timeout 5",
        1,
        "--timeout belongs to freeze",
    ),
    ("control {mnt} sync --json", 1, "--json belongs to get"),
    ("control {mnt} freeze --timeout 0", 1, "1..=3600"),
    ("control {mnt} set", 1, "set needs a setting"),
    (
        "control {mnt} set threads=3",
        1,
        "unknown setting 'threads'; there are cache_size, commit and log",
    ),
    (
        "control {mnt} set commit=301",
        1,
        "setting 'commit=301': expected seconds from 1 to 300",
    ),
    (
        "control {mnt} set cache_size",
        1,
        "setting 'cache_size': expected a size",
    ),
    (
        "control {mnt} set cache_size=1M",
        1,
        "{mnt}: cache_size: 1 mib is less than the least",
    ),
    (
        "control {mnt} set cache_size=1G",
        1,
        "{mnt}: cache_size: 1 gib is more than the 16 mib",
    ),
    (
        "control {mnt} set log=loud",
        1,
        "setting 'log=loud': expected error, warn",
    ),
    ("label", 1, "<mountpoint|dev>"),
    ("label {v0}:", 1, "a device name is empty"),
    ("label {none}", 1, "{none}: no such file"),
    ("label {file} x", 1, "{file}: is not a braidfs device"),
    ("label {v0} {long}", 1, "label: 65 bytes; at most 64"),
    ("label {v0} a\tb", 1, "label: has a control character"),
    ("label {lone} x", 1, "member number 1 of 2 is missing"),
    ("label {m0} x", 1, "it is mounted on {mnt}"),
    ("label /proc x", 1, "/proc"),
];
