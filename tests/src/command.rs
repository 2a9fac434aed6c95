//! Programs run with a time limit.
//!
//! Output goes to files, not pipes: a daemon that forgot to let go of its standard output then
//! cannot hang a test that is about something else (`cli.rs` has a test that is about it).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a program may take unless told otherwise.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);
/// How long [`wait_until`] waits.
const SOON: Duration = Duration::from_secs(20);
/// How long a killed program may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A program to run.
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    limit: Duration,
    echo: bool,
}

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    /// The command line, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error, likewise.
    pub stderr: String,
    /// How long it ran.
    pub elapsed: Duration,
}

/// A program that is running.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    stdout: File,
    stderr: File,
    started: Instant,
    limit: Duration,
    waited: bool,
}

impl Cmd {
    /// A command without arguments, in the C locale, with nothing on standard input.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .env("LC_ALL", "C")
            .process_group(0);
        Self {
            command,
            limit: DEFAULT_LIMIT,
            echo: true,
        }
    }

    /// A shell script; `$1`, `$2`... are `args`.
    pub fn sh<A: AsRef<OsStr>>(script: &str, args: impl IntoIterator<Item = A>) -> Self {
        Self::new("sh").args(["-euc", script, "sh"]).args(args)
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets the folder to run in.
    #[must_use]
    pub fn cwd(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets standard input.
    #[must_use]
    pub fn stdin(mut self, file: File) -> Self {
        self.command.stdin(Stdio::from(file));
        self
    }

    /// Sets the time limit.
    #[must_use]
    pub fn limit_secs(mut self, secs: u64) -> Self {
        self.limit = Duration::from_secs(secs);
        self
    }

    /// Does not print the command line.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.echo = false;
        self
    }

    /// Starts it.
    pub fn spawn(mut self) -> Running {
        let line = line_of(&self.command);
        if self.echo {
            println!("+ {line}");
        }
        let stdout = tempfile::tempfile().expect("a temporary file for stdout");
        let stderr = tempfile::tempfile().expect("a temporary file for stderr");
        self.command
            .stdout(stdout.try_clone().expect("dup of stdout"));
        self.command
            .stderr(stderr.try_clone().expect("dup of stderr"));
        let child = match self.command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("cannot start `{line}`: {error}"),
        };
        let (started, limit) = (Instant::now(), self.limit);
        Running {
            line,
            child,
            stdout,
            stderr,
            started,
            limit,
            waited: false,
        }
    }

    /// Runs it to its end, whatever that is. Past the time limit it is killed and the test fails.
    pub fn run(self) -> Output {
        let echo = self.echo;
        let output = self.spawn().wait();
        if echo {
            let secs = output.elapsed.as_secs_f64();
            println!("  {} after {secs:.2} s", output.status);
        }
        output
    }

    /// Runs it; anything but exit code 0 fails the test.
    pub fn ok(self) -> Output {
        let output = self.run();
        assert!(
            output.status.success(),
            "it should have succeeded: {}",
            output.describe()
        );
        output
    }

    /// Runs it; anything but this exit code fails the test.
    pub fn exits(self, code: i32) -> Output {
        let output = self.run();
        assert_eq!(output.status.code(), Some(code), "{}", output.describe());
        output
    }

    /// Runs it; exit code 0, or an end by a signal, fails the test.
    pub fn fails(self) -> Output {
        let output = self.run();
        assert!(
            !output.status.success(),
            "it should have failed: {}",
            output.describe()
        );
        assert!(
            output.status.signal().is_none(),
            "it crashed: {}",
            output.describe()
        );
        output
    }
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids fit")
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        !self.waited && matches!(self.child.try_wait(), Ok(None))
    }

    /// What it printed so far.
    pub fn stdout_so_far(&self) -> String {
        text_of(&self.stdout)
    }

    /// What it printed so far, standard error after standard output.
    pub fn text_so_far(&self) -> String {
        self.stdout_so_far() + &text_of(&self.stderr)
    }

    /// The word after `durable` in the last whole line that begins so: what it saw safe.
    pub fn last_durable(&self) -> Option<String> {
        let text = self.stdout_so_far();
        let whole = text.rsplit_once('\n')?.0;
        let found = whole
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("durable "));
        found.map(str::to_owned)
    }

    /// Kills it and everything in its process group, at once.
    pub fn kill(&mut self) {
        let group = Pid::from_raw(self.pid());
        let _gone_already = killpg(group, Signal::SIGKILL);
        let deadline = Instant::now() + KILL_LIMIT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.waited = true;
    }

    /// Waits for its end, within its time limit.
    pub fn wait(mut self) -> Output {
        let mut nap = Duration::from_millis(1);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(error) => panic!("cannot wait for `{}`: {error}", self.line),
            }
            if self.started.elapsed() > self.limit {
                let stderr = text_of(&self.stderr);
                self.kill();
                panic!(
                    "`{}` took longer than {:?}\nstderr: {stderr}",
                    self.line, self.limit
                );
            }
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(20));
        };
        self.waited = true;
        Output {
            line: self.line.clone(),
            status,
            stdout: text_of(&self.stdout),
            stderr: text_of(&self.stderr),
            elapsed: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.waited {
            self.kill();
        }
    }
}

impl Output {
    /// Command line, end and output, for a message.
    pub fn describe(&self) -> String {
        let Self {
            line,
            status,
            stdout,
            stderr,
            ..
        } = self;
        format!(
            "`{line}`: {status}\nstdout: {}\nstderr: {}",
            tail(stdout),
            tail(stderr)
        )
    }

    /// Standard output and error together.
    pub fn text(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }
}

/// Waits for something that happens soon; fails the test, saying what, if it does not.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The last part of a long text.
fn tail(text: &str) -> &str {
    const TAIL_BYTES_MAX: usize = 4000;
    let mut start = text.len().saturating_sub(TAIL_BYTES_MAX);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// All of a file's text, leaving its position alone: the program shares it and may still write.
fn text_of(file: &File) -> String {
    let len = file.metadata().expect("stat of a temporary file").len();
    let mut bytes = vec![0; usize::try_from(len).expect("output fits in memory")];
    file.read_exact_at(&mut bytes, 0)
        .expect("read a temporary file");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn line_of(command: &Command) -> String {
    let mut words: Vec<OsString> = vec![command.get_program().to_owned()];
    words.extend(command.get_args().map(OsStr::to_owned));
    let words: Vec<_> = words
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    words.join(" ")
}
