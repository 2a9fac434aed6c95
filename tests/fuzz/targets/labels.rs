//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        braidfs::fuzzing::begin("labels");
    },
    |input: &[u8]| {
        braidfs::fuzzing::run("labels", input).expect("a target of this name");
    }
);
