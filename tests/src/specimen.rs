//! A tree with one of everything that a copy can lose.
//!
//! Made on an ordinary file system and copied onto the volume by the tools under `tree.rs`: holes,
//! hard links, symbolic links, extended attributes, access control lists, odd modes and owners,
//! times to the nanosecond, names of any bytes, special files, sizes around every boundary.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::mkfifo;

use crate::command::Cmd;
use crate::pattern::Random;

/// Sizes around the boundaries of blocks, stripe units and folios.
const SIZES: [usize; 16] = [
    0, 1, 511, 4095, 4096, 4097, 8191, 65_535, 65_536, 65_537, 262_143, 262_145, 1_048_575,
    1_048_576, 1_048_577, 5_000_000,
];

/// Makes the tree in a new folder.
pub fn make(root: &Path) {
    fs::create_dir(root).expect("a new folder");
    let mut random = Random::new(20_011_123);
    make_sizes(&root.join("sizes"), &mut random);
    make_links(&root.join("links"), &mut random);
    make_sparse(&root.join("sparse"), &mut random);
    make_names(&root.join("names"), &mut random);
    make_crowd(&root.join("crowd"));
    make_special(&root.join("special"));
    make_xattrs(&root.join("xattrs"));
    make_acls(&root.join("acls"));
    make_modes(&root.join("modes"));
    make_times(&root.join("times"));
}

fn folder(path: &Path) {
    fs::create_dir(path).expect("a folder of the specimen");
}

fn file(path: &Path, data: &[u8]) {
    fs::write(path, data).expect("a file of the specimen");
}

fn make_sizes(dir: &Path, random: &mut Random) {
    folder(dir);
    for size in SIZES {
        file(&dir.join(format!("size-{size}")), &random.bytes(size));
    }
}

fn make_links(dir: &Path, random: &mut Random) {
    for sub in ["", "a", "b", "c"] {
        folder(&dir.join(sub));
    }
    for group in 0..50 {
        let first = dir.join(format!("a/hard-{group}"));
        file(&first, &random.bytes(1000 * group));
        for copy in 0..=group % 5 {
            let sub = ["a", "b", "c"][copy % 3];
            let link = dir.join(sub).join(format!("hard-{group}-{copy}"));
            fs::hard_link(&first, link).expect("a hard link");
        }
    }
    let long = "d/".repeat(2000);
    let targets = [
        "a/hard-3",
        "../links/b",
        "/nowhere/at/all",
        "loop",
        ".",
        "a b\tc",
        &long,
    ];
    for (index, target) in targets.iter().enumerate() {
        symlink(target, dir.join(format!("sym-{index}"))).expect("a symbolic link");
    }
    symlink("loop", dir.join("loop")).expect("a symbolic link");
    chown_link(&dir.join("loop"), 1234);
}

fn chown_link(path: &Path, id: u32) {
    std::os::unix::fs::lchown(path, Some(id), Some(id)).expect("chown of a link");
}

fn make_sparse(dir: &Path, random: &mut Random) {
    const MIB: u64 = 1 << 20;
    folder(dir);
    let cases: [(&str, u64, &[u64]); 5] = [
        ("only-a-hole", 2048 * MIB, &[]),
        ("hole-first", 256 * MIB, &[255 * MIB]),
        ("hole-last", 256 * MIB, &[0]),
        (
            "islands",
            128 * MIB,
            &[3 * MIB, 77 * MIB, 78 * MIB, 100 * MIB + 65_536],
        ),
        ("odd-end", 50 * MIB + 123, &[20 * MIB]),
    ];
    for (name, len, islands) in cases {
        let file = File::create(dir.join(name)).expect("a sparse file");
        file.set_len(len).expect("the size of a sparse file");
        for at in islands {
            file.write_all_at(&random.bytes(200_000), *at)
                .expect("data in a sparse file");
        }
    }
}

fn make_names(dir: &Path, random: &mut Random) {
    folder(dir);
    let long = "n".repeat(255).into_bytes();
    let names: [&[u8]; 12] = [
        b"with space",
        b"-dash",
        b"new\nline",
        b"tab\t",
        b"quote'\"",
        b"back\\slash",
        b"star*?",
        b".hidden",
        b"trailing.",
        b"\xff\xfe not utf-8",
        "\u{e4}\u{f6}\u{fc}\u{1f9f5}".as_bytes(),
        &long,
    ];
    for name in names {
        file(
            &dir.join(OsString::from_vec(name.to_vec())),
            &random.bytes(64),
        );
    }
    let mut deep = dir.join("deep");
    for level in 0..60 {
        deep.push(format!("level-{level}"));
    }
    fs::create_dir_all(&deep).expect("deep folders");
    file(&deep.join("bottom"), b"here");
}

