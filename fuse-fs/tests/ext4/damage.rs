//! Damaged images: what e2fsck finds is found, and nothing panics, hangs or takes memory without end.

use crate::image::{Memory, Workshop, check_bytes, e2fsck, fill};
use fuse_fs::ext4::extent::Run;
use fuse_fs::ext4::image::Image;
use fuse_fs::ext4::inode::Kind;
use fuse_fs::ext4::map::{self, Visitor};
use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What the check of an image of 8 MiB may take, on a busy machine.
const MOST_TIME: Duration = Duration::from_secs(20);
/// Of the whole test process.
const MOST_MEMORY_KIB: usize = 1 << 20;

/// Numbers from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

/// How often a random test repeats.
fn rounds(short: usize) -> usize {
    let text = std::env::var("FUSE_FS_EXT4_ROUNDS").unwrap_or_default();
    text.parse().unwrap_or(short)
}

struct Nodes {
    blocks: Vec<u64>,
    data: Vec<Run>,
}

impl Visitor for Nodes {
    fn node(&mut self, block: u64) -> bool {
        self.blocks.push(block);
        true
    }

    fn run(&mut self, run: Run) {
        self.data.push(run);
    }

    fn problem(&mut self, problem: String) {
        panic!("{problem}");
    }
}

/// The bytes of an image that mean something to the file system: inodes in use, directories, maps, descriptors.
fn metadata(bytes: &[u8]) -> Vec<Range<usize>> {
    let device = Memory(bytes.to_vec());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let image = Image::open(&device, &mut Vec::new()).await.unwrap();
        let size = image.superblock.block_bytes as usize;
        let block = |block: u64| block as usize * size..(block as usize + 1) * size;
        let mut ranges = vec![
            1024..2048,
            block(u64::from(image.superblock.first_data_block) + 1),
        ];
        for number in 1..=image.superblock.inodes_count {
            let (group, index) = image.superblock.inode_place(number).unwrap();
            let (inode, _) = image.inode(number).await.unwrap();
            if index == 0 {
                let group = &image.groups[group as usize];
                ranges.extend([block(group.block_bitmap), block(group.inode_bitmap)]);
            }
            if inode.links == 0 || number == 8 {
                continue;
            }
            let slot = usize::from(image.superblock.inode_bytes);
            let table = block(image.groups[group as usize].inode_table).start;
            let at = table + index as usize * slot;
            ranges.push(at..at + 160);
            if inode.xattr_block != 0 {
                ranges.push(block(inode.xattr_block));
            }
            if matches!(inode.kind(), Some(Kind::Directory | Kind::Regular)) {
                let (blocks, data) = (Vec::new(), Vec::new());
                let mut nodes = Nodes { blocks, data };
                map::walk(&image, &inode, &mut nodes).await.unwrap();
                ranges.extend(nodes.blocks.into_iter().map(block));
                if inode.kind() == Some(Kind::Directory) {
                    let runs = nodes.data.iter();
                    ranges.extend(
                        runs.flat_map(|run| (run.physical..run.physical + run.blocks).map(block)),
                    );
                }
            }
        }
        ranges
    })
}

/// Changes one place of the metadata.
fn damage(bytes: &mut [u8], ranges: &[Range<usize>], random: &mut Random) -> String {
    let range = ranges[random.below(ranges.len())].clone();
    let at = range.start + random.below(range.len()) / 4 * 4;
    let word = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let kind = random.below(8);
    let new = match kind {
        0 | 1 => word ^ 1 << random.below(32),
        2 => word.wrapping_add(1),
        3 => word.wrapping_sub(1),
        4 => u32::try_from(random.next() & 0xffff_ffff).unwrap(),
        5 => 0,
        6 => u32::MAX,
        _ => {
            let other = ranges[random.below(ranges.len())].clone();
            let length = range.len().min(other.len());
            bytes.copy_within(other.start..other.start + length, range.start);
            return format!("bytes {other:?} over {range:?}");
        }
    };
    bytes[at..at + 4].copy_from_slice(&new.to_le_bytes());
    format!("byte {at} of {range:?}: {word:#x} to {new:#x}")
}

/// An image of 8 MiB that was filled by the kernel.
fn small(shop: &Workshop, options: &str) -> Vec<u8> {
    let image = shop.make(8, options);
    shop.change(&image, |dir| fill(dir, 2));
    fs::read(image).unwrap()
}

