//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        braidfs::fuzzing::begin("metadata");
    },
    |input: &[u8]| {
        braidfs::fuzzing::run("metadata", input).expect("a target of this name");
    }
);
