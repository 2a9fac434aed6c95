//! To come.
use std::process::ExitCode;
fn main() -> ExitCode {
    braidfs_tests::runner::main("crash", &[])
}
