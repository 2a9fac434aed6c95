//! See `braidfs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    braidfs::fuzzing::run("requests", input).expect("a target of this name");
});
