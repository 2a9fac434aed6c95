//! Readahead.

/// What readahead remembers of one open file.
#[derive(Default)]
pub struct ReadaheadState {}

impl ReadaheadState {
    /// Of a file just opened.
    pub fn new() -> Self {
        Self {}
    }
}
