//! A simulated device that is given up when it does not answer.

use std::sync::Arc;
use std::time::Duration;

use braidfs_blockdev::{BlockDevice, DeviceRequest, SimDevice};

struct Timed {
    sim: Arc<SimDevice>,
    answer_time_max: Duration,
}

impl BlockDevice for Timed {
    fn name(&self) -> &str {
        self.sim.name()
    }

    fn size_bytes(&self) -> u64 {
        self.sim.size_bytes()
    }

    fn kind(&self) -> &'static str {
        "timed"
    }

    fn answer_time_max(&self) -> Duration {
        self.answer_time_max
    }

    fn submit(&self, request: DeviceRequest) {
        self.sim.submit(request);
    }
}

/// The devices as the volume is to see them.
pub fn members(sims: &[Arc<SimDevice>], answer_time_max: Duration) -> Vec<Arc<dyn BlockDevice>> {
    let timed = |sim: &Arc<SimDevice>| {
        Arc::new(Timed {
            sim: Arc::clone(sim),
            answer_time_max,
        }) as Arc<dyn BlockDevice>
    };
    sims.iter().map(timed).collect()
}
