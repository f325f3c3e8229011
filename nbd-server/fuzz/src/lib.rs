//! What the fuzz targets do with their input; the tests of `nbd-server` do the same with the seeds.

pub mod referee;
pub mod session;

use referee::judge;
use session::run;

/// Structured replies and base:allocation, then GO.
const STRUCTURED: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x08\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation\
    IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0";
/// GO at once.
const SIMPLE: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0";
/// Extended headers and two contexts, then GO.
const EXTENDED: &[u8] = b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0\
    IHAVEOPT\0\0\0\x0a\0\0\0\x36\0\0\0\x04disk\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x13qemu:dirty-bitmap:b\
    IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0";

/// A whole stream of a client, from its flags on.
pub fn handshake(data: &[u8]) {
    judge(data, &run(data, &[]));
}

/// One byte that chooses reply form and pieces, then requests.
pub fn transmission(data: &[u8]) {
    let Some((choice, requests)) = data.split_first() else {
        return;
    };
    let prefix = if choice & 1 == 0 { SIMPLE } else { STRUCTURED };
    in_pieces(prefix, requests, choice >> 1);
}

/// One byte that chooses the pieces, then requests with extended headers.
pub fn extended(data: &[u8]) {
    if let Some((choice, requests)) = data.split_first() {
        in_pieces(EXTENDED, requests, *choice);
    }
}

/// The same answers whatever the pieces; less only for a client that is gone without a goodbye.
fn in_pieces(prefix: &[u8], requests: &[u8], choice: u8) {
    let sent = [prefix, requests].concat();
    let whole = run(&sent, &[]);
    judge(&sent, &whole);
    if choice != 0 {
        let cut = run(&sent, &[usize::from(choice), 1, 97]);
        assert!(
            whole.said.starts_with(&cut.said),
            "the pieces change the answers"
        );
    }
}
