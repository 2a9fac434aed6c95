//! Signals that ask a program to end, taken by a thread of its own.

use std::sync::mpsc::{self, Receiver};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use super::exit::{self, CliError};

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

/// They come by a channel. To be called before there are other threads, which would take them.
pub fn watch() -> Result<Receiver<Signal>, CliError> {
    let set = block().map_err(exit::system)?;
    let (to, from) = mpsc::channel();
    thread::Builder::new()
        .name("braidfs-signals".into())
        .spawn(move || while set.wait().is_ok_and(|signal| to.send(signal).is_ok()) {})
        .map_err(|error| exit::system(format!("signals: {error}")))?;
    Ok(from)
}
