//! The bytes behind a request, for backends that copy instead of handing memory to a kernel.
#![expect(
    unsafe_code,
    reason = "copies from and to the pages that a request owns"
)]

use crate::request::DeviceRequest;

/// All bytes of a write.
pub(super) fn gather(request: &DeviceRequest) -> Vec<u8> {
    let mut iovecs = Vec::new();
    request.fill_iovecs(&mut iovecs);
    let mut bytes = Vec::with_capacity(crate::units::mem_len(request.len()));
    for part in iovecs {
        // SAFETY: the request owns its kiobufs, which keep the pages mapped; during a write nobody
        // changes them (PageVector).
        let from = unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len) };
        bytes.extend_from_slice(from);
    }
    bytes
}

/// Fills the memory of a read from its start; `bytes` may be shorter.
pub(super) fn scatter(request: &DeviceRequest, mut bytes: &[u8]) {
    let mut iovecs = Vec::new();
    request.fill_iovecs(&mut iovecs);
    for part in iovecs {
        let (now, rest) = bytes.split_at(part.iov_len.min(bytes.len()));
        bytes = rest;
        // SAFETY: the request owns its kiobufs, which keep the pages mapped; during a read nobody
        // else accesses them (PageVector). `now` is not longer than the segment.
        unsafe {
            part.iov_base
                .cast::<u8>()
                .copy_from_nonoverlapping(now.as_ptr(), now.len())
        };
    }
}
