//! `braidfs doctor`: each weakness is provoked, and found; where a command is said to mend it, the
//! command is run, and it is found no more.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::loopdev::LoopDevice;
use braidfs_tests::report::list;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{GIB, MIB, Volume, json, name, sparse_image};
use serde_json::Value;

const MEMBER_BYTES: u64 = 128 * MIB;

fn main() -> ExitCode {
    runner::main(
        "doctor",
        &[
            Test::new("nothing_to_complain_about", 60, healthy),
            Test::new("members_on_one_disk", 60, same_disk),
            Test::new("a_single_member", 60, alone),
            Test::new("members_of_different_size", 60, unequal),
            Test::new("images_that_outgrow_their_host", 60, host_full),
            Test::new("hosts_that_refuse_o_direct", 60, no_direct),
            Test::new("loop_devices_that_cache", 60, loop_cached),
            Test::new("write_protected_members", 60, protected),
            Test::new("members_that_are_missing", 60, missing),
            Test::new("a_volume_that_was_not_closed", 60, unclean),
            Test::new("a_mount_whose_daemon_is_gone", 60, dead),
            Test::new("devices_that_are_driven_slowly", 60, backend),
            Test::new("a_short_readahead", 60, read_ahead),
            Test::new("a_volume_that_is_nearly_full", 60, full),
            Test::new("little_memory_to_lock", 60, locked_memory),
            Test::new("damage_that_a_scrub_left", 60, damage),
        ],
    )
}

/// What is found at a mount point or on devices; the exit code tells whether anything is.
fn findings<P: AsRef<Path>>(env: &Env, places: &[P]) -> Vec<Value> {
    let places: Vec<PathBuf> = places.iter().map(|place| place.as_ref().into()).collect();
    let output = env.braidfs().args(["doctor", "--json"]).args(&places).run();
    let found = list(&json(&output), "/findings").to_vec();
    let code = if found.is_empty() { 0 } else { 4 };
    assert_eq!(output.status.code(), Some(code), "{}", output.describe());
    // The same in words.
    let text = env
        .braidfs()
        .arg("doctor")
        .args(&places)
        .quiet()
        .run()
        .stdout;
    for finding in &found {
        for part in ["check", "about", "mend"] {
            let part = finding[part].as_str().expect("a text");
            assert!(!part.is_empty() && text.contains(part), "no {part}: {text}");
        }
    }
    found
}

fn named<'v>(found: &'v [Value], check: &str) -> Option<&'v Value> {
    found.iter().find(|finding| finding["check"] == check)
}

/// The finding of this name, which must be there.
fn finding(found: &[Value], check: &str) -> Value {
    let finding = named(found, check);
    finding
        .unwrap_or_else(|| panic!("no {check}: {found:#?}"))
        .clone()
}

/// Runs the command that mends it.
fn mend(finding: &Value) {
    let command = finding["mend"].as_str().expect("a command");
    Cmd::sh(command, [""; 0]).ok();
}

/// A file system of its own, on a disk of its own as far as anybody can tell.
fn disk(env: &Env, stem: &str, bytes: u64) -> (PathBuf, LoopDevice) {
    let memory = env.mkdir(&format!("{stem}.memory"));
    Cmd::new("mount")
        .args(["-t", "tmpfs", "tmpfs"])
        .arg(&memory)
        .ok();
    let image = memory.join("image");
    sparse_image(&image, bytes);
    let device = LoopDevice::attach(&image);
    Cmd::new("mkfs.ext4").arg("-q").arg(&device.path).ok();
    let folder = env.mkdir(&format!("{stem}.disk"));
    Cmd::new("mount").arg(&device.path).arg(&folder).ok();
    (folder, device)
}

fn healthy(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    env.need_tools(&["mkfs.ext4"])?;
    let disks = ["a", "b"].map(|stem| disk(env, stem, GIB));
    let devices: Vec<PathBuf> = disks.iter().map(|(disk, _)| disk.join("member")).collect();
    devices
        .iter()
        .for_each(|device| sparse_image(device, MEMBER_BYTES));
    env.braidfs().arg("mkfs").args(&devices).ok();
    let mut volume = Volume::on(env, "v", devices);
    assert_eq!(findings(env, &volume.devices), [Value::Null; 0]);
    volume.mount(&[]);
    assert_eq!(findings(env, &[&volume.mountpoint]), [Value::Null; 0]);
    volume.umount();
    for (disk, _) in &disks {
        Cmd::new("umount").arg(disk).ok();
    }
    Ok(())
}

