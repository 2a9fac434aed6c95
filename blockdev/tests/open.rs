//! Real files and block devices: locks, backends, scattered memory, fixed buffers.

mod common;

use braidfs_blockdev::{
    AlignedBuf, Backend, BlockDevice, Chain, ChunkKind, Class, Completion, DeviceRequest,
    ErrorKind, FormatOptions, Kiobuf, Op, OpenError, OpenMode, PageRun, PageVector, Volume,
    backed_loop_device, open_device,
};
use common::MIB;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

const BACKENDS: [Backend; 2] = [Backend::Auto, Backend::Threads];

fn mode(backend: Backend, read_only: bool) -> OpenMode {
    OpenMode {
        read_only,
        direct: true,
        backend,
        ..OpenMode::default()
    }
}

fn disk(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path)
        .unwrap()
        .set_len(32 * MIB)
        .unwrap();
    path
}

/// A program that is being started holds the locks of this process for a moment, between fork and
/// exec: no test of locks beside one that starts programs.
static NO_PROGRAMS: Mutex<()> = Mutex::new(());

#[test]
fn a_device_is_locked_while_it_is_open_and_free_right_after() {
    let _none = NO_PROGRAMS.lock();
    let dir = tempfile::tempdir().unwrap();
    let path = disk(dir.path(), "disk");
    for backend in BACKENDS {
        let writer = open_device(&path, mode(backend, false)).unwrap();
        for read_only in [false, true] {
            let refused = open_device(&path, mode(backend, read_only)).err();
            assert_eq!(refused, Some(OpenError::InUse));
        }
        drop(writer);
        let readers = [(); 2].map(|()| open_device(&path, mode(backend, true)).unwrap());
        assert_eq!(
            open_device(&path, mode(backend, false)).err(),
            Some(OpenError::InUse)
        );
        drop(readers);
        for _ in 0..50 {
            let device = open_device(&path, mode(backend, false)).unwrap();
            assert_eq!(read(&*device, 0, AlignedBuf::zeroed(4096)).error, None);
        }
    }
}

#[test]
fn what_is_no_device_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| open_device(path, OpenMode::default()).err();
    assert_eq!(open(dir.path()), Some(OpenError::NotADevice));
    assert_eq!(open(Path::new("/dev/null")), Some(OpenError::NotADevice));
    assert_eq!(
        open(&dir.path().join("none")),
        Some(OpenError::Os(libc::ENOENT))
    );
}

fn transfer(device: &dyn BlockDevice, op: Op, at: u64, pages: Box<dyn PageVector>) -> Completion {
    let len = pages.runs().iter().map(|run| run.len()).sum();
    let (to, from) = channel();
    let kiobuf = Kiobuf::new(pages, 0, len, Box::new(move |done| to.send(done).unwrap()));
    device.submit(DeviceRequest::new(op, at, Chain::from(kiobuf)));
    from.recv_timeout(std::time::Duration::from_secs(30))
        .unwrap()
}

fn read(device: &dyn BlockDevice, at: u64, buf: AlignedBuf) -> Completion {
    transfer(device, Op::Read, at, Box::new(buf))
}

/// A transfer that reaches beyond the end of a file is short, and says where.
#[test]
fn a_read_beyond_the_end_is_short() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(dir.path(), "disk");
    for backend in BACKENDS {
        let device = open_device(&path, mode(backend, false)).unwrap();
        let done = read(&*device, 32 * MIB - 8192, AlignedBuf::zeroed(16384));
        assert_eq!(done.bytes, 8192, "{}", device.kind());
        assert_eq!(done.error.unwrap().kind, ErrorKind::ShortTransfer);
    }
}

/// Pages of a leaked arena, in any order.
struct ArenaPages(Vec<PageRun>);

// SAFETY: the arena is never freed, and each test gives a page to one kiobuf at a time.
unsafe impl PageVector for ArenaPages {
    fn runs(&self) -> &[PageRun] {
        &self.0
    }
}

