//! What each operation does, one at a time.

use std::sync::atomic::Ordering;

use braidfs_cache::{PageRange, ReadaheadState};

use crate::harness::*;

fn pages(start: u64, end: u64) -> PageRange {
    PageRange { start, end }
}

#[test]
fn written_bytes_come_back_before_and_after_flush_and_drop() {
    let rig = Rig::new(RigOptions::default());
    let space = rig.space(1);
    let data = Rng::new(1).bytes(3 * MIB as usize + 1234);
    let new = space.write(777, &data).unwrap().newly_dirty_pages;
    assert_eq!(new, (777 + data.len() as u64).div_ceil(PAGE));
    assert_eq!(space.dirty_page_count(), new);
    for step in 0..3 {
        let mut out = vec![1; data.len() + 777];
        space.read_wait(0, &mut out).unwrap();
        assert!(out[..777].iter().all(|&byte| byte == 0));
        assert!(out[777..] == data, "step {step}");
        space.flush(PageRange::ALL).unwrap();
        assert_eq!(space.dirty_page_count(), 0);
        if step == 1 {
            rig.cache.drop_clean();
            assert_eq!(space.page_count(), 0);
        }
    }
    rig.check_books(new, 0, 0);
    let stats = rig.cache.stats();
    assert_eq!((stats.dirty_bytes, stats.writeback_bytes), (0, 0));
    assert_eq!(stats.crc_errors, 0);
}

#[test]
fn a_large_write_is_one_folio_and_a_hit_one_slice() {
    let rig = Rig::new(RigOptions::default());
    let space = rig.space(1);
    let data = Rng::new(2).bytes(MIB as usize);
    space.write(MIB, &data).unwrap();
    assert_eq!(rig.cache.stats().folios_by_order[8], 1);
    let ra = ReadaheadState::new();
    let hit = space.read_cached(MIB, MIB as usize, &ra).unwrap();
    assert!(hit.as_single().unwrap() == data);
    assert!(space.read_cached(MIB, MIB as usize + 1, &ra).is_none());
    let part = space.read_cached(MIB + 4000, 5000, &ra).unwrap();
    assert!(part.as_single().unwrap() == &data[4000..9000]);
    space.flush(PageRange::ALL).unwrap();
    // A pinned slice stays as it is, whatever is written meanwhile.
    space.write(MIB, &vec![7; MIB as usize]).unwrap();
    space.write(MIB + 100, &[9; 50]).unwrap();
    assert!(hit.as_single().unwrap() == data);
    space.discard(PageRange::ALL);
    assert!(hit.as_single().unwrap() == data);
}

#[test]
fn small_sequential_writes_grow_their_folios() {
    let rig = Rig::new(RigOptions::default());
    let space = rig.space(1);
    for page in 0..512u64 {
        let new = space
            .write(page * PAGE, &[3; PAGE as usize])
            .unwrap()
            .newly_dirty_pages;
        assert_eq!(new, 1);
    }
    let folios: u64 = rig.cache.stats().folios_by_order.iter().sum();
    assert!(folios < 40, "{folios} folios for 512 pages");
    assert_eq!(space.page_count(), 512);
}

#[test]
fn discard_and_zero() {
    let rig = Rig::new(RigOptions::default());
    let space = rig.space(1);
    let mut new = space
        .write(0, &[1; 64 * PAGE as usize])
        .unwrap()
        .newly_dirty_pages;
    assert_eq!(space.discard(pages(10, 20)), 10);
    assert!(!space.has_pages(pages(10, 20)) && space.has_pages(pages(19, 21)));
    assert_eq!(space.next_cached_dirty(0), Some(pages(0, 10)));
    assert_eq!(space.next_cached_dirty(5), Some(pages(5, 10)));
    assert_eq!(space.next_cached_dirty(10), Some(pages(20, 64)));
    assert_eq!(space.next_cached_dirty(64), None);
    // Zero over a hole makes nothing dirty; over data, its pages, once.
    assert_eq!(
        space.zero(12 * PAGE + 100, 500).unwrap().newly_dirty_pages,
        0
    );
    assert_eq!(
        space.zero(30 * PAGE + 100, 500).unwrap().newly_dirty_pages,
        0
    );
    space.flush(PageRange::ALL).unwrap();
    let zeroed = space
        .zero(30 * PAGE + 50, 2 * PAGE)
        .unwrap()
        .newly_dirty_pages;
    assert_eq!(zeroed, 3);
    new += zeroed;
    let mut out = vec![9; 64 * PAGE as usize];
    space.read_wait(0, &mut out).unwrap();
    for (at, &byte) in out.iter().enumerate() {
        let at = at as u64;
        let hole = (10 * PAGE..20 * PAGE).contains(&at);
        let zero = (30 * PAGE + 50..32 * PAGE + 50).contains(&at)
            || (30 * PAGE + 100..30 * PAGE + 600).contains(&at);
        assert_eq!(byte, u8::from(!hole && !zero), "byte {at}");
    }
    rig.check_books(new, 10, space.dirty_page_count());
    assert_eq!(space.discard(PageRange::ALL), 3);
    assert_eq!(space.page_count(), 0);
    rig.check_books(new, 13, 0);
}

