//! fio: what it is asked to do, and what its JSON says.

use std::path::Path;

use braidfs_tests::command::Cmd;
use serde_json::Value;

use crate::measure::Work;

/// One run of fio.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// `write`, `read`, `randread`...
    pub pattern: &'a str,
    /// `psync`, `libaio`, `io_uring`, `mmap`.
    pub engine: &'a str,
    /// Bytes of each request.
    pub block: u64,
    /// Requests under way.
    pub depth: u32,
    /// Processes that do the same.
    pub jobs: u32,
    /// O_DIRECT.
    pub direct: bool,
    /// Bytes of the file, of each job.
    pub size: u64,
    /// Stop after so many seconds; else when all is done.
    pub secs: Option<u64>,
    /// Begin again until the time is over.
    pub again: bool,
    /// More options.
    pub extra: &'a [&'a str],
}

impl Default for Job<'_> {
    fn default() -> Self {
        Self {
            pattern: "read",
            engine: "psync",
            block: 4096,
            depth: 1,
            jobs: 1,
            direct: false,
            size: 0,
            secs: None,
            again: false,
            extra: &[],
        }
    }
}

/// How long fio may take.
const LIMIT_SECS: u64 = 900;

impl Job<'_> {
    /// Runs it on files (`where_`: `--filename=` or `--directory=` with its value); in a cgroup, if
    /// one is given by its file of members.
    pub fn run(&self, where_: &str, group: Option<&Path>) -> Work {
        let mut words = vec![
            "--name=bench".to_owned(),
            "--output-format=json".to_owned(),
            "--group_reporting".to_owned(),
            "--fallocate=none".to_owned(),
            "--invalidate=0".to_owned(),
            where_.to_owned(),
            format!("--rw={}", self.pattern),
            format!("--ioengine={}", self.engine),
            format!("--bs={}", self.block),
            format!("--iodepth={}", self.depth),
            format!("--numjobs={}", self.jobs),
            format!("--direct={}", u8::from(self.direct)),
            format!("--size={}", self.size),
        ];
        words.extend(self.secs.map(|secs| format!("--runtime={secs}")));
        if self.again {
            words.push("--time_based".to_owned());
        }
        words.extend(self.extra.iter().map(|&word| word.to_owned()));
        let command = match group {
            Some(procs) => {
                let script = "echo $$ > \"$1\"; shift; exec fio \"$@\"";
                Cmd::sh(script, [procs])
            }
            None => Cmd::new("fio"),
        };
        let output = command.args(&words).limit_secs(LIMIT_SECS).quiet().ok();
        parse(&output.stdout).unwrap_or_else(|why| panic!("{why}: {}", output.describe()))
    }
}

/// What fio did, from its JSON: reads and writes together; percentiles of whichever there were.
pub fn parse(text: &str) -> Result<Work, String> {
    // Warnings may come first.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let value: Value = serde_json::from_str(json).map_err(|error| format!("no JSON: {error}"))?;
    let job = value
        .pointer("/jobs/0")
        .ok_or_else(|| "JSON without a job".to_owned())?;
    if let Some(error) = job["error"].as_i64().filter(|error| *error != 0) {
        return Err(format!("a job ended with error {error}"));
    }
    let mut work = Work::default();
    for direction in ["read", "write"] {
        let part = &job[direction];
        let number = |key: &str| part[key].as_f64().unwrap_or(0.0);
        if number("io_bytes") == 0.0 {
            continue;
        }
        work.bytes += number("io_bytes");
        work.operations += number("total_ios");
        work.secs = work.secs.max(number("runtime") / 1000.0);
        let percentile = |key: &str| {
            let nanos = part.pointer(&format!("/clat_ns/percentile/{key}"))?;
            Some(nanos.as_f64()? / 1000.0)
        };
        work.p50_us = work.p50_us.or(percentile("50.000000"));
        work.p99_us = work.p99_us.or(percentile("99.000000"));
    }
    if work.bytes == 0.0 || work.secs == 0.0 {
        return Err("fio moved nothing".to_owned());
    }
    Ok(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"fio: a warning
    { "fio version": "fio-3.33", "jobs": [ { "jobname": "bench", "error": 0,
      "read": { "io_bytes": 4096000, "total_ios": 1000, "runtime": 500,
                "clat_ns": { "percentile": { "50.000000": 12000, "99.000000": 48000 } } },
      "write": { "io_bytes": 0, "total_ios": 0, "runtime": 0 } } ] }"#;

    #[test]
    fn a_report_is_read() {
        let work = parse(REPORT).unwrap();
        assert_eq!(
            (work.bytes, work.operations, work.secs),
            (4_096_000.0, 1000.0, 0.5)
        );
        assert_eq!((work.p50_us, work.p99_us), (Some(12.0), Some(48.0)));
    }

    #[test]
    fn what_is_no_report_is_refused() {
        for (text, why) in [
            ("", "no JSON"),
            ("{\"jobs\": []}", "without a job"),
            ("{\"jobs\": [{\"error\": 5}]}", "error 5"),
            ("{\"jobs\": [{\"error\": 0}]}", "moved nothing"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
