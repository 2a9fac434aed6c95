//! From events to the objects of the trace-event format; which ones, says `perfetto.rs`.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use braidfs_blockdev::trace::{BACKGROUND, Event, Kind, NO_FILE};
use serde_json::{Map, Value, json};

use super::super::control::Told;
use super::super::size::format_size;
use super::chains::{device_op, number_of, thread_name};
use super::ties::{Ended, Ties};
use super::tracks::{Arrow, DAEMON, Flow, KIOBUFS, MEMBERS, REQUESTS, Track, WRITEBACKS};

pub(super) struct Slices<'t> {
    told: &'t Told,
    place: &'t Path,
    base: u64,
    threads: HashMap<u32, String>,
    open: HashMap<Track, String>,
    arrows: HashSet<Arrow>,
    /// Inodes of requests under way, and begins and bytes of writebacks.
    inodes: HashMap<u64, u64>,
    writebacks: HashMap<u64, Event>,
    ties: Ties,
    last: u64,
    given: Vec<Value>,
}

/// Tells something of a process.
fn meta(pid: u64, what: &str, args: Value) -> Value {
    json!({"ph": "M", "pid": pid, "name": what, "args": args})
}

/// When what an event tells at its end began.
pub(super) fn since_of(event: &Event) -> Option<u64> {
    let [first, second, ..] = event.values;
    let since = match event.kind {
        Kind::Served | Kind::Held | Kind::Durable | Kind::Commit => first,
        Kind::Reply => second,
        _ => 0,
    };
    (since > 0).then_some(since)
}

impl<'t> Slices<'t> {
    /// Times are told since `base`.
    pub(super) fn new(told: &'t Told, place: &'t Path, base: u64) -> Self {
        Self {
            told,
            place,
            base,
            threads: HashMap::new(),
            open: HashMap::new(),
            arrows: HashSet::new(),
            inodes: HashMap::new(),
            writebacks: HashMap::new(),
            ties: Ties::default(),
            last: base,
            given: Vec::new(),
        }
    }

    pub(super) fn name_thread(&mut self, event: &Event) {
        self.threads.insert(event.thread, thread_name(event));
    }

    /// Names of all tracks.
    pub(super) fn names(&self) -> Vec<Value> {
        let mut processes = vec![
            (DAEMON, format!("braidfs {}", self.place.display())),
            (REQUESTS, "requests".to_owned()),
            (KIOBUFS, "kiobufs".to_owned()),
            (WRITEBACKS, "writeback".to_owned()),
        ];
        let members = (MEMBERS..).zip(self.told.members.iter().enumerate());
        processes.extend(members.map(|(pid, (index, name))| {
            let name = format!("member {index}: {name}");
            (pid, name)
        }));
        let mut names = Vec::new();
        for (pid, name) in processes {
            names.push(meta(pid, "process_name", json!({"name": name})));
            names.push(meta(pid, "process_sort_index", json!({"sort_index": pid})));
        }
        let threads = self.threads.iter().map(|(tid, name)| {
            let args = json!({"name": name});
            json!({"ph": "M", "pid": DAEMON, "tid": tid, "name": "thread_name", "args": args})
        });
        names.extend(threads);
        names
    }