/// Without checksums, every structure has to be judged by its meaning.
#[test]
fn what_e2fsck_finds_is_found() {
    let shop = Workshop::new();
    let (mut found, mut missed, mut extra) = (0, Vec::new(), Vec::new());
    for options in [
        "-t ext4 -b 1024 -N 1024 -O ^metadata_csum,^has_journal",
        "-t ext4 -b 1024 -N 1024 -O ^metadata_csum,^uninit_bg,^has_journal,^extent,^64bit",
    ] {
        let whole = small(&shop, options);
        let ranges = metadata(&whole);
        let damaged = shop.path("damaged");
        for seed in 0..rounds(60) as u64 {
            let mut bytes = whole.clone();
            let what = damage(&mut bytes, &ranges, &mut Random(seed));
            fs::write(&damaged, &bytes).unwrap();
            let (content, said) = e2fsck(&damaged);
            let ours = match check_bytes(bytes) {
                Ok(report) => report.findings.iter().map(ToString::to_string).collect(),
                Err(error) => vec![error.to_string()],
            };
            match (content, ours.is_empty()) {
                // The kernel leaves such counts itself; we make a note of it.
                (false, true) if said.contains("could be exact value") => {}
                (false, true) => missed.push(format!("{options} seed {seed}: {what}: {said}")),
                (true, false) => extra.push(format!("{options} seed {seed}: {what}: {ours:?}")),
                (false, false) => found += 1,
                (true, true) => {}
            }
        }
    }
    assert!(found >= rounds(60) / 2, "only {found} were damaged");
    assert!(missed.is_empty(), "{missed:#?}");
    // e2fsck leaves out the superblock's totals if one is 0, and copies of one reserved block.
    assert!(extra.len() * 100 <= found, "{extra:#?}");
}

/// Checksums, an index of two levels, a journal to be replayed: any damage is judged in bounded time and memory.
#[test]
fn no_damage_panics_hangs_or_takes_memory() {
    let shop = Workshop::new();
    for options in [
        "-t ext4 -b 1024 -N 1024 -J size=1 -O metadata_csum_seed,orphan_file",
        "-t ext4 -b 1024 -N 1024 -J size=1 -O ^metadata_csum,meta_bg,^resize_inode,large_dir",
    ] {
        let whole = crashed(&shop, options);
        let mut ranges = metadata(&whole);
        ranges.push(0..whole.len());
        for seed in 0..rounds(150) as u64 {
            let mut bytes = whole.clone();
            let mut random = Random(seed);
            let count = 1 << random.below(8);
            let what: Vec<_> = (0..count)
                .map(|_| damage(&mut bytes, &ranges, &mut random))
                .collect();
            let started = Instant::now();
            let _judged = check_bytes(bytes);
            let took = started.elapsed();
            assert!(
                took < MOST_TIME,
                "{options} seed {seed} took {took:?}: {what:#?}"
            );
        }
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let peak_kib: usize = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < MOST_MEMORY_KIB, "{peak_kib} KiB");
}

/// An image of 8 MiB as a crash leaves it.
fn crashed(shop: &Workshop, options: &str) -> Vec<u8> {
    let image = shop.make(8, options);
    let mut copy = Vec::new();
    shop.change(&image, |dir| {
        fill(dir, 2);
        fs::File::open(dir).unwrap().sync_all().unwrap();
        copy = fs::read(&image).unwrap();
    });
    copy
}

/// What a feature that is not known here means cannot be judged: its name is in the refusal.
#[test]
fn unknown_features_are_refused_by_name() {
    let shop = Workshop::new();
    let whole = fs::read(shop.make(8, "-t ext4 -O ^metadata_csum")).unwrap();
    for (at, bit, name) in [
        (0x60, 0x8000, "inline_data"),
        (0x60, 0x1_0000, "encrypt"),
        (0x60, 0x4000_0000, "incompat 0x40000000"),
        (0x64, 0x200, "bigalloc"),
        (0x64, 0x4000_0000, "ro_compat 0x40000000"),
    ] {
        let mut bytes = whole.clone();
        let field = 1024 + at..1024 + at + 4;
        let word = u32::from_le_bytes(bytes[field.clone()].try_into().unwrap()) | bit;
        bytes[field].copy_from_slice(&word.to_le_bytes());
        let error = check_bytes(bytes).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}
