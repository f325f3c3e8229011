//! Losses of power in all short workloads: one, two and three operations of a small vocabulary, each one followed
//! by a sync of everything.
//!
//! All operations on names go through one journal, in order. So what a loss of power leaves is the tree as it was
//! after some operation, whole, and never an older one than a sync promised.

use crate::crash::{STALE, fill_up, is_for_e2fsck, judge_by_e2fsck, often, rounds};
use crate::data::Random;
use crate::image::{Workshop, check_bytes, e2fsck};
use crate::kernel_side::{self, Tree};
use crate::operations::{DIRECTORY, How, Operation, REGULAR};
use crate::our_side::{apply, resolve, tree};
use crate::recorder::{Mark, Moment, Recorder};
use crate::write::{options, run};
use fuse_fs::ext4::fallocate::Allocation;
use fuse_fs::ext4::filesystem::Filesystem;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

/// Of so many workloads of two or three operations, one is in the short form.
const EVERY_PAIR: usize = 20;
const EVERY_TRIPLE: usize = 400;
/// One in so many states is also shown to the kernel.
const KERNEL_EVERY: usize = 25;
/// About so many states of each.
const STATES: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    Name(Operation),
    Write {
        path: &'static str,
        offset: u64,
        len: usize,
    },
    Truncate {
        path: &'static str,
        size: u64,
    },
    Space {
        path: &'static str,
        how: Allocation,
    },
    Sync(&'static str),
    SyncAll,
}

fn path(text: &str) -> String {
    text.to_owned()
}

/// What a program may do to a directory with `a`, `d`, `d/b` and the empty `e`.
fn vocabulary() -> Vec<Step> {
    let rename = |from: &str, to: &str, how: How| {
        let (path, new) = (path(from), path(to));
        Step::Name(Operation::Rename { path, new, how })
    };
    let make = |name: &str, kind: u32| {
        let (path, mode) = (path(name), kind | 0o755);
        Step::Name(Operation::Make { path, mode })
    };
    let unlink = |name: &str| Step::Name(Operation::Unlink { path: path(name) });
    let write = |path: &'static str, offset: u64, len: usize| Step::Write { path, offset, len };
    vec![
        make("d/c", REGULAR),
        make("d/s", DIRECTORY),
        Step::Name(Operation::Link {
            path: path("a"),
            new: path("d/c"),
        }),
        Step::Name(Operation::Symlink {
            path: path("l"),
            target: "t".repeat(700),
        }),
        unlink("a"),
        unlink("d/b"),
        Step::Name(Operation::RemoveDirectory { path: path("e") }),
        rename("a", "d/b", How::Replace),
        rename("d/b", "a", How::Replace),
        rename("a", "d/b", How::Exchange),
        rename("d", "e", How::Replace),
        rename("d/c", "c", How::Whiteout),
        Step::Name(Operation::SetXattr {
            path: path("a"),
            name: path("user.large"),
            value: vec![b'x'; 500],
            flags: 0,
        }),
        write("a", 4500, 3000),
        write("d/b", 100, 200),
        write("d/c", 0, 2500),
        Step::Truncate { path: "a", size: 0 },
        Step::Truncate {
            path: "d/b",
            size: 1500,
        },
        Step::Space {
            path: "a",
            how: Allocation::Punch,
        },
        Step::Space {
            path: "d/b",
            how: Allocation::Zero { keep_size: false },
        },
        Step::Sync("a"),
        Step::Sync("d/b"),
        Step::Sync("d"),
        Step::Sync("d/c"),
        Step::SyncAll,
    ]
}

/// The files of the start, by inode: what they hold.
type Contents = HashMap<u32, Vec<u8>>;

fn start(workshop: &Workshop, kind: &str) -> (Vec<u8>, Contents) {
    let image = workshop.make(10, kind);
    let mut contents = Contents::new();
    workshop.change(&image, |dir| {
        fs::create_dir(dir.join("d")).unwrap();
        fs::create_dir(dir.join("e")).unwrap();
        for (name, byte) in [("a", 1), ("d/b", 2)] {
            let content = vec![byte; 5000];
            fs::write(dir.join(name), &content).unwrap();
            let number = fs::metadata(dir.join(name)).unwrap().ino() as u32;
            contents.insert(number, content);
        }
        fill_up(dir);
    });
    (fs::read(image).unwrap(), contents)
}

