//! `braidfs top` on a terminal: tmux plays the terminal and the user.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::terminal::Terminal;
use braidfs_tests::volume::{MIB, Volume};

const MEMBER_BYTES: u64 = 128 * MIB;

fn main() -> ExitCode {
    runner::main(
        "top",
        &[
            Test::new("shows_what_happens_on_80_by_24", 120, shows),
            Test::new("keys_pause_sort_explain_and_quit", 60, keys),
            Test::new("the_terminal_is_given_back", 120, given_back),
            Test::new("a_terminal_that_goes_away_ends_it", 60, gone),
            Test::new("any_size_will_do", 60, sizes),
            Test::new("plain_text_where_there_is_no_terminal", 60, plain),
        ],
    )
}

fn start_top(terminal: &Terminal, env: &Env, volume: &Volume<'_>) {
    let (bin, place) = (env.bin.display(), volume.mountpoint.display());
    terminal.type_line("echo before-top");
    terminal.type_line(&format!("{bin} top -i 0.5 {place}; echo code=$?"));
    terminal.wait_for("measured screen", |screen| screen.contains("device "));
}

fn pid_of_top(env: &Env, volume: &Volume<'_>) -> String {
    let pattern = format!(
        "^{} top -i 0.5 {}",
        env.bin.display(),
        volume.mountpoint.display()
    );
    let pid = Cmd::new("pgrep").args(["-n", "-f", &pattern]).ok();
    pid.stdout.trim().to_owned()
}

/// The shell is there again, with its screen, its cursor and its echo.
fn expect_shell(terminal: &Terminal, code: i32) {
    let line = format!("code={code}\n");
    let screen = terminal.wait_for("end of top", |screen| screen.contains(&line));
    assert!(
        screen.contains("before-top"),
        "the former screen is gone:\n{screen}"
    );
    terminal.type_line("stty -a");
    let screen = terminal.wait_for("stty's word", |screen| screen.contains("icanon"));
    for setting in ["-icanon", "-echo ", "-isig"] {
        assert!(!screen.contains(setting), "{setting}:\n{screen}");
    }
    let cursor = terminal.tmux(&["display-message", "-p", "#{cursor_flag} #{alternate_on}"]);
    assert_eq!(
        cursor.ok().stdout.trim(),
        "1 0",
        "the cursor, the other screen"
    );
}

fn mounted(env: &Env) -> Volume<'_> {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 4], &[]);
    volume.mount(&["cache=direct", "cache_size=64M"]);
    volume
}

/// Writes and reads for a while.
fn work(volume: &Volume<'_>) {
    let mut file = File::create(volume.path("file")).expect("a file on the volume");
    for _ in 0..20 {
        file.write_all(&vec![1; 1 << 20]).expect("write");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    file.sync_all().expect("fsync");
    fs::read(volume.path("file")).expect("read");
}

fn shows(env: &Env) -> Outcome {
    let terminal = Terminal::open(env)?;
    let mut volume = mounted(env);
    start_top(&terminal, env, &volume);
    let busy = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            for _ in 0..6 {
                work(&volume);
            }
        });
        let is_busy = |screen: &str| {
            let write = screen.lines().find(|line| line.starts_with("write "));
            let read = screen.lines().any(|line| line.starts_with("read "));
            read && write.is_some_and(|line| line.contains("us") || line.contains("ms"))
        };
        let busy = terminal.wait_for("busy screen", is_busy);
        worker.join().expect("the worker");
        busy
    });
    println!("{busy}");
    assert_eq!(busy.lines().count(), 24);
    for part in [
        "fuse   ",
        "cache  hits",
        "dirty",
        "readahead",
        "v0.img",
        "v3.img",
        "p99",
    ] {
        assert!(busy.contains(part), "{part} is missing:\n{busy}");
    }
    // Who waits is named with what it waits for.
    let control = |verb: &str| {
        let command = env.braidfs().arg("control").arg(&volume.mountpoint);
        command.arg(verb).ok()
    };
    control("freeze");
    let writer = Cmd::sh("echo text >\"$1\"", [volume.path("new")]).spawn();
    let waits = |screen: &str| {
        let line = screen.lines().find(|line| line.starts_with("create "));
        screen.contains("FROZEN") && line.is_some_and(|line| line.contains(" sh"))
    };
    terminal.wait_for("waiting request", waits);
    control("thaw");
    assert!(writer.wait().status.success());
    terminal.wait_for("thawed screen", |screen| !screen.contains("FROZEN"));
    volume.umount();
    let ended = terminal.wait_for("end", |screen| screen.contains("code=1"));
    // The terminal breaks the line where it likes.
    let said = ended.replace('\n', "");
    assert!(said.contains("not mounted"), "{ended}");
    Ok(())
}

