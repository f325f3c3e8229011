//! What the kernel leaves behind is clean: unmounted, mounted, killed in the middle, with each feature.

use crate::image::{Workshop, check_file, churn, e2fsck, e2fsck_recovers, fill};
use std::fs::{self, File};
use std::path::Path;

/// Options of mke2fs, and MiB.
const LAYOUTS: [(&str, u64); 14] = [
    ("-t ext4", 64),
    ("-t ext4 -b 4096", 64),
    ("-t ext4 -O metadata_csum_seed,orphan_file", 64),
    ("-t ext4 -O ^metadata_csum,uninit_bg", 64),
    ("-t ext4 -O ^metadata_csum,^uninit_bg,^64bit", 64),
    ("-t ext4 -O ^has_journal -I 128", 64),
    ("-t ext4 -b 1024 -O meta_bg,^resize_inode", 64),
    ("-t ext4 -b 2048 -O ^flex_bg,^dir_index,mmp", 64),
    ("-t ext4 -b 1024 -g 1024 -O sparse_super2,large_dir", 64),
    (
        "-t ext4 -b 1024 -O ^sparse_super,^resize_inode,^huge_file,fast_commit",
        64,
    ),
    ("-t ext4 -O ^extent,^64bit -b 1024", 64),
    ("-t ext4 -O ^filetype,^extra_isize", 64),
    ("-t ext3", 64),
    ("-t ext2", 64),
];

fn assert_clean(image: &Path, what: &str) {
    let report = check_file(image).unwrap();
    assert!(report.is_clean(), "{what}: {:#?}", report.findings);
}

#[test]
fn every_layout_is_clean_empty_filled_and_emptied() {
    let shop = Workshop::new();
    for (options, mib) in LAYOUTS {
        let image = shop.make(mib, options);
        assert_clean(&image, options);
        shop.change(&image, |dir| fill(dir, 4));
        assert!(e2fsck(&image).0, "{options}");
        assert_clean(&image, options);
        shop.change(&image, |dir| {
            fs::remove_dir_all(dir.join("a")).unwrap();
            File::options()
                .write(true)
                .open(dir.join("fragmented"))
                .unwrap()
                .set_len(12_345)
                .unwrap();
        });
        assert_clean(&image, options);
        let (_, said) = e2fsck(&image);
        let report = check_file(&image).unwrap();
        let files = format!("{}/{} files", report.used_inodes, report.inodes);
        let blocks = format!("{}/{} blocks", report.used_blocks, report.blocks);
        assert!(
            said.contains(&files) && said.contains(&blocks),
            "{options}: {said} {report:?}"
        );
    }
}

/// A copy made while the kernel has it mounted is what a crash leaves: the journal must be replayed, deleted
/// files that are open are orphans, and blocks that were freed and used again are revoked.
#[test]
fn crashed_images_are_clean_after_their_journal() {
    let shop = Workshop::new();
    let mut replayed = 0;
    for (options, mib) in LAYOUTS {
        if ["^has_journal", "ext2", "fast_commit", "mmp"]
            .into_iter()
            .any(|other| options.contains(other))
        {
            continue;
        }
        let image = shop.make(mib, options);
        let mut crashed = Vec::new();
        shop.change(&image, |dir| {
            for round in 0..4 {
                churn(dir, round);
                let open = File::create(dir.join("open")).unwrap();
                open.set_len(1 << 20).unwrap();
                fs::remove_file(dir.join("open")).unwrap();
                File::open(dir).unwrap().sync_all().unwrap();
                crashed.push(shop.copy(&image));
            }
        });
        for copy in crashed {
            let report = check_file(&copy).unwrap();
            assert!(report.is_clean(), "{options}: {:#?}", report.findings);
            replayed += report.transactions;
            // Where the kernel stores no kinds it leaves garbage in their place, and e2fsck complains.
            assert!(
                e2fsck_recovers(&copy) || options.contains("^filetype"),
                "{options}"
            );
            assert_clean(&copy, options);
        }
    }
    assert!(replayed > 20, "{replayed} transactions");
}
