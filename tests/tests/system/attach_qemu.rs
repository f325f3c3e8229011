//! A QEMU guest whose disk is `blockctl attach --socket`: it survives the servers' deaths.

use blockd_tests::{Attachments, Cluster, Guest, MIB};
use std::thread::sleep;
use std::time::Duration;

const AWAY: Duration = Duration::from_millis(700);
const CALM: Duration = Duration::from_secs(3);

/// ext4 in the guest, under fio's crc32c, while each server is killed and restarted, and the
/// attachment asks another server: no IO error in the guest, and a clean file system after it.
#[test]
fn a_guest_on_the_socket_survives_each_server() {
    let mut cluster = Cluster::three();
    cluster.create("v", 512 * MIB);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    let drive = format!(
        "driver=raw,node-name=v,file.driver=nbd,file.export=v,file.server.type=unix,file.server.path={}",
        socket.display()
    );
    let device = "virtio-blk-pci,drive=v,serial=blockd";
    let guest = Guest::boot_with(&["-blockdev", &drive, "-device", device]);
    let prepare =
        "modprobe virtio_blk && mkfs.ext4 -q /dev/vda && mkdir -p /mnt/v && mount /dev/vda /mnt/v";
    drop(guest.run(120, prepare).ok());
    let fio = guest.start(
        240,
        "cd /tmp && fio --name=v --directory=/mnt/v --rw=randrw --bs=4k-32k --ioengine=libaio --direct=1 \
         --iodepth=8 --size=24m --io_size=4g --rate_iops=100 --time_based --runtime=25 --verify=crc32c \
         --verify_backlog=32 --verify_fatal=1 --verify_state_save=0 --fsync=64",
    );
    let mut kills = 0;
    while !fio.is_finished() {
        let server = &mut cluster.servers[kills % 3];
        server.kill();
        sleep(AWAY);
        server.start();
        kills += 1;
        let to = cluster.servers[kills % 3].peer_address();
        attachments.blockctl(["attachment", "move", "v", "--to", &to]);
        sleep(CALM);
    }
    let ran = fio.wait().ok();
    assert!(ran.stdout.contains("err= 0"), "{ran:?}");
    assert!(kills >= 3, "{kills} kills");
    drop(guest.run(120, "umount /mnt/v && e2fsck -fn /dev/vda").ok());
    let dmesg = guest.dmesg();
    for complaint in ["I/O error", "EXT4-fs error", "blocked for more than"] {
        assert!(!dmesg.contains(complaint), "{dmesg}");
    }
    let status = attachments.status("v");
    assert_eq!(status["errors"], 0, "{status}");
    eprintln!("attach: {kills} kills under a guest, {status}");
}
