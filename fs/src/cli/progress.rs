//! How far long work is, on the standard error: a line that changes on a terminal, lines elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use super::size::format_size;

/// How often a terminal shows something new.
const INTERVAL: Duration = Duration::from_millis(100);
/// How often there is a line where there is no terminal.
const INTERVAL_LINES: Duration = Duration::from_secs(10);

/// The line.
pub struct Line {
    is_terminal: bool,
}

impl Line {
    /// On the standard error, as it is.
    pub fn new() -> Self {
        Self {
            is_terminal: io::stderr().is_terminal(),
        }
    }

    /// Shows this in the place of what was there.
    pub fn set(&self, text: &str) {
        match self.is_terminal {
            true => put(&format!("\r{text}\x1b[K")),
            false => put(&format!("{text}\n")),
        }
    }

    /// A line that stays.
    pub fn say(&self, text: &str) {
        self.end();
        put(&format!("{text}\n"));
    }

    /// Takes the line from the screen.
    pub fn end(&self) {
        if self.is_terminal {
            put("\r\x1b[K");
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.end();
    }
}

/// It is no more than talk: with nobody to see it, it need not be seen.
fn put(text: &str) {
    let mut out = io::stderr();
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

/// Work on bytes, of which some may have been done before.
pub struct ByteProgress {
    line: Line,
    first: u64,
    begun: Instant,
    shown: Option<Instant>,
}

impl ByteProgress {
    /// `first`: bytes done before.
    pub fn new(first: u64) -> Self {
        Self {
            line: Line::new(),
            first,
            begun: Instant::now(),
            shown: None,
        }
    }

    /// Shows it, if the last time is long enough ago.
    pub fn show(&mut self, done: u64, total: u64, more: &str) {
        let interval = match self.line.is_terminal {
            true => INTERVAL,
            false => INTERVAL_LINES,
        };
        let last = self.shown.unwrap_or(self.begun);
        if self.shown.is_none() && self.line.is_terminal || last.elapsed() >= interval {
            self.shown = Some(Instant::now());
            let text = text(self.first, done, total, self.begun.elapsed());
            self.line.set(&format!("{text}{more}"));
        }
    }
}

/// How much of how much, rate, and time to go.
fn text(first: u64, done: u64, total: u64, taken: Duration) -> String {
    let total = total.max(done).max(1);
    let rate = done.saturating_sub(first) / taken.as_secs().max(1);
    let left = match (total - done).checked_div(rate) {
        Some(seconds) => format!("{}:{:02} left", seconds / 60, seconds % 60),
        None => "-".to_owned(),
    };
    let percent = u128::from(done) * 100 / u128::from(total);
    let [done, total, rate] = [done, total, rate].map(format_size);
    format!("{done} of {total} ({percent} %), {rate}/s, {left}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_to_go_are_of_this_run() {
        const GIB: u64 = 1 << 30;
        let taken = Duration::from_secs(64);
        assert_eq!(
            text(2 * GIB, 8 * GIB, 20 * GIB, taken),
            "8 GiB of 20 GiB (40 %), 96 MiB/s, 2:08 left"
        );
        let begin = text(GIB, GIB, 4 * GIB, Duration::ZERO);
        assert_eq!(begin, "1 GiB of 4 GiB (25 %), 0 B/s, -");
        // More than was thought of.
        let over = text(0, 3, 2, Duration::ZERO);
        assert_eq!(over, "3 B of 3 B (100 %), 3 B/s, 0:00 left");
        assert!(text(0, 0, 0, Duration::ZERO).contains("(0 %)"));
        assert!(text(0, u64::MAX, u64::MAX, taken).contains("(100 %)"));
    }
}
