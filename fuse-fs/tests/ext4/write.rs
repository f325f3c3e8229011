//! The writing core below directories and files: transactions, allocation, orphans, open and close.

use crate::image::{Workshop, check_file, e2fsck, e2fsck_recovers};
use fuse_fs::ext4::device::FileDevice;
use fuse_fs::ext4::error::FsError;
use fuse_fs::ext4::filesystem::{Filesystem, Options};
use fuse_fs::ext4::mapping::{APPEND_BLOCKS, APPEND_CREDITS};
use fuse_fs::ext4::time::Timestamp;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub(crate) fn options() -> Options {
    Options {
        read_only: false,
        discard: false,
        clock: Arc::new(|| Timestamp::of(SystemTime::now())),
        seed: 1,
        cache_bytes: 8 << 20,
        dirty_limit_bytes: 16 << 20,
        commit_interval: Duration::from_secs(3600),
    }
}

pub(crate) async fn open(image: &Path) -> Filesystem {
    let device = FileDevice::open(image, true).unwrap();
    Filesystem::open(Arc::new(device), options()).await.unwrap()
}

pub(crate) fn run<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(work)
}

pub(crate) fn assert_clean(image: &Path) {
    let (clean, said) = e2fsck(image);
    assert!(clean, "{said}");
    // In a thread of its own: the caller may be inside a runtime.
    let report = std::thread::scope(|scope| scope.spawn(|| check_file(image)).join());
    let report = report.unwrap().unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

/// Options of mke2fs for filesystems that are written.
pub(crate) const KINDS: [&str; 6] = [
    "-t ext4",
    "-t ext4 -b 4096",
    "-t ext4 -O ^metadata_csum,uninit_bg",
    "-t ext4 -O ^64bit,^flex_bg",
    "-t ext4 -O metadata_csum_seed,orphan_file -b 2048",
    "-t ext4 -I 128",
];

/// A directory without a name: an orphan with blocks.
pub(crate) async fn make_orphan(fs: &Filesystem, blocks: u32) -> Result<u32, FsError> {
    let mut handle = fs.begin(10, 0).await?;
    let cell = handle.allocate_inode(2, 0o040_755).await?;
    let mut inode = cell.write().await;
    handle.orphan_add(&mut inode).await?;
    let _ = handle.finish();
    for _ in 0..blocks {
        let mut handle = fs.begin(APPEND_CREDITS, APPEND_BLOCKS).await?;
        handle.append_directory_block(&mut inode).await?;
        let _ = handle.finish();
    }
    Ok(inode.raw.number())
}

#[test]
fn a_mount_that_changes_nothing_leaves_a_clean_filesystem() {
    let workshop = Workshop::new();
    for kind in KINDS {
        let image = workshop.make(64, kind);
        run(async {
            let fs = open(&image).await;
            let copy = workshop.copy(&image);
            assert!(e2fsck_recovers(&copy), "{kind}, while mounted");
            fs.close().await.unwrap();
        });
        assert_clean(&image);
    }
}

#[test]
fn orphans_are_freed_by_who_made_them_or_by_the_next_mount() {
    let workshop = Workshop::new();
    for kind in KINDS {
        let image = workshop.make(64, kind);
        run(async {
            let fs = open(&image).await;
            let mut made = Vec::new();
            for blocks in [0, 1, 700, 30] {
                made.push(make_orphan(&fs, blocks).await.unwrap());
            }
            fs.sync().await.unwrap();
            assert!(e2fsck_recovers(&workshop.copy(&image)), "{kind}");
            let crashed = workshop.copy(&image);
            let again = open(&crashed).await;
            again.close().await.unwrap();
            assert_clean(&crashed);
            for number in [made[1], made[3], made[0], made[2]] {
                let cell = fs.inode(number).await.unwrap();
                fs.free_orphan(&cell).await.unwrap();
                fs.sync().await.unwrap();
                assert!(e2fsck_recovers(&workshop.copy(&image)), "{kind}");
            }
            fs.close().await.unwrap();
        });
        assert_clean(&image);
    }
}

#[test]
fn an_operation_that_ends_in_the_middle_aborts_the_journal() {
    let workshop = Workshop::new();
    let image = workshop.make(64, "-t ext4");
    run(async {
        let fs = open(&image).await;
        let mut handle = fs.begin(10, 0).await.unwrap();
        handle.allocate_inode(2, 0o100_644).await.unwrap();
        drop(handle);
        let refused = fs.begin(1, 0).await.map(|_| ()).unwrap_err();
        assert!(matches!(refused, FsError::Aborted { .. }), "{refused}");
        assert!(fs.sync().await.is_err());
        assert!(fs.close().await.is_err());
    });
    assert!(e2fsck_recovers(&image));
}
