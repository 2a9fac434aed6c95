//! The file for Perfetto: what it shows of writes over four members.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::report::list;
use braidfs_tests::volume::name;
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{MEMBERS, mounted, signal, start, write_direct};

const REQUESTS: u64 = 2;
const KIOBUFS: u64 = 3;
const WRITEBACKS: u64 = 4;
const FIRST_MEMBER: u64 = 10;

/// An asynchronous slice: what it says at its begin and its end, and its notes in between.
pub struct Slice {
    pub name: String,
    pid: u64,
    begin: f64,
    end: f64,
    args: Value,
    end_args: Value,
    notes: Vec<Value>,
}

impl Slice {
    fn number(&self, key: &str) -> Option<u64> {
        self.args[key].as_u64()
    }

    fn expect(&self, key: &str) -> u64 {
        let found = self.number(key);
        found.unwrap_or_else(|| panic!("no {key} in {}", self.args))
    }

    fn encloses(&self, inner: &Slice) -> bool {
        self.begin <= inner.begin && inner.end <= self.end
    }

    fn is_of(&self, pid: u64, inode: u64) -> bool {
        self.pid == pid && self.number("inode") == Some(inode)
    }

    /// Notes that have this, with what it is.
    fn noted(&self, key: &str) -> Vec<(u64, &Value)> {
        let notes = self.notes.iter();
        notes
            .filter_map(|note| Some((note[key].as_u64()?, note)))
            .collect()
    }
}

fn events(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("the file");
    let whole: Value = serde_json::from_str(&text).expect("JSON");
    list(&whole, "/traceEvents").to_vec()
}

/// The asynchronous slices of a file, each of which must have one begin and one end, in order.
pub fn slices(path: &Path) -> Vec<Slice> {
    let mut open: HashMap<(u64, String), Slice> = HashMap::new();
    let mut slices = Vec::new();
    let mut last = 0.0;
    for event in events(path) {
        let at = event["ts"].as_f64().unwrap_or(last);
        assert!(at >= last, "goes back in time: {event}");
        last = at;
        let pid = event["pid"].as_u64().expect("a process");
        let key = (pid, event["id"].to_string());
        match event["ph"].as_str().expect("a kind") {
            "b" => {
                let slice = Slice {
                    name: event["name"].as_str().expect("a name").to_owned(),
                    pid,
                    begin: at,
                    end: at,
                    args: event["args"].clone(),
                    end_args: Value::Null,
                    notes: Vec::new(),
                };
                assert!(open.insert(key, slice).is_none(), "begins twice: {event}");
            }
            "n" => {
                let slice = open.get_mut(&key).expect("a begin before the note");
                slice.notes.push(event["args"].clone());
            }
            "e" => {
                let mut slice = open.remove(&key).expect("a begin before the end");
                assert_eq!(event["name"], slice.name.as_str());
                (slice.end, slice.end_args) = (at, event["args"].clone());
                slices.push(slice);
            }
            "X" => assert!(event["dur"].as_f64() >= Some(0.0), "{event}"),
            _ => {}
        }
    }
    assert!(open.is_empty(), "{} slices do not end", open.len());
    slices
}

/// Arrows that come from nowhere, or from later.
fn arrows(path: &Path) {
    let mut begun = BTreeSet::new();
    let mut kinds = BTreeMap::new();
    for event in events(path) {
        let Some(id) = event["bind_id"].as_str() else {
            continue;
        };
        if event["flow_out"] == true {
            assert!(
                begun.insert(id.to_owned()),
                "an arrow begins twice: {event}"
            );
        } else {
            assert!(begun.contains(id), "an arrow from nowhere: {event}");
            *kinds.entry(id[..3].to_owned()).or_insert(0) += 1;
        }
    }
    println!("arrows by kind: {kinds:?}");
    // Writeback and request to kiobuf, kiobuf to device, write to writeback, that to fsync.
    assert_eq!(kinds.len(), 5, "{kinds:?}");
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").ino()
}

/// Every kiobuf of a file: they cover so many bytes, end well, and are carried whole by requests to
/// members within their time.
fn check_kiobufs(slices: &[Slice], inode: u64, bytes: u64) -> Vec<&Slice> {
    let kiobufs = slices.iter().filter(|slice| slice.is_of(KIOBUFS, inode));
    let mut kiobufs: Vec<&Slice> = kiobufs.collect();
    kiobufs.sort_by_key(|kiobuf| kiobuf.expect("offset"));
    let length: u64 = kiobufs.iter().map(|kiobuf| kiobuf.expect("length")).sum();
    assert_eq!(length, bytes, "bytes of kiobufs of inode {inode}");
    for kiobuf in &kiobufs {
        let (number, length) = (kiobuf.expect("kiobuf"), kiobuf.expect("length"));
        assert_eq!(kiobuf.end_args["bytes"], length, "{:?}", kiobuf.args);
        let parts = kiobuf.noted("part");
        let cut: u64 = parts
            .iter()
            .map(|part| part.1["length"].as_u64().unwrap())
            .sum();
        assert!(parts.is_empty() || cut == length, "{parts:?}");
        let mut carried = 0;
        for request in slices.iter().filter(|slice| slice.pid >= FIRST_MEMBER) {
            for (_, note) in request
                .noted("kiobuf")
                .into_iter()
                .filter(|n| n.0 == number)
            {
                carried += note["length"].as_u64().expect("a length");
                assert!(
                    kiobuf.encloses(request),
                    "{} and {}",
                    kiobuf.args,
                    request.args
                );
            }
        }
        assert_eq!(carried, length, "carried of {:?}", kiobuf.args);
    }
    kiobufs
}

