//! A server whose disk does not answer for a while, during snapshots (S003-44).

use super::procedures::{CHAIN, Counter, Way, cluster, offset};
use blockd::admin::{AdminRequest, SnapshotName};
use blockd::control::snapshot::Procedure;
use blockd_tests::{Cluster, Tag, run};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

/// For how long no sync ends.
const DELAY: Duration = Duration::from_secs(2);

/// Preloaded into the server: no fdatasync of the page store ends while the gate is there, and another file
/// says that one waits. The registry has a majority without this server. Its machine has the boot id that
/// a file gives.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int fdatasync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    const char *gate = getenv("SLOW_DISK");
    char name[64], path[4096] = {0};
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    if (readlink(name, path, sizeof path - 1) > 0 && !strstr(path, "registry"))
        while (gate && access(gate, F_OK) == 0) {
            close(creat(getenv("SLOW_DISK_WAITS"), 0600));
            usleep(5000);
        }
    return real(fd);
}
int open64(const char *path, int flags, ...) {
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    const char *boot_id = getenv("BOOT_ID");
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if (boot_id && !strcmp(path, "/proc/sys/kernel/random/boot_id"))
        path = boot_id;
    return real(path, flags, mode);
}
"#;

/// The third server with the shim.
pub(crate) struct SlowServer {
    gate: PathBuf,
    waits: PathBuf,
    boot_id: PathBuf,
}

impl SlowServer {
    /// From now on no sync ends.
    pub(crate) fn stop(&self) {
        fs::write(&self.gate, "").unwrap();
    }

    /// Waits until a sync has begun that does not end.
    pub(crate) fn wait_stopped(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.waits.exists() {
            assert!(Instant::now() < deadline, "nothing is synced");
            sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn go_on(&self) {
        fs::remove_file(&self.gate).unwrap();
    }

    /// At its next start the server believes that its machine was off: what was not synced may be gone.
    pub(crate) fn lose_power(&self) {
        fs::write(&self.boot_id, "second").unwrap();
    }
}

pub(crate) fn slow(cluster: &mut Cluster) -> SlowServer {
    let (source, shim) = (cluster.path("slow.c"), cluster.path("slow.so"));
    fs::write(&source, SHIM).unwrap();
    let [source, shim] = [source, shim].map(|path| path.to_str().unwrap().to_owned());
    run(60, "cc", ["-shared", "-fPIC", "-o", &shim, &source, "-ldl"]);
    let server = SlowServer {
        gate: cluster.path("gate"),
        waits: cluster.path("waits"),
        boot_id: cluster.path("boot-id"),
    };
    fs::write(&server.boot_id, "first").unwrap();
    let variable = |name: &str, path: &Path| (name.to_owned(), path.to_str().unwrap().to_owned());
    cluster.servers[2].kill();
    cluster.servers[2].environment = vec![
        ("LD_PRELOAD".to_owned(), shim),
        variable("SLOW_DISK", &server.gate),
        variable("SLOW_DISK_WAITS", &server.waits),
        variable("BOOT_ID", &server.boot_id),
    ];
    cluster.servers[2].start();
    cluster.wait_writable();
    server
}

/// S003-44: the server's `taken` waits for its disk, and so does the snapshot; writes go on, those that are
/// later than T are not in it, and it is a point in time.
#[test]
fn a_disk_that_does_not_answer_delays_the_snapshot_and_nothing_else() {
    let mut cluster = cluster();
    let disk = slow(&mut cluster);
    let stop = Arc::new(AtomicBool::new(false));
    let ways = [[Way::Nbd(0), Way::Nbd(0)], [Way::Nbd(2), Way::Nbd(2)]];
    let counters = (0..).zip(ways);
    let counters = counters.map(|(block, ways)| Counter::start(&cluster, block, ways, &stop));
    let counters: Vec<Counter> = counters.collect();
    for procedure in [Procedure::Barrier, Procedure::Hold, Procedure::Stamp] {
        let issued = || counters.iter().map(|c| c.progress.issued());
        let acknowledged = || counters.iter().map(|c| c.progress.acknowledged());
        let before: Vec<u64> = acknowledged().collect();
        disk.stop();
        let (client, handle) = (cluster.client_of(&[0]), cluster.handle());
        let targets = ["a", "b"].map(|volume| SnapshotName {
            volume: volume.to_owned(),
            snapshot: "s".to_owned(),
        });
        let targets = targets.to_vec();
        let request = AdminRequest::SnapshotCreateBy { targets, procedure };
        let taking = spawn(move || handle.block_on(client.admin(request)));
        sleep(DELAY);
        assert!(
            !taking.is_finished(),
            "{procedure}: taken, and not on the disk"
        );
        let during: Vec<u64> = acknowledged().collect();
        for (before, during) in before.iter().zip(&during) {
            assert!(
                before + 10 < *during,
                "{procedure}: writes waited for the disk"
            );
        }
        disk.go_on();
        taking.join().unwrap().unwrap();
        let after: Vec<u64> = issued().collect();
        let mut views = ["a@s", "b@s"].map(|name| cluster.nbd(1, name));
        for (number, block) in (0..counters.len()).zip(0..) {
            let values = views.each_mut().map(|view| {
                let data = view.read(offset(block), 4096).unwrap();
                Tag::read(&data).unwrap()
            });
            let count = CHAIN.check(&values, before[number], after[number]);
            let count = count.unwrap_or_else(|error| panic!("{procedure}: {error}"));
            assert!(
                count < during[number],
                "{procedure}: T is behind writes that came after it"
            );
        }
        drop(views);
        cluster.delete_snapshot("a@s");
        cluster.delete_snapshot("b@s");
    }
    stop.store(true, Ordering::Relaxed);
    counters
        .into_iter()
        .for_each(|counter| counter.thread.join().unwrap());
}
