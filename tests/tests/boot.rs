//! Mounting as an administrator does it: mount(8), fstab, tags, users' mounts; and what devices
//! tell.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use braidfs_tests::command::{Cmd, wait_until};
use braidfs_tests::daemon;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::loopdev::{LoopDevice, on_loop_devices};
use braidfs_tests::machine::Machine;
use braidfs_tests::report::{list, number};
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, joined, json, name};

const MEMBER_BYTES: u64 = 128 * MIB;

fn main() -> ExitCode {
    runner::main(
        "boot",
        &[
            Test::new("mount_8_finds_the_helper", 60, mount_8),
            Test::new("fstab_with_a_list_of_devices", 60, fstab_list),
            Test::new("fstab_with_uuid_and_label", 60, fstab_tags),
            Test::new("tags_find_devices_without_udev", 60, tags_alone),
            Test::new("tags_find_images_in_directories", 60, tags_search),
            Test::new("a_label_that_two_have_names_neither", 60, ambiguous_label),
            Test::new("members_are_found_among_block_devices", 60, mixed_members),
            Test::new("members_that_come_late_are_waited_for", 60, late_member),
            Test::new("nofail_excuses_what_is_not_there", 60, nofail),
            Test::new("flags_of_mount_8", 60, flags),
            Test::new("another_mount_namespace", 60, namespace),
            Test::new("the_mount_point_alone_is_looked_up_in_fstab", 60, by_fstab),
            Test::new("users_mount_what_fstab_allows", 60, user_mount),
            Test::new("probe_for_udev_and_programs", 60, probe),
            Test::new("probe_gives_nothing_away_but_labels", 60, probe_nothing),
        ],
    )
}

/// `mount` with the type told.
fn mount(source: &str, target: &Path) -> Cmd {
    Cmd::new("mount")
        .args(["-t", "braidfs", source])
        .arg(target)
}

/// umount(8), and the end of the daemon.
fn umount(volume: &Volume<'_>) {
    Cmd::new("umount").arg(&volume.mountpoint).ok();
    assert!(!volume.is_mount_point());
    let alive = || volume.daemon().is_alive();
    wait_until("the daemon's end", || !alive());
}

/// What the mount table says of a mount point.
fn findmnt(column: &str, target: &Path) -> String {
    let command = Cmd::new("findmnt").args(["-n", "-o", column]);
    command.arg(target).ok().stdout.trim().to_owned()
}

/// With the helper where mount(8) looks, `mount -t` and `umount` work.
fn mount_8(env: &Env) -> Outcome {
    let _machine = Machine::set_up(env)?;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let word = joined(&volume.devices);
    for kind in ["braidfs", "fuse.braidfs"] {
        let mount = Cmd::new("mount").args(["-t", kind, "-o", "noatime,nosuid,nodev", &word]);
        mount.arg(&volume.mountpoint).ok();
        volume.adopt();
        fs::write(volume.path(kind), kind).expect("write to the volume");
        umount(&volume);
    }
    volume.mount(&["ro"]);
    let text = fs::read_to_string(volume.path("fuse.braidfs")).expect("read");
    assert_eq!(text, "fuse.braidfs");
    volume.umount();
    Ok(())
}

fn fstab_list(env: &Env) -> Outcome {
    let machine = Machine::set_up(env)?;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let (source, target) = (joined(&volume.devices), name(&volume.mountpoint));
    let options = "rw,noatime,commit=3,_netdev,x-systemd.automount,x-mine=1";
    machine.write_fstab(&[
        "# a comment".to_owned(),
        format!("{source} {target} braidfs {options} 0 0"),
    ]);
    // One by one, and what is mounted already is not mounted again.
    Cmd::new("mount").arg(&target).ok();
    volume.adopt();
    let daemon = volume.daemon();
    Cmd::new("mount").arg("-a").ok();
    fs::write(volume.path("file"), "text").expect("write to the volume");
    assert_eq!(findmnt("SOURCE", &volume.mountpoint), source);
    assert_eq!(findmnt("FSTYPE", &volume.mountpoint), "fuse.braidfs");
    assert!(findmnt("OPTIONS", &volume.mountpoint).contains("noatime"));
    let df = Cmd::new("df").args(["-B1", "--output=source,fstype,size"]);
    let df = df.arg(&target).ok().stdout;
    assert!(df.contains(&source) && df.contains("fuse.braidfs"), "{df}");
    volume.adopt();
    assert_eq!(volume.daemon(), daemon, "mounted twice");
    umount(&volume);
    // All at once, and both kinds of type.
    for kind in ["braidfs", "fuse.braidfs"] {
        machine.write_fstab(&[format!("{source} {target} {kind} {options} 0 0")]);
        Cmd::new("mount").args(["-a", "-t", kind]).ok();
        volume.adopt();
        let text = fs::read_to_string(volume.path("file")).expect("read");
        assert_eq!(text, "text");
        Cmd::new("umount").args(["-a", "-t", "fuse.braidfs"]).ok();
        assert!(!volume.is_mount_point());
        wait_until("the daemon's end", || !volume.daemon().is_alive());
    }
    machine.write_fstab(&[format!("{source} {target} braidfs noauto 0 0")]);
    Cmd::new("mount").arg("-a").ok();
    assert!(!volume.is_mount_point(), "mounted in spite of noauto");
    Ok(())
}

