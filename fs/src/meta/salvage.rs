//! Reading the tables when pages of the store cannot be read: what the readable pages hold.
//!
//! redb gives up at the first page that cannot be read. This walks the trees of redb's durable
//! state by itself (redb's format: docs/design.md of redb 4), passes over what it cannot read, and
//! says where that is. Nothing in a page is believed: lengths are checked before they are used, and
//! keys that do not rise are passed over.
//!
//! A table with losses is built anew from the rest; see [`super::offline`].

use std::collections::HashSet;

use redb::StorageBackend;

use super::backend::MetaStorage;
use super::page::{
    BRANCH, CHILD_LEN, Extent, Geometry, LEAF, Widths, child_at, u16_at, u32_at, u64_at,
};
use super::store::{DEFINITION_NAMES, FREE_NAME};
use super::system::DEPTH_MAX;

pub(super) const MAGIC: &[u8; 9] = b"redb\x1a\x0a\xa9\x0d\x0a";
pub(super) const HEADER_LEN: usize = 320;

/// Where the root of a table's tree is, and how long its keys and values are, where that is fixed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tree {
    pub root: Option<u64>,
    pub len: u64,
    pub key_len: Option<usize>,
    pub value_len: Option<usize>,
}

impl Tree {
    pub(super) fn widths(&self) -> Widths {
        (self.key_len, self.value_len)
    }
}

/// A page that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// Byte offset in the metadata file.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// What is lost where no page can be named, or one that another table may have.
const NO_PAGE: Loss = Loss { offset: 0, len: 0 };

impl From<Extent> for Loss {
    fn from(Extent { offset, len }: Extent) -> Self {
        Self { offset, len }
    }
}

impl Loss {
    /// Whether it is a page that can be named.
    pub(crate) fn is_page(&self) -> bool {
        self.len > 0
    }
}

/// The readable part of a store.
pub(crate) struct Salvage {
    file: MetaStorage,
    geometry: Geometry,
    /// In the order of the tables; that of free space is the last one.
    trees: Vec<Tree>,
}

/// Whether to go on with a walk.
type Goes<E> = Result<bool, E>;

/// Is called for each record.
pub(crate) type Visit<'a, E> = &'a mut dyn FnMut(&[u8], &[u8]) -> Goes<E>;

/// What a walk calls: for each record, and for each page that cannot be read.
struct Visitor<'a, E> {
    from: &'a [u8],
    last: Option<Vec<u8>>,
    each: Visit<'a, E>,
    lost: &'a mut dyn FnMut(Loss),
    /// The branches that the walk has come by, as their offsets.
    seen: HashSet<u64>,
}

/// The root of a list of tables, from the commit slot in force: of data (0), or of redb (1).
pub(super) fn root_of(header: &[u8; HEADER_LEN], which: usize) -> Option<u64> {
    const ROOT_LEN: usize = 32;
    let slot = match header[9] & 1 {
        0 => 64,
        _ => 192,
    };
    match header[slot + 1 + which] {
        0 => None,
        _ => u64_at(header, slot + 8 + ROOT_LEN * which),
    }
}

/// The name of a type: which sort of name, and the name.
fn named(bytes: &[u8]) -> Option<&str> {
    let (sort, name) = bytes.split_first()?;
    std::str::from_utf8(name)
        .ok()
        .filter(|_| (1..=4).contains(sort))
}

/// A table's definition, as the master table has it.
pub(super) fn decode_definition(value: &[u8]) -> Option<Tree> {
    const NORMAL: u8 = 3;
    if *value.first()? != NORMAL {
        return None;
    }
    let fixed = |at: usize| match value.get(at)? {
        0 => Some(None),
        _ => Some(Some(u32_at(value, at + 1)?)),
    };
    let types = 64..64_usize.checked_add(u32_at(value, 60)?)?;
    named(value.get(types.clone())?)?;
    named(value.get(types.end..)?)?;
    Some(Tree {
        root: match value.get(9)? {
            0 => None,
            _ => Some(u64_at(value, 10)?),
        },
        len: u64_at(value, 1)?,
        key_len: fixed(42)?,
        value_len: fixed(47)?,
    })
}

