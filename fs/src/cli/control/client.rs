//! Asking the daemon of a mount.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::super::devices::io_text;
use super::super::exit::{self, CliError};
use super::super::umount;
use super::{FAREWELL, PEER_TIMEOUT, directories, is_private, socket_name};
use crate::fuse::mounts::MountEntry;

/// Connects to the daemon of a mount; `None` when there is none.
pub fn connect(entry: &MountEntry) -> Option<UnixStream> {
    let uid = entry.user_id()?;
    directories(uid).iter().find_map(|directory| {
        if !is_private(directory, uid).unwrap_or(false) {
            return None;
        }
        UnixStream::connect(directory.join(socket_name(entry.dev))).ok()
    })
}

/// The mount at a place and a connection to its daemon, for commands that need both.
pub fn reach(place: &Path) -> Result<(MountEntry, UnixStream), CliError> {
    let entry = umount::find(place).map_err(|error| CliError::new(exit::USAGE, error.message))?;
    match connect(&entry) {
        Some(stream) => Ok((entry, stream)),
        None => Err(exit::usage(format!(
            "{}: its daemon cannot be reached; is it braidfs, alive, and yours?",
            entry.mount_point.display()
        ))),
    }
}

/// How long a daemon may take for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// It only has to look.
    Short,
    /// It writes, recovers or waits for devices: as long as that takes.
    Long,
}

/// Says `words` to the daemon of a mount. The inner error is what it said against them.
pub fn ask(
    stream: &UnixStream,
    words: &str,
    patience: Patience,
) -> io::Result<Result<String, String>> {
    stream.set_read_timeout(match patience {
        Patience::Short => Some(PEER_TIMEOUT),
        Patience::Long => None,
    })?;
    let mut out = stream;
    out.write_all(format!("{words}\n").as_bytes())?;
    let line = read_line(&mut BufReader::new(stream))?;
    Ok(match line.strip_prefix("error ") {
        Some(text) => Err(text.to_owned()),
        None => Ok(line),
    })
}

/// What was asked of the daemon of the mount at `place`, or why not, in one error.
pub fn told(
    place: &Path,
    stream: &UnixStream,
    words: &str,
    patience: Patience,
) -> Result<String, CliError> {
    let answer = ask(stream, words, patience)
        .map_err(|error| exit::usage(format!("{}: {}", place.display(), io_text(&error))))?;
    answer.map_err(|error| exit::usage(format!("{}: {error}", place.display())))
}

/// The same of what it only has to look for, and says in JSON.
pub fn told_json<T: DeserializeOwned>(
    place: &Path,
    stream: &UnixStream,
    words: &str,
) -> Result<T, CliError> {
    let line = told(place, stream, words, Patience::Short)?;
    serde_json::from_str(&line)
        .map_err(|error| exit::usage(format!("{}: unexpected answer: {error}", place.display())))
}

/// A connection on which the daemon will say how the unmount went.
pub struct Waiting {
    reader: BufReader<UnixStream>,
}

impl Waiting {
    /// Asks; returns when the daemon knows that somebody waits.
    pub fn begin(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PEER_TIMEOUT))?;
        let mut out = &stream;
        writeln!(out, "wait")?;
        let mut reader = BufReader::new(stream);
        let line = read_line(&mut reader)?;
        if line != "waiting" {
            return Err(io::Error::new(ErrorKind::InvalidData, "unexpected answer"));
        }
        Ok(Self { reader })
    }

    /// Waits until the daemon has finished. It takes as long as writing everything back takes; if
    /// the daemon dies, the connection ends.
    pub fn end(mut self) -> Result<(), String> {
        let gone = "the daemon ended without saying that all data is safe";
        self.reader
            .get_ref()
            .set_read_timeout(None)
            .map_err(|error| error.to_string())?;
        let said = read_line(&mut self.reader);
        wait_gone(self.reader.get_ref());
        match said {
            Ok(line) if line == "ok" => Ok(()),
            Ok(line) => match line.strip_prefix("error ") {
                Some(text) => Err(text.to_owned()),
                None => Err(gone.to_owned()),
            },
            Err(_) => Err(gone.to_owned()),
        }
    }
}

/// Waits a moment for the end of a daemon that has said its last word: what its members lie on may
/// be unmounted next, and is in use as long as the process is there.
fn wait_gone(stream: &UnixStream) {
    use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
    let Ok(peer) = getsockopt(stream, PeerCredentials) else {
        return;
    };
    let stat = format!("/proc/{}/stat", peer.pid());
    let until = Instant::now() + FAREWELL;
    // The state follows the name, which may have blanks and brackets of its own.
    let runs = || {
        let text = fs::read_to_string(&stat).unwrap_or_default();
        let state = text
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        !matches!(state, None | Some('Z' | 'X'))
    };
    while peer.pid() != nix::unistd::getpid().as_raw() && runs() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    if line.pop() == Some('\n') {
        Ok(line)
    } else {
        Err(ErrorKind::UnexpectedEof.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_client_hears_ok_errors_and_death() {
        for (said, expected) in [
            ("waiting\nok\n", Ok(())),
            ("waiting\nerror disk on fire\n", Err("disk on fire")),
            (
                "waiting\n",
                Err("the daemon ended without saying that all data is safe"),
            ),
        ] {
            let (client, mut server) = UnixStream::pair().unwrap();
            server.write_all(said.as_bytes()).unwrap();
            let waiting = Waiting::begin(client).unwrap();
            drop(server);
            assert_eq!(waiting.end(), expected.map_err(str::to_owned));
        }
    }
}
