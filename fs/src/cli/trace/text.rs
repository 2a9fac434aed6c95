//! What one request did, as text: a line for it, and one for each step, with microseconds since its
//! begin.

use std::fmt::Write;
use std::path::Path;

use nix::errno::Errno;

use super::super::size::format_size;
use super::steps::{Chain, Step, What};

/// The lines of one chain.
pub(super) fn render(chain: &Chain) -> String {
    let mut out = head(chain);
    for Step { at_ns, what } in &chain.steps {
        let (at, what) = (micros(*at_ns), describe(chain, what));
        // Writing to a string cannot fail.
        let _infallible = writeln!(out, "{at:>10}  {what}");
    }
    out
}

fn micros(ns: u64) -> String {
    format!("{}.{}", ns / 1000, ns % 1000 / 100)
}

/// Names of processes and devices may have anything in them.
fn clean(name: &str) -> String {
    name.replace(|char: char| char.is_control(), "?")
}

fn short(device: &str) -> String {
    let name = Path::new(device).file_name();
    clean(&name.map_or(device.into(), |name| name.to_string_lossy()))
}

fn inode(inode: u64) -> String {
    match inode {
        0 => "metadata".to_owned(),
        inode => format!("inode {inode}"),
    }
}

fn range(offset: u64, length: u64) -> String {
    format!("{} at {offset}", format_size(length))
}

fn error(errno: u64) -> String {
    match i32::try_from(errno) {
        Ok(0) => String::new(),
        Ok(errno) => format!(", failed: {}", Errno::from_raw(errno).desc()),
        Err(_) => ", failed".to_owned(),
    }
}

fn head(chain: &Chain) -> String {
    let mut line = format!("{} {} of {}", chain.op, chain.number, inode(chain.inode));
    if chain.length > 0 {
        line += &format!(", {}", range(chain.offset, chain.length));
    }
    if chain.pid > 0 {
        // Who has ended by now has no name any more.
        let name = match chain.process.as_str() {
            "" => "process".to_owned(),
            name => clean(name),
        };
        line += &format!(", for {name} {}", chain.pid);
    }
    line += &format!(": {} us", micros(chain.took_ns));
    if chain.bytes > 0 {
        line += &format!(", {} bytes", chain.bytes);
    }
    let errno = u64::from(chain.errno.unsigned_abs());
    line + &error(errno) + &format!("  [{}]\n", clean(&chain.thread))
}

fn describe(chain: &Chain, what: &What) -> String {
    // Only what is not the chain's own file is named.
    let of = |other: u64| match other == chain.inode {
        true => String::new(),
        false => format!(" of {}", inode(other)),
    };
    match what {
        What::Hit {
            inode,
            offset,
            length,
        } => format!("cache hit: {}{}", range(*offset, *length), of(*inode)),
        What::Miss {
            inode,
            offset,
            length,
        } => format!("cache miss: {}{}", range(*offset, *length), of(*inode)),
        What::Arrived {
            inode,
            offset,
            length,
            waited_ns,
        } => format!(
            "arrived: {}{}, waited {} us",
            range(*offset, *length),
            of(*inode),
            micros(*waited_ns)
        ),
        What::ReadAhead { offset, length } => format!("reads ahead: {}", range(*offset, *length)),
        What::Dirtied {
            offset,
            length,
            newly_dirty_pages,
        } => format!(
            "dirtied: {}, {newly_dirty_pages} page{} that {} clean",
            range(*offset, *length),
            if *newly_dirty_pages == 1 { "" } else { "s" },
            if *newly_dirty_pages == 1 {
                "was"
            } else {
                "were"
            },
        ),
        What::HeldBack { waited_ns } => {
            format!("was held back for {} us: much is dirty", micros(*waited_ns))
        }
        What::WritesFor { requests } => writes_for(requests),
        What::Writeback {
            writeback,
            offset,
            length,
            took_ns,
        } => format!(
            "writeback {writeback} ended: {}, took {} us",
            range(*offset, *length),
            micros(*took_ns)
        ),
        What::Durable { waited_ns } => format!("durable, waited {} us", micros(*waited_ns)),
        What::Reply { sending_ns } => format!("answered, sending took {} us", micros(*sending_ns)),
        other => describe_blocks(other, of),
    }
}

/// The requests that a writeback writes for; not all of very many.
fn writes_for(requests: &[u64]) -> String {
    const NAMED_MAX: usize = 8;
    let named = requests.iter().take(NAMED_MAX).map(u64::to_string);
    let mut line = format!("for request {}", named.collect::<Vec<_>>().join(", "));
    if requests.len() > NAMED_MAX {
        line += &format!(" and {} more", requests.len() - NAMED_MAX);
    }
    line
}

fn describe_blocks(what: &What, of: impl Fn(u64) -> String) -> String {
    match what {
        What::Kiobuf {
            kiobuf,
            op,
            inode,
            offset,
            length,
            volume_address,
        } => format!(
            "kiobuf {kiobuf}: {op} {}{}, in the volume at {volume_address}",
            range(*offset, *length),
            inode.map_or(String::new(), of)
        ),
        What::Part {
            kiobuf,
            start,
            length,
            device,
            device_offset,
            ..
        } => format!(
            "kiobuf {kiobuf} cut: {} to {} at {device_offset}",
            range(*start, *length),
            short(device)
        ),
        What::Request {
            request,
            device,
            op,
            device_offset,
            length,
            kiobufs,
            ..
        } => format!(
            "request {request} to {}: {op} {}, {kiobufs} kiobuf{}",
            short(device),
            range(*device_offset, *length),
            if *kiobufs == 1 { "" } else { "s" }
        ),
        What::RequestEnd {
            request,
            device,
            bytes,
            errno,
            latency_ns,
            ..
        } => format!(
            "request {request} to {} ended: {} after {} us{}",
            short(device),
            format_size(*bytes),
            micros(*latency_ns),
            error(*errno)
        ),
        What::KiobufEnd {
            kiobuf,
            bytes,
            errno,
        } => format!(
            "kiobuf {kiobuf} ended: {}{}",
            format_size(*bytes),
            error(*errno)
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_and_when_and_names_cannot_do_harm() {
        let steps = vec![
            Step {
                at_ns: 12_345,
                what: What::Dirtied {
                    offset: 0,
                    length: 4096,
                    newly_dirty_pages: 1,
                },
            },
            Step {
                at_ns: 1_000_000,
                what: What::RequestEnd {
                    request: 7,
                    member: 0,
                    device: "/d/a\u{1b}.img".to_owned(),
                    bytes: 0,
                    errno: u64::from(libc::EIO.unsigned_abs()),
                    latency_ns: 5_099,
                },
            },
        ];
        let chain = Chain {
            op: "write".to_owned(),
            number: 2,
            inode: 5,
            length: 4096,
            pid: 77,
            process: "x\n\u{1b}[2J".to_owned(),
            took_ns: 1_234_567,
            errno: libc::EIO,
            steps,
            ..Chain::default()
        };
        let expected =
            "write 2 of inode 5, 4 KiB at 0, for x??[2J 77: 1234.5 us, failed: I/O error  []
      12.3  dirtied: 4 KiB at 0, 1 page that was clean
    1000.0  request 7 to a?.img ended: 0 B after 5.0 us, failed: I/O error
";
        assert_eq!(render(&chain), expected);
    }
}
