//! What the tests of this package share.
//!
//! The tests drive the `braidfs` program from outside, as a user does: image files or loop
//! devices, `mkfs`, `mount`, ordinary tools, `umount`. One program per theme lives in `tests/`;
//! each lists its tests and hands them to [`runner::main`].
//!
//! | to find | open |
//! | --- | --- |
//! | how a test is started, limited in time, skipped, counted, cleaned up after | `runner.rs` |
//! | running a program with a time limit | `command.rs` |
//! | the folder, the binary and the tools a test has | `env.rs` |
//! | a volume: images, mkfs, mount, umount, kill, stats | `volume.rs` |
//! | the daemon's process: finding, memory, killing | `daemon.rs` |
//! | loop devices and throttles | `loopdev.rs`, `throttle.rs` |
//! | helpers, fstab and links as on an administrator's machine | `machine.rs` |
//! | a user who is not root | `ordinary.rs` |
//! | reading `stats --json` and `info --json` | `report.rs` |
//! | data that says where it belongs | `pattern.rs` |
//! | making and comparing trees | `specimen.rs`, `source_tree.rs`, `compare.rs` |
//! | a terminal and its user | `terminal.rs` |
//! | a SQLite writer and its database | `sqlite.rs` |
//! | other processes, a line at a time | `peer.rs` |
//!
//! Environment: `BRAIDFS_BIN` (the program under test), `BRAIDFS_TEST_DIR` (where images go),
//! `BRAIDFS_TEST_KEEP=1` (leave a failed test's folder), `SEED` (replays a randomised test),
//! `STRESS_SECONDS`, `STRESS_FILES`, `DIRECTORY_ENTRIES`, `KILL_ROUNDS`, `CRASHCHECK_STATES`,
//! `CRASHCHECK_SECONDS` (do more than by default).
#![forbid(unsafe_code)]

pub mod command;
pub mod compare;
pub mod daemon;
pub mod env;
pub mod loopdev;
pub mod machine;
pub mod ordinary;
pub mod pattern;
pub mod peer;
pub mod report;
pub mod runner;
pub mod source_tree;
pub mod specimen;
pub mod sqlite;
pub mod terminal;
pub mod throttle;
pub mod volume;
