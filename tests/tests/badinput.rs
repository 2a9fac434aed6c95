//! Bad input is refused: the message names the device or the option, the exit code is not zero,
//! and nothing has changed on any device.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use braidfs_tests::command::{Cmd, Output};
use braidfs_tests::compare::data_runs;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::loopdev::LoopDevice;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{MIB, Volume, name, sparse_image};
use nix::fcntl::{Flock, FlockArg};

const MEMBER_BYTES: u64 = 128 * MIB;
/// Where a label's two copies lie on a member.
const LABEL_COPIES: [u64; 2] = [0, 512 << 10];

fn main() -> ExitCode {
    runner::main(
        "badinput",
        &[
            Test::new("mkfs_on_a_mounted_member", 60, mkfs_mounted_member),
            Test::new(
                "mkfs_on_a_mounted_block_device",
                60,
                mkfs_mounted_block_device,
            ),
            Test::new("mkfs_on_a_device_in_use", 60, mkfs_in_use),
            Test::new("mkfs_on_a_device_too_small", 60, mkfs_too_small),
            Test::new("mkfs_on_a_read_only_device", 60, mkfs_read_only),
            Test::new("mkfs_over_another_file_system", 90, mkfs_over_another),
            Test::new("mkfs_on_what_is_no_device", 60, mkfs_no_device),
            Test::new("mkfs_with_impossible_values", 60, mkfs_impossible_values),
            Test::new("mount_with_a_device_missing", 60, mount_missing),
            Test::new("mount_with_a_device_twice", 60, mount_twice),
            Test::new("mount_with_a_foreign_device", 60, mount_foreign),
            Test::new("mount_with_a_device_of_another_generation", 60, mount_stale),
            Test::new("mount_with_a_truncated_device", 60, mount_truncated),
            Test::new("mount_with_both_label_copies_damaged", 60, mount_label_gone),
            Test::new("mount_with_one_label_copy_damaged", 60, mount_label_damaged),
            Test::new("mount_of_something_else", 60, mount_something_else),
            Test::new("mount_with_bad_options", 60, mount_bad_options),
            Test::new("mount_on_a_bad_mount_point", 60, mount_bad_mount_point),
            Test::new("a_second_mount_of_a_mounted_volume", 60, second_mount),
            Test::new("umount_of_a_busy_mount", 60, umount_busy),
            Test::new("umount_of_what_is_not_mounted", 60, umount_not_mounted),
        ],
    )
}

/// A digest of a file's length, layout and bytes.
fn fingerprint(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    let file = File::open(path).expect("open an image");
    hasher.write_u64(file.metadata().expect("stat an image").len());
    for (start, end) in data_runs(&file).expect("runs of an image") {
        let len = usize::try_from(end - start).expect("images are small");
        let mut data = vec![0; len];
        file.read_exact_at(&mut data, start).expect("read an image");
        // A run of zeros is as good as a hole.
        if data.iter().any(|byte| *byte != 0) {
            hasher.write_u64(start);
            hasher.write(&data);
        }
    }
    hasher.finish()
}

/// Runs a command that must be refused, naming `mention`, and must change none of `files`.
fn refused(command: Cmd, mention: &str, files: &[PathBuf]) -> Output {
    let mounts = || fs::read_to_string("/proc/self/mounts").expect("the mount table");
    let digest = || {
        files
            .iter()
            .map(|file| fingerprint(file))
            .collect::<Vec<_>>()
    };
    let (mounts_before, before) = (mounts(), digest());
    let output = command.fails();
    print!("  {}", output.stderr);
    let message = output.stderr.to_lowercase();
    let panicked = output.status.code() == Some(101) || message.contains("panicked");
    assert!(
        !panicked,
        "not refused but fallen over: {}",
        output.describe()
    );
    let named = message.contains(&mention.to_lowercase());
    assert!(
        named,
        "the message does not name '{mention}': {}",
        output.describe()
    );
    assert!(
        before == digest(),
        "refused, yet a device was changed: {}",
        output.describe()
    );
    assert_eq!(
        mounts_before,
        mounts(),
        "refused, yet the mount table changed"
    );
    output
}

fn mkfs(env: &Env, devices: &[PathBuf]) -> Cmd {
    env.braidfs().arg("mkfs").args(devices)
}

