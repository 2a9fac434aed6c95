//! A bound on how long a test may hang.

use std::time::Duration;

/// Ends the process when a test takes too long: a deadlock is a failure, not a hang.
pub struct Watchdog {
    /// Dropped when all went well.
    _alive: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    pub fn start(limit: Duration, what: String) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            use std::sync::mpsc::RecvTimeoutError;
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{what} has not ended for {limit:?}: a deadlock");
                std::process::abort();
            }
        });
        Self { _alive: sender }
    }
}
