//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        braidfs::fuzzing::begin("requests");
    },
    |input: &[u8]| {
        braidfs::fuzzing::run("requests", input).expect("a target of this name");
    }
);
