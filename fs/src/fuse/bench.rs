//! A front end on a file system in memory, and the kernel's end of its channel: what tests and the
//! fuzz target `requests` talk to.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, setsockopt, socketpair, sockopt,
};

use super::blocking::Blocking;
use super::channel::Channel;
use super::dispatch::dispatch;
use super::handles::Handles;
use super::interrupt::Unanswered;
use super::protocol::{IN_HEADER, OUT_HEADER, Opcode, Out};
use super::stats::FuseStats;
use super::{CacheMode, FuseOptions, Shared};
use crate::FileSystem;

/// A front end on a file system in memory, with the kernel's end of its channel.
pub(super) struct Bench {
    pub shared: Arc<Shared>,
    blocking: Blocking,
    kernel: OwnedFd,
}

impl Bench {
    /// On an empty file system.
    #[cfg(test)]
    pub(super) fn new() -> Self {
        use braidfs_blockdev::{BlockDevice, FormatOptions, SimDevice, Volume};
        let devices: Vec<_> = (0..2)
            .map(|n| SimDevice::new(&format!("sim{n}"), 64 << 20))
            .collect();
        let members = || {
            let share = |device: &Arc<SimDevice>| Arc::clone(device) as Arc<dyn BlockDevice>;
            devices.iter().map(share).collect::<Vec<_>>()
        };
        let volume = Volume::format(members(), &FormatOptions::default()).unwrap();
        crate::format(volume).unwrap();
        let volume = Volume::assemble(members(), false).unwrap();
        let options = crate::MountOptions {
            cache_bytes: 32 << 20,
            ..crate::MountOptions::default()
        };
        let fs = FileSystem::mount(volume, options).unwrap();
        Self::over(fs, Blocking::default())
    }

    /// On a mounted file system.
    pub(super) fn over(fs: Arc<FileSystem>, blocking: Blocking) -> Self {
        let (kernel, ours) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .expect("a pair of sockets");
        let patience = nix::sys::time::TimeVal::new(60, 0);
        setsockopt(&kernel, sockopt::ReceiveTimeout, &patience).expect("a time limit");
        setsockopt(&ours, sockopt::SndBuf, &(4 << 20)).expect("room for a reply");
        let shared = Arc::new(Shared {
            fs,
            handles: Handles::default(),
            unanswered: Unanswered::default(),
            stats: FuseStats::new(),
            since: std::time::Instant::now(),
            options: FuseOptions {
                cache_mode: CacheMode::Direct,
                threads: 1,
                timeout: Duration::from_secs(1),
            },
            channel: Arc::new(Channel::new(ours)),
            only: None,
        });
        Self {
            shared,
            blocking,
            kernel,
        }
    }

    /// Sends a request; returns the errno of its answer, 0 for success.
    pub(super) fn ask(&self, opcode: u32, nodeid: u64, args: &[u8]) -> i32 {
        let len = u32::try_from(IN_HEADER + args.len()).expect("a short request");
        let unique = 77;
        let header = Out::default().u32(len).u32(opcode).u64(unique).u64(nodeid);
        let mut request = header.zeros(16).as_slice().to_vec();
        request.extend_from_slice(args);
        let channel = &self.shared.channel;
        dispatch(&self.shared, &self.blocking, channel, &request, None);
        let unanswered = [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt];
        if Opcode::from_wire(opcode).is_some_and(|opcode| unanswered.contains(&opcode)) {
            return 0;
        }
        loop {
            // The header is enough; the length is told in full.
            let mut answer = [0; OUT_HEADER];
            let flags = MsgFlags::MSG_TRUNC;
            let len = recv(self.kernel.as_raw_fd(), &mut answer, flags).expect("an answer");
            let field = |at: usize| {
                let bytes = answer[at..at + 4].iter().rev();
                bytes.fold(0_u32, |word, &byte| word << 8 | u32::from(byte))
            };
            assert_eq!(field(0) as usize, len, "the length of the answer");
            if field(8) == 0 {
                continue; // a notification
            }
            assert_eq!(u64::from(field(8)), unique);
            return -field(4).cast_signed();
        }
    }
}
