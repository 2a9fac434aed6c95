//! The binary `braidfs`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    braidfs::cli::main()
}
