//! Metrics: what a scraper gets over a socket or a port, what it cannot cost, and what Prometheus
//! and the dashboard make of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::env::{Env, Outcome, find_program, project_root};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume};
use serde_json::Value;

const MEMBER_BYTES: u64 = 128 * MIB;

fn main() -> ExitCode {
    runner::main(
        "metrics",
        &[
            Test::new("a_scrape_is_well_formed_and_counts", 60, scrape),
            Test::new("over_a_socket_and_loopback_ports", 60, places),
            Test::new("a_scraper_cannot_cost_much", 60, bounds),
            Test::new("promtool_has_nothing_to_say", 60, promtool),
            Test::new("every_metric_of_the_dashboard_exists", 60, dashboard),
            Test::new(
                "prometheus_scrapes_and_answers_the_dashboard",
                120,
                prometheus,
            ),
        ],
    )
}

/// A port that nobody uses, most likely.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its number").port()
}

/// Sends a request and gives the answer.
fn ask(mut stream: impl Read + Write, request: &str) -> String {
    stream
        .write_all(request.as_bytes())
        .expect("send a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

const GET: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

/// The body of an answer that is as HTTP has it.
fn body(answer: &str) -> &str {
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let len = format!("Content-Length: {}", body.len());
    assert!(head.contains(&len), "{head}\nand {} bytes", body.len());
    body
}

fn socket(env: &Env) -> String {
    env.path("m.sock").display().to_string()
}

fn scraped(path: &str) -> String {
    let stream = UnixStream::connect(path).expect("the metrics' socket");
    body(&ask(stream, GET)).to_owned()
}

/// A mounted volume that has done some of everything.
fn busy_volume<'e>(env: &'e Env, option: &str) -> Volume<'e> {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[option, "cache=direct"]);
    work(&volume);
    volume
}

fn work(volume: &Volume<'_>) {
    let mut file = File::create(volume.path("file")).expect("a file on the volume");
    file.write_all(&vec![5; 8 << 20]).expect("write");
    file.sync_all().expect("fsync");
    fs::read(volume.path("file")).expect("read");
    assert!(fs::read(volume.path("none")).is_err());
}

/// Samples by name and labels; each must belong to a family that says what it is.
fn parse(text: &str) -> BTreeMap<String, f64> {
    let mut samples = BTreeMap::new();
    let (mut family, mut kind, mut families) = (String::new(), String::new(), BTreeSet::new());
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("a name and a text");
            assert!(
                text.ends_with('.') && name.starts_with("braidfs_"),
                "{line}"
            );
            assert!(families.insert(name.to_owned()), "{name} comes twice");
            name.clone_into(&mut family);
            continue;
        }
        if let Some(what) = line.strip_prefix("# TYPE ") {
            let (name, what) = what.split_once(' ').expect("a name and a type");
            assert_eq!(name, family);
            what.clone_into(&mut kind);
            continue;
        }
        let (key, value) = line.rsplit_once(' ').expect("a value");
        let name = key.split('{').next().expect("a name");
        let suffixes: &[&str] = match kind.as_str() {
            "histogram" => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        let known = suffixes
            .iter()
            .any(|suffix| name == format!("{family}{suffix}"));
        assert!(known, "{name} is not of the family {family}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
        assert!(
            key.contains("mountpoint=\"") && key.contains("uuid=\""),
            "{line}"
        );
        let value: f64 = value.parse().expect("a number");
        assert!(value >= 0.0, "{line}");
        assert!(
            samples.insert(key.to_owned(), value).is_none(),
            "{key} comes twice"
        );
    }
    samples
}

/// Buckets grow, and the last one is the count.
fn check_histograms(samples: &BTreeMap<String, f64>, text: &str) {
    let mut before: Option<(String, f64)> = None;
    let mut seen = 0;
    for line in text.lines().filter(|line| line.contains("_bucket{")) {
        let (key, value) = line.rsplit_once(' ').expect("a value");
        let (series, le) = key.split_once(",le=\"").expect("a bound");
        let value: f64 = value.parse().expect("a number");
        if let Some((last, below)) = &before
            && last == series
        {
            assert!(value >= *below, "{line}");
        }
        if le == "+Inf\"}" {
            let count = series.replace("_bucket{", "_count{") + "}";
            assert_eq!(samples.get(&count), Some(&value), "{count}");
            seen += 1;
        }
        before = Some((series.to_owned(), value));
    }
    assert!(seen > 8, "{seen} histograms");
}

