//! How far a scrub is and what came of it: kept in the `settings` table, across mounts.

/// Name in the settings.
pub(crate) const SETTING_SCRUB: &[u8] = b"scrub";

/// Numbers of 8 bytes in a record.
const FIELDS: usize = 14;

/// Where a scrub stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScrubState {
    /// None ever ran.
    #[default]
    Never,
    /// One is under way.
    Running,
    /// One was paused, or cut off by an unmount or a crash; it can be resumed.
    Paused,
    /// The last one came to its end.
    Finished,
    /// The last one was given up.
    Canceled,
    /// The last one could not go on.
    Failed,
}

const STATES: [ScrubState; 6] = [
    ScrubState::Never,
    ScrubState::Running,
    ScrubState::Paused,
    ScrubState::Finished,
    ScrubState::Canceled,
    ScrubState::Failed,
];

/// Progress and result of the last scrub.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScrubSummary {
    /// Where it stands.
    pub state: ScrubState,
    /// When it began, in seconds since 1970.
    pub started_unix: u64,
    /// When it ended, or was last heard of, in seconds since 1970.
    pub ended_unix: u64,
    /// How long it worked, in milliseconds, without its pauses.
    pub active_ms: u64,
    /// Bytes per second that it is to read at the most; 0: as many as it can.
    pub rate_bytes: u64,
    /// Whether it writes bad copies again.
    pub repair: bool,
    /// Bytes that there were to read when it began.
    pub total_bytes: u64,
    /// Bytes of file data read.
    pub data_bytes: u64,
    /// Bytes of metadata read, all copies, with labels and chunk tables.
    pub metadata_bytes: u64,
    /// Bad copies and blocks found.
    pub found: u64,
    /// Those of them that are good again.
    pub repaired: u64,
    /// Those of them that are not.
    pub left: u64,
    /// Where it goes on: an inode, 0 for the beginning; and a block of its file.
    #[serde(skip)]
    pub(crate) position: (u64, u64),
}

impl ScrubSummary {
    /// Bytes read of those there were.
    pub fn done_bytes(&self) -> u64 {
        self.data_bytes + self.metadata_bytes
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let state = STATES.iter().position(|&state| state == self.state);
        let fields: [u64; FIELDS] = [
            state.unwrap_or_default() as u64,
            self.started_unix,
            self.ended_unix,
            self.active_ms,
            self.rate_bytes,
            u64::from(self.repair),
            self.total_bytes,
            self.data_bytes,
            self.metadata_bytes,
            self.found,
            self.repaired,
            self.left,
            self.position.0,
            self.position.1,
        ];
        fields
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }

    /// `None` for what no scrub has written.
    pub(crate) fn decode(value: &[u8]) -> Option<Self> {
        if value.len() != 8 * FIELDS {
            return None;
        }
        let mut fields = value
            .chunks_exact(8)
            .map(|raw| u64::from_le_bytes(raw.try_into().expect("chunks of eight")));
        let mut next = || fields.next().unwrap_or_default();
        Some(Self {
            state: *STATES.get(usize::try_from(next()).ok()?)?,
            started_unix: next(),
            ended_unix: next(),
            active_ms: next(),
            rate_bytes: next(),
            repair: next() == 1,
            total_bytes: next(),
            data_bytes: next(),
            metadata_bytes: next(),
            found: next(),
            repaired: next(),
            left: next(),
            position: (next(), next()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_round_trips_and_others_are_refused() {
        let summary = ScrubSummary {
            state: ScrubState::Paused,
            started_unix: 1,
            ended_unix: 2,
            active_ms: 3,
            rate_bytes: 4,
            repair: true,
            total_bytes: 5,
            data_bytes: 6,
            metadata_bytes: 7,
            found: 8,
            repaired: 9,
            left: 10,
            position: (11, 12),
        };
        let mut raw = summary.encode();
        assert_eq!(ScrubSummary::decode(&raw), Some(summary));
        raw[0] = 6;
        assert_eq!(ScrubSummary::decode(&raw), None);
        assert_eq!(ScrubSummary::decode(&raw[1..]), None);
        assert_eq!(ScrubSummary::decode(&[]), None);
    }
}
