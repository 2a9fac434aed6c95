//! Where log lines go: the standard error in the foreground, a file or syslog in the background.
//! Where the standard error is the journal, each line tells its level as sd-daemon(3) has it.
//!
//! `BRAIDFS_LOG` sets the level (error, warn, info, debug, trace); warnings and errors are the
//! default. Lines are limited in number, so that a failing device cannot fill a disk with them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

use crate::meta::contain;

/// Most lines in a window; further ones are counted and the count is logged.
const LINES_MAX: u32 = 200;
const WINDOW: Duration = Duration::from_secs(10);

/// Where syslog and the journal listen.
const SYSLOG_SOCKET: &str = "/dev/log";

/// Facility "daemon" of syslog.
const FACILITY: u8 = 3 << 3;

enum Target {
    Stderr,
    /// The standard error, which a journal reads.
    Journal,
    File(File),
    Syslog(UnixDatagram),
    Nowhere,
}

struct State {
    target: Target,
    window: Option<Instant>,
    lines: u32,
}

struct Logger {
    state: Mutex<State>,
}

static LOGGER: Logger = Logger {
    state: Mutex::new(State {
        target: Target::Stderr,
        window: None,
        lines: 0,
    }),
};

/// Starts logging to the standard error. From now on a panic on any thread ends the process.
pub fn start() {
    contain::watch(|info, former| {
        former(info);
        std::process::abort();
    });
    let level = std::env::var("BRAIDFS_LOG")
        .ok()
        .and_then(|level| level.parse().ok());
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level.unwrap_or(LevelFilter::Warn));
    }
    if std::env::var_os("JOURNAL_STREAM").is_some_and(|stream| is_stderr(&stream)) {
        LOGGER.state.lock().target = Target::Journal;
    }
}

/// Whether the standard error is this stream: device and inode number, as systemd.exec(5) has it.
fn is_stderr(stream: &OsStr) -> bool {
    let stat = nix::sys::stat::fstat(std::io::stderr().as_fd());
    stat.is_ok_and(|stat| *stream == *format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Says why the program ends. Of a background daemon its caller hears this.
pub fn last_word(message: &str) {
    let severity = match LOGGER.state.lock().target {
        Target::Journal => "<3>",
        _ => "",
    };
    let line = format!("{severity}braidfs: {message}\n");
    // With nobody to tell, the exit code says it.
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// Logs something that somebody just asked for, whatever the level is.
pub fn note(text: &str) {
    LOGGER.state.lock().write(Level::Info, text);
}

/// A panic ends the process: the last word goes where the others went.
fn report_panic(info: &std::panic::PanicHookInfo<'_>) {
    const PATIENCE: Duration = Duration::from_secs(1);
    let text = info.to_string().replace('\n', " ");
    // Its own thread may hold the lock.
    if let Some(mut state) = LOGGER.state.try_lock_for(PATIENCE) {
        state.write(
            Level::Error,
            &format!("{text}; the mount ends, durable data is intact"),
        );
    }
}

/// Continues in a file, or with syslog where there is one.
pub fn leave_stderr(file: Option<File>) {
    contain::watch(|info, _| {
        report_panic(info);
        std::process::abort();
    });
    let syslog = || {
        let socket = UnixDatagram::unbound().ok()?;
        socket.connect(SYSLOG_SOCKET).ok()?;
        // A syslog that does not read must not stop a file system.
        socket.set_nonblocking(true).ok()?;
        Some(Target::Syslog(socket))
    };
    LOGGER.state.lock().target = match file {
        Some(file) => Target::File(file),
        None => syslog().unwrap_or(Target::Nowhere),
    };
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut state = self.state.lock();
        if let Some(left_out) = state.admit(Instant::now()) {
            if left_out > 0 {
                state.write(Level::Warn, &format!("{left_out} more messages left out"));
            }
            state.write(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

impl State {
    /// Whether one more line may be written now, and how many were left out before it.
    fn admit(&mut self, now: Instant) -> Option<u32> {
        let mut left_out = 0;
        if self
            .window
            .is_none_or(|start| now.duration_since(start) >= WINDOW)
        {
            left_out = self.lines.saturating_sub(LINES_MAX);
            self.window = Some(now);
            self.lines = 0;
        }
        self.lines = self.lines.saturating_add(1);
        (self.lines <= LINES_MAX).then_some(left_out)
    }

    /// A line that cannot be written is lost: there is nobody left to tell.
    fn write(&mut self, level: Level, text: &str) {
        let (word, severity) = match level {
            Level::Error => ("error: ", 3),
            Level::Warn => ("warning: ", 4),
            Level::Info => ("", 6),
            Level::Debug | Level::Trace => ("", 7),
        };
        // One message is one line, whatever the names in it contain.
        let text = text.replace(char::is_control, "?");
        let line = format!("braidfs: {word}{text}\n");
        let written = match &mut self.target {
            Target::Stderr => std::io::stderr().write_all(line.as_bytes()),
            Target::Journal => {
                std::io::stderr().write_all(format!("<{severity}>{line}").as_bytes())
            }
            Target::File(file) => file.write_all(line.as_bytes()),
            Target::Syslog(socket) => {
                let pid = std::process::id();
                let line = format!("<{}>braidfs[{pid}]: {word}{text}", FACILITY + severity);
                socket.send(line.as_bytes()).map(drop)
            }
            Target::Nowhere => Ok(()),
        };
        drop(written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut state = State {
            target: Target::File(File::create(&path).unwrap()),
            window: None,
            lines: 0,
        };
        state.write(Level::Error, "/d/a\n<0>b\u{1b}[2J: c");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "braidfs: error: /d/a?<0>b?[2J: c\n");
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let mut state = State {
            target: Target::Nowhere,
            window: None,
            lines: 0,
        };
        let start = Instant::now();
        for _ in 0..LINES_MAX {
            assert_eq!(state.admit(start), Some(0));
        }
        for _ in 0..50 {
            assert_eq!(state.admit(start), None);
        }
        assert_eq!(state.admit(start + WINDOW), Some(50));
        assert_eq!(state.admit(start + WINDOW), Some(0));
    }
}
