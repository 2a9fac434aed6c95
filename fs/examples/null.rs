//! The null FUSE server by itself, for `scripts/bench` and the guard of speed.
//!
//! Usage: `null [--cache direct|kernel] [--threads N] [--arena MIB] MOUNTPOINT`; it serves until
//! the file system is unmounted.

use std::path::PathBuf;

use braidfs::fuse::null::{NullOptions, serve};
use braidfs::fuse::{AttachError, CacheMode, threads_default};
use clap::Parser;

/// A FUSE server that does nothing.
#[derive(Parser)]
struct Cli {
    /// Who caches file data: nobody (FOPEN_DIRECT_IO), or the kernel (write-back cache)
    #[arg(long, default_value = "direct", value_parser = ["direct", "kernel"])]
    cache: String,
    /// Threads that serve requests
    #[arg(long, default_value_t = threads_default())]
    threads: usize,
    /// Memory that file data is copied into, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    arena: usize,
    /// An absolute path
    mount_point: PathBuf,
}

fn main() -> Result<(), AttachError> {
    let cli = Cli::parse();
    serve(&NullOptions {
        mount_point: cli.mount_point,
        cache_mode: match cli.cache.as_str() {
            "kernel" => CacheMode::Kernel,
            _ => CacheMode::Direct,
        },
        allow_other: true,
        threads: cli.threads,
        arena_mib: cli.arena,
    })
}
