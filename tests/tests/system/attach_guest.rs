//! `blockctl attach` with a real `/dev/nbdX`: a mounted filesystem under load outlives every server, in a guest.

use blockd::id::DEFAULT_PAGE_BLOCKS;
use blockd_tests::{Cluster, Guest, GuestJob, MIB, binary};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longest time that the device may stand still; nothing else is judged by it.
const PATIENCE: Duration = Duration::from_secs(90);
const LOAD_LIMIT_S: u32 = 600;

/// One attached volume with a filesystem on /mnt/v and load on it.
struct Attached<'a> {
    guest: &'a Guest,
    /// As --servers wants them.
    servers: String,
    volume: &'a str,
    device: String,
    load: Vec<GuestJob>,
}

impl<'a> Attached<'a> {
    fn attach(guest: &'a Guest, servers: String, volume: &'a str, ha: &str) -> Self {
        let mut attached = Self {
            guest,
            servers,
            volume,
            device: String::new(),
            load: vec![],
        };
        attached.device = attached.blockctl(&format!("attach {volume} --ha {ha}"));
        assert!(
            attached.device.starts_with("/dev/nbd"),
            "{}",
            attached.device
        );
        attached
    }

    fn blockctl(&self, words: &str) -> String {
        let (program, servers) = (binary("blockctl"), &self.servers);
        self.run(&format!(
            "{} --servers {servers} {words}",
            program.display()
        ))
    }

    fn run(&self, command: &str) -> String {
        let ran = self.guest.run(120, command);
        assert!(ran.code == Some(0), "{ran:?}\n{}", self.guest.dmesg());
        ran.stdout.trim_end().to_owned()
    }

    /// Writes that are read back, and a probe that notes how long each of its durable writes took.
    fn start_load(&mut self) {
        self.run("rm -f /tmp/stop /tmp/slow /tmp/count");
        let fio = "cd /mnt/v && while [ ! -e /tmp/stop ]; do \
                   fio --name=verify --filename=data --rw=randwrite --bs=4k --size=6m --ioengine=libaio \
                   --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --fallocate=none || exit 1; done";
        let probe = format!("{} probe /mnt/v/probe", binary("in-guest").display());
        self.load = vec![
            self.guest.start(LOAD_LIMIT_S, fio),
            self.guest.start(LOAD_LIMIT_S, &probe),
        ];
        self.wait_progress("the start");
    }

    fn count(&self) -> u64 {
        let count = self.guest.run(60, "cat /tmp/count").stdout;
        count.trim().parse().unwrap_or_default()
    }

    /// Waits until the probe has gone on, and prints the stalls since the last call.
    fn wait_progress(&self, event: &str) {
        let before = self.count();
        let deadline = Instant::now() + PATIENCE;
        while self.count() < before + 5 {
            assert!(
                Instant::now() < deadline,
                "stands still after {event}\n{}",
                self.guest.dmesg()
            );
            assert!(
                self.load.iter().all(|job| !job.is_finished()),
                "the load ended"
            );
            sleep(Duration::from_millis(100));
        }
        let slow = self.run("cat /tmp/slow 2>/dev/null; rm -f /tmp/slow");
        let longest = slow
            .lines()
            .filter_map(|line| line.parse::<u64>().ok())
            .max();
        eprintln!(
            "{}: {event}: longest write {} ms",
            self.volume,
            longest.unwrap_or(0)
        );
    }

    fn stop_load(&mut self) {
        self.run("touch /tmp/stop");
        for job in self.load.drain(..) {
            let ran = job.wait();
            assert!(ran.code == Some(0), "{ran:?}\n{}", self.guest.dmesg());
        }
    }

    fn wait_size(&self, size_bytes: u64) {
        let deadline = Instant::now() + PATIENCE;
        let command = format!("blockdev --getsize64 {}", self.device);
        while self.run(&command) != size_bytes.to_string() {
            assert!(Instant::now() < deadline, "the device did not grow");
            sleep(Duration::from_millis(200));
        }
    }
}

/// No message of the kernel tells of an error, and no process waits for a device.
fn assert_unharmed(guest: &Guest) {
    let dmesg = guest.dmesg();
    for bad in [
        "I/O error",
        "EXT4-fs error",
        "EXT4-fs warning",
        "Aborting journal",
        "blocked for more",
    ] {
        assert!(!dmesg.contains(bad), "{bad}\n{dmesg}");
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let waiting = guest.run(30, "ps axo stat,pid,comm | grep '^D'").stdout;
        if waiting.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "in D state:\n{waiting}\n{dmesg}");
        sleep(Duration::from_millis(200));
    }
}