fn keys(env: &Env) -> Outcome {
    let terminal = Terminal::open(env)?;
    let mut volume = mounted(env);
    start_top(&terminal, env, &volume);
    terminal.keys(&["p"]);
    let paused = terminal.wait_for("pause", |screen| screen.contains("paused"));
    work(&volume);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(terminal.screen(), paused, "it goes on");
    terminal.keys(&["p"]);
    terminal.wait_for("going on", |screen| !screen.contains("paused"));
    for order in ["by p99", "by name", "by rate"] {
        terminal.keys(&["s"]);
        terminal.wait_for(order, |screen| screen.contains(order));
    }
    terminal.keys(&["?"]);
    terminal.wait_for("help", |screen| screen.contains("pause, go on"));
    terminal.keys(&["?"]);
    terminal.wait_for("the rates again", |screen| screen.contains("device "));
    terminal.keys(&["q"]);
    expect_shell(&terminal, 0);
    volume.umount();
    Ok(())
}

fn given_back(env: &Env) -> Outcome {
    let terminal = Terminal::open(env)?;
    let mut volume = mounted(env);
    start_top(&terminal, env, &volume);
    terminal.keys(&["C-c"]);
    expect_shell(&terminal, 0);
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        terminal.type_line("clear");
        start_top(&terminal, env, &volume);
        let pid = pid_of_top(env, &volume);
        Cmd::new("kill").arg(format!("-{signal}")).arg(pid).ok();
        expect_shell(&terminal, code);
    }
    // A daemon that does not answer does not keep anybody there.
    terminal.type_line("clear");
    start_top(&terminal, env, &volume);
    let daemon = volume.daemon().pid.to_string();
    Cmd::new("kill").arg("-STOP").arg(&daemon).ok();
    std::thread::sleep(std::time::Duration::from_millis(1000));
    terminal.keys(&["q"]);
    expect_shell(&terminal, 0);
    Cmd::new("kill").arg("-CONT").arg(&daemon).ok();
    volume.umount();
    Ok(())
}

fn gone(env: &Env) -> Outcome {
    let terminal = Terminal::open(env)?;
    let mut volume = mounted(env);
    start_top(&terminal, env, &volume);
    let pid = pid_of_top(env, &volume);
    drop(terminal);
    wait_until("the end of top", || {
        !PathBuf::from(format!("/proc/{pid}")).exists()
    });
    volume.umount();
    Ok(())
}

fn sizes(env: &Env) -> Outcome {
    let terminal = Terminal::open(env)?;
    let mut volume = mounted(env);
    start_top(&terminal, env, &volume);
    for (columns, rows) in [("20", "5"), ("200", "60"), ("2", "2"), ("80", "24")] {
        terminal
            .tmux(&["resize-window", "-x", columns, "-y", rows])
            .ok();
        std::thread::sleep(std::time::Duration::from_millis(700));
    }
    terminal.wait_for("the screen", |screen| {
        screen.contains("v3.img") && screen.contains("cache  hits")
    });
    terminal.keys(&["q"]);
    terminal.wait_for("end", |screen| screen.contains("code=0"));
    volume.umount();
    Ok(())
}

fn plain(env: &Env) -> Outcome {
    let mut volume = mounted(env);
    let script = "\"$1\" top -i 0.3 \"$2\" | head -n 8";
    let output = Cmd::sh(script, [&env.bin, &volume.mountpoint])
        .limit_secs(20)
        .ok();
    assert!(
        output.stdout.starts_with("interval "),
        "{}",
        output.describe()
    );
    assert!(!output.stdout.contains('\u{1b}'), "{}", output.describe());
    volume.umount();
    Ok(())
}
