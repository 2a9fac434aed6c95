//! Rules of the house that a program can check: what may depend on what, where `unsafe` may be,
//! how long a file may get.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use braidfs_tests::env::project_root;

const COLUMNS_MAX: usize = 100;
const LINES_MAX: usize = 800;

/// The files in which `unsafe` may be written, and what for.
const UNSAFE_ALLOWED: &[(&str, &str)] = &[
    (
        "blockdev/examples/chain_bench.rs",
        "counts what the allocator is asked for",
    ),
    (
        "blockdev/src/chain.rs",
        "links of a chain are raw pointers into its pool",
    ),
    (
        "blockdev/src/device/bytes.rs",
        "the bytes behind an I/O vector",
    ),
    (
        "blockdev/src/device/file.rs",
        "ioctl on block devices, scattered reads and writes",
    ),
    (
        "blockdev/src/device/uring.rs",
        "submissions that point to kiobufs in flight",
    ),
    (
        "blockdev/src/device/uring/fixed.rs",
        "buffers and files registered with the ring",
    ),
    (
        "blockdev/src/pages.rs",
        "page vectors that a device reads and writes",
    ),
    (
        "blockdev/tests/loom.rs",
        "page vectors that the model watches",
    ),
    (
        "blockdev/tests/open.rs",
        "page vectors over a test's own buffer",
    ),
    (
        "blockdev/tests/schedules.rs",
        "page vectors over a test's own buffer",
    ),
    (
        "cache/src/arena.rs",
        "the arena: memory shared with devices",
    ),
    (
        "cache/src/frame_vec.rs",
        "frames of the arena as page vectors",
    ),
    (
        "cache/src/prefault.rs",
        "the priority of the thread that touches the arena",
    ),
    (
        "fs/src/cli/descriptors.rs",
        "descriptors that the caller left open",
    ),
    (
        "fs/src/fuse/attach.rs",
        "adopts the descriptor that fusermount3 passes, clones the connection",
    ),
    (
        "fs/tests/allocations.rs",
        "counts what the allocator is asked for",
    ),
];

/// Where words that only look like the thing are at home.
const THIS_FILE: &str = "tests/tests/tidy.rs";

/// Files that people wrote, by name relative to the project's top.
fn files(extensions: &[&str]) -> Vec<(String, String)> {
    let root = project_root();
    let mut found = Vec::new();
    let parts = ["blockdev", "cache", "fs", "tests", "scripts", ".ci"].map(|dir| root.join(dir));
    let mut pending: Vec<PathBuf> = parts.into_iter().filter(|dir| dir.is_dir()).collect();
    let top = fs::read_dir(root)
        .expect("list the project")
        .flatten()
        .map(|entry| entry.path());
    let top: Vec<PathBuf> = top.filter(|path| path.is_file()).collect();
    let mut take = |path: &Path| {
        let extension = path
            .extension()
            .map_or("", |word| word.to_str().unwrap_or(""));
        if extensions.contains(&extension) {
            let name = path
                .strip_prefix(root)
                .expect("below the top")
                .display()
                .to_string();
            let text = fs::read(path).expect("read a file of the project");
            found.push((name, String::from_utf8_lossy(&text).into_owned()));
        }
    };
    top.iter()
        .filter(|path| !is_generated(path))
        .for_each(|path| take(path));
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir)
            .expect("list a folder of the project")
            .flatten()
        {
            let path = entry.path();
            if path.is_dir() {
                if path.file_name().is_none_or(|name| name != "target") {
                    pending.push(path);
                }
            } else {
                take(&path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty());
    found
}

fn is_generated(path: &Path) -> bool {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let name = name.unwrap_or_default();
    name == "Cargo.lock" || name.starts_with("LICENSE")
}

fn rust_files() -> Vec<(String, String)> {
    files(&["rs"])
}

/// Fails with all complaints at once.
fn expect_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// A line without its comment and without what is between double quotes.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let (mut quoted, mut escaped) = (false, false);
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        if quoted {
            match char {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => quoted = false,
                _ => {}
            }
        } else if char == '"' {
            quoted = true;
        } else if char == '/' && chars.peek() == Some(&'/') {
            break;
        } else {
            code.push(char);
        }
    }
    code
}

fn has_word(code: &str, word: &str) -> bool {
    let is_name = |char: char| char.is_alphanumeric() || char == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].ends_with(is_name) && !code[at + word.len()..].starts_with(is_name)
    })
}

#[test]
fn text_is_ascii_and_fits_the_width() {
    let mut complaints = Vec::new();
    for (name, text) in files(&["rs", "c", "toml", "sh", "md", ""]) {
        let wide_is_fine = name.ends_with(".md");
        for (number, line) in (1..).zip(text.lines()) {
            if !line.is_ascii() {
                complaints.push(format!("{name}:{number}: not ASCII"));
            }
            if line.chars().count() > COLUMNS_MAX && !wide_is_fine && !name.ends_with(".toml") {
                complaints.push(format!(
                    "{name}:{number}: longer than {COLUMNS_MAX} columns"
                ));
            }
            if line.ends_with([' ', '\t']) {
                complaints.push(format!("{name}:{number}: blanks at the end"));
            }
        }
    }
    expect_none(&complaints);
}

