//! Addresses and sizes, and the only conversions between them.

/// Size of one memory page in bytes; a block of the volume is one page.
pub const PAGE_SIZE: usize = 4096;

/// Size of one block of the volume in bytes.
pub const BLOCK_SIZE: u64 = 4096;

/// Block address in the volume's logical space (unit: 4 KiB blocks).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolBlock(pub u64);

impl VolBlock {
    /// Byte address in the logical space.
    pub const fn bytes(self) -> u64 {
        self.0 * BLOCK_SIZE
    }

    /// The block `blocks` further on.
    pub const fn plus(self, blocks: u64) -> VolBlock {
        VolBlock(self.0 + blocks)
    }
}

/// A length in memory from a length on a device; both are 64 bits wide on what braidfs supports.
pub const fn mem_len(bytes: u64) -> usize {
    const _: () = assert!(size_of::<usize>() == size_of::<u64>());
    bytes as usize
}

/// A length on a device from a length in memory.
pub const fn dev_len(bytes: usize) -> u64 {
    bytes as u64
}

/// The largest multiple of `unit` not above `value`.
pub const fn round_down(value: u64, unit: u64) -> u64 {
    value - value % unit
}

/// The smallest multiple of `unit` not below `value`.
pub const fn round_up(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}
