//! Where things are shown in a file for Perfetto, and how arrows between them are called.

use braidfs_blockdev::trace::BACKGROUND;

use super::chains::number_of;

pub(super) const DAEMON: u64 = 1;
pub(super) const REQUESTS: u64 = 2;
pub(super) const KIOBUFS: u64 = 3;
pub(super) const WRITEBACKS: u64 = 4;
pub(super) const MEMBERS: u64 = 10;

/// An asynchronous slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Track {
    Request(u64),
    Kiobuf(u64),
    Writeback(u64),
    Device(u16, u64),
}

impl Track {
    pub(super) fn pid(self) -> u64 {
        match self {
            Track::Request(_) => REQUESTS,
            Track::Kiobuf(_) => KIOBUFS,
            Track::Writeback(_) => WRITEBACKS,
            Track::Device(dev, _) => MEMBERS + u64::from(dev),
        }
    }

    pub(super) fn number(self) -> u64 {
        match self {
            Track::Request(number) | Track::Kiobuf(number) | Track::Device(_, number) => number,
            Track::Writeback(context) => number_of(context),
        }
    }
}

/// An arrow, from one place to any number of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Arrow {
    /// From who works in a context to its kiobufs.
    Context(u64),
    /// From a kiobuf to the device requests that carry it.
    Kiobuf(u64),
    /// From a write to the writeback of its bytes.
    Dirtied(u64),
    /// From a writeback to who waited for it.
    Written(u64),
}

impl Arrow {
    pub(super) fn id(self) -> String {
        let (kind, number) = match self {
            Arrow::Context(context) if context & BACKGROUND != 0 => (1, number_of(context)),
            Arrow::Context(context) => (2, context),
            Arrow::Kiobuf(number) => (3, number),
            Arrow::Dirtied(request) => (4, request),
            Arrow::Written(context) => (5, number_of(context)),
        };
        format!("0x{:x}", (kind << 60) | (number & ((1 << 60) - 1)))
    }
}

pub(super) enum Flow {
    None,
    Out(Arrow),
    In(Arrow),
}
