//! What man pages say that the definitions of the commands do not. Paragraphs are separated by
//! empty lines; an indented one is an example.

/// Mount options with their values, and what they mean.
pub const MOUNT_OPTIONS: &[(&str, &str)] = &[
    ("ro", "Read-only: nothing at all is written to the devices."),
    (
        "rw",
        "Rather fail than fall back to reading, where a member is write-protected. \
         (mount(8) says rw to its helpers in any case, so there it does not insist.)",
    ),
    (
        "cache_size=SIZE",
        "Memory of the page cache, from 16M to the memory there is. The daemon stays below this \
         plus 256 MiB. Default: a quarter of the memory, between 64M and 1G.",
    ),
    (
        "commit=SECONDS",
        "How much a crash may cost of what was not fsynced: 1 to 300, 5 by default.",
    ),
    (
        "timeout=SECONDS",
        "How long a device may take to answer a request before that fails with EIO; \
         0: as long as it likes. Default: 30.",
    ),
    (
        "sync, dirsync",
        "Every write, and every change of names, is durable before it returns.",
    ),
    ("async", "Undoes sync."),
    (
        "relatime, noatime, strictatime, nodiratime",
        "Access times, as in mount(8). Default: relatime.",
    ),
    (
        "atime, diratime, nostrictatime, norelatime",
        "The opposite of the option without, or with, no.",
    ),
    (
        "cache=auto",
        "Who only reads a file does so through the kernel's cache, who may write it goes past \
         that: fast for reading, and for large writes. This is the default.",
    ),
    (
        "cache=writeback, writeback_cache, kernel_cache",
        "The kernel caches writes, too: best for tiny buffered writes, slower for large ones. \
         Errors come late, and bytes reach braidfs when the kernel hands them over.",
    ),
    (
        "cache=direct, direct_io",
        "File data is cached by braidfs only.",
    ),
    (
        "allow_other, noallow_other, allow_root",
        "Whether users other than who mounted are let in. As root all are by default; for others \
         /etc/fuse.conf must say user_allow_other. Permissions are always checked.",
    ),
    (
        "discard, nodiscard",
        "Give freed space back to the devices, or punch holes into image files. Default: off.",
    ),
    (
        "backend=auto|uring|threads",
        "How devices are driven. auto: by io_uring where that works.",
    ),
    ("nodirect", "Go through the kernel's cache of the devices."),
    ("threads=N", "Threads that read requests from the kernel."),
    (
        "attr_timeout=SECONDS",
        "How long the kernel may trust names and attributes without asking.",
    ),
    (
        "logfile=FILE",
        "Where the background daemon logs. Default: the journal or syslog.",
    ),
    (
        "metrics=ADDRESS",
        "Serves metrics for Prometheus by HTTP (GET /metrics): at unix:/PATH, a socket for its \
         user alone, or at 127.0.0.1:PORT or [::1]:PORT, for everybody on this machine, and nobody \
         else.",
    ),
    (
        "nofail",
        "Devices, or members, that are not there are no error: nothing is mounted, and the exit \
         code is 0.",
    ),
    (
        "device_wait=SECONDS",
        "How long to wait for members that are not there yet, up to 3600. Default: 0.",
    ),
    (
        "search=DIR:...",
        "Directories in which members may lie as image files, besides those of the members given.",
    ),
    (
        "norecovery, noload",
        "With ro: what a read-only mount does anyway; recovery after a crash stays in memory.",
    ),
    (
        "remount",
        "With ro, rw, nosuid, nodev, noexec and access times: changes a mount that exists.",
    ),
    (
        "fsname=NAME, subtype=NAME",
        "What the mount table shows as source and type, in place of the devices and braidfs.",
    ),
];

/// Options that are meant for others, or go without saying.
pub const GENERAL_OPTIONS: &str = "\
nosuid, suid, nodev, dev, noexec, exec: as in mount(8). user, users, owner and group imply the \
first of each, as there.

Understood, and without effect on the daemon, since mount(8) and others who read fstab act on \
them, or since they are always on: defaults, auto, noauto, user=NAME, nouser, nousers, noowner, \
nogroup, _netdev, comment=TEXT, helper=, uhelper=, x-..., X-..., default_permissions, lazytime, \
nolazytime, iversion, noiversion, mand, nomand, silent, loud, symfollow, nosymfollow, big_writes, \
auto_cache, noauto_cache. On a remount also what the mount table shows of any FUSE mount: \
user_id=, group_id=, max_read=, blksize=.

uid= and gid= are refused: each file keeps its owner.";