/// The sum of all samples of a name that have these labels.
fn sum(samples: &BTreeMap<String, f64>, name: &str, labels: &str) -> f64 {
    let of = |key: &String| key.starts_with(&format!("{name}{{")) && key.contains(labels);
    let found = samples.iter().filter(|(key, _)| of(key));
    let found: Vec<f64> = found.map(|(_, value)| *value).collect();
    assert!(!found.is_empty(), "no sample of {name} with {labels}");
    found.iter().sum()
}

fn scrape(env: &Env) -> Outcome {
    let path = socket(env);
    let mut volume = busy_volume(env, &format!("metrics=unix:{path}"));
    let text = scraped(&path);
    let first = parse(&text);
    check_histograms(&first, &text);
    let mib = MIB as f64;
    let written = "braidfs_written_bytes_total";
    assert_eq!(sum(&first, written, "") / mib, 8.0);
    assert!(sum(&first, "braidfs_device_bytes_total", "op=\"write\"") / mib >= 8.0);
    let seconds = "braidfs_request_duration_seconds";
    let fsyncs = sum(&first, &format!("{seconds}_count"), "op=\"fsync\"");
    assert_eq!(fsyncs, 1.0);
    let took = sum(&first, &format!("{seconds}_sum"), "op=\"fsync\"");
    assert!((0.000_01..20.0).contains(&took), "fsync took {took} s");
    assert_eq!(sum(&first, "braidfs_cache_size_bytes", "") % mib, 0.0);
    let uuid = format!("uuid=\"{}\"", volume.uuid());
    let place = format!("mountpoint=\"{}\"", volume.mountpoint.display());
    assert!(text.contains(&uuid) && text.contains(&place));
    work(&volume);
    let second = parse(&scraped(&path));
    for (key, value) in &first {
        let grows = ["_total{", "_bucket{", "_count{", "_sum{"];
        if grows.iter().any(|suffix| key.contains(suffix)) {
            let now = second.get(key);
            assert!(
                now.is_some_and(|now| now >= value),
                "{key}: {value}, {now:?}"
            );
        }
    }
    assert_eq!(sum(&second, written, "") / mib, 16.0);
    volume.umount();
    Ok(())
}

fn places(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    for host in ["127.0.0.1", "[::1]"] {
        let address = format!("{host}:{}", free_port());
        if host == "[::1]" && TcpListener::bind("[::1]:0").is_err() {
            println!("no IPv6 here");
            continue;
        }
        volume.mount(&[&format!("metrics={address}")]);
        let stream = TcpStream::connect(&address).expect("the metrics' port");
        assert!(body(&ask(stream, GET)).contains("braidfs_build_info{"));
        volume.umount();
        assert!(
            TcpStream::connect(&address).is_err(),
            "somebody still listens"
        );
    }
    // A socket file that an earlier daemon left is replaced; anything else is not.
    let path = socket(env);
    drop(UnixListener::bind(&path).expect("an old socket"));
    let option = format!("metrics=unix:{path}");
    volume.mount(&[&option]);
    let mode = fs::metadata(&path)
        .expect("the socket")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(scraped(&path).contains("braidfs_build_info{"));
    let second = Volume::format(env, "w", &[MEMBER_BYTES], &[]);
    let refused = second.mount_command(&[&option]).exits(32);
    assert!(refused.stderr.contains("in use"), "{}", refused.describe());
    volume.umount();
    assert!(!Path::new(&path).exists(), "the socket is left");
    fs::write(&path, "text").expect("a file in its place");
    let refused = second.mount_command(&[&option]).exits(32);
    assert!(refused.stderr.contains("in use"), "{}", refused.describe());
    assert_eq!(fs::read_to_string(&path).expect("the file"), "text");
    Ok(())
}

fn bounds(env: &Env) -> Outcome {
    let path = socket(env);
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[&format!("metrics=unix:{path}"), "cache_size=64M"]);
    let connect = || UnixStream::connect(&path).expect("the metrics' socket");
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
    ] {
        let answer = ask(connect(), request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{answer}"
        );
    }
    let head = ask(connect(), "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"),
        "{head}"
    );
    // A head without an end, in one piece and in many.
    let mut stream = connect();
    let long = format!("GET /metrics HTTP/1.1\r\nA: {}", "x".repeat(20_000));
    let _cut_off = stream.write_all(long.as_bytes());
    let mut answer = Vec::new();
    let _reset = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    let began = Instant::now();
    let mut slow = connect();
    while slow.write_all(b"x").is_ok() && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "a slow scraper is served for ever"
    );
    // Those that say nothing keep no more than their number busy, and not for long.
    let idle: Vec<UnixStream> = (0..40).map(|_| connect()).collect();
    let answered = || {
        let mut stream = connect();
        let _refused = stream.write_all(GET.as_bytes());
        let mut answer = String::new();
        stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200")
    };
    wait_until("an answer beside idle connections", answered);
    drop(idle);
    volume.assert_memory_bounded(64 * MIB);
    fs::write(volume.path("file"), "text").expect("it works as before");
    volume.umount();
    Ok(())
}

