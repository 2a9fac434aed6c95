//! Reading what `stats --json` and `info --json` say.

use serde_json::Value;

/// A number at a JSON pointer; the test fails if there is none.
pub fn number(value: &Value, pointer: &str) -> u64 {
    let found = value.pointer(pointer).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("no number at {pointer} in {value}"))
}

/// A list at a JSON pointer; the test fails if there is none.
pub fn list<'v>(value: &'v Value, pointer: &str) -> &'v [Value] {
    let found = value.pointer(pointer).and_then(Value::as_array);
    found.unwrap_or_else(|| panic!("no list at {pointer} in {value}"))
}

/// What the devices were told to write, or read, over some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceTotals {
    /// Requests dispatched.
    pub requests: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// kiobufs that these carried.
    pub kiobufs: u64,
}

impl DeviceTotals {
    /// The sum over the devices of one direction: `read` or `write`.
    pub fn of(stats: &Value, direction: &str) -> Self {
        let mut totals = Self::default();
        for device in list(stats, "/volume/devices") {
            let field = |name: &str| number(device, &format!("/{direction}/{name}"));
            totals.requests += field("requests");
            totals.bytes += field("request_bytes/sum");
            totals.kiobufs += field("kiobufs_per_request/sum");
        }
        totals
    }

    /// What was added since an earlier reading.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            requests: self.requests - earlier.requests,
            bytes: self.bytes - earlier.bytes,
            kiobufs: self.kiobufs - earlier.kiobufs,
        }
    }

    /// Bytes per request; the test fails if there was none.
    pub fn mean_request_bytes(self) -> u64 {
        assert!(self.requests > 0, "no device request was counted");
        self.bytes / self.requests
    }
}

/// A chunk of the chunk table, from `info --json`.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// First logical block.
    pub start: u64,
    /// Logical length in blocks.
    pub len_blocks: u64,
    /// `data` or `meta`.
    pub kind: String,
    /// `single`, `stripe` or `mirror`.
    pub profile: String,
    /// Unit of striping in blocks.
    pub unit_blocks: u64,
    /// Device index and byte offset of each member, in stripe order.
    pub members: Vec<(usize, u64)>,
    /// Bytes of each member's share.
    pub member_len_bytes: u64,
}

impl Chunk {
    /// The whole table.
    pub fn table(info: &Value) -> Vec<Self> {
        list(info, "/chunks").iter().map(Self::parse).collect()
    }

    fn parse(value: &Value) -> Self {
        let word = |key: &str| value[key].as_str().unwrap_or_default().to_lowercase();
        let member = |member: &Value| {
            let dev = usize::try_from(number(member, "/dev")).expect("a device index fits");
            (dev, number(member, "/offset_bytes"))
        };
        Self {
            start: number(value, "/start"),
            len_blocks: number(value, "/len_blocks"),
            kind: word("kind"),
            profile: word("profile"),
            unit_blocks: number(value, "/stripe_unit_blocks"),
            members: list(value, "/members").iter().map(member).collect(),
            member_len_bytes: number(value, "/member_len_bytes"),
        }
    }

    /// The logical block that lies at a byte offset of member number `column`'s share: the
    /// striping formula, written down a second time, independently of the program under test.
    pub fn logical_block(&self, column: usize, share_offset: u64) -> u64 {
        let block = share_offset / 4096;
        if self.profile != "stripe" {
            return self.start + block;
        }
        let (row, inside) = (block / self.unit_blocks, block % self.unit_blocks);
        let (width, column) = (self.members.len() as u64, column as u64);
        self.start + (row * width + column) * self.unit_blocks + inside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stripe_goes_round_its_members() {
        let chunk = Chunk {
            start: 100,
            len_blocks: 12,
            kind: "data".to_owned(),
            profile: "stripe".to_owned(),
            unit_blocks: 2,
            members: vec![(0, 0), (1, 0)],
            member_len_bytes: 6 * 4096,
        };
        let on = |column: usize| (0..6).map(move |block| (column, block * 4096));
        let blocks = |column| {
            on(column)
                .map(|(column, at)| chunk.logical_block(column, at) - 100)
                .collect::<Vec<_>>()
        };
        assert_eq!(blocks(0), [0, 1, 4, 5, 8, 9]);
        assert_eq!(blocks(1), [2, 3, 6, 7, 10, 11]);
    }
}