/// Where record `n` of a leaf has its key and value.
pub(super) fn pair_of<'p>(
    page: &'p [u8],
    tree: &Tree,
    count: usize,
    n: usize,
) -> Option<(&'p [u8], &'p [u8])> {
    let key_ends = 4;
    let value_ends = key_ends + if tree.key_len.is_none() { 4 * count } else { 0 };
    let keys = value_ends
        + if tree.value_len.is_none() {
            4 * count
        } else {
            0
        };
    let key_end = |n: usize| match tree.key_len {
        Some(len) => len.checked_mul(n + 1)?.checked_add(keys),
        None => u32_at(page, key_ends + 4 * n),
    };
    let values = key_end(count.checked_sub(1)?)?;
    let value_end = |n: usize| match tree.value_len {
        Some(len) => len.checked_mul(n + 1)?.checked_add(values),
        None => u32_at(page, value_ends + 4 * n),
    };
    let key_start = if n == 0 { keys } else { key_end(n - 1)? };
    let value_start = if n == 0 { values } else { value_end(n - 1)? };
    let key = page.get(key_start..key_end(n)?)?;
    Some((key, page.get(value_start..value_end(n)?)?))
}

/// Child `n` of a branch, and the greatest key that may be below it (none for the last one).
fn child_of<'p>(
    page: &'p [u8],
    tree: &Tree,
    keys: usize,
    n: usize,
) -> Option<(u64, Option<&'p [u8]>)> {
    let child = child_at(page, keys, n)?;
    if n == keys {
        return Some((child, None));
    }
    let ends = 8 + CHILD_LEN * (keys + 1);
    let (start, end) = match tree.key_len {
        Some(len) => (ends + len * n, ends + len * (n + 1)),
        None => {
            let start = match n {
                0 => ends + 4 * keys,
                n => u32_at(page, ends + 4 * (n - 1))?,
            };
            (start, u32_at(page, ends + 4 * n)?)
        }
    };
    Some((child, Some(page.get(start..end)?)))
}

impl Salvage {
    /// Finds the tables; `None` if even that cannot be read.
    pub(crate) fn open(file: MetaStorage) -> Option<Self> {
        let mut header = [0; HEADER_LEN];
        file.read(0, &mut header).ok()?;
        if &header[..9] != MAGIC {
            return None;
        }
        let geometry = Geometry::decode(&header, file.len().ok()?)?;
        let mut salvage = Self {
            file,
            geometry,
            trees: Vec::new(),
        };
        let master = Tree {
            root: root_of(&header, 0),
            ..Tree::default()
        };
        let names: Vec<&str> = DEFINITION_NAMES.into_iter().chain([FREE_NAME]).collect();
        let mut trees = vec![None; names.len()];
        let mut lost = false;
        let mut each = |name: &[u8], value: &[u8]| {
            if let Some(nth) = names.iter().position(|known| known.as_bytes() == name) {
                trees[nth] = decode_definition(value);
            }
            Ok::<bool, ()>(true)
        };
        salvage
            .walk_all(&master, &[], &mut each, &mut |_| lost = true)
            .ok()?;
        salvage.trees = trees.into_iter().collect::<Option<_>>()?;
        (!lost).then_some(salvage)
    }

    /// Records that a table should have.
    pub(crate) fn len(&self, table: usize) -> u64 {
        self.trees[table].len
    }

    fn walk_all<E>(
        &self,
        tree: &Tree,
        from: &[u8],
        each: Visit<'_, E>,
        lost: &mut dyn FnMut(Loss),
    ) -> Result<(), E> {
        let mut visitor = Visitor {
            from,
            last: None,
            each,
            lost,
            seen: HashSet::new(),
        };
        if let Some(root) = tree.root {
            self.walk(tree, root, 0, &mut visitor)?;
        }
        Ok(())
    }