/// Where an operation may change an inode.
fn paths(operation: &Operation) -> Vec<&str> {
    let names: Vec<&str> = match operation {
        Operation::SetXattr { path, .. } => return vec![path],
        Operation::Link { path, new } | Operation::Rename { path, new, .. } => vec![path, new],
        Operation::Make { path, .. }
        | Operation::Symlink { path, .. }
        | Operation::Unlink { path }
        | Operation::RemoveDirectory { path } => vec![path],
        other => unreachable!("{other:?} is not in the vocabulary"),
    };
    let parents = names
        .iter()
        .map(|name| name.rsplit_once('/').map_or("", |(parent, _)| parent));
    parents.chain(names.iter().copied()).collect()
}

/// A workload that runs, and what it must have done.
struct Workload<'a> {
    fs: Filesystem,
    device: &'a Recorder,
    contents: Contents,
    /// The tree after each operation.
    trees: Vec<Tree>,
    /// The operation that changed an inode last.
    changed: HashMap<u32, usize>,
}

impl Workload<'_> {
    /// The inodes at `paths`, where there are any.
    async fn numbers(&self, paths: &[&str]) -> Vec<u32> {
        let mut numbers = Vec::new();
        for path in paths {
            numbers.extend(resolve(&self.fs, path).await.map(|cell| cell.number()));
        }
        numbers
    }

    async fn step(&mut self, step: &Step) {
        match step {
            Step::Name(operation) => {
                let before = self.inodes().await;
                let mut changed = self.numbers(&paths(operation)).await;
                let done = apply(&self.fs, operation).await;
                if done.is_ok() {
                    let after = self.inodes().await;
                    let now = self.trees.len();
                    changed.extend(self.numbers(&paths(operation)).await);
                    self.changed
                        .extend(changed.into_iter().map(|inode| (inode, now)));
                    for new in after.iter().filter(|inode| !before.contains(inode)) {
                        self.device.mark(Mark::Touched(*new));
                        self.contents.insert(*new, Vec::new());
                    }
                }
                self.trees.push(tree(&self.fs).await);
            }
            Step::Sync(path) => {
                let Ok(cell) = resolve(&self.fs, path).await else {
                    return;
                };
                self.fs.fsync(&cell, false).await.unwrap();
                let number = cell.number();
                if let Some(content) = self.contents.get(&number) {
                    self.device.mark(Mark::Synced(number, content.clone()));
                }
                if let Some(step) = self.changed.get(&number) {
                    self.device.mark(Mark::Step(*step));
                }
            }
            Step::SyncAll => self.sync().await,
            data => self.change_data(data).await,
        }
    }

    /// Those that operations on names may change; all that there are.
    async fn inodes(&self) -> Vec<u32> {
        self.numbers(&[
            "", "a", "c", "d", "e", "l", "d/b", "d/c", "d/s", "e/b", "e/c",
        ])
        .await
    }

    async fn sync(&mut self) {
        self.fs.sync().await.unwrap();
        for (number, content) in &self.contents {
            self.device.mark(Mark::Synced(*number, content.clone()));
        }
        self.device.mark(Mark::Step(self.trees.len() - 1));
    }

    async fn change_data(&mut self, step: &Step) {
        let (Step::Write { path, .. } | Step::Truncate { path, .. } | Step::Space { path, .. }) =
            step
        else {
            return;
        };
        let Ok(cell) = resolve(&self.fs, path).await else {
            return;
        };
        let number = cell.number();
        let Some(content) = self.contents.get_mut(&number) else {
            return;
        };
        self.device.mark(Mark::Touched(number));
        match step {
            Step::Write { offset, len, .. } => {
                let data = vec![3; *len];
                let from = *offset as usize;
                self.fs.write(&cell, *offset, data.into()).await.unwrap();
                content.resize(content.len().max(from + len), 0);
                content[from..from + len].fill(3);
            }
            Step::Truncate { size, .. } => {
                self.fs.truncate(&cell, *size).await.unwrap();
                content.resize(*size as usize, 0);
            }
            Step::Space { how, .. } => {
                let (from, to) = (1000, 4000);
                self.fs
                    .fallocate(&cell, *how, from, to - from)
                    .await
                    .unwrap();
                let to = to as usize;
                if *how != Allocation::Punch {
                    content.resize(content.len().max(to), 0);
                }
                let to = content.len().min(to);
                if (from as usize) < to {
                    content[from as usize..to].fill(0);
                }
            }
            _ => {}
        }
    }
}

