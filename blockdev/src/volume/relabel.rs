//! Giving a file system another label: what its users call it, in the labels of all members.
//!
//! An update writes one of the two copies on each member, so there are two updates: after the first
//! one each member's newest copy says the new text, after the second the older copy does so too,
//! and the loss of a copy does not bring the former text back. Cut off in between, the members
//! differ by one generation at the most, as with any update: see [`super::store`].

use super::types::{VolumeError, VolumeErrorKind};
use super::{Volume, block_error, elect};
use crate::device::BlockDevice;
use crate::label::LABEL_TEXT_MAX;
use std::sync::Arc;

/// Whether a label can be written.
pub(super) fn check_text(text: &str) -> Result<(), VolumeError> {
    if text.len() > LABEL_TEXT_MAX || text.contains('\0') {
        let kind = VolumeErrorKind::LabelText(LABEL_TEXT_MAX);
        return Err(VolumeError::Volume(kind));
    }
    Ok(())
}

impl Volume {
    /// What the file system is called; may be empty.
    pub fn label_text(&self) -> String {
        self.identity.text.read().clone()
    }

    /// Calls the file system `text`, durably in all copies of all labels when this returns well.
    pub fn set_label(&self, text: &str) -> Result<(), VolumeError> {
        check_text(text)?;
        if self.is_read_only() {
            return Err(VolumeError::Volume(VolumeErrorKind::ReadOnly));
        }
        self.check_answering()?;
        let mut durable = self.durable.lock();
        text.clone_into(&mut self.identity.text.write());
        for _copy in 0..2 {
            let table = durable.table.clone();
            self.update(&mut durable, table, false)
                .map_err(|error| block_error(&self.devices, error))?;
        }
        Ok(())
    }

    /// The same for a volume that nobody uses: `devices` are all its members, open for writing, in
    /// any order. Whether it counts as closed properly stays as it is.
    pub fn relabel(devices: Vec<Arc<dyn BlockDevice>>, text: &str) -> Result<(), VolumeError> {
        check_text(text)?;
        let elected = elect::elect(devices)?;
        elected.check_known()?;
        let failed = |error| block_error(&elected.devices, error);
        elected.repair().map_err(failed)?;
        let elect::Elected {
            identity,
            devices,
            table,
            is_clean,
            ..
        } = &elected;
        text.clone_into(&mut identity.text.write());
        for generation in [elected.generation + 1, elected.generation + 2] {
            identity
                .update(devices, table, generation, *is_clean)
                .map_err(failed)?;
        }
        Ok(())
    }
}
