//! What the page cache asks about a file's pages: where they live, where they shall live, and
//! the news that they got there. One per inode in memory.

use std::sync::{Arc, Weak};

use braidfs_blockdev::{BlockError, InDoubt, VolBlock};
use braidfs_cache::{Backing, CacheError, MapOut, PageRange, Placement, SpaceClass};

use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};
use crate::meta::records::Extent;

/// Runs of dirty pages that stat(2) looks up in the map; those behind are not counted yet.
const UNCLEAN_RUNS_MAX: usize = 1 << 14;

/// The owner of one file's pages. Weak, because the inode holds the address space that holds it.
struct DataBacking {
    fs: Weak<FileSystem>,
    inode: Weak<Inode>,
}

impl DataBacking {
    fn owner(&self) -> Result<(Arc<FileSystem>, Arc<Inode>), CacheError> {
        match (self.fs.upgrade(), self.inode.upgrade()) {
            (Some(fs), Some(inode)) => Ok((fs, inode)),
            _ => Err(CacheError::ShutDown),
        }
    }
}

impl FileSystem {
    /// The pages of a file.
    pub(crate) fn pages<'a>(&self, inode: &'a Arc<Inode>) -> &'a Arc<braidfs_cache::AddressSpace> {
        inode.space_or(|| {
            inode.owner.get_or_init(|| Weak::clone(&self.me));
            let backing = DataBacking {
                fs: Weak::clone(&self.me),
                inode: Arc::downgrade(inode),
            };
            self.cache
                .new_space(inode.ino, SpaceClass::Data, Arc::new(backing))
        })
    }

    /// Maps freshly written blocks and counts them, in place of what was there. Pages that were
    /// written to the block set aside for them give their reservation back.
    pub(crate) fn map_written(
        &self,
        inode: &Arc<Inode>,
        extent: &Extent,
    ) -> Result<(), crate::Errno> {
        let _whole = self.mapping.read();
        let replaced = {
            let _map = inode.map.write();
            let replaced = self.extents(inode.ino).replace(extent)?;
            let mut state = inode.state.lock();
            let blocks = state.attr.blocks + extent.len * (PAGE / 512);
            state.attr.blocks = blocks.saturating_sub(replaced.blocks * (PAGE / 512));
            replaced
        };
        if replaced.kept == extent.len {
            self.space.unreserve(extent.len);
            self.space.note_filled(extent.block, extent.len);
        } else {
            self.space.note_mapped(extent.block, extent.len);
        }
        self.mark_dirty(inode);
        Ok(())
    }

    /// Homes for dirty pages, pushed in order: with `in_place` the blocks that were set aside for
    /// them, where there are such, else free ones.
    ///
    /// A block that the durable state has as unwritten reads as zeros until a commit says that it
    /// has data, so it is written in place; after that it is replaced like any other. Those pages
    /// keep their reservation until they are mapped: a write that fails leaves them dirty.
    pub(crate) fn place(
        &self,
        inode: &Inode,
        runs: &[PageRange],
        in_place: bool,
        out: &mut Vec<Placement>,
    ) -> Result<(), crate::Errno> {
        let mut homes = Vec::with_capacity(runs.len());
        if in_place {
            let _map = inode.map.read();
            for &run in runs {
                self.homes_of(inode.ino, run, &mut homes)?;
            }
        } else {
            homes.extend(runs.iter().map(|&run| (run, None)));
        }
        let fresh: u64 = homes
            .iter()
            .filter(|(_, home)| home.is_none())
            .map(|(pages, _)| pages.count())
            .sum();
        let mut allocated = Vec::with_capacity(4);
        if fresh > 0 {
            self.space.allocate(fresh, &mut allocated)?;
        }
        let mut allocated = allocated.into_iter();
        let mut rest = (0, 0);
        for (pages, home) in homes {
            if let Some(block) = home {
                let block = VolBlock(block);
                out.push(Placement { pages, block });
                continue;
            }
            let mut at = pages.start;
            while at < pages.end {
                if rest.1 == 0 {
                    rest = allocated.next().expect("as many as were asked for");
                }
                let take = rest.1.min(pages.end - at);
                out.push(Placement {
                    pages: PageRange {
                        start: at,
                        end: at + take,
                    },
                    block: VolBlock(rest.0),
                });
                at += take;
                rest = (rest.0 + take, rest.1 - take);
            }
        }
        Ok(())
    }

    /// Cuts `run` into parts that have a block to be written in place, and parts that have none.
    fn homes_of(
        &self,
        ino: crate::Ino,
        run: PageRange,
        homes: &mut Vec<(PageRange, Option<u64>)>,
    ) -> Result<(), crate::Errno> {
        let mut at = run.start;
        let part =
            |start: u64, end: u64, home: Option<u64>| Some((PageRange::new(start, end)?, home));
        for (start, block, len) in self.extents(ino).unwritten(run.start, run.end)? {
            homes.extend(part(at, start, None));
            at = start;
            while at < start + len {
                let here = block + (at - start);
                let (fixed, count) = self.space.fixed_run(here, start + len - at);
                let home = (!fixed).then_some(here);
                homes.extend(part(at, at + count, home));
                at += count;
            }
        }
        homes.extend(part(at, run.end, None));
        Ok(())
    }

    /// Whether a block is set aside for the page: then a placement there was in place.
    pub(crate) fn is_set_aside(&self, inode: &Inode, page: u64, block: VolBlock) -> bool {
        let _map = inode.map.read();
        let found = self.extents(inode.ino).unwritten(page, page + 1);
        found.is_ok_and(|found| found.first().is_some_and(|&(_, home, _)| home == block.0))
    }

    /// Blocks of 512 bytes that a file has or will have: `blocks` in extents, and those that pages
    /// will take that are not written yet.
    pub(crate) fn blocks_of(&self, inode: &Inode) -> u64 {
        let Some(space) = inode.space() else {
            return inode.state.lock().attr.blocks;
        };
        // The pages first: those written meanwhile are in the map then.
        let runs = space.unclean_runs(PageRange::ALL, UNCLEAN_RUNS_MAX);
        let runs = runs.unwrap_or_default();
        if runs.is_empty() {
            return inode.state.lock().attr.blocks;
        }
        let _map = inode.map.read();
        let extents = self.extents(inode.ino);
        let homeless: u64 = runs
            .iter()
            .map(|run| extents.holes(run.start, run.end).unwrap_or(0))
            .sum();
        inode.state.lock().attr.blocks + homeless * (PAGE / 512)
    }

    pub(crate) fn extents(&self, ino: crate::Ino) -> crate::extent_map::ExtentMap<'_> {
        crate::extent_map::ExtentMap {
            store: &self.store,
            space: &self.space,
            ino,
        }
    }
}

