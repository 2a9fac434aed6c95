//! Checking and repairing an unmounted volume.
//!
//! Six passes over the metadata tables, in order of their keys: inodes with attributes and
//! deletions (`records`); names against inodes and listings (`names`); the tree (`tree`);
//! extents (`extents`); free space and blocks named twice (`space`, `shared`); counts
//! (`counts`). Labels and chunk table were looked at when the volume was assembled. Data blocks
//! are not read, but for those named twice: verifying them is a scrub's work.
//!
//! A check changes nothing. What a repair would change is gathered by the same passes
//! (`edits`), so that each pass sees what those before it decided, and made durable in one
//! commit: a power cut leaves the old state or the repaired one. Then the passes run once more, and
//! what they still find is what is left.
//!
//! Memory: 80 bytes for an inode (`inodes`), 32 MiB for a TiB of data that is in use and as much
//! for one that is free (`bitmap`), and what is to be changed. Nothing for a name or a block.

mod bitmap;
mod counts;
mod edits;
mod extents;
mod inodes;
mod names;
mod progress;
pub mod raw;
mod records;
mod report;
mod session;
mod shared;
mod space;
mod tree;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use braidfs_blockdev::Volume;

use crate::meta::offline::Reader;
use crate::meta::store::Table;
use crate::{Ino, MountError};
use bitmap::Bitmap;
use edits::Edits;
use inodes::Inodes;
use progress::Ticker;
pub use progress::{FsckError, PASSES, Progress};
use report::Classes;
pub use report::{Class, PROBLEMS_MAX, Problem, Report};
use session::Session;

/// What to do about problems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing.
    Check,
    /// Repair all that can be.
    Repair,
    /// Repair what can lose nothing.
    Preen,
    /// Ask for each class.
    Ask,
}

/// How to go about it.
pub struct Options<'a> {
    /// What to do about problems.
    pub mode: Mode,
    /// Set by somebody else to stop it. Once the commit has begun it is not looked at.
    pub cancel: &'a AtomicBool,
    /// Is told how far it is.
    pub progress: &'a mut dyn FnMut(Progress),
    /// Is asked, with the number of problems, whether to repair a class.
    pub ask: &'a mut dyn FnMut(Class, u64) -> bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What was found.
    pub found: Report,
    /// What was left after a repair; `None` if nothing was repaired.
    pub left: Option<Report>,
}

impl Outcome {
    /// Whether nothing is wrong now.
    pub fn is_clean(&self) -> bool {
        self.left.as_ref().unwrap_or(&self.found).is_clean()
    }
}

/// Checks a volume that was assembled read-only, and changes nothing.
pub fn check(volume: Arc<Volume>) -> Result<Report, MountError> {
    let options = Options {
        mode: Mode::Check,
        cancel: &AtomicBool::new(false),
        progress: &mut |_| {},
        ask: &mut |_, _| false,
    };
    match run(volume, options) {
        Ok(outcome) => Ok(outcome.found),
        Err(FsckError::Mount(error)) => Err(error),
        Err(FsckError::Store(error)) => Err(error.into()),
        Err(error @ FsckError::Cancelled) => Err(MountError::Metadata(error.into())),
    }
}

/// Checks a volume that was assembled read-only, and repairs it as the mode says. For a repair the
/// devices were opened so that they can be written later.
pub fn run(volume: Arc<Volume>, mut options: Options<'_>) -> Result<Outcome, FsckError> {
    let mut session = Session::open(volume)?;
    let outcome = check_and_repair(&mut session, &mut options);
    let closed = session.close();
    let outcome = outcome?;
    closed?;
    Ok(outcome)
}

fn check_and_repair(
    session: &mut Session,
    options: &mut Options<'_>,
) -> Result<Outcome, FsckError> {
    let mut allowed = match options.mode {
        Mode::Repair => Classes::ALL,
        Mode::Preen => safe_classes(),
        Mode::Check | Mode::Ask => Classes::none(),
    };
    let (found, mut edits, damaged) = examine_all(session, allowed, options)?;
    if options.mode == Mode::Ask && !found.is_clean() {
        for (class, count) in found.classes() {
            if (options.ask)(class, count) {
                allowed.add(class);
            }
        }
        if damaged && !allowed.has(Class::Store) {
            // Damaged tables cannot be changed.
            allowed.clear();
        }
        if allowed != Classes::none() {
            edits = examine_all(session, allowed, options)?.1;
        }
    }
    let wanted = found.classes().any(|(class, _)| allowed.has(class));
    // Opening the store to write it drops what cannot be taken over.
    let keeps_journal = session.journal_damage().is_some() && !allowed.has(Class::Journal);
    if !wanted || keeps_journal || damaged && !allowed.has(Class::Store) {
        return Ok(Outcome { found, left: None });
    }
    // Labels are written again when the volume is taken for writing, and when it is closed.
    session.make_writable()?;
    edits.apply(session, damaged)?;
    session.forget_journal_damage();
    let left = examine_all(session, Classes::none(), options)?.0;
    Ok(Outcome {
        found,
        left: Some(left),
    })
}

