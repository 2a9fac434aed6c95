//! What the page cache asks about a file's pages: where they live, where they shall live, and
//! the news that they got there. One per inode in memory.

use std::sync::{Arc, Weak};

use braidfs_blockdev::{BlockError, VolBlock};
use braidfs_cache::{Backing, CacheError, MapOut, PageRange, Placement, SpaceClass};

use crate::filesystem::FileSystem;
use crate::inode::{Inode, PAGE};
use crate::meta::records::Extent;

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
            let backing = DataBacking {
                fs: Weak::clone(&self.me),
                inode: Arc::downgrade(inode),
            };
            self.cache
                .new_space(inode.ino, SpaceClass::Data, Arc::new(backing))
        })
    }

    /// Maps freshly written blocks and counts them, in place of what was there.
    pub(crate) fn map_written(
        &self,
        inode: &Arc<Inode>,
        extent: &Extent,
    ) -> Result<(), crate::Errno> {
        let _whole = self.mapping.read();
        let replaced = {
            let _map = inode.map.write();
            self.extents(inode.ino).replace(extent)?
        };
        self.space.note_mapped(extent.block, extent.len);
        {
            let mut state = inode.state.lock();
            let blocks = state.attr.blocks + extent.len * (PAGE / 512);
            state.attr.blocks = blocks.saturating_sub(replaced * (PAGE / 512));
        }
        self.mark_dirty(inode);
        Ok(())
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
        let (fs, _inode) = self.owner()?;
        if fs.failed.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(CacheError::Backing(libc::EROFS));
        }
        let mut allocated = Vec::with_capacity(4);
        let blocks = runs.iter().map(|run| run.count()).sum();
        fs.space
            .allocate(blocks, &mut allocated)
            .map_err(|e| CacheError::Backing(e.0))?;
        // Both lists have the same number of blocks: walk them in step, cutting at every border.
        let mut runs = runs.iter().copied();
        let mut run = runs.next();
        for (mut block, mut len) in allocated {
            while len > 0 {
                let Some(PageRange { start, end }) = run else {
                    break;
                };
                let take = len.min(end - start);
                let pages = PageRange {
                    start,
                    end: start + take,
                };
                out.push(Placement {
                    pages,
                    block: VolBlock(block),
                });
                block += take;
                len -= take;
                run = PageRange::new(start + take, end).or_else(|| runs.next());
            }
        }
        Ok(())
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
                fs.space.unallocate(placement.block.0, len);
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

    fn dirty_merged(&self, _space: u64, pages: u64) {
        if let Ok((fs, _)) = self.owner() {
            fs.space.unreserve(pages);
        }
    }
}