    /// A page with all that is below it, in order. A number that names no place is a loss of no
    /// page that could be named.
    fn walk<E>(
        &self,
        tree: &Tree,
        number: u64,
        depth: usize,
        visitor: &mut Visitor<'_, E>,
    ) -> Goes<E> {
        let place = self.geometry.place(number);
        let Some(place) = place.filter(|_| depth < DEPTH_MAX) else {
            (visitor.lost)(NO_PAGE);
            return Ok(true);
        };
        let place = Loss::from(place);
        let mut page = vec![0; usize::try_from(place.len).unwrap_or(0)];
        if self.file.read(place.offset, &mut page).is_err() {
            (visitor.lost)(place);
            return Ok(true);
        }
        let count = u16_at(&page, 2).unwrap_or(0);
        match page[0] {
            LEAF => Self::walk_leaf(tree, &page, count, visitor),
            // Met again, it leads to what has been seen, or to itself.
            BRANCH if !visitor.seen.insert(place.offset) => {
                (visitor.lost)(NO_PAGE);
                Ok(true)
            }
            BRANCH => {
                for n in 0..=count {
                    let Some((child, greatest)) = child_of(&page, tree, count, n) else {
                        (visitor.lost)(NO_PAGE);
                        return Ok(true);
                    };
                    let passed = greatest.is_some_and(|key| key < visitor.from);
                    if !passed && !self.walk(tree, child, depth + 1, visitor)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            _ => {
                (visitor.lost)(place);
                Ok(true)
            }
        }
    }

    fn walk_leaf<E>(
        tree: &Tree,
        page: &[u8],
        count: usize,
        visitor: &mut Visitor<'_, E>,
    ) -> Goes<E> {
        for n in 0..count {
            let Some((key, value)) = pair_of(page, tree, count, n) else {
                (visitor.lost)(NO_PAGE);
                return Ok(true);
            };
            // The keys of the table of free space are numbers, and read as a whole.
            let rises =
                tree.key_len.is_some() || visitor.last.as_deref().is_none_or(|last| last < key);
            if !rises || tree.key_len.is_none() && key < visitor.from {
                continue;
            }
            if tree.key_len.is_none() {
                visitor.last = Some(key.to_vec());
            }
            if !(visitor.each)(key, value)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands the readable records of a table with `from <= key` to `each`, in order, until it
    /// returns false.
    pub(crate) fn scan<E>(&self, table: usize, from: &[u8], each: Visit<'_, E>) -> Result<(), E> {
        self.walk_all(&self.trees[table], from, each, &mut |_| {})
    }

    /// The same of all tables, with their numbers.
    pub(crate) fn all_losses(&self) -> impl Iterator<Item = (usize, Loss)> {
        (0..self.trees.len()).flat_map(|table| {
            let losses = self.losses(table);
            losses.into_iter().map(move |loss| (table, loss))
        })
    }

    /// The pages of a table that cannot be read.
    pub(crate) fn losses(&self, table: usize) -> Vec<Loss> {
        let mut losses = Vec::new();
        let done: Result<(), std::convert::Infallible> =
            self.walk_all(&self.trees[table], &[], &mut |_, _| Ok(true), &mut |loss| {
                losses.push(loss)
            });
        done.map_or_else(|never| match never {}, |()| losses)
    }
}

/// Puts pages with one empty record in the place of pages that cannot be read, so that redb can
/// walk the tree to give its pages back. Only for tables that nothing uses any more.
pub(crate) fn blank(file: &MetaStorage, losses: &[Loss]) -> std::io::Result<()> {
    for loss in losses.iter().filter(|loss| loss.is_page()) {
        let mut page = vec![0; usize::try_from(loss.len).unwrap_or(0)];
        // One empty record, or one of zeros where the widths are fixed.
        page[0] = LEAF;
        page[2] = 1;
        page[4] = 12;
        page[8] = 12;
        file.write(loss.offset, &page)?;
    }
    file.sync_data()
}
