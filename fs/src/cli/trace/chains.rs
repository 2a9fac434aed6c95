//! From events to chains: what one request, or one writeback, did from its begin to its end.
//!
//! What is under way is bounded; beyond that, which only lost events can lead to, it is forgotten.

use std::collections::HashMap;
use std::hash::Hash;

use braidfs_blockdev::trace::{BACKGROUND, DEVICE_OPS, Event, Kind, NO_FILE};

use super::super::control::Told;
use super::steps::{Chain, Step, What, cache_step, dirtied};
use super::ties::{Ended, Ties};

/// Requests, kiobufs or device requests under way.
const OPEN_MAX: usize = 100_000;

/// Processes whose names are remembered.
const PROCESSES_MAX: usize = 1000;

/// A device request under way.
struct Request {
    dispatched: Event,
    /// In whose interest.
    contexts: Vec<u64>,
}

pub(super) struct Chains {
    told: Told,
    shows_writeback: bool,
    open: HashMap<u64, Chain>,
    /// The context of each.
    kiobufs: HashMap<u64, u64>,
    requests: HashMap<(u16, u64), Request>,
    threads: HashMap<u32, String>,
    processes: HashMap<u32, String>,
    ties: Ties,
}

/// Inserts, in a bounded map.
fn keep<K: Eq + Hash, V>(map: &mut HashMap<K, V>, key: K, value: V) {
    if map.len() >= OPEN_MAX {
        log::warn!("lost count of {OPEN_MAX} things under way");
        map.clear();
    }
    map.insert(key, value);
}

/// How a context is called: background work by a number of its own.
pub(super) fn number_of(context: u64) -> u64 {
    context & !BACKGROUND
}

pub(super) fn device_op(op: u8) -> &'static str {
    DEVICE_OPS.get(usize::from(op)).unwrap_or(&"?")
}

/// The name that a `Thread` event tells.
pub(super) fn thread_name(event: &Event) -> String {
    let [low, high, ..] = event.values;
    let bytes = [low.to_le_bytes(), high.to_le_bytes()].concat();
    String::from_utf8_lossy(bytes.trim_ascii_end())
        .trim_end_matches('\0')
        .to_owned()
}

impl Chains {
    pub(super) fn new(told: Told, shows_writeback: bool) -> Self {
        Self {
            told,
            shows_writeback,
            open: HashMap::new(),
            kiobufs: HashMap::new(),
            requests: HashMap::new(),
            threads: HashMap::new(),
            processes: HashMap::new(),
            ties: Ties::default(),
        }
    }

    /// Takes the next event; gives a chain that ended with it.
    pub(super) fn take(&mut self, event: &Event) -> Option<Chain> {
        let context = event.context;
        let [a, b, c, d, e] = event.values;
        match event.kind {
            Kind::Thread => {
                self.threads.insert(event.thread, thread_name(event));
            }
            Kind::Begin => self.begin_request(event),
            Kind::Writeback => self.begin_writeback(event),
            Kind::Dirtied => {
                self.ties.dirtied(context, a, b, c);
                self.step(context, event, dirtied(event));
            }
            Kind::Kiobuf => {
                keep(&mut self.kiobufs, a, context);
                let inode = (b != NO_FILE).then_some(b);
                let what = What::Kiobuf {
                    kiobuf: a,
                    op: device_op(event.op),
                    inode,
                    offset: c,
                    length: e,
                    volume_address: d,
                };
                self.step(context, event, what);
            }
            Kind::Part => {
                let what = What::Part {
                    kiobuf: a,
                    start: b,
                    length: c,
                    member: event.dev,
                    device: self.device(event.dev),
                    device_offset: d,
                };
                self.step(context, event, what);
            }
            Kind::Dispatch => {
                let request = Request {
                    dispatched: *event,
                    contexts: Vec::new(),
                };
                keep(&mut self.requests, (event.dev, a), request);
            }
            Kind::Carry => self.carry(event),
            Kind::Done => self.end_device_request(event),
            Kind::KiobufEnd => {
                if let Some(context) = self.kiobufs.remove(&a) {
                    let what = What::KiobufEnd {
                        kiobuf: a,
                        bytes: b,
                        errno: c,
                    };
                    self.step(context, event, what);
                }
            }
            Kind::Reply => return self.end_request(event),
            Kind::WritebackEnd => return self.end_writeback(event),
            Kind::Durable => self.end_wait(event),
            Kind::Hit | Kind::Miss | Kind::Arrived | Kind::Ahead | Kind::Held => {
                self.step(context, event, cache_step(event));
            }
            Kind::Served | Kind::Commit | Kind::Tick | Kind::Over => {}
        }
        None
    }

    fn step(&mut self, context: u64, event: &Event, what: What) {
        if let Some(chain) = self.open.get_mut(&context) {
            let at_ns = event.at.saturating_sub(chain.begun_ns);
            chain.steps.push(Step { at_ns, what });
        }
    }

    fn device(&self, dev: u16) -> String {
        let name = self.told.members.get(usize::from(dev));
        name.map_or_else(|| format!("member {dev}"), Clone::clone)
    }

