//! What was measured, for people and programs: JSON, Markdown, charts.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use crate::measure::{Cost, Sample, Unit};
use crate::numbers::{Spread, prefixed, ratio, short};
use crate::svg::{self, Group};
use crate::targets::Verdict;

/// The column that the others are compared with.
const OURS: &str = "braidfs";
/// A share of the median that is called unsteady.
const UNSTEADY: f64 = 0.2;

/// All of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Processors, kernel and the like.
    pub machine: Value,
    /// How the bench was called.
    pub run: Value,
    /// Peers that were not measured, and why.
    pub skipped: Vec<(String, String)>,
    /// Measurements that failed, and why.
    pub failures: Vec<String>,
    pub samples: Vec<Sample>,
    pub targets: Vec<Verdict>,
}

/// A row of a table: the samples of all peers and rounds.
struct Row<'r> {
    media: &'r str,
    workload: &'r str,
    row: &'r str,
    unit: Unit,
    samples: Vec<&'r Sample>,
}

impl Row<'_> {
    fn values(&self, peer: &str) -> Vec<(usize, f64)> {
        let of_peer = self.samples.iter().filter(|it| it.peer == peer);
        of_peer.map(|it| (it.round, it.value)).collect()
    }

    fn spread(&self, peer: &str) -> Option<Spread> {
        Spread::of(self.values(peer).iter().map(|it| it.1))
    }

    fn ratio(&self, peer: &str) -> Option<Spread> {
        ratio(&self.values(OURS), &self.values(peer))
    }

    /// The median of something that samples may tell.
    fn cost(&self, peer: &str, field: impl Fn(&Cost) -> Option<f64>) -> Option<f64> {
        let of_peer = self.samples.iter().filter(|it| it.peer == peer);
        Spread::of(of_peer.filter_map(|it| field(&it.cost))).map(|spread| spread.median)
    }

    fn name(&self) -> String {
        format!("{} / {}", self.workload, self.row)
    }

    fn show(&self, value: f64) -> String {
        format!("{}{}", prefixed(value), self.unit.symbol())
    }
}

