//! Programs at work when the daemon is killed: fio with verify, SQLite, git.
//!
//! Each is a process that says `durable X` when it has made X durable in its own way. After the
//! kill the last of these words is what must be there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::thread::Scope;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, Running};
use braidfs_tests::env::Env;
use braidfs_tests::sqlite;

/// One pass of fio over two files: one is overwritten in place, one is new and ends with fsync.
/// The same jobs make the same contents, so every block verifies, whichever pass it came from.
const FIO: &str = "fio --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randrepeat=1 \
    --fallocate=none --thread --bs=4k --directory=\"$1\" $3 \
    --name=over --filename=over --rw=randwrite --size=1m --fsync=100 \
    --name=fresh --filename=\"fresh-$2\" --rw=write --size=1m --end_fsync=1";
/// Commits until it is stopped; the folder's fsync makes the renamed reference durable, which
/// git itself leaves to later.
const GIT: &str = "cd \"$1\"; n=$2
    while :; do
        n=$((n + 1))
        echo \"$n $$\" >\"file-$((n % 20)).txt\"
        git add --all
        git commit --quiet --message \"change $n\"
        sync .git
        echo \"durable $(git rev-parse HEAD)\"
    done";
/// How many commits a repository gets before a new one is made.
const COMMITS_MAX: u64 = 150;

/// How long a program may take to make something durable.
const PROGRESS_LIMIT: Duration = Duration::from_secs(60);

/// What the programs have made durable.
pub struct Programs {
    dir: PathBuf,
    databases: Vec<Database>,
    git: Git,
    /// The number of the last fresh file of fio that is durable.
    fio_last: u64,
    fio_passes: u64,
}

struct Database {
    path: PathBuf,
    script: PathBuf,
    last: u64,
}

struct Git {
    dir: PathBuf,
    /// The last commit that was acknowledged.
    head: Option<String>,
    commits: u64,
    total: u64,
}

/// The processes of one round.
pub struct AtWork {
    fio: Running,
    git: Running,
    writers: Vec<Running>,
}

impl AtWork {
    /// Ends what is left of them.
    pub fn end(mut self) {
        self.all().into_iter().for_each(Running::kill);
    }

    fn all(&mut self) -> Vec<&mut Running> {
        let mut all = vec![&mut self.fio, &mut self.git];
        all.extend(&mut self.writers);
        all
    }

    /// Waits until one of the programs, by turns, has made something durable in this round:
    /// however busy the machine is, all get on. Nothing may fail before the daemon is killed.
    pub fn wait_for_one(&mut self, round: u64) {
        let turn = (round % 4) as usize;
        let deadline = Instant::now() + PROGRESS_LIMIT;
        while self.all()[turn].last_durable().is_none() {
            let program = &mut self.all()[turn];
            let text = program.text_so_far();
            assert!(
                Instant::now() < deadline,
                "nothing durable in {PROGRESS_LIMIT:?}: {text}"
            );
            assert!(
                program.is_running(),
                "a program ended before the daemon was killed: {text}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        for process in self.all() {
            let running = process.is_running();
            let text = process.text_so_far();
            assert!(
                running,
                "a program ended before the daemon was killed: {text}"
            );
        }
    }
}

impl Programs {
    /// Databases, a repository and fio's first files on a fresh mount.
    pub fn new(env: &Env, mountpoint: &Path) -> Self {
        let databases = ["wal", "delete"].map(|journal| {
            let script = env.path(&format!("{journal}.sql"));
            sqlite::write_script(&script, journal);
            let path = mountpoint.join(format!("{journal}.db"));
            sqlite::create(&path, journal);
            let last = 0;
            Database { path, script, last }
        });
        let programs = Self {
            dir: mountpoint.to_owned(),
            databases: databases.into(),
            git: Git::new(mountpoint.join("repository")),
            fio_last: 0,
            fio_passes: 0,
        };
        programs.fio(0, "").ok();
        programs
    }

    fn fio(&self, number: u64, extra: &str) -> Cmd {
        let words = [
            self.dir.as_os_str().to_owned(),
            number.to_string().into(),
            extra.into(),
        ];
        Cmd::sh(FIO, words).quiet()
    }

