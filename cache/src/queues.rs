//! Replacement: S3-FIFO over folios. O(1), and a hit only sets bits in the folio.
//!
//! New folios enter the *small* queue, a tenth of the arena. One that reaches its end unused since
//! is evicted and its key remembered in the *ghost* table; one used again moves to the *main*
//! queue, as does a new one whose key is a ghost. In main, a folio at the end goes round again
//! once for each use. So a stream passes through small and leaves main alone.
//!
//! Each folio has a node from a table made at start. Dirty and busy folios are not queued: the
//! evictor drops one that it meets (*parked*), and whoever makes it clean and idle queues it.
//! The lock here is a leaf: it is taken under an address space's lock, and never the reverse.

use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::AddressSpace;

const NONE: u32 = u32::MAX;
/// Part of the arena that is for folios not yet used twice.
const SMALL_SHARE: u64 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queue {
    Small = 0,
    Main = 1,
}

struct Node {
    prev: u32,
    next: u32,
    queue: Option<Queue>,
    order: u8,
    page: u64,
    space: Weak<AddressSpace>,
}

#[derive(Clone, Copy)]
struct List {
    /// Newest.
    head: u32,
    /// Oldest: next to be looked at.
    tail: u32,
    pages: u64,
}

struct Lists {
    nodes: Vec<Node>,
    free: u32,
    lists: [List; 2],
}

pub(crate) struct Queues {
    lists: Mutex<Lists>,
    small_pages_max: AtomicU64,
    ghosts: Ghosts,
}

/// A folio that the evictor shall decide on; its node is parked.
pub(crate) struct Candidate {
    pub slot: u32,
    pub from: Queue,
    pub page: u64,
    pub space: Weak<AddressSpace>,
}

impl Queues {
    /// Nodes for as many folios as there are pages.
    pub fn new(pages: u32) -> Self {
        let nodes = (0..pages).map(|index| Node {
            prev: NONE,
            next: if index + 1 < pages { index + 1 } else { NONE },
            queue: None,
            order: 0,
            page: 0,
            space: Weak::new(),
        });
        let empty = List {
            head: NONE,
            tail: NONE,
            pages: 0,
        };
        Self {
            lists: Mutex::new(Lists {
                nodes: nodes.collect(),
                free: 0,
                lists: [empty; 2],
            }),
            small_pages_max: AtomicU64::new(u64::from(pages) / SMALL_SHARE),
            ghosts: Ghosts::new(pages),
        }
    }

    /// The shares are parts of so many pages, no more than there were at first.
    pub fn set_pages(&self, pages: u32) {
        let (pages, order) = (u64::from(pages), Ordering::Relaxed);
        self.small_pages_max.store(pages / SMALL_SHARE, order);
        self.ghosts.age_max.store(pages, order);
    }

    /// A parked node for a new folio.
    pub fn begin(&self, space: &Weak<AddressSpace>, page: u64, order: u8) -> u32 {
        let mut lists = self.lists.lock();
        let slot = lists.free;
        // Every folio has at least one page of the arena to itself, so nodes do not run out.
        assert_ne!(slot, NONE, "more folios than pages");
        let node = &mut lists.nodes[slot as usize];
        let next_free = node.next;
        *node = Node {
            prev: NONE,
            next: NONE,
            queue: None,
            order,
            page,
            space: Weak::clone(space),
        };
        lists.free = next_free;
        slot
    }

    /// The folio is gone: its node is free.
    pub fn end(&self, slot: u32) {
        let mut lists = self.lists.lock();
        lists.unlink(slot);
        let free = lists.free;
        let node = &mut lists.nodes[slot as usize];
        node.next = free;
        node.space = Weak::new();
        lists.free = slot;
    }

    /// Queues a parked folio that became clean and idle; one that is queued stays where it is.
    pub fn settle(&self, slot: u32, space: u64) {
        let mut lists = self.lists.lock();
        let node = &lists.nodes[slot as usize];
        if node.queue.is_none() {
            let known = self.ghosts.take(space, node.page);
            lists.push(slot, if known { Queue::Main } else { Queue::Small });
        }
    }

    /// Queues a parked folio.
    pub fn put_back(&self, slot: u32, queue: Queue) {
        let mut lists = self.lists.lock();
        if lists.nodes[slot as usize].queue.is_none() {
            lists.push(slot, queue);
        }
    }

    /// The folio to decide on next, parked.
    pub fn take_oldest(&self) -> Option<Candidate> {
        let mut lists = self.lists.lock();
        let [small, main] = lists.lists;
        let small_max = self.small_pages_max.load(Ordering::Relaxed);
        let from = if small.tail != NONE && (small.pages > small_max || main.tail == NONE) {
            Queue::Small
        } else {
            Queue::Main
        };
        let slot = lists.lists[from as usize].tail;
        if slot == NONE {
            return None;
        }
        lists.unlink(slot);
        let node = &lists.nodes[slot as usize];
        Some(Candidate {
            slot,
            from,
            page: node.page,
            space: Weak::clone(&node.space),
        })
    }

