//! Keeps panics of redb from ending the process.
//!
//! redb believes what its pages say, and panics where they make no sense. What can be told of a
//! page by itself is refused before redb sees it (see [`super::page`]), and what redb would follow
//! without a bound is looked at when the store is opened (see [`super::system`]). The rest ends
//! here: a panic inside redb becomes an error.
//!
//! Look-ups are [`caught`]: unwinding them drops nothing but shared pages. Everything else may
//! panic once more in a destructor while it unwinds, which would abort, so it runs on a thread of
//! its own ([`Contained::run`]): such a thread never returns from the panic hook. It is left where
//! it is, with what it holds, and the store is not used any more. A store that panicked is never
//! written or closed again; redb has committed nothing then, so the durable state is what it was.
//!
//! Panics elsewhere, and in what redb's file is made of ([`outside`]), go to whoever reported them
//! before.
//!
//! No locks of its own. Nothing is held while a thread of its own works but what the caller holds.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Once};

use parking_lot::RwLock;
use redb::{AccessGuard, Database};

/// Where a thread is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Outside,
    /// In redb.
    Inside,
    /// In redb, which has panicked.
    Unwinding,
}

type LastWords = Box<dyn Fn(redb::Error)>;

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Outside) };
    /// What the first panic said.
    static WORDS: RefCell<String> = const { RefCell::new(String::new()) };
    /// Tells who waits for this thread that it will never answer.
    static LAST_WORDS: RefCell<Option<LastWords>> = const { RefCell::new(None) };
}

/// The hook that was there before.
type Former = dyn Fn(&PanicHookInfo<'_>) + Send + Sync;

type Report = dyn Fn(&PanicHookInfo<'_>, &Former) + Send + Sync;

/// Told of panics outside redb; without it they go where they went.
static REPORT: RwLock<Option<Arc<Report>>> = RwLock::new(None);

/// From now on panics outside redb go to `report`, those inside become errors.
pub(crate) fn watch(report: impl Fn(&PanicHookInfo<'_>, &Former) + Send + Sync + 'static) {
    *REPORT.write() = Some(Arc::new(report));
    watch_anyway();
}

/// Installs the hook. It stays: whoever replaces one waits for the threads that are in it, of which
/// one may have been left there.
fn watch_anyway() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let former = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if take_over(info) {
                return;
            }
            let report = REPORT.read().clone();
            match report {
                Some(report) => report(info, &*former),
                None => former(info),
            }
        }));
    });
}

/// Whether a panic is one of redb. Does not return where unwinding would abort.
fn take_over(info: &PanicHookInfo<'_>) -> bool {
    match PLACE.get() {
        Place::Outside => false,
        Place::Inside => {
            PLACE.set(Place::Unwinding);
            WORDS.set(describe(info));
            true
        }
        Place::Unwinding => {
            let Some(last_words) = LAST_WORDS.take() else {
                return false;
            };
            last_words(error());
            loop {
                std::thread::park();
            }
        }
    }
}

fn describe(info: &PanicHookInfo<'_>) -> String {
    let payload: &dyn Any = info.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("no message").replace('\n', " ");
    let Some(place) = info.location() else {
        return text;
    };
    let file = place.file().rsplit('/').next().unwrap_or_default();
    format!("{text} ({file}:{})", place.line())
}

fn error() -> redb::Error {
    redb::Error::Corrupted(format!(
        "pages of the metadata store make no sense: redb stopped with '{}'; unmount and run \
         'braidfs fsck -n'",
        WORDS.take()
    ))
}

/// Does what reads in redb; a panic becomes an error.
pub(super) fn caught<R>(work: impl FnOnce() -> Result<R, redb::Error>) -> Result<R, redb::Error> {
    watch_anyway();
    let before = PLACE.replace(Place::Inside);
    let done = catch_unwind(AssertUnwindSafe(work));
    PLACE.set(before);
    done.unwrap_or_else(|_| Err(error()))
}

/// Does what redb asks of its file: none of its panics are redb's.
pub(super) fn outside<R>(work: impl FnOnce() -> R) -> R {
    let before = PLACE.replace(Place::Outside);
    let done = work();
    PLACE.set(before);
    done
}

/// What became of a store.
#[derive(Default)]
struct Fate {
    panicked: AtomicBool,
    /// A thread was left inside redb, with whatever it has locked.
    stuck: AtomicBool,
}

