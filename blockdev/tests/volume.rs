//! The volume end to end on simulated devices and on files.

mod common;

use braidfs_blockdev::{
    AlignedBuf, Backend, ChunkKind, Class, FormatOptions, Kiobuf, OpenMode, VolBlock, Volume,
    open_device,
};
use common::{MIB, as_devices, options, sims};
use std::sync::mpsc::channel;

fn pattern(len: usize, salt: u64) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(len);
    for (index, word) in buf.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&((index as u64) ^ (salt << 40)).to_le_bytes());
    }
    buf
}

#[test]
fn written_bytes_come_back_and_survive_reassembly() {
    let sims = sims(&[32 * MIB, 32 * MIB, 32 * MIB, 32 * MIB]);
    let volume = Volume::format(as_devices(&sims), &options(64 << 10)).unwrap();
    let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
    assert_eq!(chunk.members.len(), 4);
    let data = pattern(3 << 20, 1);
    let want = data.to_vec();
    let at = chunk.start.plus(5);
    volume.write_wait(at, data).unwrap();
    let back = volume
        .read_wait(at, AlignedBuf::zeroed(3 << 20), None)
        .unwrap();
    assert!(back[..] == want[..]);
    volume.close().unwrap();
    drop(volume);
    let volume = Volume::assemble(as_devices(&sims), false).unwrap();
    assert!(volume.info().was_clean);
    let back = volume
        .read_wait(at, AlignedBuf::zeroed(3 << 20), None)
        .unwrap();
    assert!(back[..] == want[..]);
    assert_eq!(volume.chunks().len(), 2);
    drop(volume);
    assert!(
        !Volume::assemble(as_devices(&sims), true)
            .unwrap()
            .info()
            .was_clean
    );
}

#[test]
fn files_work_with_every_backend() {
    let dir = tempfile::tempdir().unwrap();
    for backend in [Backend::Threads, Backend::Auto] {
        for direct in [false, true] {
            let paths: Vec<_> = (0..3)
                .map(|i| dir.path().join(format!("disk{i}")))
                .collect();
            for path in &paths {
                std::fs::File::create(path)
                    .unwrap()
                    .set_len(32 * MIB)
                    .unwrap();
            }
            let mode = OpenMode {
                read_only: false,
                direct,
                backend,
                ..OpenMode::default()
            };
            let open = || {
                paths
                    .iter()
                    .map(|p| open_device(p, mode).unwrap())
                    .collect::<Vec<_>>()
            };
            let volume = Volume::format(open(), &FormatOptions::default()).unwrap();
            let chunk = volume.allocate_chunk(ChunkKind::Data, 0).unwrap();
            let (tell, ended) = channel();
            let mut plug = volume.plug();
            for number in 0..chunk.len_blocks / 256 {
                let tell = tell.clone();
                let kiobuf = Kiobuf::new(
                    Box::new(pattern(1 << 20, number)),
                    0,
                    1 << 20,
                    Box::new(move |done| tell.send((done.bytes, done.error)).unwrap()),
                );
                plug.write(chunk.start.plus(number * 256), kiobuf, Class::Background);
            }
            plug.finish();
            for _ in 0..chunk.len_blocks / 256 {
                assert_eq!(ended.recv().unwrap(), (MIB, None));
            }
            volume.close().unwrap();
            drop(volume);
            let volume = Volume::assemble(open(), false).unwrap();
            for number in 0..chunk.len_blocks / 256 {
                let at = chunk.start.plus(number * 256);
                let back = volume
                    .read_wait(at, AlignedBuf::zeroed(1 << 20), None)
                    .unwrap();
                assert!(
                    back[..] == pattern(1 << 20, number)[..],
                    "{backend:?} {direct}"
                );
            }
            volume.close().unwrap();
            let stats = serde_json::to_string(&volume.stats()).unwrap();
            assert!(stats.contains("request_bytes"));
        }
    }
}

#[test]
fn a_block_outside_every_chunk_is_out_of_range() {
    let sims = sims(&[16 * MIB]);
    let volume = Volume::format(as_devices(&sims), &options(64 << 10)).unwrap();
    let error = volume
        .read_wait(VolBlock(1 << 30), AlignedBuf::zeroed(4096), None)
        .unwrap_err();
    assert_eq!(error.kind, braidfs_blockdev::ErrorKind::OutOfRange);
}
