//! Random operations, done to a file system and to the model, and compared.
//!
//! Step n of a run draws all it needs from a generator of its own, and chooses inodes, names and
//! open files by labels that do not depend on what else is there. So steps can be left out of a
//! run, and the others do what they did before, as far as that is possible: see
//! [`super::shrink`].
//!
//! The operations are in the files of their kind, the comparison is in [`check`].

mod bytes;
mod check;
mod inodes;
mod names;
mod ranges;

use std::sync::{Arc, Mutex};

use braidfs::{Errno, FILE_SIZE_MAX, FileSystem, Ino, OpenFile, ROOT_INO, Timestamp};

use super::content::PAGE;
use super::model::{Body, Model};
use super::rng::Rng;

/// How wild it gets.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Files are mostly shorter than this.
    pub size: u64,
    /// Longest read or write.
    pub io: u64,
    /// Bytes of all files together, roughly.
    pub total: u64,
    /// Different names in a directory.
    pub names: u64,
    /// Inodes, roughly.
    pub inodes: usize,
    /// Also operations that are made of several transaction groups' worth of steps, flags that
    /// make each change durable, and offsets far out.
    pub wide: bool,
    /// One in so many operations makes things durable.
    pub sync_every: u64,
    /// Compare what a step touched when it has ended.
    pub compare: bool,
}

/// What an operation promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    Plain,
    /// All that was done before is durable.
    Synced,
    /// What was done to this file is.
    FileSynced(Ino),
}

/// The operations of a run, as text.
#[derive(Default)]
pub struct Journal {
    lines: Mutex<Vec<String>>,
    /// Otherwise only the last one.
    keep: bool,
    /// Show each at once.
    show: bool,
}

impl Journal {
    pub fn new(keep: bool, show: bool) -> Arc<Self> {
        Arc::new(Self {
            lines: Mutex::default(),
            keep,
            show,
        })
    }

    fn add(&self, line: String) {
        if self.show {
            eprintln!("{line}");
        }
        let mut lines = self.lines.lock().expect("nobody panics with it");
        if !self.keep {
            lines.clear();
        }
        lines.push(line);
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("nobody panics with it").clone()
    }
}

/// An open file, named by the step that opened it.
#[derive(Clone)]
pub struct Opened {
    pub label: u64,
    pub file: Arc<OpenFile>,
}

impl Opened {
    fn ino(&self) -> Ino {
        self.file.ino()
    }

    fn may_write(&self) -> bool {
        self.file.flags() & libc::O_ACCMODE != libc::O_RDONLY
    }
}

pub struct World {
    pub fs: Arc<FileSystem>,
    pub model: Model,
    pub rng: Rng,
    pub limits: Limits,
    pub handles: Vec<Opened>,
    /// Operations that ran out of space.
    pub full: u64,
    /// Operations that were refused for a reason that the model knows.
    pub refused: u64,
    /// Nothing else is a reason to run out of it.
    pub is_crowded: bool,
    /// Metadata is full: that may be said before any other reason to refuse something.
    pub has_no_names: bool,
    seed: u64,
    journal: Arc<Journal>,
    /// When the step began.
    began: Timestamp,
    /// It has a line in the journal.
    is_said: bool,
}

impl World {
    pub fn new(fs: Arc<FileSystem>, seed: u64, limits: Limits, journal: &Arc<Journal>) -> Self {
        let root = fs.lookup(ROOT_INO, b".").expect("the root");
        let options = fs.options();
        let model = Model::new(&root, options.atime, options.nodiratime);
        Self {
            fs,
            model,
            rng: Rng(seed),
            limits,
            handles: Vec::new(),
            full: 0,
            refused: 0,
            is_crowded: false,
            has_no_names: false,
            seed,
            journal: Arc::clone(journal),
            began: Timestamp::now(),
            is_said: false,
        }
    }

