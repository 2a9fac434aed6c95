//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        braidfs::fuzzing::begin("table");
    },
    |input: &[u8]| {
        braidfs::fuzzing::run("table", input).expect("a target of this name");
    }
);
