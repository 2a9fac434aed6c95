//! Opening, reading, writing and truncating files.

use std::sync::Arc;

use braidfs::{
    Errno, FILE_SIZE_MAX, FLAG_APPEND, FLAG_IMMUTABLE, Ino, OpenFile, SetAttr, WriteFlags,
};

use super::World;
use crate::common::content::PAGE;
use crate::common::{CRED, try_read, try_write_as};

impl World {
    pub(super) fn open_or_close(&mut self) {
        let ino = self.ino();
        if self.handles.len() < 12 && self.model.node(ino).file().is_some() {
            let flags = *self.rng.pick(&[
                libc::O_RDWR,
                libc::O_RDWR,
                libc::O_RDWR | libc::O_APPEND,
                libc::O_RDONLY,
            ]);
            self.say(format_args!("open {ino}, flags {flags:#o}"));
            let node = self.model.node(ino);
            let refused = match flags {
                libc::O_RDONLY => 0,
                libc::O_RDWR => FLAG_IMMUTABLE | FLAG_APPEND,
                _ => FLAG_IMMUTABLE,
            };
            let expected = node.check_flags(refused);
            let found = self.fs.open(ino, flags);
            if self.agrees(&found.as_ref().map(|_| ()).map_err(|&e| e), expected) {
                self.model.node(ino).opens += 1;
                self.keep_open(found.unwrap_or_else(|_| unreachable!("it agrees")));
            }
            return;
        }
        let handles = self.handles.iter().enumerate();
        let handles = handles.map(|(at, opened)| (opened.label, at));
        if let Some(at) = self.rng.pick_labelled(handles) {
            let opened = self.handles.swap_remove(at);
            self.close(&opened.file);
        }
    }

    pub(super) fn close(&mut self, file: &Arc<OpenFile>) {
        let ino = file.ino();
        self.say(format_args!("release {ino}"));
        assert_eq!(self.fs.flush(file), Ok(()));
        self.fs.release(file);
        self.model.node(ino).opens -= 1;
        self.model.let_go(ino);
    }

    pub(super) fn write(&mut self) {
        let Some(file) = self.handle_to_write() else {
            return;
        };
        let (ino, direct, kill) = (file.ino(), self.rng.one_in(3), self.rng.one_in(4));
        let (mut offset, mut len) = (self.offset_in(ino), self.len());
        if direct && self.rng.one_in(2) {
            offset = offset / PAGE * PAGE;
            len = len.next_multiple_of(PAGE).max(64 << 10).min(self.limits.io);
        }
        if self.model.blocks() * PAGE > self.limits.total {
            self.truncate(ino, 0, kill);
            return;
        }
        self.say(format_args!(
            "write {ino} at {offset}+{len}, direct: {direct}, kill set-ids: {kill}"
        ));
        let expected = self.model.node(ino).check_flags(FLAG_IMMUTABLE);
        let flags = WriteFlags {
            kill_suidgid: kill,
            ..WriteFlags::default()
        };
        let data = self.rng.bytes(len as usize);
        let found = try_write_as(&self.fs, &file, offset, &data, direct, flags);
        if self.agrees(&found, expected) && found.is_ok() {
            let count = u64::from(found.unwrap_or(0));
            if count < len {
                // On a full volume a write is as long as there is room for.
                assert!(count > 0, "nothing of {len}");
                assert!(self.fs.statfs().bfree * PAGE < len, "{count} of {len}");
                self.note_full();
            }
            let content = self.model.content(ino);
            content.write(offset, &data[..count as usize]);
            self.model.note_bytes(ino, offset, offset + count, kill);
        }
    }

    pub(super) fn read(&mut self) {
        let Some(file) = self.handle() else { return };
        let (ino, direct) = (file.ino(), self.rng.one_in(3));
        let (mut offset, mut len) = (self.offset_in(ino), self.len());
        if direct {
            offset = offset / PAGE * PAGE;
            len = len.next_multiple_of(PAGE).max(64 << 10);
        }
        if self.rng.one_in(30) {
            len = 0;
        }
        self.say(format_args!(
            "read {ino} at {offset}+{len}, direct: {direct}"
        ));
        let found = try_read(&self.fs, &file, offset, len as usize, direct).expect("read");
        if len > 0 {
            self.model.accessed(ino);
        }
        let expected = self.model.content(ino).read(offset, len as usize);
        self.check_bytes(ino, offset, &found, &expected);
    }

    /// Truncation, by somebody who may keep set-id bits or not.
    pub(super) fn truncate(&mut self, ino: Ino, size: u64, kill: bool) {
        self.say(format_args!(
            "truncate {ino} to {size}, kill set-ids: {kill}"
        ));
        let expected = self.model.can_resize(ino, size);
        let set = SetAttr {
            size: Some(size),
            kill_suidgid: kill,
            ..SetAttr::default()
        };
        let found = self.fs.setattr(ino, &set, &CRED);
        if self.agrees(&found, expected)
            && let Ok(attr) = found
        {
            let content = self.model.content(ino);
            let old = content.size;
            content.truncate(size);
            self.model
                .note_bytes(ino, old.min(size), old.max(size), kill);
            self.check_attr(&attr);
        }
    }

    pub(super) fn resize(&mut self) {
        let (ino, kill) = match self.handle_to_write() {
            Some(file) if !self.rng.one_in(4) => (file.ino(), self.rng.one_in(4)),
            _ => (self.ino(), false),
        };
        let is_file = self.model.node(ino).file().is_some();
        let size = match self.rng.below(20) {
            0 => FILE_SIZE_MAX + self.rng.below(2),
            1 => 0,
            _ if is_file => self.offset_in(ino),
            _ => self.offset(),
        };
        self.truncate(ino, size, kill);
    }

    /// Compares bytes that were read.
    pub(super) fn check_bytes(&self, ino: Ino, offset: u64, found: &[u8], expected: &[u8]) {
        if found == expected {
            return;
        }
        let at = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!(
            "operation {}: inode {ino} from {offset}: {} bytes instead of {}, the first that \
             differs is at {:?}",
            self.last(),
            found.len(),
            expected.len(),
            at.map(|at| offset + at as u64)
        );
    }

    /// Whether the volume had room; what comes of an operation that did not is the caller's.
    pub(super) fn had_room(
        &mut self,
        found: &Result<(), Errno>,
        expected: Result<(), Errno>,
    ) -> bool {
        self.agrees(found, expected) || expected.is_err()
    }
}
