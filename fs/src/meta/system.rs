//! What redb follows without a bound, looked at before it does.
//!
//! redb bounds how deep it follows a tree, but for the changes of a commit and its statistics, and
//! never how often it comes by the same page. So before it opens a store, the list of tables and
//! its own tables (pages to be freed, what is free) are walked: no branch twice, no deeper than a
//! tree can be, keys that rise, page numbers inside the file, tables of the widths that this build
//! has. These are few pages, which redb reads next. [`prove`] does the same for the pages of all
//! tables, before redb counts them.
//!
//! Only where redb believes what it finds: a store that was closed or committed by it in two
//! phases. It verifies any other one itself, page by page.

use std::collections::HashSet;

use redb::StorageBackend;

use super::page::{
    BRANCH, Extent, Geometry, LEAF, Widths, branch_fits, child_at, leaf_fits, u16_at, u64_at,
};
use super::salvage::{HEADER_LEN, MAGIC, Tree, decode_definition, pair_of, root_of};
use super::store::{DEFINITION_NAMES, FREE_NAME};

/// Deeper than any tree: its pages would fill every device there is.
pub(super) const DEPTH_MAX: usize = 32;

/// The tables of redb itself that this store has, and the widths of their records.
const OWN_TABLES: [(&[u8], Widths); 4] = [
    (b"allocator_state", (Some(5), None)),
    (b"data_pages_unreachable", PAGE_LIST),
    (b"system_pages_unreachable", PAGE_LIST),
    (b"data_pages_allocated", PAGE_LIST),
];
const PAGE_LIST: Widths = (Some(16), None);

/// The slots of the header: user data, redb's own.
const DATA_ROOT_AT: usize = 0;
const SYSTEM_ROOT_AT: usize = 1;

type Each<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Option<()>;

/// A walk through trees, of which no two share a branch.
struct Walk<'a, B> {
    file: &'a B,
    header: [u8; HEADER_LEN],
    geometry: Geometry,
    /// The branches so far, as their offsets.
    seen: HashSet<u64>,
    page: Vec<u8>,
}

fn no_sense(what: &str, place: Extent, why: &str) -> redb::Error {
    redb::Error::Corrupted(format!(
        "{what}: the metadata page at byte {} makes no sense: {why}; run 'braidfs fsck -n'",
        place.offset
    ))
}

/// A key so that keys compare as their bytes do.
fn rank(key: &[u8], len: Option<usize>) -> Vec<u8> {
    let number = |at: usize| u64_at(key, at).unwrap_or(0).to_be_bytes();
    match len {
        Some(8) => number(0).to_vec(),
        Some(16) => [number(0), number(8)].concat(),
        Some(5) => [key[0], key[4], key[3], key[2], key[1]].to_vec(),
        _ => key.to_vec(),
    }
}

impl<B: StorageBackend> Walk<'_, B> {
    /// A tree with all that is below it. Its records go to `each`, in order, which says where one
    /// makes no sense; without it, their order does not matter.
    fn tree(
        &mut self,
        what: &str,
        tree: &Tree,
        mut each: Option<Each<'_>>,
    ) -> Result<(), redb::Error> {
        let Some(root) = tree.root else { return Ok(()) };
        let mut last = None;
        self.page(what, tree, root, 0, &mut last, &mut each)
    }

    fn page(
        &mut self,
        what: &str,
        tree: &Tree,
        number: u64,
        depth: usize,
        last: &mut Option<Vec<u8>>,
        each: &mut Option<Each<'_>>,
    ) -> Result<(), redb::Error> {
        let nowhere = Extent { offset: 0, len: 0 };
        let place = self.geometry.place(number).filter(|_| depth < DEPTH_MAX);
        let place = place.ok_or_else(|| no_sense(what, nowhere, "no such page, or too deep"))?;
        let fail = |why: &str| Err(no_sense(what, place, why));
        let mut page = std::mem::take(&mut self.page);
        page.resize(usize::try_from(place.len).unwrap_or(0), 0);
        self.file.read(place.offset, &mut page)?;
        let count = u16_at(&page, 2).unwrap_or(0);
        match page[0] {
            LEAF if count > 0 && leaf_fits(&page, count, tree.widths()) => {
                let Some(each) = each else {
                    self.page = page;
                    return Ok(());
                };
                for n in 0..count {
                    let Some((key, value)) = pair_of(&page, tree, count, n) else {
                        return fail("a record does not fit into it");
                    };
                    let rank = rank(key, tree.key_len);
                    if last.as_ref().is_some_and(|last| *last >= rank) {
                        return fail("its keys do not rise");
                    }
                    *last = Some(rank);
                    if each(key, value).is_none() {
                        return fail("a record makes no sense");
                    }
                }
                self.page = page;
                Ok(())
            }
            BRANCH if !self.seen.insert(place.offset) => fail("it is used twice"),
            BRANCH if count > 0 && branch_fits(&page, count, tree.key_len) => {
                let children: Option<Vec<u64>> =
                    (0..=count).map(|n| child_at(&page, count, n)).collect();
                self.page = page;
                for child in children.unwrap_or_default() {
                    self.page(what, tree, child, depth + 1, last, each)?;
                }
                Ok(())
            }
            _ => fail("it is not of this table"),
        }
    }

    /// The tables that a list of them leads to.
    fn list(&mut self, what: &str, root: Option<u64>) -> Result<Vec<(Vec<u8>, Tree)>, redb::Error> {
        let mut tables = Vec::new();
        let list = Tree {
            root,
            ..Tree::default()
        };
        let geometry = self.geometry;
        self.tree(
            what,
            &list,
            Some(&mut |name, value| {
                let tree = decode_definition(value)?;
                let leads_out = tree.root.is_some_and(|root| geometry.place(root).is_none());
                let right = expected(name).is_none_or(|widths| widths == tree.widths());
                if leads_out || !right {
                    return None;
                }
                tables.push((name.to_vec(), tree));
                Some(())
            }),
        )?;
        Ok(tables)
    }
}

