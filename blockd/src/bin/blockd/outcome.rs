//! How a command ended, as an exit code.

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
