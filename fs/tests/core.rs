//! The core without a mount, on simulated devices.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use braidfs::{
    Errno, FileSystem, OpenFile, ROOT_INO, SetAttr, SetTime, Timestamp, WriteData, WriteFlags,
};
use common::*;

const MIB: usize = 1 << 20;

#[test]
fn an_empty_file_system_is_sound_and_mounts_again() {
    let devices = devices(3, 64 << 20);
    format(&devices);
    assert_eq!(check(&devices).inodes, 1);
    for _ in 0..3 {
        let fs = mount(&devices);
        assert!(fs.getattr(ROOT_INO).unwrap().is_dir());
        assert!(names(&fs, ROOT_INO).is_empty());
        fs.unmount().unwrap();
    }
    check(&devices);
}

#[test]
fn only_regular_files_take_bytes() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let pipe = fs.mknod(ROOT_INO, b"pipe", libc::S_IFIFO | 0o644, 0, &CRED);
    let file = fs.open(pipe.unwrap().ino, libc::O_RDWR).unwrap();
    for direct in [false, true] {
        let written = try_write(&fs, &file, 0, &vec![1; MIB], direct);
        assert_eq!(written, Err(Errno::INVAL));
    }
    fs.release(&file);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn data_and_attributes_survive_a_remount() {
    let devices = devices(4, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "data");
    let bytes = pattern(1, 9 * MIB + 1234);
    for (nth, piece) in bytes.chunks(MIB).enumerate() {
        write(&fs, &file, (nth * MIB) as u64, piece);
    }
    let time = Timestamp {
        secs: -5,
        nanos: 123_456_789,
    };
    let set = SetAttr {
        mtime: Some(SetTime::At(time)),
        mode: Some(0o4711),
        ..Default::default()
    };
    fs.setattr(file.ino(), &set, &CRED).unwrap();
    let dir = fs.mkdir(ROOT_INO, b"dir", 0o755, &CRED).unwrap();
    fs.symlink(dir.ino, b"link", b"../data", &CRED).unwrap();
    fs.link(file.ino(), dir.ino, b"hard").unwrap();
    fs.mknod(dir.ino, b"null", libc::S_IFCHR | 0o666, 0x103, &CRED)
        .unwrap();
    fs.setxattr(file.ino(), b"user.one", b"value", 0, false)
        .unwrap();
    let before = fs.getattr(file.ino()).unwrap();
    fs.unmount().unwrap();

    let report = check(&devices);
    assert_eq!((report.inodes, report.entries), (5, 5));
    let fs = mount(&devices);
    let file = open(&fs, "data");
    let mut after = fs.getattr(file.ino()).unwrap();
    assert_eq!(after.blocks, (bytes.len() as u64).div_ceil(4096) * 8);
    // Before, some pages may not have had a block yet.
    (after.atime, after.blocks) = (before.atime, before.blocks);
    assert_eq!(after, before);
    assert_eq!(after.mtime, time);
    assert_eq!(after.nlink, 2);
    assert!(read(&fs, &file, 0, bytes.len() + 10) == bytes);
    assert_eq!(fs.getxattr(file.ino(), b"user.one").unwrap(), b"value");
    assert_eq!(names(&fs, dir.ino), ["link", "hard", "null"]);
    let link = fs.lookup(dir.ino, b"link").unwrap();
    assert_eq!(fs.readlink(link.ino).unwrap(), b"../data");
    assert_eq!(fs.lookup(dir.ino, b"null").unwrap().rdev, 0x103);
    fs.unmount().unwrap();
}

