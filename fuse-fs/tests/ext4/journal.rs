//! Replay in memory gives, block by block, what e2fsck writes when it replays the same journal.

use crate::image::{Memory, Workshop, churn, run, text};
use fuse_fs::ext4::image::Image;
use fuse_fs::ext4::journal::layout::{self, JournalSuperblock};
use fuse_fs::ext4::map;
use std::collections::HashSet;
use std::fs::{self, File};
use std::path::Path;

/// The magic of a journal block, with which a logged block must not begin.
const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// What the journals of a test had in them.
#[derive(Debug, Default)]
struct Seen {
    escaped: usize,
    revoked: usize,
    wrapped: usize,
    transactions: u32,
}

/// S5-2.2 (1) and (3): revoke records, checksums of each version, escaped blocks, 64-bit tags, wrap-around.
#[test]
fn replay_gives_what_e2fsck_gives() {
    let shop = Workshop::new();
    let mut seen = Seen::default();
    for (features, mount) in [
        ("-O 64bit,metadata_csum", "data=ordered"),
        ("-O 64bit,metadata_csum", "data=journal"),
        ("-O ^64bit,metadata_csum", "data=journal"),
        ("-O ^64bit,^metadata_csum", "data=journal"),
        ("-O 64bit,^metadata_csum", "data=journal,journal_checksum"),
        (
            "-O ^64bit,^metadata_csum,^extent",
            "data=journal,journal_async_commit",
        ),
    ] {
        let image = shop.make(32, &format!("-t ext4 -b 1024 -J size=1 {features}"));
        let mut copies = Vec::new();
        shop.change_with(&image, mount, |dir| {
            for round in 0..3 {
                escape(dir);
                churn(dir, round);
                escape(dir);
                copies.push(shop.copy(&image));
            }
        });
        for copy in copies {
            compare(&copy, &mut seen, &format!("{features} {mount}"));
        }
    }
    assert!(
        seen.escaped > 0 && seen.revoked > 0 && seen.wrapped > 0 && seen.transactions > 20,
        "the test has not met all it is for: {seen:?}"
    );
}

fn escape(dir: &Path) {
    let file = dir.join("escape");
    fs::write(&file, MAGIC.repeat(1024)).unwrap();
    File::open(file).unwrap().sync_all().unwrap();
}

fn compare(copy: &Path, seen: &mut Seen, what: &str) {
    let device = Memory(fs::read(copy).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut findings = Vec::new();
        let image = Image::open(&device, &mut findings).await.unwrap();
        assert_eq!(findings, [], "{what}");
        let journal = look(&image, seen).await;
        run("e2fsck", &["-y", "-E", "journal_only", text(copy)]);
        let replayed = fs::read(copy).unwrap();
        let size = image.superblock.block_bytes as usize;
        for block in u64::from(image.superblock.first_data_block) + 1..image.superblock.blocks_count
        {
            let at = usize::try_from(block).unwrap() * size;
            let ours = image.block(block).await.unwrap();
            assert!(
                ours == replayed[at..at + size] || journal.contains(&block),
                "{what}: block {block}"
            );
        }
    });
}

/// Looks at what is in the journal; its blocks.
async fn look(image: &Image<'_>, seen: &mut Seen) -> HashSet<u64> {
    let (inode, _) = image.inode(image.superblock.journal_inode).await.unwrap();
    let runs = map::runs(image, &inode).await.unwrap();
    let blocks: Vec<u64> = runs
        .iter()
        .flat_map(|run| run.physical..run.physical + run.blocks)
        .collect();
    let first = image.raw_blocks(blocks[0], 1).await.unwrap();
    let format =
        JournalSuperblock::read(&first, image.superblock.block_bytes, blocks.len() as u64).unwrap();
    for (at, block) in blocks.iter().enumerate() {
        let bytes = image.raw_blocks(*block, 1).await.unwrap();
        let Some((kind, sequence)) = layout::header(&bytes) else {
            continue;
        };
        if sequence < format.sequence || sequence >= format.sequence + image.replay.transactions {
            continue;
        }
        match kind {
            layout::KIND_DESCRIPTOR => {
                seen.escaped += format.tags(&bytes).iter().filter(|tag| tag.escaped).count()
            }
            layout::KIND_REVOKE => seen.revoked += format.revoked(&bytes).len(),
            layout::KIND_COMMIT if at < format.start as usize => seen.wrapped += 1,
            _ => {}
        }
    }
    seen.transactions += image.replay.transactions;
    blocks.into_iter().collect()
}
