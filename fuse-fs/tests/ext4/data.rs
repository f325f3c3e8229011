//! Data of files: random operations against a model, judged by the kernel and e2fsck.

use crate::image::Workshop;
use crate::write::{KINDS, assert_clean, open, run};
use bytes::Bytes;
use fuse_fs::ext4::fallocate::{Allocation, Sought};
use fuse_fs::ext4::filesystem::Filesystem;
use fuse_fs::ext4::inode_cell::InodeCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % end
    }
}

/// A file, and what it must hold.
struct Modelled {
    name: String,
    number: u32,
    content: Vec<u8>,
}

const MAX_FILE_BYTES: u64 = 3 << 20;

fn files(workshop: &Workshop, image: &Path, count: u32) -> Vec<Modelled> {
    let mut made = Vec::new();
    workshop.change(image, |dir| {
        for at in 0..count {
            let name = format!("file{at}");
            fs::write(dir.join(&name), b"").unwrap();
            let number = fs::metadata(dir.join(&name)).unwrap().ino() as u32;
            let content = Vec::new();
            made.push(Modelled {
                name,
                number,
                content,
            });
        }
    });
    made
}

fn range(random: &mut Random) -> (u64, u64) {
    let most = [100, 5000, 70_000, 600_000][random.below(4) as usize];
    let offset = random.below(MAX_FILE_BYTES - most);
    (offset, 1 + random.below(most))
}

async fn step(fs: &Filesystem, cell: &Arc<InodeCell>, model: &mut Vec<u8>, random: &mut Random) {
    let (offset, len) = range(random);
    let (from, to) = (offset as usize, (offset + len) as usize);
    let grow = |model: &mut Vec<u8>, size: usize| {
        if model.len() < size {
            model.resize(size, 0);
        }
    };
    match random.below(12) {
        0..=4 => {
            let byte = 1 + random.below(255) as u8;
            let data: Vec<u8> = (0..len).map(|at| byte.wrapping_add(at as u8)).collect();
            fs.write(cell, offset, data.clone().into()).await.unwrap();
            grow(model, to);
            model[from..to].copy_from_slice(&data);
        }
        5 => {
            let size = random.below(MAX_FILE_BYTES) / (1 + random.below(30));
            fs.truncate(cell, size).await.unwrap();
            model.resize(size as usize, 0);
        }
        6 => {
            fs.fallocate(cell, Allocation::Punch, offset, len)
                .await
                .unwrap();
            let end = to.min(model.len());
            if from < end {
                model[from..end].fill(0);
            }
        }
        7 => {
            let keep_size = random.below(2) == 0;
            let how = Allocation::Zero { keep_size };
            fs.fallocate(cell, how, offset, len).await.unwrap();
            if !keep_size {
                grow(model, to);
            }
            let end = to.min(model.len());
            if from < end {
                model[from..end].fill(0);
            }
        }
        8 => {
            let keep_size = random.below(2) == 0;
            let how = Allocation::Allocate { keep_size };
            fs.fallocate(cell, how, offset, len).await.unwrap();
            if !keep_size {
                grow(model, to);
            }
        }
        9 => fs.fsync(cell, random.below(2) == 0).await.unwrap(),
        _ => {
            let read = fs.read(cell, offset, len as u32).await.unwrap();
            let end = to.min(model.len());
            let expected = model.get(from..end).unwrap_or_default();
            assert!(read[..] == *expected, "read of {len} at {offset}");
        }
    }
}

async fn seek_agrees(fs: &Filesystem, cell: &InodeCell, model: &[u8]) {
    let mut at = 0;
    while let Ok(data) = fs.seek(cell, at, Sought::Data).await {
        assert!(
            model[at as usize..data as usize]
                .iter()
                .all(|byte| *byte == 0)
        );
        at = fs.seek(cell, data, Sought::Hole).await.unwrap();
        assert!(at > data);
    }
    assert!(
        model[(at as usize).min(model.len())..]
            .iter()
            .all(|byte| *byte == 0)
    );
}

fn compare_with_kernel(workshop: &Workshop, image: &Path, files: &[Modelled]) {
    workshop.change(image, |dir| {
        for file in files {
            let found = fs::read(dir.join(&file.name)).unwrap();
            let same = found.iter().zip(&file.content).take_while(|(a, b)| a == b);
            assert!(
                found == file.content,
                "{}: {} of {} bytes, the same until {}",
                file.name,
                found.len(),
                file.content.len(),
                same.count()
            );
        }
    });
}

#[test]
fn files_are_what_was_written_to_them() {
    let workshop = Workshop::new();
    let rounds: u64 = std::env::var("FUSE_FS_EXT4_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    for round in 0..rounds {
        for (at, kind) in KINDS.iter().enumerate() {
            let mut random = Random(round * 100 + at as u64);
            let image = workshop.make(48, kind);
            let mut files = files(&workshop, &image, 4);
            for _ in 0..2 {
                run(async {
                    let fs = open(&image).await;
                    for _ in 0..150 {
                        let file = &mut files[random.below(4) as usize];
                        let cell = fs.inode(file.number).await.unwrap();
                        step(&fs, &cell, &mut file.content, &mut random).await;
                    }
                    for file in &files {
                        let cell = fs.inode(file.number).await.unwrap();
                        let read = fs.read(&cell, 0, u32::MAX).await.unwrap();
                        assert!(read[..] == file.content[..], "{kind} {}", file.name);
                        seek_agrees(&fs, &cell, &file.content).await;
                    }
                    fs.close().await.unwrap();
                });
                assert_clean(&image);
            }
            compare_with_kernel(&workshop, &image, &files);
        }
    }
}