/// Sections of braidfs(5) before the mount options.
pub const VOLUME: &[(&str, &str)] = &[
    (
        "DESCRIPTION",
        "\
A braidfs lies on one or several members: block devices, partitions or image files. Files are \
striped over all of them; every block of data has a checksum; metadata has two copies, on \
different members where there are two. A member that is lost takes the data with it.

Each member carries a label, in two copies, at byte 0 and at 512 KiB: the UUID of the file \
system, its name, the UUID of the member, its number, how many there are, and whether the volume \
was closed properly. braidfs-probe(1) and braidfs-info(1) show it.",
    ),
    (
        "DEVICES",
        "\
Members are given as several words, as DEV:DEV:... in one word, or as UUID=... or LABEL=... of \
the file system. One member is enough where the others can be found: in the directory of a member \
that is given, among all block devices, in the directories of the option search. A word with a \
colon that exists as it stands is one path. Devices that others are made of (multipath, software \
RAID, the device mapper) are passed over.

mount(8) and systemd translate UUID= and LABEL= by themselves, with the links in /dev/disk that \
udev makes with the rule that comes with braidfs. Where there is no udev, write uuid= or label=: \
mount(8) passes these on.",
    ),
    (
        "FSTAB",
        "\
The type is braidfs or fuse.braidfs:

    /dev/sdb:/dev/sdc  /srv/tree    braidfs  noatime,nofail          0 2
    LABEL=scratch      /srv/scratch braidfs  defaults                0 2
    /home/a/0.img      /home/a/tree braidfs  user,noauto             0 0
    label=images       /srv/images  braidfs  search=/data/0:/data/1  0 0

With the option user, mount(8) lets the user mount it with the user's own rights, by fusermount3: \
the devices must be the user's to read and write, and the mount point too.

The last column may be 2: fsck(8) then has fsck.braidfs look at it at boot. It says at once \
whether mounting will recover, and no more.

As a service: give the line of /srv/tree the option noauto, and enable braidfs@srv-tree.service. \
The service has begun when the mount can be used, and has ended when all data is safe.",
    ),
];

/// Description of the program.
pub const OVERVIEW: &str = "\
braidfs makes one file system out of several devices or image files, in user space, through FUSE. \
Files are striped over all members, every block has a checksum, metadata is kept twice, and after \
a crash the next mount needs no repair.

The program answers to the names mount.braidfs, umount.braidfs, mkfs.braidfs and fsck.braidfs \
too, under which mount(8), umount(8), mkfs(8) and fsck(8) look for helpers. Mount options and \
fstab are explained in braidfs(5).";

/// Environment of the program.
pub const ENVIRONMENT: &str = "\
BRAIDFS_LOG: error, warn (the default), info, debug or trace: what is logged.

NOTIFY_SOCKET: set by a service manager; it is told when the mount is usable, and when the end \
begins.";

/// Signals that a daemon knows.
pub const SIGNALS: &str = "\
SIGTERM, SIGINT: unmounts, writes everything back, and ends; while the mount is in use it leaves \
the tree at once. A second one ends the connection, whoever uses it.

SIGUSR1: logs a summary of what was done, whatever the level of logging is.";

/// Files that the program uses.
pub const FILES: &str = "\
/etc/fstab: what is mounted where.

/run/braidfs, or braidfs in the user's XDG_RUNTIME_DIR: the private sockets by which the commands \
talk to the daemons.

/dev/log: where a background daemon logs.";

/// Exit codes of a command.
pub fn exit_status(verb: &str) -> &'static str {
    match verb {
        "mount" => {
            "0: mounted, or excused by nofail. 1: wrong usage, also an option that is unknown or \
             impossible. 2: the system refused something. 32: the mount failed."
        }
        "umount" => {
            "0: unmounted, and all data is safe. 1: wrong usage. 2: the system refused something. \
             32: the unmount failed, or not all data could be written."
        }
        "fsck" | "scrub" => {
            "0: clean. 1: errors were repaired. 4: errors are left. 8: could not be done. 16: \
             wrong usage. 32: stopped by a signal, paused or canceled."
        }
        "bench" => {
            "0: measured. 1: wrong usage, or it cannot be reached. 2: the system refused \
             something. 128 + N: ended by signal N."
        }
        "doctor" => "0: nothing. 4: something. 8: could not look. 16: wrong usage.",
        "probe" => "0: at least one member was found. 2: none. 4: wrong usage.",
        _ => "0: done. 1: an error, which the message names. 2: the system refused something.",
    }
}

/// Text for roff: what it would take for its own is escaped.
pub fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    match text.starts_with(['.', '\'']) {
        true => format!("\\&{text}"),
        false => text,
    }
}