fn same_disk(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let found = finding(&findings(env, &volume.devices), "same-disk");
    for device in &volume.devices {
        assert!(
            found["about"]
                .as_str()
                .expect("a text")
                .contains(&name(device))
        );
    }
    // Loop devices hide nothing.
    let loops = volume.devices.iter().map(|image| LoopDevice::attach(image));
    let loops: Vec<LoopDevice> = loops.collect();
    let devices: Vec<PathBuf> = loops.iter().map(|device| device.path.clone()).collect();
    finding(&findings(env, &devices), "same-disk");
    Ok(())
}

fn alone(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    let found = findings(env, &volume.devices);
    finding(&found, "alone");
    assert!(named(&found, "same-disk").is_none(), "{found:#?}");
    Ok(())
}

fn unequal(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES, 2 * MEMBER_BYTES], &[]);
    let found = finding(&findings(env, &volume.devices), "unequal");
    assert_eq!(found["about"], name(&volume.devices[1]));
    assert_eq!(found["effect"], "slows");
    Ok(())
}

/// On tmpfs, which is volatile besides.
fn host_full(env: &Env) -> Outcome {
    let host = env.mkdir("host");
    let mount = Cmd::new("mount").args(["-t", "tmpfs", "-o", "size=96M", "tmpfs"]);
    mount.arg(&host).ok();
    let devices = vec![host.join("0"), host.join("1")];
    let mkfs = env.braidfs().args(["mkfs", "--size", "64M"]);
    mkfs.args(&devices).ok();
    let found = findings(env, &devices);
    assert_eq!(finding(&found, "host-full")["effect"], "weakens");
    finding(&found, "volatile");
    Cmd::new("mount")
        .args(["-o", "remount,size=1G"])
        .arg(&host)
        .ok();
    let found = findings(env, &devices);
    assert!(named(&found, "host-full").is_none(), "{found:#?}");
    Ok(())
}

fn no_direct(env: &Env) -> Outcome {
    let host = env.mkdir("host");
    let mount = Cmd::new("mount").args(["-t", "ramfs", "ramfs"]);
    mount.arg(&host).ok();
    let devices = vec![host.join("0"), host.join("1")];
    let mkfs = env.braidfs().args(["mkfs", "--size", "64M"]);
    mkfs.args(&devices).ok();
    let found = findings(env, &devices);
    finding(&found, "volatile");
    let refused = found.iter().filter(|found| found["check"] == "no-direct");
    let refused: Vec<&Value> = refused.map(|found| &found["about"]).collect();
    assert_eq!(refused, [&name(&devices[0]), &name(&devices[1])]);
    Ok(())
}

fn loop_cached(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    let device = LoopDevice::attach(&volume.devices[0]);
    let places = [&device.path];
    let found = findings(env, &places);
    assert!(named(&found, "loop-cached").is_none(), "{found:#?}");
    Cmd::new("losetup")
        .arg("--direct-io=off")
        .arg(&device.path)
        .ok();
    mend(&finding(&findings(env, &places), "loop-cached"));
    let found = findings(env, &places);
    assert!(named(&found, "loop-cached").is_none(), "{found:#?}");
    Ok(())
}

fn protected(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let volume = Volume::format(env, "v", &[MEMBER_BYTES], &[]);
    let device = LoopDevice::attach(&volume.devices[0]);
    Cmd::new("blockdev").arg("--setro").arg(&device.path).ok();
    let places = [&device.path];
    mend(&finding(&findings(env, &places), "write-protected"));
    let found = findings(env, &places);
    assert!(named(&found, "write-protected").is_none(), "{found:#?}");
    Ok(())
}

fn missing(env: &Env) -> Outcome {
    let volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &[]);
    fs::remove_file(&volume.devices[1]).expect("lose a member");
    let found = finding(&findings(env, &volume.devices[..1]), "missing");
    let seen = found["seen"].as_str().expect("a text");
    assert!(seen.contains("member number 1 is missing"), "{seen}");
    Ok(())
}

fn unclean(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    volume.kill_daemon();
    let found = finding(&findings(env, &volume.devices), "unclean");
    let mend = found["mend"].as_str().expect("a command");
    assert!(mend.starts_with("braidfs mount "), "{mend}");
    volume.mount(&[]);
    volume.umount();
    let found = findings(env, &volume.devices);
    assert!(named(&found, "unclean").is_none(), "{found:#?}");
    Ok(())
}

