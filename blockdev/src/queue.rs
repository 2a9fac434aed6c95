//! Per-device queue.
