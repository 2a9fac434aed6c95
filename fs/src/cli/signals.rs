//! Signals that ask a program to end, taken by a thread of its own.

use nix::sys::signal::{SigSet, Signal};

/// Also the one that asks a daemon for a summary.
pub fn block_with_summary() -> Result<SigSet, String> {
    let mut signals = block()?;
    signals.add(Signal::SIGUSR1);
    signals
        .thread_block()
        .map_err(|error| format!("signals: {error}"))?;
    Ok(signals)
}

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