/// A file on the volume that must still be there when all is well again.
fn put_witness(volume: &Volume) {
    fs::write(volume.path("witness"), vec![7; 3_000_000]).expect("write to the volume");
}

fn assert_witness(volume: &Volume) {
    let witness = fs::read(volume.path("witness")).expect("read from the volume");
    assert!(
        witness == vec![7; 3_000_000],
        "the volume's content has changed"
    );
}

/// A volume with a witness, cleanly unmounted.
fn settled<'e>(env: &'e Env, name: &str, members: usize) -> Volume<'e> {
    let mut volume = Volume::format(env, name, &vec![MEMBER_BYTES; members], &[]);
    volume.mount(&[]);
    put_witness(&volume);
    volume.umount();
    volume
}

/// Mounts what must mount, and finds the witness.
fn assert_mounts(volume: &mut Volume) -> Output {
    let output = volume.mount(&[]);
    assert_witness(volume);
    volume.umount();
    output
}

fn mkfs_mounted_member(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    volume.mount(&[]);
    let member = volume.devices[1].clone();
    // The image may change while mounted; its volume must not.
    refused(
        mkfs(env, std::slice::from_ref(&member)),
        &name(&member),
        &[],
    );
    refused(
        mkfs(env, std::slice::from_ref(&member)).arg("--force"),
        &name(&member),
        &[],
    );
    assert_witness(&volume);
    volume.umount();
    volume.fsck_clean();
    assert_mounts(&mut volume);
    Ok(())
}

fn mkfs_mounted_block_device(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    env.need_tools(&["mkfs.ext4"])?;
    let image = env.path("ext4.loop");
    sparse_image(&image, MEMBER_BYTES);
    let device = LoopDevice::attach(&image);
    Cmd::new("mkfs.ext4").arg("-q").arg(&device.path).ok();
    let target = env.mkdir("ext4.mnt");
    Cmd::new("mount").arg(&device.path).arg(&target).ok();
    fs::write(target.join("file"), "kept").expect("write to ext4");
    for force in [&[][..], &["--force"][..]] {
        let command = env.braidfs().arg("mkfs").args(force).arg(&device.path);
        refused(command, &name(&device.path), &[]);
    }
    Cmd::new("umount").arg(&target).ok();
    Cmd::new("fsck.ext4").arg("-fn").arg(&device.path).ok();
    Ok(())
}

fn mkfs_in_use(env: &Env) -> Outcome {
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES; 2]);
    let member = File::open(&volume.devices[1]).expect("open an image");
    let lock = Flock::lock(member, FlockArg::LockExclusiveNonblock).expect("lock an image");
    let taken = name(&volume.devices[1]);
    refused(mkfs(env, &volume.devices), &taken, &volume.devices);
    refused(
        mkfs(env, &volume.devices).arg("--force"),
        &taken,
        &volume.devices,
    );
    drop(lock);
    mkfs(env, &volume.devices).ok();
    Ok(())
}

fn mkfs_too_small(env: &Env) -> Outcome {
    for small in [0, 4096, MIB, 15 * MIB] {
        let volume = Volume::unformatted(env, &format!("v{small}-"), &[MEMBER_BYTES, small]);
        refused(
            mkfs(env, &volume.devices),
            &name(&volume.devices[1]),
            &volume.devices,
        );
    }
    Ok(())
}

fn mkfs_read_only(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES; 2]);
    let device = LoopDevice::attach_read_only(&volume.devices[1]);
    let members = [volume.devices[0].clone(), device.path.clone()];
    refused(mkfs(env, &members), &name(&device.path), &volume.devices);
    refused(
        mkfs(env, &members).arg("--force"),
        &name(&device.path),
        &volume.devices,
    );
    // And a file on a file system that is mounted read-only.
    let (folder, image) = (env.mkdir("frozen"), env.path("frozen/image"));
    sparse_image(&image, MEMBER_BYTES);
    Cmd::new("mount")
        .arg("--bind")
        .arg(&folder)
        .arg(&folder)
        .ok();
    Cmd::new("mount")
        .args(["-o", "remount,bind,ro"])
        .arg(&folder)
        .ok();
    let members = [volume.devices[0].clone(), image.clone()];
    refused(mkfs(env, &members), &name(&image), &members);
    Cmd::new("umount").arg(&folder).ok();
    Ok(())
}