fn dead(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    volume.kill_daemon_only();
    finding(&findings(env, &[&volume.mountpoint]), "dead");
    volume.detach();
    Ok(())
}

fn backend(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    for (option, check) in [("backend=threads", "threads"), ("nodirect", "cached")] {
        volume.mount(&[option]);
        finding(&findings(env, &[&volume.mountpoint]), check);
        volume.umount();
    }
    Ok(())
}

fn read_ahead(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&["writeback_cache"]);
    let places = [&volume.mountpoint];
    let found = findings(env, &places);
    assert!(named(&found, "read-ahead").is_none(), "{found:#?}");
    let number = Cmd::new("mountpoint").arg("-d").arg(places[0]).ok().stdout;
    let path = format!("/sys/class/bdi/{}/read_ahead_kb", number.trim());
    fs::write(path, "128").expect("shorten the readahead");
    mend(&finding(&findings(env, &places), "read-ahead"));
    let found = findings(env, &places);
    assert!(named(&found, "read-ahead").is_none(), "{found:#?}");
    volume.umount();
    Ok(())
}

fn full(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    let places = [volume.mountpoint.clone()];
    let found = findings(env, &places);
    assert!(named(&found, "full").is_none(), "{found:#?}");
    let mut file = File::create(volume.path("fill")).expect("create a file");
    while std::io::Write::write_all(&mut file, &[1; 1 << 20]).is_ok() {}
    finding(&findings(env, &places), "full");
    drop(file);
    fs::remove_file(volume.path("fill")).expect("remove the file");
    wait_until("room again", || {
        named(&findings(env, &places), "full").is_none()
    });
    volume.umount();
    Ok(())
}

fn locked_memory(env: &Env) -> Outcome {
    env.need_tools(&["setpriv", "fusermount3", "prlimit"])?;
    let node = env.path("fuse-node");
    let script = "mknod -m 666 \"$1\" c 10 229; mount --bind \"$1\" /dev/fuse";
    Cmd::sh(script, [&node]).ok();
    Cmd::new("chmod").arg("711").arg(&env.dir).ok();
    let (bin, run) = (env.path("braidfs"), env.mkdir("run"));
    fs::copy(&env.bin, &bin).expect("copy the program");
    let volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let owned = volume.devices.iter().chain([&volume.mountpoint, &run]);
    Cmd::new("chown").arg("65534:65534").args(owned).ok();
    let limited = |program: &[&str]| {
        let prlimit = Cmd::new("prlimit").env("XDG_RUNTIME_DIR", &run);
        prlimit.arg("--memlock=65536").args(program).arg(&bin)
    };
    let user: &[&str] = &[
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    // Root is not limited.
    for (who, slow) in [(user, true), (&[], false)] {
        let mount = limited(who).args(["mount", "-o", "cache_size=64M"]);
        mount.args(&volume.devices).arg(&volume.mountpoint).ok();
        let doctor = limited(who)
            .args(["doctor", "--json"])
            .arg(&volume.mountpoint);
        let found = list(&json(&doctor.run()), "/findings").to_vec();
        assert_eq!(named(&found, "locked-memory").is_some(), slow, "{found:#?}");
        limited(who).arg("umount").arg(&volume.mountpoint).ok();
    }
    Ok(())
}

fn damage(env: &Env) -> Outcome {
    use std::os::unix::fs::FileExt;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    volume.mount(&[]);
    let pattern = [0x5a; 4096];
    fs::write(volume.path("file"), pattern.repeat(2048)).expect("write a file");
    volume.umount();
    // Some of the file's bytes go wrong on the device.
    let image = fs::read(&volume.devices[1]).expect("read an image");
    let block = image.chunks(4096).position(|block| block == pattern);
    let at = block.expect("a block of the file") as u64 * 4096;
    let file = File::options().write(true).open(&volume.devices[1]);
    let file = file.expect("open an image");
    file.write_all_at(&[0; 512], at).expect("damage a block");
    volume.mount(&[]);
    let found = findings(env, &[&volume.mountpoint]);
    assert!(named(&found, "damage").is_none(), "{found:#?}");
    let scrub = env.braidfs().arg("scrub").arg(&volume.mountpoint).fails();
    assert_eq!(scrub.status.code(), Some(4), "{}", scrub.describe());
    finding(&findings(env, &[&volume.mountpoint]), "damage");
    fs::remove_file(volume.path("file")).expect("remove the file");
    volume.umount();
    Ok(())
}