/// Returns when the device uses no registered memory any more.
fn forget(device: &dyn BlockDevice) {
    let (told, done) = channel();
    device.forget_memory(told);
    let limit = std::time::Duration::from_secs(30);
    let late = Err(std::sync::mpsc::RecvTimeoutError::Timeout);
    assert_ne!(done.recv_timeout(limit), late);
}

/// Scattered single pages and whole runs, inside and outside of registered memory, and in memory
/// that was registered.
#[test]
fn scattered_and_registered_memory_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(dir.path(), "disk");
    let arena: &'static mut AlignedBuf = Box::leak(Box::new(AlignedBuf::zeroed(8 << 20)));
    let base = arena.runs()[0].as_ptr();
    let run = |page: usize, pages: usize| {
        let at = NonNull::new(base.wrapping_add(page * 4096)).unwrap();
        // SAFETY: inside the arena, which is never freed.
        unsafe { PageRun::new(at, pages * 4096) }
    };
    let word = |page: usize| {
        // SAFETY: no I/O is under way when it is called.
        unsafe { base.wrapping_add(page * 4096).cast::<u64>().read() }
    };
    let set_word = |page: usize, value: u64| {
        // SAFETY: as above.
        unsafe { base.wrapping_add(page * 4096).cast::<u64>().write(value) }
    };
    for backend in BACKENDS {
        let device = open_device(&path, mode(backend, false)).unwrap();
        for phase in ["none", "registered", "forgotten"] {
            match phase {
                "registered" => device.register_memory(run(0, 2048)),
                "forgotten" => {
                    forget(&*device);
                    // Other pages than those that were registered lie there from now on.
                    // SAFETY: whole pages inside the arena, of which no byte is relied on.
                    let gone = unsafe { libc::madvise(base.cast(), 8 << 20, libc::MADV_DONTNEED) };
                    assert_eq!(gone, 0);
                }
                _ => {}
            }
            // Every second page of the first half, backwards.
            let scattered: Vec<usize> = (0..512).map(|index| 1022 - 2 * index).collect();
            let salt = (phase.len() as u64) << 32;
            scattered
                .iter()
                .for_each(|&page| set_word(page, page as u64 + salt));
            let pages = scattered.iter().map(|&page| run(page, 1)).collect();
            let done = transfer(&*device, Op::Write, MIB, Box::new(ArenaPages(pages)));
            assert_eq!(
                (done.bytes, done.error),
                (2 * MIB, None),
                "{}",
                device.kind()
            );
            // Back into the second half, in one run, and into memory outside.
            let done = transfer(
                &*device,
                Op::Read,
                MIB,
                Box::new(ArenaPages(vec![run(1024, 512)])),
            );
            assert_eq!((done.bytes, done.error), (2 * MIB, None));
            let outside = read(&*device, MIB, AlignedBuf::zeroed(2 << 20));
            let outside = AlignedBuf::from_pages(outside.pages.unwrap()).ok().unwrap();
            for (index, &page) in scattered.iter().enumerate() {
                assert_eq!(word(1024 + index), page as u64 + salt);
                assert_eq!(
                    outside[index * 4096..][..8],
                    (page as u64 + salt).to_le_bytes()
                );
            }
        }
    }
}

#[test]
fn a_read_only_volume_takes_no_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = disk(dir.path(), "disk");
    let open = |read_only| vec![open_device(&path, mode(Backend::Auto, read_only)).unwrap()];
    let volume = Volume::format(open(false), &FormatOptions::default()).unwrap();
    let at = volume.allocate_chunk(ChunkKind::Data, 0).unwrap().start;
    volume.close().unwrap();
    drop(volume);
    let before = std::fs::read(&path).unwrap();
    let volume = Volume::assemble(open(true), true).unwrap();
    volume
        .read_wait(at, AlignedBuf::zeroed(4096), None)
        .unwrap();
    let error = volume.write_wait(at, AlignedBuf::zeroed(4096)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Os(libc::EROFS));
    assert!(volume.allocate_chunk(ChunkKind::Data, 0).is_err());
    volume.close().unwrap();
    let error = volume
        .read_wait(at, AlignedBuf::zeroed(4096), None)
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::DeviceGone);
    drop(volume);
    assert!(std::fs::read(&path).unwrap() == before);
}

