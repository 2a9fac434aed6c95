//! The buddy allocator over page numbers: blocks of 2^0..=2^8 pages, naturally aligned.
//!
//! Pure bookkeeping, no memory is touched: free lists are links in one array made at start, so
//! that nothing is allocated later. Lists are last-in-first-out: memory freed last is handed out
//! first, being the most likely to be mapped and in the processor's cache.

/// Largest block: 2^8 pages, 1 MiB.
pub(crate) const ORDER_MAX: u8 = 8;
/// Pages of the largest block.
pub(crate) const PAGES_MAX: u32 = 1 << ORDER_MAX;

const NONE: u32 = u32::MAX;
/// In `state`: this page is not the head of a free block.
const NOT_FREE: u8 = u8::MAX;

#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
}

pub(crate) struct Buddy {
    links: Vec<Link>,
    /// Of a free block's first page: its order. Else `NOT_FREE`.
    state: Vec<u8>,
    heads: [u32; ORDER_MAX as usize + 1],
    free_pages: u32,
}

impl Buddy {
    /// All of `pages`, a multiple of the largest block, is free.
    pub fn new(pages: u32) -> Self {
        assert!(pages.is_multiple_of(PAGES_MAX) && pages < NONE);
        let unlinked = Link {
            prev: NONE,
            next: NONE,
        };
        let mut buddy = Self {
            links: vec![unlinked; pages as usize],
            state: vec![NOT_FREE; pages as usize],
            heads: [NONE; ORDER_MAX as usize + 1],
            free_pages: pages,
        };
        // Pushed from the end, so that the first pages, which are mapped first, come out first.
        for block in (0..pages / PAGES_MAX).rev() {
            buddy.push(block * PAGES_MAX, ORDER_MAX);
        }
        buddy
    }

    pub fn free_pages(&self) -> u32 {
        self.free_pages
    }

    /// First page of a block of 2^`order` pages.
    pub fn alloc(&mut self, order: u8) -> Option<u32> {
        let from = (order..=ORDER_MAX).find(|&k| self.heads[usize::from(k)] != NONE)?;
        let page = self.heads[usize::from(from)];
        self.unlink(page);
        for half in (order..from).rev() {
            self.push(page + (1 << half), half);
        }
        self.free_pages -= 1 << order;
        Some(page)
    }

    /// Back with a block that `alloc` gave.
    pub fn free(&mut self, page: u32, order: u8) {
        self.free_pages += 1 << order;
        let (mut page, mut order) = (page, order);
        debug_assert_eq!(self.state[page as usize], NOT_FREE, "double free");
        while order < ORDER_MAX {
            let buddy = page ^ (1 << order);
            if self.state[buddy as usize] != order {
                break;
            }
            self.unlink(buddy);
            page = page.min(buddy);
            order += 1;
        }
        self.push(page, order);
    }

    fn push(&mut self, page: u32, order: u8) {
        let head = std::mem::replace(&mut self.heads[usize::from(order)], page);
        self.links[page as usize] = Link {
            prev: NONE,
            next: head,
        };
        if head != NONE {
            self.links[head as usize].prev = page;
        }
        self.state[page as usize] = order;
    }

    fn unlink(&mut self, page: u32) {
        let order = std::mem::replace(&mut self.state[page as usize], NOT_FREE);
        let Link { prev, next } = self.links[page as usize];
        if prev == NONE {
            self.heads[usize::from(order)] = next;
        } else {
            self.links[prev as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].prev = prev;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn everything_freed_becomes_large_blocks_again() {
        let mut buddy = Buddy::new(4 * PAGES_MAX);
        let pages: Vec<u32> = std::iter::from_fn(|| buddy.alloc(0)).collect();
        assert_eq!(pages.len(), 4 * PAGES_MAX as usize);
        for page in pages {
            buddy.free(page, 0);
        }
        assert_eq!(buddy.free_pages(), 4 * PAGES_MAX);
        assert_eq!((0..4).filter_map(|_| buddy.alloc(ORDER_MAX)).count(), 4);
        assert_eq!(buddy.alloc(0), None);
    }

    #[test]
    fn last_freed_is_first_handed_out() {
        let mut buddy = Buddy::new(4 * PAGES_MAX);
        let first = buddy.alloc(ORDER_MAX).unwrap();
        let second = buddy.alloc(ORDER_MAX).unwrap();
        assert!(first < second);
        buddy.free(first, ORDER_MAX);
        assert_eq!(buddy.alloc(3), Some(first));
    }

    proptest! {
        /// Blocks handed out are aligned, disjoint and inside; the free count is what is left.
        #[test]
        fn blocks_never_overlap(
            steps in prop::collection::vec((0u8..=ORDER_MAX, any::<u16>()), 1..400)
        ) {
            let total = 3 * PAGES_MAX;
            let mut buddy = Buddy::new(total);
            let mut live: Vec<(u32, u8)> = Vec::new();
            let mut owner = vec![false; total as usize];
            for (order, pick) in steps {
                if pick % 3 == 0 && !live.is_empty() {
                    let (page, order) = live.swap_remove(usize::from(pick) % live.len());
                    owner[page as usize..(page + (1 << order)) as usize].fill(false);
                    buddy.free(page, order);
                } else if let Some(page) = buddy.alloc(order) {
                    prop_assert!(page.is_multiple_of(1 << order) && page + (1 << order) <= total);
                    for slot in &mut owner[page as usize..(page + (1 << order)) as usize] {
                        prop_assert!(!std::mem::replace(slot, true));
                    }
                    live.push((page, order));
                }
                let used = owner.iter().filter(|&&used| used).count();
                prop_assert_eq!(buddy.free_pages() as usize, total as usize - used);
            }
        }
    }
}