#[test]
fn direct_io_and_the_cache_agree() {
    let devices = devices(4, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let (one, two) = (pattern(1, MIB), pattern(2, 256 << 10));
    write(&fs, &file, 0, &one);
    assert_eq!(try_write(&fs, &file, 512 << 10, &two, true), Ok(256 << 10));
    let mut want = one.clone();
    want[512 << 10..768 << 10].copy_from_slice(&two);
    assert!(try_read(&fs, &file, 0, MIB, true).unwrap() == want);
    assert!(try_read(&fs, &file, 0, MIB, false).unwrap() == want);
    // Direct over uncached, then buffered over that.
    assert_eq!(try_write(&fs, &file, 4 << 20, &one, true), Ok(1 << 20));
    write(&fs, &file, (4 << 20) + 100, b"hello");
    let mut want = one.clone();
    want[100..105].copy_from_slice(b"hello");
    assert!(try_read(&fs, &file, 4 << 20, MIB, true).unwrap() == want);
    // The hole between reads as zeros, directly too.
    assert!(
        try_read(&fs, &file, 2 << 20, MIB, true)
            .unwrap()
            .iter()
            .all(|&byte| byte == 0)
    );
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    let file = open(&fs, "f");
    assert!(try_read(&fs, &file, 4 << 20, MIB, true).unwrap() == want);
    fs.unmount().unwrap();
}

#[test]
fn truncation_leaves_zeros_and_frees_space() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let bytes = pattern(3, 3 * MIB);
    write(&fs, &file, 0, &bytes[..MIB]);
    write(&fs, &file, MIB as u64, &bytes[MIB..2 * MIB]);
    write(&fs, &file, 2 * MIB as u64, &bytes[2 * MIB..]);
    fs.sync().unwrap();
    let size = |size| SetAttr {
        size: Some(size),
        ..Default::default()
    };
    fs.setattr(file.ino(), &size(5000), &CRED).unwrap();
    fs.setattr(file.ino(), &size(2 * MIB as u64), &CRED)
        .unwrap();
    let mut want = vec![0; 2 * MIB];
    want[..5000].copy_from_slice(&bytes[..5000]);
    assert!(read(&fs, &file, 0, 2 * MIB) == want);
    fs.sync().unwrap();
    assert_eq!(fs.getattr(file.ino()).unwrap().blocks, 2 * 8);
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    assert!(read(&fs, &open(&fs, "f"), 0, 2 * MIB) == want);
    fs.unmount().unwrap();
}

#[test]
fn an_unlinked_open_file_lives_until_its_last_user_goes() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let free = fs.statfs().bfree;
    let file = create(&fs, ROOT_INO, "f");
    let bytes = pattern(4, 2 * MIB);
    write(&fs, &file, 0, &bytes[..MIB]);
    fs.unlink(ROOT_INO, b"f").unwrap();
    assert_eq!(fs.lookup(ROOT_INO, b"f"), Err(Errno::NOENT));
    write(&fs, &file, MIB as u64, &bytes[MIB..]);
    fs.sync().unwrap();
    assert!(read(&fs, &file, 0, 2 * MIB) == bytes);
    fs.release(&file);
    fs.forget(file.ino(), 1);
    drop(file);
    fs.unmount().unwrap();
    let report = check(&devices);
    assert_eq!(
        (report.inodes, report.orphans, report.data_blocks),
        (1, 0, 0)
    );
    let fs = mount(&devices);
    assert_eq!(fs.statfs().bfree, free);
    fs.unmount().unwrap();
}