/// All passes; where redb meets a page that it cannot read, once more over what is readable. Also
/// tells whether it came to that.
fn examine_all(
    session: &Session,
    allowed: Classes,
    options: &mut Options<'_>,
) -> Result<(Report, Edits, bool), FsckError> {
    let whole = session.store()?.reader().map_err(FsckError::from);
    let error = match whole.and_then(|reader| examine(session, &reader, allowed, options)) {
        Err(FsckError::Store(error)) => error,
        done => return done.map(|(report, edits)| (report, edits, false)),
    };
    log::warn!("metadata: {error}; going on with what can be read");
    let Some(salvage) = session.salvage() else {
        return Err(error.into());
    };
    let reader = Reader::Salvaged(salvage);
    let (report, edits) = examine(session, &reader, allowed, options)?;
    Ok((report, edits, true))
}

fn safe_classes() -> Classes {
    let mut safe = Classes::none();
    for class in Class::ALL.into_iter().filter(|class| class.is_safe()) {
        safe.add(class);
    }
    safe
}

/// All passes over the durable state, once.
fn examine(
    session: &Session,
    reader: &Reader,
    allowed: Classes,
    options: &mut Options<'_>,
) -> Result<(Report, Edits), FsckError> {
    let mut check = Check {
        reader,
        volume: &session.volume,
        allowed,
        ticker: Ticker::new(options.cancel, options.progress),
        report: Report::default(),
        edits: Edits::default(),
        inodes: Inodes::default(),
        made: Vec::new(),
        many_names: false,
        unlisted: Vec::new(),
        lost_found: None,
        data: space::data_ranges(&session.volume),
        used: Bitmap::default(),
        dropped: Bitmap::default(),
        twice: Bitmap::default(),
        free: Bitmap::default(),
    };
    check.labels();
    check.journal(session);
    check.losses();
    check.pass_inodes()?;
    check.pass_names()?;
    check.pass_tree()?;
    check.pass_extents()?;
    check.pass_space()?;
    check.pass_counts()?;
    Ok((check.report, check.edits))
}

/// The state that the passes hand on.
struct Check<'a> {
    reader: &'a Reader,
    volume: &'a Volume,
    /// What may be repaired.
    allowed: Classes,
    ticker: Ticker<'a>,
    report: Report,
    edits: Edits,
    inodes: Inodes,
    /// Directories that the repair makes.
    made: Vec<Ino>,
    /// Some directory has more than one name.
    many_names: bool,
    /// Entries that need a new place in their listing: directory, name.
    unlisted: Vec<(Ino, Vec<u8>)>,
    lost_found: Option<Ino>,
    /// The data chunks' blocks.
    data: Vec<Range<u64>>,
    /// Blocks of extents that stay.
    used: Bitmap,
    /// Blocks of extents, or parts of them, that go.
    dropped: Bitmap,
    /// Blocks that more than one extent has.
    twice: Bitmap,
    /// Free in the durable state.
    free: Bitmap,
}

impl Check<'_> {
    /// All copies of label and chunk table. A volume that is being written has none that is bad.
    fn labels(&mut self) {
        for fault in self.volume.check_labels() {
            let device = self.volume.device_name(fault.dev);
            let object = format!("{device}, byte {}", fault.offset);
            self.problem(Class::Label, object, fault.to_string());
        }
    }

    /// What of the journal could not be taken over.
    fn journal(&mut self, session: &Session) {
        if let Some(damage) = session.journal_damage() {
            self.problem(Class::Journal, "journal".to_owned(), damage.to_owned());
        }
    }

    /// Pages of the metadata store that cannot be read.
    fn losses(&mut self) {
        for (table, loss) in self.reader.losses() {
            let object = format!("table {table}, byte {} of the metadata file", loss.offset);
            let message = "cannot be read in any copy; its records are lost".to_owned();
            self.problem(Class::Store, object, message);
        }
    }

    /// Notes a problem; returns whether to repair it.
    fn problem(&mut self, class: Class, object: String, message: String) -> bool {
        self.report.add(class, object, message);
        self.allowed.has(class)
    }

    /// A record as it will be.
    fn current(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, FsckError> {
        match self.edits.get(table, key) {
            Some(change) => Ok(change.map(<[u8]>::to_vec)),
            None => Ok(self.reader.get(table, key)?),
        }
    }
}
