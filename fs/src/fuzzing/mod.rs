//! What the fuzz targets do with the bytes that they are given; tests/fuzz has the targets.
//!
//! | target | the bytes are |
//! | --- | --- |
//! | `labels` | damage of the labels and chunk tables of two members |
//! | `table` | a chunk table, with a right checksum |
//! | `journal` | a record of the journal, with right checksums, behind a sound store |
//! | `records` | records of the metadata tables, put into a sound store |
//! | `metadata` | damage of a metadata chunk: heads, checksum area, redb's pages |
//! | `requests` | requests of a kernel that has gone mad |
//!
//! Checksums are mended where the input says so: a fuzzer cannot guess them, and damage that they
//! give away is not worth its time. Whatever the input, nothing may panic, hang, or take memory
//! without a bound; errors are welcome. Inputs are read as far as they go, so that every byte
//! string is one.
//!
//! Only built for tests and with the feature `fuzzing`.
#![allow(
    missing_docs,
    reason = "one caller, which needs no more than the table above"
)]

mod damage;
mod journal;
mod records;
mod tree;
mod volume;

use crate::fuse::{fuzz_request_seeds, fuzz_requests};
use crate::meta::contain;
#[cfg(test)]
pub(crate) use damage::MetaChunk;
pub(crate) use tree::options;
#[cfg(test)]
pub(crate) use tree::try_everything;
#[cfg(test)]
pub(crate) use volume::in_use;
pub(crate) use volume::{assemble, single};

/// How often a panic came out of the library so far, on any thread.
#[cfg(test)]
pub(crate) fn panics() -> u64 {
    use std::sync::Once;
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNTING: Once = Once::new();
    static PANICS: AtomicU64 = AtomicU64::new(0);
    COUNTING.call_once(|| {
        contain::watch(|info, former| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            former(info);
        });
    });
    PANICS.load(Ordering::SeqCst)
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
pub const TARGETS: [Target; 6] = [
    ("labels", damage::labels),
    ("table", damage::table),
    ("journal", journal::journal),
    ("records", records::records),
    ("metadata", damage::metadata),
    ("requests", fuzz_requests),
];

/// Tells a target's program to write its seeds into a folder and to end.
const SEEDS_KEY: &str = "BRAIDFS_FUZZ_SEEDS";

/// What a target's program does first. Panics that come out of the library stay the fuzzer's.
pub fn begin(target: &str) {
    contain::watch(|info, former| former(info));
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
        "journal" => journal::seeds(),
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

    use super::*;

    /// The seeds, and what fuzzing has found, stay harmless.
    #[test]
    fn the_corpus_is_harmless() {
        assert_eq!(panics(), 0, "before anything");
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
                assert_eq!(panics(), 0, "{name}: {input}");
            }
        }
    }
}
