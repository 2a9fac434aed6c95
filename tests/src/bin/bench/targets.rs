//! What braidfs must reach: each target is a ratio of two rows of the same run.

use std::fmt;

use serde::Serialize;

use crate::measure::Sample;
use crate::numbers::{Spread, ratio};

/// A row of a workload on media for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub media: &'static str,
    pub workload: &'static str,
    pub row: &'static str,
    pub peer: &'static str,
}

/// What is asked of a ratio.
#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// A target.
#[derive(Clone, Debug)]
pub struct Target {
    what: String,
    measured: Row,
    /// Not the value of the row: the daemon's memory in any row of that workload, as a share of
    /// what it may have.
    is_memory: bool,
    /// The first of these that was measured is what it is compared with; none: a number is.
    against: Vec<Row>,
    /// What is compared with is multiplied by this first.
    times: f64,
    bound: Bound,
}

/// How a target came out.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub target: String,
    /// What it is compared with.
    pub against: String,
    /// For people: `>= 0.9`.
    pub bound: String,
    /// The ratio; `None` if it was not measured.
    pub measured: Option<Spread>,
    /// `reached`, `missed` or `not measured`.
    pub verdict: &'static str,
}

const B: &str = "braidfs";
const T: &str = "tmpfs";

const fn row(
    media: &'static str,
    workload: &'static str,
    row: &'static str,
    peer: &'static str,
) -> Row {
    Row {
        media,
        workload,
        row,
        peer,
    }
}

impl fmt::Display for Target {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bound, against) = (self.bound_text(), self.against_text(self.against.first()));
        write!(out, "{}: {bound} ({against})", self.what)
    }
}

impl Target {
    fn bound_text(&self) -> String {
        match self.bound {
            Bound::AtLeast(least) => format!(">= {least}"),
            Bound::AtMost(most) => format!("<= {most}"),
        }
    }

    fn against_text(&self, shown: Option<&Row>) -> String {
        match shown {
            None if self.is_memory => "cache + 128 MiB + 300 bytes per inode".to_owned(),
            None => "a number".to_owned(),
            Some(row) if row.peer == B => format!("its own '{}'", row.row),
            Some(row) => row.peer.to_owned(),
        }
    }
}

/// What must be measured for the targets that have one of these words in their texts; for all, if
/// there is no word.
pub fn rows_for(words: &[String]) -> Vec<Row> {
    let words: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
    let mut rows = Vec::new();
    for target in all() {
        let text = target.what.to_lowercase();
        if words.is_empty() || words.iter().any(|word| text.contains(word)) {
            rows.push(target.measured);
            rows.extend(target.against);
        }
    }
    rows
}

fn target(what: &str, row: Row, against: &[Row], times: f64, bound: Bound) -> Target {
    Target {
        what: what.to_owned(),
        measured: row,
        is_memory: false,
        against: against.to_vec(),
        times,
        bound,
    }
}

/// A ratio to a peer in the same row.
fn to_peer(
    what: &str,
    workload: &'static str,
    row: &'static str,
    peer: &'static str,
    least: f64,
) -> Target {
    let on = |peer| self::row(T, workload, row, peer);
    target(what, on(B), &[on(peer)], 1.0, Bound::AtLeast(least))
}

/// All of them.
pub fn all() -> Vec<Target> {
    let mut targets = large();
    targets.extend(small());
    targets.extend(media());
    targets.extend(many());
    targets.extend(memory());
    targets
}

fn large() -> Vec<Target> {
    let buffered = "sequential write 1 MiB, buffered, with fsync";
    let direct = "sequential write 1 MiB, O_DIRECT, 4 under way";
    let (one, four) = ("seq-1m", "seq-1m-direct-qd4");
    let mut targets = vec![
        to_peer(buffered, one, "write", "btrfs", 3.0),
        to_peer(buffered, one, "write", "null", 0.35),
        to_peer(direct, four, "write", "btrfs", 3.0),
        to_peer("the same, cold read", four, "read cold", "btrfs", 1.0),
        to_peer("the same, warm read", four, "read warm", "null", 0.85),
    ];
    for (workload, what) in [
        ("random", "random 4 KiB read, warm, 1 job"),
        ("random-4", "random 4 KiB read, warm, 4 jobs"),
        ("random-direct", "random 4 KiB read, warm, O_DIRECT, 1 job"),
        (
            "random-direct-4",
            "random 4 KiB read, warm, O_DIRECT, 4 jobs",
        ),
    ] {
        targets.push(to_peer(what, workload, "read warm", "null", 0.9));
    }
    let write = "random 4 KiB write, O_DIRECT, 1 job";
    targets.extend([
        to_peer(write, "random-direct", "write", "null", 0.8),
        to_peer(write, "random-direct", "write", "btrfs", 2.0),
        to_peer(
            "sequential write 4 KiB, buffered",
            "tiny",
            "write",
            "null-wb",
            0.8,
        ),
        to_peer(
            "4 KiB write + fsync, 1 job",
            "fsync",
            "write+fsync",
            "btrfs",
            1.0,
        ),
        to_peer(
            "4 KiB write + fsync, 4 jobs",
            "fsync-4",
            "write+fsync",
            "btrfs",
            1.0,
        ),
    ]);
    targets
}

