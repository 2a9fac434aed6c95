//! Checking and repairing: each kind of damage to the records is named, is repaired in one go, and
//! what it has not touched stays as it was.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use braidfs::fsck::raw::Record;
use braidfs::fsck::{Class, FsckError, Mode, Options};
use braidfs::{Ino, ROOT_INO};
use common::damage::*;
use common::*;

/// Damage that must be found as `class`, and after whose repair everything but `touched` is as it
/// was.
fn damage(class: Class, records: &[Record], touched: &[Ino]) -> common::dump::Dump {
    let devices = sample().damaged(records);
    let before: Vec<_> = devices.iter().map(|device| device.image()).collect();
    let found = fsck(&devices, Mode::Check);
    assert!(found.left.is_none());
    assert!(
        classes(&found).contains(&class),
        "expected {class:?}: {:#?}",
        found.found.problems
    );
    let after: Vec<_> = devices.iter().map(|device| device.image()).collect();
    assert!(before == after, "a check changes nothing");
    let repaired = repair(&devices);
    let expected = without(&sample().tree, touched);
    let differences = expected.differences(&without(&repaired, touched));
    assert!(differences.is_empty(), "{differences:#?}");
    repaired
}

/// What is in lost+found.
fn lost(tree: &common::dump::Dump) -> Vec<(String, Ino)> {
    let dir = tree.0[&ROOT_INO].entries[&b"lost+found"[..]];
    assert_eq!(tree.0[&dir].attr[0], libc::S_IFDIR | 0o700);
    let entries = tree.0[&dir].entries.iter();
    entries
        .map(|(name, ino)| (String::from_utf8_lossy(name).into_owned(), *ino))
        .collect()
}

/// Inodes that are not compared when lost+found is made: the root and the new directory.
fn with_lost_found(touched: &[Ino]) -> Vec<Ino> {
    let new = sample().value("settings", b"next_ino");
    let new = u64::from_le_bytes(new.try_into().unwrap());
    let mut all = touched.to_vec();
    all.extend([ROOT_INO, new]);
    all
}

#[test]
fn a_sound_volume_is_clean_and_is_not_written() {
    for mode in [Mode::Check, Mode::Repair, Mode::Preen, Mode::Ask] {
        let devices = sample().devices();
        let outcome = fsck(&devices, mode);
        assert!(outcome.is_clean() && outcome.left.is_none());
        let after = devices.iter().map(|device| device.image());
        assert!(after.eq(sample().devices().iter().map(|device| device.image())));
    }
}

#[test]
fn counts_of_an_inode() {
    let s = sample();
    let (long, b) = (s.ino("a/long"), s.ino("b"));
    damage(
        Class::Count,
        &[patched("inodes", inode(long), 4, &[7])],
        &[],
    );
    damage(
        Class::Count,
        &[patched("inodes", inode(long), 24, &le(8))],
        &[],
    );
    damage(Class::Count, &[patched("inodes", inode(b), 4, &[9])], &[]);
    damage(
        Class::Count,
        &[patched("inodes", inode(b), 16, &le(4))],
        &[],
    );
    damage(
        Class::Count,
        &[patched("inodes", inode(b), 96, &le(3))],
        &[],
    );
    damage(
        Class::Count,
        &[patched("inodes", inode(b), 104, &le(long))],
        &[],
    );
    damage(
        Class::Count,
        &[patched("inodes", inode(long), 36, &[0, 0, 0, 0x80])],
        &[],
    );
    let link = s.ino("link");
    damage(
        Class::Count,
        &[patched("inodes", inode(link), 16, &le(1))],
        &[],
    );
}

#[test]
fn an_inode_record_with_impossible_values_is_mended() {
    let long = sample().ino("a/long");
    damage(
        Class::Inode,
        &[patched("inodes", inode(long), 120, &[1])],
        &[],
    );
    damage(
        Class::Inode,
        &[patched("inodes", inode(long), 24, &le(u64::MAX))],
        &[],
    );
    damage(
        Class::Inode,
        &[patched("inodes", inode(long), 56, &[0xff; 4])],
        &[],
    );
    // The end of the data is the best that is known of the size.
    let repaired = damage(
        Class::Inode,
        &[patched("inodes", inode(long), 16, &le(u64::MAX))],
        &[long],
    );
    let (found, old) = (&repaired.0[&long], &sample().tree.0[&long]);
    assert_eq!(found.size, old.size.next_multiple_of(4096));
    assert_eq!(found.pages, old.pages);
}

