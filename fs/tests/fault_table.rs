//! What programs see of each kind of device error in each operation, and what is there after the
//! next mount: run on simulated devices, checked, and written down as the tables of SEMANTICS.md.
//!
//! Each history is run twice. The first run, without a fault, finds the first request that the
//! operation makes of the devices; the second one has the fault there. Whatever the fault: a read
//! gives the right bytes or an error, what fsync called durable is there after the next mount, and
//! the volume is whole.
//!
//! `UPDATE=1 cargo test -p braidfs --test fault_table` writes the tables.
#![allow(missing_docs)]

mod common;

use std::cell::Cell;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use braidfs::{Errno, FileSystem, OpenFile, ROOT_INO, SetAttr};
use braidfs_blockdev::device::sim::SimEffect;
use braidfs_blockdev::{ChunkKind, ErrorKind, Op, SimDevice, Volume};
use common::*;

const TIMEOUT: Duration = Duration::from_millis(300);
const LEN: usize = 256 << 10;
const BLOCK: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Once,
    OneBlock,
    Dead,
    Full,
    Short,
    Hang,
    Flip,
    Misdirected,
    Lost,
}

const FAULTS: [(Fault, &str); 9] = [
    (Fault::Once, "EIO, once"),
    (Fault::OneBlock, "EIO, one block for good"),
    (Fault::Dead, "device dead"),
    (Fault::Full, "backing store full"),
    (Fault::Short, "short transfer, once"),
    (Fault::Hang, "device hangs"),
    (Fault::Flip, "bit flipped"),
    (Fault::Misdirected, "misdirected write"),
    (Fault::Lost, "lost write"),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Read { direct: bool },
    Write { direct: bool },
    Create,
    Rename,
    Unlink,
    Truncate,
    Mount,
    Umount,
}

const ACTIONS: [(Action, &str); 10] = [
    (Action::Read { direct: false }, "read"),
    (Action::Read { direct: true }, "read, O_DIRECT"),
    (Action::Write { direct: false }, "write, fsync"),
    (Action::Write { direct: true }, "write, O_DIRECT; fsync"),
    (Action::Create, "create, fsync"),
    (Action::Rename, "rename, fsync"),
    (Action::Unlink, "unlink, fsync of the directory"),
    (Action::Truncate, "truncate, fsync"),
    (Action::Mount, "mount"),
    (Action::Umount, "write, umount"),
];

impl Action {
    /// The kind of request at which the fault strikes.
    fn struck(self, fault: Fault) -> Option<Op> {
        let writes_only = matches!(fault, Fault::Full | Fault::Misdirected | Fault::Lost);
        match self {
            Action::Read { .. } if writes_only => None,
            Action::Read { .. } => Some(Op::Read),
            Action::Mount if !writes_only => Some(Op::Read),
            _ => Some(Op::Write),
        }
    }
}

fn word<T>(result: &Result<T, Errno>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => match error.0 {
            libc::EIO => "EIO".to_owned(),
            libc::EROFS => "EROFS".to_owned(),
            libc::ENOSPC => "ENOSPC".to_owned(),
            other => format!("errno {other}"),
        },
    }
}

/// What a history showed.
#[derive(Clone, PartialEq, Eq)]
struct Seen {
    first: String,
    again: String,
    umount: String,
    after: String,
}

struct Stage {
    sims: Vec<Arc<SimDevice>>,
    action: Action,
    /// The operation itself was done, whatever its fsync said.
    accepted: Cell<bool>,
}

/// Where the fault strikes.
#[derive(Clone, Copy)]
struct Place {
    device: usize,
    offset: u64,
}

impl Stage {
    /// A volume with one file of old bytes, cleanly unmounted.
    fn new(action: Action) -> Stage {
        let sims = devices(2, 24 << 20);
        format(&sims);
        let fs = mount(&sims);
        let file = create(&fs, ROOT_INO, "f");
        write(&fs, &file, 0, &pattern(1, LEN));
        fs.fsync(&file, false).unwrap();
        fs.release(&file);
        fs.unmount().unwrap();
        let accepted = Cell::new(false);
        Stage {
            sims,
            action,
            accepted,
        }
    }

    fn mount(&self) -> Result<Arc<FileSystem>, String> {
        let members = timed::members(&self.sims, TIMEOUT);
        let volume = Volume::assemble(members, false).map_err(|error| error.to_string())?;
        let mounted = FileSystem::mount(Arc::clone(&volume), options());
        mounted.map_err(|error| {
            let closed = volume.close();
            format!("{error} ({closed:?})")
        })
    }

    fn clear_logs(&self) {
        self.sims.iter().for_each(|sim| sim.clear_log());
    }

