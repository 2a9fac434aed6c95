//! `braidfs fsck`: checks an unmounted file system, and repairs it if told to.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use braidfs_blockdev::{OpenMode, Volume};

use super::devices::{device_list, display_list, open_all};
use super::exit::{
    CliError, FSCK_CANCELLED, FSCK_CORRECTED, FSCK_ERRORS, FSCK_OPERATIONAL, FSCK_USAGE,
};
use super::members::find_members;
use super::meter::Meter;
use super::{print, signals, table};
use crate::fsck::{Class, FsckError, Mode, Options, Outcome, Report};

/// Check an unmounted file system, and repair it with -y. Exit codes as fsck(8), added up: 0 clean,
/// 1 repaired, 4 errors left, 8 could not check, 16 wrong usage, 32 stopped by a signal.
#[derive(clap::Args, Debug)]
pub struct FsckArgs {
    /// Change nothing
    #[arg(short = 'n', conflicts_with_all = ["yes", "preen", "ask"])]
    no_changes: bool,
    /// Repair without asking
    #[arg(short = 'y', conflicts_with_all = ["preen", "ask"])]
    yes: bool,
    /// At boot: mounting recovers by itself, so only look whether it can; with -f check it all, and
    /// repair what can lose nothing
    #[arg(short = 'p', short_alias = 'a', conflicts_with = "ask")]
    preen: bool,
    /// Ask before each kind of repair (the default on a terminal)
    #[arg(short = 'r')]
    ask: bool,
    /// With -p: check also what was closed properly
    #[arg(short = 'f')]
    force: bool,
    /// Show progress on the terminal; with a number, write lines 'pass done total device' to that
    /// descriptor
    #[arg(short = 'C', num_args = 0..=1, require_equals = true, default_missing_value = "0",
          value_name = "FD")]
    progress: Option<u32>,
    /// Tell about each pass
    #[arg(short = 'v')]
    verbose: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Show the version
    #[arg(short = 'V')]
    version: bool,
    /// Member devices or image files; one is enough where the others lie beside it
    #[arg(required_unless_present = "version", value_name = "DEV")]
    devices: Vec<OsString>,

    /// Accepted for fsck(8)
    #[arg(short = 'T', hide = true)]
    no_title: bool,
}

/// fsck(8) and its users write the number after -C with or without a space, but not with `=`.
pub fn with_plain_progress(words: Vec<OsString>) -> Vec<OsString> {
    let is_number =
        |word: &OsStr| !word.is_empty() && word.as_bytes().iter().all(u8::is_ascii_digit);
    let mut plain: Vec<OsString> = Vec::with_capacity(words.len());
    let mut options = true;
    for word in words {
        options &= word != "--";
        let attached = word.as_bytes().strip_prefix(b"-C").map(OsStr::from_bytes);
        let number = match attached {
            Some(number) if options && is_number(number) => number.to_owned(),
            _ if options && is_number(&word) && plain.last().is_some_and(|last| last == "-C") => {
                plain.pop();
                word
            }
            _ => {
                plain.push(word);
                continue;
            }
        };
        let mut joined = OsString::from("-C=");
        joined.push(number);
        plain.push(joined);
    }
    plain
}

fn operational(message: impl Into<String>) -> CliError {
    CliError::new(FSCK_OPERATIONAL, message)
}

/// `braidfs fsck`.
pub fn run(args: &FsckArgs) -> Result<(), CliError> {
    if args.version {
        return print::text(&format!("braidfs {}\n", env!("CARGO_PKG_VERSION")));
    }
    let usage = |message: String| CliError::new(FSCK_USAGE, message);
    let paths = device_list(&args.devices).map_err(usage)?;
    let members = find_members(&paths).map_err(operational)?;
    let paths: Vec<PathBuf> = members.into_iter().map(|member| member.path).collect();
    let name = display_list(&paths);
    let stop = Stop::start()?;
    let mode = mode_of(args);
    let open = OpenMode {
        read_only: true,
        for_writing_later: mode != Mode::Check,
        direct: true,
        ..OpenMode::default()
    };
    let devices = open_all(&paths, open).map_err(operational)?;
    let volume = Volume::assemble(devices, true).map_err(|error| operational(error.to_string()))?;
    if args.preen && !args.force {
        return print::text(&match volume.info().was_clean {
            true => format!("{name}: clean\n"),
            false => format!("{name}: was not closed; mounting recovers it\n"),
        });
    }
    let meter = Meter::new(args.progress, args.verbose, &paths);
    let mut meter = meter.map_err(|message| CliError::new(FSCK_USAGE, message))?;
    let options = Options {
        mode,
        cancel: &stop.cancel,
        progress: &mut |progress| meter.show(progress),
        ask: &mut |class, count| stop.ask(class, count),
    };
    let outcome = crate::fsck::run(volume, options);
    meter.end();
    let outcome = outcome.map_err(|error| match error {
        FsckError::Cancelled => CliError::new(FSCK_CANCELLED, format!("{name}: {error}")),
        error => operational(error.to_string()),
    })?;
    if args.json {
        print::json(&json_of(&outcome)?)?;
    } else {
        let unasked = mode == Mode::Check && !args.no_changes;
        print::text(&text_of(&outcome, &name, unasked)?)?;
    }
    match exit_code(&outcome) {
        0 => Ok(()),
        code => Err(CliError::new(code, "")),
    }
}

