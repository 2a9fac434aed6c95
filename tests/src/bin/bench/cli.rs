//! The command line, and what it asks for.

use std::fs;
use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};

use crate::media::Kind as MediaKind;
use crate::peers::{self, Kind as PeerKind, Peer, Programs};
use crate::plan::{self, Scale, Workload};
use crate::targets::{self, Row};

/// Measures braidfs beside the devices, FUSE's ceiling and other file systems.
///
/// Exit codes: 0 all was measured, 1 something could not be measured or (with --strict) a target
/// was missed, 2 wrong usage, 130 interrupted.
#[derive(Parser, Debug)]
#[command(name = "bench", version)]
pub struct Cli {
    /// Only what targets ask for, and less of it: about 5 minutes on 2 processors
    #[arg(long)]
    pub quick: bool,
    /// Only these workloads (see --list)
    #[arg(long, visible_alias = "only", value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub workload: Vec<String>,
    /// Only what is needed for the targets with this in their text (see --list)
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["workload", "media", "peers"])]
    pub target: Vec<String>,
    /// Only these media
    #[arg(long, value_name = "MEDIA", num_args = 1.., value_delimiter = ',')]
    pub media: Vec<MediaKind>,
    /// Only these peers (see --list)
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub peers: Vec<String>,
    /// braidfs with these mount options too, in a column of its own; may be given several times
    #[arg(long, value_name = "OPT,...")]
    pub options: Vec<String>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = rounds_parser())]
    pub rounds: u64,
    /// Folder for the results: bench.json, bench.md, and charts
    #[arg(long, value_name = "DIR", default_value = "target/bench/results")]
    pub out: PathBuf,
    /// A missed target is a failure
    #[arg(long)]
    pub strict: bool,
    /// Shows workloads, media, peers and targets
    #[arg(long)]
    pub list: bool,
    /// Program to measure
    #[arg(long, value_name = "FILE", default_value = "target/release/braidfs")]
    pub braidfs: PathBuf,
    /// The null server
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/release/examples/null"
    )]
    pub null: PathBuf,
    /// libfuse's example
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/passthrough_ll"
    )]
    pub passthrough: PathBuf,
    /// Folder for the images on the disk [default: BRAIDFS_TEST_DIR, or the temporary folder]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

fn rounds_parser() -> RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=100)
}

/// What is to be done.
pub struct Plan {
    pub workloads: Vec<&'static Workload>,
    pub media: Vec<MediaKind>,
    pub peers: Vec<Peer>,
    pub skipped: Vec<(String, String)>,
    pub programs: Programs,
    pub scale: Scale,
    /// Only these rows, if not all.
    pub needed: Option<Vec<Row>>,
}

impl Plan {
    /// Whether a peer has a part in a workload on media.
    pub fn has(&self, workload: &Workload, peer: &Peer, media: MediaKind) -> bool {
        // A column of its own is there to be compared with braidfs's.
        let name = match peer.kind {
            PeerKind::Braidfs { .. } => "braidfs",
            _ => &peer.name,
        };
        let is_needed = self.needed.as_ref().is_none_or(|rows| {
            let place = (media.name(), workload.name, name);
            rows.iter()
                .any(|row| (row.media, row.workload, row.peer) == place)
        });
        let can = workload.media.contains(&media) && workload.takes(peer);
        is_needed && can && peers::fits(peer, media).is_ok()
    }

    /// Whether anybody wants to know a row.
    pub fn wants(&self, workload: &Workload, media: MediaKind, name: &str) -> bool {
        self.needed.as_ref().is_none_or(|rows| {
            let place = (media.name(), workload.name, name);
            rows.iter()
                .any(|row| (row.media, row.workload, row.row) == place)
        })
    }
}

/// Prints workloads, media, peers and targets.
pub fn list() {
    println!("workloads (* also with --quick):");
    for it in plan::ALL {
        let media: Vec<_> = it.media.iter().map(|media| media.name()).collect();
        let star = if it.is_quick { '*' } else { ' ' };
        println!("{star} {:20} {} ({})", it.name, it.about, media.join(", "));
    }
    println!("\nmedia: tmpfs, disk, throttled\n\npeers:");
    for (name, about) in peers::NAMES {
        println!("  {name:20} {about}");
    }
    println!("\ntargets:");
    for target in targets::all() {
        println!("  {target}");
    }
}