    /// The first request of that kind since the logs were cleared.
    fn first(&self, op: Op) -> Option<Place> {
        let mut all = self.sims.iter().enumerate().filter_map(|(device, sim)| {
            let offset = sim.log().iter().find(|record| record.op == op)?.offset;
            Some(Place { device, offset })
        });
        all.next()
    }

    fn strike(&self, fault: Fault, op: Op, at: Place) {
        let sim = &self.sims[at.device];
        let block = at.offset..at.offset + BLOCK;
        let eio = SimEffect::Fail(ErrorKind::Os(libc::EIO));
        match fault {
            Fault::Once => sim.inject(op, block, eio, Some(1)),
            Fault::OneBlock => sim.inject(op, block, eio, None),
            Fault::Dead => {
                for op in [Op::Read, Op::Write, Op::Flush] {
                    let gone = SimEffect::Fail(ErrorKind::Os(libc::ECONNABORTED));
                    sim.inject(op, 0..u64::MAX, gone, None);
                }
            }
            Fault::Full => {
                let full = SimEffect::Fail(ErrorKind::Os(libc::ENOSPC));
                sim.inject(Op::Write, 0..u64::MAX, full, None);
            }
            Fault::Short => sim.inject(op, block, SimEffect::Short(512), Some(1)),
            Fault::Hang => sim.hold(true),
            Fault::Flip if op == Op::Read => sim.flip_bit(at.offset + 100, 3),
            // Of what a write brings, when it is there.
            Fault::Flip => {}
            Fault::Misdirected => {
                sim.inject(op, block, SimEffect::Misdirect(4 << 20), Some(1));
            }
            Fault::Lost => sim.inject(op, block, SimEffect::Lose, Some(1)),
        }
    }

    fn heal(&self) {
        for sim in &self.sims {
            sim.heal();
            sim.hold(false);
            sim.release_all();
        }
    }

    /// What the operation and its fsync said.
    fn act(&self, fs: &FileSystem, file: &Arc<OpenFile>) -> Result<(), Errno> {
        match self.action {
            Action::Read { direct } => {
                let bytes = try_read(fs, file, 0, LEN, direct)?;
                assert!(bytes == pattern(1, LEN), "wrong bytes");
                Ok(())
            }
            Action::Write { direct } => {
                try_write(fs, file, 0, &pattern(2, LEN), direct)?;
                self.accepted.set(true);
                fs.fsync(file, false)
            }
            Action::Create => {
                let flags = libc::O_RDWR | libc::O_CREAT;
                let (_, new) = fs.create(ROOT_INO, b"new", 0o644, flags, &CRED)?;
                self.accepted.set(true);
                let done = fs.fsync(&new, false);
                fs.release(&new);
                done
            }
            Action::Rename => {
                fs.rename(ROOT_INO, b"f", ROOT_INO, b"g", 0, &CRED)?;
                self.accepted.set(true);
                fs.fsync(file, false)
            }
            Action::Unlink => {
                fs.unlink(ROOT_INO, b"f")?;
                self.accepted.set(true);
                fs.fsync_dir(ROOT_INO)
            }
            Action::Truncate => {
                let size = Some(4096);
                let set = SetAttr {
                    size,
                    ..SetAttr::default()
                };
                fs.setattr(file.ino(), &set, &CRED)?;
                self.accepted.set(true);
                fs.fsync(file, false)
            }
            Action::Mount => Ok(()),
            Action::Umount => {
                try_write(fs, file, 0, &pattern(2, LEN), false)?;
                self.accepted.set(true);
                Ok(())
            }
        }
    }

    /// What is durable now, after the devices are as they should be; checks that it may be.
    fn after(&self, may_fail_reads: bool) -> String {
        let fs = match self.mount() {
            Ok(fs) => fs,
            Err(error) => return format!("no mount: {error}"),
        };
        let listed = names(&fs, ROOT_INO);
        let mut state = Vec::new();
        for name in &listed {
            let file = open(&fs, name);
            let bytes = try_read(&fs, &file, 0, LEN, false);
            fs.release(&file);
            state.push(match (name.as_str(), bytes) {
                ("new", Ok(bytes)) if bytes.is_empty() => "the new name".to_owned(),
                (_, Ok(bytes)) if bytes == pattern(1, LEN) && name == "g" => "new name".to_owned(),
                (_, Ok(bytes)) if bytes == pattern(1, LEN) => "old".to_owned(),
                (_, Ok(bytes)) if bytes == pattern(2, LEN) => "new".to_owned(),
                (_, Ok(bytes)) if bytes == pattern(1, LEN)[..4096] => "new size".to_owned(),
                (name, Ok(bytes)) => panic!("{name}: {} wrong bytes", bytes.len()),
                (_, Err(Errno(libc::EIO))) if may_fail_reads => "EIO".to_owned(),
                (name, Err(error)) => panic!("{name}: {error}"),
            });
        }
        if listed.is_empty() {
            state.push("no file".to_owned());
        }
        fs.unmount().expect("a healed volume");
        check(&self.sims);
        if state.len() == 2 {
            // The old file beside a new one says nothing new.
            state.retain(|each| each != "old");
        }
        state.join(", ")
    }
}