fn mkfs_over_another(env: &Env) -> Outcome {
    env.need_tools(&["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "sfdisk"])?;
    let makers: [(&str, &[&str], &str); 6] = [
        ("mkfs.ext4", &["-q"], "ext"),
        ("mkfs.xfs", &["-q"], "xfs"),
        ("mkfs.btrfs", &["-q"], "btrfs"),
        ("mkswap", &[], "swap"),
        ("mkfs.btrfs", &["-q", "--mixed"], "btrfs"),
        (
            "sh",
            &[
                "-c",
                "echo 'label: gpt\nstart=2048' | sfdisk --quiet \"$1\"",
                "sh",
            ],
            "part",
        ),
    ];
    for (index, (program, args, kind)) in makers.into_iter().enumerate() {
        let volume = Volume::unformatted(env, &format!("v{index}-"), &[512 * MIB; 2]);
        Cmd::new(program).args(args).arg(&volume.devices[1]).ok();
        let output = refused(
            mkfs(env, &volume.devices),
            &name(&volume.devices[1]),
            &volume.devices,
        );
        let text = output.stderr.to_lowercase();
        assert!(
            text.contains(kind),
            "the message does not say that it is {kind}: {text}"
        );
        assert!(
            text.contains("--force"),
            "the message does not say what to do: {text}"
        );
        mkfs(env, &volume.devices).arg("--force").ok();
    }
    // A braidfs is another file system too.
    let volume = settled(env, "braid", 2);
    let output = refused(
        mkfs(env, &volume.devices),
        &name(&volume.devices[0]),
        &volume.devices,
    );
    assert!(
        output.stderr.to_lowercase().contains("braidfs"),
        "{}",
        output.describe()
    );
    let alone = std::slice::from_ref(&volume.devices[1]);
    refused(mkfs(env, alone), &name(&volume.devices[1]), &volume.devices);
    mkfs(env, &volume.devices).arg("--force").ok();
    Ok(())
}

fn mkfs_no_device(env: &Env) -> Outcome {
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES]);
    let with = |other: &Path| vec![volume.devices[0].clone(), other.to_owned()];
    for other in [
        env.path("not-there"),
        env.mkdir("folder"),
        "/dev/null".into(),
    ] {
        refused(mkfs(env, &with(&other)), &name(&other), &volume.devices);
    }
    // Twice the same, plainly and through a link.
    let link = env.path("link.img");
    symlink(&volume.devices[0], &link).expect("a link to an image");
    refused(
        mkfs(env, &with(&volume.devices[0])),
        &name(&volume.devices[0]),
        &volume.devices,
    );
    refused(mkfs(env, &with(&link)), ".img", &volume.devices);
    refused(env.braidfs().arg("mkfs"), "dev", &volume.devices);
    Ok(())
}

fn mkfs_impossible_values(env: &Env) -> Outcome {
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES; 2]);
    for unit in ["0", "1K", "3K", "100K", "1G", "-4K", "many", ""] {
        let option = format!("--stripe-unit={unit}");
        refused(
            mkfs(env, &volume.devices).arg(option),
            "stripe-unit",
            &volume.devices,
        );
    }
    let long = "x".repeat(65);
    refused(
        mkfs(env, &volume.devices).args(["--label", &long]),
        "label",
        &volume.devices,
    );
    for size in ["0", "many", "-1G"] {
        let missing = env.path("to-make.img");
        let command = env
            .braidfs()
            .arg("mkfs")
            .arg(format!("--size={size}"))
            .arg(&missing);
        refused(command, "size", &volume.devices);
        assert!(!missing.exists(), "refused, yet the image was made");
    }
    let command = mkfs(env, &volume.devices).arg("--no-such-option");
    refused(command, "no-such-option", &volume.devices);
    Ok(())
}

fn mount_missing(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 3);
    let (home, away) = (
        volume.devices[1].clone(),
        env.mkdir("away").join("gone.img"),
    );
    fs::rename(&home, &away).expect("move an image away");
    let left = vec![volume.devices[0].clone(), volume.devices[2].clone()];
    let partial = env
        .braidfs()
        .arg("mount")
        .args(&left)
        .arg(&volume.mountpoint);
    let output = refused(partial, "missing", &left);
    let text = &output.stderr;
    assert!(
        text.contains('1') && text.contains('3'),
        "which one of how many? {text}"
    );
    // A path that is not there is named itself.
    refused(volume.mount_command(&[]), &name(&home), &left);
    fs::rename(&away, &home).expect("move the image back");
    assert_mounts(&mut volume);
    Ok(())
}

