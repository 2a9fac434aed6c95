//! `braidfs stats`: what a mounted file system has done so far, or does in each interval.

use std::ffi::OsString;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::control;
use super::exit::{self, CliError};
use super::print;
use super::rates::{self, Interval, Sample};
use super::table;

/// Limits of an interval, in seconds.
const INTERVAL_SECONDS: std::ops::RangeInclusive<f64> = 0.1..=86_400.0;

/// Show what a mounted file system has done since it was mounted, or in each interval
#[derive(clap::Args, Debug)]
pub struct StatsArgs {
    /// Show rates of each interval of so many seconds, until stopped
    #[arg(short, long, value_name = "SECONDS", value_parser = interval)]
    pub interval: Option<Duration>,
    /// Stop after so many intervals
    #[arg(short, long, value_name = "COUNT", requires = "interval",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// As JSON; of intervals one object a line
    #[arg(long)]
    pub json: bool,
    /// Where it is mounted
    #[arg(value_name = "MOUNTPOINT")]
    pub mount_point: OsString,
}

/// Seconds, also with a fraction.
pub fn interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if INTERVAL_SECONDS.contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!(
            "expected seconds from {} to {}",
            INTERVAL_SECONDS.start(),
            INTERVAL_SECONDS.end()
        )),
    }
}

/// `braidfs stats`.
pub fn run(args: &StatsArgs) -> Result<(), CliError> {
    let place = Path::new(&args.mount_point);
    if let Some(interval) = args.interval {
        return follow(place, interval, args.count, args.json);
    }
    let stats: Value = ask(place, "stats")?;
    if args.json {
        return print::json(&stats);
    }
    print::text(&table::render(&stats))
}

/// What the daemon of a mount answers.
pub fn ask<T: DeserializeOwned>(place: &Path, words: &str) -> Result<T, CliError> {
    let (entry, stream) = control::reach(place)?;
    control::told_json(&entry.mount_point, &stream, words)
}

/// Prints each interval, as plain text or as lines of JSON, until there is nobody to read it.
pub fn follow(
    place: &Path,
    interval: Duration,
    count: Option<u64>,
    json: bool,
) -> Result<(), CliError> {
    let mut next = Instant::now();
    let mut old: Sample = ask(place, "sample")?;
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        next += interval;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let new: Sample = ask(place, "sample")?;
        let rates = Interval::between(&old, &new);
        let text = match json {
            true => serde_json::to_string(&rates).map(|line| line + "\n"),
            false => Ok(rates::render(&rates)),
        };
        let text = text.map_err(|error| exit::system(format!("JSON: {error}")))?;
        if !print::more(&text)? {
            return Ok(());
        }
        old = new;
        left -= 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_limits() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(interval("86400"), Ok(Duration::from_secs(86_400)));
        for text in ["0", "-1", "nan", "inf", "86401", "soon", ""] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
