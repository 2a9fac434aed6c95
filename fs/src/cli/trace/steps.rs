//! What is known of one chain, as it is shown.

use braidfs_blockdev::trace::{Event, Kind};
use serde::Serialize;

/// A request from its begin to its answer, or a writeback.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Chain {
    /// What is asked for; `writeback`.
    pub op: String,
    /// The kernel's number of the request, or one of the writeback.
    pub number: u64,
    /// What it is about; 0 is metadata.
    pub inode: u64,
    pub offset: u64,
    pub length: u64,
    /// Who asked; 0 for a writeback.
    pub pid: u32,
    pub process: String,
    /// The thread of the daemon that took it up.
    pub thread: String,
    /// Nanoseconds since some moment of the daemon's.
    pub begun_ns: u64,
    pub took_ns: u64,
    /// Bytes that were read or written.
    pub bytes: u64,
    /// 0, or why it failed.
    pub errno: i32,
    pub steps: Vec<Step>,
    #[serde(skip)]
    pub background: bool,
}

impl Chain {
    /// Whether it is no request.
    pub(super) fn is_background(&self) -> bool {
        self.background
    }
}

/// One thing that it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Step {
    /// Nanoseconds since its begin.
    pub at_ns: u64,
    #[serde(flatten)]
    pub what: What,
}

/// Offsets and lengths are bytes; those that are about to be waited for have nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub(super) enum What {
    Hit {
        inode: u64,
        offset: u64,
        length: u64,
    },
    Miss {
        inode: u64,
        offset: u64,
        length: u64,
    },
    Arrived {
        inode: u64,
        offset: u64,
        length: u64,
        waited_ns: u64,
    },
    ReadAhead {
        offset: u64,
        length: u64,
    },
    Dirtied {
        offset: u64,
        length: u64,
        newly_dirty_pages: u64,
    },
    HeldBack {
        waited_ns: u64,
    },
    WritesFor {
        requests: Vec<u64>,
    },
    Kiobuf {
        kiobuf: u64,
        op: &'static str,
        inode: Option<u64>,
        offset: u64,
        length: u64,
        volume_address: u64,
    },
    Part {
        kiobuf: u64,
        start: u64,
        length: u64,
        member: u16,
        device: String,
        device_offset: u64,
    },
    Request {
        request: u64,
        member: u16,
        device: String,
        op: &'static str,
        device_offset: u64,
        length: u64,
        kiobufs: u64,
        views: u64,
    },
    RequestEnd {
        request: u64,
        member: u16,
        device: String,
        bytes: u64,
        errno: u64,
        latency_ns: u64,
    },
    KiobufEnd {
        kiobuf: u64,
        bytes: u64,
        errno: u64,
    },
    Writeback {
        writeback: u64,
        offset: u64,
        length: u64,
        took_ns: u64,
    },
    Durable {
        waited_ns: u64,
    },
    Reply {
        sending_ns: u64,
    },
}

pub(super) fn dirtied(event: &Event) -> What {
    let [_, offset, length, newly_dirty_pages, _] = event.values;
    What::Dirtied {
        offset,
        length,
        newly_dirty_pages,
    }
}

pub(super) fn cache_step(event: &Event) -> What {
    let [inode, offset, length, since, _] = event.values;
    match event.kind {
        Kind::Hit => What::Hit {
            inode,
            offset,
            length,
        },
        Kind::Miss => What::Miss {
            inode,
            offset,
            length,
        },
        Kind::Ahead => What::ReadAhead { offset, length },
        Kind::Arrived => What::Arrived {
            inode,
            offset,
            length,
            waited_ns: event.at.saturating_sub(since),
        },
        _ => What::HeldBack {
            waited_ns: event.at.saturating_sub(event.values[0]),
        },
    }
}