/// Where udev's links are, mount(8) finds a member by itself, and we find the others.
fn fstab_tags(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let machine = Machine::set_up(env)?;
    let label = format!("boot {}", std::process::id());
    let (mut volume, loops) = on_loop_devices(env, "v", &label);
    let uuid = volume.uuid();
    let target = name(&volume.mountpoint);
    // The names that the rule takes from `probe`.
    for (key, kind) in [("ID_FS_UUID_ENC", "uuid"), ("ID_FS_LABEL_ENC", "label")] {
        let properties = env.braidfs().arg("probe").arg(&loops[1].path).ok().stdout;
        let value = value_of(&properties, key);
        machine.link_disk(kind, &value, &loops[1].path);
    }
    for source in [format!("UUID={uuid}"), format!("LABEL=\"{label}\"")] {
        let source = source.replace(' ', "\\040");
        machine.write_fstab(&[format!("{source} {target} braidfs defaults 0 0")]);
        for _ in 0..2 {
            Cmd::new("mount").arg("-a").ok();
            volume.adopt();
        }
        fs::write(volume.path("file"), &source).expect("write to the volume");
        assert_eq!(findmnt("SOURCE", &volume.mountpoint), name(&loops[1].path));
        umount(&volume);
    }
    Ok(())
}

fn value_of(lines: &str, key: &str) -> String {
    let found = lines.lines().find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name == key).then(|| value.to_owned())
    });
    found.unwrap_or_else(|| panic!("no {key} in:\n{lines}"))
}

/// Without udev mount(8) passes tags in lower case on to us; `braidfs` takes both.
fn tags_alone(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let machine = Machine::set_up(env)?;
    let label = format!("boot:{}", std::process::id());
    let (mut volume, loops) = on_loop_devices(env, "v", &label);
    let uuid = volume.uuid();
    let target = name(&volume.mountpoint);
    for source in [format!("uuid={uuid}"), format!("label={label}")] {
        machine.write_fstab(&[format!("{source} {target} braidfs defaults 0 0")]);
        for _ in 0..2 {
            Cmd::new("mount").arg("-a").ok();
            volume.adopt();
        }
        assert_eq!(findmnt("SOURCE", &volume.mountpoint), source);
        // The table does not name the devices, and yet it is known where they are mounted.
        assert_eq!(volume.info()["mounted_on"], target);
        let again = env.braidfs().arg("mkfs").args(&volume.devices).fails();
        assert!(again.stderr.contains(&target), "{}", again.describe());
        umount(&volume);
    }
    for source in [
        format!("UUID={}", uuid.to_uppercase()),
        format!("LABEL={label}"),
    ] {
        let mount = env.braidfs().arg("mount").arg(&source);
        mount.arg(&volume.mountpoint).ok();
        volume.adopt();
        let members = joined(&volume.devices);
        assert_eq!(findmnt("SOURCE", &volume.mountpoint), members);
        umount(&volume);
        env.braidfs().args(["fsck", "-n"]).arg(&source).ok();
        let info = env.braidfs().args(["info", "--json"]).arg(&source).ok();
        assert_eq!(list(&json(&info), "/devices").len(), loops.len());
    }
    let unknown = format!("UUID={}", uuid.replace(|char| char != '-', "0"));
    let mount = env.braidfs().arg("mount").arg(&unknown);
    let output = mount.arg(&volume.mountpoint).exits(32);
    assert!(output.stderr.contains(&unknown), "{}", output.describe());
    Ok(())
}

