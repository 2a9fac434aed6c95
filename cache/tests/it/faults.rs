//! Devices that fail, lie or hang, and pages that are written while they are on their way.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use braidfs_blockdev::device::sim::SimEffect;
use braidfs_blockdev::{ChunkKind, ErrorKind, Op};
use braidfs_cache::{AddressSpace, CacheError, PageRange, ReadaheadState};

use crate::harness::*;

fn fail_writes(rig: &Rig) {
    for sim in &rig.sims {
        let everywhere = 0..sim.image().len() as u64;
        sim.inject(
            Op::Write,
            everywhere,
            SimEffect::Fail(ErrorKind::Os(libc::EIO)),
            None,
        );
    }
}

fn read_all(space: &Arc<AddressSpace>, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    space.read_wait(0, &mut out).unwrap();
    out
}

#[test]
fn a_write_during_writeback_leaves_the_bytes_on_their_way_alone() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions {
            cache: quiet(128 * MIB),
            ..RigOptions::default()
        });
        let space = rig.space(1);
        // A large folio, small ones, and a folio that is overwritten whole.
        let old = Rng::new(4).bytes(3 * MIB as usize);
        let mut new = space
            .write(0, &old[..2 * MIB as usize])
            .unwrap()
            .newly_dirty_pages;
        for page in 512..768 {
            let at = page * PAGE as usize;
            let bytes = &old[at..at + PAGE as usize];
            new += space.write(at as u64, bytes).unwrap().newly_dirty_pages;
        }
        rig.sims.iter().for_each(|sim| sim.hold(true));
        let flusher = {
            let space = Arc::clone(&space);
            std::thread::spawn(move || space.flush(PageRange::ALL))
        };
        until("writeback", || rig.cache.writeback_bytes() == 3 * MIB);
        assert_eq!(space.dirty_page_count(), 0);
        // A page under writeback that is dirtied again counts.
        let again = space.write(5000, &[1; 3000]).unwrap().newly_dirty_pages
            + space
                .write(MIB, &vec![2; MIB as usize])
                .unwrap()
                .newly_dirty_pages
            + space
                .write(2 * MIB + 64, &[3; 10])
                .unwrap()
                .newly_dirty_pages;
        assert_eq!(again, 1 + 256 + 1);
        let mut model = old.clone();
        model[5000..8000].fill(1);
        model[MIB as usize..2 * MIB as usize].fill(2);
        model[2 * MIB as usize + 64..2 * MIB as usize + 74].fill(3);
        assert!(read_all(&space, model.len()) == model);
        assert_eq!(
            space.next_cached_dirty(0),
            Some(PageRange { start: 0, end: 768 })
        );
        while !flusher.is_finished() {
            rig.sims.iter().for_each(|sim| sim.release_all());
            std::thread::yield_now();
        }
        flusher.join().unwrap().unwrap();
        assert_eq!(space.dirty_page_count(), 258);
        // What the devices got is what was there when the checksums were taken.
        for page in 0..768 {
            let (dev, at) = rig.store.place(1, page, 0);
            let on_device = rig.sims[dev].peek(at, PAGE as usize);
            let at = (page * PAGE) as usize;
            assert!(on_device == old[at..at + PAGE as usize], "page {page}");
        }
        rig.sims.iter().for_each(|sim| sim.hold(false));
        space.flush(PageRange::ALL).unwrap();
        rig.cache.drop_clean();
        assert!(read_all(&space, model.len()) == model);
        rig.check_books(new + again, 0, 0);
        assert!(rig.cache.stats().folio_splits > 0 && rig.cache.stats().cow_pages > 0);
    });
}

#[test]
fn discard_waits_for_writeback() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions::default());
        let space = rig.space(1);
        let new = space
            .write(0, &[1; 100 * PAGE as usize])
            .unwrap()
            .newly_dirty_pages;
        rig.sims.iter().for_each(|sim| sim.hold(true));
        let flush = {
            let space = Arc::clone(&space);
            std::thread::spawn(move || space.flush(PageRange { start: 0, end: 60 }))
        };
        until("writeback", || rig.cache.writeback_bytes() == 60 * PAGE);
        let discard = {
            let space = Arc::clone(&space);
            std::thread::spawn(move || {
                space.discard(PageRange {
                    start: 50,
                    end: 100,
                })
            })
        };
        until("the idle part to go", || {
            !space.has_pages(PageRange {
                start: 60,
                end: 100,
            })
        });
        std::thread::sleep(Duration::from_millis(20));
        assert!(!discard.is_finished());
        while !flush.is_finished() {
            rig.sims.iter().for_each(|sim| sim.release_all());
            std::thread::yield_now();
        }
        flush.join().unwrap().unwrap();
        assert_eq!(discard.join().unwrap(), 40);
        assert!(!space.has_pages(PageRange {
            start: 50,
            end: 100
        }));
        rig.check_books(new, 40, 0);
    });
}

