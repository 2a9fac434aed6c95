//! Finding the few steps of a failed run that are enough to fail (delta debugging).

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What a panic said, and where.
#[derive(Clone, Debug)]
pub struct Panic {
    pub message: String,
    pub place: String,
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|&text| text.to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_default()
}

/// Runs something that may panic. `quiet`: without showing it.
pub fn catch<T>(quiet: bool, body: impl FnOnce() -> T) -> Result<T, Panic> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let former = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let place = info.location().map(ToString::to_string);
            PLACE.set(place.unwrap_or_default());
            if !QUIET.get() {
                former(info);
            }
        }));
    });
    QUIET.set(quiet);
    let ended = catch_unwind(AssertUnwindSafe(body));
    QUIET.set(false);
    ended.map_err(|panic| Panic {
        message: message(&*panic),
        place: PLACE.take(),
    })
}

/// How much shrinking may cost.
#[derive(Clone, Copy)]
pub struct Budget {
    pub time: Duration,
    pub attempts: u32,
}

/// Leaves steps out as long as the rest fails. `fails` runs a list of steps and gives the step
/// that failed, if one did. Returns what is left, and the number of attempts.
pub fn shrink(
    steps: Vec<u64>,
    budget: Budget,
    fails: &mut dyn FnMut(&[u64]) -> Option<u64>,
) -> (Vec<u64>, u32) {
    let (began, mut attempts) = (Instant::now(), 0);
    let mut steps = steps;
    let mut size = steps.len().div_ceil(2);
    while size > 0 {
        let before = steps.len();
        // From the end, as later steps depend on earlier ones.
        let mut end = steps.len();
        while end > 0 {
            if attempts == budget.attempts || began.elapsed() > budget.time {
                return (steps, attempts);
            }
            attempts += 1;
            let start = end.saturating_sub(size);
            let rest = [&steps[..start], &steps[end..]].concat();
            if let Some(last) = fails(&rest) {
                steps = rest;
                // What would come after the failure is no part of it.
                steps.retain(|&step| step <= last);
            }
            end = start.min(steps.len());
        }
        // Single steps again and again, until none can be left out.
        if size > 1 || steps.len() == before {
            size /= 2;
        }
    }
    (steps, attempts)
}
