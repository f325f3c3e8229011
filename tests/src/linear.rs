//! An oracle for blocks that many clients share, through all servers at once (checker C1).

use crate::chain::Tag;
use crate::cluster::Cluster;
use crate::nbd::{NbdConnection, NbdError};
use crate::random::Random;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

const BLOCK_BYTES: usize = 4096;
/// What a block holds that nobody has written.
const NOTHING: u64 = 0;

/// A read or a write of one block, in nanoseconds of one clock.
#[derive(Clone, Copy, Debug)]
pub struct Shared {
    pub block: usize,
    /// Written or shown; no two writes have the same one.
    pub value: u64,
    pub is_write: bool,
    pub called_ns: u64,
    /// `None`: the connection was lost, so it may have been executed or not, at any time.
    pub ended_ns: Option<u64>,
}

/// The first and the last moment that is known of a value.
#[derive(Clone, Copy, Debug)]
struct Zone {
    value: u64,
    /// The first end of a write or read of it, and the last call.
    first_end_ns: u64,
    last_call_ns: u64,
}

impl Zone {
    fn bounds(&self) -> (u64, u64) {
        let (end, call) = (self.first_end_ns, self.last_call_ns);
        (end.min(call), end.max(call))
    }

    fn is_forward(&self) -> bool {
        self.first_end_ns < self.last_call_ns
    }
}

/// Whether every block is one register, whichever server was asked: each read shows the last write of
/// some order of all operations in which none is before one that had ended when it was called
/// (linearizability of registers with unique values; Gibbons and Korach, "Testing Shared Memories", 1997).
///
/// # Errors
/// What cannot be.
pub fn check_shared(history: &[Shared]) -> Result<(), String> {
    let mut blocks: BTreeMap<usize, Vec<&Shared>> = BTreeMap::new();
    for operation in history {
        blocks.entry(operation.block).or_default().push(operation);
    }
    for (block, operations) in blocks {
        check_block(&operations).map_err(|what| format!("block {block}: {what}"))?;
    }
    Ok(())
}

fn check_block(operations: &[&Shared]) -> Result<(), String> {
    let mut zones = zones(operations)?;
    zones.sort_unstable_by_key(Zone::bounds);
    let forward: Vec<&Zone> = zones.iter().filter(|zone| zone.is_forward()).collect();
    for pair in forward.windows(2) {
        if pair[1].bounds().0 < pair[0].bounds().1 {
            let [one, other] = [pair[0], pair[1]].map(|zone| zone.value);
            return Err(format!("{one} and {other} take turns"));
        }
    }
    for zone in zones.iter().filter(|zone| !zone.is_forward()) {
        let (from, to) = zone.bounds();
        let before = forward.partition_point(|other| other.bounds().0 < from);
        if let Some(around) = before.checked_sub(1).map(|index| forward[index])
            && to < around.bounds().1
        {
            let (value, other) = (zone.value, around.value);
            return Err(format!("{value} came and went while {other} was seen"));
        }
    }
    Ok(())
}

/// The zone of each value that was acknowledged or seen.
fn zones(operations: &[&Shared]) -> Result<Vec<Zone>, String> {
    let mut writes = BTreeMap::from([(NOTHING, 0)]);
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| operation.is_write) {
        writes.insert(operation.value, operation.called_ns);
    }
    for operation in operations {
        let Some(ended_ns) = operation.ended_ns else {
            continue;
        };
        match writes.get(&operation.value) {
            None => return Err(format!("{operation:?} shows what nobody wrote")),
            Some(called_ns) if ended_ns < *called_ns => {
                return Err(format!("{operation:?} shows what was written later"));
            }
            Some(called_ns) => {
                let zone = zones.entry(operation.value).or_insert(Zone {
                    value: operation.value,
                    first_end_ns: if operation.value == NOTHING {
                        0
                    } else {
                        ended_ns
                    },
                    last_call_ns: *called_ns,
                });
                zone.first_end_ns = zone.first_end_ns.min(ended_ns);
                zone.last_call_ns = zone.last_call_ns.max(operation.called_ns);
            }
        }
    }
    Ok(zones.into_values().collect())
}

/// Clients that read and write the same few blocks, some through each server.
pub struct Sharers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Shared>>>,
}

/// One of them.
struct Sharer {
    address: String,
    export: String,
    offsets: Vec<u64>,
    began: Instant,
    values: Arc<AtomicU64>,
    random: Random,
    connection: Option<NbdConnection>,
}

