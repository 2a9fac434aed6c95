//! Sparse images that share their pages: cloning one costs a counter for each 256 KiB in use, so
//! that one more state of a device after a power cut costs next to nothing.
//!
//! A page of zeros is not stored. Pages are never changed once they are shared: changing one byte
//! makes a new page.

use super::SECTOR;
use crate::units::{PAGE_SIZE, dev_len};
use std::sync::{Arc, OnceLock};

/// Pages of one leaf.
const LEAF_PAGES: usize = 64;

type Leaf = [Option<Arc<SimPage>>; LEAF_PAGES];

/// One page of an image, with its digest once asked for.
#[derive(Debug)]
pub struct SimPage {
    bytes: [u8; PAGE_SIZE],
    digest: OnceLock<u64>,
}

impl SimPage {
    /// A page of at most [`PAGE_SIZE`] bytes; what is missing is zero.
    pub fn new(from: &[u8]) -> Arc<SimPage> {
        let mut bytes = [0; PAGE_SIZE];
        bytes[..from.len()].copy_from_slice(from);
        Arc::new(SimPage {
            bytes,
            digest: OnceLock::new(),
        })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; PAGE_SIZE] {
        &self.bytes
    }

    fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| {
            let words = self.bytes.chunks_exact(8).map(|word| {
                let word: [u8; 8] = word.try_into().expect("eight bytes");
                u64::from_le_bytes(word)
            });
            words.fold(0x9e37_79b9_7f4a_7c15, |sum, word| {
                let mixed = (sum ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
                mixed ^ (mixed >> 32)
            })
        })
    }

    fn is_zero(&self) -> bool {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        self.bytes == ZEROS
    }
}

/// The bytes of a device.
#[derive(Clone, Debug)]
pub struct SimImage {
    len: usize,
    leaves: Vec<Option<Arc<Leaf>>>,
}

impl SimImage {
    /// An image of zeros.
    pub fn zeroed(len: usize) -> SimImage {
        SimImage {
            len,
            leaves: vec![None; len.div_ceil(PAGE_SIZE * LEAF_PAGES)],
        }
    }

    /// An image with these bytes.
    pub fn of(bytes: &[u8]) -> SimImage {
        let mut image = SimImage::zeroed(bytes.len());
        for (page, bytes) in bytes.chunks(PAGE_SIZE).enumerate() {
            if bytes.iter().any(|byte| *byte != 0) {
                image.set_page(page, SimPage::new(bytes));
            }
        }
        image
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a size of a device")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// A page by number; `None`: zeros.
    pub fn page(&self, page: usize) -> Option<&Arc<SimPage>> {
        self.leaves.get(page / LEAF_PAGES)?.as_ref()?[page % LEAF_PAGES].as_ref()
    }

    /// Replaces a page; one behind the end is ignored.
    pub fn set_page(&mut self, page: usize, to: Arc<SimPage>) {
        let to = (!to.is_zero()).then_some(to);
        let Some(leaf) = self.leaves.get_mut(page / LEAF_PAGES) else {
            return;
        };
        if leaf.is_none() && to.is_none() {
            return;
        }
        let leaf = leaf.get_or_insert_with(|| Arc::new(std::array::from_fn(|_| None)));
        Arc::make_mut(leaf)[page % LEAF_PAGES] = to;
    }

    /// Copies bytes out, from `offset` on.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let (page, within) = ((offset + done) / PAGE_SIZE, (offset + done) % PAGE_SIZE);
            let len = (PAGE_SIZE - within).min(out.len() - done);
            let part = &mut out[done..done + len];
            match self.page(page) {
                Some(page) => part.copy_from_slice(&page.bytes[within..within + len]),
                None => part.fill(0),
            }
            done += len;
        }
    }

    /// Takes over those sectors of `from` whose bits are set in `mask`.
    pub fn set_sectors(&mut self, page: usize, from: &Arc<SimPage>, mask: u8) {
        match mask {
            0 => {}
            u8::MAX => self.set_page(page, from.clone()),
            _ => {
                let mut bytes = self.copy_of(page);
                for sector in (0..PAGE_SIZE / SECTOR).filter(|sector| mask >> sector & 1 == 1) {
                    let range = sector * SECTOR..(sector + 1) * SECTOR;
                    bytes[range.clone()].copy_from_slice(&from.bytes[range]);
                }
                self.set_page(page, SimPage::new(&bytes));
            }
        }
    }

    pub(super) fn copy_of(&self, page: usize) -> [u8; PAGE_SIZE] {
        self.page(page).map_or([0; PAGE_SIZE], |page| page.bytes)
    }

    /// How many pages are stored.
    pub fn stored_pages(&self) -> u64 {
        let leaves = self.leaves.iter().flatten();
        leaves
            .map(|leaf| dev_len(leaf.iter().flatten().count()))
            .sum()
    }

    /// All bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// A number that two images with different bytes almost surely do not share.
    pub fn digest(&self) -> u64 {
        let mut sum = dev_len(self.len);
        for (nth, leaf) in self.leaves.iter().enumerate() {
            let Some(leaf) = leaf else { continue };
            for (within, page) in leaf.iter().enumerate() {
                let Some(page) = page else { continue };
                let mut place = dev_len(nth * LEAF_PAGES + within) ^ page.digest();
                sum = sum.wrapping_add(super::splitmix(&mut place));
            }
        }
        sum
    }
}
