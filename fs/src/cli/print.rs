//! Output that does not panic when the reader has gone.

use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use super::exit::{self, CliError};

/// Prints text as it is.
pub fn text(text: &str) -> Result<(), CliError> {
    more(text).map(drop)
}

/// The same for those that go on: false if the reader has gone.
pub fn more(text: &str) -> Result<bool, CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(exit::system(format!("standard output: {error}"))),
    }
}

/// Prints a value as JSON.
pub fn json<T: Serialize>(value: &T) -> Result<(), CliError> {
    let mut line = serde_json::to_string_pretty(value)
        .map_err(|error| exit::system(format!("JSON: {error}")))?;
    line.push('\n');
    text(&line)
}
