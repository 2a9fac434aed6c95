//! What a local file system does, seen by the usual tools on a real mount, in both cache modes.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome};
use braidfs_tests::loopdev::LoopDevice;
use braidfs_tests::runner::{self, Test};
use braidfs_tests::volume::{CACHE_MODES, MIB, Volume, sparse_image};

fn main() -> ExitCode {
    runner::main(
        "posix",
        &[
            Test::new("flags_forbid_and_allow_as_chattr_says", 60, flags),
            Test::new("a_file_without_a_name_can_get_one", 60, tmpfile),
            Test::new("statx_shows_the_time_of_birth", 60, birth),
            Test::new("set_id_bits_go_with_a_write_of_others", 60, set_ids),
            Test::new("a_running_program_is_not_cut", 60, running),
            Test::new("fallocate_seek_and_copy_agree", 60, ranges),
            Test::new("fstrim_gives_space_back_to_images", 120, trim),
            Test::new("fstrim_passes_through_loop_devices", 120, trim_loop),
            Test::new("discard_gives_space_back_by_itself", 120, discard),
            Test::new("groups_and_sticky_directories_are_obeyed", 60, groups),
            Test::new("a_remount_changes_ro_and_rw", 60, remount),
            Test::new("a_write_protected_member_is_only_read", 60, write_protected),
            Test::new("what_is_not_there_is_refused", 60, refused),
            Test::new("umount_of_a_bind_mount_does_not_wait", 60, bind),
        ],
    )
}

/// Runs a shell script on a fresh mount in each cache mode; the mount point is its first argument,
/// the mode its second. `set -e` is on, and `no COMMAND` is what must fail.
fn in_both_modes(env: &Env, script: &str) {
    for mode in CACHE_MODES {
        let mut volume = Volume::format(env, mode, &[256 * MIB; 3], &[]);
        volume.mount(&[mode]);
        let script = format!("set -eux\nno() {{ ! \"$@\"; }}\ncd \"$1\"\n{script}");
        Cmd::sh(&script, [volume.mountpoint.as_os_str(), mode.as_ref()]).ok();
        volume.umount();
        volume.fsck_clean();
    }
}