/// Kills and restarts every server, moves, grows, trims, detaches, and looks at what is left.
fn survives(guest: &Guest, cluster: &mut Cluster, volume: &str, ha: &str, owners: &[u16]) {
    cluster.create_on(volume, 64 * MIB, DEFAULT_PAGE_BLOCKS, owners);
    let servers = cluster.server_list();
    let mut attached = Attached::attach(guest, servers.clone(), volume, ha);
    let device = attached.device.clone();
    attached.run(&format!(
        "mkfs.ext4 -q {device} && mkdir -p /mnt/v && mount {device} /mnt/v"
    ));
    attached.start_load();
    for server in &mut cluster.servers {
        server.kill();
        server.start();
        attached.wait_progress(&format!("kill -9 and restart of server {}", server.number));
    }
    for server in [&cluster.servers[1], &cluster.servers[0]] {
        let to = server.peer_address();
        attached.blockctl(&format!("attachment move {device} --to {to}"));
        attached.wait_progress(&format!("a move to server {}", server.number));
    }
    attached.blockctl(&format!("volume resize {volume} 96MiB"));
    attached.wait_size(96 * MIB);
    attached.run(&format!("resize2fs {device} && fstrim /mnt/v"));
    attached.wait_progress("growth and trim");
    attached.stop_load();
    let kept = attached.run("cd /mnt/v && sync && sha256sum data");
    let busy = guest.run(
        60,
        &format!("{} detach {volume}", binary("blockctl").display()),
    );
    assert_ne!(busy.code, Some(0), "detached while mounted");
    attached.run("umount /mnt/v");
    attached.blockctl(&format!("detach {device}"));
    assert_unharmed(guest);

    // The device can be used again, and nothing is missing.
    let again = Attached::attach(guest, servers, volume, ha);
    again.run(&format!("e2fsck -fn {}", again.device));
    again.run(&format!("mount {} /mnt/v", again.device));
    assert_eq!(again.run("cd /mnt/v && sha256sum data"), kept);
    again.run("umount /mnt/v");
    again.blockctl(&format!("detach {volume}"));
    assert_unharmed(guest);
}

/// The only writer stays it when its daemon dies under a mounted device; a detach while servers are away is refused, not stuck.
fn is_taken_over(guest: &Guest, cluster: &mut Cluster) {
    cluster.create_on("lone", 64 * MIB, DEFAULT_PAGE_BLOCKS, &[]);
    let attached = Attached::attach(guest, cluster.server_list(), "lone", "proxy --exclusive");
    let device = &attached.device;
    attached.run(&format!(
        "mkfs.ext4 -q {device} && mount {device} /mnt/v && dd if=/dev/urandom of=/mnt/v/f bs=1M count=4"
    ));
    for _ in 0..2 {
        let status = attached.blockctl("attachment status lone --json");
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        attached.run(&format!("kill -9 {}", status["pid"]));
        assert_eq!(&attached.blockctl("attach lone --exclusive"), device);
    }
    let holder = attached.blockctl("lease show lone --json");
    assert!(holder.contains("held"), "{holder}");
    let sum = attached.run("sync && sha256sum /mnt/v/f");
    attached.run("umount /mnt/v && mount /dev/nbd0 /mnt/v");
    assert_eq!(attached.run("sha256sum /mnt/v/f"), sum);
    attached.run("umount /mnt/v");
    cluster.servers.iter_mut().for_each(|server| server.kill());
    let program = binary("blockctl");
    let refused = guest.run(60, &format!("{} detach lone", program.display()));
    assert!(refused.stderr.contains("--force"), "{refused:?}");
    cluster.servers.iter_mut().for_each(|server| server.start());
    cluster.wait_writable();
    attached.blockctl("detach lone");
    assert_unharmed(guest);
}

#[test]
fn a_mounted_device_outlives_every_server() {
    let mut cluster = Cluster::three();
    let guest = Guest::boot();
    survives(&guest, &mut cluster, "kept", "proxy", &[]);
    // With one owner the other servers are nothing but the way to it.
    survives(&guest, &mut cluster, "handed", "direct", &[3]);
    is_taken_over(&guest, &mut cluster);
}
