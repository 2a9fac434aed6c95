//! The fuzz target `requests`: whatever the kernel asks gets one answer, and leaves a sound volume.

use std::sync::{Arc, OnceLock};

use super::bench::Bench;
use super::blocking::Blocking;
use super::protocol::{Opcode, Out};
use crate::FileSystem;
use crate::fuzzing::{self, Input};

const REQUESTS_MAX: usize = 40;
/// Marks a node id of eight bytes.
const LONG: u64 = 0xff;

/// Input: requests: opcode, node id, length of the arguments, arguments.
pub(crate) fn requests(input: &[u8]) {
    // Its threads stay for a while, so one pool serves all inputs.
    static BLOCKING: OnceLock<Blocking> = OnceLock::new();
    let blocking = BLOCKING.get_or_init(Blocking::default).clone();
    let devices = fuzzing::single();
    let volume = fuzzing::assemble(&devices, false).expect("a sound volume");
    let fs = FileSystem::mount(volume, fuzzing::options(false)).expect("a sound volume");
    let bench = Bench::over(Arc::clone(&fs), blocking);
    let mut input = Input(input);
    for _ in 0..REQUESTS_MAX {
        if input.is_empty() {
            break;
        }
        let opcode = u32::try_from(input.number(1) % 56).unwrap_or(0);
        let node = match input.number(1) {
            LONG => input.number(8),
            node => node,
        };
        let len = usize::try_from(input.number(1)).unwrap_or(0);
        bench.ask(opcode, node, input.bytes(len));
    }
    drop(bench);
    fs.unmount().expect("nothing is wrong with the devices");
    drop(fs);
    let volume = fuzzing::assemble(&devices, true).expect("a sound volume");
    let report = crate::fsck::check(volume).expect("a sound volume");
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
}

/// One request for each opcode, and some in a row that make sense.
pub(crate) fn seeds() -> Vec<(String, Vec<u8>)> {
    let request = |opcode: u8, node: u8, args: &[u8]| {
        let len = u8::try_from(args.len()).unwrap_or(u8::MAX);
        [&[opcode, node, len], args].concat()
    };
    let words = |words: &[u64]| {
        let out = words
            .iter()
            .fold(Out::default(), |out, word| out.u64(*word));
        out.as_slice().to_vec()
    };
    let mut seeds = Vec::new();
    for opcode in (0..56).filter(|opcode| Opcode::from_wire(*opcode).is_some()) {
        let opcode = u8::try_from(opcode).unwrap_or(0);
        let mut bytes = Vec::new();
        for node in [1, 4] {
            bytes.extend(request(opcode, node, b"small\0value\0"));
            bytes.extend(request(opcode, node, &words(&[0, 0, 4096, 1])));
            bytes.extend(request(
                opcode,
                node,
                &[&words(&[1, 4]), &b"small\0dir\0"[..]].concat(),
            ));
        }
        seeds.push((format!("opcode-{opcode}"), bytes));
    }
    let lookup = request(1, 1, b"small\0");
    let open = request(14, 4, &words(&[2]));
    let read = request(15, 4, &words(&[0, 0, 4096, 0, 0]));
    let data = [&words(&[0, 3, 12, 0, 0])[..], b"hello, world"].concat();
    let write = request(16, 4, &data);
    let fsync = request(20, 4, &words(&[0, 0]));
    let unlink = request(10, 1, b"small\0");
    let story = [lookup, open, read, write, fsync, unlink].concat();
    seeds.push(("story".to_owned(), story));
    seeds
}
