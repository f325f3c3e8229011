//! Every seed of the fuzz targets through the same function as there.

use std::path::Path;

use crate::fuzz;

/// The seeds of a target: hex digits in lines.
fn replay(target: &str, run: impl Fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(seeds).unwrap() {
        let path = entry.unwrap().path();
        eprintln!("{}", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        run(&bytes(&text));
        count += 1;
    }
    assert!(count >= 10, "{count} seeds of {target}");
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits
        .chunks_exact(2)
        .map(|pair| (pair[0] << 4 | pair[1]) as u8)
        .collect()
}

#[test]
fn handshake() {
    replay("handshake", fuzz::handshake);
}

#[test]
fn transmission() {
    replay("transmission", fuzz::transmission);
}

#[test]
fn extended() {
    replay("extended", fuzz::extended);
}
