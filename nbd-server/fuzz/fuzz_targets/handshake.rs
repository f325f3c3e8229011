//! See `nbd_server_fuzz::handshake`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbd_server_fuzz::handshake(data));
