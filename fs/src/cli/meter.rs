//! Progress of fsck: a bar on a terminal, or lines to a descriptor, with rate and time to go.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::fsck::{PASSES, Progress};

/// How often it is shown.
const INTERVAL: Duration = Duration::from_millis(100);

/// Characters of the bar.
const BAR_LEN: usize = 30;

/// Where it goes.
enum Target {
    Nowhere,
    /// The standard output, a terminal.
    Bar,
    /// Lines 'pass done total device'.
    Lines(File, String),
}

/// Shows how far a check is.
pub struct Meter {
    target: Target,
    /// Passes are told when they end.
    verbose: bool,
    pass: usize,
    began: Instant,
    shown: Instant,
    /// The bar is on the screen.
    dirty: bool,
}

impl Meter {
    /// `descriptor`: 0 for the terminal.
    pub fn new(
        descriptor: Option<u32>,
        verbose: bool,
        devices: &[PathBuf],
    ) -> Result<Self, String> {
        let target = match descriptor {
            None => Target::Nowhere,
            Some(0) if std::io::stdout().is_terminal() => Target::Bar,
            Some(0) => Target::Nowhere,
            Some(number) => {
                let path = format!("/dev/fd/{number}");
                let file = OpenOptions::new()
                    .append(true)
                    .open(path)
                    .map_err(|error| {
                        format!("-C {number}: not a descriptor to write to: {error}")
                    })?;
                let device = devices.first().map(|path| path.display().to_string());
                Target::Lines(file, device.unwrap_or_default())
            }
        };
        let now = Instant::now();
        Ok(Self {
            target,
            verbose,
            pass: 0,
            began: now,
            shown: now,
            dirty: false,
        })
    }

    /// Shows it, if the last time is long enough ago, or a pass begins or ends.
    pub fn show(&mut self, at: Progress) {
        let begins = at.pass != self.pass;
        if begins {
            (self.pass, self.began) = (at.pass, Instant::now());
        }
        let ends = !begins && at.done == at.total;
        if !begins && !ends && self.shown.elapsed() < INTERVAL {
            return;
        }
        self.shown = Instant::now();
        let taken = self.began.elapsed();
        match &mut self.target {
            Target::Nowhere => {}
            Target::Bar => {
                let line = format!("\r{}\x1b[K", bar(at, taken));
                let mut out = std::io::stdout();
                self.dirty = out.write_all(line.as_bytes()).and(out.flush()).is_ok();
            }
            Target::Lines(file, device) => {
                let line = format!("{} {} {} {device}\n", at.pass, at.done, at.total);
                if file.write_all(line.as_bytes()).is_err() {
                    // Nobody listens any more.
                    self.target = Target::Nowhere;
                }
            }
        }
        if ends && self.verbose {
            self.end();
            let (name, ms) = (name_of(at.pass), taken.as_millis());
            let line = format!("pass {}: {name}: {} records, {ms} ms\n", at.pass, at.total);
            // It is no more than talk.
            drop(std::io::stderr().write_all(line.as_bytes()));
        }
    }

    /// Takes the bar from the screen.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.dirty) {
            let mut out = std::io::stdout();
            drop(out.write_all(b"\r\x1b[K").and(out.flush()));
        }
    }
}

fn name_of(pass: usize) -> &'static str {
    let index = pass.saturating_sub(1) % PASSES.len();
    PASSES[index]
}

/// The bar of a pass that has taken so long.
fn bar(at: Progress, taken: Duration) -> String {
    let done = at.done.min(at.total);
    let part = |of: usize| match at.total {
        0 => of,
        total => {
            let part = u128::from(done) * of as u128 / u128::from(total);
            usize::try_from(part).unwrap_or(of)
        }
    };
    let ms = taken.as_millis().max(1);
    let rate = u128::from(done) * 1000 / ms;
    let left = u128::from(at.total - done);
    let eta = match rate {
        0 => "-:--".to_owned(),
        rate => format!("{}:{:02}", left / rate / 60, left / rate % 60),
    };
    format!(
        "pass {}/{} {:8} [{:BAR_LEN$}] {:3}% {rate}/s ETA {eta}",
        at.pass,
        PASSES.len(),
        name_of(at.pass),
        "=".repeat(part(BAR_LEN)),
        part(100),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_tells_rate_and_time_to_go() {
        let at = |done, total| Progress {
            pass: 2,
            done,
            total,
        };
        let second = Duration::from_secs(1);
        let half = bar(at(1000, 2000), second);
        assert!(half.contains("pass 2/6 names"), "{half}");
        assert!(
            half.contains("[===============               ]  50% 1000/s ETA 0:01"),
            "{half}"
        );
        assert!(bar(at(0, 2000), second).ends_with("  0% 0/s ETA -:--"));
        assert!(bar(at(0, 0), second).contains("100%"));
        assert!(bar(at(10, 100_000), second).ends_with("ETA 166:39"));
    }
}