    /// The last operation, for the message of a failed test.
    pub fn last(&self) -> String {
        self.journal.lines().pop().unwrap_or_default()
    }

    pub fn say(&mut self, what: std::fmt::Arguments<'_>) {
        self.is_said = true;
        self.journal.add(match self.model.now {
            u64::MAX => format!("{what}"),
            now => format!("{now}: {what}"),
        });
    }

    fn name(&mut self) -> Vec<u8> {
        if self.rng.one_in(200) {
            return vec![b'x'; 254 + self.rng.below(3) as usize];
        }
        format!("n{}", self.rng.below(self.limits.names)).into_bytes()
    }

    /// A name that is there, or maybe not.
    fn known_name(&mut self, dir: Ino) -> Vec<u8> {
        if self.rng.one_in(2) {
            return self.name();
        }
        match &self.model.nodes[&dir].body {
            Body::Dir { entries, .. } => {
                let label = |name: &Vec<u8>| u64::from(crc32c::crc32c(name));
                let names = entries.keys().map(|name| (label(name), name.clone()));
                self.rng.pick_labelled(names)
            }
            _ => None,
        }
        .unwrap_or_else(|| self.name())
    }

    /// An inode of which there is a reference, so that the kernel might use it.
    fn ino(&mut self) -> Ino {
        let known = self.model.nodes.iter();
        let known = known.filter(|(_, node)| node.lookups > 0 || node.opens > 0);
        let known = known.map(|(&ino, node)| (node.label, ino));
        self.rng.pick_labelled(known).expect("at least the root")
    }

    fn dir(&mut self) -> Ino {
        // Sometimes something that is none.
        if self.rng.one_in(25) {
            return self.ino();
        }
        let known = self.model.nodes.iter();
        let known = known.filter(|(_, node)| node.lookups > 0 && node.is_dir());
        let known = known.map(|(&ino, node)| (node.label, ino));
        self.rng.pick_labelled(known).expect("at least the root")
    }

    fn offset(&mut self) -> u64 {
        let limit = self.limits.size;
        let at = match self.rng.below(10) {
            0..4 => self.rng.below(limit),
            4..7 => self.rng.below(limit / PAGE) * PAGE,
            7 => (self.rng.below(limit / PAGE) * PAGE).saturating_sub(self.rng.below(3)),
            8 if self.limits.wide => self.rng.below(1 << 40),
            _ => self.rng.below(2 * PAGE),
        };
        at.min(FILE_SIZE_MAX / 2)
    }

    /// An offset, often near the end of this file.
    fn offset_in(&mut self, ino: Ino) -> u64 {
        let size = self.model.content(ino).size;
        if size < FILE_SIZE_MAX / 2 && self.rng.one_in(4) {
            return (size + self.rng.below(3)).saturating_sub(self.rng.below(2 * PAGE));
        }
        self.offset()
    }

    fn len(&mut self) -> u64 {
        let most = self.limits.io;
        match self.rng.below(20) {
            0..12 => 1 + self.rng.below(9000),
            12..15 => (1 + self.rng.below(most.min(256 << 10) / PAGE)) * PAGE,
            15 => 1 + self.rng.below(most),
            16 => (1 + self.rng.below(most / PAGE)) * PAGE,
            _ => 1 + self.rng.below(100),
        }
    }

    fn handle(&mut self) -> Option<Arc<OpenFile>> {
        let handles = self.handles.iter().map(|opened| (opened.label, opened));
        let chosen = self.rng.pick_labelled(handles)?;
        Some(Arc::clone(&chosen.file))
    }

    fn handle_to_write(&mut self) -> Option<Arc<OpenFile>> {
        let handles = self.handles.iter().filter(|opened| opened.may_write());
        let handles = handles.map(|opened| (opened.label, opened));
        let chosen = self.rng.pick_labelled(handles)?;
        Some(Arc::clone(&chosen.file))
    }

    fn keep_open(&mut self, file: Arc<OpenFile>) {
        let label = self.model.label();
        self.handles.push(Opened { label, file });
    }