    /// What the last events became.
    pub(super) fn given(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.given)
    }

    /// Ends what has no end.
    pub(super) fn cut_off(&mut self) {
        let open: Vec<Track> = self.open.keys().copied().collect();
        for track in open {
            self.end(track, self.last, json!({"cut off": true}));
        }
    }

    fn micros(&self, at: u64) -> f64 {
        at.saturating_sub(self.base) as f64 / 1000.0
    }

    fn give(&mut self, mut value: Value, flow: &Flow) {
        let (arrow, way) = match *flow {
            // An arrow begins once.
            Flow::Out(arrow) if self.arrows.insert(arrow) => (arrow, "flow_out"),
            Flow::In(arrow) if self.arrows.contains(&arrow) => (arrow, "flow_in"),
            _ => return self.given.push(value),
        };
        if let Value::Object(fields) = &mut value {
            fields.insert("bind_id".to_owned(), arrow.id().into());
            fields.insert(way.to_owned(), true.into());
        }
        self.given.push(value);
    }

    fn on_track(&self, ph: &str, track: Track, name: &str, at: u64, args: Value) -> Value {
        json!({
            "ph": ph, "cat": "braidfs", "pid": track.pid(), "tid": 0,
            "id": format!("0x{:x}", track.number()), "name": name, "ts": self.micros(at),
            "args": args,
        })
    }

    fn begin(&mut self, track: Track, at: u64, name: String, args: Value, flow: &Flow) {
        if self.open.contains_key(&track) {
            self.end(track, at, json!({"cut off": true}));
        }
        let value = self.on_track("b", track, &name, at, args);
        self.open.insert(track, name);
        self.give(value, flow);
    }

    fn note(&mut self, track: Track, at: u64, args: Value, flow: &Flow) {
        if let Some(name) = self.open.get(&track) {
            let value = self.on_track("n", track, name, at, args);
            self.give(value, flow);
        }
    }

    fn end(&mut self, track: Track, at: u64, args: Value) {
        if let Some(name) = self.open.remove(&track) {
            let value = self.on_track("e", track, &name, at, args);
            self.give(value, &Flow::None);
        }
    }

    /// A slice of the event's thread, up to the event.
    fn slice(&mut self, since: u64, event: &Event, name: &str, args: Value, flow: &Flow) {
        let dur = event.at.saturating_sub(since) as f64 / 1000.0;
        let value = json!({
            "ph": "X", "cat": "braidfs", "pid": DAEMON, "tid": event.thread, "name": name,
            "ts": self.micros(since), "dur": dur, "args": args,
        });
        self.give(value, flow);
    }

    fn moment(&mut self, event: &Event, name: &str) {
        let [file, offset, length, ..] = event.values;
        let args = json!({
            "request": event.context, "inode": file, "offset": offset, "length": length,
        });
        let value = json!({
            "ph": "i", "cat": "braidfs", "s": "t", "pid": DAEMON, "tid": event.thread,
            "name": name, "ts": self.micros(event.at), "args": args,
        });
        self.give(value, &Flow::None);
    }

    /// Takes an event that tells of what began then.
    pub(super) fn begin_slice(&mut self, since: u64, event: &Event) {
        let context = event.context;
        let args = json!({"request": context});
        match event.kind {
            Kind::Served => {
                let name = self.open.get(&Track::Request(context));
                let name = name.map_or_else(|| "request".to_owned(), Clone::clone);
                let flow = Flow::Out(Arrow::Context(context));
                self.slice(since, event, &name, args, &flow);
            }
            Kind::Held => self.slice(since, event, "held back", args, &Flow::None),
            Kind::Durable => self.slice(since, event, "waits for devices", args, &Flow::None),
            Kind::Reply => self.slice(since, event, "reply", args, &Flow::None),
            Kind::Commit => {
                let args = json!({"commit": number_of(context)});
                self.slice(since, event, "commit", args, &Flow::None);
            }
            _ => {}
        }
    }

    /// Takes an event at its own time.
    pub(super) fn take(&mut self, event: &Event) {
        self.last = event.at.max(self.last);
        let context = event.context;
        match event.kind {
            Kind::Hit => self.moment(event, "cache hit"),
            Kind::Miss => self.moment(event, "cache miss"),
            Kind::Arrived => self.moment(event, "arrived"),
            Kind::Ahead => self.moment(event, "reads ahead"),
            Kind::Dirtied => {
                let [file, offset, len, ..] = event.values;
                self.moment(event, "dirtied");
                self.ties.dirtied(context, file, offset, len);
                let flow = Flow::Out(Arrow::Dirtied(context));
                let args = json!({"dirtied": len, "offset": offset});
                self.note(Track::Request(context), event.at, args, &flow);
            }
            Kind::Begin | Kind::Reply | Kind::Durable => self.take_request(event),
            Kind::Writeback | Kind::WritebackEnd => self.take_writeback(event),
            Kind::Kiobuf | Kind::Part | Kind::KiobufEnd => self.take_kiobuf(event),
            Kind::Dispatch | Kind::Carry | Kind::Done => self.take_device(event),
            Kind::Served | Kind::Held | Kind::Commit | Kind::Tick | Kind::Thread | Kind::Over => {}
        }
    }

    fn take_request(&mut self, event: &Event) {
        let context = event.context;
        let track = Track::Request(context);
        let [a, b, c, d, _] = event.values;
        match event.kind {
            Kind::Begin => {
                let name = self.told.ops.get(usize::from(event.op));
                let name = name.map_or("?", String::as_str).to_owned();
                self.inodes.insert(context, a);
                let args = json!({
                    "request": context, "inode": a, "offset": b, "length": c, "process": d,
                });
                self.begin(track, event.at, name, args, &Flow::None);
            }
            Kind::Reply => {
                self.inodes.remove(&context);
                let result = a.cast_signed();
                let args = json!({"bytes": result.max(0), "errno": -result.min(0)});
                self.end(track, event.at, args);
            }
            _ => {
                let is_of_all = self.open.get(&track).is_some_and(|name| name == "syncfs");
                let Some(&inode) = self.inodes.get(&context) else {
                    return;
                };
                let file = (!is_of_all).then_some(inode);
                for ended in self.ties.waited_for(file, a, event.at) {
                    let args = json!({"waited for writeback": number_of(ended.context)});
                    let flow = Flow::In(Arrow::Written(ended.context));
                    self.note(track, event.at, args, &flow);
                }
            }
        }
    }

    fn take_writeback(&mut self, event: &Event) {
        let context = event.context;
        let track = Track::Writeback(context);
        let [file, offset, len, pages, _] = event.values;
        if event.kind == Kind::Writeback {
            let args = json!({
                "writeback": number_of(context), "inode": file, "offset": offset, "length": len,
                "pages": pages,
            });
            let flow = Flow::Out(Arrow::Context(context));
            let name = format!("writeback {}", format_size(pages * 4096));
            self.begin(track, event.at, name, args, &flow);
            self.writebacks.insert(context, *event);
            for request in self.ties.written(file, offset, len) {
                let flow = Flow::In(Arrow::Dirtied(request));
                self.note(track, event.at, json!({"for request": request}), &flow);
            }
            return;
        }
        let Some(begun) = self.writebacks.remove(&context) else {
            return;
        };
        self.ties.ended(Ended {
            context,
            file,
            offset,
            len,
            since: begun.at,
            at: event.at,
        });
        let flow = Flow::Out(Arrow::Written(context));
        self.note(track, event.at, json!({"ended": true}), &flow);
        self.end(track, event.at, json!({}));
    }

    fn take_kiobuf(&mut self, event: &Event) {
        let [number, a, b, c, len] = event.values;
        let track = Track::Kiobuf(number);
        let context = event.context;
        match event.kind {
            Kind::Kiobuf => {
                let op = device_op(event.op);
                let mut args = Map::new();
                let mut arg = |name: &str, value: u64| {
                    args.insert(name.to_owned(), value.into());
                };
                arg("kiobuf", number);
                if a != NO_FILE {
                    arg("inode", a);
                    arg("offset", b);
                }
                arg("volume address", c);
                arg("length", len);
                match context & BACKGROUND {
                    _ if context == 0 => {}
                    0 => arg("request", context),
                    _ => arg("background", number_of(context)),
                }
                let name = format!("{op} {}", format_size(len));
                let flow = Flow::Out(Arrow::Kiobuf(number));
                self.begin(track, event.at, name, args.into(), &flow);
                let flow = Flow::In(Arrow::Context(context));
                self.note(track, event.at, json!({"submitted": true}), &flow);
            }
            Kind::Part => {
                let args = json!({
                    "part": a, "length": b, "member": event.dev, "member offset": c,
                });
                self.note(track, event.at, args, &Flow::None);
            }
            _ => self.end(track, event.at, json!({"bytes": a, "errno": b})),
        }
    }

    fn take_device(&mut self, event: &Event) {
        let [number, a, b, c, d] = event.values;
        let track = Track::Device(event.dev, number);
        match event.kind {
            Kind::Dispatch => {
                let op = device_op(event.op);
                let name = match b {
                    0 => op.to_owned(),
                    len => format!("{op} {}", format_size(len)),
                };
                let args = json!({
                    "request of the member": number, "member offset": a, "length": b,
                    "kiobufs": c, "views": d,
                });
                self.begin(track, event.at, name, args, &Flow::None);
            }
            Kind::Carry => {
                let args = json!({"kiobuf": a, "part": b, "length": c});
                let flow = Flow::In(Arrow::Kiobuf(a));
                self.note(track, event.at, args, &flow);
            }
            _ => self.end(track, event.at, json!({"bytes": a, "errno": b})),
        }
    }
}