fn small() -> Vec<Target> {
    let mut targets = Vec::new();
    for phase in ["create", "stat", "list", "read", "rename", "unlink"] {
        let what = format!("small files: {phase}");
        let row = |peer| row(T, "files", phase, peer);
        let peers = [row("passthrough"), row("null")];
        targets.push(target(&what, row(B), &peers, 1.0, Bound::AtLeast(1.0)));
        targets.push(target(
            &what,
            row(B),
            &[row("fuse2fs")],
            1.0,
            Bound::AtLeast(4.0),
        ));
    }
    targets
}

fn media() -> Vec<Target> {
    let mut targets = Vec::new();
    let scaled = [
        (2.0, "write on 2", "write on 1"),
        (3.0, "write on 3", "write on 1"),
        (4.0, "write on 4", "write on 1"),
        (2.0, "read on 2", "read on 1"),
        (3.0, "read on 3", "read on 1"),
        (4.0, "read on 4", "read on 1"),
    ];
    for (times, row, one) in scaled {
        let what = format!("throttled devices: sequential {row}, of linear");
        let on = |name| self::row("throttled", "scaling", name, B);
        targets.push(target(
            &what,
            on(row),
            &[on(one)],
            times,
            Bound::AtLeast(0.95),
        ));
    }
    for (row, what) in [
        (
            "write",
            "image files on the disk: sequential write with fsync",
        ),
        (
            "read cold",
            "image files on the disk: sequential read, cold",
        ),
    ] {
        let on = |peer| self::row("disk", "seq-1m", row, peer);
        targets.push(target(what, on(B), &[on("raw")], 1.0, Bound::AtLeast(0.9)));
    }
    targets
}

fn many() -> Vec<Target> {
    let mut targets = Vec::new();
    for workload in ["million", "million-1000"] {
        let on = |name| row(T, workload, name, B);
        let mut add = |what: &str, row, against: &[Row], bound| {
            let what = format!("{what} ({workload})");
            targets.push(target(&what, on(row), against, 1.0, bound));
        };
        let least = Bound::AtLeast(0.7);
        add(
            "creation in a large tree",
            "create, many",
            &[on("create, few")],
            least,
        );
        add(
            "lookup in a large tree",
            "lookup, many",
            &[on("lookup, few")],
            least,
        );
        let most = Bound::AtMost(2.0);
        add(
            "mount of a large tree, to an empty one",
            "mount, many",
            &[on("mount, empty")],
            most,
        );
        add("mount after a kill, seconds", "mount, killed", &[], most);
    }
    targets
}

fn memory() -> Vec<Target> {
    let workloads = [
        ("seq-1m", "write"),
        ("random-4", "read warm"),
        ("files", "create"),
        ("million", "create, many"),
        ("million-1000", "create, many"),
    ];
    let of = |(workload, name)| Target {
        is_memory: true,
        ..target(
            &format!("memory of the daemon, most in {workload}"),
            row(T, workload, name, B),
            &[],
            1.0,
            Bound::AtMost(1.0),
        )
    };
    workloads.map(of).into()
}

/// Values of a row by round.
fn values(samples: &[Sample], row: Row) -> Vec<(usize, f64)> {
    let same = samples.iter().filter(|it| {
        (&*it.media, &*it.workload, &*it.peer) == (row.media, row.workload, row.peer)
            && it.row == row.row
    });
    same.map(|it| (it.round, it.value)).collect()
}

/// The most memory that was resident in any row of a workload, as a share of what may be, by round.
fn memory_shares(samples: &[Sample], of: Row) -> Vec<(usize, f64)> {
    let mut most: Vec<(usize, f64)> = Vec::new();
    for it in samples {
        if (&*it.media, &*it.workload, &*it.peer) != (of.media, of.workload, of.peer) {
            continue;
        }
        let Some((peak, allowed)) = it.cost.daemon_peak_bytes.zip(it.cost.daemon_allowed_bytes)
        else {
            continue;
        };
        let share = peak as f64 / allowed as f64;
        match most.iter_mut().find(|known| known.0 == it.round) {
            Some(known) => known.1 = known.1.max(share),
            None => most.push((it.round, share)),
        }
    }
    most
}

