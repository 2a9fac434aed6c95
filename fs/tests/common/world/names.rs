//! Operations on names.

use std::collections::BTreeMap;

use braidfs::{Errno, ROOT_INO};

use super::World;
use crate::common::CRED;
use crate::common::content::Content;
use crate::common::model::Body;

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(&name[..name.len().min(9)]).into_owned()
}

impl World {
    pub(super) fn make(&mut self) {
        if self.model.nodes.len() > self.limits.inodes {
            return self.remove();
        }
        let (dir, name) = (self.dir(), self.name());
        let kind = self.rng.below(10);
        let mode = self.rng.below(0o10000) as u32;
        self.say(format_args!(
            "make {kind} {} in {dir}, mode {mode:o}",
            shown(&name)
        ));
        let expected = self.model.can_make(dir, &name);
        let mut opened = None;
        let (found, mode, body) = match kind {
            0..3 => {
                let entries = BTreeMap::new();
                let body = Body::Dir {
                    entries,
                    parent: dir,
                };
                let found = self.fs.mkdir(dir, &name, mode, &CRED);
                (found, libc::S_IFDIR | mode, body)
            }
            3 => {
                let target = vec![b't'; 1 + self.rng.below(300) as usize];
                let found = self.fs.symlink(dir, &name, &target, &CRED);
                (found, libc::S_IFLNK | 0o777, Body::Link(target))
            }
            4 => {
                let kinds = [libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK];
                let mode = mode | self.rng.pick(&kinds);
                let found = self.fs.mknod(dir, &name, mode, 0, &CRED);
                (found, mode, Body::Special)
            }
            _ => {
                let flags = libc::O_RDWR | libc::O_CREAT;
                let body = Body::File(Content::default());
                let made = self.fs.create(dir, &name, mode, flags, &CRED);
                let found = made.map(|(attr, file)| {
                    opened = Some(file);
                    attr
                });
                (found, libc::S_IFREG | mode, body)
            }
        };
        if self.agrees(&found, expected) {
            let attr = found.expect("it agrees");
            self.model.make(dir, &name, attr.ino, mode, body, &CRED);
            if let Some(file) = opened {
                self.model.node(attr.ino).opens = 1;
                self.keep_open(file);
            }
            self.check_attr(&attr);
        }
    }

    /// O_TMPFILE.
    pub(super) fn make_unnamed(&mut self) {
        if self.handles.len() > 12 {
            return;
        }
        let (dir, exclusive) = (self.dir(), self.rng.one_in(3));
        let mode = self.rng.below(0o10000) as u32;
        self.say(format_args!(
            "make unnamed for {dir}, mode {mode:o}, O_EXCL: {exclusive}"
        ));
        let expected = self.model.can_make_unnamed(dir);
        let flags = libc::O_RDWR | if exclusive { libc::O_EXCL } else { 0 };
        let found = self.fs.tmpfile(dir, mode, flags, &CRED);
        if self.agrees(&found, expected) {
            let (attr, file) = found.expect("it agrees");
            let mode = libc::S_IFREG | mode;
            self.model
                .make_unnamed(dir, attr.ino, mode, !exclusive, &CRED);
            self.keep_open(file);
            self.check_attr(&attr);
        }
    }

    pub(super) fn link(&mut self) {
        let nameless = self.model.nodes.iter();
        let nameless = nameless.filter(|(_, node)| node.nlink == 0 && !node.is_dir());
        let nameless = nameless.map(|(&ino, node)| (node.label, ino));
        let ino = match self.rng.pick_labelled(nameless) {
            Some(ino) if self.rng.one_in(3) => ino,
            _ => self.ino(),
        };
        let (dir, name) = (self.dir(), self.name());
        self.say(format_args!("link {ino} into {dir} as {}", shown(&name)));
        let expected = self.model.can_link(ino, dir, &name);
        let found = self.fs.link(ino, dir, &name);
        if self.agrees(&found, expected) {
            self.model.link(ino, dir, &name);
            self.check_attr(&found.expect("it agrees"));
        }
    }

    pub(super) fn remove(&mut self) {
        let dir = self.dir();
        let name = self.known_name(dir);
        let is_dir = match self.model.find(dir, &name) {
            Ok(Some(ino)) => self.model.node(ino).is_dir(),
            _ => false,
        };
        let as_dir = is_dir != self.rng.one_in(10);
        self.say(format_args!(
            "remove {} of {dir}, rmdir: {as_dir}",
            shown(&name)
        ));
        let found = if as_dir {
            self.fs.rmdir(dir, &name)
        } else {
            self.fs.unlink(dir, &name)
        };
        let expected = self.model.remove(dir, &name, as_dir);
        assert_eq!(found, expected, "operation {}", self.last());
    }