#[test]
fn a_failed_write_leaves_pages_dirty_and_is_reported_and_retried() {
    within(Duration::from_secs(60), || {
        let rig = Rig::new(RigOptions::default());
        let space = rig.space(1);
        let data = Rng::new(5).bytes(MIB as usize);
        let new = space.write(0, &data).unwrap().newly_dirty_pages;
        fail_writes(&rig);
        let seen = space.write_error_seq();
        let error = space.flush(PageRange::ALL).unwrap_err();
        assert!(matches!(error, CacheError::Block(block) if block.op == Op::Write));
        assert_eq!(error.errno(), libc::EIO);
        assert_ne!(space.write_error_seq(), seen);
        assert_eq!(
            space.last_write_error().map(|last| last.errno()),
            Some(libc::EIO)
        );
        assert_eq!(space.dirty_page_count(), new);
        rig.check_books(new, 0, new);
        // Never silently clean, never lost.
        rig.cache.drop_clean();
        rig.cache.flush_all(braidfs_cache::SpaceClass::Data);
        assert_eq!(space.dirty_page_count(), new);
        assert!(read_all(&space, data.len()) == data);
        rig.sims.iter().for_each(|sim| sim.heal());
        let seen = space.write_error_seq();
        space.flush(PageRange::ALL).unwrap();
        assert_eq!(space.write_error_seq(), seen);
        rig.cache.drop_clean();
        assert!(read_all(&space, data.len()) == data);
        rig.check_books(new, 0, 0);
    });
}

#[test]
fn a_page_dirtied_again_while_its_write_fails_is_one_dirty_page() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions::default());
        let space = rig.space(1);
        let mut new = space
            .write(0, &[1; 8 * PAGE as usize])
            .unwrap()
            .newly_dirty_pages;
        fail_writes(&rig);
        rig.sims.iter().for_each(|sim| sim.hold(true));
        let flush = {
            let space = Arc::clone(&space);
            std::thread::spawn(move || space.flush(PageRange::ALL))
        };
        until("writeback", || rig.cache.writeback_bytes() == 8 * PAGE);
        new += space
            .write(2 * PAGE, &[2; 3 * PAGE as usize])
            .unwrap()
            .newly_dirty_pages;
        assert_eq!(new, 11);
        while !flush.is_finished() {
            rig.sims.iter().for_each(|sim| sim.release_all());
            std::thread::yield_now();
        }
        assert!(flush.join().unwrap().is_err());
        assert_eq!(space.dirty_page_count(), 8);
        assert_eq!(rig.store.merged.load(Ordering::SeqCst), 3);
        rig.check_books(new, 0, 8);
        rig.sims
            .iter()
            .for_each(|sim| (sim.heal(), sim.hold(false)).1);
        space.flush(PageRange::ALL).unwrap();
        rig.check_books(new, 0, 0);
    });
}

#[test]
fn no_room_for_dirty_pages_is_an_error_that_passes() {
    let rig = Rig::new(RigOptions::default());
    let space = rig.space(1);
    let new = space
        .write(0, &[1; 9 * PAGE as usize])
        .unwrap()
        .newly_dirty_pages;
    *rig.store.fail_allocate.lock().unwrap() = Some(libc::ENOSPC);
    let error = space.flush(PageRange::ALL).unwrap_err();
    assert_eq!(error, CacheError::Backing(libc::ENOSPC));
    assert_eq!((space.dirty_page_count(), space.write_error_seq()), (9, 1));
    *rig.store.fail_allocate.lock().unwrap() = None;
    space.flush(PageRange::ALL).unwrap();
    rig.check_books(new, 0, 0);
}

#[test]
fn silent_corruption_is_an_error_and_never_cached() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions::default());
        let space = rig.space(1);
        let data = Rng::new(6).bytes(64 * PAGE as usize);
        space.write(0, &data).unwrap();
        space.flush(PageRange::ALL).unwrap();
        rig.cache.drop_clean();
        let (dev, at) = rig.store.place(1, 20, 0);
        rig.sims[dev].flip_bit(at + 1000, 3);
        let ra = ReadaheadState::new();
        let all = read_async(&space, &ra, 0, data.len(), data.len() as u64);
        let block = rig.store.home(1, 20).unwrap();
        assert_eq!(all.unwrap_err(), CacheError::Corrupt { block });
        assert!(!space.has_pages(PageRange::single(20)));
        // Everything beside it is good.
        for page in (0..64u64).filter(|&page| page != 20) {
            let got = read_async(&space, &ra, page * PAGE, PAGE as usize, 0).unwrap();
            assert!(got == data[(page * PAGE) as usize..((page + 1) * PAGE) as usize]);
        }
        let mut out = [0; 100];
        let error = space.read_wait(20 * PAGE, &mut out).unwrap_err();
        assert_eq!(error, CacheError::Corrupt { block });
        // A write of a part must not take the bad rest for good.
        let (error, outcome) = space.write(20 * PAGE + 5, &[1; 10]).unwrap_err();
        assert_eq!(
            (error, outcome.newly_dirty_pages),
            (CacheError::Corrupt { block }, 0)
        );
        // A write of all of it heals it.
        space.write(20 * PAGE, &[7; PAGE as usize]).unwrap();
        space.flush(PageRange::ALL).unwrap();
        rig.cache.drop_clean();
        space.read_wait(20 * PAGE, &mut out).unwrap();
        assert_eq!(out, [7; 100]);
        assert!(rig.cache.stats().crc_errors >= 3);
        assert!(rig.store.corrupt.lock().unwrap().contains(&(1, 20, 0)));
    });
}