/// Many threads, small kiobufs, both backends: all end, and the bytes are right.
#[test]
fn many_submitters_share_a_volume() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [disk(dir.path(), "a"), disk(dir.path(), "b")];
    for backend in BACKENDS {
        let open = |path: &PathBuf| open_device(path, mode(backend, false)).unwrap();
        let devices: Vec<Arc<dyn BlockDevice>> = paths.iter().map(open).collect();
        let volume = Volume::format(devices, &FormatOptions::default()).unwrap();
        let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (volume, chunk) = (&volume, &chunk);
                scope.spawn(move || {
                    let (to, from) = channel();
                    for round in 0..64 {
                        let mut plug = volume.plug();
                        for step in 0..4 {
                            let at = chunk.start.plus((round * 16 + step * 4) + thread);
                            let to = to.clone();
                            let end_io = Box::new(move |done: Completion| {
                                to.send(done.error).unwrap();
                            });
                            let buf = common::tagged(at, 4096, round);
                            let kiobuf = Kiobuf::new(Box::new(buf), 0, 4096, end_io);
                            plug.write(at, kiobuf, Class::Background);
                        }
                    }
                    (0..256).for_each(|_| assert_eq!(from.recv().unwrap(), None));
                    volume.flush_wait().unwrap();
                });
            }
        });
        for round in 0..64 {
            let at = chunk.start.plus(round * 16);
            let back = volume
                .read_wait(at, AlignedBuf::zeroed(16 * 4096), None)
                .unwrap();
            assert!(back[..] == common::tagged(at, 16 * 4096, round)[..]);
        }
        volume.close().unwrap();
    }
}

/// A block device: needs root and a loop device; says so if it has none.
#[test]
fn block_devices_are_opened_exclusively() {
    let _none = NO_PROGRAMS.lock();
    let dir = tempfile::tempdir().unwrap();
    let path = disk(dir.path(), "disk");
    let setup = std::process::Command::new("losetup")
        .args(["--find", "--show"])
        .arg(&path)
        .output();
    let device = match setup {
        Ok(output) if output.status.success() => {
            PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
        }
        _ => return eprintln!("SKIPPED: no loop device to be had"),
    };
    let result = std::panic::catch_unwind(|| {
        assert_eq!(backed_loop_device(&path).as_ref(), Some(&device));
        let refused = open_device(&path, mode(Backend::Auto, false)).err();
        assert_eq!(refused, Some(OpenError::BacksLoop(device.clone())));
        for backend in BACKENDS {
            let open = || open_device(&device, mode(backend, false));
            let opened = open().unwrap();
            assert_eq!(opened.size_bytes(), 32 * MIB);
            assert_eq!(open().err(), Some(OpenError::InUse));
            let volume = Volume::format(vec![opened], &FormatOptions::default()).unwrap();
            let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
            let data = common::tagged(chunk.start, MIB, 3);
            volume.write_wait(chunk.start, data).unwrap();
            volume.discard(chunk.start, 16);
            volume.close().unwrap();
            drop(volume);
            let volume = Volume::assemble(vec![open().unwrap()], false).unwrap();
            let at = chunk.start.plus(16);
            let back = volume
                .read_wait(at, AlignedBuf::zeroed(65536), None)
                .unwrap();
            assert!(back[..] == common::tagged(at, 65536, 3)[..]);
            volume.close().unwrap();
        }
    });
    let detached = std::process::Command::new("losetup")
        .arg("--detach")
        .arg(&device)
        .status();
    assert!(detached.is_ok_and(|status| status.success()));
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}