    /// A folio of `pages` pages was evicted from the small queue.
    pub fn remember(&self, space: u64, page: u64, pages: u64) {
        self.ghosts.add(space, page, pages);
    }

    /// Pages in the small and the main queue.
    pub fn pages(&self) -> [u64; 2] {
        self.lists.lock().lists.map(|list| list.pages)
    }
}

impl Lists {
    fn push(&mut self, slot: u32, queue: Queue) {
        let list = &mut self.lists[queue as usize];
        let head = std::mem::replace(&mut list.head, slot);
        if head == NONE {
            list.tail = slot;
        } else {
            self.nodes[head as usize].prev = slot;
        }
        let node = &mut self.nodes[slot as usize];
        (node.prev, node.next, node.queue) = (NONE, head, Some(queue));
        self.lists[queue as usize].pages += 1 << node.order;
    }

    fn unlink(&mut self, slot: u32) {
        let node = &mut self.nodes[slot as usize];
        let Some(queue) = node.queue.take() else {
            return;
        };
        let (prev, next, pages) = (node.prev, node.next, 1 << node.order);
        let list = &mut self.lists[queue as usize];
        list.pages -= pages;
        if prev == NONE {
            list.head = next;
        } else {
            self.nodes[prev as usize].next = next;
        }
        if next == NONE {
            self.lists[queue as usize].tail = prev;
        } else {
            self.nodes[next as usize].prev = prev;
        }
    }
}

/// Keys of folios evicted lately: a direct-mapped table of fingerprints, each stamped with the
/// number of pages evicted before it. One is forgotten when it is overwritten, or when as much as
/// the arena holds has been evicted since: a stream that comes round later is a stream still.
struct Ghosts {
    table: Box<[AtomicU64]>,
    evicted: AtomicU64,
    age_max: AtomicU64,
}

impl Ghosts {
    fn new(pages: u32) -> Self {
        let slots = u64::from(pages).next_power_of_two();
        Self {
            table: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            evicted: AtomicU64::new(1),
            age_max: AtomicU64::new(u64::from(pages)),
        }
    }

    fn key(&self, space: u64, page: u64) -> (usize, u64) {
        // The finalizer of splitmix64.
        let mut hash = space.rotate_left(32) ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
        let slot = usize::try_from(hash & (self.table.len() as u64 - 1)).expect("masked");
        (slot, hash >> 32)
    }

    fn add(&self, space: u64, page: u64, pages: u64) {
        let (slot, print) = self.key(space, page);
        let stamp = self.evicted.fetch_add(pages, Ordering::Relaxed) & 0xffff_ffff;
        self.table[slot].store(print << 32 | stamp, Ordering::Relaxed);
    }

    fn take(&self, space: u64, page: u64) -> bool {
        let (slot, print) = self.key(space, page);
        let entry = self.table[slot].load(Ordering::Relaxed);
        if entry == 0 || entry >> 32 != print {
            return false;
        }
        self.table[slot].store(0, Ordering::Relaxed);
        let now = self.evicted.load(Ordering::Relaxed) & 0xffff_ffff;
        let age = now.wrapping_sub(entry & 0xffff_ffff) & 0xffff_ffff;
        age <= self.age_max.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order_of(queues: &Queues) -> Vec<u64> {
        std::iter::from_fn(|| queues.take_oldest())
            .map(|candidate| candidate.page)
            .collect()
    }

    #[test]
    fn oldest_first_and_any_can_leave() {
        let queues = Queues::new(512);
        let slots: Vec<u32> = (0..5)
            .map(|page| {
                let slot = queues.begin(&Weak::new(), page, 0);
                queues.settle(slot, 1);
                slot
            })
            .collect();
        queues.end(slots[0]);
        queues.end(slots[2]);
        queues.end(slots[4]);
        assert_eq!(queues.pages(), [2, 0]);
        assert_eq!(order_of(&queues), [1, 3]);
    }

    #[test]
    fn a_ghost_returns_to_the_main_queue() {
        let queues = Queues::new(512);
        queues.remember(1, 7, 1);
        for (page, pages) in [(7, [0, 1]), (8, [1, 1])] {
            let slot = queues.begin(&Weak::new(), page, 0);
            queues.settle(slot, 1);
            assert_eq!(queues.pages(), pages);
        }
    }

    #[test]
    fn a_ghost_is_forgotten_after_as_much_as_the_arena_holds() {
        let queues = Queues::new(512);
        queues.remember(1, 7, 256);
        queues.remember(1, 1000, 256);
        queues.remember(1, 2000, 256);
        let slot = queues.begin(&Weak::new(), 7, 0);
        queues.settle(slot, 1);
        assert_eq!(queues.pages(), [1, 0]);
    }

    #[test]
    fn settled_once() {
        let queues = Queues::new(512);
        let slot = queues.begin(&Weak::new(), 3, 2);
        queues.settle(slot, 1);
        queues.settle(slot, 1);
        assert_eq!(queues.pages(), [4, 0]);
        let candidate = queues.take_oldest().unwrap();
        queues.put_back(candidate.slot, Queue::Main);
        assert_eq!(queues.pages(), [0, 4]);
    }
}
