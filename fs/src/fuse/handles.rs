//! Open files by the handle that the kernel sends back with each request.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::OpenFile;

/// Slots are reused, so the table stays as small as the most files ever open at once.
#[derive(Default)]
pub(super) struct Handles {
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    slots: Vec<Option<Arc<OpenFile>>>,
    free: Vec<usize>,
}

impl Handles {
    /// Keeps an open file; returns its handle.
    pub(super) fn insert(&self, file: Arc<OpenFile>) -> u64 {
        let mut table = self.table.write();
        let index = match table.free.pop() {
            Some(index) => index,
            None => {
                table.slots.push(None);
                table.slots.len() - 1
            }
        };
        table.slots[index] = Some(file);
        index as u64
    }

    /// The open file of a handle; `None` for a handle that was never given out.
    pub(super) fn get(&self, handle: u64) -> Option<Arc<OpenFile>> {
        let index = usize::try_from(handle).ok()?;
        self.table.read().slots.get(index)?.clone()
    }

    /// Forgets a handle.
    pub(super) fn remove(&self, handle: u64) -> Option<Arc<OpenFile>> {
        let index = usize::try_from(handle).ok()?;
        let mut table = self.table.write();
        let file = table.slots.get_mut(index)?.take()?;
        table.free.push(index);
        Some(file)
    }

    /// How many files are open.
    pub(super) fn count(&self) -> usize {
        let table = self.table.read();
        table.slots.len() - table.free.len()
    }
}