#[test]
fn a_lost_inode_loses_its_names_and_gives_its_blocks_back() {
    let s = sample();
    let (a, b, long) = (s.ino("a"), s.ino("b"), s.ino("a/long"));
    for record in [
        set("inodes", inode(long), vec![1, 2, 3]),
        gone("inodes", inode(long)),
    ] {
        let class = if record.2.is_some() {
            Class::Inode
        } else {
            Class::Entry
        };
        let repaired = damage(class, &[record], &[a, b, long]);
        assert!(!repaired.0.contains_key(&long));
        assert!(!repaired.0[&a].entries.contains_key(&b"long"[..]));
        assert!(!repaired.0[&b].entries.contains_key(&b"second"[..]));
    }
    // A directory's children go to lost+found.
    let (c, d) = (s.ino("b/c"), s.ino("b/c/d"));
    let repaired = damage(
        Class::Entry,
        &[gone("inodes", inode(d))],
        &with_lost_found(&[c, d]),
    );
    assert_eq!(
        lost(&repaired),
        [(format!("#{}", s.ino("b/c/d/deep")), s.ino("b/c/d/deep"))]
    );
}

#[test]
fn the_root_directory_is_made_anew() {
    for record in [
        gone("inodes", inode(ROOT_INO)),
        set("inodes", inode(ROOT_INO), vec![0; 128]),
        patched("inodes", inode(ROOT_INO), 0, &[0, 0x80]),
    ] {
        let repaired = damage(Class::Inode, &[record], &[ROOT_INO]);
        let (found, old) = (&repaired.0[&ROOT_INO], &sample().tree.0[&ROOT_INO]);
        assert_eq!(found.entries, old.entries);
    }
}

#[test]
fn entries_that_name_nothing_or_the_wrong_thing() {
    let s = sample();
    let (a, long) = (s.ino("a"), s.ino("a/long"));
    let (key, listed) = s.entry(a, "fifo");
    let fifo = s.ino("a/fifo");
    // The type is the inode's.
    damage(
        Class::Entry,
        &[patched("dentries", key.clone(), 16, &[4])],
        &[],
    );
    let both = [
        patched("dentries", key.clone(), 16, &[4]),
        patched("cookies", listed.clone(), 8, &[4]),
    ];
    damage(Class::Entry, &both, &[]);
    // A record that is none comes back from the listing.
    damage(Class::Entry, &[set("dentries", key.clone(), vec![1])], &[]);
    // Both are: then the inode has no name.
    let both = [
        set("dentries", key.clone(), vec![1]),
        set("cookies", listed.clone(), vec![1]),
    ];
    let repaired = damage(Class::Entry, &both, &with_lost_found(&[a]));
    assert_eq!(lost(&repaired), [(format!("#{fifo}"), fifo)]);
    // It names another file: that one keeps its other names.
    let records = [patched("dentries", key, 0, &le(long))];
    let repaired = damage(Class::Listing, &records, &with_lost_found(&[a, long]));
    assert_eq!(repaired.0[&a].entries[&b"fifo"[..]], long);
    assert_eq!(lost(&repaired), [(format!("#{fifo}"), fifo)]);
    // Names that cannot be.
    for name in [&b"x/y"[..], b"..", b""] {
        let key = [&a.to_be_bytes()[..], name].concat();
        let value = s.value("dentries", &s.entry(a, "listed").0);
        damage(Class::Entry, &[set("dentries", key, value)], &[]);
    }
    // In a directory that is none.
    let value = s.value("dentries", &s.entry(a, "listed").0);
    let key = name_key(long, "inside");
    damage(Class::Entry, &[set("dentries", key, value)], &[]);
}