#[test]
fn renames_replace_exchange_and_refuse_loops() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let a = fs.mkdir(ROOT_INO, b"a", 0o755, &CRED).unwrap().ino;
    let b = fs.mkdir(a, b"b", 0o755, &CRED).unwrap().ino;
    let file = create(&fs, a, "f");
    write(&fs, &file, 0, b"new");
    create(&fs, b, "g");
    assert_eq!(
        fs.rename(ROOT_INO, b"a", b, b"x", 0, &CRED),
        Err(Errno::INVAL)
    );
    assert_eq!(
        fs.rename(a, b"f", ROOT_INO, b"a", 0, &CRED),
        Err(Errno::ISDIR)
    );
    assert_eq!(fs.rename(a, b"b", a, b"f", 0, &CRED), Err(Errno::NOTDIR));
    assert_eq!(fs.rmdir(a, b"b"), Err(Errno::NOTEMPTY));
    let noreplace = libc::RENAME_NOREPLACE;
    assert_eq!(
        fs.rename(a, b"f", b, b"g", noreplace, &CRED),
        Err(Errno::EXIST)
    );
    fs.rename(a, b"f", b, b"g", 0, &CRED).unwrap();
    assert_eq!(fs.lookup(b, b"g").unwrap().ino, file.ino());
    // Exchanging would put `a` below itself.
    let exchange = libc::RENAME_EXCHANGE;
    assert_eq!(
        fs.rename(b, b"g", ROOT_INO, b"a", exchange, &CRED),
        Err(Errno::INVAL)
    );
    let c = fs.mkdir(ROOT_INO, b"c", 0o755, &CRED).unwrap().ino;
    fs.rename(b, b"g", ROOT_INO, b"c", exchange, &CRED).unwrap();
    assert_eq!(fs.lookup(ROOT_INO, b"c").unwrap().ino, file.ino());
    assert_eq!(fs.lookup(b, b"g").unwrap().ino, c);
    assert_eq!(fs.lookup(c, b"..").unwrap().ino, b);
    let free = fs.rename(b, b"g", b, b"none", exchange, &CRED);
    assert_eq!(free, Err(Errno::NOENT));
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn a_full_volume_says_so_and_deletion_gives_the_space_back() {
    let devices = devices(2, 32 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let bytes = pattern(5, MIB);
    let mut written = 0;
    let error = loop {
        match try_write(&fs, &file, written, &bytes, false) {
            Ok(count) => written += u64::from(count),
            Err(error) => break error,
        }
        assert!(written < 64 << 20, "more than the devices hold");
    };
    assert_eq!(error, Errno::NOSPC);
    assert!(written > 32 << 20, "only {written} bytes fit");
    fs.fsync(&file, false).unwrap();
    for piece in 0..written / MIB as u64 {
        assert!(
            read(&fs, &file, piece * MIB as u64, MIB) == bytes,
            "MiB {piece}"
        );
    }
    fs.release(&file);
    fs.forget(file.ino(), 1);
    drop(file);
    fs.unlink(ROOT_INO, b"f").unwrap();
    let file = create(&fs, ROOT_INO, "g");
    for piece in 0..written / MIB as u64 {
        write(&fs, &file, piece * MIB as u64, &bytes);
    }
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn what_fsync_promised_survives_a_power_cut_and_the_rest_is_a_prefix() {
    for seed in 0..20 {
        let devices = devices(3, 64 << 20);
        format(&devices);
        let fs = mount(&devices);
        let file = create(&fs, ROOT_INO, "kept");
        let bytes = pattern(seed, 3 * MIB);
        for (nth, piece) in bytes.chunks(MIB).enumerate() {
            write(&fs, &file, (nth * MIB) as u64, piece);
        }
        fs.fsync(&file, false).unwrap();
        let other = create(&fs, ROOT_INO, "maybe");
        write(&fs, &other, 0, &pattern(99, MIB));
        write(&fs, &file, 0, &pattern(98, 100));
        let wrecks: Vec<_> = devices
            .iter()
            .enumerate()
            .map(|(nth, device)| {
                let power = braidfs_blockdev::device::sim::SimPower::new();
                let image = device.crash(seed * 7 + nth as u64);
                braidfs_blockdev::SimDevice::from_image(&format!("sim{nth}"), image, &power)
            })
            .collect();
        check(&wrecks);
        let after = mount(&wrecks);
        let file = open(&after, "kept");
        assert_eq!(after.getattr(file.ino()).unwrap().size, bytes.len() as u64);
        assert!(read(&after, &file, 100, 3 * MIB - 100) == bytes[100..]);
        after.unmount().unwrap();
        check(&wrecks);
        fs.unmount().unwrap();
    }
}

#[test]
fn flipped_data_is_an_error_and_never_wrong_bytes() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    write(&fs, &file, 0, &vec![0xab; MIB]);
    fs.unmount().unwrap();
    // Find the file's bytes on the devices and turn one bit over.
    let place = devices.iter().find_map(|device| {
        let image = device.image();
        image
            .chunks_exact(4096)
            .position(|block| block.iter().all(|&byte| byte == 0xab))
            .map(|block| (Arc::clone(device), block as u64 * 4096))
    });
    let (device, at) = place.expect("the data is there");
    device.flip_bit(at + 17, 3);
    let fs = mount(&devices);
    let file = open(&fs, "f");
    let mut failed = 0;
    for page in 0..256 {
        for direct in [false, true] {
            match try_read(
                &fs,
                &file,
                page * 4096,
                if direct { 64 << 10 } else { 4096 },
                direct,
            ) {
                Ok(bytes) => assert!(bytes.iter().all(|&byte| byte == 0xab)),
                Err(error) => {
                    assert_eq!(error, Errno::IO);
                    failed += 1;
                }
            }
        }
    }
    assert!(failed >= 1);
    fs.unmount().unwrap();
}

#[test]
fn ranges_punch_zero_seek_and_copy() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "f");
    let bytes = pattern(6, MIB);
    write(&fs, &file, 0, &bytes);
    write(&fs, &file, 4 << 20, &bytes);
    assert_eq!(fs.lseek(&file, 0, libc::SEEK_HOLE), Ok(1 << 20));
    assert_eq!(fs.lseek(&file, 1 << 20, libc::SEEK_DATA), Ok(4 << 20));
    assert_eq!(fs.lseek(&file, 5 << 20, libc::SEEK_DATA), Err(Errno::NXIO));
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fs.fallocate(&file, punch, 5000, 100_000).unwrap();
    let mut want = bytes.clone();
    want[5000..105_000].fill(0);
    assert!(read(&fs, &file, 0, MIB) == want);
    assert_eq!(fs.lseek(&file, 0, libc::SEEK_HOLE), Ok(8192));
    fs.fallocate(&file, 0, 6 << 20, 1 << 20).unwrap();
    assert_eq!(fs.getattr(file.ino()).unwrap().size, 7 << 20);
    assert!(read(&fs, &file, 6 << 20, MIB).iter().all(|&byte| byte == 0));
    let copy = create(&fs, ROOT_INO, "copy");
    assert_eq!(
        fs.copy_file_range(&file, 0, &copy, 10, MIB as u64),
        Ok(MIB as u64)
    );
    assert!(read(&fs, &copy, 10, MIB) == want);
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn a_listing_is_stable_while_others_come_and_go() {
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    for nth in 0..1000 {
        create(&fs, ROOT_INO, &format!("file{nth:04}"));
    }
    let mut seen = Vec::new();
    let mut cookie = 0;
    for round in 0.. {
        let mut batch = 0;
        fs.readdir(ROOT_INO, cookie, &mut |entry| {
            seen.push(String::from_utf8_lossy(entry.name).into_owned());
            cookie = entry.cookie;
            batch += 1;
            batch < 100
        })
        .unwrap();
        if batch == 0 {
            break;
        }
        // Odd ones that were listed go, others come.
        if round < 5 {
            fs.unlink(ROOT_INO, format!("file{:04}", round * 2 + 1).as_bytes())
                .unwrap();
            create(&fs, ROOT_INO, &format!("late{round}"));
        }
    }
    for nth in (0..1000).step_by(2) {
        let name = format!("file{nth:04}");
        assert_eq!(
            seen.iter().filter(|seen| **seen == name).count(),
            1,
            "{name}"
        );
    }
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn formatting_again_forgets_all_there_was() {
    let devices = devices(2, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "old");
    for piece in 0..40 {
        write(&fs, &file, piece << 20, &pattern(piece, MIB));
    }
    fs.unmount().unwrap();
    format(&devices);
    assert_eq!(check(&devices).inodes, 1);
    let fs = mount(&devices);
    assert!(names(&fs, ROOT_INO).is_empty());
    let file = create(&fs, ROOT_INO, "new");
    for piece in 0..40 {
        write(&fs, &file, piece << 20, &pattern(piece, MIB));
    }
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn lists_of_access_follow_the_mode_and_are_inherited() {
    let entry = |tag: u16, perm: u16, id: u32| {
        [
            &tag.to_le_bytes()[..],
            &perm.to_le_bytes(),
            &id.to_le_bytes(),
        ]
        .concat()
    };
    let none = u32::MAX;
    let list = |named: bool| {
        let mut out = 2u32.to_le_bytes().to_vec();
        out.extend(entry(1, 7, none));
        if named {
            out.extend(entry(2, 6, 1234));
        }
        out.extend(entry(4, 5, none));
        if named {
            out.extend(entry(16, 6, none));
        }
        out.extend(entry(32, 0, none));
        out
    };
    let (access, default) = (b"system.posix_acl_access", b"system.posix_acl_default");
    let devices = devices(1, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let dir = fs.mkdir(ROOT_INO, b"d", 0o777, &CRED).unwrap().ino;
    fs.setxattr(dir, access, &list(false), 0, false).unwrap();
    assert_eq!(fs.getattr(dir).unwrap().mode & 0o777, 0o750);
    assert_eq!(fs.getxattr(dir, access), Err(Errno::NODATA));
    fs.setxattr(dir, access, &list(true), 0, false).unwrap();
    assert_eq!(fs.getattr(dir).unwrap().mode & 0o777, 0o760);
    let chmod = SetAttr {
        mode: Some(0o711),
        ..Default::default()
    };
    fs.setattr(dir, &chmod, &CRED).unwrap();
    let mask = &fs.getxattr(dir, access).unwrap()[4 + 3 * 8 + 2..][..2];
    assert_eq!(mask, [1, 0]);
    fs.setxattr(dir, default, &list(true), 0, false).unwrap();
    let file = create(&fs, dir, "f");
    // The default list takes the umask's place: 0644 cut down to the list.
    assert_eq!(fs.getattr(file.ino()).unwrap().mode & 0o777, 0o640);
    assert!(fs.getxattr(file.ino(), access).is_ok());
    let sub = fs.mkdir(dir, b"sub", 0o777, &CRED).unwrap().ino;
    assert_eq!(fs.getxattr(sub, default).unwrap(), list(true));
    assert_eq!(
        fs.setxattr(file.ino(), default, &list(true), 0, false),
        Err(Errno::ACCES)
    );
    assert_eq!(
        fs.setxattr(file.ino(), access, b"junk", 0, false),
        Err(Errno::INVAL)
    );
    fs.unmount().unwrap();
    check(&devices);
}

#[test]
fn metadata_that_fills_the_volume_is_enospc_and_deletion_still_works() {
    let devices = devices(2, 32 << 20);
    format(&devices);
    let fs = mount(&devices);
    let value = pattern(1, 16 << 10);
    let mut made = Vec::new();
    let error = loop {
        let name = format!("file{:06}", made.len());
        let flags = libc::O_RDWR | libc::O_CREAT;
        match fs.create(ROOT_INO, name.as_bytes(), 0o644, flags, &CRED) {
            Ok((attr, file)) => {
                fs.release(&file);
                let set = fs.setxattr(attr.ino, b"user.x", &value, 0, false);
                fs.forget(attr.ino, 1);
                made.push(name);
                if let Err(error) = set {
                    break error;
                }
            }
            Err(error) => break error,
        }
        if made.len() % 100 == 0 {
            fs.sync().expect("a commit has room");
        }
        assert!(made.len() < 20_000, "more than the devices hold");
    };
    assert_eq!(error, Errno::NOSPC);
    fs.sync().expect("a commit has room");
    assert!(made.len() > 500, "only {} files fit", made.len());
    for name in &made {
        fs.unlink(ROOT_INO, name.as_bytes())
            .expect("deletion works on a full volume");
    }
    fs.sync().expect("a commit has room");
    // The room is inside the metadata now, and is found again, also after a remount.
    create(&fs, ROOT_INO, "again");
    fs.unmount().unwrap();
    let fs = mount(&devices);
    let half = made.len() / 2;
    for nth in 0..half {
        let file = create(&fs, ROOT_INO, &format!("more{nth}"));
        fs.setxattr(file.ino(), b"user.x", &value, 0, false)
            .expect("half of what there was fits again");
        if nth % 100 == 0 {
            fs.sync().expect("a commit has room");
        }
    }
    fs.unmount().unwrap();
    assert_eq!(check(&devices).inodes, 2 + half as u64);
}

/// Writes `data` as it comes from a transport: at the beginning of pages of the cache. Whether the
/// pages were taken over.
fn write_landed(fs: &FileSystem, file: &Arc<OpenFile>, at: u64, data: &[u8], direct: bool) -> bool {
    let mut landing = Some(fs.alloc_landing().expect("memory"));
    let pages = landing.as_mut().and_then(|pages| pages.slices_mut().next());
    pages.expect("one piece")[..data.len()].copy_from_slice(data);
    let (sender, receiver) = sync_channel(1);
    let done = Box::new(move |result| sender.send(result).expect("the test waits"));
    let landed = WriteData::Landed(&mut landing, data.len());
    fs.write(file, at, landed, direct, WriteFlags::default(), done);
    let written = receiver.recv_timeout(PATIENCE).expect("the write ends");
    assert_eq!(written, Ok(data.len() as u32));
    landing.is_none()
}

#[test]
fn pages_that_data_landed_on_become_the_files() {
    const FILE: usize = 6 * MIB;
    let devices = devices(3, 64 << 20);
    format(&devices);
    let fs = mount(&devices);
    let file = create(&fs, ROOT_INO, "file");
    let mut wanted = vec![0; FILE];
    let mut taken = 0;
    for step in 0..300_u64 {
        let random = u64::from_le_bytes(pattern(step + 1, 8).try_into().unwrap());
        let pick = |shift: u32, below: usize| (random >> shift) as usize % below;
        let at = match pick(0, 4) {
            0 => pick(8, FILE - MIB),
            1 => pick(8, FILE / 4096 - 256) * 4096,
            _ => pick(8, 6) * MIB,
        };
        let len = match pick(32, 4) {
            0 => 1 + pick(36, MIB),
            _ => MIB,
        };
        let data = pattern(random, len);
        let direct = pick(2, 3) == 0;
        // A reader keeps what it has, whatever is written meanwhile.
        let pinned = at / MIB * MIB;
        let (sender, receiver) = sync_channel(1);
        let done = Box::new(move |reply| sender.send(reply).unwrap_or_default());
        fs.read(&file, pinned as u64, MIB, false, done);
        let before = receiver
            .recv_timeout(PATIENCE)
            .expect("an end")
            .expect("a read");
        let was_taken = write_landed(&fs, &file, at as u64, &data, direct);
        assert!(
            !was_taken || len == MIB && at.is_multiple_of(4096),
            "step {step}"
        );
        taken += u32::from(was_taken);
        let bytes = before.slices().collect::<Vec<_>>().concat();
        assert!(
            bytes == wanted[pinned..pinned + bytes.len()],
            "step {step}: pinned"
        );
        drop(before);
        wanted[at..at + len].copy_from_slice(&data);
        match pick(40, 8) {
            0 => write(&fs, &file, at as u64, &data[..1]),
            1 => fs.fsync(&file, false).unwrap(),
            _ => {}
        }
        let size = fs.getattr(file.ino()).unwrap().size as usize;
        assert!(read(&fs, &file, 0, FILE) == wanted[..size], "step {step}");
    }
    assert!(taken > 50, "only {taken} were taken over");
    let size = fs.getattr(file.ino()).unwrap().size as usize;
    fs.release(&file);
    fs.unmount().unwrap();
    check(&devices);
    let fs = mount(&devices);
    let file = open(&fs, "file");
    assert!(
        read(&fs, &file, 0, FILE) == wanted[..size],
        "after a remount"
    );
    fs.release(&file);
    fs.unmount().unwrap();
}
