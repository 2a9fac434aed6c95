//! What the paces say: the ceiling that members and FUSE set, how near braidfs comes, what limits.

use std::path::Path;

use serde::Serialize;

use super::super::size::format_size;
use super::load::{LOADS, Load, Paces};
use crate::MemberPace;

/// From this share of the ceiling on braidfs is not what limits.
const NEAR: f64 = 0.7;

/// Least shares of the grades; E is what is left.
const GRADES: [(f64, &str); 4] = [(0.9, "A"), (0.7, "B"), (0.5, "C"), (0.3, "D")];

/// Width of the column of names.
const NAME_WIDTH: usize = 36;

/// What limits a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Limit {
    Members,
    Fuse,
    Braidfs,
}

/// A load as it was measured.
#[derive(Debug, Serialize)]
struct Row {
    load: &'static str,
    unit: &'static str,
    /// Not of loads that stay in memory.
    members: Option<f64>,
    /// Not where it could not be mounted.
    fuse: Option<f64>,
    braidfs: f64,
    ceiling: Option<f64>,
    share: Option<f64>,
    limit: Option<Limit>,
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    mount_point: String,
    size_bytes: u64,
    rows: Vec<Row>,
    /// The geometric mean of the shares.
    share: Option<f64>,
    grade: Option<&'static str>,
}

/// What the members do of a load, if it reaches them.
fn members_part(load: &Load, pace: &MemberPace) -> Option<f64> {
    match load.key {
        "write" | "direct_write" => Some(pace.write_bytes_per_s),
        "direct_read" => Some(pace.read_bytes_per_s),
        "random_read" => Some(pace.random_reads_per_s),
        "sync" => Some(pace.syncs_per_s),
        _ => None,
    }
}

/// Streams keep members and FUSE busy at the same time, so the slower one is the ceiling. Single
/// operations have to wait for one and then for the other.
fn ceiling(load: &Load, members: Option<f64>, fuse: Option<f64>) -> Option<f64> {
    match (members, fuse) {
        (Some(members), Some(fuse)) if load.is_stream => Some(members.min(fuse)),
        (Some(members), Some(fuse)) => Some(1.0 / (1.0 / members + 1.0 / fuse)),
        (one, other) => one.or(other),
    }
    .filter(|ceiling| ceiling.is_finite() && *ceiling > 0.0)
}

impl Row {
    fn new(load: &Load, members: &MemberPace, fuse: Option<f64>, braidfs: f64) -> Self {
        let members = members_part(load, members);
        let ceiling = ceiling(load, members, fuse);
        let share = ceiling.map(|ceiling| braidfs / ceiling);
        let slower = match (members, fuse) {
            (Some(members), Some(fuse)) if members < fuse => Limit::Members,
            (Some(_), None) => Limit::Members,
            _ => Limit::Fuse,
        };
        Self {
            load: load.key,
            unit: if load.is_stream { "bytes/s" } else { "1/s" },
            members,
            fuse,
            braidfs,
            ceiling,
            share,
            limit: share.map(|share| match share >= NEAR {
                true => slower,
                false => Limit::Braidfs,
            }),
        }
    }

    fn render(&self, load: &Load) -> String {
        let pace = |pace: Option<f64>| match pace {
            Some(pace) if load.is_stream => format!("{}/s", format_size(pace as u64)),
            Some(pace) => format!("{pace:.0}/s"),
            None => "-".to_owned(),
        };
        let (members, fuse) = (pace(self.members), pace(self.fuse));
        let braidfs = pace(Some(self.braidfs));
        let share = self.share.map_or("-".to_owned(), |s| format!("{s:.2}"));
        let limit = match self.limit {
            Some(Limit::Members) => "members",
            Some(Limit::Fuse) => "FUSE",
            Some(Limit::Braidfs) => "braidfs",
            None => "-",
        };
        format!(
            "{:NAME_WIDTH$}{members:>12}{fuse:>12}{braidfs:>12}{share:>7}  {limit}\n",
            load.name
        )
    }
}