/// A snapshot, or a part of one, that is only used where a panic does no harm.
pub(super) struct Guarded<T> {
    /// `None` while it is dropped.
    value: Option<T>,
    fate: Arc<Fate>,
}

impl<T> Guarded<T> {
    /// Reads in it.
    pub(super) fn read<R>(
        &self,
        work: impl FnOnce(&T) -> Result<R, redb::Error>,
    ) -> Result<R, redb::Error> {
        match &self.value {
            Some(value) if !self.fate.stuck.load(Ordering::Relaxed) => caught(|| work(value)),
            _ => Err(redb::Error::PreviousIo),
        }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        let value = self.value.take();
        if self.fate.stuck.load(Ordering::SeqCst) {
            std::mem::forget(value);
        } else if let Err(error) = caught(|| {
            drop(value);
            Ok(())
        }) {
            log::error!("metadata: letting go of a snapshot: {error}");
        }
    }
}

/// A key and a value of redb.
pub(super) type Pair<'a, K, V> = (AccessGuard<'a, K>, AccessGuard<'a, V>);

/// The next record of a range, of which the last one was `before`. That keys rise bounds how many
/// there may be.
pub(super) fn next_pair<'a, K: redb::Key + 'static, V: redb::Value + 'static>(
    range: &mut redb::Range<'a, K, V>,
    before: Option<&Pair<'a, K, V>>,
) -> Result<Option<Pair<'a, K, V>>, redb::Error> {
    caught(|| {
        let Some(pair) = range.next().transpose()? else {
            return Ok(None);
        };
        if let Some((before, _)) = before {
            let (before, key) = (before.value(), pair.0.value());
            let (before, key) = (K::as_bytes(&before), K::as_bytes(&key));
            if K::compare(before.as_ref(), key.as_ref()).is_ge() {
                return Err(disorder());
            }
        }
        touch(&pair);
        Ok(Some(pair))
    })
}

/// Looks at a record where a panic does no harm; it will look the same later.
pub(super) fn touch<K: redb::Key + 'static, V: redb::Value + 'static>(pair: &Pair<'_, K, V>) {
    let (_key, _value) = (pair.0.value(), pair.1.value());
}

/// The error where keys are not where they should be.
pub(super) fn disorder() -> redb::Error {
    let what = "keys of a metadata table are out of order; run 'braidfs fsck -n'";
    redb::Error::Corrupted(what.to_owned())
}

/// A database whose panics are errors.
pub(super) struct Contained {
    /// `None` once it is closed.
    db: Option<Arc<Database>>,
    fate: Arc<Fate>,
}

/// Does something on a thread of its own.
fn apart<R: Send + 'static>(
    fate: &Arc<Fate>,
    work: impl FnOnce() -> Result<R, redb::Error> + Send + 'static,
) -> Result<R, redb::Error> {
    let (sender, receiver) = sync_channel(1);
    let (fate, given_up) = (Arc::clone(fate), sender.clone());
    let thread = std::thread::Builder::new().name("braidfs-meta".into());
    thread.spawn(move || {
        let of_hook = Arc::clone(&fate);
        LAST_WORDS.set(Some(Box::new(move |error| {
            of_hook.panicked.store(true, Ordering::SeqCst);
            of_hook.stuck.store(true, Ordering::SeqCst);
            // There is room for one answer, and no other was given.
            given_up.try_send(Err(error)).unwrap_or_default();
        })));
        watch_anyway();
        PLACE.set(Place::Inside);
        let done = catch_unwind(AssertUnwindSafe(work));
        PLACE.set(Place::Outside);
        let done = done.unwrap_or_else(|_| {
            fate.panicked.store(true, Ordering::SeqCst);
            Err(error())
        });
        LAST_WORDS.set(None);
        sender.send(done).unwrap_or_default();
    })?;
    let gone = || redb::Error::Corrupted("a thread of the metadata store ended".to_owned());
    receiver.recv().unwrap_or_else(|_| Err(gone()))
}