/// Image files are not looked for everywhere, but where one says.
fn tags_search(env: &Env) -> Outcome {
    let machine = Machine::set_up(env)?;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 3], &["--label", "tags_search"]);
    let (one, two) = (env.mkdir("one"), env.mkdir("two"));
    let homes = [&one, &two, &two];
    for (index, (device, home)) in volume.devices.iter_mut().zip(homes).enumerate() {
        let place = home.join(format!("{index}.img"));
        fs::rename(&*device, &place).expect("move an image");
        *device = place;
    }
    let search = format!("search={}:{}", name(&one), name(&two));
    let line = format!(
        "label=tags_search {} braidfs {search}",
        name(&volume.mountpoint)
    );
    machine.write_fstab(&[line]);
    Cmd::new("mount").arg(&volume.mountpoint).ok();
    volume.adopt();
    umount(&volume);
    let with = |options: &str, source: &str| {
        let mount = env.braidfs().args(["mount", "-o", options, source]);
        mount.arg(&volume.mountpoint)
    };
    with("ro", "LABEL=tags_search").exits(32);
    let half = format!("search={}", name(&one));
    let output = with(&half, "LABEL=tags_search").exits(32);
    assert!(output.stderr.contains("missing"), "{}", output.describe());
    // A member that was named has its fellows looked for there too.
    with(&half, &name(&volume.devices[1])).exits(0);
    volume.adopt();
    volume.umount();
    Ok(())
}

fn ambiguous_label(env: &Env) -> Outcome {
    let label = ["--label", "ambiguous"];
    let one = Volume::format(env, "one", &[MEMBER_BYTES; 2], &label);
    let two = Volume::format(env, "two", &[MEMBER_BYTES; 2], &label);
    let search = format!("search={}", name(&env.dir));
    let mount = env
        .braidfs()
        .args(["mount", "-o", &search, "LABEL=ambiguous"]);
    let output = mount.arg(&one.mountpoint).exits(32);
    for uuid in [one.uuid(), two.uuid()] {
        assert!(output.stderr.contains(&uuid), "{}", output.describe());
    }
    // Two devices that say that they are the same member name none, either.
    let copy = env.path("copy.img");
    fs::copy(&one.devices[1], &copy).expect("copy an image");
    let by_uuid = format!("UUID={}", two.uuid());
    let again = env.braidfs().args(["mount", "-o", &search, &by_uuid]);
    again.arg(&two.mountpoint).ok();
    env.braidfs().arg("umount").arg(&two.mountpoint).ok();
    fs::remove_file(&two.devices[0]).expect("remove an image");
    fs::remove_file(&two.devices[1]).expect("remove an image");
    let mount = env
        .braidfs()
        .args(["mount", "-o", &search, "LABEL=ambiguous"]);
    let output = mount.arg(&one.mountpoint).exits(32);
    assert!(output.stderr.contains("copy.img"), "{}", output.describe());
    Ok(())
}

/// One member is an image, the other a block device.
fn mixed_members(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let mut volume = Volume::unformatted(env, "v", &[MEMBER_BYTES; 2]);
    let hidden = env.mkdir("hidden").join("member");
    fs::rename(&volume.devices[1], &hidden).expect("move an image");
    let device = LoopDevice::attach(&hidden);
    volume.devices[1] = device.path.clone();
    env.braidfs().arg("mkfs").args(&volume.devices).ok();
    let mount = env.braidfs().arg("mount").arg(&volume.devices[0]);
    mount.arg(&volume.mountpoint).ok();
    volume.adopt();
    volume.umount();
    Ok(())
}

fn late_member(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let (home, away) = (volume.devices[1].clone(), env.mkdir("away").join("member"));
    fs::rename(&home, &away).expect("take a member away");
    // The time is over without it.
    let begun = Instant::now();
    let wait = |seconds: &str| {
        let options = format!("device_wait={seconds}");
        let mount = env.braidfs().args(["mount", "-o", &options]);
        mount.arg(&volume.devices[0]).arg(&volume.mountpoint)
    };
    wait("1").exits(32);
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let mut waiting = wait("30").spawn();
    std::thread::sleep(Duration::from_millis(700));
    assert!(waiting.is_running(), "{}", waiting.text_so_far());
    fs::rename(&away, &home).expect("bring the member back");
    let output = waiting.wait();
    assert!(output.status.success(), "{}", output.describe());
    volume.adopt();
    volume.umount();
    Ok(())
}

