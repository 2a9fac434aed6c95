//! Where the block layer is traced: kiobufs, their parts, and requests to devices.

use super::{CONTEXT, Event, Filter, Kind, NEXT, NOBODY, UNWANTED, clock, is_on, push};
use crate::error::{BlockError, ErrorKind, Op};
use crate::kiobuf::View;
use crate::request::Parts;
use crate::units::dev_len;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

/// A number for a kiobuf that is built now; 0 if nobody wants to know of it.
#[inline]
pub(crate) fn kiobuf_number() -> u64 {
    if !is_on() {
        return 0;
    }
    match CONTEXT.get() {
        UNWANTED => 0,
        NOBODY if Filter::is_set() => 0,
        _ => NEXT.fetch_add(1, Relaxed),
    }
}

/// A kiobuf on its way into a plug.
pub(crate) struct Submitted {
    pub number: u64,
    pub op: Op,
    pub file: u64,
    pub offset: u64,
    pub address: u64,
    pub len: u64,
}

#[inline]
pub(crate) fn kiobuf(submitted: &Submitted) {
    if submitted.number == 0 || !is_on() {
        return;
    }
    let Submitted {
        number,
        op,
        file,
        offset,
        address,
        len,
    } = *submitted;
    push(
        Instant::now(),
        Event {
            kind: Kind::Kiobuf,
            op: op_number(op),
            context: CONTEXT.get(),
            values: [number, file, offset, address, len],
            ..Event::default()
        },
    );
}

/// A part of a kiobuf that was cut, or copied to a further member.
#[inline]
pub(crate) fn part(number: u64, dev: u16, start: u64, len: u64, offset: u64) {
    if number != 0 && is_on() {
        push(
            Instant::now(),
            Event {
                kind: Kind::Part,
                dev,
                context: CONTEXT.get(),
                values: [number, start, len, offset, 0],
                ..Event::default()
            },
        );
    }
}

/// The last part of a kiobuf ended.
#[inline]
pub(crate) fn kiobuf_ended(number: u64, bytes: u64, error: Option<&BlockError>) {
    if number != 0 && is_on() {
        let errno = error.map_or(0, BlockError::errno);
        push(
            Instant::now(),
            Event {
                kind: Kind::KiobufEnd,
                values: [number, bytes, u64::from(errno.unsigned_abs()), 0, 0],
                ..Event::default()
            },
        );
    }
}

/// A device is about to get a request: tells it, and what it carries. Whether that was of interest.
#[inline]
pub(crate) fn dispatched(parts: &Parts, now: Instant) -> bool {
    is_on() && tell_dispatched(parts, now)
}

#[cold]
fn tell_dispatched(parts: &Parts, now: Instant) -> bool {
    let mut views = parts.chain.iter();
    let known = views.any(|view| view.number() != 0);
    if !known && Filter::is_set() {
        return false;
    }
    let views = dev_len(parts.chain.views());
    let of_request = |kind: Kind, values| Event {
        kind,
        op: op_number(parts.op),
        dev: parts.dev,
        values,
        ..Event::default()
    };
    let (len, kiobufs) = (parts.len, parts.kiobufs);
    let request = [parts.seq, parts.offset, len, kiobufs, views];
    push(now, of_request(Kind::Dispatch, request));
    for view in parts.chain.iter().filter(|view| view.number() != 0) {
        let View { start, len, .. } = view;
        let carried = [parts.seq, view.number(), dev_len(*start), dev_len(*len), 0];
        push(now, of_request(Kind::Carry, carried));
    }
    true
}

/// A device ended a request, good for so many bytes.
#[inline]
pub(crate) fn done(parts: &Parts, result: Result<u64, ErrorKind>, now: Instant) {
    if !parts.is_traced || !is_on() {
        return;
    }
    let (bytes, errno) = match result {
        Ok(bytes) => (bytes, 0),
        Err(kind) => (0, parts.error(kind, parts.offset).errno()),
    };
    let since = parts.started.map_or(0, clock);
    let errno = u64::from(errno.unsigned_abs());
    push(
        now,
        Event {
            kind: Kind::Done,
            op: op_number(parts.op),
            dev: parts.dev,
            values: [parts.seq, bytes, errno, since, 0],
            ..Event::default()
        },
    );
}

fn op_number(op: Op) -> u8 {
    match op {
        Op::Read => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
    }
}

/// What device operations are called, by their number in events.
pub const DEVICE_OPS: [&str; 4] = ["read", "write", "flush", "discard"];