/// Peers when none are named.
const PEERS: [&str; 8] = [
    "raw",
    "null",
    "null-wb",
    "braidfs",
    "btrfs",
    "xfs",
    "fuse2fs",
    "passthrough",
];

/// Names of workloads, media and peers that were asked for; none: all.
#[derive(Default)]
struct Wanted {
    workloads: Vec<String>,
    media: Vec<MediaKind>,
    peers: Vec<String>,
}

/// What the targets need that have these words in their texts.
fn wanted_for(words: &[String]) -> Result<Wanted, String> {
    let mut wanted = Wanted::default();
    let needed = targets::rows_for(words);
    if needed.is_empty() {
        let words = words.join("' or '");
        return Err(format!("no target with '{words}'; see --list"));
    }
    for row in needed {
        if let Ok(kind) = MediaKind::from_str(row.media, false)
            && !wanted.media.contains(&kind)
        {
            wanted.media.push(kind);
        }
        let lists = [
            (&mut wanted.workloads, row.workload),
            (&mut wanted.peers, row.peer),
        ];
        for (list, name) in lists {
            if !list.iter().any(|known| known == name) {
                list.push(name.to_owned());
            }
        }
    }
    Ok(wanted)
}

/// What is to be done; or what is wrong with the command line.
pub fn plan_of(cli: &Cli) -> Result<Plan, String> {
    let wanted = if cli.target.is_empty() {
        Wanted {
            workloads: cli.workload.clone(),
            media: cli.media.clone(),
            peers: cli.peers.clone(),
        }
    } else {
        wanted_for(&cli.target)?
    };
    let mut workloads = Vec::new();
    for name in &wanted.workloads {
        let known = Workload::named(name);
        workloads.push(known.ok_or_else(|| format!("no workload '{name}'; see --list"))?);
    }
    // Of a workload that somebody names, everything is measured.
    let is_needed_only = !cli.target.is_empty() || (cli.quick && workloads.is_empty());
    let needed = is_needed_only.then(|| targets::rows_for(&cli.target));
    if workloads.is_empty() {
        let all = plan::ALL.iter().filter(|it| it.is_quick || !cli.quick);
        workloads.extend(all);
    }
    let media = match wanted.media.is_empty() {
        true => vec![MediaKind::Tmpfs, MediaKind::Disk, MediaKind::Throttled],
        false => wanted.media,
    };
    let programs = programs_of(cli)?;
    let mut peers = Vec::new();
    let names: Vec<&str> = match wanted.peers.is_empty() {
        true => PEERS.to_vec(),
        false => wanted.peers.iter().map(String::as_str).collect(),
    };
    for name in names {
        let known = Peer::named(name);
        peers.push(known.ok_or_else(|| format!("no peer '{name}'; see --list"))?);
    }
    peers.extend(
        cli.options
            .iter()
            .map(|options| Peer::with_options(options)),
    );
    let mut skipped = Vec::new();
    peers.retain(|peer| match peer.obstacle(&programs) {
        Some(why) => {
            skipped.push((peer.name.clone(), why));
            false
        }
        None => true,
    });
    let scale = if cli.quick { plan::QUICK } else { plan::FULL };
    Ok(Plan {
        workloads,
        media,
        peers,
        skipped,
        programs,
        scale,
        needed,
    })
}

fn programs_of(cli: &Cli) -> Result<Programs, String> {
    let absolute = |path: &Path| fs::canonicalize(path).ok();
    let braidfs = absolute(&cli.braidfs);
    Ok(Programs {
        braidfs: braidfs.ok_or_else(|| format!("no program {}", cli.braidfs.display()))?,
        null: absolute(&cli.null),
        passthrough: absolute(&cli.passthrough),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_names_what_it_needs() {
        let wanted = wanted_for(&["fsync, 4 jobs".to_owned()]).unwrap();
        assert_eq!(wanted.workloads, ["fsync-4"]);
        assert_eq!(wanted.media, [MediaKind::Tmpfs]);
        assert_eq!(wanted.peers, ["braidfs", "btrfs"]);
        assert!(wanted_for(&["nothing of that name".to_owned()]).is_err());
    }

    #[test]
    fn quick_has_what_targets_need() {
        for row in targets::rows_for(&[]) {
            let workload = Workload::named(row.workload).unwrap();
            assert!(workload.is_quick, "{}", row.workload);
        }
    }
}
