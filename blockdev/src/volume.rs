//! The volume: assembled members, chunk table and queues.

mod types;

pub use types::*;

use crate::device::BlockDevice;
use crate::error::BlockError;
use crate::kiobuf::Kiobuf;
use crate::pages::{AlignedBuf, PageRun};
use crate::stats::VolumeStats;
use crate::units::VolBlock;
use std::marker::PhantomData;
use std::sync::Arc;

/// Assembled members with their chunk table and queues.
pub struct Volume {}

/// Collects kiobufs and dispatches them together; see [`Volume::plug`].
pub struct Plug<'a> {
    volume: PhantomData<&'a Volume>,
}

#[expect(missing_docs, unused_variables, reason = "skeleton")]
impl Volume {
    pub fn format(
        devices: Vec<Arc<dyn BlockDevice>>,
        options: &FormatOptions,
    ) -> Result<Arc<Volume>, VolumeError> {
        unimplemented!()
    }
    pub fn assemble(
        devices: Vec<Arc<dyn BlockDevice>>,
        read_only: bool,
    ) -> Result<Arc<Volume>, VolumeError> {
        unimplemented!()
    }
    pub fn info(&self) -> VolumeInfo {
        unimplemented!()
    }
    pub fn chunks(&self) -> Vec<Chunk> {
        unimplemented!()
    }
    pub fn allocate_chunk(
        &self,
        kind: ChunkKind,
        reserve_bytes: u64,
    ) -> Result<Chunk, VolumeError> {
        unimplemented!()
    }
    pub fn unallocated_bytes(&self) -> u64 {
        unimplemented!()
    }
    pub fn meta_chunk_bytes(&self) -> u64 {
        unimplemented!()
    }
    pub fn plug(&self) -> Plug<'_> {
        unimplemented!()
    }
    pub fn flush(&self, done: Box<dyn FnOnce(Result<(), BlockError>) + Send>) {
        unimplemented!()
    }
    pub fn flush_wait(&self) -> Result<(), BlockError> {
        unimplemented!()
    }
    pub fn discard(&self, at: VolBlock, blocks: u64) {
        unimplemented!()
    }
    pub fn copies(&self, at: VolBlock) -> u8 {
        unimplemented!()
    }
    pub fn locate(&self, at: VolBlock, copy: u8) -> Option<(u16, u64)> {
        unimplemented!()
    }
    pub fn device_name(&self, dev: u16) -> String {
        unimplemented!()
    }
    pub fn register_memory(&self, arena: PageRun) {
        unimplemented!()
    }
    pub fn stats(&self) -> VolumeStats {
        unimplemented!()
    }
    pub fn close(&self) -> Result<(), BlockError> {
        unimplemented!()
    }
    pub fn read_wait(
        &self,
        at: VolBlock,
        buf: AlignedBuf,
        copy: Option<u8>,
    ) -> Result<AlignedBuf, BlockError> {
        unimplemented!()
    }
    pub fn write_wait(&self, at: VolBlock, buf: AlignedBuf) -> Result<AlignedBuf, BlockError> {
        unimplemented!()
    }
}

#[expect(missing_docs, unused_variables, reason = "skeleton")]
impl Plug<'_> {
    pub fn read(&mut self, at: VolBlock, kiobuf: Kiobuf, copy: Option<u8>, class: Class) {
        unimplemented!()
    }
    pub fn write(&mut self, at: VolBlock, kiobuf: Kiobuf, class: Class) {
        unimplemented!()
    }
    pub fn finish(self) {}
}
