//! Shadow mode: the same operations on the kernel's ext4 and on ours; the same answers, the same trees, and
//! e2fsck is content with both. What ours wrote, the kernel mounts and sees.

use crate::data::Random;
use crate::image::Workshop;
use crate::kernel_side;
use crate::mkfs;
use crate::operations::{DIRECTORY, How, Operation, REGULAR, operation};
use crate::our_side;
use crate::write::{assert_clean, run};

/// Options of mke2fs, and MiB: small blocks make deep indexes, small inodes have no room for attributes.
const LAYOUTS: [(&str, u64); 5] = [
    ("-t ext4", 64),
    ("-t ext4 -b 1024 -I 256 -O large_dir", 64),
    ("-t ext4 -b 1024 -O ^dir_index,^metadata_csum,uninit_bg", 64),
    ("-t ext4 -I 128 -O ^filetype,^dir_nlink", 64),
    ("-t ext4 -I 512 -O metadata_csum_seed,orphan_file", 64),
];

/// What our mkfs makes is what mke2fs makes with this, and then ours works on ours.
const OUR_MKFS: &str = "-t ext4 ";

/// Runs `operations` on two images that were made alike, and compares all that can be seen.
fn compare(shop: &Workshop, mib: u64, options: &str, operations: &[Operation]) {
    // SAFETY: it changes a number of this process; ours is asked with the same.
    unsafe { libc::umask(0) };
    let theirs = shop.make(mib, options);
    let ours = match options {
        OUR_MKFS => mkfs::made(shop, "ours", mib << 20),
        _ => shop.make(mib, options),
    };
    let mut answers = Vec::new();
    let mut expected = kernel_side::Tree::new();
    shop.change(&theirs, |dir| {
        answers = operations
            .iter()
            .map(|one| kernel_side::apply(dir, one))
            .collect();
        expected = kernel_side::tree(dir);
    });
    let tree = run(async {
        let fs = our_side::open(&ours).await;
        let mut different = Vec::new();
        for (operation, expected) in operations.iter().zip(&answers) {
            let ours = our_side::apply(&fs, operation).await;
            if ours != *expected {
                different.push(format!("{operation:?}: {ours:?}, not {expected:?}"));
            }
            // From here on the trees differ.
            if ours.is_ok() != expected.is_ok() {
                break;
            }
        }
        assert!(different.is_empty(), "{options}: {different:#?}");
        let tree = our_side::tree(&fs).await;
        fs.close().await.unwrap();
        tree
    });
    assert_same(&tree, &expected, options);
    assert_clean(&ours);
    let mut seen = kernel_side::Tree::new();
    shop.change(&ours, |dir| seen = kernel_side::tree(dir));
    assert_same(&seen, &expected, options);
}

fn assert_same(found: &kernel_side::Tree, expected: &kernel_side::Tree, options: &str) {
    for (path, facts) in expected {
        assert_eq!(found.get(path), Some(facts), "{options}: {path}");
    }
    let more: Vec<_> = found
        .keys()
        .filter(|path| !expected.contains_key(*path))
        .collect();
    assert!(more.is_empty(), "{options}: {more:?}");
}

/// The operations, and behind them flags are taken away again: what is immutable would stay, and nothing else would
/// happen behind it.
fn thawed(operations: &[Operation]) -> Vec<Operation> {
    let thaw = |operation: &Operation| match operation {
        Operation::Flags { path, .. } => Some(Operation::Flags {
            path: path.clone(),
            flags: 0,
        }),
        _ => None,
    };
    let thaws = operations.iter().filter_map(thaw);
    operations.iter().cloned().chain(thaws).collect()
}

/// `FUSE_FS_EXT4_ROUNDS` times as many seeds.
#[test]
fn random_operations_give_what_the_kernel_gives() {
    let shop = Workshop::new();
    let rounds = std::env::var("FUSE_FS_EXT4_ROUNDS").map_or(1, |text| text.parse().unwrap());
    for round in 0..rounds {
        for (number, (options, mib)) in LAYOUTS.into_iter().chain([(OUR_MKFS, 64)]).enumerate() {
            let mut random = Random(round * 100 + number as u64);
            let operations: Vec<Operation> = (0..1500).map(|_| operation(&mut random)).collect();
            let operations: Vec<Operation> = operations.chunks(20).flat_map(thawed).collect();
            compare(&shop, mib, options, &operations);
        }
    }
}

fn make(path: String, kind: u32) -> Operation {
    Operation::Make {
        path,
        mode: kind | 0o755,
    }
}

/// Directories that grow from one block to an index of several levels, and are emptied by half.
#[test]
fn large_directories_are_those_of_the_kernel() {
    let shop = Workshop::new();
    for (options, mib) in [LAYOUTS[0], LAYOUTS[1], LAYOUTS[3], (OUR_MKFS, 64)] {
        let mut operations = vec![
            make("big".to_owned(), DIRECTORY),
            make("other".to_owned(), DIRECTORY),
        ];
        let name = |n: usize| format!("big/{n}-{}", "x".repeat(n * 13 % 200));
        operations.extend(
            (0..6000).map(|n| make(name(n), if n % 40 == 0 { DIRECTORY } else { REGULAR })),
        );
        operations.extend(
            (0..6000)
                .filter(|n| n % 3 == 0 && n % 40 != 0)
                .map(|n| Operation::Unlink { path: name(n) }),
        );
        operations.extend((0..6000).filter(|n| n % 7 == 1).map(|n| Operation::Rename {
            path: name(n),
            new: format!("other/{n}"),
            how: How::Replace,
        }));
        operations.extend((0..1000).map(|n| make(name(n), REGULAR)));
        compare(&shop, mib, options, &operations);
    }
}
