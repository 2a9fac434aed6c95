//! The daemon under a service manager, and what the system's own programs make of the unit and of
//! the udev rule.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::env::{Env, Outcome, project_root};
use braidfs_tests::loopdev::on_loop_devices;
use braidfs_tests::machine::Machine;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, joined, name};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MEMBER_BYTES: u64 = 128 * MIB;

fn main() -> ExitCode {
    runner::main(
        "service",
        &[
            Test::new("the_unit_is_sound", 60, unit),
            Test::new("the_udev_rule_is_sound", 60, udev_rule),
            Test::new("a_service_manager_is_told", 60, service_manager),
            Test::new("a_stopped_service_has_its_data_safe", 120, stop_waits),
        ],
    )
}

fn unit(env: &Env) -> Outcome {
    env.need_tools(&["systemd-analyze"])?;
    let text = fs::read_to_string(project_root().join("fs/system/braidfs@.service"));
    let text = text
        .expect("the unit")
        .replace("/usr/bin/braidfs", &name(&env.bin));
    let unit = env.path("braidfs@srv-tree.service");
    fs::write(&unit, text).expect("an instance of the unit");
    let verify = Cmd::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&unit);
    let output = verify.ok();
    assert!(!output.text().contains("braidfs@"), "{}", output.describe());
    Ok(())
}

/// What udev would do with a member.
fn udev_rule(env: &Env) -> Outcome {
    let rule = fs::read_to_string(project_root().join("fs/system/64-braidfs.rules"));
    let rule = rule
        .expect("the rule")
        .replace("/usr/bin/braidfs", &name(&env.bin));
    // Each jump has its goal, and each line is a match, an assignment or a jump.
    for line in rule
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        for part in line.split(", ") {
            let sound = part.ends_with('"') && part.contains("=\"");
            assert!(sound, "not a match or assignment: {part}");
        }
    }
    assert!(rule.contains("LABEL=\"braidfs_end\""));
    env.need_tools(&["udevadm"])?;
    env.need_loop_devices()?;
    let (volume, loops) = on_loop_devices(env, "v", "udev");
    let rules = env.mkdir("rules.d");
    fs::write(rules.join("64-braidfs.rules"), rule).expect("the rule");
    fs::create_dir_all("/run/udev/rules.d").expect("udev's folder");
    let bind = Cmd::new("mount").arg("--bind").arg(&rules);
    bind.arg("/run/udev/rules.d").ok();
    let node = loops[0].path.file_name().expect("a name").to_string_lossy();
    let test = Cmd::new("udevadm").args(["test", &format!("/sys/class/block/{node}")]);
    let text = test.ok().text();
    assert!(
        text.contains(&format!("disk/by-uuid/{}", volume.uuid())),
        "{text}"
    );
    assert!(text.contains("disk/by-label/udev"), "{text}");
    Ok(())
}

/// A socket that plays the service manager.
struct Listener {
    socket: UnixDatagram,
    heard: String,
}

impl Listener {
    fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("a socket");
        socket.set_nonblocking(true).expect("a socket's flag");
        let heard = String::new();
        Self { socket, heard }
    }

    fn has_heard(&mut self, line: &str) -> bool {
        let mut buffer = [0; 4096];
        while let Ok(len) = self.socket.recv(&mut buffer) {
            self.heard
                .push_str(&String::from_utf8_lossy(&buffer[..len]));
            self.heard.push('\n');
        }
        self.heard.lines().any(|heard| heard.starts_with(line))
    }
}

fn service_manager(env: &Env) -> Outcome {
    let machine = Machine::set_up(env)?;
    let volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let target = name(&volume.mountpoint);
    let source = joined(&volume.devices);
    machine.write_fstab(&[format!("{source} {target} braidfs noauto 0 0")]);
    let path = env.path("notify");
    let mut listener = Listener::new(&path);
    // As the unit starts it.
    let start = || {
        let command = env.braidfs().env("NOTIFY_SOCKET", &path);
        command.args(["mount", "--foreground", "-o", "device_wait=60", &target])
    };
    let away = env.path("away");
    fs::rename(&volume.devices[1], &away).expect("take a member away");
    let running = start().spawn();
    std::thread::sleep(Duration::from_millis(700));
    assert!(!listener.has_heard("READY=1"), "ready without a member");
    fs::rename(&away, &volume.devices[1]).expect("bring the member back");
    wait_until("READY=1", || listener.has_heard("READY=1"));
    assert!(volume.is_mount_point(), "ready before it is mounted");
    assert!(
        listener.has_heard("STATUS=mounted on"),
        "{}",
        listener.heard
    );
    fs::write(volume.path("file"), "text").expect("write to the volume");
    assert!(!listener.has_heard("STOPPING=1"));
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).expect("stop it");
    let output = running.wait();
    assert!(output.status.success(), "{}", output.describe());
    assert!(listener.has_heard("STOPPING=1"), "{}", listener.heard);
    assert!(
        listener.has_heard("EXTEND_TIMEOUT_USEC="),
        "{}",
        listener.heard
    );
    assert!(!volume.is_mount_point());
    // What cannot be mounted is never ready.
    listener.heard.clear();
    fs::rename(&volume.devices[1], &away).expect("take a member away");
    start().args(["-o", "device_wait=0"]).exits(32);
    assert!(!listener.has_heard("READY=1"));
    fs::rename(&away, &volume.devices[1]).expect("bring the member back");
    // A background daemon is not what the manager of its caller waits for.
    let background = env.braidfs().env("NOTIFY_SOCKET", &path);
    background.args(["mount", &target]).ok();
    env.braidfs().args(["umount", &target]).ok();
    assert!(!listener.has_heard(""), "{}", listener.heard);
    // A socket that is gone does not matter.
    fs::remove_file(&path).expect("remove the socket");
    let running = start().spawn();
    wait_until("mounted", || volume.is_mount_point());
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).expect("stop it");
    let output = running.wait();
    assert!(output.status.success(), "{}", output.describe());
    Ok(())
}

fn stop_waits(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[512 * MIB; 2], &[]);
    let data = vec![7; 400 << 20];
    let mut command = env
        .braidfs()
        .args(["mount", "--foreground", "-o", "commit=300"]);
    command = command.args(&volume.devices).arg(&volume.mountpoint);
    let running = command.limit_secs(100).spawn();
    wait_until("mounted", || volume.is_mount_point());
    fs::write(volume.path("file"), &data).expect("write to the volume");
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).expect("stop it");
    let output = running.wait();
    assert!(output.status.success(), "{}", output.describe());
    // Nothing is left to somebody else: a copy of what the devices hold now is whole.
    volume.fsck_clean();
    volume.mount(&["ro"]);
    let back = fs::read(volume.path("file")).expect("read it back");
    assert!(back == data, "data was lost");
    volume.umount();
    Ok(())
}
