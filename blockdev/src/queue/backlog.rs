//! One lane of waiting requests, oldest first, with front and back merge.

use crate::chain::Chain;
use crate::error::Op;
use crate::request::Parts;
use std::collections::BTreeMap;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It waits by itself.
    Waits,
    /// It continues a waiting one.
    MergedBack,
    /// It comes right before a waiting one.
    MergedFront,
}

/// Why two requests do not merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoMerge {
    /// Another operation or lane, or not one that merges.
    OtherKind,
    /// Not adjacent.
    Gap,
    /// The result would be longer than a request may be.
    TooLarge,
}

/// Pure: may `next` be appended to `first`?
pub(crate) fn may_merge(first: &Parts, next: &Parts, bytes_max: u64) -> Result<(), NoMerge> {
    let kind = |parts: &Parts| (parts.dev, parts.op, parts.lane);
    if kind(first) != kind(next) || first.is_retry || next.is_retry {
        return Err(NoMerge::OtherKind);
    }
    if !matches!(first.op, Op::Read | Op::Write) {
        return Err(NoMerge::OtherKind);
    }
    if first.end() != next.offset {
        return Err(NoMerge::Gap);
    }
    if first.len + next.len > bytes_max {
        return Err(NoMerge::TooLarge);
    }
    Ok(())
}

/// Links `next` behind `first`. O(1).
pub(crate) fn merge_back(first: &mut Parts, next: Parts) {
    first.len += next.len;
    first.chain.append(next.chain);
}

/// Links `before` before `first`. O(1).
pub(crate) fn merge_front(first: &mut Parts, before: Parts) {
    first.offset = before.offset;
    first.len += before.len;
    first.chain.prepend(before.chain);
}

/// Waiting requests. `by_age` owns them; `by_start` finds the neighbours of a newcomer: its keys
/// are (operation, first byte, age), which are unique.
#[derive(Default)]
pub(crate) struct Backlog {
    by_age: BTreeMap<u64, Parts>,
    by_start: BTreeMap<(bool, u64, u64), ()>,
    next_age: u64,
}

fn start_key(parts: &Parts, age: u64) -> (bool, u64, u64) {
    (parts.op == Op::Write, parts.offset, age)
}

impl Backlog {
    pub(crate) fn is_empty(&self) -> bool {
        self.by_age.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.by_age.len()
    }

    /// Merges `parts` with a waiting request, or lets it wait.
    pub(crate) fn add(&mut self, parts: Parts, bytes_max: u64) -> Added {
        if !self.by_age.is_empty() {
            let is_write = parts.op == Op::Write;
            let before = (is_write, parts.offset, 0);
            if let Some((&key, ())) = self.by_start.range((is_write, 0, 0)..before).next_back()
                && let Some(first) = self.by_age.get_mut(&key.2)
                && may_merge(first, &parts, bytes_max).is_ok()
            {
                merge_back(first, parts);
                return Added::MergedBack;
            }
            let at_end = (is_write, parts.end(), 0)..=(is_write, parts.end(), u64::MAX);
            if let Some((&key, ())) = self.by_start.range(at_end).next()
                && let Some(first) = self.by_age.get_mut(&key.2)
                && may_merge(&parts, first, bytes_max).is_ok()
            {
                self.by_start.remove(&key);
                merge_front(first, parts);
                self.by_start.insert(start_key(first, key.2), ());
                return Added::MergedFront;
            }
        }
        let age = self.next_age;
        self.next_age += 1;
        self.by_start.insert(start_key(&parts, age), ());
        self.by_age.insert(age, parts);
        Added::Waits
    }

    /// The oldest request.
    pub(crate) fn pop(&mut self) -> Option<Parts> {
        let (age, parts) = self.by_age.pop_first()?;
        self.by_start.remove(&start_key(&parts, age));
        Some(parts)
    }
}

/// Sorts requests of one device and joins neighbours; counts the joins. For a plug, whose requests
/// are all new, so that order among them is free.
pub(crate) fn sort_and_merge(requests: &mut Vec<Parts>, bytes_max: u64) -> u64 {
    if requests.len() < 2 {
        return 0;
    }
    requests.sort_by_key(|parts| (parts.lane, parts.op == Op::Write, parts.offset));
    let mut merges = 0;
    requests.dedup_by(|next, first| {
        if may_merge(first, next, bytes_max).is_err() {
            return false;
        }
        let chain: Chain = std::mem::take(&mut next.chain);
        first.len += next.len;
        first.chain.append(chain);
        merges += 1;
        true
    });
    merges
}