/// What a loss of power left: the tree after one of the operations, files as they were synced, nothing old.
fn judge(left: Vec<u8>, moment: &Moment<'_>, trees: &[Tree], what: &str) {
    let device = Arc::new(Recorder::new(left));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await;
        let fs = fs.unwrap_or_else(|error| panic!("{what}: {error}"));
        let found = tree(&fs).await;
        let allowed = &trees[moment.step..];
        assert!(
            allowed.contains(&found),
            "{what}: not a tree since step {}: {found:#?}, {allowed:#?}",
            moment.step
        );
        let firsts = found
            .iter()
            .filter(|(path, facts)| **path == facts.first_name);
        for (path, _) in firsts {
            let cell = resolve(&fs, path).await.unwrap();
            let number = cell.number();
            let Ok(content) = fs.read(&cell, 0, u32::MAX).await else {
                continue;
            };
            assert!(!content.contains(&STALE), "{what}: {path} shows old data");
            if let Some(expected) = moment.synced.get(&number) {
                assert!(
                    content[..] == expected[..],
                    "{what}: {path} lost what was synced"
                );
            }
            // What is behind the end stays zero when the file grows.
            let size = content.len();
            fs.truncate(&cell, size as u64 + 5000).await.unwrap();
            let grown = fs.read(&cell, size as u64, u32::MAX).await.unwrap();
            assert!(
                grown.iter().all(|byte| *byte == 0),
                "{what}: {path} behind its end"
            );
        }
        fs.close().await.unwrap();
    });
    let report = check_bytes(device.content()).unwrap();
    assert!(report.findings.is_empty(), "{what}: {:?}", report.findings);
}

/// The kernel replays it, and sees one of the trees, too.
fn judge_by_kernel(workshop: &Workshop, left: &[u8], allowed: &[Tree], what: &str) {
    let path = workshop.path("left");
    fs::write(&path, left).unwrap();
    let mut found = Tree::new();
    workshop.change(&path, |dir| found = kernel_side::tree(dir));
    assert!(
        allowed.contains(&found),
        "{what}: the kernel sees {found:#?}"
    );
    let (clean, said) = e2fsck(&path);
    assert!(clean, "{what}: after the kernel: {said}");
}

/// Runs one workload and judges some of its states; how many.
fn crash(workshop: &Workshop, start: &(Vec<u8>, Contents), steps: &[Step], seed: u64) -> usize {
    let device = Arc::new(Recorder::new(start.0.clone()));
    let trees = run(async {
        let fs = Filesystem::open(device.clone(), often()).await.unwrap();
        let trees = vec![tree(&fs).await];
        let mut workload = Workload {
            fs,
            device: &device,
            contents: start.1.clone(),
            trees,
            changed: HashMap::new(),
        };
        for (number, content) in &workload.contents {
            device.mark(Mark::Synced(*number, content.clone()));
        }
        for step in steps {
            workload.step(step).await;
        }
        workload.sync().await;
        workload.trees
    });
    let mut count = 0;
    device.crashes(STATES, &mut Random(seed), |left, moment| {
        let what = format!("{steps:?}, state {count}");
        let number = seed as usize + count;
        if is_for_e2fsck(number) {
            judge_by_e2fsck(workshop, &left, &what);
        }
        if number.is_multiple_of(KERNEL_EVERY) {
            judge_by_kernel(workshop, &left, &trees[moment.step..], &what);
        }
        judge(left, moment, &trees, &what);
        count += 1;
    });
    count
}

/// One in `every` of the workloads of `length` operations.
fn workloads(length: u32, every: usize) -> impl Iterator<Item = (usize, Vec<Step>)> {
    let vocabulary = vocabulary();
    let size = vocabulary.len();
    let chosen = move |number: &usize| Random(*number as u64).below(every as u64) == 0;
    let numbers = (0..size.pow(length)).filter(chosen);
    numbers.map(move |number| {
        let mut rest = number;
        let steps = (0..length).map(|_| {
            let step = vocabulary[rest % size].clone();
            rest /= size;
            step
        });
        (number, steps.collect())
    })
}

#[test]
fn no_loss_of_power_in_a_short_workload_leaves_what_never_was() {
    let workshop = Workshop::new();
    let rounds = rounds() as usize;
    let (mut runs, mut states) = (0, 0);
    for (at, kind) in ["-t ext4", "-t ext4 -b 4096 -I 128"].iter().enumerate() {
        let start = start(&workshop, kind);
        let singles = workloads(1, 1);
        let pairs = workloads(2, EVERY_PAIR.div_ceil(rounds));
        let triples = workloads(3, EVERY_TRIPLE.div_ceil(rounds));
        for (number, steps) in singles.chain(pairs).chain(triples) {
            states += crash(&workshop, &start, &steps, (number + at) as u64);
            runs += 1;
        }
        eprintln!("{runs} workloads, {states} states");
    }
}
