//! A terminal and its user, both played by tmux.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::command::{Cmd, wait_until};
use crate::env::{Env, Skip};

/// A shell in a terminal of 80 by 24.
#[derive(Debug)]
pub struct Terminal {
    socket: PathBuf,
}

impl Terminal {
    /// Opens it; skips the test if there is no tmux.
    pub fn open(env: &Env) -> Result<Self, Skip> {
        env.need_tools(&["tmux"])?;
        let terminal = Self {
            socket: env.path("tmux"),
        };
        let size = ["-x", "80", "-y", "24"];
        let new = terminal.tmux(&["-f", "/dev/null", "new-session", "-d"]);
        new.args(size).args(["env", "PS1=$ ", "sh"]).ok();
        Ok(terminal)
    }

    /// An order to tmux.
    pub fn tmux(&self, words: &[&str]) -> Cmd {
        let tmux = Cmd::new("tmux")
            .env("TERM", "xterm")
            .env("LC_ALL", "C.UTF-8");
        tmux.arg("-S").arg(&self.socket).args(words).quiet()
    }

    /// Presses keys, as tmux calls them.
    pub fn keys(&self, keys: &[&str]) {
        self.tmux(&["send-keys"]).args(keys).ok();
    }

    /// Types a line to the shell.
    pub fn type_line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]).ok();
        self.keys(&["Enter"]);
    }

    /// What is on the screen.
    pub fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"]).ok().stdout
    }

    /// Waits until the screen shows this; gives it.
    pub fn wait_for(&self, what: &str, shows: impl Fn(&str) -> bool) -> String {
        let mut screen = String::new();
        let mut look = || {
            screen = self.screen();
            shows(&screen)
        };
        let found = catch_unwind(AssertUnwindSafe(|| {
            wait_until(what, &mut look);
        }));
        assert!(found.is_ok(), "no {what} on the screen:\n{screen}");
        screen
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]).run();
    }
}
