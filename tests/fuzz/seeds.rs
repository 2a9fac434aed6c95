//! Writes the seeds of a target into a folder: `seeds TARGET FOLDER`.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(target), Some(folder)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: seeds TARGET FOLDER");
        return ExitCode::from(2);
    };
    for (name, bytes) in braidfs::fuzzing::seeds(&target) {
        let path = PathBuf::from(&folder).join(name);
        if let Err(error) = std::fs::write(&path, bytes) {
            eprintln!("seeds: {}: {error}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