#[test]
fn a_full_filesystem_refuses_writes_and_keeps_what_it_acknowledged() {
    let workshop = Workshop::new();
    let image = workshop.make(24, "-t ext4 -m 0");
    let mut files = files(&workshop, &image, 3);
    run(async {
        let fs = open(&image).await;
        for (at, file) in files.iter_mut().enumerate() {
            let cell = fs.inode(file.number).await.unwrap();
            let piece = Bytes::from(vec![at as u8 + 1; 100_000]);
            loop {
                let offset = file.content.len() as u64;
                match fs.write(&cell, offset, piece.clone()).await {
                    Ok(()) => file.content.extend_from_slice(&piece),
                    Err(error) => {
                        assert_eq!(error.errno(), libc::ENOSPC);
                        break;
                    }
                }
            }
            fs.fsync(&cell, false).await.unwrap();
        }
        assert!(files[0].content.len() > 10_000_000);
        let cell = fs.inode(files[0].number).await.unwrap();
        fs.truncate(&cell, 5).await.unwrap();
        files[0].content.truncate(5);
        fs.sync().await.unwrap();
        let cell = fs.inode(files[1].number).await.unwrap();
        let offset = files[1].content.len() as u64;
        fs.write(&cell, offset, vec![9; 1_000_000].into())
            .await
            .unwrap();
        files[1].content.extend([9; 1_000_000]);
        fs.close().await.unwrap();
    });
    assert_clean(&image);
    compare_with_kernel(&workshop, &image, &files);
}

#[test]
fn a_file_in_a_thousand_pieces_grows_a_tree_and_shrinks_it() {
    let workshop = Workshop::new();
    for kind in ["-t ext4 -b 1024", "-t ext4 -b 4096"] {
        let image = workshop.make(64, kind);
        let mut files = files(&workshop, &image, 1);
        run(async {
            let fs = open(&image).await;
            let cell = fs.inode(files[0].number).await.unwrap();
            let mut random = Random(7);
            let model = &mut files[0].content;
            for _ in 0..2500 {
                let offset = random.below(3000) * 8192;
                let data = vec![1 + random.below(255) as u8; 100];
                fs.write(&cell, offset, data.clone().into()).await.unwrap();
                model.resize(model.len().max(offset as usize + 100), 0);
                model[offset as usize..][..100].copy_from_slice(&data);
            }
            fs.fsync(&cell, false).await.unwrap();
            fs.close().await.unwrap();
        });
        assert_clean(&image);
        compare_with_kernel(&workshop, &image, &files);
        run(async {
            let fs = open(&image).await;
            let cell = fs.inode(files[0].number).await.unwrap();
            for size in [20_000_000, 9_000_000, 1_000_000, 20_000] {
                fs.fallocate(&cell, Allocation::Punch, size / 2, size / 8)
                    .await
                    .unwrap();
                fs.truncate(&cell, size).await.unwrap();
                files[0].content.resize(size as usize, 0);
                let (from, to) = (size as usize / 2, size as usize / 2 + size as usize / 8);
                files[0].content[from..to].fill(0);
            }
            fs.truncate(&cell, 0).await.unwrap();
            files[0].content.clear();
            fs.close().await.unwrap();
        });
        assert_clean(&image);
        compare_with_kernel(&workshop, &image, &files);
    }
}

/// Files of ext3, as an upgraded filesystem still has them.
#[test]
fn files_mapped_by_pointers_are_read_and_get_extents_when_they_change() {
    let workshop = Workshop::new();
    let image = workshop.make(48, "-t ext3 -O dir_index -b 1024");
    let mut files = files(&workshop, &image, 3);
    workshop.change(&image, |dir| {
        for (at, file) in files.iter_mut().enumerate() {
            file.content = vec![at as u8 + 1; 700_000 * (at + 1)];
            fs::write(dir.join(&file.name), &file.content).unwrap();
        }
    });
    let tuned = std::process::Command::new("tune2fs")
        .args(["-O", "extent,huge_file,dir_nlink,extra_isize"])
        .arg(&image)
        .output()
        .unwrap();
    assert!(tuned.status.success(), "{tuned:?}");
    let mut random = Random(1);
    run(async {
        let fs = open(&image).await;
        for file in &mut files {
            let cell = fs.inode(file.number).await.unwrap();
            let read = fs.read(&cell, 0, u32::MAX).await.unwrap();
            assert!(read[..] == file.content[..], "{}", file.name);
            for _ in 0..40 {
                step(&fs, &cell, &mut file.content, &mut random).await;
            }
        }
        fs.close().await.unwrap();
    });
    assert_clean(&image);
    compare_with_kernel(&workshop, &image, &files);
}
