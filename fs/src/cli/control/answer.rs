//! What the daemon answers.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use log::LevelFilter;
use serde::{Deserialize, Serialize};

use super::super::options::{COMMIT_SECONDS_MAX, FREEZE_SECONDS_MAX};
use super::super::size::format_size;
use super::{LINE_BYTES_MAX, PEER_TIMEOUT, State, tracing};
use crate::fuse::MountHandle;
use crate::scrub::ScrubOptions;
use crate::{Errno, FileSystem};

/// What can be changed while it is mounted; fields that are not given stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Memory of the page cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_size_bytes: Option<u64>,
    /// Longest time between two commits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit_seconds: Option<u64>,
    /// What is logged: error, warn, info, debug or trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
}

/// All of it, as it is now.
#[derive(Clone, Debug, Serialize)]
struct View {
    label: String,
    read_only: bool,
    frozen: bool,
    thaws_in_seconds: Option<u64>,
    cache_size_bytes: u64,
    cache_size_max_bytes: u64,
    commit_seconds: u64,
    log: String,
}

/// Longest time for each step of measuring the members.
const PACE_SECONDS_MAX: u64 = 3600;

/// What is said to a line: the answer, or what is wrong.
pub(super) type Said = Result<String, String>;

/// Answers one connection.
pub(super) fn answer(stream: &UnixStream, state: &State) -> io::Result<()> {
    stream.set_read_timeout(Some(PEER_TIMEOUT))?;
    stream.set_write_timeout(Some(PEER_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    let line = line.trim_end_matches('\n');
    if let Some(asked) = line.strip_prefix("trace ") {
        return tracing::stream(stream, state, asked);
    }
    if line != "wait" {
        return tell(stream, say(state, line));
    }
    tell(stream, Ok("waiting".to_owned()))?;
    match state.wait(stream)? {
        Some(outcome) => tell(stream, outcome.map(|()| "ok".to_owned())),
        None => Ok(()),
    }
}

pub(super) fn tell(mut out: &UnixStream, said: Said) -> io::Result<()> {
    let line = match said {
        Ok(text) => text + "\n",
        Err(text) => format!("error {}\n", text.replace('\n', " ")),
    };
    out.write_all(line.as_bytes())
}

fn say(state: &State, line: &str) -> Said {
    let mount = state.inner.lock().mount.clone();
    let mount = mount.ok_or("the file system is being unmounted")?;
    let fs = mount.file_system();
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    let done = match verb {
        "stats" => return Ok(mount.stats().to_string()),
        "sample" => return json(&mount.sample()),
        "get" => return json(&view(fs)),
        "scrub" => return scrub(fs, rest),
        "pace" => return pace(fs, rest),
        "writable" => fs.make_writable().map_err(|error| error.to_string()),
        "set" => set(&mount, rest),
        "freeze" => freeze(fs, rest),
        "thaw" if fs.thaw() => Ok(()),
        "thaw" => Err("is not frozen".to_owned()),
        "sync" => fs.sync().map_err(|errno| errno.to_string()),
        "drop-caches" => {
            fs.cache().drop_clean();
            Ok(())
        }
        "label" => label(fs, rest),
        _ => Err("unknown command".to_owned()),
    };
    done.map(|()| "ok".to_owned())
}

pub(super) fn json(value: &impl Serialize) -> Said {
    serde_json::to_string(value).map_err(|error| error.to_string())
}

fn view(fs: &FileSystem) -> View {
    let left = fs.frozen_for();
    let cache = fs.cache();
    View {
        label: fs.volume().label_text(),
        read_only: fs.is_read_only(),
        frozen: left.is_some(),
        thaws_in_seconds: left.map(|left| left.as_secs()),
        cache_size_bytes: cache.size_bytes(),
        cache_size_max_bytes: cache.size_bytes_max(),
        commit_seconds: fs.commit_interval().as_secs(),
        log: log::max_level().to_string().to_lowercase(),
    }
}

/// All or, if the cache cannot have that size, nothing.
fn set(mount: &MountHandle, text: &str) -> Result<(), String> {
    let settings: Settings = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let fs = mount.file_system();
    let commit = settings.commit_seconds;
    if commit.is_some_and(|seconds| !(1..=COMMIT_SECONDS_MAX).contains(&seconds)) {
        return Err(format!("commit: seconds from 1 to {COMMIT_SECONDS_MAX}"));
    }
    let level = settings.log.as_deref().map(str::parse::<LevelFilter>);
    let level = level.transpose().map_err(|_| "log: unknown level")?;
    if let Some(bytes) = settings.cache_size_bytes {
        resize(mount, bytes)?;
    }
    if let Some(seconds) = commit {
        fs.set_commit_interval(Duration::from_secs(seconds));
    }
    if let Some(level) = level {
        log::set_max_level(level);
    }
    Ok(())
}

fn resize(mount: &MountHandle, bytes: u64) -> Result<(), String> {
    let cache = mount.file_system().cache();
    let (now, max) = (cache.size_bytes(), cache.size_bytes_max());
    let min = mount.cache_bytes_min().min(now);
    let asked = format_size(bytes);
    if bytes > max {
        let max = format_size(max);
        return Err(format!(
            "cache_size: {asked} is more than the {max} that it was mounted with; mount it again \
             with a larger cache_size"
        ));
    }
    if bytes < min {
        let min = format_size(min);
        return Err(format!("cache_size: {asked} is less than the least, {min}"));
    }
    cache
        .resize(bytes)
        .map_err(|error| format!("cache_size: {error}; it stays at {}", format_size(now)))
}

fn freeze(fs: &FileSystem, text: &str) -> Result<(), String> {
    match text.parse() {
        Ok(seconds @ 1..=FREEZE_SECONDS_MAX) => fs
            .freeze(Duration::from_secs(seconds))
            .map_err(|error| error.to_string()),
        _ => Err(format!("seconds from 1 to {FREEZE_SECONDS_MAX}")),
    }
}

fn pace(fs: &FileSystem, text: &str) -> Said {
    let words = text.split_once(' ');
    let numbers =
        words.and_then(|(bytes, seconds)| Some((bytes.parse().ok()?, seconds.parse().ok()?)));
    let Some((bytes, seconds @ 1..=PACE_SECONDS_MAX)) = numbers else {
        return Err(format!("bytes, and seconds from 1 to {PACE_SECONDS_MAX}"));
    };
    let pace = fs.member_pace(bytes, Duration::from_secs(seconds));
    json(&pace.map_err(|errno| match errno {
        Errno::BUSY => "is frozen; thaw it first: braidfs control MOUNTPOINT thaw".to_owned(),
        errno => format!("the members cannot be measured: {errno}"),
    })?)
}

fn label(fs: &FileSystem, text: &str) -> Result<(), String> {
    let text: String = serde_json::from_str(text).map_err(|error| error.to_string())?;
    fs.set_label(&text).map_err(|error| error.to_string())
}

fn scrub(fs: &FileSystem, words: &str) -> Said {
    let words: Vec<&str> = words.split(' ').collect();
    let done = match words[..] {
        ["status"] => return json(&fs.scrub_status()),
        ["pause"] => fs.scrub_pause(),
        ["cancel"] => fs.scrub_cancel(),
        [verb @ ("start" | "resume"), mode, rate] => fs.scrub_start(ScrubOptions {
            rate_bytes: rate.parse().ok(),
            no_repair: mode == "look",
            resume: verb == "resume",
            since_mount: false,
        }),
        _ => return Err("unknown command".to_owned()),
    };
    done.map(|()| "ok".to_owned()).map_err(scrub_refusal)
}

/// Why a scrub was not begun, paused, resumed or canceled.
pub fn scrub_refusal(errno: Errno) -> String {
    match errno {
        Errno::BUSY => "a scrub is under way; 'braidfs scrub --status' shows it".to_owned(),
        Errno::INVAL => "there is no scrub to pause, resume or cancel".to_owned(),
        errno => errno.to_string(),
    }
}
