//! What the fuzz targets do with the bytes that they are given; tests/fuzz has the targets.
//!
//! | target | the bytes are |
//! | --- | --- |
//! | `labels` | damage of the labels and chunk tables of two members |
//! | `table` | a chunk table, with a right checksum |
//! | `records` | records of the metadata tables, put into a sound store |
//! | `metadata` | damage of a metadata chunk: heads, checksum area, redb's pages |
//! | `requests` | requests of a kernel that has gone mad |
//!
//! Checksums are mended where the input says so: a fuzzer cannot guess them, and damage that they
//! give away is not worth its time. Whatever the input, nothing may panic, hang, or take memory
//! without a bound; errors are welcome. One exception: redb believes what its pages say, and panics
//! where a page with a right checksum makes no sense. `metadata` makes such pages, has them read,
//! and lets redb panic; nothing is written then. Inputs are read as far as they go, so that every
//! byte string is one.
//!
//! Only built for tests and with the feature `fuzzing`.
#![allow(
    missing_docs,
    reason = "one caller, which needs no more than the table above"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::mpsc::{Sender, channel};

use parking_lot::Mutex;

mod damage;
mod records;
mod tree;
mod volume;

use crate::fuse::{fuzz_request_seeds, fuzz_requests};
pub(crate) use tree::options;
pub(crate) use volume::{assemble, single};

/// Told of a panic in redb, while there may be one.
static REDB_PANICS: Mutex<Option<Sender<bool>>> = Mutex::new(None);

/// Does something in which redb may panic, on a thread of its own. Unwinding runs into destructors
/// of redb that panic, too, which ends the process; so a thread that panics in redb never returns
/// from the hook, and is left where it is.
fn tolerating_redb(work: impl FnOnce() + Send + 'static) {
    let (to, ended) = channel();
    *REDB_PANICS.lock() = Some(to.clone());
    std::thread::spawn(move || {
        let ended_well = catch_unwind(AssertUnwindSafe(work)).is_ok();
        to.send(ended_well).unwrap_or_default();
    });
    let is_harmless = ended.recv();
    *REDB_PANICS.lock() = None;
    assert_eq!(is_harmless, Ok(true), "a panic that is not redb's");
}

/// From now on only panics that are not redb's own, or not allowed, reach the former hook.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let former = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let file = info.location().map_or("", |place| place.file());
            let allowed = REDB_PANICS.lock().clone();
            match allowed {
                Some(to) if file.contains("/redb-") => {
                    log::debug!("{info}");
                    to.send(true).unwrap_or_default();
                    loop {
                        std::thread::park();
                    }
                }
                _ => former(info),
            }
        }));
    });
}

/// Reads an input.
pub(crate) struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// The next bytes, fewer at the end.
    pub(crate) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next number; missing bytes are zero.
    pub(crate) fn number(&mut self, len: usize) -> u64 {
        let bytes = self.bytes(len).iter().rev();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The next two bytes as a number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.number(2)).unwrap_or(0) % bound.max(1)
    }
}

/// A target by name.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 5] = [
    ("labels", damage::labels),
    ("table", damage::table),
    ("records", records::records),
    ("metadata", damage::metadata),
    ("requests", fuzz_requests),
];

/// Tells a target's program to write its seeds into a folder and to end.
const SEEDS_KEY: &str = "BRAIDFS_FUZZ_SEEDS";

/// What a target's program does first.
pub fn begin(target: &str) {
    watch_panics();
    let Some(dir) = std::env::var_os(SEEDS_KEY) else {
        return;
    };
    let dir = std::path::PathBuf::from(dir);
    for (name, bytes) in seeds(target) {
        std::fs::write(dir.join(name), bytes).expect("write a seed");
    }
    std::process::exit(0);
}

/// Runs a target on an input; `None` if there is no such target.
pub fn run(target: &str, input: &[u8]) -> Option<()> {
    let found = TARGETS.iter().find(|found| found.0 == target)?;
    (found.1)(input);
    Some(())
}

/// Small inputs to begin with, each with a name.
pub fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    match target {
        "records" => records::seeds(),
        "requests" => fuzz_request_seeds(),
        "table" => damage::table_seeds(),
        "metadata" => damage::metadata_seeds(),
        _ => damage::label_seeds(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Panics on any thread.
    static PANICS: AtomicU64 = AtomicU64::new(0);

    /// The seeds, and what fuzzing has found, stay harmless.
    #[test]
    fn the_corpus_is_harmless() {
        let former = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            former(info);
        }));
        watch_panics();
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
        for (name, target) in TARGETS {
            let dir = corpus.join(name);
            let stored = fs::read_dir(&dir).expect("a folder for each target");
            let mut inputs = seeds(name);
            for entry in stored {
                let path = entry.expect("an entry").path();
                let bytes = fs::read(&path).expect("an input");
                inputs.push((path.display().to_string(), bytes));
            }
            assert!(inputs.len() > 1, "{name} has hardly an input");
            for (input, bytes) in inputs {
                println!("{name}: {input}");
                target(&bytes);
                assert_eq!(PANICS.load(Ordering::SeqCst), 0, "{name}: {input}");
            }
        }
    }
}
