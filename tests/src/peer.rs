//! Other processes that a test talks to, a line at a time.
//!
//! [`Peer::play`] starts the test program once more, in a role that its `main` knows ([`run`]):
//! what two processes do to each other's files cannot be shown by two threads of one.
//! [`Peer::xfs_io`] starts xfs_io on a file, which keeps a mapping open between commands. Peers
//! belong to the process group of the test, so they go when its time is up.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

/// Tells a process its role.
const ROLE: &str = "BRAIDFS_TEST_PEER";
/// What xfs_io answers to `help quit`: the end of the answer to the command before.
const XFS_IO_END: &str = "quit -- exit the program";

/// A role's name, and what it does with its arguments.
pub type Role = (&'static str, fn(&[String]));

/// Plays the role that this process was started for, if any: first thing in a theme's `main`.
pub fn run(roles: &[Role]) -> Option<ExitCode> {
    let name = std::env::var(ROLE).ok()?;
    let role = roles.iter().find(|role| role.0 == name);
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    (role.expect("a role that this program knows").1)(&arguments);
    Some(ExitCode::SUCCESS)
}

/// Answers each line on standard input with a line, until there are no more.
pub fn answer_each(mut answer: impl FnMut(&[&str]) -> String) {
    for line in std::io::stdin().lines() {
        let line = line.expect("a line from the test");
        let words: Vec<&str> = line.split_whitespace().collect();
        println!("{}", answer(&words));
    }
}

/// A process to talk to.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// This test program again, in a role.
    pub fn play<A: AsRef<OsStr>>(role: &str, arguments: impl IntoIterator<Item = A>) -> Self {
        let exe = std::env::current_exe().expect("the path of this program");
        let mut command = Command::new(exe);
        command.args(arguments).env(ROLE, role);
        Self::start(command)
    }

    /// An xfs_io that has opened a file with the given flags.
    pub fn xfs_io(flags: &[&str], path: &Path) -> Self {
        let mut command = Command::new("stdbuf");
        command
            .args(["--output=L", "xfs_io"])
            .args(flags)
            .arg(path)
            .stderr(Stdio::inherit());
        Self::start(command)
    }

    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start a peer");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        Self {
            child,
            input,
            output,
        }
    }

    /// Says one line.
    pub fn tell(&mut self, line: &str) {
        let input = self.input.as_mut().expect("open until the end");
        writeln!(input, "{line}").expect("the peer listens");
    }

    /// Waits for one line.
    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        let count = self.output.read_line(&mut line).expect("a peer's line");
        assert!(count > 0, "the peer is gone");
        line.trim_end().to_owned()
    }

    /// Says a line and waits for the answer.
    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    /// Has xfs_io run a command; what it printed.
    pub fn command(&mut self, command: &str) -> String {
        self.tell(command);
        self.tell("help quit");
        let mut text = String::new();
        loop {
            let line = self.hear();
            if line == XFS_IO_END {
                return text;
            }
            text.push_str(&line);
            text.push('\n');
        }
    }

    /// Has xfs_io dump a range with a `-v` command; the bytes.
    pub fn dump(&mut self, command: &str) -> Vec<u8> {
        let text = self.command(command);
        let mut bytes = Vec::new();
        for line in text.lines() {
            let hex = line.split_once(":  ").map_or("", |split| split.1);
            let hex = hex.split("  ").next().unwrap_or_default();
            let of_line = hex.split(' ').map(|pair| u8::from_str_radix(pair, 16));
            bytes.extend(of_line.map(|byte| byte.expect("a dump in hexadecimal")));
        }
        assert!(!bytes.is_empty(), "`{command}` showed nothing: {text}");
        bytes
    }

    /// Lets it come to its end; it must have been content.
    pub fn finish(mut self) {
        drop(self.input.take());
        let status = self.child.wait().expect("wait for a peer");
        assert!(status.success(), "a peer failed: {status}");
    }

    /// Ends it without a warning.
    pub fn kill(mut self) {
        self.child.kill().expect("kill a peer");
        self.child.wait().expect("wait for a peer");
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.input.take());
        if matches!(self.child.try_wait(), Ok(None)) {
            let _gone_already = self.child.kill();
            let _gone_already = self.child.wait();
        }
    }
}
