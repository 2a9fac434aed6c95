//! Where the power is cut, and what is lost then.

use std::collections::HashSet;

use braidfs_blockdev::device::sim::{SimEvent, SimImage, SimLoss, SimReplay};

use crate::record::History;

/// With so few writes at stake every subset of them is tried.
const SUBSETS_OF: u64 = 4;

/// A point of the record.
pub struct Cut {
    /// The power fails behind so many events.
    pub behind: usize,
    /// The devices there.
    pub replay: SimReplay,
    /// The steps after which the tree may be.
    pub oldest: u64,
    pub youngest: u64,
}

/// Calls `each` for every write and flush of the record, and for its start, until it says stop.
pub fn each_cut<E>(
    history: &History,
    mut each: impl FnMut(&Cut) -> Result<(), E>,
) -> Result<(), E> {
    let last = history.trees.len() as u64 - 1;
    let mut cut = Cut {
        behind: 0,
        replay: history.base.clone(),
        oldest: 0,
        youngest: 1,
    };
    each(&cut)?;
    for (nth, event) in (1..).zip(&history.events) {
        cut.replay.step(event);
        cut.behind = nth;
        if let SimEvent::Mark(ended) = event {
            let index = usize::try_from(*ended).expect("an index");
            cut.oldest = history.durable[index];
            cut.youngest = (ended + 1).min(last);
        }
        // A cut behind a mark is one more: what is at stake is the same, what is promised more.
        each(&cut)?;
    }
    Ok(())
}

/// What may be lost at this cut: all subsets of few writes; of many each alone, whole and torn, and
/// some by lot.
pub fn losses(cut: &Cut, seed: u64) -> Vec<SimLoss> {
    let (writes, devices) = (cut.replay.pending(), cut.replay.devices());
    let seed = |nth: u64| seed ^ (cut.behind as u64) << 32 ^ nth << 8;
    let mut losses = vec![SimLoss::Nothing];
    if writes == 0 {
        return losses;
    }
    losses.push(SimLoss::All);
    if writes <= SUBSETS_OF {
        losses.extend((1..(1 << writes) - 1).map(SimLoss::Kept));
    } else {
        losses.extend((0..writes).map(SimLoss::OneLost));
        losses.extend((0..writes).map(SimLoss::OneKept));
        losses.extend((1..writes).step_by(2).map(SimLoss::Front));
        losses.extend((0..3).map(|nth| SimLoss::Writes(seed(nth))));
    }
    if devices > 1 {
        losses.extend((1..(1 << devices) - 1).map(SimLoss::Devices));
    }
    // The write that came last is the one that a cut is most likely to tear.
    losses.push(SimLoss::OneTorn(seed(4) % writes, seed(5)));
    losses.push(SimLoss::Pages(seed(6)));
    losses.extend((7..10).map(|nth| SimLoss::Sectors(seed(nth))));
    losses
}

/// States that have been checked already. What may be found belongs to a state.
#[derive(Default)]
pub struct Known(HashSet<u64>);

impl Known {
    /// Whether this state is a new one.
    pub fn is_new(&mut self, images: &[SimImage], cut: &Cut) -> bool {
        let mut sum = cut.oldest << 32 ^ cut.youngest;
        for image in images {
            sum = sum.rotate_left(17).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ image.digest();
        }
        self.0.insert(sum)
    }
}
