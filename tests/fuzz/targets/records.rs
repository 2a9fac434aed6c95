//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        braidfs::fuzzing::begin("records");
    },
    |input: &[u8]| {
        braidfs::fuzzing::run("records", input).expect("a target of this name");
    }
);