#[test]
fn names_and_listings_are_made_from_each_other() {
    let s = sample();
    let c = s.ino("b/c");
    let (key, listed) = s.entry(c, "many7");
    let other = s.entry(c, "many8").1;
    damage(Class::Listing, &[gone("cookies", listed.clone())], &[]);
    damage(Class::Listing, &[gone("dentries", key.clone())], &[]);
    damage(
        Class::Listing,
        &[set("cookies", listed.clone(), vec![0; 4])],
        &[],
    );
    // One place in the listing for two.
    let value = s.value("cookies", &other);
    damage(
        Class::Listing,
        &[set("cookies", listed.clone(), value)],
        &[],
    );
    // A cookie that cannot be, and one that another has.
    damage(
        Class::Listing,
        &[patched("dentries", key.clone(), 8, &le(1))],
        &[],
    );
    let cookie: Vec<u8> = other[8..].iter().rev().copied().collect();
    damage(Class::Listing, &[patched("dentries", key, 8, &cookie)], &[]);
    // A listing of nothing.
    let value = s.value("cookies", &listed);
    damage(
        Class::Listing,
        &[set("cookies", pair_key(c, 900), value.clone())],
        &[],
    );
    damage(
        Class::Listing,
        &[set("cookies", pair_key(99_999, 5), value)],
        &[],
    );
    // All of it.
    let all = |table| {
        s.keys(table, c)
            .into_iter()
            .map(move |key| gone(table, key))
    };
    damage(Class::Listing, &all("cookies").collect::<Vec<_>>(), &[]);
    damage(Class::Listing, &all("dentries").collect::<Vec<_>>(), &[]);
}

#[test]
fn what_no_name_leads_to_goes_to_lost_and_found() {
    let s = sample();
    let (b, c) = (s.ino("b"), s.ino("b/c"));
    let (key, listed) = s.entry(b, "c");
    let records = [gone("dentries", key), gone("cookies", listed)];
    let repaired = damage(Class::Lost, &records, &with_lost_found(&[b]));
    assert_eq!(lost(&repaired), [(format!("#{c}"), c)]);
    // A second time it goes to the same place.
    let deep = s.ino("b/c/d/deep");
    let devices = sample().damaged(&records);
    repair(&devices);
    let again = Sample::of(&devices);
    let d = s.ino("b/c/d");
    let (key, listed) = again.entry(d, "deep");
    let devices = again.damaged(&[gone("dentries", key), gone("cookies", listed)]);
    let twice = repair(&devices);
    let mut found = lost(&twice);
    found.sort_by_key(|entry| entry.1);
    let mut expected = vec![(format!("#{c}"), c), (format!("#{deep}"), deep)];
    expected.sort_by_key(|entry| entry.1);
    assert_eq!(found, expected);
}

#[test]
fn loops_of_directories_are_cut_and_no_directory_has_two_names() {
    let s = sample();
    let (b, c, d) = (s.ino("b"), s.ino("b/c"), s.ino("b/c/d"));
    let (key, listed) = s.entry(b, "c");
    let dir = |ino: Ino, cookie: u64| [&le(ino)[..], &le(cookie), &[4]].concat();
    let row = |ino: Ino, name: &str| [&le(ino)[..], &[4], name.as_bytes()].concat();
    // c is no longer in b, but in its own child.
    let records = [
        gone("dentries", key),
        gone("cookies", listed),
        set("dentries", name_key(d, "up"), dir(c, 500)),
        set("cookies", pair_key(d, 500), row(c, "up")),
    ];
    let repaired = damage(Class::Lost, &records, &with_lost_found(&[b, c, d]));
    let low = c.min(d);
    assert_eq!(lost(&repaired), [(format!("#{low}"), low)]);
    // c is in both.
    damage(Class::Entry, &records[2..], &[]);
    // In itself, and the root in it.
    let records = [
        set("dentries", name_key(c, "me"), dir(c, 500)),
        set("cookies", pair_key(c, 500), row(c, "me")),
        set("dentries", name_key(c, "root"), dir(ROOT_INO, 501)),
        set("cookies", pair_key(c, 501), row(ROOT_INO, "root")),
    ];
    damage(Class::Entry, &records, &[]);
}

