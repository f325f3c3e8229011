//! What a command prints, and how it ended as an exit code.

use anyhow::Context as _;
use std::io::{self, Write};
use std::process::ExitCode;

/// Anything but an error.
pub(crate) enum Outcome {
    Done,
    /// It did what was asked, and found damage or doubts.
    Damage,
}

/// Nothing could be opened.
const CANNOT_OPEN: u8 = 3;

/// 0 done, 1 damage or doubts, 3 cannot open; wrong usage is 2, by clap.
pub(crate) fn exit_code(ended: anyhow::Result<Outcome>) -> ExitCode {
    match ended {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Damage) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("blockd: {error:#}");
            ExitCode::from(CANNOT_OPEN)
        }
    }
}

/// Prints on stdout; whoever reads it may have seen enough.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to stdout")
        }
        _ => Ok(()),
    }
}
