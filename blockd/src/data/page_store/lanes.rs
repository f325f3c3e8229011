//! The threads that wait for the device, so that the reactor does not.

use super::engine::{ColdRead, Fetched};
use super::error::StoreError;
use super::maintain::{Job, JobDone};
use crate::io::disk::FileDisk;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use tokio::sync::{mpsc, oneshot};

/// A job that came back.
pub(super) type Outcome = JobDone;
type ColdJob = (ColdRead, oneshot::Sender<Result<Fetched, StoreError>>);

const COLD_THREADS: usize = 2;

/// One thread for syncs, one for maintenance, two for cold reads. Dropping ends and joins them.
pub(super) struct Lanes {
    senders: Option<(Sender<Job>, Sender<Job>, Sender<ColdJob>)>,
    threads: Vec<JoinHandle<()>>,
}

impl Lanes {
    /// Starts the threads.
    pub(super) fn start(
        disk: &Arc<FileDisk>,
        outcomes: &mpsc::UnboundedSender<Outcome>,
    ) -> io::Result<Lanes> {
        let mut threads = Vec::new();
        let mut lane = |name: &str| -> io::Result<Sender<Job>> {
            let (sender, jobs) = channel::<Job>();
            let (disk, outcomes) = (Arc::clone(disk), outcomes.clone());
            let run = move || {
                jobs.iter()
                    .for_each(|job| drop(outcomes.send(job.run(&*disk))))
            };
            threads.push(Builder::new().name(name.to_owned()).spawn(run)?);
            Ok(sender)
        };
        let (sync, maintenance) = (lane("store-sync")?, lane("store-upkeep")?);
        let (cold, reads) = channel::<ColdJob>();
        let reads = Arc::new(Mutex::new(reads));
        for _ in 0..COLD_THREADS {
            let (disk, reads) = (Arc::clone(disk), Arc::clone(&reads));
            threads.push(
                Builder::new()
                    .name("store-read".to_owned())
                    .spawn(move || read_cold(&disk, &reads))?,
            );
        }
        Ok(Lanes {
            senders: Some((sync, maintenance, cold)),
            threads,
        })
    }

    /// Hands a job to its lane.
    pub(super) fn send(&self, job: Job) {
        if let Some((sync, maintenance, _)) = &self.senders {
            let lane = if job.is_sync() { sync } else { maintenance };
            drop(lane.send(job));
        }
    }

    /// Hands out a read; the receiver fails if the store is closed meanwhile.
    pub(super) fn fetch(&self, read: ColdRead) -> oneshot::Receiver<Result<Fetched, StoreError>> {
        let (sender, receiver) = oneshot::channel();
        if let Some((_, _, cold)) = &self.senders {
            drop(cold.send((read, sender)));
        }
        receiver
    }
}

fn read_cold(disk: &FileDisk, reads: &Mutex<Receiver<ColdJob>>) {
    loop {
        let next = reads.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((read, answer)) = next else { return };
        drop(answer.send(read.fetch(disk)));
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.senders = None;
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}