#[test]
fn deletions_that_cannot_be() {
    let s = sample();
    let (long, d) = (s.ino("a/long"), s.ino("b/c/d"));
    damage(Class::Orphan, &[set("orphans", inode(long), vec![0])], &[]);
    damage(
        Class::Orphan,
        &[set("orphans", inode(99_999), vec![0])],
        &[],
    );
    damage(Class::Orphan, &[set("orphans", inode(long), vec![9])], &[]);
    damage(
        Class::Orphan,
        &[set("orphans", inode(ROOT_INO), vec![0])],
        &[],
    );
    let cut = [&[1][..], &le(5)].concat();
    damage(Class::Orphan, &[set("orphans", inode(d), cut)], &[]);
    let cut = [&[1][..], &le(u64::MAX)].concat();
    damage(Class::Orphan, &[set("orphans", inode(long), cut)], &[]);
}

#[test]
fn attributes_that_cannot_be() {
    let s = sample();
    let (listed, long) = (s.ino("a/listed"), s.ino("a/long"));
    let attr = |ino, name: &str, value: &[u8]| set("xattrs", name_key(ino, name), value.to_vec());
    damage(Class::Xattr, &[attr(99_999, "user.x", b"1")], &[]);
    damage(Class::Xattr, &[attr(long, "none.x", b"1")], &[]);
    damage(Class::Xattr, &[attr(long, "user.", b"1")], &[]);
    damage(Class::Xattr, &[attr(long, "", b"target")], &[]);
    damage(Class::Xattr, &[attr(long, "user.x", &vec![1; 70_000])], &[]);
    damage(
        Class::Xattr,
        &[attr(long, "system.posix_acl_access", &[2, 0, 0, 0, 1])],
        &[],
    );
    damage(
        Class::Xattr,
        &[attr(long, "system.posix_acl_default", &access_list())],
        &[],
    );
    let own = attr(listed, "system.posix_acl_access", b"broken");
    let repaired = damage(Class::Xattr, &[own], &[listed]);
    let left: Vec<_> = repaired.0[&listed].xattrs.keys().collect();
    assert_eq!(left, [b"user.note"]);
    // A link without a target goes.
    let link = s.ino("link");
    let repaired = damage(
        Class::Inode,
        &[gone("xattrs", name_key(link, ""))],
        &[ROOT_INO, link],
    );
    assert!(!repaired.0[&ROOT_INO].entries.contains_key(&b"link"[..]));
}

#[test]
fn extents_are_cut_to_what_can_be() {
    let s = sample();
    let long = s.ino("a/long");
    let (key, block, _) = extent("other");
    let other = s.ino("other");
    let (free, _) = free_run();
    let crcs = |count: usize| vec![0x55; 4 * count];
    let record = |block: u64, len: u32, body: &[u8]| {
        [&le(block)[..], &len.to_le_bytes(), &[0; 4], body].concat()
    };
    // Of no file, of a directory, and impossible ones.
    for ino in [99_999, s.ino("b")] {
        let value = record(free, 2, &crcs(2));
        damage(
            Class::Extent,
            &[set("extents", pair_key(ino, 0), value)],
            &[],
        );
    }
    damage(
        Class::Extent,
        &[set("extents", pair_key(long, 900), vec![1])],
        &[],
    );
    damage(Class::Extent, &[set("extents", vec![7], vec![1])], &[]);
    // Data behind the end of the file.
    let value = record(free, 2, &crcs(2));
    damage(
        Class::Extent,
        &[set("extents", pair_key(long, 5000), value.clone())],
        &[],
    );
    damage(
        Class::Extent,
        &[set("extents", pair_key(long, u64::MAX / 4096), value)],
        &[],
    );
    // Outside the data chunks: that data is lost, and becomes a hole.
    let outside = patched("extents", key.clone(), 0, &le(1 << 50));
    let repaired = damage(Class::Extent, &[outside], &[other]);
    assert!(repaired.0[&other].pages.is_empty());
    // A record that is none: the same.
    let broken = set("extents", key.clone(), vec![0; 9]);
    let repaired = damage(Class::Extent, &[broken], &[other]);
    assert!(repaired.0[&other].pages.is_empty());
    // Over the next one: that one has its blocks.
    let rest = s.keys("extents", long)[1].clone();
    let next = u64::from_be_bytes(rest[8..].try_into().unwrap());
    let value = record(free, 3, &crcs(3));
    let overlap = set("extents", pair_key(long, next - 1), value);
    let found = fsck(&s.damaged(std::slice::from_ref(&overlap)), Mode::Check).found;
    assert!(
        found
            .problems
            .iter()
            .any(|p| p.message.contains("overlaps")),
        "{found:#?}"
    );
    // Twice in the file, and across a border.
    let unwritten = [&le(free)[..], &600u32.to_le_bytes(), &[1, 0, 0, 0]].concat();
    damage(
        Class::Space,
        &[set("extents", pair_key(other, 1000), unwritten)],
        &[],
    );
    assert!(block > 0);
}

