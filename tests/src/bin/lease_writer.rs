//! A program that leases a volume and writes as fast as it can: to be stopped and killed by tests.
//!
//! `lease-writer SERVERS VOLUME TTL_MS STRIDE PLACES`: writes blocks of 4 KiB at PLACES places that
//! are STRIDE bytes apart, all at once. Prints `held EPOCH`, then `writing`; for each place at its
//! first refusal `fenced TEXT`, then `lost TEXT` as the lease says it, and ends with 3.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use blockd::client::{Client, ClientError, ClientOptions, HolderText, Volume};
use bytes::Bytes;
use std::process::ExitCode;
use std::time::Duration;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments[at].parse::<u64>().unwrap();
    let servers: Vec<String> = arguments[1].split(',').map(str::to_owned).collect();
    let client = Client::connect(&servers, ClientOptions::default()).await;
    let volume = client.unwrap().open(&arguments[2]).await.unwrap();
    let holder = HolderText::this_process("lease-writer");
    let ttl = Duration::from_millis(number(3));
    let lease = volume.acquire_exclusive(holder, ttl).await.unwrap();
    println!("held {}", lease.info().epoch);
    let (stride, places) = (number(4), number(5));
    let writers: Vec<_> = (0..places)
        .map(|place| tokio::spawn(write(volume.clone(), place * stride, place == 0)))
        .collect();
    for writer in writers {
        println!("fenced {}", writer.await.unwrap());
    }
    println!("lost {}", lease.lost().await);
    ExitCode::from(3)
}

/// Writes until it is refused; why.
async fn write(volume: Volume, at: u64, announces: bool) -> String {
    let mut written = 0_u64;
    loop {
        let data = Bytes::from(vec![0xaa; 4096]);
        match volume.write(at, data).await {
            Ok(()) => written += 1,
            Err(ClientError::Fenced { reason, .. }) => return reason,
            Err(error) => panic!("{error}"),
        }
        if announces && written == 1 {
            println!("writing");
        }
    }
}
