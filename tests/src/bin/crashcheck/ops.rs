//! The operations of which workloads are made, and the small tree that they work on.
//!
//! An operation is one or more steps; each step is whole or not there after a power cut, and the
//! tree after each is a state that may be found. The names are those of `--workload`.

use libc::{
    FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH, FALLOC_FL_ZERO_RANGE as ZERO,
    RENAME_EXCHANGE as EXCHANGE, RENAME_NOREPLACE as NOREPLACE, RENAME_WHITEOUT as WHITEOUT,
};

/// What is done to the file system in one go.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Create(&'static str),
    Mkdir(&'static str),
    Fifo(&'static str),
    Symlink(&'static str),
    Link(&'static str, &'static str),
    Rename(&'static str, &'static str, u32),
    Unlink(&'static str),
    Rmdir(&'static str),
    /// Path, offset, length.
    Write(&'static str, u64, usize),
    Append(&'static str, usize),
    /// Past the cache.
    Direct(&'static str, u64, usize),
    /// Durable when it returns.
    Durable(&'static str, u64, usize),
    Truncate(&'static str, u64),
    /// Path, mode, offset, length.
    Fallocate(&'static str, i32, u64, u64),
    SetXattr(&'static str, &'static str, usize),
    RemoveXattr(&'static str, &'static str),
    Chmod(&'static str, u32),
    /// From, to, offset in the target, length.
    Copy(&'static str, &'static str, u64, u64),
    /// Opens a file that stays open to the end.
    Hold(&'static str),
    /// Makes a file without a name in this directory, which stays open.
    Tmpfile(&'static str),
    /// Writes to the file opened last.
    WriteHeld(u64, usize),
    /// Gives the file opened last a name.
    LinkHeld(&'static str),
    Fsync(&'static str),
    FsyncHeld,
    Sync,
    /// A commit that nobody asked for, as after the interval: it promises nothing.
    Commit,
}

use Step::*;

/// A named operation.
pub struct Op {
    pub name: &'static str,
    pub steps: &'static [Step],
}

/// Makes the first tree. `a`: three pages, 100 bytes, an attribute; `b`, also `d/h`: two pages and
/// an attribute; `d/x`: one page; `e/s`: an empty directory; `l`: a symbolic link; `p`: set aside.
pub const FIRST: &[Step] = &[
    Create("a"),
    Write("a", 0, 12_388),
    SetXattr("a", "user.zero", 30),
    Create("b"),
    Write("b", 0, 8192),
    SetXattr("b", "user.one", 20),
    Mkdir("d"),
    Create("d/x"),
    Write("d/x", 0, 4096),
    Link("b", "d/h"),
    Mkdir("e"),
    Mkdir("e/s"),
    Symlink("l"),
    Create("p"),
    Fallocate("p", 0, 0, 16_384),
];

const fn op(name: &'static str, steps: &'static [Step]) -> Op {
    Op { name, steps }
}

/// All of them.
pub const OPS: &[Op] = &[
    op("create-n", &[Create("n")]),
    op("create-d-n", &[Create("d/n")]),
    op("put-n", &[Create("n"), Write("n", 0, 9000)]),
    op("write-a-page", &[Write("a", 0, 4096)]),
    op("write-a-inside", &[Write("a", 5000, 100)]),
    op("write-a-all", &[Write("a", 0, 12_388)]),
    op("write-x", &[Write("d/x", 0, 4096)]),
    op("write-b-far", &[Write("b", 70_000, 5000)]),
    op("write-p", &[Write("p", 4096, 4096)]),
    op("append-a", &[Append("a", 3000)]),
    op("append-b", &[Append("b", 8192)]),
    op("direct-a", &[Direct("a", 0, 65_536)]),
    op("direct-n", &[Create("n"), Direct("n", 0, 65_536)]),
    op("durable-b", &[Durable("b", 4096, 4096)]),
    op("cut-a-to-0", &[Truncate("a", 0)]),
    op("cut-a", &[Truncate("a", 5000)]),
    op("cut-b-to-0", &[Truncate("b", 0)]),
    op("lengthen-a", &[Truncate("a", 60_000)]),
    op("punch-a", &[Fallocate("a", PUNCH | KEEP, 4096, 4096)]),
    op("punch-a-ragged", &[Fallocate("a", PUNCH | KEEP, 100, 6000)]),
    op("zero-a", &[Fallocate("a", ZERO, 0, 8192)]),
    op(
        "zero-a-write",
        &[Fallocate("a", ZERO, 0, 8192), Write("a", 0, 4096)],
    ),
    op("zero-b-keep", &[Fallocate("b", ZERO | KEEP, 4096, 40_960)]),
    op("fallocate-a", &[Fallocate("a", 0, 8192, 65_536)]),
    op("fallocate-b-keep", &[Fallocate("b", KEEP, 8192, 65_536)]),
    op("link-a-n", &[Link("a", "n")]),
    op("link-x-n", &[Link("d/x", "n")]),
    op("rename-a-n", &[Rename("a", "n", 0)]),
    op("rename-a-n-new", &[Rename("a", "n", NOREPLACE)]),
    op("rename-a-b", &[Rename("a", "b", 0)]),
    op("rename-n-b", &[Rename("n", "b", 0)]),
    op("rename-a-x", &[Rename("a", "d/x", 0)]),
    op("rename-x-n", &[Rename("d/x", "n", 0)]),
    op("rename-d-n", &[Rename("d", "n", 0)]),
    op("rename-d-s", &[Rename("d", "e/s", 0)]),
    op("rename-s-n", &[Rename("e/s", "n", 0)]),
    op("exchange-a-b", &[Rename("a", "b", EXCHANGE)]),
    op("exchange-a-d", &[Rename("a", "d", EXCHANGE)]),
    op("exchange-x-e", &[Rename("d/x", "e", EXCHANGE)]),
    op("whiteout-a-n", &[Rename("a", "n", WHITEOUT)]),
    op("unlink-a", &[Unlink("a")]),
    op("unlink-b", &[Unlink("b")]),
    op("unlink-h", &[Unlink("d/h")]),
    op("unlink-x", &[Unlink("d/x")]),
    op("unlink-p", &[Unlink("p")]),
    op(
        "unlink-a-open",
        &[Hold("a"), Unlink("a"), WriteHeld(0, 5000)],
    ),
    op("rmdir-s", &[Rmdir("e/s")]),
    op("mkdir-n", &[Mkdir("n")]),
    op("mkdir-s-n", &[Mkdir("e/s/n")]),
    op("symlink-n", &[Symlink("n")]),
    op("fifo-n", &[Fifo("n")]),
    op("setxattr-a", &[SetXattr("a", "user.two", 100)]),
    op("setxattr-b-big", &[SetXattr("b", "user.one", 20_000)]),
    op("removexattr-b", &[RemoveXattr("b", "user.one")]),
    op("chmod-a", &[Chmod("a", 0o600)]),
    op("chmod-d", &[Chmod("d", 0o700)]),
    op("tmpfile", &[Tmpfile("d"), WriteHeld(0, 5000), FsyncHeld]),
    op(
        "tmpfile-n",
        &[Tmpfile("d"), WriteHeld(0, 5000), LinkHeld("n")],
    ),
    op("copy-a-b", &[Copy("a", "b", 4096, 12_388)]),
    op(
        "replace-b",
        &[Create("t"), Write("t", 0, 6000), Rename("t", "b", 0)],
    ),
    op("fsync-a", &[Fsync("a")]),
    op("fsync-b", &[Fsync("b")]),
    op("fsync-n", &[Fsync("n")]),
    op("fsync-x", &[Fsync("d/x")]),
    op("fsync-d", &[Fsync("d")]),
    op("fsync-root", &[Fsync("")]),
    op("sync", &[Sync]),
    op("commit", &[Commit]),
];

/// Some operations by number, in order.
pub type Workload = Vec<usize>;

/// Its name, as `--workload` takes it.
pub fn name_of(workload: &[usize]) -> String {
    let names: Vec<_> = workload.iter().map(|&nth| OPS[nth].name).collect();
    names.join(",")
}

/// The workload of that name.
pub fn parse(name: &str) -> Result<Workload, String> {
    let number = |word: &str| {
        let found = OPS.iter().position(|op| op.name == word);
        found.ok_or_else(|| format!("there is no operation '{word}'; try 'crashcheck list'"))
    };
    name.split(',').map(number).collect()
}

/// The steps of its operations.
pub fn steps_of(workload: &[usize]) -> Vec<Step> {
    let steps = workload.iter().flat_map(|&nth| OPS[nth].steps);
    steps.copied().collect()
}