    /// Compares an outcome with the model's; true if the model is to follow.
    #[track_caller]
    fn agrees<T>(&mut self, found: &Result<T, Errno>, expected: Result<(), Errno>) -> bool {
        let found = found.as_ref().map(|_| ()).map_err(|&error| error);
        if found == Err(Errno::NOSPC) && (expected.is_ok() || self.has_no_names) {
            self.note_full();
            return false;
        }
        assert_eq!(found, expected, "operation {}", self.last());
        self.refused += u64::from(found.is_err());
        found.is_ok()
    }

    /// Something found the volume full: it must be.
    #[track_caller]
    fn note_full(&mut self) {
        let free = self.fs.statfs().bfree;
        assert!(
            self.is_crowded,
            "operation {}: no space, and {free} blocks are free",
            self.last()
        );
        self.full += 1;
    }

    /// A step begins. What it does is to follow; then [`World::compare`].
    pub fn begin(&mut self, nth: u64) {
        self.model.begin(nth);
        self.rng = Rng::of(self.seed, nth);
        self.began = Timestamp::now();
        self.is_said = false;
    }

    /// Step `nth`: one random operation.
    pub fn step(&mut self, nth: u64) -> Done {
        self.begin(nth);
        let done = if self.rng.one_in(self.limits.sync_every) {
            self.sync()
        } else {
            self.operate();
            Done::Plain
        };
        if !self.is_said {
            self.say(format_args!("nothing to do"));
        }
        self.compare();
        done
    }

    /// One random operation, which does not end the step.
    pub fn operate(&mut self) {
        match self.rng.below(108) {
            0..11 => self.make(),
            11..14 => self.make_unnamed(),
            14..19 => self.link(),
            19..27 => self.remove(),
            27..35 => self.rename(),
            35..41 => self.lookup_or_forget(),
            41..47 => self.open_or_close(),
            47..66 => self.write(),
            66..76 => self.read(),
            76..81 => self.resize(),
            81..87 => self.fallocate(),
            87..92 => self.attributes(),
            92..95 => self.flags(),
            95..99 => self.xattr(),
            99..101 => self.access_list(),
            101..103 => self.list(),
            103 => self.seek(),
            104..107 => self.copy(),
            _ => self.replace_content(),
        }
    }

    fn sync(&mut self) -> Done {
        let whole = self.rng.one_in(3);
        let Some(file) = self.handle().filter(|_| !whole) else {
            self.say(format_args!("sync"));
            self.fs.sync().expect("sync");
            return Done::Synced;
        };
        self.say(format_args!("fsync {}", file.ino()));
        self.fs.fsync(&file, self.rng.one_in(2)).expect("fsync");
        self.model.node(file.ino());
        Done::FileSynced(file.ino())
    }

    /// Unmounts, with or without closing what is open.
    pub fn unmount(&mut self) {
        if self.rng.one_in(2) {
            for opened in std::mem::take(&mut self.handles) {
                self.close(&opened.file);
            }
        }
        self.fs.unmount().expect("unmount");
        self.handles.clear();
        self.model.forget_users();
    }

    /// Goes on after a mount, with references to all there is.
    pub fn go_on(&mut self, fs: Arc<FileSystem>) {
        self.fs = fs;
        for (&ino, node) in &mut self.model.nodes {
            self.fs.lookup_ino(ino).expect("it is there");
            node.lookups = 1;
        }
    }
}

/// After a failure: ends the threads of the file system, unless it hangs.
impl Drop for World {
    fn drop(&mut self) {
        const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
        if !std::thread::panicking() {
            return;
        }
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let fs = Arc::clone(&self.fs);
        std::thread::spawn(move || {
            let _unmounted = super::shrink::catch(true, || fs.unmount());
            let _waits = sender.send(());
        });
        let _ended = receiver.recv_timeout(PATIENCE);
    }
}