/// The widths that a table has, if it is one of this build.
fn expected(name: &[u8]) -> Option<Widths> {
    if DEFINITION_NAMES
        .iter()
        .any(|known| known.as_bytes() == name)
    {
        return Some((None, None));
    }
    if name == FREE_NAME.as_bytes() {
        return Some((Some(8), Some(8)));
    }
    let own = OWN_TABLES.iter().find(|(known, _)| *known == name);
    own.map(|&(_, widths)| widths)
}

/// A list of pages to be freed: their number, and their numbers.
fn check_pages(geometry: &Geometry, value: &[u8]) -> Option<()> {
    let count = u16_at(value, 0)?;
    for n in 0..count {
        geometry.place(u64_at(value, 2 + 8 * n)?)?;
    }
    Some(())
}

/// What the walks go through: nothing if redb verifies the store itself, or there is none.
fn begin<B: StorageBackend>(file: &B) -> Result<Option<Walk<'_, B>>, redb::Error> {
    const TWO_PHASES: u8 = 4;
    let file_len = file.len()?;
    let mut header = [0; HEADER_LEN];
    if file_len < HEADER_LEN as u64 {
        return Ok(None);
    }
    file.read(0, &mut header)?;
    let Some(geometry) = Geometry::decode(&header, file_len) else {
        return Ok(None);
    };
    if &header[..9] != MAGIC || header[9] & TWO_PHASES == 0 {
        return Ok(None);
    }
    Ok(Some(Walk {
        file,
        header,
        geometry,
        seen: HashSet::new(),
        page: Vec::new(),
    }))
}

/// Looks at the list of tables and at redb's own tables.
pub(super) fn check(file: &impl StorageBackend) -> Result<(), redb::Error> {
    let Some(mut walk) = begin(file)? else {
        return Ok(());
    };
    walk.list("list of tables", root_of(&walk.header, DATA_ROOT_AT))?;
    let own = walk.list(
        "list of redb's tables",
        root_of(&walk.header, SYSTEM_ROOT_AT),
    )?;
    let geometry = walk.geometry;
    for (name, tree) in own {
        let is_list = expected(&name) == Some(PAGE_LIST);
        let what = String::from_utf8_lossy(&name);
        walk.tree(
            &what,
            &tree,
            Some(&mut |_, value| match is_list {
                true => check_pages(&geometry, value),
                false => Some(()),
            }),
        )?;
    }
    Ok(())
}

/// Looks at the pages of all tables.
pub(super) fn prove(file: &impl StorageBackend) -> Result<(), redb::Error> {
    let Some(mut walk) = begin(file)? else {
        return Ok(());
    };
    for root_at in [DATA_ROOT_AT, SYSTEM_ROOT_AT] {
        for (name, tree) in walk.list("list of tables", root_of(&walk.header, root_at))? {
            walk.tree(&String::from_utf8_lossy(&name), &tree, None)?;
        }
    }
    Ok(())
}