fn flags(env: &Env) -> Outcome {
    env.need_tools(&["chattr", "lsattr", "xfs_io"])?;
    let script = "
        echo one >f; mkdir d; echo x >d/x
        chattr +i f; lsattr f | grep -q -- ----i
        no sh -c 'echo two >>f'; no rm f; no mv f g; no ln f g; no chmod 600 f; no touch f
        no setfattr -n user.a -v 1 f
        chattr -i f; chattr +a f
        echo two >>f; no sh -c 'echo three >f'; no rm f; touch f
        chattr -a f; [ \"$(cat f)\" = \"$(printf 'one\\ntwo')\" ]
        chattr +i d; no touch d/new; no rm d/x; chattr -i d
        chattr +a d; touch d/new; no rm d/x; no mv d/x d/y; chattr -a d
        chattr +Ad d; mkdir d/sub; lsattr -d d/sub | grep -q A
        # The kernel's write-back cache and synchronous files exclude each other.
        if [ \"$2\" = writeback_cache ]; then
            no chattr +S f; no chattr +S d; chattr +D d; chattr -D d
        else
            chattr +S f d; mkdir d/sync; lsattr -d d/sync | grep -q S; chattr -S f d d/sync
            rmdir d/sync
        fi
        chattr +t f; lsattr f | grep -q t; no chattr +c f
        # A write that the kernel took after the flag was set is no failed write.
        (echo 'chattr +i'; sleep 0.1; echo 'pwrite -q 0 4k'; echo fsync; echo syncfs) |
            xfs_io f 2>told || true
        no grep sync told; chattr -i f
        rm -r f d";
    in_both_modes(env, script);
    Ok(())
}

fn tmpfile(env: &Env) -> Outcome {
    env.need_tools(&["xfs_io"])?;
    let script = "
        xfs_io -T -c 'pwrite -S 0x61 0 5000' -c 'flink named' . >/dev/null
        [ \"$(stat -c '%s %h' named)\" = '5000 1' ]
        [ \"$(tr -d a <named | wc -c)\" = 0 ]
        xfs_io -T -c 'pwrite 0 4k' . >/dev/null
        [ \"$(ls)\" = named ]";
    in_both_modes(env, script);
    Ok(())
}

fn birth(env: &Env) -> Outcome {
    let script = "
        before=$(date +%s); echo a >f; born=$(stat -c %W f)
        [ \"$born\" -ge $((before - 1)) ] && [ \"$born\" -le $((before + 5)) ]
        touch -d '1901-12-14 00:00:00.5 UTC' f
        [ \"$(stat -c '%Y %y' f | cut -c1-11)\" = -2147472000 ] || stat -c '%Y %y' f
        date -u -d @\"$(stat -c %Y f)\" +%Y | grep -q 1901
        touch -d '2446-05-10 00:00:00.123456789 UTC' f
        stat -c %y f | grep -q '\\.123456789'
        [ \"$(stat -c %W f)\" = \"$born\" ]";
    in_both_modes(env, script);
    Ok(())
}

fn set_ids(env: &Env) -> Outcome {
    env.need_tools(&["setpriv", "xfs_io"])?;
    let script = "
        chmod 777 .
        as() { setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"; }
        for change in 'echo x >>f' 'truncate -s 1 f' 'echo x >f'; do
            rm -f f; echo content >f; chmod 6777 f
            as sh -c \"$change\"; [ \"$(stat -c %a f)\" = 777 ]
            chmod 6777 f; sh -c \"$change\"; [ \"$(stat -c %a f)\" = 6777 ]
        done
        chmod 2666 f; as xfs_io -c 'falloc 0 4k' f; [ \"$(stat -c %a f)\" = 666 ]
        chgrp 65534 f; chmod 2666 f; as xfs_io -c 'falloc 0 4k' f; [ \"$(stat -c %a f)\" = 2666 ]
        chgrp 0 f; chmod 6777 f
        chown 65534:65534 f; [ \"$(stat -c %a f)\" = 777 ]
        mkdir d; chgrp 65534 d; chmod 2775 d; mkdir d/sub; echo x >d/file
        [ \"$(stat -c '%g %a' d/sub)\" = '65534 2755' ]; [ \"$(stat -c %g d/file)\" = 65534 ]
        mkdir s; chmod 1777 s; echo x >s/roots; no as rm -f s/roots";
    in_both_modes(env, script);
    Ok(())
}

/// A program that runs cannot be opened to be written or cut, and stays whole.
fn running(env: &Env) -> Outcome {
    env.need_tools(&["xfs_io"])?;
    let script = "
        cp \"$(command -v sleep)\" copy; cp copy program
        ./program 30 & pid=$!
        until [ \"/proc/$pid/exe\" -ef program ]; do sleep 0.01; done
        no xfs_io -r -t -c quit program; no xfs_io -t -c quit program; no xfs_io -c quit program
        no truncate -s 1 program; no sh -c 'echo x >>program'
        cmp copy program; kill $pid; wait $pid || true
        xfs_io -r -t -c quit program; [ \"$(stat -c %s program)\" = 0 ]";
    in_both_modes(env, script);
    Ok(())
}

fn ranges(env: &Env) -> Outcome {
    env.need_tools(&["xfs_io"])?;
    let script = "
        xfs_io -f -c 'falloc 0 1m' f; [ \"$(stat -c '%s %b' f)\" = '1048576 2048' ]
        xfs_io -c 'falloc -k 1m 1m' f; [ \"$(stat -c '%s %b' f)\" = '1048576 4096' ]
        truncate -s 1048576 f; [ \"$(stat -c %b f)\" = 2048 ]
        xfs_io -c 'pwrite -S 0x62 256k 64k' f >/dev/null; sync f
        xfs_io -c 'pwrite -S 0x63 512k 4k' f >/dev/null
        xfs_io -f -c 'pwrite 64k 4k' -c 'seek -d 0' new | grep -qE '^(DATA.)?65536'
        xfs_io -f -c 'truncate 1m' -c 'mmap 0 1m' -c 'mwrite 128k 4k' -c 'seek -d 0' map |
            grep -qE '^(DATA.)?131072'
        [ \"$(xfs_io -r -c 'seek -d 0' f | tail -n 1)\" = 'DATA\t262144' ] ||
            xfs_io -r -c 'seek -d 0' f | grep -q 262144
        xfs_io -r -c 'seek -h 256k' f | grep -q 327680
        xfs_io -r -c 'seek -d 320k' f | grep -q 524288
        xfs_io -c 'fpunch 256k 32k' f; [ \"$(stat -c %b f)\" = 1984 ]
        xfs_io -c 'fzero 280k 16k' f
        [ \"$(head -c 303104 f | tr -d '\\0' | wc -c)\" = 0 ]
        [ \"$(head -c 327680 f | tr -d '\\0' | wc -c)\" = 24576 ]
        no xfs_io -c 'fcollapse 0 4k' f 2>/dev/null
        xfs_io -f -c 'copy_range f' g >/dev/null; cmp f g
        sync g; [ \"$(stat -c %b g)\" -le \"$(stat -c %b f)\" ]";
    in_both_modes(env, script);
    Ok(())
}

/// Bytes that image files really take.
fn used_bytes(images: &[PathBuf]) -> u64 {
    let images = images.iter();
    let blocks = images.map(|image| fs::metadata(image).expect("an image").blocks());
    blocks.sum::<u64>() * 512
}

/// Fills a volume with a large file and deletes that; what the images take then.
fn fill_and_delete(volume: &mut Volume, images: &[PathBuf], options: &[&str]) -> u64 {
    volume.mount(options);
    let fill = "head -c 300M /dev/urandom >\"$1/big\"; sync \"$1/big\"";
    Cmd::sh(fill, [&volume.mountpoint]).ok();
    let full = used_bytes(images);
    assert!(full > 290 * MIB, "{full}");
    fs::remove_file(volume.path("big")).expect("delete");
    // Blocks of a deleted file are free after the commit that follows.
    volume.remount(options);
    used_bytes(images)
}

/// After fstrim the images must be small again.
fn trim_frees(volume: &mut Volume, images: &[PathBuf]) {
    let before = fill_and_delete(volume, images, &[]);
    let output = Cmd::new("fstrim").arg("-v").arg(&volume.mountpoint).ok();
    let after = used_bytes(images);
    println!("{} {before} {after}", output.stdout);
    assert!(before > 290 * MIB, "{before}");
    assert!(after < 64 * MIB, "{after}");
    volume.umount();
    volume.fsck_clean();
}

fn trim(env: &Env) -> Outcome {
    env.need_tools(&["fstrim"])?;
    let mut volume = Volume::format(env, "v", &[512 * MIB; 2], &[]);
    let images = volume.devices.clone();
    trim_frees(&mut volume, &images);
    Ok(())
}

/// Image files, and loop devices on them.
fn looped(env: &Env) -> ([PathBuf; 2], [LoopDevice; 2]) {
    let images = ["a.img", "b.img"].map(|name| env.path(name));
    images
        .iter()
        .for_each(|image| sparse_image(image, 512 * MIB));
    let loops = [0, 1].map(|index| LoopDevice::attach(&images[index]));
    let devices = loops.iter().map(|device| &device.path);
    env.braidfs().arg("mkfs").args(devices).ok();
    (images, loops)
}

fn trim_loop(env: &Env) -> Outcome {
    env.need_tools(&["fstrim"])?;
    env.need_loop_devices()?;
    let (images, loops) = looped(env);
    let devices = loops.iter().map(|device| device.path.clone()).collect();
    trim_frees(&mut Volume::on(env, "v", devices), &images);
    Ok(())
}

fn discard(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let (images, loops) = looped(env);
    let devices = loops.iter().map(|device| device.path.clone()).collect();
    let mut volume = Volume::on(env, "v", devices);
    let after = fill_and_delete(&mut volume, &images, &["discard"]);
    assert!(after < 64 * MIB, "{after}");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn groups(env: &Env) -> Outcome {
    env.need_tools(&["setpriv"])?;
    let script = "
        chmod 755 .
        as() { setpriv --reuid \"$1\" --regid 65534 \"$2\" sh -c \"$3\"; }
        mkdir g; chgrp 4242 g; chmod 770 g
        as 65534 --groups=4242 'echo text >g/file'
        as 65534 --groups=4241,4242,4243 'cat g/file; mkdir g/dir'
        no as 65534 --clear-groups 'cat g/file'; no as 65534 --groups=4241 'touch g/new'
        echo secret >s; chgrp 4242 s; chmod 640 s
        as 65534 --groups=4242 'cat s'; no as 65534 --groups=4242 'echo x >>s'
        no as 65534 --clear-groups 'cat s'
        as 65533 --groups=4242 'true'; no as 65533 --groups=4242 'chmod 600 g/file'
        mkdir t; chmod 1777 t; echo x >t/roots
        as 65534 --clear-groups 'echo x >t/mine; mkdir t/dir'
        no as 65533 --clear-groups 'rm -f t/mine'; no as 65533 --clear-groups 'rmdir t/dir'
        no as 65533 --clear-groups 'mv t/mine t/theirs'
        no as 65534 --clear-groups 'mv -T t/mine t/roots'
        as 65534 --clear-groups 'mv t/mine t/still-mine; rm t/still-mine; rmdir t/dir'
        mkdir u; chmod 777 u; echo x >u/roots; as 65533 --clear-groups 'rm -f u/roots'";
    in_both_modes(env, script);
    Ok(())
}

/// What the mount table says of a mount before anything else: `ro` or `rw`.
fn shown_access(volume: &Volume) -> String {
    let columns = ["--noheadings", "--output", "OPTIONS"];
    let found = Cmd::new("findmnt").args(columns).arg(&volume.mountpoint);
    let options = found.quiet().ok().stdout;
    options.split(',').next().unwrap_or_default().to_owned()
}

/// As mount(8) has it with the file systems of the kernel: read-only and a warning, unless `rw` by
/// name insists.
fn write_protected(env: &Env) -> Outcome {
    env.need_loop_devices()?;
    let image = env.path("b.img");
    sparse_image(&image, 128 * MIB);
    let device = LoopDevice::attach(&image);
    let protect = |how: &str| Cmd::new("blockdev").arg(how).arg(&device.path).ok();
    let mut volume = Volume::unformatted(env, "v", &[128 * MIB]);
    volume.devices.push(device.path.clone());
    let sums = |volume: &Volume| {
        let sum = |image| Cmd::new("sha256sum").arg(image).quiet().ok().stdout;
        volume.devices.iter().map(sum).collect::<Vec<_>>()
    };
    env.braidfs().arg("mkfs").args(&volume.devices).ok();
    let told = volume.mount_command(&["norecovery"]).fails();
    assert!(told.stderr.contains("needs 'ro'"), "{}", told.stderr);
    volume.mount(&[]);
    fs::write(volume.path("file"), "one").expect("write");
    volume.umount();

    protect("--setro");
    let name = device.path.to_string_lossy();
    for options in [&["rw"][..], &["ro", "rw"]] {
        let told = volume.mount_command(options).fails();
        let says = |part: &str| told.stderr.contains(part);
        assert!(says(&name) && says("write-protected"), "{}", told.stderr);
        assert!(says("'rw'") && says("--setrw"), "{}", told.stderr);
        assert!(!volume.is_mount_point());
    }
    let before = sums(&volume);
    for options in [&[][..], &["norecovery"], &["writeback_cache"]] {
        let told = volume.mount(options);
        let expected = format!("{name}: is write-protected, mounting read-only");
        assert!(told.stderr.contains(&expected), "{}", told.stderr);
        assert_eq!(shown_access(&volume), "ro");
        let refused = fs::write(volume.path("file"), "two").expect_err("read-only");
        assert_eq!(refused.raw_os_error(), Some(30), "EROFS");
        volume.umount();
    }
    // mount(8) says `rw` to its helper whether its user did or not.
    let helper = env.path("mount.braidfs");
    symlink(&env.bin, &helper).expect("a helper's name");
    let members = format!("{}:{name}", volume.devices[0].display());
    let mount = Cmd::new(helper).arg(members).arg(&volume.mountpoint);
    let told = mount.args(["-o", "rw,noatime"]).ok();
    assert!(
        told.stderr.contains("mounting read-only"),
        "{}",
        told.stderr
    );
    volume.adopt();
    assert_eq!(shown_access(&volume), "ro");
    volume.umount();
    let told = volume.mount(&["ro"]);
    assert!(told.stderr.is_empty(), "asked for: {}", told.stderr);
    let remount = || {
        let mount = env.braidfs().args(["mount", "-o", "remount,rw"]);
        mount.arg(&device.path).arg(&volume.mountpoint)
    };
    let told = remount().fails();
    assert!(told.stderr.contains("Read-only"), "{}", told.stderr);
    assert_eq!(before, sums(&volume), "nothing was written");
    protect("--setrw");
    remount().ok();
    fs::write(volume.path("file"), "two").expect("write again");
    assert_eq!(shown_access(&volume), "rw");
    volume.umount();
    volume.fsck_clean();
    Ok(())
}

fn refused(env: &Env) -> Outcome {
    env.need_tools(&["xfs_io", "swapon"])?;
    let script = "
        head -c 100000 /dev/urandom >f; before=$(cksum <f)
        no cp --reflink=always f g
        for command in 'fcollapse 0 4k' 'finsert 0 4k' 'funshare 0 4k' 'fiemap' \
                'dedupe f 0 4096 4096'; do
            xfs_io -c \"$command\" f 2>&1 | grep -E 'not supported|Inappropriate'
        done
        chmod 600 f; no swapon f
        no setfattr -n other.a -v 1 f; ln -s f l; no setfattr -h -n user.a -v 1 l
        no sh -c 'exec 3<>l/x'; no mkdir l/x; no rmdir f; no mv f f/g; no ln . d
        [ \"$before\" = \"$(cksum <f)\" ]; rm -f g; cp --reflink=auto f g; cmp f g";
    in_both_modes(env, script);
    Ok(())
}

fn remount(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[128 * MIB; 2], &[]);
    volume.mount(&[]);
    let (device, place) = (volume.devices[0].clone(), volume.mountpoint.clone());
    let remount = |options: &str| {
        let mount = env.braidfs().args(["mount", "-o", options]);
        mount.arg(&device).arg(&place)
    };
    fs::write(volume.path("file"), "one").expect("write");
    remount("remount,ro").ok();
    let refused = fs::write(volume.path("file"), "two").expect_err("read-only");
    assert_eq!(refused.raw_os_error(), Some(30), "EROFS");
    remount("remount,rw").ok();
    fs::write(volume.path("file"), "two").expect("write again");
    volume.umount();
    volume.mount(&["ro"]);
    let sums = |volume: &Volume| {
        let sum = |image| Cmd::new("sha256sum").arg(image).quiet().ok().stdout;
        volume.devices.iter().map(sum).collect::<Vec<_>>()
    };
    let before = sums(&volume);
    let held = fs::File::open(volume.path("file")).expect("open");
    assert_eq!(before, sums(&volume), "reading writes nothing");
    // Another reader of the devices is in the way, and is named.
    let mut other = Volume::on(env, "other", volume.devices.clone());
    other.mount(&["ro"]);
    let told = remount("remount,rw").fails();
    assert!(told.stderr.contains("in use"), "{}", told.stderr);
    other.umount();
    remount("remount,rw").ok();
    assert_eq!(std::io::read_to_string(held).expect("read"), "two");
    fs::write(volume.path("file"), "three").expect("write after the remount");
    volume.umount();
    volume.fsck_clean();
    volume.mount(&["ro"]);
    let found = fs::read_to_string(volume.path("file")).expect("read");
    assert_eq!(found, "three");
    volume.umount();
    Ok(())
}

fn bind(env: &Env) -> Outcome {
    let mut volume = Volume::format(env, "v", &[128 * MIB; 2], &[]);
    volume.mount(&[]);
    let other = env.mkdir("other");
    let script = "mount --bind \"$1\" \"$2\" && echo x >\"$2/file\"";
    Cmd::sh(script, [&volume.mountpoint, &other]).ok();
    env.braidfs().arg("umount").arg(&other).limit_secs(20).ok();
    assert_eq!(
        fs::read_to_string(volume.path("file")).expect("read"),
        "x\n"
    );
    volume.umount();
    volume.fsck_clean();
    Ok(())
}