impl Backing for DataBacking {
    fn map(&self, _space: u64, pages: PageRange, out: &mut MapOut) -> Result<(), CacheError> {
        let (fs, inode) = self.owner()?;
        let _map = inode.map.read();
        fs.extents(inode.ino)
            .map(pages, out)
            .map_err(|errno| CacheError::Backing(errno.0))
    }

    fn allocate(
        &self,
        _space: u64,
        runs: &[PageRange],
        out: &mut Vec<Placement>,
    ) -> Result<(), CacheError> {
        let (fs, inode) = self.owner()?;
        if fs.failed.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(CacheError::Backing(libc::EROFS));
        }
        fs.place(&inode, runs, true, out)
            .map_err(|e| CacheError::Backing(e.0))
    }

    fn written(
        &self,
        _space: u64,
        placement: Placement,
        crcs: &[u32],
        result: Result<(), BlockError>,
    ) {
        let Ok((fs, inode)) = self.owner() else {
            return;
        };
        let len = placement.pages.count();
        let extent = Extent {
            start: placement.pages.start,
            len,
            block: placement.block.0,
            crcs: crcs.to_vec(),
        };
        let mapped = match result {
            Ok(()) => fs
                .map_written(&inode, &extent)
                .map_err(|errno| errno.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = mapped {
            if result.is_err() {
                if !fs.is_set_aside(&inode, placement.pages.start, placement.block) {
                    fs.space.unallocate(placement.block.0, len);
                }
                // It is not durable before a group that is yet to be opened: the next write-back
                // goes into that one at the earliest.
                let later = fs.committer.open_group() + 1;
                let order = std::sync::atomic::Ordering::SeqCst;
                inode.changed_in.fetch_max(later, order);
            } else {
                // The data is there but cannot be found: nothing may be called durable any more.
                fs.failed.store(true, std::sync::atomic::Ordering::SeqCst);
            }
            log::error!(
                "inode {}: writing pages {}..{} to block {} failed: {error}",
                inode.ino,
                placement.pages.start,
                placement.pages.end,
                placement.block.0
            );
        }
    }

    fn in_doubt(&self, _space: u64, placement: Placement, in_doubt: InDoubt) {
        if let Ok((fs, _)) = self.owner() {
            let (start, len) = (placement.block.0, placement.pages.count());
            fs.space.doubt(start, len, in_doubt);
        }
    }

    fn dirty_merged(&self, _space: u64, pages: u64) {
        if let Ok((fs, _)) = self.owner() {
            fs.space.unreserve(pages);
        }
    }
}