/// The members on which the parts of kiobufs are.
fn members_of(kiobufs: &[&Slice]) -> BTreeSet<u64> {
    let notes = kiobufs.iter().flat_map(|kiobuf| kiobuf.noted("part"));
    notes
        .map(|(_, note)| note["member"].as_u64().expect("a member"))
        .collect()
}

/// A direct write waits for its kiobufs, each of which is cut over all members.
fn check_direct(slices: &[Slice], inode: u64) {
    let kiobufs = check_kiobufs(slices, inode, 4 << 20);
    let requests: HashMap<u64, &Slice> = slices
        .iter()
        .filter(|slice| slice.is_of(REQUESTS, inode) && slice.name == "write")
        .map(|slice| (slice.expect("request"), slice))
        .collect();
    assert_eq!(requests.len(), 4, "of 1 MiB each");
    for kiobuf in &kiobufs {
        let request = requests.get(&kiobuf.expect("request"));
        let request = request.expect("the request of a kiobuf");
        assert!(
            request.encloses(kiobuf),
            "{} and {}",
            request.args,
            kiobuf.args
        );
        let range = request.expect("offset")..request.expect("offset") + request.expect("length");
        assert!(range.contains(&kiobuf.expect("offset")));
        assert!(kiobuf.noted("part").len() >= 2, "split: {}", kiobuf.args);
    }
    assert_eq!(members_of(&kiobufs).len(), MEMBERS);
}

/// A buffered write is over before its writeback, for which the fsync waits.
fn check_buffered(slices: &[Slice], inode: u64, bytes: u64) -> Vec<&Slice> {
    let kiobufs = check_kiobufs(slices, inode, bytes);
    let of_inode = |pid: u64, name: &str| -> Vec<&Slice> {
        let found = slices.iter().filter(|slice| slice.is_of(pid, inode));
        found.filter(|slice| slice.name.starts_with(name)).collect()
    };
    let fsyncs = of_inode(REQUESTS, "fsync");
    let [fsync] = fsyncs[..] else {
        panic!("{} fsyncs", fsyncs.len());
    };
    let waited: BTreeSet<u64> = fsync
        .noted("waited for writeback")
        .iter()
        .map(|n| n.0)
        .collect();
    let writebacks = of_inode(WRITEBACKS, "writeback");
    let ended = writebacks.iter().map(|slice| slice.expect("writeback"));
    assert_eq!(waited, ended.collect(), "what the fsync waited for");
    for kiobuf in &kiobufs {
        let own = kiobuf.expect("background");
        let own = writebacks
            .iter()
            .find(|slice| slice.expect("writeback") == own);
        let own = own.expect("the writeback of a kiobuf");
        assert!(own.encloses(kiobuf), "{} and {}", own.args, kiobuf.args);
        assert!(fsync.encloses(own), "{} and {}", fsync.args, own.args);
    }
    let writes = of_inode(REQUESTS, "write");
    let named: BTreeSet<u64> = writebacks
        .iter()
        .flat_map(|slice| slice.noted("for request"))
        .map(|note| note.0)
        .collect();
    let writes: BTreeSet<u64> = writes.iter().map(|slice| slice.expect("request")).collect();
    assert_eq!(named, writes, "the writes that were written back");
    kiobufs
}

pub fn whole(env: &Env) -> Outcome {
    let mut volume = mounted(env, &["cache=direct"]);
    let path = env.path("trace.json");
    let [direct, buffered, scattered] = ["direct", "buffered", "scattered"].map(|n| volume.path(n));
    let running = start(env, &volume, &["--perfetto", &name(&path)]);
    write_direct(&direct);
    let file = File::create(&buffered).expect("a file on the volume");
    file.write_all_at(&vec![1; 4 << 20], 0).expect("write");
    file.sync_all().expect("fsync");
    // Every other page: each is a kiobuf of its own, and all of them lie next to each other.
    drop(file);
    let file = File::create(&scattered).expect("a file on the volume");
    for page in 0..1024 {
        file.write_all_at(&[2; 4096], page * 8192).expect("write");
    }
    file.sync_all().expect("fsync");
    drop(file);
    let inodes = [&direct, &buffered, &scattered].map(|path| inode(path));
    signal(&running, Signal::SIGINT);
    let output = running.wait();
    assert_eq!(output.status.code(), Some(0), "{}", output.describe());
    assert_eq!(output.text().trim(), "", "{}", output.describe());

    arrows(&path);
    let slices = slices(&path);
    check_direct(&slices, inodes[0]);
    let kiobufs = check_buffered(&slices, inodes[1], 4 << 20);
    assert_eq!(members_of(&kiobufs).len(), MEMBERS, "split over all");
    let kiobufs = check_buffered(&slices, inodes[2], 4 << 20);
    assert_eq!(kiobufs.len(), 1024);
    let scattered: BTreeSet<u64> = kiobufs.iter().map(|k| k.expect("kiobuf")).collect();
    let mut merged_on = BTreeSet::new();
    for request in slices.iter().filter(|slice| slice.pid >= FIRST_MEMBER) {
        let carried: BTreeSet<u64> = request.noted("kiobuf").iter().map(|n| n.0).collect();
        assert_eq!(
            carried.len() as u64,
            request.expect("kiobufs"),
            "{}",
            request.args
        );
        if carried.len() > 1 && carried.is_subset(&scattered) {
            merged_on.insert(request.pid - FIRST_MEMBER);
        }
    }
    assert_eq!(merged_on.len(), MEMBERS, "merged on {merged_on:?}");
    let threads = events(&path)
        .into_iter()
        .filter(|event| event["name"] == "thread_name");
    let names: Vec<String> = threads
        .map(|event| event["args"]["name"].to_string())
        .collect();
    assert!(names.iter().any(|name| name.contains("fuse")), "{names:?}");
    volume.umount();
    Ok(())
}
