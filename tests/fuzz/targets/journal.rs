//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        braidfs::fuzzing::begin("journal");
    },
    |input: &[u8]| {
        braidfs::fuzzing::run("journal", input).expect("a target of this name");
    }
);