/// Without being told, asks where somebody can answer.
fn mode_of(args: &FsckArgs) -> Mode {
    let can_ask = || std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if args.yes {
        Mode::Repair
    } else if args.preen {
        Mode::Preen
    } else if args.no_changes || args.json || !(args.ask || can_ask()) {
        Mode::Check
    } else {
        Mode::Ask
    }
}

fn exit_code(outcome: &Outcome) -> u8 {
    let repaired = if outcome.left.is_some() {
        FSCK_CORRECTED
    } else {
        0
    };
    let left = if outcome.is_clean() { 0 } else { FSCK_ERRORS };
    repaired | left
}

fn json_of(outcome: &Outcome) -> Result<serde_json::Value, CliError> {
    let value = |report: &Report| {
        serde_json::to_value(report).map_err(|error| operational(format!("report: {error}")))
    };
    let mut found = value(&outcome.found)?;
    let left = outcome.left.as_ref().map(value).transpose()?;
    if let Some(fields) = found.as_object_mut() {
        fields.insert("clean".into(), outcome.is_clean().into());
        fields.insert("repaired".into(), left.is_some().into());
        fields.insert("left".into(), left.unwrap_or_default());
    }
    Ok(found)
}

fn problem_lines(report: &Report) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        let class = problem.class.name();
        text.push_str(&format!(
            "{class}: {}: {}\n",
            problem.object, problem.message
        ));
    }
    let more = report.problem_count - report.problems.len() as u64;
    if more > 0 {
        text.push_str(&format!("and {more} more\n"));
    }
    text
}

fn counted(count: u64) -> String {
    match count {
        1 => "1 problem".to_owned(),
        count => format!("{count} problems"),
    }
}

fn text_of(outcome: &Outcome, name: &str, unasked: bool) -> Result<String, CliError> {
    let found = &outcome.found;
    let mut text = problem_lines(found);
    let mut counters = json_of(outcome)?;
    if let Some(fields) = counters.as_object_mut() {
        for field in ["problems", "problem_count", "clean", "repaired", "left"] {
            fields.remove(field);
        }
    }
    text.push_str(&table::render(&counters));
    match &outcome.left {
        None if found.is_clean() => text.push_str(&format!("{name}: clean\n")),
        None => {
            text.push_str(&format!("{name}: {}\n", counted(found.problem_count)));
            if unasked {
                text.push_str("nothing was changed; 'fsck -y' repairs\n");
            }
        }
        Some(left) if left.is_clean() => {
            let count = counted(found.problem_count);
            text.push_str(&format!("{name}: {count} repaired\n"));
        }
        Some(left) => {
            text.push_str("left after the repair:\n");
            text.push_str(&problem_lines(left));
            text.push_str(&format!("{name}: {} left\n", counted(left.problem_count)));
        }
    }
    Ok(text)
}

/// Being told to stop, by signals.
struct Stop {
    cancel: Arc<AtomicBool>,
    /// Somebody is being asked: then nothing is under way.
    asking: Arc<AtomicBool>,
}

impl Stop {
    /// The first signal ends it in order, a second one, or one during a question, at once: what is
    /// being made durable then is there as a whole, or not at all.
    fn start() -> Result<Self, CliError> {
        let blocked = signals::block().map_err(operational)?;
        let (cancel, asking) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let stop = Stop { cancel, asking };
        let (cancel, asking) = (Arc::clone(&stop.cancel), Arc::clone(&stop.asking));
        let wait = move || {
            while blocked.wait().is_ok() {
                if cancel.swap(true, Ordering::Relaxed) || asking.load(Ordering::Relaxed) {
                    exit(i32::from(FSCK_CANCELLED));
                }
            }
        };
        let spawned = thread::Builder::new()
            .name("fsck-signals".into())
            .spawn(wait);
        match spawned {
            Ok(_) => Ok(stop),
            Err(error) => Err(operational(format!("signals: {error}"))),
        }
    }

    /// Asks on the terminal; the end of the input is a no.
    fn ask(&self, class: Class, count: u64) -> bool {
        self.asking.store(true, Ordering::Relaxed);
        let question = format!(
            "{}: {}. {}? [y/n] ",
            class.name(),
            counted(count),
            class.question()
        );
        let answer = loop {
            // Where the question cannot be shown, nobody says yes.
            if print::text(&question).is_err() || std::io::stdout().flush().is_err() {
                break false;
            }
            let mut line = String::new();
            let read = std::io::stdin().read_line(&mut line);
            match read {
                Ok(len) if len > 0 => {}
                _ => break false,
            }
            match line.trim() {
                "y" | "Y" | "yes" => break true,
                "n" | "N" | "no" => break false,
                _ => {}
            }
        };
        self.asking.store(false, Ordering::Relaxed);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(words: &[&str]) -> Vec<String> {
        let words = words.iter().map(OsString::from).collect();
        let plain = with_plain_progress(words).into_iter();
        plain.map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn the_descriptor_is_written_as_fsck_does() {
        assert_eq!(plain(&["-C5", "-y", "d"]), ["-C=5", "-y", "d"]);
        assert_eq!(plain(&["-C", "5", "d"]), ["-C=5", "d"]);
        assert_eq!(plain(&["-C", "d5", "-n"]), ["-C", "d5", "-n"]);
        assert_eq!(plain(&["-n", "--", "-C5"]), ["-n", "--", "-C5"]);
        assert_eq!(plain(&["-Cx"]), ["-Cx"]);
    }
}
