//! Every error path of the command line that can be walked: message and exit code, one row each;
//! and where a daemon's messages go.
//!
//! A row is a command line, the exit code, and what the message must contain. Words in braces stand
//! for what [`Scene`] has set up. `badinput` shows that bad input changes nothing.

#[path = "errors/rows.rs"]
mod rows;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use braidfs_tests::command::{Cmd, Output, wait_until};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::loopdev::LoopDevice;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, name, sparse_image};
use nix::fcntl::{Flock, FlockArg};
use rows::*;

const MEMBER_BYTES: u64 = 64 * MIB;

fn main() -> ExitCode {
    runner::main(
        "errors",
        &[
            Test::new("of_the_program", 60, |env| all(env, PROGRAM)),
            Test::new("of_mkfs", 60, |env| all(env, MKFS)),
            Test::new("of_mount", 120, |env| all(env, MOUNT)),
            Test::new("of_mount_options", 120, |env| all(env, OPTIONS)),
            Test::new("of_umount", 60, |env| all(env, UMOUNT)),
            Test::new("of_fsck_and_scrub", 120, |env| all(env, FSCK)),
            Test::new("of_those_that_only_look", 60, |env| all(env, LOOK)),
            Test::new("of_control_and_label", 60, |env| all(env, CONTROL)),
            Test::new("of_bench", 60, |env| all(env, BENCH)),
            Test::new("of_a_dead_mount", 60, dead),
            Test::new("of_devices_that_cannot_be_written", 60, protected),
            Test::new("without_fuse", 60, without_fuse),
            Test::new("without_a_place_for_the_socket", 60, without_socket),
            Test::new("of_ordinary_users", 60, user),
            Test::new("of_an_output_that_is_full", 60, full_output),
            Test::new("the_background_logs_to_syslog", 60, syslog),
            Test::new("the_foreground_tells_the_journal_levels", 60, journal),
        ],
    )
}

/// What the rows talk about.
struct Scene<'e> {
    env: &'e Env,
    names: Vec<(&'static str, String)>,
    /// Mounted while the scene lasts.
    _mounted: Volume<'e>,
    _busy: (Volume<'e>, File),
    _lock: Flock<File>,
}

impl<'e> Scene<'e> {
    fn set_up(env: &'e Env) -> Self {
        let unmounted = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
        let mut mounted = Volume::format(env, "m", &[MEMBER_BYTES; 2], &[]);
        mounted.mount(&["cache_size=16M"]);
        let mut busy = Volume::format(env, "busy", &[MEMBER_BYTES], &[]);
        busy.mount(&["cache_size=16M"]);
        let open = File::create(busy.path("file")).expect("a file on the volume");
        // A member whose fellow is out of reach.
        let broken = Volume::format(env, "broken", &[MEMBER_BYTES; 2], &[]);
        fs::remove_file(&broken.devices[1]).expect("lose a member");
        let image = |name: &str, bytes: u64| {
            let path = env.path(name);
            sparse_image(&path, bytes);
            path
        };
        let (blank, twin) = (image("blank.img", MEMBER_BYTES), env.path("twin.img"));
        fs::hard_link(&blank, &twin).expect("a second name");
        let (taken, small) = (image("taken.img", MEMBER_BYTES), image("small.img", MIB));
        let lock = File::open(&taken).expect("open an image");
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).expect("lock an image");
        let foreign = image("foreign.img", MEMBER_BYTES);
        Cmd::new("mkswap").arg(&foreign).ok();
        let damaged = Volume::format(env, "damaged", &[MEMBER_BYTES], &[]);
        damage_labels(&damaged.devices[0]);
        let file = env.path("file");
        fs::write(&file, vec![b'x'; 1 << 20]).expect("a file");
        let names = vec![
            ("v0", name(&unmounted.devices[0])),
            ("m0", name(&mounted.devices[0])),
            ("mnt", name(&mounted.mountpoint)),
            ("busy", name(&busy.mountpoint)),
            ("lone", name(&broken.devices[0])),
            ("blank", name(&blank)),
            ("twin", name(&twin)),
            ("taken", name(&taken)),
            ("small", name(&small)),
            ("foreign", name(&foreign)),
            ("damaged", name(&damaged.devices[0])),
            ("file", name(&file)),
            ("folder", name(&env.mkdir("folder"))),
            ("none", name(&env.path("none"))),
            ("new", name(&env.path("new.img"))),
            ("long", "x".repeat(65)),
        ];
        Self {
            env,
            names,
            _mounted: mounted,
            _busy: (busy, open),
            _lock: lock,
        }
    }

    fn fill(&self, text: &str) -> String {
        let put = |text: String, (name, value): &(&str, String)| {
            text.replace(&format!("{{{name}}}"), value)
        };
        self.names.iter().fold(text.to_owned(), put)
    }

    /// The complaint about a row, if any.
    fn try_row(&self, row: &Row) -> Option<String> {
        let (line, code, part) = *row;
        let mut words = line.split(' ').filter(|word| !word.is_empty()).peekable();
        let called = words.peek().and_then(|word| word.strip_prefix("as:"));
        let mut command = match called {
            Some(name) => {
                words.next();
                let link = self.env.path(name);
                // Made by an earlier row, perhaps.
                let _exists = std::os::unix::fs::symlink(&self.env.bin, &link);
                Cmd::new(link)
            }
            None => self.env.braidfs(),
        };
        for word in words {
            command = command.arg(self.fill(word));
        }
        complaint(&command.quiet().run(), code, &self.fill(part))
    }
}

