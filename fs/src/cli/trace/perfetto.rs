//! A whole trace as a file in the trace-event format, which <https://ui.perfetto.dev> opens.
//!
//! The format: a list of objects; `ph` says what one is (`X` a slice of a thread, `b`, `n`, `e`
//! begin, note and end of an asynchronous slice, `i` a moment, `M` a name), `ts` and `dur` are
//! microseconds, and arrows go from a `bind_id` with `flow_out` to all with `flow_in`.
//!
//! | track | what |
//! | --- | --- |
//! | braidfs, by thread | requests while the thread works for them, their steps, commits |
//! | requests | each from its begin to its answer |
//! | kiobufs | each from its submission to its end, with the parts that it was cut into |
//! | writeback | each from the first dirty page taken to the end |
//! | each member | its requests from dispatch to completion, with the kiobufs that they carry |
//!
//! Arrows: from the thread's slice of a request, or from a writeback, to its kiobufs; from a kiobuf
//! to the device requests that carry it (several: it was split; several into one: they were
//! merged); from a write to the writeback of its bytes, and from that to the fsync that waited for
//! it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use braidfs_blockdev::trace::{Event, Kind};
use serde_json::{Value, json};

use super::super::control::Told;
use super::slices::{Slices, since_of};

/// Events that are kept: 128 MiB of memory, and about half a gigabyte of JSON.
const EVENTS_MAX: usize = 2 << 20;

/// All events so far.
#[derive(Default)]
pub(super) struct Recording {
    events: Vec<Event>,
    /// Requests under way.
    begun: HashSet<u64>,
    dropped: u64,
}

impl Recording {
    /// Takes the next event; whether it is of a request whose begin was seen.
    pub(super) fn take(&mut self, event: &Event) -> bool {
        if !self.is_full() {
            self.events.push(*event);
        }
        match event.kind {
            Kind::Begin => self.begun.insert(event.context),
            Kind::Reply => self.begun.remove(&event.context),
            _ => self.begun.contains(&event.context),
        }
    }

    /// There is no room for more.
    pub(super) fn is_full(&self) -> bool {
        self.events.len() >= EVENTS_MAX
    }

    pub(super) fn note_dropped(&mut self, dropped: u64) {
        self.dropped = dropped;
    }

    /// Writes the file.
    pub(super) fn write(&self, told: &Told, place: &Path, file: File) -> io::Result<()> {
        if self.is_full() {
            log::warn!(
                "the trace ends after {EVENTS_MAX} events, which is all that a file may have"
            );
        }
        let mut out = BufWriter::with_capacity(1 << 20, file);
        self.write_to(told, place, &mut out)?;
        out.flush()
    }

    fn write_to(&self, told: &Told, place: &Path, out: &mut impl Write) -> io::Result<()> {
        let about = json!({
            "mount point": place.to_string_lossy(),
            "daemon": told.pid,
            "events that are missing": self.dropped,
        });
        write!(
            out,
            "{{\"displayTimeUnit\":\"ns\",\"otherData\":{about},\n\"traceEvents\":["
        )?;
        let mut first = true;
        let mut put = |value: &Value| -> io::Result<()> {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            write!(out, "{comma}\n{value}")
        };
        let timed = self.events.iter().filter(|event| event.at > 0);
        let base = timed
            .clone()
            .map(|event| since_of(event).unwrap_or(event.at));
        let mut slices = Slices::new(told, place, base.min().unwrap_or(0));
        for event in self
            .events
            .iter()
            .filter(|event| event.kind == Kind::Thread)
        {
            slices.name_thread(event);
        }
        slices.names().iter().try_for_each(&mut put)?;
        for (at, is_begin, event) in moments(timed) {
            match is_begin {
                true => slices.begin_slice(at, event),
                false => slices.take(event),
            }
            slices.given().iter().try_for_each(&mut put)?;
        }
        slices.cut_off();
        slices.given().iter().try_for_each(&mut put)?;
        writeln!(out, "\n]}}")
    }
}