impl Sharers {
    /// Begins with `each` connections to each server, on the blocks at these bytes.
    #[must_use]
    pub fn start(cluster: &Cluster, export: &str, offsets: &[u64], each: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (began, values) = (Instant::now(), Arc::new(AtomicU64::new(1)));
        let sharers = cluster.servers.iter().flat_map(|server| {
            (0..each).map(|_| Sharer {
                address: server.nbd_address(),
                export: export.to_owned(),
                offsets: offsets.to_vec(),
                began,
                values: Arc::clone(&values),
                random: Random::fresh().0,
                connection: None,
            })
        });
        let threads = sharers.map(|mut sharer| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut history = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    history.extend(sharer.operate());
                }
                history
            })
        });
        Self {
            threads: threads.collect(),
            stop,
        }
    }

    /// What they did.
    #[must_use]
    pub fn finish(self) -> Vec<Shared> {
        self.stop.store(true, Ordering::Relaxed);
        let histories = self.threads.into_iter();
        histories
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    }
}

impl Sharer {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap() + 1
    }

    /// One read or write; a read that was lost has told nothing.
    fn operate(&mut self) -> Option<Shared> {
        let block = usize::try_from(self.random.within(0..self.offsets.len() as u64)).unwrap();
        let is_write = self.random.one_in(2);
        let mut value = self.values.fetch_add(1, Ordering::Relaxed);
        let called_ns = self.now_ns();
        let result = self.try_operate(self.offsets[block], is_write.then_some(value));
        let ended_ns = match result {
            Ok(shown) => {
                value = shown;
                Some(self.now_ns())
            }
            Err(NbdError::Errno(errno)) => panic!("{}: errno {errno}", self.address),
            Err(NbdError::Lost(_)) => {
                self.connection = None;
                sleep(Duration::from_millis(5));
                None
            }
        };
        (is_write || ended_ns.is_some()).then_some(Shared {
            block,
            value,
            is_write,
            called_ns,
            ended_ns,
        })
    }

    fn try_operate(&mut self, offset: u64, write: Option<u64>) -> Result<u64, NbdError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(NbdConnection::tcp(&self.address, &self.export)?),
        };
        if let Some(value) = write {
            connection.write(offset, &Tag::block(value, BLOCK_BYTES))?;
            return Ok(value);
        }
        let data = connection.read(offset, u32::try_from(BLOCK_BYTES).unwrap())?;
        if data.iter().all(|byte| *byte == 0) {
            return Ok(NOTHING);
        }
        Ok(Tag::read(&data).unwrap_or_else(|| panic!("a block of two writes: {:?}", &data[..16])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(value: u64, called_ns: u64, ended_ns: u64) -> Shared {
        let ended_ns = Some(ended_ns).filter(|ended| *ended > 0);
        Shared {
            block: 0,
            value,
            is_write: true,
            called_ns,
            ended_ns,
        }
    }

    fn read(value: u64, called_ns: u64, ended_ns: u64) -> Shared {
        Shared {
            is_write: false,
            ..write(value, called_ns, ended_ns)
        }
    }

    #[test]
    fn what_one_register_can_show_passes() {
        let history = [
            read(NOTHING, 1, 9),
            write(1, 2, 5),
            write(2, 3, 8),
            read(1, 4, 6),
            read(2, 7, 9),
            write(3, 20, 0),
            read(2, 30, 31),
            read(3, 32, 33),
            write(4, 34, 0),
        ];
        assert_eq!(check_shared(&history), Ok(()));
    }

    #[test]
    fn what_one_register_cannot_show_fails() {
        let fails = |history: &[Shared]| check_shared(history).is_err();
        assert!(fails(&[write(1, 1, 2), read(NOTHING, 3, 4)]), "stale");
        assert!(
            fails(&[write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)]),
            "stale"
        );
        assert!(
            fails(&[read(1, 1, 2), write(1, 3, 4)]),
            "before it was written"
        );
        assert!(fails(&[read(7, 1, 2)]), "never written");
        let turns = [
            write(1, 1, 9),
            write(2, 1, 9),
            read(1, 10, 11),
            read(2, 12, 13),
            read(1, 14, 15),
        ];
        assert!(fails(&turns), "back to what was before");
        let lost = [write(1, 1, 2), write(2, 3, 0), read(2, 4, 5), read(1, 6, 7)];
        assert!(fails(&lost), "seen, and gone");
    }
}
