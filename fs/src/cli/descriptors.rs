//! Descriptors that a background daemon inherited and must not keep: a lock or pipe of the caller
//! would otherwise be held until the unmount.

/// The first descriptor after standard input, output and error.
const FIRST: libc::c_uint = 3;

/// Closes everything but the standard descriptors. To be called before this process opens anything
/// itself. On kernels before 5.9 nothing happens.
#[expect(unsafe_code, reason = "descriptors that nobody in this process owns")]
pub fn close_inherited() {
    // SAFETY: the caller has opened nothing yet, so no value in this process stands for any of
    // these descriptors.
    let result = unsafe { libc::close_range(FIRST, libc::c_uint::MAX, 0) };
    if result != 0 {
        log::debug!("inherited descriptors stay open");
    }
}