#[test]
fn a_corrupt_copy_is_replaced_by_the_other_one() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions {
            kind: ChunkKind::Meta,
            ..RigOptions::default()
        });
        let space = rig.space(1);
        let data = Rng::new(7).bytes(32 * PAGE as usize);
        space.write(0, &data).unwrap();
        space.flush(PageRange::ALL).unwrap();
        rig.cache.drop_clean();
        for page in 0..32 {
            // One copy of each, by turns.
            let (dev, at) = rig.store.place(1, page, (page % 2) as u8);
            rig.sims[dev].flip_bit(at, 0);
        }
        assert!(read_all(&space, data.len()) == data);
        let stats = rig.cache.stats();
        assert!(stats.crc_errors > 0 && stats.crc_errors == stats.crc_repaired);
        let corrupt = rig.store.corrupt.lock().unwrap();
        assert!(
            corrupt
                .iter()
                .all(|&(_, page, copy)| page % 2 == u64::from(copy))
        );
    });
}

#[test]
fn a_device_that_fails_reads_fails_its_pages_alone() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions::default());
        let space = rig.space(1);
        let data = Rng::new(8).bytes(2 * MIB as usize);
        space.write(0, &data).unwrap();
        space.flush(PageRange::ALL).unwrap();
        rig.cache.drop_clean();
        let size = rig.sims[0].image().len() as u64;
        let effect = SimEffect::Fail(ErrorKind::Os(libc::EIO));
        rig.sims[0].inject(Op::Read, 0..size, effect, None);
        let ra = ReadaheadState::new();
        let mut good = 0;
        for page in 0..512u64 {
            let got = read_async(&space, &ra, page * PAGE, PAGE as usize, 0);
            if rig.store.place(1, page, 0).0 == 0 {
                assert!(matches!(got, Err(CacheError::Block(error)) if error.dev == 0));
            } else {
                let at = (page * PAGE) as usize;
                assert!(got.unwrap() == data[at..at + PAGE as usize]);
                good += 1;
            }
        }
        assert!((200..312).contains(&good), "striped over two: {good}");
        rig.sims[0].heal();
        assert!(read_all(&space, data.len()) == data);
    });
}

#[test]
fn readers_of_the_same_page_share_one_read_and_writers_wait_for_it() {
    within(Duration::from_secs(30), || {
        let rig = Rig::new(RigOptions::default());
        let space = rig.space(1);
        let data = Rng::new(9).bytes(16 * PAGE as usize);
        space.write(0, &data).unwrap();
        space.flush(PageRange::ALL).unwrap();
        rig.cache.drop_clean();
        rig.sims.iter().for_each(|sim| sim.hold(true));
        let readers: Vec<_> = (0..4u64)
            .map(|reader| {
                let (space, data) = (Arc::clone(&space), data.clone());
                std::thread::spawn(move || {
                    let ra = ReadaheadState::new();
                    let (at, len) = ((reader * 3 * PAGE) as usize, 6 * PAGE as usize);
                    let got = read_async(&space, &ra, at as u64, len, 0).unwrap();
                    // The write may come before the later pages' read or after.
                    assert!(got[..PAGE as usize] == data[at..at + PAGE as usize]);
                })
            })
            .collect();
        let held = |rig: &Rig| -> u64 {
            rig.sims
                .iter()
                .flat_map(|sim| sim.held())
                .map(|(_, _, len)| len)
                .sum()
        };
        until("reads", || held(&rig) == 15 * PAGE);
        let writer = {
            let space = Arc::clone(&space);
            std::thread::spawn(move || space.write(4 * PAGE + 7, &[1; 10]).unwrap())
        };
        std::thread::sleep(Duration::from_millis(20));
        assert!(!writer.is_finished());
        while !writer.is_finished() || !readers.iter().all(|reader| reader.is_finished()) {
            rig.sims.iter().for_each(|sim| sim.release_all());
            std::thread::yield_now();
        }
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(writer.join().unwrap().newly_dirty_pages, 1);
        assert_eq!(rig.cache.stats().read_pages, 15);
        let mut out = [0; 17];
        space.read_wait(4 * PAGE, &mut out).unwrap();
        assert_eq!(out[7..], [1; 10]);
    });
}