impl Report {
    /// Rows in the order in which they were first measured.
    fn rows(&self) -> Vec<Row<'_>> {
        let mut rows: Vec<Row<'_>> = Vec::new();
        for sample in &self.samples {
            let key = (&*sample.media, &*sample.workload, &*sample.row);
            let known = rows
                .iter_mut()
                .find(|it| (it.media, it.workload, it.row) == key);
            match known {
                Some(row) => row.samples.push(sample),
                None => rows.push(Row {
                    media: key.0,
                    workload: key.1,
                    row: key.2,
                    unit: sample.unit,
                    samples: vec![sample],
                }),
            }
        }
        rows
    }

    /// Peers that something was measured of, in the order in which they came first.
    fn peers(&self) -> Vec<String> {
        let mut peers: Vec<String> = Vec::new();
        for sample in &self.samples {
            if !peers.contains(&sample.peer) {
                peers.push(sample.peer.clone());
            }
        }
        peers
    }

    /// Everything, with medians beside the samples.
    pub fn json(&self) -> Value {
        let peers = self.peers();
        let rows: Vec<Value> = self
            .rows()
            .iter()
            .map(|row| row_json(row, &peers))
            .collect();
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["rows"] = Value::Array(rows);
        value
    }

    /// Tables of ratios, of costs, and of targets.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let peers = self.peers();
        let others: Vec<&String> = peers.iter().filter(|peer| *peer != OURS).collect();
        let rows = self.rows();
        text += "braidfs, and how many times the other's value that is (medians of ratios within a \
                 round):\n\n";
        let head = others.iter().map(|peer| format!("/ {peer}"));
        let head = [
            vec![
                "media".into(),
                "workload".into(),
                OURS.into(),
                "min..max".into(),
            ],
            head.collect(),
        ]
        .concat();
        line(&mut text, &head);
        line(&mut text, &vec!["---".to_owned(); head.len()]);
        for row in &rows {
            let Some(ours) = row.spread(OURS) else {
                continue;
            };
            let unsteady = (ours.max - ours.min) / ours.median > UNSTEADY;
            let mut cells = vec![row.media.to_owned(), row.name(), row.show(ours.median)];
            let mark = if unsteady { " (unsteady)" } else { "" };
            cells.push(format!(
                "{}..{}{mark}",
                row.show(ours.min),
                row.show(ours.max)
            ));
            let ratios = others.iter().map(|peer| row.ratio(peer));
            cells.extend(ratios.map(|it| it.map_or(String::new(), |it| short(it.median))));
            line(&mut text, &cells);
        }
        text += "\n";
        costs(&mut text, &rows, &peers);
        text += "\n";
        self.targets_markdown(&mut text);
        for (peer, why) in &self.skipped {
            text += &format!("\nNot measured: {peer}: {why}.");
        }
        for failure in &self.failures {
            text += &format!("\nFailed: {failure}.");
        }
        text.trim_end().to_owned() + "\n"
    }

    /// What was to be reached.
    fn targets_markdown(&self, text: &mut String) {
        line(
            text,
            &["target", "compared with", "bound", "measured", "verdict"].map(str::to_owned),
        );
        line(text, &vec!["---".to_owned(); 5]);
        for it in self.targets.iter().filter(|it| it.measured.is_some()) {
            let measured = it.measured.map_or(String::new(), |spread| {
                let [median, min, max] = [spread.median, spread.min, spread.max].map(short);
                format!("{median} ({min}..{max})")
            });
            let cells = [&it.target, &it.against, &it.bound, &measured, it.verdict];
            line(text, &cells.map(ToString::to_string));
        }
        let count = |verdict| {
            self.targets
                .iter()
                .filter(|it| it.verdict == verdict)
                .count()
        };
        let [reached, missed, open] = ["reached", "missed", "not measured"].map(count);
        *text += &format!("\n{reached} reached, {missed} missed, {open} not measured.\n");
    }

    /// Everything into a folder.
    pub fn write(&self, dir: &Path) -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("bench.json"), format!("{:#}\n", self.json()))?;
        fs::write(dir.join("bench.md"), self.markdown())?;
        self.write_charts(dir)
    }

    /// Charts, as `NAME.svg` in a folder that exists.
    fn write_charts(&self, dir: &Path) -> std::io::Result<()> {
        let rows = self.rows();
        let charts = [
            (
                "large",
                "Large I/O on tmpfs (bytes/s)",
                Unit::BytesPerSecond,
                "tmpfs",
                None,
            ),
            (
                "small-io",
                "Small I/O on tmpfs (per second)",
                Unit::PerSecond,
                "tmpfs",
                None,
            ),
            (
                "files",
                "Small files (per second)",
                Unit::PerSecond,
                "tmpfs",
                Some("files"),
            ),
            (
                "disk",
                "Image files on the disk (bytes/s)",
                Unit::BytesPerSecond,
                "disk",
                None,
            ),
            (
                "scaling",
                "Devices of 100 MB/s (bytes/s)",
                Unit::BytesPerSecond,
                "throttled",
                None,
            ),
        ];
        for (name, title, unit, media, workload) in charts {
            let of_files = |row: &Row<'_>| ["files", "copy"].contains(&row.workload);
            let of_many = |row: &Row<'_>| row.workload.starts_with("million");
            let chosen = rows
                .iter()
                .filter(|row| row.unit == unit && row.media == media);
            let chosen = chosen.filter(|row| match workload {
                Some(workload) => row.workload == workload,
                None => !of_files(row) && !of_many(row),
            });
            self.write_chart(dir, name, title, &chosen.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn write_chart(
        &self,
        dir: &Path,
        name: &str,
        title: &str,
        rows: &[&Row<'_>],
    ) -> std::io::Result<()> {
        const ROWS_MAX: usize = 16;
        let has = |peer: &String| rows.iter().any(|row| row.spread(peer).is_some());
        let peers: Vec<String> = self.peers().into_iter().filter(has).collect();
        let group = |row: &&Row<'_>| Group {
            label: row.name(),
            values: peers
                .iter()
                .map(|peer| row.spread(peer).map(|it| it.median))
                .collect(),
        };
        let groups: Vec<Group> = rows.iter().take(ROWS_MAX).map(group).collect();
        if groups.is_empty() {
            return Ok(());
        }
        let chart = svg::bars(title, &peers, &groups, prefixed);
        fs::write(dir.join(format!("{name}.svg")), chart)
    }
}

fn row_json(row: &Row<'_>, peers: &[String]) -> Value {
    let mut of_peers = serde_json::Map::new();
    for peer in peers {
        if let Some(spread) = row.spread(peer) {
            let cost = |field: fn(&Cost) -> Option<f64>| row.cost(peer, field);
            let value = json!({
                "value": spread,
                "ratio_of_braidfs": row.ratio(peer),
                "p50_us": cost(|it| it.p50_us),
                "p99_us": cost(|it| it.p99_us),
                "cpu_secs_per_gb": cost(|it| it.cpu_secs_per_gb),
                "daemon_cpu_secs": cost(|it| it.daemon_cpu_secs),
                "daemon_peak_bytes": cost(|it| it.daemon_peak_bytes.map(|bytes| bytes as f64)),
                "daemon_allowed_bytes":
                    cost(|it| it.daemon_allowed_bytes.map(|bytes| bytes as f64)),
                "request_bytes": cost(|it| it.request_bytes),
                "kiobufs_per_request": cost(|it| it.kiobufs_per_request),
            });
            of_peers.insert(peer.clone(), value);
        }
    }
    json!({
        "media": row.media, "workload": row.workload, "row": row.row, "unit": row.unit,
        "peers": of_peers,
    })
}

/// What it cost: everything of braidfs, processor time of all.
fn costs(text: &mut String, rows: &[Row<'_>], peers: &[String]) {
    *text += "What it cost (processor seconds are those of the whole machine for each 10^9 bytes; \
              latencies in microseconds):\n\n";
    let mut head = [
        "media",
        "workload",
        "p50",
        "p99",
        "peak MiB",
        "allowed MiB",
        "KiB/request",
        "kiobufs/request",
    ]
    .map(str::to_owned)
    .to_vec();
    head.extend(peers.iter().map(|peer| format!("CPU s/GB {peer}")));
    line(text, &head);
    line(text, &vec!["---".to_owned(); head.len()]);
    for row in rows {
        if row.spread(OURS).is_none() {
            continue;
        }
        let ours = |field: fn(&Cost) -> Option<f64>| row.cost(OURS, field);
        let mut cells = vec![row.media.to_owned(), row.name()];
        let numbers = [
            ours(|it| it.p50_us),
            ours(|it| it.p99_us),
            ours(|it| it.daemon_peak_bytes.map(|bytes| bytes as f64 / 1_048_576.0)),
            ours(|it| {
                it.daemon_allowed_bytes
                    .map(|bytes| bytes as f64 / 1_048_576.0)
            }),
            ours(|it| it.request_bytes.map(|bytes| bytes / 1024.0)),
            ours(|it| it.kiobufs_per_request),
        ];
        let seconds = peers
            .iter()
            .map(|peer| row.cost(peer, |it| it.cpu_secs_per_gb));
        let shown = numbers.into_iter().chain(seconds);
        cells.extend(shown.map(|value| value.map_or(String::new(), short)));
        line(text, &cells);
    }
}

fn line(text: &mut String, cells: &[String]) {
    *text += &format!("| {} |\n", cells.join(" | "));
}

/// What the numbers depend on.
pub fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    json!({
        "processors": std::thread::available_parallelism().map_or(1, usize::from),
        "model": field(&read("/proc/cpuinfo"), "model name"),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_at_start": read("/proc/loadavg").trim(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let sample = |peer: &str, round, value| Sample {
            media: "tmpfs".to_owned(),
            workload: "seq-1m".to_owned(),
            row: "write".to_owned(),
            peer: peer.to_owned(),
            round,
            unit: Unit::BytesPerSecond,
            value,
            cost: Cost {
                cpu_secs_per_gb: Some(1.5),
                ..Cost::default()
            },
        };
        let mut samples = Vec::new();
        for round in 1..=3 {
            samples.push(sample(OURS, round, 2e9));
            samples.push(sample("btrfs", round, 1e9));
        }
        let targets = crate::targets::check(&samples);
        Report {
            machine: Value::Null,
            run: Value::Null,
            skipped: vec![("xfs".to_owned(), "mkfs.xfs is missing".to_owned())],
            failures: Vec::new(),
            samples,
            targets,
        }
    }

    #[test]
    fn the_table_has_values_ratios_and_costs() {
        let text = report().markdown();
        assert!(
            text.contains("| tmpfs | seq-1m / write | 2.00 GB/s | 2.00 GB/s..2.00 GB/s | 2.00 |")
        );
        assert!(text.contains("| 1.50 | 1.50 |"), "{text}");
        assert!(text.contains("Not measured: xfs: mkfs.xfs is missing."));
        assert!(
            text.contains("| >= 3 | 2.00 (2.00..2.00) | missed |"),
            "{text}"
        );
    }

    #[test]
    fn the_json_has_rows_and_targets() {
        let json = report().json();
        let btrfs = &json["rows"][0]["peers"]["btrfs"];
        assert_eq!(btrfs["ratio_of_braidfs"]["median"], 2.0);
        assert_eq!(json["samples"].as_array().unwrap().len(), 6);
        assert!(json["targets"].as_array().unwrap().len() > 20);
    }

    #[test]
    fn charts_are_small() {
        let dir = tempfile::tempdir().unwrap();
        report().write(dir.path()).unwrap();
        let chart = fs::read(dir.path().join("large.svg")).unwrap();
        assert!(chart.len() < 20_000);
        assert!(!dir.path().join("disk.svg").exists());
    }
}
