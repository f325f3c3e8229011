//! jbd2, the journal: its layout, and the replay of what was committed.

pub mod layout;
pub mod replay;
