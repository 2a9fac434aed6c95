//! Signals that ask a program to end, taken by a thread of its own.

use nix::sys::signal::{SigSet, Signal};

/// Holds them back from all threads that are started from now on; one of them waits for the set.
pub fn block() -> Result<SigSet, String> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect();
    signals
        .thread_block()
        .map_err(|error| format!("signals: {error}"))?;
    Ok(signals)
}
