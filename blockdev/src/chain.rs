//! Chains: linked lists of views of kiobufs.
//!
//! Merging two I/Os links their chains, O(1). Splitting walks to the cut and makes two views of the
//! one kiobuf that straddles it: one more node, whatever the size of the kiobufs. No page vector is
//! read, copied or changed by either. Cutting front pieces off one after another walks the chain
//! once.
//!
//! Nodes come from per-thread magazines that exchange full ones through a depot (submitters take
//! nodes, completion threads put them back), so the steady state allocates nothing and locks once
//! in [`MAGAZINE_NODES`] views. A chain that is dropped ends its views as aborted, iteratively.
#![expect(unsafe_code, reason = "a singly linked list with a tail pointer")]

use crate::error::BlockError;
use crate::kiobuf::{Kiobuf, Leg, View};
use crate::units::{dev_len, mem_len};
use libc::iovec;
use std::ptr::NonNull;

/// Nodes per magazine: the unit in which threads exchange free nodes.
pub const MAGAZINE_NODES: usize = 64;

struct Node {
    /// `None` only while the node is in the pool.
    view: Option<View>,
    next: Option<NonNull<Node>>,
}

/// A list of views whose bytes are contiguous on their device (or in the volume).
#[derive(Default)]
pub struct Chain {
    // Invariant: the nodes from `head` along `next` to `tail` are owned by this chain alone, their
    // views are `Some`, `bytes` and `views` are their sums; `head` and `tail` are both `None` or
    // both `Some`, and `tail.next` is `None`.
    head: Option<NonNull<Node>>,
    tail: Option<NonNull<Node>>,
    bytes: u64,
    views: usize,
}

// SAFETY: a chain owns its nodes exclusively and views are Send.
unsafe impl Send for Chain {}
// SAFETY: `&Chain` only reads nodes, and views are Sync (their shared state is).
unsafe impl Sync for Chain {}

impl From<Kiobuf> for Chain {
    fn from(kiobuf: Kiobuf) -> Chain {
        Chain::of(kiobuf.into_view())
    }
}

impl Chain {
    /// A chain without views.
    pub fn new() -> Chain {
        Chain::default()
    }

    pub(crate) fn of(view: View) -> Chain {
        let mut chain = Chain::new();
        chain.push(view);
        chain
    }

    /// Total bytes of the views.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of views.
    pub fn views(&self) -> usize {
        self.views
    }

    /// Whether there are no views.
    pub fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    pub(crate) fn push(&mut self, view: View) {
        let bytes = dev_len(view.len);
        let node = pool::take(view);
        self.append(Chain {
            head: Some(node),
            tail: Some(node),
            bytes,
            views: 1,
        });
    }

    /// Links `other` behind this chain. O(1).
    pub fn append(&mut self, mut other: Chain) {
        let Some(other_head) = other.head.take() else {
            return;
        };
        match self.tail {
            // SAFETY: `tail` is a live node that this chain owns exclusively.
            Some(tail) => unsafe { (*tail.as_ptr()).next = Some(other_head) },
            None => self.head = Some(other_head),
        }
        self.tail = other.tail.take();
        self.bytes += std::mem::take(&mut other.bytes);
        self.views += std::mem::take(&mut other.views);
    }

    /// Links `other` before this chain. O(1).
    pub fn prepend(&mut self, mut other: Chain) {
        std::mem::swap(self, &mut other);
        self.append(other);
    }

    /// Cuts the chain after `bytes`: the front part and the rest. Either may be empty.
    pub fn split_at(mut self, bytes: u64) -> (Chain, Chain) {
        let front = self.split_to(bytes);
        (front, self)
    }

    /// Cuts off and returns the first `bytes`; `self` keeps the rest. Walks only what it cuts off,
    /// so cutting a whole chain into stripe pieces walks it once.
    ///
    /// # Panics
    /// If the chain has fewer bytes.
    pub fn split_to(&mut self, bytes: u64) -> Chain {
        assert!(bytes <= self.bytes, "split beyond the end of a chain");
        if bytes == self.bytes {
            return std::mem::take(self);
        }
        let mut front = Chain::new();
        while front.bytes < bytes {
            let Some(mut node) = self.pop_node() else {
                break;
            };
            // SAFETY: `pop_node` handed over the only reference to a live node.
            let Some(view) = (unsafe { &mut node.as_mut().view }) else {
                break;
            };
            let want = mem_len(bytes - front.bytes);
            if view.len > want {
                let rest = view.cut(want);
                self.prepend(Chain::of(rest));
            }
            let len = dev_len(view.len);
            front.append(Chain {
                head: Some(node),
                tail: Some(node),
                bytes: len,
                views: 1,
            });
        }
        front
    }

    /// Unlinks the first node, keeping the sums right.
    fn pop_node(&mut self) -> Option<NonNull<Node>> {
        let mut head = self.head?;
        // SAFETY: `head` is a live node that this chain owns exclusively.
        let node = unsafe { head.as_mut() };
        self.head = node.next.take();
        if self.head.is_none() {
            self.tail = None;
        }
        self.bytes -= node.view.as_ref().map_or(0, |view| dev_len(view.len));
        self.views -= 1;
        Some(head)
    }