fn complaint(output: &Output, code: i32, part: &str) -> Option<String> {
    let message = output.stderr.to_lowercase();
    let why = if output.status.code() != Some(code) {
        format!("expected exit code {code}")
    } else if !message.contains(&part.to_lowercase()) {
        format!("expected '{part}'")
    } else if !output.stdout.is_empty() {
        "an error belongs to the standard error".to_owned()
    } else if message.contains("panicked") {
        "it fell over".to_owned()
    } else if message.starts_with("braidfs: ") && output.stderr.trim_end().contains('\n') {
        "more than one line".to_owned()
    } else if !["braidfs: ", "error: ", "usage: ", "several devices"]
        .iter()
        .any(|start| message.starts_with(start))
    {
        "nobody signs the message".to_owned()
    } else {
        return None;
    };
    Some(format!("{why}: {}", output.describe()))
}

fn all(env: &Env, rows: &[Row]) -> Outcome {
    let scene = Scene::set_up(env);
    let mounts = || fs::read_to_string("/proc/self/mounts").expect("the mount table");
    let before = mounts();
    let complaints: Vec<String> = rows.iter().filter_map(|row| scene.try_row(row)).collect();
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    assert_eq!(mounts(), before, "an error has changed the mount table");
    Ok(())
}

/// Turns over some bytes of both copies.
fn damage_labels(image: &Path) {
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(image).expect("an image");
    for at in [0, 512 << 10] {
        file.write_all_at(&[0xa5; 8], at + 100)
            .expect("damage a label");
    }
}

fn assert_error(command: Cmd, code: i32, part: &str) {
    let complaint = complaint(&command.run(), code, part);
    assert!(complaint.is_none(), "{}", complaint.unwrap_or_default());
}

fn dead(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    volume.kill_daemon_only();
    let target = name(&volume.mountpoint);
    let on = |verb: &str| env.braidfs().args([verb, &target]);
    assert_error(
        volume.mount_command(&[]),
        32,
        "daemon is gone is still mounted there; 'umount'",
    );
    assert_error(
        on("stats"),
        1,
        &format!("{target}: its daemon cannot be reached"),
    );
    let scrub = env.braidfs().args(["scrub", "--status", &target]);
    assert_error(scrub, 8, &target);
    let output = on("umount").ok();
    assert!(
        output.stderr.contains("its daemon had ended before"),
        "{}",
        output.describe()
    );
    volume.detach();
    Ok(())
}

fn protected(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    let device = LoopDevice::attach_read_only(&volume.devices[0]);
    let path = name(&device.path);
    let mkfs = env.braidfs().args(["mkfs", "--force", &path]);
    assert_error(mkfs, 1, &path);
    let mount = env.braidfs().args(["mount", "-o", "rw", &path]);
    let refused = format!("{path}: is write-protected, and option 'rw' was given");
    assert_error(mount.arg(&volume.mountpoint), 32, &refused);
    let behind = env.braidfs().arg("mount").arg(&volume.devices[0]);
    assert_error(
        behind.arg(&volume.mountpoint),
        32,
        "is in use by loop device",
    );
    Ok(())
}

fn without_fuse(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    let folder = env.mkdir("nodev");
    let script = "mount -t tmpfs -o nodev tmpfs \"$1\"; mknod \"$1/fuse\" c 10 229; \
                  mount --bind \"$1/fuse\" /dev/fuse";
    Cmd::sh(script, [&folder]).ok();
    assert_error(volume.mount_command(&[]), 32, "cannot open /dev/fuse");
    Cmd::new("umount").arg("/dev/fuse").ok();
    Ok(())
}

fn without_socket(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    let open = env.mkdir("open");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("open a folder");
    for place in ["/run/braidfs", "/tmp/braidfs-0"] {
        fs::create_dir_all(place).expect("the folder of sockets");
        fs::set_permissions(place, fs::Permissions::from_mode(0o700)).expect("its mode");
        Cmd::new("mount").arg("--bind").arg(&open).arg(place).ok();
    }
    let refused = "no private directory for the control socket: /run/braidfs";
    assert_error(volume.mount_command(&[]), 2, refused);
    Ok(())
}

