//! `nbd_server::kernel` against nbd.ko, in a guest; the scenarios are in `tests/src/bin/in-guest.rs`.

use blockd_tests::{Guest, binary};

const SCENARIOS: [&str; 7] = [
    "refusals",
    "filesystem",
    "resize",
    "reconnect",
    "dead-timeout",
    "partitions",
    "ioctl",
];

#[test]
fn the_kernel_client_is_driven_by_netlink_and_by_ioctl() {
    let guest = Guest::boot();
    let program = binary("in-guest");
    for scenario in SCENARIOS {
        let ran = guest.run(150, &format!("{} {scenario}", program.display()));
        assert!(
            ran.stdout.ends_with(&format!("ok {scenario}\n")),
            "{ran:?}\n{}",
            guest.dmesg()
        );
    }
}
