//! A SQLite writer that says which rows are durable, and what must be true of its database.

use std::fs::{self, File};
use std::path::Path;

use crate::command::{Cmd, Running};

/// Transactions in a writer's script: more than it gets to.
const TRANSACTIONS: u64 = 20_000;
/// Rows that a database keeps; older ones are deleted, so that it does not grow for ever.
const ROWS_KEPT: u64 = 1000;

/// What every connection begins with. (EXTRA: with a rollback journal, FULL does not sync the
/// folder after a commit's unlink.)
fn settings(journal: &str) -> String {
    format!("PRAGMA journal_mode={journal};\nPRAGMA synchronous=EXTRA;\n")
}

/// Makes a database without rows.
pub fn create(database: &Path, journal: &str) {
    let tables = "CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT, b BLOB);\n\
                  CREATE INDEX i ON t(a);\n";
    let text = settings(journal) + tables;
    Cmd::new("sqlite3").arg(database).arg(text).quiet().ok();
}

/// The script of a writer that commits rows one after the other and prints each number once it
/// is durable; written to `path`.
pub fn write_script(path: &Path, journal: &str) {
    let mut text = settings(journal);
    for _ in 0..TRANSACTIONS {
        text += "BEGIN; INSERT INTO t(a,b) VALUES(hex(randomblob(9)),randomblob(3000));\n\
                 UPDATE t SET a=hex(randomblob(9)) \
                 WHERE id=abs(random())%(SELECT max(id) FROM t);\n";
        text += &format!("DELETE FROM t WHERE id<(SELECT max(id) FROM t)-{ROWS_KEPT};\n");
        text += "COMMIT; SELECT 'durable '||max(id) FROM t;\n";
    }
    fs::write(path, text).expect("the writer's script");
}

/// Starts a writer with a script of [`write_script`].
pub fn start_writer(script: &Path, database: &Path) -> Running {
    let input = File::open(script).expect("the writer's script");
    let writer = Cmd::new("stdbuf")
        .args(["--output=L", "sqlite3", "-bail"])
        .arg(database);
    writer.stdin(input).limit_secs(100).quiet().spawn()
}

/// The database is whole: SQLite says so, row `last` and all before it that are kept are there.
pub fn assert_intact(database: &Path, last: u64) {
    let check = "PRAGMA integrity_check; \
                 SELECT coalesce(max(id),0), coalesce(max(id)-min(id)+1-count(*),0) FROM t;";
    let output = Cmd::new("sqlite3").arg(database).arg(check).quiet().ok();
    let mut lines = output.stdout.lines();
    assert_eq!(lines.next(), Some("ok"), "{}", output.describe());
    let found = lines.next().and_then(|line| line.split_once('|'));
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let (max, gaps) = found
        .map(|pair| (number(pair.0), number(pair.1)))
        .expect("two numbers");
    assert!(max >= last, "the last row is {max}, row {last} was durable");
    assert_eq!(gaps, 0, "rows are missing before row {max}");
}