fn nofail(env: &Env) -> Outcome {
    let machine = Machine::set_up(env)?;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let target = name(&volume.mountpoint);
    let none = env.path("none.img");
    let tag = "uuid=00000000-0000-4000-8000-000000000000";
    for source in [format!("{}:{}", name(&none), name(&none)), tag.to_owned()] {
        machine.write_fstab(&[format!("{source} {target} braidfs nofail 0 0")]);
        let output = Cmd::new("mount").arg("-a").ok();
        assert_eq!(output.text().trim(), "");
        assert!(!volume.is_mount_point());
        // Said on request.
        let output = mount(&source, &volume.mountpoint)
            .args(["-v", "-o", "nofail"])
            .ok();
        assert!(output.stderr.contains("nofail"), "{}", output.describe());
        mount(&source, &volume.mountpoint).exits(32);
    }
    // A part of it: excused, but said.
    let away = env.mkdir("away").join("member");
    fs::rename(&volume.devices[1], &away).expect("take a member away");
    let source = name(&volume.devices[0]);
    let output = mount(&source, &volume.mountpoint)
        .args(["-o", "nofail"])
        .ok();
    assert!(
        output.stderr.contains("member number 1 of 2"),
        "{}",
        output.describe()
    );
    assert!(!volume.is_mount_point());
    mount(&source, &volume.mountpoint).exits(32);
    fs::rename(&away, &volume.devices[1]).expect("bring the member back");
    // What is there and cannot be mounted is not excused.
    fs::write(&none, vec![1; 1 << 20]).expect("a file without a label");
    mount(&name(&none), &volume.mountpoint)
        .args(["-o", "nofail"])
        .exits(32);
    machine.write_fstab(&[format!(
        "{} {target} braidfs nofail 0 0",
        joined(&volume.devices)
    )]);
    Cmd::new("mount").arg("-a").ok();
    volume.adopt();
    volume.umount();
    Ok(())
}

fn flags(env: &Env) -> Outcome {
    let _machine = Machine::set_up(env)?;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let source = joined(&volume.devices);
    let target = volume.mountpoint.clone();
    let with = |flags: &[&str]| mount(&source, &target).args(flags);
    // -f: all checks, no mount.
    with(&["-f"]).exits(0);
    assert!(!volume.is_mount_point());
    with(&["-f", "-o", "commit=soon"]).exits(1);
    mount(&name(&env.path("none")), &target).arg("-f").exits(32);
    with(&["-f", "-o", "unknown_option"]).exits(1);
    // -s: what is not known is passed over; -n does nothing; -v says what was done.
    let output = with(&["-s", "-n", "-v", "-o", "unknown_option"]).exits(0);
    assert!(
        output.stderr.contains("mounted on"),
        "{}",
        output.describe()
    );
    volume.adopt();
    // What is mounted is not mounted once more.
    let output = with(&[]).exits(32);
    assert!(
        output.stderr.contains(&name(&target)),
        "{}",
        output.describe()
    );
    Cmd::new("umount").args(["-n", "-v"]).arg(&target).ok();
    assert!(!volume.is_mount_point());
    let gone = volume.daemon();
    wait_until("the daemon's end", || !gone.is_alive());
    Cmd::new("umount").arg(&target).exits(32);
    // mount(8) makes the directory.
    let made = env.path("made");
    mount(&source, &made)
        .args(["-o", "X-mount.mkdir=0700"])
        .ok();
    Cmd::new("umount").arg(&made).ok();
    Ok(())
}

fn namespace(env: &Env) -> Outcome {
    let _machine = Machine::set_up(env)?;
    env.need_tools(&["unshare", "nsenter"])?;
    let volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let ready = env.path("ready");
    let script = "touch \"$1\"; exec sleep 50";
    let other = Cmd::new("unshare")
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(&ready);
    let other = other.spawn();
    wait_until("the other namespace", || ready.exists());
    let pid = other.pid().to_string();
    let within = |words: &[&str]| {
        let nsenter = Cmd::new("nsenter").args(["--mount", "--target", &pid]);
        nsenter.args(words).arg(&volume.mountpoint)
    };
    mount(&joined(&volume.devices), &volume.mountpoint)
        .args(["-N", &pid])
        .ok();
    assert!(!volume.is_mount_point(), "mounted in this namespace");
    within(&["mountpoint"]).ok();
    within(&["findmnt", "-t", "fuse.braidfs"]).ok();
    Cmd::new("umount")
        .args(["-N", &pid])
        .arg(&volume.mountpoint)
        .ok();
    within(&["mountpoint", "-q"]).exits(32);
    volume.fsck_clean();
    Ok(())
}