fn promtool(env: &Env) -> Outcome {
    env.need_tools(&["promtool"])?;
    let path = socket(env);
    let mut volume = busy_volume(env, &format!("metrics=unix:{path}"));
    let file = env.path("scrape");
    fs::write(&file, scraped(&path)).expect("keep a scrape");
    let tool = find_program("promtool").expect("it is there");
    let input = File::open(&file).expect("the scrape");
    let output = Cmd::new(tool).args(["check", "metrics"]).stdin(input).ok();
    assert_eq!(output.text().trim(), "", "{}", output.describe());
    volume.umount();
    Ok(())
}

/// The queries of the dashboard, with its variables filled in.
fn queries() -> Vec<String> {
    let path = project_root().join("fs/system/grafana.json");
    let text = fs::read_to_string(path).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("the dashboard is JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().expect("targets"));
    let expr = |target: &Value| target["expr"].as_str().expect("a query").to_owned();
    let queries: Vec<String> = targets.map(expr).collect();
    assert!(queries.len() > 20, "{} queries", queries.len());
    let fill = |query: String| {
        let filled = query
            .replace("$mountpoint", ".*")
            .replace("$__rate_interval", "10s");
        assert!(!filled.contains('$'), "{filled}");
        filled
    };
    queries.into_iter().map(fill).collect()
}

/// Names of metrics in a query.
fn names(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
    words.filter(|word| word.starts_with("braidfs_"))
}

fn dashboard(env: &Env) -> Outcome {
    let path = socket(env);
    let mut volume = busy_volume(env, &format!("metrics=unix:{path}"));
    let samples = parse(&scraped(&path));
    let exist: BTreeSet<&str> = samples
        .keys()
        .map(|key| key.split('{').next().expect("a name"))
        .collect();
    for query in queries() {
        let mut used = names(&query).peekable();
        assert!(used.peek().is_some(), "{query} names no metric");
        for name in used {
            assert!(exist.contains(name), "{query}: there is no {name}");
        }
    }
    volume.umount();
    Ok(())
}

/// An answer of Prometheus to a query.
fn query(address: &str, query: &str) -> Option<Value> {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    let query: String = query.bytes().map(escape).collect();
    let stream = TcpStream::connect(address).ok()?;
    let target = format!("/api/v1/query?query={query}");
    let request = format!("GET {target} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    let answer = ask(stream, &request);
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

fn prometheus(env: &Env) -> Outcome {
    env.need_tools(&["prometheus"])?;
    let (ours, theirs) = (free_port(), free_port());
    let mut volume = busy_volume(env, &format!("metrics=127.0.0.1:{ours}"));
    let config = env.path("prometheus.yml");
    let text = format!(
        "global: {{ scrape_interval: 1s }}\nscrape_configs:\n- job_name: braidfs\n  \
         static_configs: [{{ targets: ['127.0.0.1:{ours}'] }}]\n"
    );
    fs::write(&config, text).expect("a configuration");
    let address = format!("127.0.0.1:{theirs}");
    let server = Cmd::new(find_program("prometheus").expect("it is there"))
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            env.path("data").display()
        ))
        .arg(format!("--web.listen-address={address}"))
        .spawn();
    let results = |text: &str| {
        let answer = query(&address, text)?;
        assert_eq!(answer["status"], "success", "{text}: {answer}");
        answer["data"]["result"].as_array().map(Vec::len)
    };
    wait_until("a scrape", || {
        results("up{job=\"braidfs\"} == 1").is_some_and(|n| n == 1)
    });
    // Rates need several scrapes, and something to count.
    for _ in 0..4 {
        work(&volume);
        std::thread::sleep(Duration::from_millis(1200));
    }
    let queries = queries();
    let empty: Vec<&String> = queries
        .iter()
        .filter(|query| results(query).is_none_or(|count| count == 0))
        .collect();
    assert!(
        empty.is_empty(),
        "no result for {empty:#?}: {}",
        server.text_so_far()
    );
    drop(server);
    volume.umount();
    Ok(())
}
