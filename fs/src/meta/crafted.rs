//! Pages of redb that make no sense and have right checksums: whatever reads or writes a volume
//! with them gets errors, and goes on.
//!
//! redb's own checksums do not matter here: it does not look at them where the last commit was in
//! two phases, as all are.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use braidfs_blockdev::SimDevice;

use crate::fsck;
use crate::fuzzing::{MetaChunk, assemble, in_use, panics, single, try_everything};

use super::page::{BRANCH, CHILD_LEN, Geometry, LEAF, PAGE, child_at, u16_at, u32_at};
use super::salvage::{HEADER_LEN, Tree, decode_definition, pair_of, root_of};

/// Far longer than the work on any of these takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A volume whose metadata is crafted.
struct Image {
    devices: Vec<Arc<SimDevice>>,
    chunk: MetaChunk,
    header: [u8; HEADER_LEN],
    geometry: Geometry,
}

/// A table: where its definition is, and its tree.
struct Found {
    definition: usize,
    tree: Tree,
}

impl Image {
    fn new(devices: Vec<Arc<SimDevice>>) -> Self {
        let chunk = MetaChunk::of(&devices);
        let raw = chunk.read(&devices, chunk.payload_at(0), HEADER_LEN);
        let header: [u8; HEADER_LEN] = raw.try_into().expect("a header");
        let geometry = Geometry::decode(&header, 1 << 40).expect("a whole header");
        Self {
            devices,
            chunk,
            header,
            geometry,
        }
    }

    fn index(&self, number: u64) -> usize {
        let place = self.geometry.place(number).expect("a page");
        usize::try_from(place.offset / PAGE).expect("a small file")
    }

    fn page(&self, number: u64) -> Vec<u8> {
        let place = self.geometry.place(number).expect("a page");
        let len = usize::try_from(place.len).expect("a small page");
        let at = self.chunk.payload_at(self.index(number));
        self.chunk.read(&self.devices, at, len)
    }

    /// Changes bytes of a page, with right checksums.
    fn set(&self, number: u64, at: usize, bytes: &[u8]) {
        let first = self.index(number);
        let page = usize::try_from(PAGE).expect("small");
        let place = self.chunk.payload_at(first) + at;
        self.chunk.write(&self.devices, place, bytes);
        for index in at / page..=(at + bytes.len() - 1) / page {
            self.chunk.mend_payload(&self.devices, first + index);
        }
    }

    fn set_header(&self, at: usize, bytes: &[u8]) {
        let place = self.chunk.payload_at(0) + at;
        self.chunk.write(&self.devices, place, bytes);
        self.chunk.mend_payload(&self.devices, 0);
    }

    /// The page of a list of tables: of data (0), of redb (1).
    fn list(&self, which: usize) -> u64 {
        root_of(&self.header, which).expect("a list of tables")
    }

    /// A table by its name.
    fn find(&self, name: &str) -> (u64, Found) {
        for which in 0..2 {
            let list = self.list(which);
            let page = self.page(list);
            let count = u16_at(&page, 2).expect("a count");
            for n in 0..count {
                let (key, value) = pair_of(&page, &Tree::default(), count, n).expect("a pair");
                if key == name.as_bytes() {
                    let definition = value.as_ptr().addr() - page.as_ptr().addr();
                    let tree = decode_definition(value).expect("a definition");
                    return (list, Found { definition, tree });
                }
            }
        }
        panic!("no table {name}");
    }

    fn root(&self, name: &str) -> u64 {
        self.find(name).1.tree.root.expect("a table with records")
    }

    /// Makes a page a branch over these children.
    fn make_branch(&self, number: u64, children: &[u64]) {
        let keys = children.len() - 1;
        let mut page = vec![0; usize::try_from(PAGE).expect("small")];
        page[0] = BRANCH;
        page[2] = u8::try_from(keys).expect("few");
        let numbers = 8 + (CHILD_LEN - 8) * children.len();
        for (n, child) in children.iter().enumerate() {
            page[numbers + 8 * n..][..8].copy_from_slice(&child.to_le_bytes());
        }
        let ends = 8 + CHILD_LEN * children.len();
        for n in 0..keys {
            let end = u32::try_from(ends + 4 * keys + 8 * (n + 1)).expect("small");
            page[ends + 4 * n..][..4].copy_from_slice(&end.to_le_bytes());
            // A key in the middle of all inodes, and of all names.
            let key = u64::try_from(n + 2).expect("few").to_be_bytes();
            page[ends + 4 * keys + 8 * n..][..8].copy_from_slice(&key);
        }
        self.set(number, 0, &page);
    }

    /// Points a table's definition elsewhere.
    fn set_definition(&self, name: &str, at: usize, bytes: &[u8]) {
        let (list, found) = self.find(name);
        self.set(list, found.definition + at, bytes);
    }