/// Checks all targets against what was measured.
pub fn check(samples: &[Sample]) -> Vec<Verdict> {
    all()
        .iter()
        .map(|target| verdict(target, samples))
        .collect()
}

fn verdict(target: &Target, samples: &[Sample]) -> Verdict {
    let above = if target.is_memory {
        memory_shares(samples, target.measured)
    } else {
        values(samples, target.measured)
    };
    let against = target
        .against
        .iter()
        .find(|row| !values(samples, **row).is_empty());
    let measured = match against {
        Some(row) => {
            let below = values(samples, *row);
            let below: Vec<_> = below.iter().map(|it| (it.0, it.1 * target.times)).collect();
            ratio(&above, &below)
        }
        None if target.against.is_empty() => Spread::of(above.iter().map(|it| it.1)),
        None => None,
    };
    let is_reached = |ratio: f64| match target.bound {
        Bound::AtLeast(least) => ratio >= least,
        Bound::AtMost(most) => ratio <= most,
    };
    let verdict = match measured {
        Some(spread) if is_reached(spread.median) => "reached",
        Some(_) => "missed",
        None => "not measured",
    };
    Verdict {
        target: target.what.clone(),
        against: target.against_text(against.or(target.against.first())),
        bound: target.bound_text(),
        measured,
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{Cost, Unit};
    use crate::peers::Peer;
    use crate::plan::Workload;

    fn sample(workload: &str, row: &str, peer: &str, round: usize, value: f64) -> Sample {
        Sample {
            media: T.to_owned(),
            workload: workload.to_owned(),
            row: row.to_owned(),
            peer: peer.to_owned(),
            round,
            unit: Unit::PerSecond,
            value,
            cost: Cost::default(),
        }
    }

    fn verdict_of(samples: &[Sample], what: &str, against: &str) -> Verdict {
        let all = check(samples);
        let found = all
            .iter()
            .find(|it| it.target == what && it.against.contains(against));
        found
            .unwrap_or_else(|| panic!("no target {what}: {all:?}"))
            .clone()
    }

    #[test]
    fn ratios_are_compared_with_their_bounds() {
        let what = "4 KiB write + fsync, 1 job";
        let row = |peer, value| sample("fsync", "write+fsync", peer, 1, value);
        assert_eq!(
            verdict_of(&[row(B, 1.0)], what, "btrfs").verdict,
            "not measured"
        );
        let reached = verdict_of(&[row(B, 11.0), row("btrfs", 10.0)], what, "btrfs");
        assert_eq!(
            (reached.verdict, reached.measured.unwrap().median),
            ("reached", 1.1)
        );
        let missed = verdict_of(&[row(B, 9.0), row("btrfs", 10.0)], what, "btrfs");
        assert_eq!(missed.verdict, "missed");
    }

    #[test]
    fn the_null_server_stands_in_where_a_peer_is_missing() {
        let row = |peer, value| sample("files", "stat", peer, 1, value);
        let what = "small files: stat";
        let stand_in = verdict_of(&[row(B, 2.0), row("null", 4.0)], what, "null");
        assert_eq!(stand_in.verdict, "missed");
        let both = [row(B, 2.0), row("null", 4.0), row("passthrough", 2.0)];
        assert_eq!(verdict_of(&both, what, "passthrough").verdict, "reached");
    }

    #[test]
    fn less_may_be_better() {
        let what = "mount after a kill, seconds (million)";
        let quick = [sample("million", "mount, killed", B, 1, 0.5)];
        assert_eq!(verdict_of(&quick, what, "a number").verdict, "reached");
        let slow = [sample("million", "mount, killed", B, 1, 2.5)];
        assert_eq!(verdict_of(&slow, what, "a number").verdict, "missed");
    }

    #[test]
    fn targets_name_what_exists() {
        for target in all() {
            for row in target.against.iter().chain([&target.measured]) {
                assert!(Workload::named(row.workload).is_some(), "{}", row.workload);
                assert!(Peer::named(row.peer).is_some(), "{}", row.peer);
            }
        }
    }

    #[test]
    fn the_most_memory_of_any_row_counts() {
        let of = |row: &str, peak| Sample {
            cost: Cost {
                daemon_peak_bytes: Some(peak),
                daemon_allowed_bytes: Some(100),
                ..Cost::default()
            },
            ..sample("million", row, B, 1, 1.0)
        };
        let samples = [of("create, many", 120), of("lookup, many", 90)];
        let what = "memory of the daemon, most in million";
        let verdict = verdict_of(&samples, what, "300 bytes per inode");
        assert_eq!(verdict.measured.unwrap().median, 1.2);
        assert_eq!(verdict.verdict, "missed");
        let verdict = verdict_of(&samples[1..], what, "cache");
        assert_eq!(verdict.verdict, "reached");
    }
}
