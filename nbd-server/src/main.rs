//! Serves a file or memory over NBD.
fn main() {}