#[test]
fn blocks_that_two_files_have_are_the_one_whose_checksum_fits() {
    let s = sample();
    let (other, deep) = (s.ino("other"), s.ino("b/c/d/deep"));
    let (other_key, block, _) = extent("other");
    let (deep_key, ..) = extent("b/c/d/deep");
    // The smaller file names the other one's blocks: it reads errors as it would have, the other
    // one its data.
    let records = [patched("extents", deep_key.clone(), 0, &le(block))];
    let devices = s.damaged(&records);
    let found = fsck(&devices, Mode::Check);
    assert!(
        classes(&found).contains(&Class::Shared),
        "{:#?}",
        found.found.problems
    );
    let outcome = fsck(&devices, Mode::Repair);
    assert!(
        outcome.left.as_ref().is_some_and(|left| left.is_clean()),
        "{outcome:#?}"
    );
    check(&devices);
    let fs = mount(&devices);
    let file = fs.open(deep, libc::O_RDONLY).expect("open");
    assert_eq!(
        try_read(&fs, &file, 0, 4096, false),
        Err(braidfs::Errno::IO)
    );
    let file = open(&fs, "other");
    assert_eq!(read(&fs, &file, 0, 50_000), pattern(3, 50_000));
    assert_eq!(file.ino(), other);
    fs.unmount().expect("unmount");
    // The whole record: both have the data, each its own.
    let value = s.value("extents", &other_key);
    let big = s.ino("a/long");
    let key = s.keys("extents", big)[0].clone();
    let mut grown = s.value("inodes", &inode(deep));
    grown[16..24].copy_from_slice(&le(50_000));
    let records = [
        gone("extents", deep_key.clone()),
        set("extents", deep_key, value),
        set("inodes", inode(deep), grown),
    ];
    let devices = s.damaged(&records);
    let repaired = repair(&devices);
    assert_eq!(repaired.0[&deep].pages, s.tree.0[&other].pages);
    assert_eq!(repaired.0[&other].pages, s.tree.0[&other].pages);
    // What is only set aside gives way to data.
    let (_, data, _) = extent("a/long");
    let aside = [&le(data)[..], &3u32.to_le_bytes(), &[1, 0, 0, 0]].concat();
    let records = [set("extents", pair_key(other, 1000), aside)];
    damage(Class::Shared, &records, &[]);
    assert!(!key.is_empty());
}

#[test]
fn free_space_is_what_no_extent_has() {
    let (start, len) = free_run();
    let run = |start: u64, len: u64| set("free", le(start).to_vec(), le(len).to_vec());
    let (_, used, _) = extent("other");
    // Leaked, free and used, twice, outside, empty, and none at all.
    damage(Class::Space, &[run(start, len - 9)], &[]);
    damage(Class::Space, &[run(used, 2)], &[]);
    damage(Class::Space, &[run(start + 5, 3)], &[]);
    damage(Class::Space, &[run(1 << 50, 3)], &[]);
    damage(Class::Space, &[run(start + len - 1, u64::MAX)], &[]);
    damage(Class::Space, &[run(start, 0)], &[]);
    damage(Class::Space, &[gone("free", le(start).to_vec())], &[]);
    let known = le(u64::MAX).to_vec();
    damage(Class::Space, &[gone("free", known)], &[]);
}

#[test]
fn counters_of_the_volume() {
    let setting = |name: &str, value: Vec<u8>| set("settings", name.into(), value);
    for value in [le(2).to_vec(), vec![1]] {
        damage(Class::Setting, &[setting("next_ino", value.clone())], &[]);
        damage(Class::Setting, &[setting("inode_count", value)], &[]);
    }
    damage(
        Class::Setting,
        &[gone("settings", b"next_ino".to_vec())],
        &[],
    );
}

