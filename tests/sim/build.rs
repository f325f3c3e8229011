//! Lets crates that look `getrandom` up at run time find the one of the simulator.

fn main() {
    println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol=getrandom");
}