    /// Starts everything.
    pub fn start(&self) -> AtWork {
        // Older files go, as nobody checks them any more.
        let passes = format!(
            "one() {{ {FIO}; }}; dir=$1; n=$2
             while :; do
                 n=$((n + 1))
                 one \"$dir\" \"$n\" \"\" >&2
                 echo \"durable $n\"
                 rm -f \"$dir/fresh-$((n - 2))\"
             done"
        );
        let words = [
            self.dir.as_os_str().to_owned(),
            self.fio_last.to_string().into(),
        ];
        let fio = Cmd::sh(&passes, words).quiet().spawn();
        let words = [
            self.git.dir.as_os_str().to_owned(),
            self.git.commits.to_string().into(),
        ];
        let git = git(Cmd::sh(GIT, words)).spawn();
        let start = |database: &Database| sqlite::start_writer(&database.script, &database.path);
        AtWork {
            fio,
            git,
            writers: self.databases.iter().map(start).collect(),
        }
    }

    /// Takes down what the programs saw durable so far. To be called before the kill: SQLite
    /// takes a folder that it cannot open any more for one that needs no fsync.
    pub fn take_down(&mut self, at_work: &AtWork) {
        for (database, writer) in self.databases.iter_mut().zip(&at_work.writers) {
            if let Some(row) = writer.last_durable() {
                database.last = row.parse().expect("a row number");
            }
        }
        if let Some(number) = at_work.fio.last_durable() {
            let number = number.parse().expect("a file number");
            self.fio_passes += number - self.fio_last;
            self.fio_last = number;
        }
        let head = at_work.git.last_durable();
        self.git.head = head.or(self.git.head.take());
    }

    /// After a mount: what was durable is there and everything is whole.
    pub fn verify<'s>(&'s mut self, scope: &'s Scope<'s, '_>) {
        for database in &self.databases {
            scope.spawn(|| sqlite::assert_intact(&database.path, database.last));
        }
        let fio = self.fio(self.fio_last, "--verify_only=1");
        scope.spawn(move || fio.ok());
        scope.spawn(|| self.git.verify());
    }

    /// Each program got something done in all the rounds together.
    pub fn assert_all_worked(&self) {
        let rows = self.databases.iter().map(|database| database.last).min();
        let least = [rows.unwrap_or(0), self.git.total, self.fio_passes];
        assert!(
            least.iter().all(|count| *count > 0),
            "a program did nothing: {self}"
        );
    }
}

impl fmt::Display for Programs {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<u64> = self
            .databases
            .iter()
            .map(|database| database.last)
            .collect();
        let (commits, passes) = (self.git.total, self.fio_passes);
        write!(
            out,
            "{rows:?} rows, {commits} commits, {passes} passes of fio"
        )
    }
}

/// Git without the user's own settings.
fn git(command: Cmd) -> Cmd {
    let command = command.env("GIT_CONFIG_GLOBAL", "/dev/null");
    command.env("GIT_CONFIG_SYSTEM", "/dev/null").quiet()
}

impl Git {
    fn new(dir: PathBuf) -> Self {
        let made = Self {
            dir,
            head: None,
            commits: 0,
            total: 0,
        };
        made.init();
        made
    }

    fn init(&self) {
        let script = "rm -rf \"$1\"; git init --quiet --initial-branch=main \"$1\"; cd \"$1\"
            git config user.name T; git config user.email t@localhost
            git config core.fsync all; git config core.fsyncMethod fsync
            git config gc.auto 0; git config maintenance.auto false; sync .git";
        git(Cmd::sh(script, [&self.dir])).ok();
    }

    /// Locks of a killed git are removed, as git asks its user to; nothing else is mended.
    fn verify(&mut self) {
        let script = "cd \"$1\"; find .git -name '*.lock' -delete
            git fsck --full --strict --no-dangling --no-progress
            git rev-parse --quiet --verify HEAD >/dev/null || { [ -z \"$2\" ] && exit 0; }
            [ -z \"$2\" ] || git merge-base --is-ancestor \"$2\" HEAD
            git reset --quiet --hard
            git rev-list --count HEAD";
        let head = self.head.clone().unwrap_or_default();
        let words = [self.dir.as_os_str().to_owned(), head.into()];
        let output = git(Cmd::sh(script, words)).ok();
        let count = output.stdout.lines().last().map_or(Ok(0), str::parse);
        let count: u64 = count.expect("the number of commits");
        self.total += count - self.commits;
        self.commits = count;
        if count > COMMITS_MAX {
            self.init();
            (self.head, self.commits) = (None, 0);
        }
    }
}