fn user(env: &Env) -> Outcome {
    env.need_tools(&["setpriv"])?;
    Cmd::new("chmod").arg("711").arg(&env.dir).ok();
    let bin = env.path("braidfs");
    fs::copy(&env.bin, &bin).expect("copy the program");
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    Cmd::new("chmod").arg("600").args(&volume.devices).ok();
    let run = env.mkdir("run");
    Cmd::new("chown").arg("65534:65534").arg(&run).ok();
    let user = |verb: &str| {
        let setpriv = Cmd::new("setpriv").env("XDG_RUNTIME_DIR", &run);
        let ids = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
        setpriv.args(ids).arg(&bin).arg(verb)
    };
    let (image, target) = (name(&volume.devices[0]), name(&volume.mountpoint));
    assert_error(user("mkfs").args(["--force", &image]), 1, &image);
    assert_error(
        user("mount").args([&image, &target]),
        32,
        "permission denied",
    );
    assert_error(user("info").arg(&image), 1, "permission denied");
    assert_error(user("fsck").args(["-n", &image]), 8, "permission denied");
    volume.mount(&[]);
    let umount = user("umount").arg(&target);
    assert_error(umount, 32, "only root and who mounted it may unmount it");
    assert_error(
        user("stats").arg(&target),
        1,
        "its daemon cannot be reached",
    );
    assert_error(
        user("trace").arg(&target),
        1,
        "its daemon cannot be reached",
    );
    volume.umount();
    Ok(())
}

fn full_output(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    for words in ["info", "info --json", "probe", "probe --json"] {
        let script = "bin=$1; device=$2; shift 2; \"$bin\" \"$@\" \"$device\" >/dev/full";
        let command = Cmd::sh(script, [&env.bin, &volume.devices[0]]);
        assert_error(
            command.args(words.split(' ')),
            2,
            "standard output: no space left",
        );
        // A reader that has gone is none to complain to.
        let script = "bin=$1; device=$2; shift 2; \"$bin\" \"$@\" \"$device\" | true";
        let command = Cmd::sh(script, [&env.bin, &volume.devices[0]]);
        assert_eq!(command.args(words.split(' ')).ok().stderr, "");
    }
    Ok(())
}

/// A device that its mount finds damaged is named in the log with its level and our process id.
fn syslog(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let path = env.path("log");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_nonblocking(true).expect("a socket's flag");
    let made = !Path::new("/dev/log").exists();
    if made {
        File::create("/dev/log").expect("a place to lay the socket over");
    }
    let place = fs::canonicalize("/dev/log").unwrap_or_else(|_| PathBuf::from("/dev/log"));
    Cmd::new("mount").arg("--bind").arg(&path).arg(&place).ok();
    let mount = volume.mount_command(&[]).env("BRAIDFS_LOG", "info");
    mount.ok();
    volume.adopt();
    let daemon = volume.daemon();
    let mut heard = String::new();
    let mut hears = |line: &str| {
        let mut buffer = [0; 4096];
        while let Ok(len) = socket.recv(&mut buffer) {
            heard.push_str(&String::from_utf8_lossy(&buffer[..len]));
            heard.push('\n');
        }
        heard.contains(line)
    };
    let line = format!(
        "<30>braidfs[{}]: mounted on {}",
        daemon.pid,
        name(&volume.mountpoint)
    );
    wait_until(&line, || hears(&line));
    // A warning: a file that nobody may have any more.
    let open = File::create(volume.path("file")).expect("a file on the volume");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(daemon.pid),
        nix::sys::signal::Signal::SIGTERM,
    )
    .expect("stop the daemon");
    let line = format!(
        "<28>braidfs[{}]: warning: {} is in use",
        daemon.pid,
        name(&volume.mountpoint)
    );
    wait_until(&line, || hears(&line));
    drop(open);
    wait_until("the daemon's end", || !daemon.is_alive());
    Cmd::new("umount").arg(&place).ok();
    if made {
        fs::remove_file("/dev/log").expect("take it away again");
    }
    Ok(())
}

fn journal(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let run = |own: &str| {
        let log = env.path("stderr");
        let script = "log=$1; own=$2; shift 2; exec 2>\"$log\"; \
                      [ \"$own\" = no ] || export JOURNAL_STREAM=\"$(stat -c %d:%i \"$log\")\"; \
                      exec \"$@\"";
        let words = [&*name(&log), own].map(str::to_owned);
        let command = Cmd::sh(script, words)
            .arg(&env.bin)
            .env("BRAIDFS_LOG", "info");
        let command = command.args(["mount", "-f"]).args(&volume.devices);
        (command, log)
    };
    for (own, line) in [
        ("yes", "<6>braidfs: mounted on "),
        ("no", "braidfs: mounted on "),
    ] {
        let (command, log) = run(own);
        let running = command.arg(&volume.mountpoint).spawn();
        let said = || fs::read_to_string(&log).unwrap_or_default();
        wait_until("the message", || {
            said().lines().any(|said| said.starts_with(line))
        });
        env.braidfs().arg("umount").arg(&volume.mountpoint).ok();
        running.wait();
        let (command, log) = run(own);
        command.arg(env.path("none")).fails();
        let said = fs::read_to_string(&log).expect("the log");
        let start = if own == "yes" {
            "<3>braidfs: "
        } else {
            "braidfs: "
        };
        assert!(said.starts_with(start), "{said}");
    }
    Ok(())
}
