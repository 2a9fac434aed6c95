//! One workload for one peer in one round.

use std::path::Path;

use crate::cli::Plan;
use crate::measure::{Cost, Sample, Unit, Work};
use crate::media::{DEVICES, Media};
use crate::peers::Peer;
use crate::plan::{Kind, Scale, Workload};
use crate::stage::Stage;
use crate::{large, small};

/// What a workload has to work with.
pub struct Run<'b> {
    pub workload: &'static Workload,
    pub peer: &'b Peer,
    pub round: usize,
    pub plan: &'b Plan,
    pub work: &'b Path,
    /// What was measured so far.
    pub samples: Vec<Sample>,
    /// One stage at a time is on it.
    pub media: &'b Media,
}

impl<'b> Run<'b> {
    /// The peer on all devices, freshly formatted and mounted; with further options, if it is
    /// braidfs.
    pub fn stage(&self, options: &str) -> Stage<'b> {
        self.stage_on(DEVICES, options)
    }

    /// The same on so many devices.
    pub fn stage_on(&self, count: usize, options: &str) -> Stage<'b> {
        Stage::new(
            self.peer,
            &self.plan.programs,
            self.media,
            self.work,
            count,
            options,
        )
    }

    /// Whether anybody wants to know a row: what no other one is made from can be left out.
    pub fn wants(&self, row: &str) -> bool {
        self.plan.wants(self.workload, self.media.kind, row)
    }

    /// How much is done.
    pub fn scale(&self) -> Scale {
        self.plan.scale
    }

    /// Notes a row.
    pub fn record(&mut self, row: &str, unit: Unit, work: &Work, cost: Cost) {
        let value = match unit {
            Unit::BytesPerSecond => work.bytes / work.secs,
            Unit::PerSecond => work.operations / work.secs,
            Unit::Seconds => work.secs,
        };
        self.samples.push(Sample {
            media: self.media.kind.name().to_owned(),
            workload: self.workload.name.to_owned(),
            row: row.to_owned(),
            peer: self.peer.name.clone(),
            round: self.round,
            unit,
            value,
            cost,
        });
    }

    /// Does it all.
    pub fn perform(&mut self) {
        match self.workload.kind {
            Kind::Sequential {
                block,
                direct,
                depth,
            } => large::sequential(self, block, direct, depth),
            Kind::Tiny => large::tiny(self),
            Kind::Random { direct, jobs } => large::random(self, direct, jobs),
            Kind::Overwrite => large::overwrite(self),
            Kind::Fsync { jobs } => large::fsync(self, jobs),
            Kind::Mixed { jobs } => large::mixed(self, jobs),
            Kind::Mmap => large::mmap(self),
            Kind::Dd => large::dd(self),
            Kind::Copy => small::copy(self),
            Kind::Files => small::files(self),
            Kind::Million { dirs } => small::million(self, dirs),
            Kind::Streams => large::streams(self),
            Kind::SmallCache => large::small_cache(self),
            Kind::Scaling => large::scaling(self),
        }
    }
}
