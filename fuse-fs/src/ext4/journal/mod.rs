//! jbd2, the journal: its layout, the replay of what was committed, and the log that is written.

pub mod layout;
pub mod log;
pub mod replay;
