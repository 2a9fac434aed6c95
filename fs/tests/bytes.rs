//! Property test: whatever is done to the bytes of one file, and in whatever order, they are those
//! of a `Vec<u8>` to which the same was done.
//!
//! The file system is mounted once for many cases, a case has a file of its own. Ranges are drawn
//! so that their ends fall on page borders, next to them, and in between. Proptest shrinks what
//! fails.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use braidfs::{FileSystem, MountOptions, OpenFile, ROOT_INO, SetAttr};
use braidfs_blockdev::SimDevice;
use common::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const PAGE: usize = 4096;

/// No file gets longer: enough for direct I/O, which wants 64 KiB at least.
const PAGES_MAX: usize = 40;

/// Cases, unless `PROPTEST_CASES` says otherwise.
const CASES: u32 = 3000;

#[derive(Clone, Debug)]
enum Step {
    Write { at: usize, len: usize, direct: bool },
    Truncate { size: usize },
    Fallocate { mode: i32, at: usize, len: usize },
    Copy { from: usize, to: usize, len: usize },
    Read { at: usize, len: usize, direct: bool },
    Sync,
    Remount,
}

/// A place in the file: near a page border, or anywhere.
fn place() -> impl Strategy<Value = usize> {
    let near = (0..PAGES_MAX, -2_i32..3);
    let near = near.prop_map(|(page, by)| (page * PAGE).saturating_add_signed(by as isize));
    prop_oneof![3 => near, 1 => 0..PAGES_MAX * PAGE]
}

fn len() -> impl Strategy<Value = usize> {
    let pages = |most: usize| (1..most).prop_map(|pages| pages * PAGE);
    prop_oneof![3 => 1..3 * PAGE, 2 => pages(4), 1 => pages(PAGES_MAX / 2)]
}

fn step() -> impl Strategy<Value = Step> {
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    let modes = prop::sample::select(vec![
        0,
        keep,
        libc::FALLOC_FL_PUNCH_HOLE | keep,
        libc::FALLOC_FL_ZERO_RANGE,
        libc::FALLOC_FL_ZERO_RANGE | keep,
    ]);
    let copy = (place(), place(), len(), any::<bool>());
    prop_oneof![
        8 => (place(), len(), any::<bool>())
            .prop_map(|(at, len, direct)| Step::Write { at, len, direct }),
        3 => place().prop_map(|size| Step::Truncate { size }),
        6 => (modes, place(), len())
            .prop_map(|(mode, at, len)| Step::Fallocate { mode, at, len }),
        4 => copy.prop_map(|(from, to, len, alike)| Step::Copy {
            from,
            to: if alike { to / PAGE * PAGE + from % PAGE } else { to },
            len,
        }),
        3 => (place(), len(), any::<bool>())
            .prop_map(|(at, len, direct)| Step::Read { at, len, direct }),
        2 => Just(Step::Sync),
        1 => Just(Step::Remount),
    ]
}

/// A mounted file system for many cases.
struct Bench {
    devices: Vec<Arc<SimDevice>>,
    fs: Arc<FileSystem>,
}

impl Bench {
    fn new() -> Self {
        let devices = devices(2, 32 << 20);
        format(&devices);
        let fs = mount_with(&devices, Self::options());
        Self { devices, fs }
    }

    fn options() -> MountOptions {
        MountOptions {
            cache_bytes: braidfs::CACHE_BYTES_MIN,
            ..options()
        }
    }

    fn remount(&mut self) {
        self.fs.unmount().expect("unmount");
        self.fs = mount_with(&self.devices, Self::options());
    }

    /// Runs a case on a new file.
    fn run(&mut self, steps: &[Step]) -> Result<(), TestCaseError> {
        let mut file = create(&self.fs, ROOT_INO, "f");
        let mut bytes = Vec::new();
        for (nth, step) in (0..).zip(steps) {
            if let Step::Remount = step {
                self.fs.release(&file);
                self.remount();
                file = open(&self.fs, "f");
            } else {
                self.step(&file, &mut bytes, step, nth)?;
            }
            self.compare(&file, &bytes)?;
        }
        self.fs.release(&file);
        self.fs.unlink(ROOT_INO, b"f").expect("unlink");
        self.fs.forget(file.ino(), u64::MAX);
        Ok(())
    }

