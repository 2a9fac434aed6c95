//! The pass over free space: the blocks of the data chunks are each named by an extent or free, not
//! both and not neither.

use std::ops::Range;

use braidfs_blockdev::{ChunkKind, Volume};

use super::Check;
use super::bitmap::Bitmap;
use super::edits::SpacePlan;
use super::extents::inside;
use super::progress::FsckError;
use super::report::Class;
use crate::alloc::FREE_KNOWN_CHUNK_KEY;
use crate::meta::store::Table;

/// The data chunks' blocks, joined where chunks touch.
pub(super) fn data_ranges(volume: &Volume) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let chunks = volume.chunks();
    for chunk in chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Data) {
        let (start, end) = (chunk.start.0, chunk.end().0);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

fn run_object(run: &Range<u64>) -> String {
    format!("blocks {}+{}", run.start, run.end - run.start)
}

impl Check<'_> {
    pub(super) fn pass_space(&mut self) -> Result<(), FsckError> {
        self.ticker.begin(self.reader.free_len()?)?;
        let sound = self.load_free()?;
        self.report.chunk_blocks = self.data.iter().map(|run| run.end - run.start).sum();
        let compared = self.compare_space()?;
        self.share_out()?;
        let changed = self.edits.has(Table::Extents);
        let wrong = !sound || !compared;
        if changed || wrong && self.allowed.has(Class::Space) {
            self.edits.space = Some(SpacePlan {
                used: std::mem::take(&mut self.used),
                data: self.data.clone(),
                known_chunk: self.known_chunk(),
            });
        }
        self.ticker.end();
        Ok(())
    }

    fn known_chunk(&self) -> Option<u64> {
        let chunks = self.volume.chunks();
        let data = chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Data);
        data.map(|chunk| u64::from(chunk.id)).max()
    }

    /// Reads the table of free space; returns whether its rows make sense.
    fn load_free(&mut self) -> Result<bool, FsckError> {
        let (mut known, mut sound) = (None, true);
        let reader = self.reader;
        let mut twice = Bitmap::default();
        reader.scan_free::<FsckError>(&mut |start, len| {
            self.ticker.step()?;
            if start == FREE_KNOWN_CHUNK_KEY {
                known = Some(len);
                return Ok(());
            }
            let run = start..start.saturating_add(len);
            let parts = inside(&self.data, &run);
            let fault = if len == 0 || start.checked_add(len).is_none() {
                Some("are an impossible free run")
            } else if parts != [run] {
                Some("are free, and not all in data chunks")
            } else {
                None
            };
            if let Some(message) = fault {
                sound = false;
                let object = format!("blocks {start}+{len}");
                self.problem(Class::Space, object, message.into());
            }
            for part in parts {
                self.free.add(part, &mut twice);
            }
            Ok(())
        })?;
        for chunk in self.volume.chunks() {
            let made_late = known.is_none_or(|known| u64::from(chunk.id) > known);
            if chunk.kind == ChunkKind::Data && made_late {
                self.free.add(chunk.start.0..chunk.end().0, &mut twice);
            }
        }
        for chunk in self.data.clone() {
            for run in twice.runs(chunk, true) {
                sound = false;
                self.problem(Class::Space, run_object(&run), "are free twice".into());
            }
        }
        Ok(sound)
    }

    /// Compares free space with what extents name in the durable state; returns whether the two
    /// make up the chunks.
    fn compare_space(&mut self) -> Result<bool, FsckError> {
        let mut wrong: Vec<(Range<u64>, &str)> = Vec::new();
        for chunk in &self.data {
            for free in self.free.runs(chunk.clone(), true) {
                self.report.free_blocks += free.end - free.start;
                for named in [&self.used, &self.dropped] {
                    let both = named.runs(free.clone(), true);
                    wrong.extend(both.map(|run| (run, "are free and used")));
                }
            }
            for unfree in self.free.runs(chunk.clone(), false) {
                for unused in self.used.runs(unfree, false) {
                    let leaked = self.dropped.runs(unused, false);
                    wrong.extend(leaked.map(|run| (run, "are neither free nor used")));
                }
            }
            self.ticker.check()?;
        }
        let sound = wrong.is_empty();
        for (run, message) in wrong {
            self.problem(Class::Space, run_object(&run), message.into());
        }
        Ok(sound)
    }
}