    fn thread(&self, event: &Event) -> String {
        self.threads.get(&event.thread).cloned().unwrap_or_default()
    }

    fn process(&mut self, pid: u32) -> String {
        if let Some(name) = self.processes.get(&pid) {
            return name.clone();
        }
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let name = name.trim_end().to_owned();
        if self.processes.len() >= PROCESSES_MAX {
            self.processes.clear();
        }
        self.processes.insert(pid, name.clone());
        name
    }

    fn begin_request(&mut self, event: &Event) {
        let [inode, offset, length, pid, _] = event.values;
        let pid = u32::try_from(pid).unwrap_or(0);
        let op = self.told.ops.get(usize::from(event.op));
        let chain = Chain {
            op: op.map_or("?", String::as_str).to_owned(),
            number: event.context,
            inode,
            offset,
            length,
            pid,
            process: self.process(pid),
            thread: self.thread(event),
            begun_ns: event.at,
            ..Chain::default()
        };
        keep(&mut self.open, event.context, chain);
    }

    fn begin_writeback(&mut self, event: &Event) {
        let [inode, offset, length, ..] = event.values;
        let chain = Chain {
            op: super::WRITEBACK.to_owned(),
            number: number_of(event.context),
            inode,
            offset,
            length,
            thread: self.thread(event),
            begun_ns: event.at,
            background: true,
            ..Chain::default()
        };
        keep(&mut self.open, event.context, chain);
        let requests = self.ties.written(inode, offset, length);
        if !requests.is_empty() {
            self.step(event.context, event, What::WritesFor { requests });
        }
    }

    /// A device request has bytes of a kiobuf: named once for each chain.
    fn carry(&mut self, event: &Event) {
        let [number, kiobuf, ..] = event.values;
        let (Some(&context), Some(request)) = (
            self.kiobufs.get(&kiobuf),
            self.requests.get_mut(&(event.dev, number)),
        ) else {
            return;
        };
        if request.contexts.contains(&context) {
            return;
        }
        request.contexts.push(context);
        let dispatched = request.dispatched;
        let [request, device_offset, length, kiobufs, views] = dispatched.values;
        let what = What::Request {
            request,
            member: event.dev,
            device: self.device(event.dev),
            op: device_op(dispatched.op),
            device_offset,
            length,
            kiobufs,
            views,
        };
        self.step(context, &dispatched, what);
    }

    fn end_device_request(&mut self, event: &Event) {
        let [request, bytes, errno, since, _] = event.values;
        let Some(ended) = self.requests.remove(&(event.dev, request)) else {
            return;
        };
        let what = What::RequestEnd {
            request,
            member: event.dev,
            device: self.device(event.dev),
            bytes,
            errno,
            latency_ns: event.at.saturating_sub(since),
        };
        for context in ended.contexts {
            self.step(context, event, what.clone());
        }
    }

    /// A request has waited until something was durable: tells which writebacks that took.
    fn end_wait(&mut self, event: &Event) {
        let [since, ..] = event.values;
        let Some(chain) = self.open.get(&event.context) else {
            return;
        };
        let file = (chain.op != "syncfs").then_some(chain.inode);
        for ended in self.ties.waited_for(file, since, event.at) {
            let what = What::Writeback {
                writeback: number_of(ended.context),
                offset: ended.offset,
                length: ended.len,
                took_ns: ended.at.saturating_sub(ended.since),
            };
            let at = Event {
                at: ended.at,
                ..*event
            };
            self.step(event.context, &at, what);
        }
        let waited_ns = event.at.saturating_sub(since);
        self.step(event.context, event, What::Durable { waited_ns });
    }

    fn end_request(&mut self, event: &Event) -> Option<Chain> {
        let [result, since, ..] = event.values;
        let sending_ns = event.at.saturating_sub(since);
        self.step(event.context, event, What::Reply { sending_ns });
        let mut chain = self.open.remove(&event.context)?;
        chain.took_ns = event.at.saturating_sub(chain.begun_ns);
        let result = result.cast_signed();
        chain.bytes = u64::try_from(result).unwrap_or(0);
        chain.errno = i32::try_from(result.min(0).saturating_neg()).unwrap_or(libc::EIO);
        Some(chain)
    }

    fn end_writeback(&mut self, event: &Event) -> Option<Chain> {
        let mut chain = self.open.remove(&event.context)?;
        self.ties.ended(Ended {
            context: event.context,
            file: chain.inode,
            offset: chain.offset,
            len: chain.length,
            since: chain.begun_ns,
            at: event.at,
        });
        chain.took_ns = event.at.saturating_sub(chain.begun_ns);
        let ends = chain.steps.iter().filter_map(|step| match step.what {
            What::KiobufEnd { bytes, errno, .. } => Some((bytes, errno)),
            _ => None,
        });
        let (bytes, errno) = ends.fold((0, 0), |sum, end| (sum.0 + end.0, sum.1.max(end.1)));
        chain.bytes = bytes;
        chain.errno = i32::try_from(errno).unwrap_or(libc::EIO);
        self.shows_writeback.then_some(chain)
    }
}
