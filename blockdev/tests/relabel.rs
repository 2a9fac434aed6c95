//! Another label for a volume, while it is used and while it is not: in both copies of every
//! member, and one of the two, whole, after a power cut anywhere.

mod common;

use braidfs_blockdev::device::sim::SimPower;
use braidfs_blockdev::{SimDevice, Volume, VolumeErrorKind};
use common::{KIB, MIB, as_devices, options, sims};
use std::sync::Arc;

const LABEL_PLACES: [u64; 2] = [0, 512 * KIB];

/// A closed volume called "old".
fn volume_called_old(count: usize) -> Vec<Arc<SimDevice>> {
    let sims = sims(&vec![16 * MIB; count]);
    let mut options = options(64 * KIB);
    options.label = "old".to_owned();
    let volume = Volume::format(as_devices(&sims), &options).unwrap();
    volume.close().unwrap();
    sims
}

fn text_and_clean(sims: &[Arc<SimDevice>]) -> (String, bool) {
    let volume = Volume::assemble(as_devices(sims), true).unwrap();
    (volume.label_text(), volume.info().was_clean)
}

fn change(sims: &[Arc<SimDevice>], mounted: bool) -> bool {
    if !mounted {
        return Volume::relabel(as_devices(sims), "new").is_ok();
    }
    Volume::assemble(as_devices(sims), false).is_ok_and(|volume| {
        let changed = volume.set_label("new").is_ok();
        changed && volume.close().is_ok()
    })
}

#[test]
fn both_copies_of_all_members_say_the_new_label() {
    for mounted in [false, true] {
        for lost in LABEL_PLACES {
            let sims = volume_called_old(3);
            assert!(change(&sims, mounted));
            assert_eq!(text_and_clean(&sims), ("new".to_owned(), true));
            for sim in &sims {
                sim.poke(lost + 100, &[0xff; 8]);
            }
            assert_eq!(text_and_clean(&sims).0, "new", "without byte {lost}");
            let volume = Volume::assemble(as_devices(&sims), false).unwrap();
            assert_eq!(volume.check_labels(), []);
            volume.close().unwrap();
        }
    }
}

/// A volume that needs recovery must not look as if it did not.
#[test]
fn what_was_not_closed_properly_stays_so() {
    let sims = volume_called_old(2);
    drop(Volume::assemble(as_devices(&sims), false).unwrap());
    assert_eq!(text_and_clean(&sims), ("old".to_owned(), false));
    Volume::relabel(as_devices(&sims), "new").unwrap();
    assert_eq!(text_and_clean(&sims), ("new".to_owned(), false));
}

#[test]
fn a_label_that_cannot_be_written_is_refused() {
    let sims = volume_called_old(1);
    let long = "x".repeat(65);
    let volume = Volume::assemble(as_devices(&sims), false).unwrap();
    for text in [&*long, "a\0b"] {
        let error = volume.set_label(text).unwrap_err();
        assert!(matches!(error.kind(), VolumeErrorKind::LabelText(64)));
        let error = Volume::relabel(as_devices(&sims), text).unwrap_err();
        assert!(matches!(error.kind(), VolumeErrorKind::LabelText(64)));
    }
    volume.set_label(&"x".repeat(64)).unwrap();
    volume.set_label("").unwrap();
    volume.close().unwrap();
    let volume = Volume::assemble(as_devices(&sims), true).unwrap();
    assert_eq!(volume.label_text(), "");
    assert_eq!(
        volume.set_label("x").unwrap_err().kind(),
        &VolumeErrorKind::ReadOnly
    );
}

#[test]
fn a_power_cut_anywhere_leaves_the_old_label_or_the_new_one() {
    let sims = volume_called_old(3);
    let images: Vec<_> = sims.iter().map(|sim| sim.image()).collect();
    for mounted in [false, true] {
        let mut seen = Vec::new();
        for cut_at in 0.. {
            let power = SimPower::new();
            power.cut_at(cut_at);
            let named = |(index, image): (usize, &Vec<u8>)| {
                SimDevice::from_image(&format!("sim{index}"), image.clone(), &power)
            };
            let sims: Vec<_> = images.iter().enumerate().map(named).collect();
            let survived = change(&sims, mounted);
            for seed in 0..4 {
                let wreck = |(index, sim): (usize, &Arc<SimDevice>)| {
                    let name = format!("sim{index}");
                    SimDevice::from_image(&name, sim.crash(seed), &SimPower::new())
                };
                let sims: Vec<_> = sims.iter().enumerate().map(wreck).collect();
                let text = text_and_clean(&sims).0;
                let volume = Volume::assemble(as_devices(&sims), false).unwrap();
                assert_eq!(volume.label_text(), text, "to write as to read");
                assert_eq!(volume.check_labels(), []);
                volume.close().unwrap();
                assert_eq!(text_and_clean(&sims), (text.clone(), true));
                seen.push(text);
            }
            if survived {
                assert!(cut_at > 20, "only {cut_at} operations");
                break;
            }
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, ["new", "old"], "both outcomes were met");
    }
}
