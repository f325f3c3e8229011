//! Who waits for the device, so that the reactor does not: threads, or local tasks if the device is
//! simulated.

use super::engine::{ColdRead, Fetched};
use super::error::StoreError;
use super::maintain::{Job, JobDone};
use crate::io::device::Device;
use crate::io::disk::Disk;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use tokio::sync::{mpsc, oneshot};

/// A job that came back.
pub(super) type Outcome = JobDone;
type Answer = Result<Fetched, StoreError>;
type ColdJob = (ColdRead, oneshot::Sender<Answer>);
type SharedDisk = Arc<dyn Disk>;

const COLD_THREADS: usize = 2;

/// One lane for syncs, one for maintenance, two for cold reads. Dropping ends them.
pub(super) enum Lanes {
    Threads(Threads),
    Tasks(Tasks),
}

impl Lanes {
    /// Starts the lanes.
    pub(super) fn start(
        disk: &SharedDisk,
        device: &Device,
        outcomes: &mpsc::UnboundedSender<Outcome>,
    ) -> io::Result<Lanes> {
        Ok(match device {
            Device::Blocking => Lanes::Threads(Threads::start(disk, outcomes)?),
            Device::Simulated(_) => Lanes::Tasks(Tasks::start(disk, device, outcomes)),
        })
    }

    /// Hands a job to its lane.
    pub(super) fn send(&self, job: Job) {
        match self {
            Lanes::Threads(threads) => threads.send(job),
            Lanes::Tasks(tasks) => tasks.send(job),
        }
    }

    /// Hands out a read; the receiver fails if the store is closed meanwhile.
    pub(super) fn fetch(&self, read: ColdRead) -> oneshot::Receiver<Answer> {
        let (sender, receiver) = oneshot::channel();
        match self {
            Lanes::Threads(threads) => threads.fetch(read, sender),
            Lanes::Tasks(tasks) => tasks.fetch(read, sender),
        }
        receiver
    }
}

/// Threads that block. Dropping ends and joins them.
pub(super) struct Threads {
    senders: Option<(Sender<Job>, Sender<Job>, Sender<ColdJob>)>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn start(disk: &SharedDisk, outcomes: &mpsc::UnboundedSender<Outcome>) -> io::Result<Threads> {
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
                    .spawn(move || read_cold(&*disk, &reads))?,
            );
        }
        Ok(Threads {
            senders: Some((sync, maintenance, cold)),
            threads,
        })
    }

    fn send(&self, job: Job) {
        if let Some((sync, maintenance, _)) = &self.senders {
            let lane = if job.is_sync() { sync } else { maintenance };
            drop(lane.send(job));
        }
    }

    fn fetch(&self, read: ColdRead, answer: oneshot::Sender<Answer>) {
        if let Some((_, _, cold)) = &self.senders {
            drop(cold.send((read, answer)));
        }
    }
}

fn read_cold(disk: &dyn Disk, reads: &Mutex<Receiver<ColdJob>>) {
    loop {
        let next = reads.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((read, answer)) = next else { return };
        drop(answer.send(read.fetch(disk)));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.senders = None;
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

type Work = Pin<Box<dyn Future<Output = ()>>>;

/// Local tasks on the runtime of the store, one for each lane.
pub(super) struct Tasks {
    disk: SharedDisk,
    device: Device,
    outcomes: mpsc::UnboundedSender<Outcome>,
    sync: mpsc::UnboundedSender<Work>,
    maintenance: mpsc::UnboundedSender<Work>,
}

impl Tasks {
    fn start(
        disk: &SharedDisk,
        device: &Device,
        outcomes: &mpsc::UnboundedSender<Outcome>,
    ) -> Tasks {
        let lane = || {
            let (sender, mut works) = mpsc::unbounded_channel::<Work>();
            tokio::task::spawn_local(async move {
                while let Some(work) = works.recv().await {
                    work.await;
                }
            });
            sender
        };
        Tasks {
            disk: Arc::clone(disk),
            device: device.clone(),
            outcomes: outcomes.clone(),
            sync: lane(),
            maintenance: lane(),
        }
    }

    fn send(&self, job: Job) {
        let lane = match job.is_sync() {
            true => &self.sync,
            false => &self.maintenance,
        };
        let (disk, device) = (Arc::clone(&self.disk), self.device.clone());
        let outcomes = self.outcomes.clone();
        drop(lane.send(Box::pin(async move {
            if let Ok(outcome) = device.run(move || job.run(&*disk)).await {
                drop(outcomes.send(outcome));
            }
        })));
    }

    fn fetch(&self, read: ColdRead, answer: oneshot::Sender<Answer>) {
        let (disk, device) = (Arc::clone(&self.disk), self.device.clone());
        tokio::task::spawn_local(async move {
            if let Ok(fetched) = device.run(move || read.fetch(&*disk)).await {
                drop(answer.send(fetched));
            }
        });
    }
}