impl Report {
    /// Puts together what was measured.
    pub fn new(
        mount_point: &Path,
        size_bytes: u64,
        members: &MemberPace,
        fuse: Option<Paces>,
        braidfs: Paces,
    ) -> Self {
        let rows: Vec<Row> = LOADS
            .iter()
            .enumerate()
            .map(|(nth, load)| {
                let fuse = fuse.as_ref().map(|paces| paces[nth]);
                Row::new(load, members, fuse, braidfs[nth])
            })
            .collect();
        let share = mean(rows.iter().filter_map(|row| row.share));
        let grade = share.map(|share| {
            let reached = GRADES.iter().find(|(least, _)| share >= *least);
            reached.map_or("E", |(_, grade)| grade)
        });
        Self {
            mount_point: mount_point.display().to_string(),
            size_bytes,
            rows,
            share,
            grade,
        }
    }

    /// For people.
    pub fn render(&self) -> String {
        let mut out = format!(
            "{}, {} at the most\n\n{:NAME_WIDTH$}{:>12}{:>12}{:>12}{:>7}  limited by\n",
            self.mount_point,
            format_size(self.size_bytes),
            "",
            "members",
            "FUSE",
            "braidfs",
            "share"
        );
        for (row, load) in self.rows.iter().zip(&LOADS) {
            out.push_str(&row.render(load));
        }
        let (Some(share), Some(grade)) = (self.share, self.grade) else {
            return out;
        };
        out.push_str(&format!(
            "\ngrade {grade}: {share:.2} of what members and FUSE allow (mean of the shares)\n"
        ));
        let limited = |limit| self.rows.iter().any(|row| row.limit == Some(limit));
        let place = &self.mount_point;
        if limited(Limit::Members) {
            out.push_str(&format!(
                "members: 'braidfs doctor {place}' says what slows them\n"
            ));
        }
        if limited(Limit::Braidfs) {
            out.push_str(&format!(
                "braidfs: 'braidfs top {place}' shows where requests wait\n"
            ));
        }
        out
    }
}

/// Geometric, with nothing counted as more than all.
fn mean(shares: impl Iterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = shares.map(|share| share.clamp(1e-6, 1.0).ln()).collect();
    let count = logs.len() as f64;
    (count > 0.0).then(|| (logs.iter().sum::<f64>() / count).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(key: &str) -> &'static Load {
        LOADS.iter().find(|load| load.key == key).expect("a load")
    }

    fn members() -> MemberPace {
        MemberPace {
            write_bytes_per_s: 1000.0,
            read_bytes_per_s: 2000.0,
            random_reads_per_s: 100.0,
            syncs_per_s: 50.0,
        }
    }

    #[test]
    fn the_slower_one_limits_streams() {
        let row = Row::new(load("write"), &members(), Some(4000.0), 900.0);
        assert_eq!(
            (row.ceiling, row.limit),
            (Some(1000.0), Some(Limit::Members))
        );
        assert_eq!(row.share, Some(0.9));
        let row = Row::new(load("direct_read"), &members(), Some(1500.0), 1400.0);
        assert_eq!((row.ceiling, row.limit), (Some(1500.0), Some(Limit::Fuse)));
    }

    #[test]
    fn single_operations_wait_for_both() {
        let row = Row::new(load("random_read"), &members(), Some(100.0), 49.0);
        assert_eq!(row.ceiling, Some(50.0));
        assert_eq!(row.share, Some(0.98));
    }

    #[test]
    fn what_is_far_below_the_ceiling_is_limited_by_braidfs() {
        let row = Row::new(load("sync"), &members(), Some(50.0), 5.0);
        assert_eq!(row.limit, Some(Limit::Braidfs));
    }

    #[test]
    fn without_fuse_there_is_the_members_ceiling_or_none() {
        let row = Row::new(load("write"), &members(), None, 500.0);
        assert_eq!(
            (row.ceiling, row.limit),
            (Some(1000.0), Some(Limit::Braidfs))
        );
        let row = Row::new(load("files"), &members(), None, 500.0);
        assert_eq!((row.ceiling, row.share, row.limit), (None, None, None));
    }

    #[test]
    fn nothing_makes_up_for_more_than_its_share() {
        assert_eq!(mean([].into_iter()), None);
        let one = mean([2.0, 0.25].into_iter()).expect("a mean");
        assert!((one - 0.5).abs() < 1e-9, "{one}");
    }

    #[test]
    fn the_report_names_what_limits() {
        let report = Report::new(
            Path::new("/mnt"),
            1 << 28,
            &members(),
            None,
            [90.0; LOADS.len()],
        );
        let text = report.render();
        assert!(text.contains("write 4 KiB and fsync"), "{text}");
        assert!(text.contains("limited by"), "{text}");
        assert!(text.contains("grade"), "{text}");
    }
}