/// Each event at its time, and those that are told at the end of something at its begin too (which
/// is what the second field says); in order.
fn moments<'e>(events: impl Iterator<Item = &'e Event>) -> Vec<(u64, bool, &'e Event)> {
    let mut moments = Vec::new();
    for event in events {
        moments.extend(since_of(event).map(|since| (since, true, event)));
        moments.push((event.at, false, event));
    }
    moments.sort_by_key(|moment| moment.0);
    moments
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn told() -> Told {
        Told {
            version: 1,
            ops: vec!["write".to_owned()],
            members: vec!["/d/0.img".to_owned(), "/d/1.img".to_owned()],
            pid: 7,
        }
    }

    fn event(at: u64, kind: Kind, dev: u16, context: u64, values: [u64; 5]) -> Event {
        Event {
            at,
            kind,
            op: 0,
            dev,
            thread: 9,
            context,
            values,
        }
    }

    /// A write of two kiobufs, one of which is cut in two; the other is merged with a part.
    fn a_write() -> Vec<Event> {
        vec![
            event(100, Kind::Begin, 0, 2, [5, 0, 8192, 77, 0]),
            event(110, Kind::Kiobuf, 0, 2, [1, 5, 0, 4096, 8192]),
            event(111, Kind::Part, 0, 2, [1, 0, 4096, 0, 0]),
            event(112, Kind::Part, 1, 2, [1, 4096, 4096, 0, 0]),
            event(113, Kind::Kiobuf, 0, 2, [2, 5, 8192, 12288, 4096]),
            event(120, Kind::Dispatch, 0, 0, [1, 0, 4096, 1, 1]),
            event(120, Kind::Carry, 0, 0, [1, 1, 0, 4096, 0]),
            event(121, Kind::Dispatch, 1, 0, [1, 0, 8192, 2, 2]),
            event(121, Kind::Carry, 1, 0, [1, 1, 4096, 4096, 0]),
            event(121, Kind::Carry, 1, 0, [1, 2, 0, 4096, 0]),
            event(150, Kind::Done, 1, 0, [1, 8192, 0, 121, 0]),
            event(151, Kind::KiobufEnd, 0, 0, [2, 4096, 0, 0, 0]),
            event(160, Kind::Done, 0, 0, [1, 4096, 0, 120, 0]),
            event(161, Kind::KiobufEnd, 0, 0, [1, 8192, 0, 0, 0]),
            event(170, Kind::Reply, 0, 2, [8192, 165, 0, 0, 0]),
            event(171, Kind::Served, 0, 2, [101, 0, 0, 0, 0]),
        ]
    }

    fn written(events: &[Event]) -> Vec<Value> {
        let mut recording = Recording::default();
        for event in events {
            recording.take(event);
        }
        let mut out = Vec::new();
        let place = Path::new("/mnt");
        recording.write_to(&told(), place, &mut out).unwrap();
        let whole: Value = serde_json::from_slice(&out).unwrap();
        whole["traceEvents"].as_array().unwrap().clone()
    }

    /// Asynchronous slices begin once and end once, whatever of the trace is missing.
    #[test]
    fn each_begin_has_its_end_wherever_the_trace_is_cut() {
        let events = a_write();
        for from in 0..events.len() {
            for to in from..=events.len() {
                let mut open = HashMap::new();
                let mut last = 0.0;
                for value in written(&events[from..to]) {
                    let key = (value["pid"].as_u64(), value["id"].to_string());
                    let name = value["name"].clone();
                    match value["ph"].as_str().unwrap() {
                        "b" => assert_eq!(open.insert(key, name), None),
                        "e" => assert_eq!(open.remove(&key), Some(name)),
                        "n" => assert_eq!(open.get(&key), Some(&name)),
                        _ => {}
                    }
                    let at = value["ts"].as_f64().unwrap_or(last);
                    assert!(at >= last, "{from}..{to}: {value}");
                    last = at;
                }
                assert!(open.is_empty(), "{from}..{to}: {open:?}");
            }
        }
    }

    #[test]
    fn arrows_show_the_split_and_the_merge() {
        let values = written(&a_write());
        let arrows = |way: &str, pid: u64| -> Vec<&str> {
            let from = values
                .iter()
                .filter(|value| value[way] == true && value["pid"] == pid);
            from.map(|value| value["bind_id"].as_str().unwrap())
                .collect()
        };
        let kiobufs = arrows("flow_out", 3);
        assert_eq!(kiobufs.len(), 2);
        assert_eq!(arrows("flow_in", 10), [kiobufs[0]], "split");
        assert_eq!(arrows("flow_in", 11), kiobufs, "merged");
        let thread = arrows("flow_out", 1);
        assert_eq!(arrows("flow_in", 3), [thread[0], thread[0]]);
    }

    #[test]
    fn requests_are_counted_once() {
        let mut recording = Recording::default();
        let ends = a_write()
            .iter()
            .filter(|event| recording.take(event) && event.kind == Kind::Reply)
            .count();
        assert_eq!(ends, 1);
        let stray = event(1, Kind::Reply, 0, 4, [0; 5]);
        assert!(!recording.take(&stray));
    }
}