impl Contained {
    /// Opens what is there, with a cache of that many bytes beside the page cache.
    pub(super) fn open(
        backend: impl redb::StorageBackend,
        cache_bytes: usize,
    ) -> Result<Self, redb::Error> {
        let fate = Arc::default();
        let db = apart(&fate, move || {
            super::system::check(&backend)?;
            let mut builder = Database::builder();
            let opened = builder
                .set_cache_size(cache_bytes)
                .create_with_backend(backend)?;
            Ok(Arc::new(opened))
        })?;
        let db = Some(db);
        Ok(Self { db, fate })
    }

    /// Does something on a thread of its own, unless it is closed or has panicked before.
    pub(super) fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<R, redb::Error> + Send + 'static,
    ) -> Result<R, redb::Error> {
        self.check()?;
        let db = self.db.as_ref().ok_or(redb::Error::DatabaseClosed)?;
        let db = Arc::clone(db);
        apart(&self.fate, move || work(&db))
    }

    fn check(&self) -> Result<(), redb::Error> {
        match self.fate.panicked.load(Ordering::SeqCst) {
            true => Err(redb::Error::PreviousIo),
            false => Ok(()),
        }
    }

    /// Something that was read from it.
    pub(super) fn guard<T>(&self, value: T) -> Guarded<T> {
        Guarded {
            value: Some(value),
            fate: Arc::clone(&self.fate),
        }
    }

    /// Closes it: redb marks its file as closed.
    pub(super) fn close(mut self) -> Result<(), redb::Error> {
        self.check()?;
        match self.db.take().and_then(Arc::into_inner) {
            Some(db) => apart(&self.fate, move || Ok(db.close()?)),
            None => Err(redb::Error::DatabaseClosed),
        }
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        let Some(db) = self.db.take() else { return };
        if self.check().is_err() {
            // Nobody knows what is locked, and what of it is half done.
            std::mem::forget(db);
        } else if let Err(error) = apart(&self.fate, move || {
            drop(db);
            Ok(())
        }) {
            log::error!("metadata: letting go of the store: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use redb::backends::InMemoryBackend;

    use super::*;

    /// Panics once more while a panic unwinds.
    struct Worse;

    impl Drop for Worse {
        fn drop(&mut self) {
            panic!("in a destructor");
        }
    }

    fn open() -> Contained {
        Contained::open(InMemoryBackend::new(), 1 << 20).expect("a new store")
    }

    fn says(result: Result<(), redb::Error>, words: &str) {
        let error = result.expect_err("an error").to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn a_panic_is_an_error_and_the_store_is_not_used_again() {
        let store = open();
        let snapshot = store.guard(5);
        says(
            store.run(|_| panic!("the first")),
            "'the first (contain.rs:",
        );
        says(store.run(|_| Ok(())), "revious");
        snapshot.read(|_| Ok(())).expect("no thread was left in it");
    }

    /// In a process of its own: this one could not end with a thread that is left in the hook.
    #[test]
    fn a_panic_while_unwinding_ends_nothing() {
        const KEY: &str = "BRAIDFS_TEST_UNWINDING";
        if std::env::var_os(KEY).is_none() {
            let name = "meta::contain::tests::a_panic_while_unwinding_ends_nothing";
            let program = std::env::current_exe().expect("this program");
            let mut child = std::process::Command::new(program);
            let ended = child
                .args(["--exact", name, "--nocapture"])
                .env(KEY, "1")
                .output();
            let ended = ended.expect("start this program");
            assert_eq!(ended.status.code(), Some(7), "{ended:?}");
            return;
        }
        let store = open();
        let snapshot = store.guard(5);
        let work = |_: &Database| {
            let _worse = Worse;
            panic!("the first")
        };
        says(store.run(work), "'the first (contain.rs:");
        says(snapshot.read(|_| Ok(())), "revious");
        says(store.close(), "revious");
        watch(|_, _| std::process::exit(7));
        panic!("not redb's");
    }

    #[test]
    fn a_lookup_that_panics_is_an_error_each_time() {
        for words in ["one", "other"] {
            says(caught(|| panic!("{words}")), words);
        }
    }

    #[test]
    fn a_panic_below_redb_is_not_redbs() {
        let inside = caught(|| {
            assert!(PLACE.get() == Place::Inside);
            outside(|| assert!(PLACE.get() == Place::Outside));
            assert!(PLACE.get() == Place::Inside);
            Ok(())
        });
        inside.expect("no panic");
        assert!(PLACE.get() == Place::Outside);
    }
}