    pub(super) fn rename(&mut self) {
        let dir = self.dir();
        let to = if self.rng.one_in(3) { dir } else { self.dir() };
        let (name, new) = (self.known_name(dir), self.known_name(to));
        let flags = *self.rng.pick(&[
            0,
            0,
            0,
            libc::RENAME_NOREPLACE,
            libc::RENAME_EXCHANGE,
            libc::RENAME_EXCHANGE,
            libc::RENAME_WHITEOUT,
            libc::RENAME_WHITEOUT | libc::RENAME_NOREPLACE,
            libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE,
        ]);
        self.say(format_args!(
            "rename {} of {dir} to {} of {to}, flags {flags}",
            shown(&name),
            shown(&new)
        ));
        let plan = if name.len().max(new.len()) > 255 {
            Err(Errno::NAMETOOLONG)
        } else {
            self.model.can_rename((dir, &name), (to, &new), flags)
        };
        let found = self.fs.rename(dir, &name, to, &new, flags, &CRED);
        let expected = plan.as_ref().map(|_| ()).map_err(|&error| error);
        if !self.agrees(&found, expected) {
            return;
        }
        let Ok(plan) = plan else { return };
        let swap = flags & libc::RENAME_EXCHANGE != 0;
        let moved = self.model.rename(&plan, (dir, &name), (to, &new), swap);
        if moved && flags & libc::RENAME_WHITEOUT != 0 {
            let attr = self.fs.lookup(dir, &name).expect("the whiteout");
            let mode = libc::S_IFCHR;
            let body = Body::Special;
            self.model.make(dir, &name, attr.ino, mode, body, &CRED);
            self.check_attr(&attr);
        }
    }

    pub(super) fn lookup_or_forget(&mut self) {
        if self.rng.one_in(2) {
            let dir = self.dir();
            let name = self.known_name(dir);
            self.say(format_args!("lookup {} in {dir}", shown(&name)));
            let expected = if name.len() > 255 && self.model.node(dir).is_dir() {
                Err(Errno::NAMETOOLONG)
            } else {
                let found = self.model.find(dir, &name);
                found.and_then(|found| found.ok_or(Errno::NOENT))
            };
            let found = self.fs.lookup(dir, &name);
            let inos = found.as_ref().map(|attr| attr.ino).map_err(|&e| e);
            assert_eq!(inos, expected, "operation {}", self.last());
            if let Ok(attr) = found {
                self.model.node(attr.ino).lookups += 1;
                self.check_attr(&attr);
            }
            return;
        }
        let ino = self.ino();
        let lookups = self.model.node(ino).lookups;
        if ino != ROOT_INO && lookups > 0 {
            self.say(format_args!("forget {ino}, {lookups} times"));
            self.fs.forget(ino, lookups);
            self.model.node(ino).lookups = 0;
            self.model.let_go(ino);
        }
    }

    /// Lists a directory, or reads a symbolic link.
    pub(super) fn list(&mut self) {
        let links = self.model.nodes.iter();
        let links = links.filter(|(_, node)| node.lookups > 0);
        let links = links.filter(|(_, node)| matches!(node.body, Body::Link(_)));
        let links = links.map(|(&ino, node)| (node.label, ino));
        let link = self.rng.pick_labelled(links);
        if let Some(ino) = link.filter(|_| self.rng.one_in(3)) {
            self.say(format_args!("readlink {ino}"));
            return self.check_target(ino);
        }
        let (dir, batch) = (self.dir(), 1 + self.rng.below(20));
        self.say(format_args!("list {dir}"));
        if self.model.node(dir).is_dir() {
            self.check_listing(dir, batch);
        } else {
            let found = self.fs.readdir(dir, 0, &mut |_| true);
            assert_eq!(found, Err(Errno::NOTDIR));
        }
    }

    /// Writes a new file and renames it over another: what careful programs do.
    pub(super) fn replace_content(&mut self) {
        let (temporary, name) = (b"temporary", b"n0");
        let found = self.model.find(ROOT_INO, name);
        let found = found.expect("the root is a directory");
        if found.is_some_and(|ino| self.model.node(ino).is_dir()) || self.handles.len() > 12 {
            return;
        }
        self.say(format_args!("write and rename"));
        if self.model.find(ROOT_INO, temporary) == Ok(None) {
            let expected = self.model.can_make(ROOT_INO, temporary);
            let flags = libc::O_RDWR | libc::O_CREAT;
            let made = self.fs.create(ROOT_INO, temporary, 0o644, flags, &CRED);
            if self.agrees(&made, expected) {
                let (attr, file) = made.expect("it agrees");
                let (mode, body) = (libc::S_IFREG | 0o644, Body::File(Content::default()));
                self.model
                    .make(ROOT_INO, temporary, attr.ino, mode, body, &CRED);
                self.model.node(attr.ino).opens = 1;
                self.keep_open(file);
            }
            return;
        }
        let (from, to) = ((ROOT_INO, &temporary[..]), (ROOT_INO, &name[..]));
        let plan = self.model.can_rename(from, to, 0);
        let expected = plan.as_ref().map(|_| ()).map_err(|&error| error);
        let found = self.fs.rename(from.0, from.1, to.0, to.1, 0, &CRED);
        if self.agrees(&found, expected)
            && let Ok(plan) = plan
        {
            self.model.rename(&plan, from, to, false);
        }
    }
}