/// Many small files in one folder.
fn make_crowd(dir: &Path) {
    folder(dir);
    for index in 0..3000 {
        file(
            &dir.join(format!("member-{index:05}")),
            format!("number {index}\n").as_bytes(),
        );
    }
    folder(&dir.join("empty"));
}

fn make_special(dir: &Path) {
    folder(dir);
    mkfifo(&dir.join("fifo"), Mode::from_bits_truncate(0o640)).expect("a fifo");
    let nodes = [
        ("null", SFlag::S_IFCHR, 1, 3),
        ("block", SFlag::S_IFBLK, 259, 70_000),
    ];
    for (name, kind, major, minor) in nodes {
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&dir.join(name), kind, mode, makedev(major, minor)).expect("a device node");
    }
}

fn make_xattrs(dir: &Path) {
    folder(dir);
    let path = dir.join("file");
    file(&path, b"has attributes");
    let sub = dir.join("folder");
    folder(&sub);
    let long = "v".repeat(1500);
    let values = [
        ("user.short", "1"),
        ("user.empty", ""),
        ("user.long", &*long),
    ];
    for target in [&path, &sub] {
        for (name, value) in values {
            setfattr(target, name, value);
        }
        setfattr(target, "trusted.braid", "only root sees this");
    }
    for index in 0..20 {
        setfattr(&path, &format!("user.number-{index}"), &"x".repeat(index));
    }
    // cap_net_raw as a file capability (version 2), in the form the kernel keeps.
    let capable = dir.join("capable");
    file(&capable, b"#!/bin/true\n");
    setfattr(
        &capable,
        "security.capability",
        "0x0100000200200000000000000000000000000000",
    );
}

fn setfattr(path: &Path, name: &str, value: &str) {
    Cmd::new("setfattr")
        .args(["-n", name, "-v", value])
        .arg(path)
        .quiet()
        .ok();
}

fn make_acls(dir: &Path) {
    folder(dir);
    let path = dir.join("file");
    file(&path, b"has an access control list");
    Cmd::new("setfacl")
        .args(["-m", "u:1234:rw,g:99:r,m::rw"])
        .arg(&path)
        .quiet()
        .ok();
    let sub = dir.join("folder");
    folder(&sub);
    Cmd::new("setfacl")
        .args(["-m", "u:1234:rwx,d:u:1234:rx,d:g:7:w"])
        .arg(&sub)
        .quiet()
        .ok();
    file(&sub.join("inherits"), b"a default list was applied");
}

fn make_modes(dir: &Path) {
    folder(dir);
    for mode in [
        0o000, 0o111, 0o400, 0o444, 0o600, 0o755, 0o777, 0o2755, 0o4755, 0o7777,
    ] {
        let path = dir.join(format!("mode-{mode:04o}"));
        file(&path, b"mode");
        chown(&path, Some(mode + 7), Some(4_294_967_293 - mode)).expect("chown");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
    }
    for mode in [0o1777, 0o2775, 0o700, 0o000] {
        let path = dir.join(format!("folder-{mode:04o}"));
        folder(&path);
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
    }
}

fn make_times(dir: &Path) {
    folder(dir);
    // Before 1970, the epoch, every nanosecond digit, after 2038.
    let moments: [(i64, i64); 6] = [
        (-1_000_000_000, 1),
        (0, 0),
        (1, 999_999_999),
        (1_234_567_890, 123_456_789),
        (1_700_000_000, 1_000),
        (5_000_000_000, 987_654_321),
    ];
    let mut made: Vec<(PathBuf, TimeSpec)> = Vec::new();
    for (index, (secs, nanos)) in moments.into_iter().enumerate() {
        let time = TimeSpec::new(secs, nanos);
        let paths = ["file", "folder", "link"].map(|kind| dir.join(format!("{kind}-{index}")));
        file(&paths[0], b"time");
        folder(&paths[1]);
        symlink("file-0", &paths[2]).expect("a symbolic link");
        made.extend(paths.map(|path| (path, time)));
    }
    for (path, time) in made {
        let flag = UtimensatFlags::NoFollowSymlink;
        utimensat(AT_FDCWD, &path, &time, &time, flag).expect("set times");
    }
}