    /// The first leaf of a table.
    fn leaf(&self, name: &str) -> u64 {
        let mut number = self.root(name);
        loop {
            let page = self.page(number);
            if page[0] == LEAF {
                return number;
            }
            let keys = u16_at(&page, 2).expect("a count");
            number = child_at(&page, keys, 0).expect("a child");
        }
    }

    /// Where the value of a record of the first leaf is, and its length.
    fn value_of(&self, name: &str, n: usize) -> (u64, usize, usize) {
        let (_, found) = self.find(name);
        let root = self.leaf(name);
        let page = self.page(root);
        let count = u16_at(&page, 2).expect("a count");
        let (_, value) = pair_of(&page, &found.tree, count, n).expect("a pair");
        (
            root,
            value.as_ptr().addr() - page.as_ptr().addr(),
            value.len(),
        )
    }
}

/// Where a definition has the number of its root.
const ROOT_AT: usize = 10;

/// Whether a check has to notice it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Yes,
    Perhaps,
    /// Perhaps, and the volume was not unmounted: redb has pages to free.
    Open,
}
use Seen::{Open, Perhaps, Yes};

type Case = (&'static str, Seen, fn(&Image));

/// Something done to the first leaf of a table.
type PageCase = (&'static str, fn(&Image, u64));

const ORDER: u64 = 1 << 59;
const REGION: u64 = 1 << 20;

const PAGES: [PageCase; 14] = [
    ("no such type", |image, page| image.set(page, 0, &[7])),
    ("a leaf that says branch", |image, page| {
        image.set(page, 0, &[BRANCH]);
    }),
    ("no record", |image, page| image.set(page, 2, &[0, 0])),
    ("too many records", |image, page| {
        image.set(page, 2, &[255; 2])
    }),
    ("one record more", |image, page| {
        let count = u16_at(&image.page(page), 2).expect("a count") + 1;
        let count = u16::try_from(count).expect("few");
        image.set(page, 2, &count.to_le_bytes());
    }),
    ("ends behind the page", |image, page| {
        image.set(page, 4, &[0, 0, 1, 0, 0, 0, 2, 0]);
    }),
    ("ends that fall", |image, page| {
        image.set(page, 4, &[0, 8, 0, 0, 7, 0, 0, 0]);
    }),
    ("a child behind the file", |image, page| {
        image.make_branch(page, &[page + 1, 0xf_fff0]);
    }),
    ("a child in no region", |image, page| {
        image.make_branch(page, &[0xf_ffff * REGION, 0]);
    }),
    ("children of gigabytes", |image, page| {
        image.make_branch(page, &[20 * ORDER, 31 * ORDER]);
    }),
    ("itself as a child", |image, page| {
        image.make_branch(page, &[image.spare(), page]);
    }),
    ("itself as every child", |image, page| {
        image.make_branch(page, &[page, page, page]);
    }),
    ("a child that leads back", |image, page| {
        let other = image.root("cookies");
        image.make_branch(other, &[page, image.spare(), page]);
        image.make_branch(page, &[other, other, other]);
    }),
    ("zeros", |image, page| image.set(page, 0, &[0; 4096])),
];

const TABLES: [&str; 7] = [
    "inodes",
    "dentries",
    "extents",
    "xattrs",
    "settings",
    "free",
    "allocator_state",
];

const OTHERS: [Case; 21] = [
    ("the list of tables: no such type", Yes, |image| {
        image.set(image.list(0), 0, &[9]);
    }),
    ("the list of tables: itself", Yes, |image| {
        image.make_branch(image.list(0), &[image.list(0), image.list(0)]);
    }),
    ("redb's list: the other one", Yes, |image| {
        image.make_branch(image.list(1), &[image.list(0), image.list(0)]);
    }),
    ("a definition of no type", Yes, |image| {
        image.set_definition("inodes", 0, &[99]);
    }),
    ("a definition of a multimap", Yes, |image| {
        image.set_definition("dentries", 0, &[4]);
    }),
    ("a definition with fixed keys", Yes, |image| {
        image.set_definition("inodes", 42, &[1, 8, 0, 0, 0]);
    }),
    ("a definition with endless values", Yes, |image| {
        image.set_definition("extents", 47, &[1, 255, 255, 255, 255]);
    }),
    ("a definition with a long type", Yes, |image| {
        image.set_definition("extents", 60, &[255; 4]);
    }),
    ("a root behind the file", Yes, |image| {
        image.set_definition("xattrs", ROOT_AT, &0xf_fff0_u64.to_le_bytes());
    }),
    ("a root of gigabytes", Yes, |image| {
        image.set_definition("xattrs", ROOT_AT, &(20 * ORDER).to_le_bytes());
    }),
    ("free space in the place of inodes", Yes, |image| {
        image.set_definition("inodes", ROOT_AT, &image.root("free").to_le_bytes());
    }),
    ("inodes in the place of free space", Yes, |image| {
        image.set_definition("free", ROOT_AT, &image.root("inodes").to_le_bytes());
    }),
    ("allocator state in the place of extents", Yes, |image| {
        let root = image.root("allocator_state");
        image.set_definition("extents", ROOT_AT, &root.to_le_bytes());
    }),
    ("one tree for two tables", Yes, |image| {
        image.set_definition("cookies", ROOT_AT, &image.root("dentries").to_le_bytes());
    }),
    ("a tree of uneven depth", Perhaps, |image| {
        let (inodes, spare) = (image.root("inodes"), image.root("xattrs"));
        let copy = image.page(inodes);
        image.set(spare, 0, &copy);
        image.make_branch(image.root("cookies"), &[spare, spare]);
        image.make_branch(inodes, &[image.root("cookies"), spare]);
    }),
    ("everything allocated", Perhaps, |image| {
        image.fill_allocator(255)
    }),
    ("everything free", Perhaps, |image| image.fill_allocator(0)),
    ("allocator state of another length", Perhaps, |image| {
        let (page, at, _) = image.value_of("allocator_state", 0);
        image.set(page, at, &[20, 0, 0, 0, 255, 255, 0, 0]);
    }),
    ("pages of the trees to be freed", Open, |image| {
        let (page, at, len) = image.value_of("data_pages_unreachable", 0);
        let count = (len - 2) / 8;
        let roots = [image.root("inodes"), image.list(0), image.root("inodes")];
        for (n, root) in roots.iter().cycle().take(count).enumerate() {
            image.set(page, at + 2 + 8 * n, &root.to_le_bytes());
        }
        let count = u16::try_from(count).expect("few");
        image.set(page, at, &count.to_le_bytes());
    }),
    ("pages behind the file to be freed", Open, |image| {
        let (page, at, _) = image.value_of("data_pages_unreachable", 0);
        image.set(page, at, &[1, 0, 255, 255, 255, 255, 255, 255, 255, 255]);
    }),
    ("another geometry", Yes, |image| {
        image.set_header(16, &[0, 1, 0, 0, 1, 0, 0, 0]);
    }),
];

impl Image {
    /// A leaf that another table has.
    fn spare(&self) -> u64 {
        self.root("cookies")
    }

    /// Every bit of the state of region 0, so that its parts keep their lengths.
    fn fill_allocator(&self, byte: u8) {
        let (page, at, len) = self.value_of("allocator_state", 0);
        let value = self.page(page)[at..at + len].to_vec();
        let orders = usize::from(value[0]) + 1;
        let mut start = 8 + 4 * orders;
        for order in 0..orders {
            let end = u32_at(&value, 8 + 4 * order).expect("an end");
            let heights = u32_at(&value, start).expect("a height");
            let mut level = start + 4 + 4 * heights;
            for height in 0..heights {
                let level_end = start + u32_at(&value, start + 4 + 4 * height).expect("an end");
                let bits = vec![byte; level_end - level - 4];
                self.set(page, at + level + 4, &bits);
                level = level_end;
            }
            start = end;
        }
    }
}

/// Does everything with an image, in bounded time.
fn try_case(name: &str, seen: Seen, craft: impl FnOnce(&Image)) {
    println!("{name}");
    assert_eq!(panics(), 0, "{name}: a panic before");
    let image = Image::new(if seen == Open { in_use() } else { single() });
    craft(&image);
    let (sender, ended) = channel();
    std::thread::spawn(move || {
        let volume = assemble(&image.devices, true).expect("labels are whole");
        let report = fsck::check(volume);
        let is_clean = report.is_ok_and(|report| report.is_clean());
        try_everything(&image.devices);
        sender.send(is_clean).unwrap_or_default();
    });
    let is_clean = ended.recv_timeout(PATIENCE);
    assert_eq!(panics(), 0, "{name}: a panic");
    let is_clean = is_clean.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(seen != Yes || !is_clean, "{name}: nobody noticed");
}

#[test]
fn crafted_pages_give_errors() {
    let only = std::env::var("CASE").ok();
    let wanted = |name: &str| {
        only.as_ref()
            .is_none_or(|only| name.contains(only.as_str()))
    };
    for table in TABLES {
        for (what, craft) in PAGES {
            let name = format!("{table}: {what}");
            if wanted(&name) {
                try_case(&name, Yes, |image| craft(image, image.leaf(table)));
            }
        }
    }
    for (what, craft) in PAGES {
        let name = format!("data_pages_unreachable: {what}");
        if wanted(&name) {
            try_case(&name, Open, |image| {
                craft(image, image.leaf("data_pages_unreachable"))
            });
        }
    }
    for (name, seen, craft) in OTHERS.into_iter().filter(|case| wanted(case.0)) {
        try_case(name, seen, craft);
    }
}