#[test]
fn damaged_copies_of_labels_and_tables_are_written_again() {
    for (device, offset) in [
        (0, 0),
        (1, 0),
        (0, 512 << 10),
        (1, 64 << 10),
        (1, 576 << 10),
    ] {
        let devices = sample().devices();
        devices[device].flip_bit(offset + 20, 3);
        let found = fsck(&devices, Mode::Check);
        assert_eq!(
            classes(&found),
            [Class::Label],
            "{:#?}",
            found.found.problems
        );
        let object = &found.found.problems[0].object;
        assert_eq!(*object, format!("sim{device}, byte {offset}"));
        let differences = sample().tree.differences(&repair(&devices));
        assert!(differences.is_empty(), "{differences:#?}");
    }
    // Label and table of one generation on one member.
    for (label, table) in [(0, 64 << 10), (512 << 10, 576 << 10)] {
        let devices = sample().devices();
        devices[1].flip_bit(label + 20, 3);
        devices[1].flip_bit(table + 20, 3);
        let found = fsck(&devices, Mode::Check).found;
        assert_eq!(found.problem_count, 2, "{:#?}", found.problems);
        repair(&devices);
    }
}

#[test]
fn only_what_is_asked_for_is_repaired() {
    let s = sample();
    let (a, long) = (s.ino("a"), s.ino("a/long"));
    let (key, listed) = s.entry(a, "fifo");
    let records = [
        patched("inodes", inode(long), 4, &[7]),
        gone("dentries", key),
        gone("cookies", listed),
    ];
    // At boot: counts, but nothing that moves files.
    let devices = s.damaged(&records);
    let outcome = fsck(&devices, Mode::Preen);
    let left: Vec<_> = outcome
        .left
        .expect("repaired")
        .classes()
        .map(|c| c.0)
        .collect();
    assert_eq!(left, [Class::Lost]);
    // Asked: one class.
    let devices = s.damaged(&records);
    let volume = assemble(&devices, true);
    let mut asked = Vec::new();
    let options = Options {
        mode: Mode::Ask,
        cancel: &AtomicBool::new(false),
        progress: &mut |_| {},
        ask: &mut |class, count| {
            asked.push((class, count));
            class == Class::Lost
        },
    };
    let outcome = braidfs::fsck::run(volume, options).expect("fsck");
    let left: Vec<_> = outcome
        .left
        .expect("repaired")
        .classes()
        .map(|c| c.0)
        .collect();
    assert_eq!(left, [Class::Count]);
    assert!(asked.contains(&(Class::Lost, 1)), "{asked:?}");
    // Nothing.
    let devices = s.damaged(&records);
    let before: Vec<_> = devices.iter().map(|device| device.image()).collect();
    let outcome = fsck(&devices, Mode::Ask);
    assert!(outcome.left.is_none() && !outcome.is_clean());
    assert!(
        before.iter().eq(devices
            .iter()
            .map(|device| device.image())
            .collect::<Vec<_>>()
            .iter())
    );
}

#[test]
fn stopped_at_any_pass_it_has_changed_nothing() {
    let long = sample().ino("a/long");
    for pass in 1..=6 {
        let devices = sample().damaged(&[patched("inodes", inode(long), 4, &[7])]);
        let before: Vec<_> = devices.iter().map(|device| device.image()).collect();
        let cancel = AtomicBool::new(false);
        let options = Options {
            mode: Mode::Repair,
            cancel: &cancel,
            progress: &mut |at| {
                if at.pass == pass {
                    cancel.store(true, Ordering::Relaxed);
                }
            },
            ask: &mut |_, _| false,
        };
        let outcome = braidfs::fsck::run(assemble(&devices, true), options);
        assert!(
            matches!(outcome, Err(FsckError::Cancelled)),
            "pass {pass}: {outcome:?}"
        );
        let after: Vec<_> = devices.iter().map(|device| device.image()).collect();
        assert!(before == after, "pass {pass}");
    }
}
