//! Speed of the page store on one thread: `cargo run --release --example store_bench [DIR]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use blockd::data::page_store::{PageAt, PageStore, StoreOptions};
use blockd::id::{Epoch, PageNo, VolumeId};
use bytes::Bytes;
use std::time::Instant;

const PAGE: u32 = 4 << 20;
const PAGES: u64 = 64;

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn place(state: &mut u64, len_bytes: u32) -> PageAt {
    let n = random(state);
    let page = PageNo(u32::try_from(n % PAGES).unwrap());
    let slots = u64::from(PAGE / len_bytes);
    let offset_bytes = u32::try_from((n >> 16) % slots).unwrap() * len_bytes;
    PageAt {
        volume: VolumeId(1),
        page,
        offset_bytes,
        len_bytes,
    }
}

fn report(what: &str, count: u64, bytes_each: u64, start: Instant) {
    let seconds = start.elapsed().as_secs_f64();
    let rate = count as f64 / seconds;
    println!(
        "{what:<34} {:>9.0}/s {:>8.1} MB/s {:>6.2} us",
        rate,
        rate * bytes_each as f64 / 1e6,
        1e6 / rate
    );
}

async fn run(store: &PageStore) {
    let mut state = 0x1234_5678_9abc_def1;
    let data = Bytes::from(
        (0..1u32 << 20)
            .map(|i| ((i * 31) >> 3) as u8)
            .collect::<Vec<_>>(),
    );
    for round in 0..4 {
        let start = Instant::now();
        let count = (PAGES * u64::from(PAGE)) >> 20;
        for i in 0..count {
            let page = PageNo(u32::try_from(i / 4).unwrap());
            let offset_bytes = u32::try_from(i % 4).unwrap() << 20;
            let at = PageAt {
                volume: VolumeId(1),
                page,
                offset_bytes,
                len_bytes: 1 << 20,
            };
            store.write(at, data.clone(), Epoch(1)).await.unwrap();
        }
        report(
            if round == 0 {
                "write 1 MiB, fresh"
            } else {
                "write 1 MiB, overwrite"
            },
            count,
            1 << 20,
            start,
        );
        store.flush().await.unwrap();
    }
    for count in [20_000, 200_000] {
        let start = Instant::now();
        for _ in 0..count {
            store
                .write(place(&mut state, 4096), data.slice(..4096), Epoch(1))
                .await
                .unwrap();
        }
        report(&format!("write 4 KiB random x {count}"), count, 4096, start);
    }
    let start = Instant::now();
    store.flush().await.unwrap();
    println!(
        "flush after that: {:?}; {:?}",
        start.elapsed(),
        store.usage()
    );
    for dirty in [true, false] {
        let start = Instant::now();
        for _ in 0..200_000 {
            store.read(place(&mut state, 4096), None).await.unwrap();
        }
        report(
            if dirty {
                "read 4 KiB random, log and slab"
            } else {
                "read 4 KiB random"
            },
            200_000,
            4096,
            start,
        );
        tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
    }
    let start = Instant::now();
    for _ in 0..2000 {
        store.read(place(&mut state, 1 << 20), None).await.unwrap();
    }
    report("read 1 MiB", 2000, 1 << 20, start);
    let start = Instant::now();
    for _ in 0..2000 {
        store
            .write(place(&mut state, 4096), data.slice(..4096), Epoch(1))
            .await
            .unwrap();
        store.flush().await.unwrap();
    }
    report("write 4 KiB + flush", 2000, 4096, start);
    let start = Instant::now();
    for _ in 0..100_000 {
        store
            .write(place(&mut state, 512), data.slice(..512), Epoch(1))
            .await
            .unwrap();
    }
    report("write 512 B random", 100_000, 512, start);
}

fn main() {
    let dir = tempfile::tempdir_in(std::env::args().nth(1).unwrap_or_else(|| ".".into())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let start = Instant::now();
        let store = PageStore::open(dir.path(), StoreOptions::default()).unwrap();
        println!("format: {:?}", start.elapsed());
        run(&store).await;
        let start = Instant::now();
        store.close().await.unwrap();
        drop(store);
        println!("close: {:?}", start.elapsed());
        let start = Instant::now();
        let store = PageStore::open(dir.path(), StoreOptions::default()).unwrap();
        println!("open: {:?}", start.elapsed());
        drop(store);
        let start = Instant::now();
        PageStore::open(dir.path(), StoreOptions::default()).unwrap();
        println!(
            "open after a crash with an empty log: {:?}",
            start.elapsed()
        );
    });
}
