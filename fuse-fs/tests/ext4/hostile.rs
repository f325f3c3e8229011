//! Filesystems that somebody damaged, without checksums that would tell: operations on names fail or succeed, and
//! nothing panics or hangs.

use crate::data::Random;
use crate::image::Workshop;
use crate::kernel_side;
use crate::operations::{Operation, operation};
use crate::our_side::{open_damaged, try_apply};
use crate::write::run;
use fuse_fs::ext4::inode::ROOT;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Far beyond what a round takes.
const PATIENCE: Duration = Duration::from_secs(60);
const OPERATIONS: usize = 150;

/// Changes bytes of blocks that are in use and small numbers: directories, maps, inodes.
fn damage(image: &Path, random: &mut Random) {
    let mut bytes = fs::read(image).unwrap();
    let in_use: Vec<usize> = (4..bytes.len() / 1024)
        .filter(|block| {
            bytes[block * 1024..(block + 1) * 1024]
                .iter()
                .any(|byte| *byte != 0)
        })
        .collect();
    for _ in 0..60 {
        let block = in_use[random.below(in_use.len() as u64) as usize];
        let at = block * 1024 + random.below(1024) as usize;
        bytes[at] = [0, 1, 0xff, random.below(256) as u8][random.below(4) as usize];
    }
    fs::write(image, bytes).unwrap();
}

#[test]
fn operations_on_damaged_filesystems_never_panic_or_hang() {
    let shop = Workshop::new();
    let rounds = std::env::var("FUSE_FS_EXT4_ROUNDS").map_or(1, |text| text.parse().unwrap());
    for options in [
        "-t ext4 -b 1024 -O ^metadata_csum",
        "-t ext4 -b 1024 -O ^metadata_csum,^dir_index",
    ] {
        let image = shop.make(8, options);
        let mut random = Random(7);
        let operations: Vec<Operation> = (0..1500).map(|_| operation(&mut random)).collect();
        shop.change(&image, |dir| {
            for operation in &operations {
                let _ = kernel_side::apply(dir, operation);
            }
        });
        let mut failures = 0;
        for _ in 0..40 * rounds {
            let copy = shop.copy(&image);
            damage(&copy, &mut random);
            failures +=
                run(async { tokio::time::timeout(PATIENCE, round(&copy, &mut random)).await })
                    .unwrap();
            fs::remove_file(&copy).unwrap();
        }
        assert!(failures > 0, "no damage was met");
    }
}

/// How many operations met damage.
async fn round(image: &Path, random: &mut Random) -> usize {
    let Ok(fs) = open_damaged(image).await else {
        return 1;
    };
    let mut failures = 0;
    for _ in 0..OPERATIONS {
        let done = try_apply(&fs, &operation(random)).await;
        failures += usize::from(done.is_err_and(|error| error.errno() == libc::EIO));
    }
    if let Ok(root) = fs.inode(ROOT).await {
        let mut cookie = 0;
        while let Ok(listed) = fs.list(&root, cookie, 50).await
            && let Some(last) = listed.last()
        {
            assert!(last.cookie > cookie, "a listing that does not end");
            cookie = last.cookie;
        }
    }
    let _ = fs.close().await;
    failures
}
