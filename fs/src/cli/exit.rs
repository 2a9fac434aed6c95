//! Exit codes and the errors that carry them.

use nix::sys::signal::Signal;

/// Wrong usage; for mkfs and the rest any failure (mount(8): incorrect invocation or permissions).
pub const USAGE: u8 = 1;
/// The system refused something (mount(8)).
pub const SYSTEM: u8 = 2;
/// The mount or unmount failed (mount(8)).
pub const FAILURE: u8 = 32;
/// fsck(8): errors were corrected.
pub const FSCK_CORRECTED: u8 = 1;
/// fsck(8): errors are left.
pub const FSCK_ERRORS: u8 = 4;
/// fsck(8): operational error.
pub const FSCK_OPERATIONAL: u8 = 8;
/// fsck(8): wrong usage.
pub const FSCK_USAGE: u8 = 16;
/// fsck(8): stopped by request.
pub const FSCK_CANCELLED: u8 = 32;

/// blkid(8): nothing was found.
pub const PROBE_NOTHING: u8 = 2;
/// blkid(8): wrong usage.
pub const PROBE_USAGE: u8 = 4;

/// What goes wrong on the command line: an exit code, and what to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CliError {
    /// Exit code.
    pub code: u8,
    /// Without "braidfs: "; empty when all has been said.
    pub message: String,
}

impl CliError {
    /// An error with a code.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// Wrong usage.
pub fn usage(message: impl Into<String>) -> CliError {
    CliError::new(USAGE, message)
}

/// The system refused something.
pub fn system(message: impl Into<String>) -> CliError {
    CliError::new(SYSTEM, message)
}

/// A mount or unmount failed.
pub fn failure(message: impl Into<String>) -> CliError {
    CliError::new(FAILURE, message)
}

/// As a shell tells of a program that a signal ended.
pub fn ended_by(signal: Signal) -> CliError {
    let code = u8::try_from(128 + signal as i32).unwrap_or(SYSTEM);
    CliError::new(code, "")
}