fn by_fstab(env: &Env) -> Outcome {
    let machine = Machine::set_up(env)?;
    let mut volume = Volume::format(env, "v", &[MEMBER_BYTES; 2], &[]);
    let target = name(&volume.mountpoint);
    let source = joined(&volume.devices);
    let other = env.mkdir("other");
    machine.write_fstab(&[
        format!("tmpfs {} tmpfs defaults 0 0", name(&other)),
        format!("{source} {target} braidfs noauto,noatime 0 0"),
    ]);
    env.braidfs().args(["mount", "-o", "nosuid", &target]).ok();
    volume.adopt();
    let options = findmnt("OPTIONS", &volume.mountpoint);
    assert!(
        options.contains("noatime") && options.contains("nosuid"),
        "{options}"
    );
    volume.umount();
    let output = env.braidfs().arg("mount").arg(&other).exits(1);
    assert!(
        output.stderr.contains("/etc/fstab"),
        "{}",
        output.describe()
    );
    Ok(())
}

/// mount(8) lets a user mount what fstab allows, with the user's own rights: fusermount3 does it.
fn user_mount(env: &Env) -> Outcome {
    env.need_tools(&["setpriv", "fusermount3"])?;
    let machine = Machine::set_up(env)?;
    let node = env.path("fuse-node");
    let script = "mknod -m 666 \"$1\" c 10 229; mount --bind \"$1\" /dev/fuse";
    Cmd::sh(script, [&node]).ok();
    Cmd::new("chmod").arg("711").arg(&env.dir).ok();
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES; 2]);
    let run = env.mkdir("run");
    // The helpers lead to the program, and the user must be able to start it.
    let bin = env.path("braidfs");
    fs::copy(&env.bin, &bin).expect("copy the program");
    Cmd::new("mount").arg("--bind").arg(&bin).arg(&env.bin).ok();
    for folder in env.bin.ancestors().skip(1) {
        let reached = user(&run, "65534").args(["test", "-x"]).arg(folder).run();
        if !reached.status.success() {
            let place = folder.display();
            return Err(braidfs_tests::env::Skip(format!(
                "{place} is closed to ordinary users"
            )));
        }
    }
    let owned = volume.devices.iter().chain([&volume.mountpoint, &run]);
    Cmd::new("chown").arg("65534:65534").args(owned).ok();
    let (source, target) = (joined(&volume.devices), name(&volume.mountpoint));
    machine.write_fstab(&[format!("{source} {target} braidfs user,noauto,noatime 0 0")]);
    user(&run, "65534")
        .arg(&bin)
        .arg("mkfs")
        .args(&volume.devices)
        .ok();
    user(&run, "65534").arg("mount").arg(&target).ok();
    assert!(volume.is_mount_point(), "not mounted");
    let options = findmnt("OPTIONS", &volume.mountpoint);
    for word in ["nosuid", "nodev", "noexec", "noatime", "user_id=65534"] {
        assert!(options.contains(word), "no {word}: {options}");
    }
    let script = "echo text >\"$1/file\"; cat \"$1/file\"; stat -c %u \"$1/file\"";
    let shell = user(&run, "65534").args(["sh", "-euc", script, "sh", &target]);
    assert_eq!(shell.ok().stdout, "text\n65534\n");
    // Others neither mount nor unmount it.
    user(&run, "65533").arg("umount").arg(&target).fails();
    assert!(volume.is_mount_point(), "unmounted by somebody else");
    user(&run, "65534").arg("umount").arg(&target).ok();
    assert!(!volume.is_mount_point());
    wait_until("the daemon's end", || {
        daemon::processes_naming(&volume.mountpoint).is_empty()
    });
    // It is the user's own rights that count.
    Cmd::new("chown").arg("0:0").args(&volume.devices).ok();
    Cmd::new("chmod").arg("600").args(&volume.devices).ok();
    let denied = user(&run, "65534").arg("mount").arg(&target).exits(32);
    assert!(denied.stderr.contains("v0.img"), "{}", denied.describe());
    assert!(!volume.is_mount_point());
    Ok(())
}