#[test]
fn no_file_is_too_long() {
    let long = |(name, text): &(String, String)| {
        let lines = text.lines().count();
        (lines > LINES_MAX).then(|| format!("{name}: {lines} lines, at most {LINES_MAX}"))
    };
    expect_none(&rust_files().iter().filter_map(long).collect::<Vec<_>>());
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent = |(name, text): &(String, String)| {
        (!text.starts_with("//!")).then(|| format!("{name}: does not open with `//!`"))
    };
    expect_none(&rust_files().iter().filter_map(silent).collect::<Vec<_>>());
}

#[test]
fn nothing_is_left_to_do_and_no_test_is_switched_off() {
    let mut complaints = Vec::new();
    for (name, text) in rust_files().iter().filter(|(name, _)| name != THIS_FILE) {
        for (number, line) in (1..).zip(text.lines()) {
            let code = code_of(line);
            for banned in ["todo!", "unimplemented!", "dbg!", "#[ignore"] {
                if code.contains(banned) {
                    complaints.push(format!("{name}:{number}: {banned}"));
                }
            }
        }
    }
    expect_none(&complaints);
}

#[test]
fn unsafe_is_rare_and_argued() {
    let mut complaints = Vec::new();
    let mut used = BTreeSet::new();
    for (name, text) in rust_files() {
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            let code = code_of(line);
            if !has_word(&code, "unsafe") {
                continue;
            }
            if UNSAFE_ALLOWED.iter().all(|(allowed, _)| *allowed != name) {
                complaints.push(format!(
                    "{name}:{}: `unsafe` outside allowed files",
                    index + 1
                ));
            }
            used.insert(name.clone());
            let is_block = code.contains("unsafe {") || code.contains("unsafe impl");
            // The note stands above the statement, which may begin some lines earlier.
            let above = &lines[index.saturating_sub(8)..=index];
            if is_block && !above.iter().any(|line| line.contains("SAFETY:")) {
                complaints.push(format!("{name}:{}: no SAFETY note", index + 1));
            }
        }
    }
    for (name, _) in UNSAFE_ALLOWED
        .iter()
        .filter(|(name, _)| !used.contains(*name))
    {
        complaints.push(format!(
            "{name}: allowed to be unsafe, and is not: strike it"
        ));
    }
    expect_none(&complaints);
}

/// Names that a manifest depends on, in any of its tables.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut in_dependencies = false;
    let mut names = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            in_dependencies = line.contains("dependencies]");
        } else if in_dependencies && !line.trim().is_empty() && !line.starts_with('#') {
            let end = line.find(['.', '=', ' ']).unwrap_or(line.len());
            names.push(line[..end].to_owned());
        }
    }
    names
}

#[test]
fn layers_depend_downwards_only() {
    let manifest = |dir: &str| {
        let path = project_root().join(dir).join("Cargo.toml");
        dependencies(&fs::read_to_string(path).expect("a manifest"))
    };
    let forbidden = [
        (
            "blockdev",
            &["braidfs", "braidfs-cache", "braidfs-tests", "redb"][..],
        ),
        (
            "cache",
            &["braidfs", "braidfs-tests", "redb", "io-uring"][..],
        ),
        ("fs", &["braidfs-tests", "io-uring"][..]),
    ];
    for (dir, names) in forbidden {
        let has = manifest(dir);
        assert!(!has.is_empty(), "{dir} depends on nothing?");
        for name in names {
            assert!(
                !has.iter().any(|found| found == name),
                "{dir} must not depend on {name}"
            );
        }
    }
    let has = |dir: &str, name: &str| manifest(dir).iter().any(|found| found == name);
    assert!(has("cache", "braidfs-blockdev") && has("fs", "braidfs-cache"));
}

#[test]
fn io_uring_stays_in_its_corner() {
    let corners = [("io_uring::", &["blockdev/src/device/uring"][..])];
    let mut complaints = Vec::new();
    for (name, text) in rust_files().iter().filter(|(name, _)| name != THIS_FILE) {
        for (number, line) in (1..).zip(text.lines()) {
            let code = code_of(line);
            for (word, homes) in corners {
                let at_home = homes.iter().any(|home| name.starts_with(home));
                if code.contains(word) && !at_home {
                    complaints.push(format!("{name}:{number}: {word} outside {homes:?}"));
                }
            }
        }
    }
    expect_none(&complaints);
}

#[test]
fn scripts_stop_at_errors_and_explain_themselves() {
    for name in [
        "scripts/bench",
        "scripts/campaign",
        "scripts/fuzz",
        "scripts/install",
        "scripts/mutants",
        "scripts/quickstart",
        "scripts/test",
        "scripts/xfstests",
        ".ci/run",
    ] {
        let text = fs::read_to_string(project_root().join(name)).expect("a script");
        assert!(
            text.contains("set -euo pipefail"),
            "{name} goes on after errors"
        );
        if name.starts_with("scripts/") {
            assert!(text.contains("--help"), "{name} has no --help");
        }
    }
}

#[test]
fn the_checks_see_what_they_look_for() {
    assert_eq!(
        code_of("let a = \"unsafe { // \\\" }\"; // unsafe"),
        "let a = ; "
    );
    assert!(has_word("unsafe { x }", "unsafe"));
    assert!(!has_word("unsafe_code", "unsafe"));
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na.workspace = true\nb = \"1\"\n\
                    [target.'cfg(loom)'.dependencies]\nloom.workspace = true\n[lints]\nz = 1\n";
    assert_eq!(dependencies(manifest), ["a", "b", "loom"]);
}
