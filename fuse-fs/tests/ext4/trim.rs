//! Free space is given back to the volume, and nothing else is.

use crate::data::Random;
use crate::image::Workshop;
use crate::late::Late;
use crate::write::{KINDS, assert_clean, open, options, run};
use bytes::Bytes;
use fuse_fs::ext4::error::{FsError, Refusal};
use fuse_fs::ext4::filesystem::Filesystem;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

fn taken_bytes(image: &Path) -> u64 {
    fs::metadata(image).unwrap().blocks() * 512
}

fn free_bytes(fs: &Filesystem) -> u64 {
    let space = fs.statfs();
    space.free_blocks * u64::from(space.block_bytes)
}

/// Overwrites the free space of an image with what nobody wrote there, as a volume that once was full has it.
fn soil(workshop: &Workshop, image: &Path) {
    workshop.change(image, |dir| {
        let mut file = fs::File::create(dir.join("soil")).unwrap();
        while std::io::Write::write_all(&mut file, &[0xa5; 1 << 16]).is_ok() {}
        drop(file);
        fs::remove_file(dir.join("soil")).unwrap();
    });
}

#[test]
fn all_free_space_goes_back_and_the_files_stay() {
    let workshop = Workshop::new();
    for kind in KINDS {
        let image = workshop.make(64, kind);
        workshop.change(&image, |dir| {
            for at in 0..40_u8 {
                fs::write(dir.join(format!("f{at}")), vec![at; 100_000]).unwrap();
            }
            for at in (0..40).step_by(2) {
                fs::remove_file(dir.join(format!("f{at}"))).unwrap();
            }
        });
        soil(&workshop, &image);
        let before = taken_bytes(&image);
        run(async {
            let fs = open(&image).await;
            let free = free_bytes(&fs);
            assert_eq!(fs.trim(0..u64::MAX, 0).await.unwrap(), free, "{kind}");
            assert_eq!(free_bytes(&fs), free, "{kind}");
            fs.close().await.unwrap();
            let freed = before - taken_bytes(&image);
            // The kernel keeps some of what is free to itself, which was not soiled.
            assert!(freed + 3 * MIB > free, "{kind}: {freed} of {free}");
        });
        assert_clean(&image);
        workshop.change(&image, |dir| {
            for at in (1..40_u8).step_by(2) {
                let bytes = fs::read(dir.join(format!("f{at}"))).unwrap();
                assert!(bytes == vec![at; 100_000], "{kind} {at}");
            }
        });
    }
}

#[test]
fn only_what_was_asked_for_goes_back() {
    let workshop = Workshop::new();
    let image = workshop.make(64, "-t ext4 -b 4096");
    soil(&workshop, &image);
    run(async {
        let fs = open(&image).await;
        let free = free_bytes(&fs);
        let part = fs.trim(16 * MIB..24 * MIB, 0).await.unwrap();
        assert!((7 * MIB..=8 * MIB).contains(&part), "{part}");
        let file = fs::File::open(&image).unwrap();
        let mut bytes = vec![0; MIB as usize];
        file.read_exact_at(&mut bytes, 30 * MIB).unwrap();
        assert!(bytes.contains(&0xa5), "behind the range");
        let long_runs = fs.trim(0..u64::MAX, 8 * MIB).await.unwrap();
        assert!(long_runs > 0 && long_runs <= free, "{long_runs} of {free}");
        assert_eq!(fs.trim(0..u64::MAX, 128 * MIB).await.unwrap(), 0);
        for (range, least) in [(0..100, 0), (64 * MIB..70 * MIB, 0), (0..MIB, 1 << 40)] {
            let refused = fs.trim(range, least).await.unwrap_err();
            assert!(
                matches!(refused, FsError::Refused(Refusal::Invalid)),
                "{refused}"
            );
        }
        fs.close().await.unwrap();
    });
    assert_clean(&image);
}

/// Files are written and removed while free space is given back over and over.
#[test]
fn what_is_written_meanwhile_stays() {
    let workshop = Workshop::new();
    let image = workshop.make(64, "-t ext4 -m 0");
    let numbers = std::sync::Mutex::new(Vec::new());
    workshop.change(&image, |dir| {
        for at in 0..6 {
            let path = dir.join(format!("f{at}"));
            fs::write(&path, b"").unwrap();
            let number = fs::metadata(&path).unwrap().ino() as u32;
            numbers.lock().unwrap().push(number);
        }
    });
    let numbers = numbers.into_inner().unwrap();
    run(async {
        let device = Late::open(&image);
        let fs = Filesystem::open(Arc::new(device), options()).await.unwrap();
        let trimming = {
            let fs = fs.clone();
            tokio::spawn(async move {
                for _ in 0..60 {
                    fs.trim(0..u64::MAX, 0).await.unwrap();
                    tokio::task::yield_now().await;
                }
            })
        };
        let mut random = Random(5);
        let mut lengths = vec![0_u64; numbers.len()];
        while !trimming.is_finished() {
            let at = random.below(numbers.len() as u64) as usize;
            let cell = fs.inode(numbers[at]).await.unwrap();
            if lengths[at] > 8 * MIB {
                fs.truncate(&cell, 0).await.unwrap();
                lengths[at] = 0;
            }
            let piece = Bytes::from(vec![at as u8 + 1; 50_000 + random.below(300_000) as usize]);
            lengths[at] += piece.len() as u64;
            let offset = lengths[at] - piece.len() as u64;
            fs.write(&cell, offset, piece).await.unwrap();
            fs.fsync(&cell, true).await.unwrap();
        }
        trimming.await.unwrap();
        fs.close().await.unwrap();
        let fs = open(&image).await;
        for (at, number) in numbers.iter().enumerate() {
            let cell = fs.inode(*number).await.unwrap();
            let read = fs.read(&cell, 0, u32::MAX).await.unwrap();
            assert_eq!(read.len() as u64, lengths[at]);
            assert!(read.iter().all(|byte| *byte == at as u8 + 1), "file {at}");
        }
        fs.close().await.unwrap();
    });
    assert_clean(&image);
}