/// A command of an ordinary user.
fn user(run: &Path, id: &str) -> Cmd {
    let ids = [format!("--reuid={id}"), format!("--regid={id}")];
    let setpriv = Cmd::new("setpriv").env("XDG_RUNTIME_DIR", run).args(ids);
    setpriv.arg("--clear-groups").arg("--")
}

fn probe(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let label = format!("it's {} $HOME/x\\y", std::process::id());
    let (volume, loops) = on_loop_devices(env, "v", &label);
    let uuid = volume.uuid();
    let probe = |args: &[&str]| env.braidfs().arg("probe").args(args);
    let text = probe(&[&name(&loops[1].path)]).ok().stdout;
    assert_eq!(value_of(&text, "ID_FS_TYPE"), "braidfs");
    assert_eq!(value_of(&text, "ID_FS_USAGE"), "filesystem");
    assert_eq!(value_of(&text, "ID_FS_UUID"), uuid);
    assert_eq!(value_of(&text, "ID_FS_UUID_ENC"), uuid);
    let pid = std::process::id();
    assert_eq!(
        value_of(&text, "ID_FS_LABEL"),
        format!("it_s_{pid}__HOME/x_y")
    );
    let encoded = format!("it\\x27s\\x20{pid}\\x20\\x24HOME\\x2fx\\x5cy");
    assert_eq!(value_of(&text, "ID_FS_LABEL_ENC"), encoded);
    assert_eq!(value_of(&text, "ID_BRAIDFS_MEMBER"), "1");
    assert_eq!(value_of(&text, "ID_BRAIDFS_MEMBERS"), "2");
    assert!(
        !text.contains("READY") && !text.contains("DEVNAME"),
        "{text}"
    );
    let info = volume.info();
    let own = info["devices"][1]["device_uuid"].as_str().expect("a UUID");
    assert_eq!(value_of(&text, "ID_FS_UUID_SUB"), own);
    // The form that a shell can read, of all devices.
    let script = "eval \"$(\"$1\" probe --output export \"$2\" | grep -v ^DEVNAME=)\"; \
                  printf '%s\\n' \"$TYPE\" \"$UUID\" \"$LABEL\"";
    let shell = Cmd::sh(script, [&env.bin, &loops[0].path]).ok().stdout;
    assert_eq!(shell, format!("braidfs\n{uuid}\n{label}\n"));
    let all = probe(&["-o", "export"]).ok().stdout;
    for device in &loops {
        assert!(
            all.contains(&format!("DEVNAME={}\n", name(&device.path))),
            "{all}"
        );
    }
    let two = json(&probe(&["--json", "--ready"]).args(&volume.devices).ok());
    assert_eq!(list(&two, "/devices").len(), 2);
    assert_eq!(two["devices"][0]["label"], label);
    assert_eq!(two["devices"][1]["ready"], true);
    assert_eq!(number(&two, "/devices/1/device_index"), 1);
    // A member that is alone is not ready.
    let mut loops = loops;
    drop(loops.pop());
    let text = probe(&["--ready", &name(&loops[0].path)]).ok().stdout;
    assert_eq!(value_of(&text, "ID_BRAIDFS_READY"), "0");
    Ok(())
}

fn probe_nothing(env: &Env) -> Outcome {
    env.need_tools(&["mkfs.ext4"])?;
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES]);
    let image = &volume.devices[0];
    let probe = |path: &Path| env.braidfs().arg("probe").arg(path);
    for _ in 0..2 {
        // Zeros, then somebody else's file system: nothing to talk about.
        let output = probe(image).exits(2);
        assert_eq!(output.text().trim(), "", "{}", output.describe());
        Cmd::new("mkfs.ext4").arg("-q").arg(image).ok();
    }
    let output = probe(&env.path("none")).exits(2);
    assert!(output.stderr.contains("none"), "{}", output.describe());
    env.braidfs().args(["probe", "--no-such-option"]).exits(4);
    env.braidfs().args(["probe", "--output=other"]).exits(4);
    env.braidfs().args(["probe", ""]).exits(4);
    Ok(())
}