    pub(crate) fn pop(&mut self) -> Option<View> {
        let node = self.pop_node()?;
        Some(pool::put_back(node))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &View> {
        let mut next = self.head;
        std::iter::from_fn(move || {
            let node = next?;
            // SAFETY: nodes are live and not changed while the chain is borrowed.
            let node = unsafe { node.as_ref() };
            next = node.next;
            node.view.as_ref()
        })
    }

    /// A second chain over the same bytes, for a further copy of a mirrored write.
    pub(crate) fn duplicate(&self, leg: Leg) -> Chain {
        let mut copy = Chain::new();
        for view in self.iter() {
            copy.push(view.duplicate(leg));
        }
        copy
    }

    /// Appends the memory of all bytes after the first `skip`, in order.
    pub fn fill_iovecs(&self, mut skip: u64, out: &mut Vec<iovec>) {
        for view in self.iter() {
            let len = dev_len(view.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            view.fill_iovecs(skip, out);
            skip = 0;
        }
    }

    /// How many kiobufs have bytes here (neighbouring views of one count once).
    pub(crate) fn kiobufs(&self) -> usize {
        let mut count = 0;
        let mut last: Option<&View> = None;
        for view in self.iter() {
            count += usize::from(!last.is_some_and(|last| last.is_same_kiobuf(view)));
            last = Some(view);
        }
        count
    }

    /// Ends every view as transferred.
    pub fn end_good(mut self) {
        while let Some(view) = self.pop() {
            view.end_good();
        }
    }

    /// Ends every view as failed.
    pub fn end_bad(mut self, error: BlockError) {
        while let Some(view) = self.pop() {
            view.end_bad(error);
        }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        while let Some(view) = self.pop() {
            drop(view);
        }
    }
}

/// Free nodes. Only this module creates and destroys them.
mod pool {
    use super::{MAGAZINE_NODES, Node, View};
    use std::cell::RefCell;
    use std::ptr::NonNull;
    use std::sync::{Mutex, PoisonError};

    /// Full magazines kept for reuse; beyond it they are freed. 512 x 64 nodes: 2 MiB.
    const DEPOT_MAGAZINES_MAX: usize = 512;

    /// A stack of free nodes, linked through `next`.
    #[derive(Default)]
    struct Magazine {
        top: Option<NonNull<Node>>,
        count: usize,
    }

    // SAFETY: a magazine owns its nodes exclusively, and they hold no view.
    unsafe impl Send for Magazine {}

    impl Magazine {
        fn pop(&mut self) -> Option<NonNull<Node>> {
            let mut node = self.top?;
            // SAFETY: a live free node that this magazine owns exclusively.
            self.top = unsafe { node.as_mut().next.take() };
            self.count -= 1;
            Some(node)
        }

        fn push(&mut self, mut node: NonNull<Node>) {
            // SAFETY: the caller hands over the only reference to a live node.
            unsafe { node.as_mut().next = self.top };
            self.top = Some(node);
            self.count += 1;
        }
    }

    impl Drop for Magazine {
        fn drop(&mut self) {
            while let Some(node) = self.pop() {
                // SAFETY: made by Box in `take`, and popped, so nobody else has it.
                drop(unsafe { Box::from_raw(node.as_ptr()) });
            }
        }
    }

    static DEPOT: Mutex<Vec<Magazine>> = Mutex::new(Vec::new());

    /// Two magazines, so that a thread at the edge of one does not go to the depot each time.
    #[derive(Default)]
    struct Cache {
        loaded: Magazine,
        spare: Magazine,
    }

    impl Cache {
        fn take(&mut self) -> Option<NonNull<Node>> {
            if self.loaded.count == 0 {
                if self.spare.count > 0 {
                    std::mem::swap(&mut self.loaded, &mut self.spare);
                } else {
                    let full = DEPOT.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    self.loaded = full.unwrap_or_default();
                }
            }
            self.loaded.pop()
        }

        fn put_back(&mut self, node: NonNull<Node>) {
            if self.loaded.count == MAGAZINE_NODES {
                let full = std::mem::take(&mut self.loaded);
                let spare = std::mem::replace(&mut self.spare, full);
                deposit(spare);
            }
            self.loaded.push(node);
        }
    }

    impl Drop for Cache {
        fn drop(&mut self) {
            deposit(std::mem::take(&mut self.loaded));
            deposit(std::mem::take(&mut self.spare));
        }
    }

    fn deposit(magazine: Magazine) {
        if magazine.count == 0 {
            return;
        }
        let mut depot = DEPOT.lock().unwrap_or_else(PoisonError::into_inner);
        if depot.len() < DEPOT_MAGAZINES_MAX {
            depot.push(magazine);
        }
    }

    thread_local! {
        static CACHE: RefCell<Cache> = RefCell::default();
    }

    pub(super) fn take(view: View) -> NonNull<Node> {
        let pooled = CACHE
            .try_with(|cache| cache.borrow_mut().take())
            .ok()
            .flatten();
        match pooled {
            Some(mut node) => {
                // SAFETY: the pool handed over the only reference to a live node.
                unsafe { node.as_mut().view = Some(view) };
                node
            }
            None => NonNull::from(Box::leak(Box::new(Node {
                view: Some(view),
                next: None,
            }))),
        }
    }

    /// Takes the view out and keeps the node. The view is dropped by the caller, outside the
    /// pool's borrow, because ending it may run an `end_io` that builds chains.
    pub(super) fn put_back(mut node: NonNull<Node>) -> View {
        // SAFETY: the caller unlinked the node and hands over the only reference.
        let view = unsafe { node.as_mut().view.take() };
        if CACHE
            .try_with(|cache| cache.borrow_mut().put_back(node))
            .is_err()
        {
            // The thread is exiting.
            // SAFETY: made by Box in `take`, and nobody else has it.
            drop(unsafe { Box::from_raw(node.as_ptr()) });
        }
        view.expect("a linked node has its view")
    }
}