fn mount_twice(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    let link = env.path("link.img");
    symlink(&volume.devices[1], &link).expect("a link to an image");
    let elsewhere = env.mkdir("elsewhere").join("copy.img");
    Cmd::new("cp")
        .args(["--sparse=always"])
        .arg(&volume.devices[1])
        .arg(&elsewhere)
        .ok();
    for twin in [volume.devices[1].clone(), link, elsewhere] {
        let command = env.braidfs().arg("mount").args(&volume.devices).arg(&twin);
        let file = name(Path::new(twin.file_name().expect("an image has a name")));
        let output = command.arg(&volume.mountpoint);
        let output = refused(output, "", &volume.devices);
        let named = output.stderr.contains(&file) || output.stderr.contains("v1.img");
        assert!(
            named,
            "the message does not name the device: {}",
            output.describe()
        );
    }
    assert_mounts(&mut volume);
    Ok(())
}

fn mount_foreign(env: &Env) -> Outcome {
    let (mut volume, other) = (settled(env, "v", 2), settled(env, "other", 2));
    let mut all = volume.devices.clone();
    all.extend(other.devices.iter().cloned());
    let stranger = &other.devices[1];
    let added = env
        .braidfs()
        .arg("mount")
        .args(&volume.devices)
        .arg(stranger);
    refused(added.arg(&volume.mountpoint), &name(stranger), &all);
    let instead = env
        .braidfs()
        .arg("mount")
        .arg(&volume.devices[0])
        .arg(stranger);
    refused(instead.arg(&volume.mountpoint), &name(stranger), &all);
    assert_mounts(&mut volume);
    Ok(())
}

fn mount_stale(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    let (member, old) = (volume.devices[1].clone(), env.mkdir("old").join("old.img"));
    Cmd::new("cp")
        .arg("--sparse=always")
        .arg(&member)
        .arg(&old)
        .ok();
    for _ in 0..3 {
        assert_mounts(&mut volume);
    }
    let current = env.path("old/current.img");
    fs::rename(&member, &current).expect("take the member away");
    fs::rename(&old, &member).expect("put its old self in its place");
    refused(volume.mount_command(&[]), &name(&member), &volume.devices);
    fs::rename(&current, &member).expect("put the member back");
    assert_mounts(&mut volume);
    Ok(())
}

fn mount_truncated(env: &Env) -> Outcome {
    let volume = settled(env, "v", 2);
    let member = &volume.devices[1];
    for bytes in [MEMBER_BYTES - 4096, MEMBER_BYTES / 2, 2 * MIB, 4096, 0] {
        let file = OpenOptions::new()
            .write(true)
            .open(member)
            .expect("open an image");
        file.set_len(bytes).expect("truncate an image");
        refused(volume.mount_command(&[]), &name(member), &volume.devices);
    }
    Ok(())
}

fn damage(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("open an image");
    let mut bytes = [0; 64];
    file.read_exact_at(&mut bytes, at + 16)
        .expect("read a label");
    file.write_all_at(&bytes.map(|byte| byte ^ 0x55), at + 16)
        .expect("damage a label");
}

fn mount_label_gone(env: &Env) -> Outcome {
    let volume = settled(env, "v", 2);
    let member = &volume.devices[1];
    for at in LABEL_COPIES {
        damage(member, at);
    }
    refused(volume.mount_command(&[]), &name(member), &volume.devices);
    // Zeros instead of a label are no better.
    let file = OpenOptions::new()
        .write(true)
        .open(member)
        .expect("open an image");
    file.write_all_at(&vec![0; 1 << 20], 0)
        .expect("wipe the labels");
    refused(volume.mount_command(&[]), &name(member), &volume.devices);
    Ok(())
}

/// That is what there are two copies for: the volume mounts, says which device it was, and has
/// made the copy good, so that the other one may be lost next.
fn mount_label_damaged(env: &Env) -> Outcome {
    for members in [1, 2] {
        let mut volume = settled(env, &format!("v{members}-"), members);
        for at in [LABEL_COPIES, LABEL_COPIES].concat() {
            let member = volume.devices[members - 1].clone();
            damage(&member, at);
            let output = assert_mounts(&mut volume);
            println!("  {}", output.stderr);
        }
        volume.fsck_clean();
    }
    Ok(())
}