#[test]
fn flush_all_takes_every_space_and_small_files_share_requests() {
    let rig = Rig::new(RigOptions::default());
    let spaces: Vec<_> = (0..300).map(|id| rig.space(id)).collect();
    for space in &spaces {
        space.write(0, &[5; 8192]).unwrap();
    }
    for sim in &rig.sims {
        sim.clear_log();
    }
    rig.cache.flush_all(braidfs_cache::SpaceClass::Data);
    assert!(spaces.iter().all(|space| space.dirty_page_count() == 0));
    let requests: usize = rig.sims.iter().map(|sim| sim.log().len()).sum();
    assert!(requests <= 12, "{requests} requests for 2.4 MB");
    let mean = requests_mean(&rig);
    assert!(mean > 128 << 10, "{mean}");
    rig.check_books(600, 0, 0);
}

fn requests_mean(rig: &Rig) -> u64 {
    let (mut count, mut bytes) = (0, 0);
    for queue in &rig.volume.stats().devices {
        count += queue.write.requests;
        bytes += queue.write.bytes;
    }
    bytes / count.max(1)
}

/// Item of the acceptance list: small writes, in sequence or at random, leave as large requests.
#[test]
fn small_writes_leave_as_large_requests() {
    for random in [false, true] {
        let mut options = RigOptions {
            device_bytes: 128 * MIB,
            ..RigOptions::default()
        };
        options.cache = quiet(64 * MIB);
        let rig = Rig::new(options);
        let before = rig.volume.stats();
        let count = |stats: &braidfs_blockdev::VolumeStats| {
            stats.devices.iter().fold((0, 0), |sum, queue| {
                (sum.0 + queue.write.requests, sum.1 + queue.write.bytes)
            })
        };
        let space = rig.space(1);
        let mut rng = Rng::new(3);
        let total = 8192u64;
        for index in 0..total {
            let page = if random { rng.below(1 << 18) } else { index };
            space.write(page * PAGE, &rng.bytes(PAGE as usize)).unwrap();
        }
        let dirty = space.dirty_page_count();
        space.flush(PageRange::ALL).unwrap();
        let (old, new) = (count(&before), count(&rig.volume.stats()));
        let mean = (new.1 - old.1) / (new.0 - old.0);
        let kiobufs = rig.cache.stats().writeback_kiobufs;
        println!("random {random}: {dirty} pages, {kiobufs} kiobufs, mean request {mean}");
        assert!(mean >= 512 << 10, "random {random}: mean {mean}");
        assert_eq!(new.1 - old.1, dirty * PAGE);
    }
}

#[test]
fn private_pages_are_exact_and_come_back() {
    let rig = Rig::new(RigOptions::default());
    let free = rig.cache.stats().free_bytes;
    let mut vec = rig.cache.alloc_private(300_000).unwrap();
    assert_eq!(vec.slices().map(<[u8]>::len).sum::<usize>(), 300_000);
    for slice in vec.slices_mut() {
        slice.fill(8);
    }
    let boxed = vec.into_pages();
    let total: usize = boxed.runs().iter().map(|run| run.len()).sum();
    assert_eq!(total, 300_000usize.next_multiple_of(4096));
    let vec = braidfs_cache::FrameVec::from_pages(boxed).unwrap();
    assert!(vec.slices().flatten().all(|&byte| byte == 8));
    let mut lender = vec.lend();
    let (first, second) = (lender.take(10), lender.take(64));
    assert_eq!(
        second.runs().iter().map(|run| run.len()).sum::<usize>(),
        64 * 4096
    );
    drop((first, second));
    drop(lender.finish().unwrap());
    assert_eq!(rig.cache.stats().free_bytes, free);
    assert!(rig.cache.alloc_private(64 << 20).is_none());
    assert_eq!(rig.store.calls.load(Ordering::Relaxed), 0);
}

#[test]
fn metadata_is_served_from_the_reserve() {
    let rig = Rig::new(RigOptions::default());
    let data = rig.space(1);
    rig.store.gate.shut();
    // Data takes all it can: the gate keeps the flushers from cleaning any of it.
    let room = (rig.cache.stats().free_bytes - rig.cache.stats().reserve_bytes) / PAGE;
    for page in 0..room {
        data.write(page * PAGE, &[1; PAGE as usize]).unwrap();
    }
    // More has to wait, and leaves the reserve alone.
    let greedy = {
        let data = std::sync::Arc::clone(&data);
        std::thread::spawn(move || data.write(room * PAGE, &[1; 300 * PAGE as usize]).unwrap())
    };
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(!greedy.is_finished());
    let stats = rig.cache.stats();
    assert_eq!(stats.free_bytes, stats.reserve_bytes, "{stats:?}");
    let backing = std::sync::Arc::clone(&rig.store) as std::sync::Arc<dyn braidfs_cache::Backing>;
    let meta = rig
        .cache
        .new_space(2, braidfs_cache::SpaceClass::Meta, backing);
    meta.write(0, &[2; 64 * PAGE as usize]).unwrap();
    let mut out = [0; 5000];
    meta.read_wait(60 * PAGE, &mut out).unwrap();
    assert_eq!(out[..16384.min(out.len())], [2; 5000]);
    meta.read_wait(1 << 30, &mut out).unwrap();
    assert_eq!(out, [0; 5000]);
    rig.store.gate.open();
    assert_eq!(greedy.join().unwrap().newly_dirty_pages, 300);
    rig.cache.flush_all(braidfs_cache::SpaceClass::Meta);
    rig.cache.flush_all(braidfs_cache::SpaceClass::Data);
    assert_eq!(meta.dirty_page_count() + data.dirty_page_count(), 0);
}