/// Mounts with the fault there; `-` stands for what there is no word of.
fn run_mount(stage: &Stage, strike: impl FnOnce(), heal: impl FnOnce(), late: bool) -> Seen {
    stage.clear_logs();
    strike();
    let mounted = stage.mount();
    heal();
    let (first, umount) = match mounted {
        Ok(fs) => ("ok", word(&fs.unmount())),
        Err(_) => ("refused", "-".to_owned()),
    };
    Seen {
        first: first.to_owned(),
        again: "-".to_owned(),
        umount,
        after: stage.after(late),
    }
}

/// Runs the operation; `strike` comes just before it. `late`: the fault may cost what was written.
fn run(stage: &Stage, strike: impl FnOnce(), heal: impl FnOnce(), late: bool) -> Seen {
    if stage.action == Action::Mount {
        return run_mount(stage, strike, heal, late);
    }
    let fs = stage.mount().expect("nothing is wrong yet");
    let file = open(&fs, "f");
    stage.clear_logs();
    strike();
    let mut first = word(&stage.act(&fs, &file));
    if stage.action == Action::Umount {
        fs.release(&file);
        first = word(&fs.unmount());
        heal();
        return Seen {
            umount: first.clone(),
            first,
            again: "-".to_owned(),
            after: stage.after(late),
        };
    }
    heal();
    let again = match stage.action {
        Action::Read { .. } => word(&stage.act(&fs, &file)),
        Action::Unlink => word(&fs.fsync_dir(ROOT_INO)),
        _ => word(&fs.fsync(&file, false)),
    };
    fs.release(&file);
    let umount = word(&fs.unmount());
    Seen {
        first,
        again,
        umount,
        after: stage.after(late),
    }
}

/// One cell of the table: the history with the fault where the same history without it made its
/// first request.
fn history(action: Action, fault: Fault) -> Option<Seen> {
    let op = action.struck(fault)?;
    let stage = Stage::new(action);
    let place = Cell::new(None);
    let clean = run(&stage, || (), || place.set(stage.first(op)), false);
    assert_eq!(clean.first, "ok");
    let place = place.get().or_else(|| stage.first(op)).expect("a request");
    let stage = Stage::new(action);
    let changed = matches!(fault, Fault::Flip | Fault::Misdirected | Fault::Lost);
    let heal = || {
        stage.heal();
        if fault == Fault::Flip && op == Op::Write {
            stage.sims[place.device].flip_bit(place.offset + 100, 3);
        }
    };
    let seen = run(&stage, || stage.strike(fault, op, place), heal, changed);
    let durable = stage.accepted.get() && (seen.first == "ok" || seen.again == "ok");
    if durable && !changed {
        assert!(seen.after != "old", "what fsync acknowledged is gone");
    }
    Some(seen)
}

fn table() -> String {
    let mut text = String::from(
        "| operation | fault | it said | again, when it is over | umount | after the next mount |\n\
         | --- | --- | --- | --- | --- | --- |\n",
    );
    for (action, what) in ACTIONS {
        for (fault, how) in FAULTS {
            let Some(seen) = history(action, fault) else {
                continue;
            };
            let Seen {
                first,
                again,
                umount,
                after,
            } = seen;
            eprintln!("{what}, {how}: {first}, {again}, {umount}, {after}");
            let row = writeln!(
                text,
                "| {what} | {how} | {first} | {again} | {umount} | {after} |"
            );
            row.expect("a string takes everything");
        }
    }
    text
}

/// A write of one page into a small file.
struct Small {
    name: &'static str,
    old: Vec<u8>,
    at: usize,
    page: Vec<u8>,
    wanted: Vec<u8>,
}

/// A request of its fsync: device, operation, offset.
type Position = (usize, Op, u64);

impl Small {
    fn new(name: &'static str, old_pages: usize, page: usize) -> Small {
        let (len, at) = (BLOCK as usize, page * BLOCK as usize);
        let (old, page) = (pattern(1, old_pages * len), pattern(2, len));
        let mut wanted = old.clone();
        wanted.resize(wanted.len().max(at + len), 0);
        wanted[at..at + len].copy_from_slice(&page);
        Small {
            name,
            old,
            at,
            page,
            wanted,
        }
    }

