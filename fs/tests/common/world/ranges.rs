//! Preallocation, holes, SEEK_DATA and SEEK_HOLE, copies between files.

use braidfs::{Errno, FILE_SIZE_MAX, FLAG_IMMUTABLE, Ino};

use super::World;
use crate::common::content::PAGE;
use crate::common::model::{LOCKS, Stamp};
use crate::common::try_read;

const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;

impl World {
    pub(super) fn fallocate(&mut self) {
        let Some(file) = self.handle_to_write() else {
            return;
        };
        let mut modes = vec![0, KEEP, PUNCH | KEEP, PUNCH | KEEP, ZERO | KEEP];
        if self.limits.wide {
            let odd = [PUNCH, libc::FALLOC_FL_COLLAPSE_RANGE, PUNCH | ZERO | KEEP];
            modes.extend([ZERO, ZERO, *self.rng.pick(&odd)]);
        }
        let (ino, mode) = (file.ino(), *self.rng.pick(&modes));
        let (mut offset, mut len) = (self.offset_in(ino), self.len());
        match self.rng.below(60) {
            0 if self.limits.wide => offset = FILE_SIZE_MAX - self.rng.below(4 * PAGE),
            1 => len = 0,
            _ => {}
        }
        if mode & PUNCH == 0 && self.model.blocks() * PAGE > self.limits.total {
            return self.truncate(ino, 0, false);
        }
        self.say(format_args!("fallocate {ino} mode {mode} {offset}+{len}"));
        let expected = self.can_fallocate(ino, mode, offset, len);
        let found = self.fs.fallocate(&file, mode, offset, len);
        let good = self.agrees(&found, expected);
        if expected.is_err() {
            return;
        }
        if !good {
            return self.after_half_a_fallocate(&file, mode, (offset, offset + len));
        }
        let end = offset + len;
        let content = self.model.content(ino);
        match mode & !KEEP {
            PUNCH => content.punch(offset, end),
            ZERO => content.zero(offset, end),
            _ => content.set_aside(offset, end),
        }
        let old = content.size;
        if mode & KEEP == 0 {
            content.size = content.size.max(end);
        }
        self.model.note_bytes(ino, offset.min(old), end, false);
    }

    fn can_fallocate(&mut self, ino: Ino, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
        let locks = match mode {
            0 | KEEP => FLAG_IMMUTABLE,
            _ if mode == PUNCH | KEEP || mode & !KEEP == ZERO => LOCKS,
            _ => return Err(Errno::NOTSUP),
        };
        self.model.node(ino).check_flags(locks)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        if offset + len > FILE_SIZE_MAX {
            return Err(Errno::FBIG);
        }
        Ok(())
    }

    /// The volume was full: blocks may have been set aside, and bytes are zero or what they were.
    fn after_half_a_fallocate(
        &mut self,
        file: &std::sync::Arc<braidfs::OpenFile>,
        mode: i32,
        (from, to): (u64, u64),
    ) {
        let ino = file.ino();
        if mode & ZERO != 0 {
            self.model.node(ino).atime = Stamp::Unknown;
            let len = (to - from) as usize;
            let now = try_read(&self.fs, file, from, len, false).expect("read");
            if now.iter().all(|&byte| byte == 0) {
                self.model.content(ino).zero(from, to);
            }
        }
        let node = self.model.node(ino);
        (node.mtime, node.ctime) = (Stamp::Unknown, Stamp::Unknown);
        self.model.content(ino).is_vague = true;
        self.model.ranges.push((ino, from, to));
    }

    pub(super) fn seek(&mut self) {
        let Some(file) = self.handle() else { return };
        let offset = self.offset_in(file.ino());
        self.say(format_args!("seek {} from {offset}", file.ino()));
        self.check_seek(&file, offset);
    }

    pub(super) fn copy(&mut self) {
        if !self.limits.wide {
            return;
        }
        let (Some(from), Some(to)) = (self.handle(), self.handle_to_write()) else {
            return;
        };
        let (source, target) = (from.ino(), to.ino());
        let (offset, mut at, len) = (
            self.offset_in(source),
            self.offset_in(target),
            self.len() * (1 + self.rng.below(3)),
        );
        if self.rng.one_in(2) {
            // Alike in their pages.
            at = at / PAGE * PAGE + offset % PAGE;
        }
        self.say(format_args!(
            "copy {source} {offset}+{len} to {target} at {at}"
        ));
        let size = self.model.content(source).size;
        let count = len.min(size.saturating_sub(offset));
        let overlap = offset < at + count && at < offset + count;
        let expected = match self.model.node(target).check_flags(FLAG_IMMUTABLE) {
            Ok(()) if count > 0 && source == target && overlap => Err(Errno::INVAL),
            checked => checked,
        };
        let found = self.fs.copy_file_range(&from, offset, &to, at, len);
        if !self.agrees(&found, expected) || count == 0 {
            if expected.is_ok() && count > 0 {
                // The source was read, maybe.
                self.model.node(source).atime = Stamp::Unknown;
                self.after_half_a_copy(target, at);
            }
            return;
        }
        let copied = found.expect("it agrees");
        if copied < count {
            self.note_full();
            self.model.content(target).is_vague = true;
        }
        assert!(copied <= count && copied > 0, "copied {copied} bytes");
        self.model.accessed(source);
        self.copy_in_model((source, offset), (target, at), copied);
        self.model.note_bytes(target, at, at + copied, false);
        let node = self.model.node(target);
        if let (true, Stamp::At(before)) = (source == target, node.atime) {
            // Read again after it was written to.
            node.atime = Stamp::Maybe(before);
        }
        if copied < count {
            self.after_half_a_copy(target, at + copied);
        }
    }

    /// What follows the copied bytes may be punched, where the source has a hole: compared is then
    /// what did not change.
    fn after_half_a_copy(&mut self, target: Ino, at: u64) {
        let node = self.model.node(target);
        (node.mtime, node.ctime) = (Stamp::Unknown, Stamp::Unknown);
        self.model.content(target).is_vague = true;
        self.model.ranges.push((target, at, at + 1));
    }

    /// Data is written, holes become holes: run by run, as both sides may be one file.
    fn copy_in_model(&mut self, from: (Ino, u64), to: (Ino, u64), count: u64) {
        let mut done = 0;
        while done < count {
            let (offset, at) = (from.1 + done, to.1 + done);
            let source = self.model.content(from.0);
            let page = offset / PAGE;
            let data = source.next_data(page);
            if data == Some(page) {
                let end = source.next_hole(page) * PAGE;
                let len = (count - done).min(end - offset);
                let bytes = source.read(offset, len as usize);
                self.model.content(to.0).write(at, &bytes);
                done += len;
            } else {
                let len = data.map_or(count - done, |data| {
                    (count - done).min(data * PAGE - offset)
                });
                let target = self.model.content(to.0);
                target.punch(at, at + len);
                target.size = target.size.max(at + len);
                done += len;
            }
        }
        // A page that is the last of one side and the first of the other changes meanwhile.
        let edges = |side: u64| [side / PAGE, (side + count - 1) / PAGE];
        let (source, target) = (edges(from.1), edges(to.1));
        if from.0 == to.0 && (source[1] == target[0] || target[1] == source[0]) {
            self.model.content(to.0).is_vague = true;
        }
    }
}