fn mount_something_else(env: &Env) -> Outcome {
    env.need_tools(&["mkfs.ext4"])?;
    let volume = Volume::unformatted(env, "v", &[MEMBER_BYTES]);
    refused(
        volume.mount_command(&[]),
        &name(&volume.devices[0]),
        &volume.devices,
    );
    Cmd::new("mkfs.ext4").arg("-q").arg(&volume.devices[0]).ok();
    refused(
        volume.mount_command(&[]),
        &name(&volume.devices[0]),
        &volume.devices,
    );
    for verb in [&["info"][..], &["fsck", "-n"][..]] {
        let command = env.braidfs().args(verb).args(&volume.devices);
        refused(command, &name(&volume.devices[0]), &volume.devices);
    }
    let missing = env.path("not-there.img");
    for verb in [&["info"][..], &["fsck", "-n"][..]] {
        refused(env.braidfs().args(verb).arg(&missing), &name(&missing), &[]);
    }
    refused(
        env.braidfs().arg("stats").arg(&env.dir),
        &name(&env.dir),
        &[],
    );
    Ok(())
}

fn mount_bad_options(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    let options = [
        ("no_such_option", "no_such_option"),
        ("no_such_key=1", "no_such_key"),
        ("noatime,chunky", "chunky"),
        ("cache_size=0", "cache_size"),
        ("cache_size=4K", "cache_size"),
        ("cache_size=plenty", "cache_size"),
        ("cache_size=-1", "cache_size"),
        ("cache_size=99999999999G", "cache_size"),
        ("cache_size", "cache_size"),
        ("commit=-1", "commit"),
        ("commit=soon", "commit"),
        ("commit=99999999999999999999", "commit"),
        ("commit", "commit"),
    ];
    for (option, mention) in options {
        refused(volume.mount_command(&[option]), mention, &volume.devices);
    }
    assert_mounts(&mut volume);
    Ok(())
}

fn mount_bad_mount_point(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    let (missing, file) = (env.path("no-folder"), env.path("a-file"));
    fs::write(&file, "not a folder").expect("a file");
    for target in [&missing, &file] {
        let command = env.braidfs().arg("mount").args(&volume.devices).arg(target);
        refused(command, &name(target), &volume.devices);
    }
    assert_mounts(&mut volume);
    Ok(())
}

fn second_mount(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    volume.mount(&[]);
    let other = env.mkdir("second.mnt");
    for target in [&other, &volume.mountpoint] {
        let command = env.braidfs().arg("mount").args(&volume.devices).arg(target);
        refused(command, ".img", &[]);
        let read_only = env
            .braidfs()
            .args(["mount", "-o", "ro"])
            .args(&volume.devices);
        refused(read_only.arg(target), ".img", &[]);
    }
    // Its members are not to be checked or formatted behind its back either.
    assert_witness(&volume);
    volume.umount();
    volume.fsck_clean();
    assert_mounts(&mut volume);
    Ok(())
}

fn umount_busy(env: &Env) -> Outcome {
    let mut volume = settled(env, "v", 2);
    volume.mount(&[]);
    let umount = || env.braidfs().arg("umount").arg(&volume.mountpoint);
    let open = File::open(volume.path("witness")).expect("open a file on the volume");
    refused(umount(), &name(&volume.mountpoint), &[]);
    drop(open);
    let inside = Cmd::new("sleep").arg("30").cwd(&volume.mountpoint).spawn();
    refused(umount(), &name(&volume.mountpoint), &[]);
    drop(inside);
    assert_witness(&volume);
    assert!(
        volume.daemon().is_alive(),
        "the daemon left a mount that is busy"
    );
    volume.umount();
    assert_mounts(&mut volume);
    Ok(())
}

fn umount_not_mounted(env: &Env) -> Outcome {
    let plain = env.mkdir("plain");
    for target in [plain, env.path("not-there"), "/proc".into()] {
        refused(
            env.braidfs().arg("umount").arg(&target),
            &name(&target),
            &[],
        );
    }
    Ok(())
}