    fn prepare(&self) -> (Vec<Arc<SimDevice>>, Arc<FileSystem>, Arc<OpenFile>) {
        let sims = devices(2, 24 << 20);
        format(&sims);
        let fs = mount(&sims);
        let file = create(&fs, ROOT_INO, "f");
        write(&fs, &file, 0, &self.old);
        fs.fsync(&file, false).unwrap();
        sims.iter().for_each(|sim| sim.clear_log());
        (sims, fs, file)
    }

    /// Every place that the write and its fsync send something to, and whether it is file data.
    fn positions(&self) -> Vec<(Position, bool)> {
        let (sims, fs, file) = self.prepare();
        write(&fs, &file, self.at as u64, &self.page);
        fs.fsync(&file, false).unwrap();
        let mut found: Vec<(Position, bool)> = Vec::new();
        for (device, sim) in sims.iter().enumerate() {
            for record in sim.log() {
                let position = (device, record.op, record.offset);
                if record.op != Op::Read && !found.iter().any(|known| known.0 == position) {
                    found.push((position, is_data(&fs, position)));
                }
            }
        }
        fs.release(&file);
        fs.unmount().unwrap();
        found
    }

    fn fail_at(&self, (device, op, offset): Position) -> (Seen, &'static str) {
        let (sims, fs, file) = self.prepare();
        let eio = SimEffect::Fail(ErrorKind::Os(libc::EIO));
        sims[device].inject(op, offset..offset + BLOCK, eio, None);
        write(&fs, &file, self.at as u64, &self.page);
        let first = word(&fs.fsync(&file, false));
        sims[device].heal();
        let page = match try_read(&fs, &file, 0, self.wanted.len(), false) {
            Ok(bytes) if bytes == self.wanted => "new",
            Ok(bytes) if bytes == self.old => "old",
            Ok(_) => panic!("wrong bytes"),
            Err(_) => "EIO",
        };
        let again = word(&fs.fsync(&file, false));
        fs.release(&file);
        let umount = word(&fs.unmount());
        check(&sims);
        let fs = mount(&sims);
        let bytes = read(&fs, &open(&fs, "f"), 0, self.wanted.len());
        fs.unmount().unwrap();
        assert!(bytes == self.wanted || bytes == self.old, "wrong bytes");
        let after = if bytes == self.wanted { "new" } else { "old" };
        assert!(after == "new" || (first == "EIO" && again == "EIO"));
        let seen = Seen {
            first,
            again,
            umount,
            after: after.to_owned(),
        };
        (seen, page)
    }

    fn rows(&self, text: &mut String) {
        let mut rows: Vec<String> = Vec::new();
        for (position, is_data) in self.positions() {
            let what = match (position.1, is_data) {
                (Op::Flush, _) => "flush",
                (_, true) => "a block of data",
                _ => "a block of metadata",
            };
            let (seen, page) = self.fail_at(position);
            let Seen {
                first,
                again,
                umount,
                after,
            } = seen;
            let name = self.name;
            let row =
                format!("| {name} | {what} | {first} | {page} | {again} | {umount} | {after} |\n");
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        rows.sort();
        rows.iter().for_each(|row| text.push_str(row));
    }
}

fn is_data(fs: &FileSystem, (device, _, offset): Position) -> bool {
    fs.volume().chunks().iter().any(|chunk| {
        let mut places = chunk.members.iter();
        chunk.kind == ChunkKind::Data
            && places.any(|member| {
                let end = member.offset_bytes + chunk.member_len_bytes;
                usize::from(member.dev) == device && (member.offset_bytes..end).contains(&offset)
            })
    })
}

fn position_table() -> String {
    let mut text = String::from(
        "| write | failed | first fsync | page then | second fsync, healed | umount | \
         after the next mount |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    Small::new("overwrite of the middle page of three", 3, 1).rows(&mut text);
    Small::new("append of a page", 2, 2).rows(&mut text);
    text
}

/// Compares a part of SEMANTICS.md with what it should say, or writes it.
fn compare(mark: &str, wanted: &str) {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../SEMANTICS.md"));
    let text = std::fs::read_to_string(&path).expect("SEMANTICS.md");
    let (begin, end) = (
        format!("<!-- {mark} -->\n"),
        format!("<!-- end of {mark} -->"),
    );
    let from = text.find(&begin).expect("the mark") + begin.len();
    let to = from + text[from..].find(&end).expect("the end mark");
    if std::env::var_os("UPDATE").is_some() {
        let new = format!("{}{wanted}{}", &text[..from], &text[to..]);
        return std::fs::write(&path, new).expect("write SEMANTICS.md");
    }
    assert!(
        text[from..to] == *wanted,
        "SEMANTICS.md says otherwise; UPDATE=1 writes it. What was seen:\n{wanted}"
    );
}

/// In one test, since both write the same file.
#[test]
fn each_fault_in_each_operation_is_as_semantics_md_says() {
    compare("positions", &position_table());
    compare("faults", &table());
}