    fn step(
        &self,
        file: &Arc<OpenFile>,
        bytes: &mut Vec<u8>,
        step: &Step,
        nth: u64,
    ) -> Result<(), TestCaseError> {
        let fs = &self.fs;
        match *step {
            Step::Write { at, len, direct } => {
                let data = pattern(nth, len);
                let found = try_write(fs, file, at as u64, &data, direct);
                prop_assert_eq!(found, Ok(len as u32));
                put(bytes, at, &data);
            }
            Step::Truncate { size } => {
                let set = SetAttr {
                    size: Some(size as u64),
                    ..SetAttr::default()
                };
                let found = fs.setattr(file.ino(), &set, &CRED);
                prop_assert!(found.is_ok(), "{:?}", found);
                bytes.resize(size, 0);
            }
            Step::Fallocate { mode, at, len } => {
                prop_assert_eq!(fs.fallocate(file, mode, at as u64, len as u64), Ok(()));
                if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
                    bytes.resize(bytes.len().max(at + len), 0);
                }
                let end = bytes.len().min(at + len);
                if mode & !libc::FALLOC_FL_KEEP_SIZE != 0 && at < end {
                    bytes[at..end].fill(0);
                }
            }
            Step::Copy { from, to, len } => {
                let len = len.min(bytes.len().saturating_sub(from));
                if from < to + len && to < from + len {
                    return Ok(());
                }
                let (offset, at) = (from as u64, to as u64);
                let found = fs.copy_file_range(file, offset, file, at, len as u64);
                prop_assert_eq!(found, Ok(len as u64));
                if len > 0 {
                    let data = bytes[from..from + len].to_vec();
                    put(bytes, to, &data);
                }
            }
            Step::Read { at, len, direct } => {
                let at = if direct { at / PAGE * PAGE } else { at };
                let found = try_read(fs, file, at as u64, len, direct).expect("read");
                let end = bytes.len().min(at + len);
                prop_assert!(found == bytes[at.min(end)..end], "read {len} bytes at {at}");
            }
            Step::Sync => fs.sync().expect("sync"),
            Step::Remount => unreachable!("done by the caller"),
        }
        Ok(())
    }

    fn compare(&self, file: &Arc<OpenFile>, bytes: &[u8]) -> Result<(), TestCaseError> {
        let attr = self.fs.getattr(file.ino()).expect("getattr");
        prop_assert_eq!(attr.size, bytes.len() as u64);
        let found = try_read(&self.fs, file, 0, bytes.len() + 1, false).expect("read");
        let same = |(found, expected): (&u8, &u8)| found != expected;
        let differs = found.iter().zip(bytes).position(same);
        prop_assert_eq!((found.len(), differs), (bytes.len(), None));
        Ok(())
    }
}

/// Ends its threads; after a failure, too.
impl Drop for Bench {
    fn drop(&mut self) {
        let ended = self.fs.unmount();
        assert!(ended.is_ok() || std::thread::panicking(), "{ended:?}");
    }
}

fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    bytes.resize(bytes.len().max(at + data.len()), 0);
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// Cases one after another, on a bench that is made anew after a failure, so that shrinking starts
/// from the same state.
#[test]
fn the_bytes_of_a_file_are_those_of_a_vector() {
    let cases = std::env::var("PROPTEST_CASES").ok();
    let cases = cases.map_or(CASES, |text| text.parse().expect("a number"));
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let bench = std::cell::RefCell::new(None::<Bench>);
    let outcome = TestRunner::new(config).run(&prop::collection::vec(step(), 1..16), |steps| {
        let mut taken = bench.take().unwrap_or_else(Bench::new);
        // A bench that failed, or panicked, is not put back.
        taken.run(&steps)?;
        bench.replace(Some(taken));
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
    let bench = bench.take().expect("the last case was good");
    let devices = bench.devices.clone();
    drop(bench);
    assert_eq!(check(&devices).data_blocks, 0);
}
