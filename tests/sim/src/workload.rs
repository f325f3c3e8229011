//! What clients do: each has several lanes, and each lane does one operation after the other.

use crate::entry::Entry;
use crate::faults::{self, Trap};
use crate::handle::{Failure, Handle};
use crate::history::{BLOCK, NEVER, Snap, Tag, What, decode, fill};
use crate::machine::{Death, Incarnation, lock};
use crate::net::address;
use crate::random::Random;
use crate::trace;
use crate::world::{SERVERS, World};
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, RollbackInfo, SnapshotName};
use blockd::client::{Client, ClientError, ClientOptions, Volume};
use blockd::control::registry::MoveWish;
use blockd::control::registry::settings::Procedure;
use blockd::id::NodeNo;
use bytes::Bytes;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::sleep;

/// A volume of the cluster: name, blocks, blocks of a page.
pub(crate) const VOLUMES: [(&str, u32, u32); 2] = [("a", 1536, 128), ("b", 512, 32)];
/// What `churn` makes: blocks, blocks of a page.
const SMALL: (u32, u32) = (128, 32);
/// Snapshots that exist at a time.
const SNAPSHOTS_MAX: usize = 6;
/// Bytes a second of a move: as fast as it goes.
const MOVE_RATE_BYTES: u64 = 1 << 30;

/// Disk operations in which a server dies that executes a certain change over several pages.
const DIES_WITHIN: u64 = 6;

/// Operations after which a client leaves the server that it goes through.
const LEAVES_ONE_IN: u64 = 100;

/// The name of a volume by its number.
pub(crate) fn volume_name(volume: usize) -> String {
    match VOLUMES.get(volume) {
        Some((name, ..)) => (*name).to_owned(),
        None => format!("c{volume}"),
    }
}

/// Blocks of a volume, and of its pages.
pub(crate) fn geometry(volume: usize) -> (u32, u32) {
    let known = VOLUMES.get(volume);
    known.map_or(SMALL, |(_, blocks, page)| (*blocks, *page))
}

/// What all lanes share.
pub(crate) struct Load {
    pub world: Rc<World>,
    pub seed: u64,
    pub ops: u64,
    pub called: Cell<u64>,
    pub finished: Cell<u64>,
    /// No fault was planned: every error is a violation.
    pub quiet: bool,
    pub think_ms: u64,
    pub hot_blocks: u32,
    /// Snapshots that are being taken: meanwhile the lanes meet in few places.
    pub cutting: Cell<u32>,
    /// What this run does besides: the checkers know less of what happens then.
    pub rollbacks: bool,
    pub moves: bool,
}

/// One client host with its volumes.
#[derive(Clone)]
pub(crate) struct User {
    pub number: usize,
    pub client: Client,
    pub volumes: Rc<Vec<Volume>>,
    /// It reads and writes through one server.
    pub entry: Option<Rc<Entry>>,
}

impl User {
    /// Connects, as long as it takes.
    pub(crate) async fn connect(world: &World, number: usize) -> Self {
        let network = world.net.of(Incarnation::new(SERVERS + number));
        let servers: Vec<String> = (0..SERVERS)
            .map(|server| address((server + number) % SERVERS).to_string())
            .collect();
        loop {
            let options = ClientOptions::default();
            let network = std::sync::Arc::clone(&network);
            if let Ok(client) = Client::connect_over(network, &servers, options).await
                && let Ok(a) = client.open(VOLUMES[0].0).await
                && let Ok(b) = client.open(VOLUMES[1].0).await
            {
                let volumes = Rc::new(vec![a, b]);
                return Self {
                    number,
                    client,
                    volumes,
                    entry: None,
                };
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn handle(&self, volume: usize) -> Handle<'_> {
        match &self.entry {
            Some(entry) => Handle::Entry(entry.connection(volume).await),
            None => Handle::Direct(self.number, &self.volumes[volume]),
        }
    }
}

/// Reads blocks and tells which operations wrote them.
pub(crate) async fn show(
    volume: &Volume,
    number: usize,
    first: u32,
    blocks: u32,
) -> Result<Vec<Tag>, ClientError> {
    let at = u64::from(first) * BLOCK as u64;
    let data = volume.read(at, blocks * BLOCK as u32).await?;
    Ok(tags(number, first, &data))
}

/// Which operations wrote what was read.
fn tags(number: usize, first: u32, data: &[u8]) -> Vec<Tag> {
    let blocks = (first..).zip(data.chunks_exact(BLOCK));
    let tag = |(block, data)| match decode(number, block, data) {
        Ok(tag) => tag,
        Err(text) => {
            trace::problem(format!("wrong bytes: {} {text}", volume_name(number)));
            0
        }
    };
    blocks.map(tag).collect()
}

impl Load {
    /// One lane until all operations of the run are called.
    pub(crate) async fn lane(self: Rc<Self>, user: User, lane: u64) {
        let mut random = Random::new(self.seed, 1000 + user.number as u64 * 16 + lane);
        while self.called.get() < self.ops {
            self.called.set(self.called.get() + 1);
            self.operate(&user, &mut random).await;
            if self.think_ms > 0 && random.one_in(3) {
                sleep(Duration::from_millis(random.below(self.think_ms))).await;
            }
        }
        self.finished.set(self.finished.get() + 1);
    }

    async fn operate(&self, user: &User, random: &mut Random) {
        let volume = usize::from(random.one_in(3));
        if let Some(entry) = user.entry.as_ref().filter(|_| !self.quiet)
            && random.one_in(LEAVES_ONE_IN)
        {
            entry.leave(volume);
        }
        if self.world.wants_snapshot.take() {
            return self.snapshot(user, random).await;
        }
        match random.below(100) {
            0..42 => self.write(&user.handle(volume).await, volume, random).await,
            42..76 => self.read(&user.handle(volume).await, volume, random).await,
            76..80 => self.zero(&user.handle(volume).await, volume, random).await,
            80..90 => self.flush(&user.handle(volume).await, volume).await,
            90..93 => self.snapshot(user, random).await,
            93..96 => self.read_snapshot(user, random).await,
            96..98 => self.delete_snapshot(user, random).await,
            98 => self.resize(user, volume, random).await,
            _ => match random.below(3) {
                0 if self.rollbacks => self.roll_back(user, random).await,
                1 if self.moves => self.move_pages(user, volume, random).await,
                2 if self.moves => self.wish_move(user, volume, random).await,
                _ => self.resize(user, volume, random).await,
            },
        }
    }

    fn range(&self, volume: usize, random: &mut Random) -> (u32, u32) {
        let (size, page) = geometry(volume);
        if self.cutting.get() > 0 && random.one_in(2) {
            let pages = [0, size / page / 2, size / page - 1];
            let page_no = pages[random.below(3) as usize];
            return (page_no * page + 8 * random.below(2) as u32, 8);
        }
        let all = u64::from(size);
        let size = all.min(u64::from(self.hot_blocks));
        let (first, blocks) = match random.below(10) {
            0..5 => (random.below(size / 8) * 8, 8),
            5..7 => (random.below(size), random.between(1, 7)),
            7..9 => {
                let page = u64::from(page);
                let middle = (1 + random.below((size / page).max(2) - 1)) * page;
                let before = random.between(1, 16);
                (middle - before, before + random.between(1, 16))
            }
            _ => (random.below(size / 8) * 8, 8 * random.between(1, 24)),
        };
        let blocks = blocks.min(all - first);
        (first as u32, blocks as u32)
    }

    pub(crate) async fn write(&self, handle: &Handle<'_>, volume: usize, random: &mut Random) {
        let (first, blocks) = self.range(volume, random);
        let history = &self.world.history;
        let client = handle.client();
        let op = history.invoke(client, volume, What::Write, first, blocks);
        trace::say(|| format!("{op}: client {client} writes {volume}/{first}+{blocks}"));
        self.spring_trap(volume, first, blocks);
        let data = Bytes::from(fill(volume, first, blocks, op as Tag + 1));
        let done = handle.write(first, data, random.one_in(12)).await;
        self.ended(op, done.map(|()| None));
    }

    /// Springs the trap for the owners of what is about to be changed, if it is of several pages.
    fn spring_trap(&self, volume: usize, first: u32, blocks: u32) {
        let (_, page) = geometry(volume);
        let pages = first / page..=(first + blocks - 1) / page;
        if pages.start() == pages.end() {
            return;
        }
        let Some(trap) = self.world.span_trap.take() else {
            return;
        };
        let owners = self.world.owners.borrow();
        let owner = |page| owners.get(&(volume, page))?.last().map(|(_, owner)| *owner);
        let hosts: BTreeSet<usize> = pages.filter_map(owner).collect();
        if let Trap::Death(mut number) = trap {
            for host in &hosts {
                let operations = number % DIES_WITHIN;
                number /= DIES_WITHIN;
                let medium = self.world.medium(*host);
                lock(&medium).faults.die_in = Some((operations, Death::Process));
            }
        }
        *self.world.trapped.borrow_mut() = hosts;
    }

    pub(crate) async fn read(&self, handle: &Handle<'_>, volume: usize, random: &mut Random) {
        let (first, blocks) = self.range(volume, random);
        let history = &self.world.history;
        let client = handle.client();
        let op = history.invoke(client, volume, What::Read(Vec::new()), first, blocks);
        trace::say(|| format!("{op}: client {client} reads {volume}/{first}+{blocks}"));
        let shown = handle.read(first, blocks).await;
        self.ended(op, shown.map(|data| Some(tags(volume, first, &data))));
    }

    pub(crate) async fn zero(&self, handle: &Handle<'_>, volume: usize, random: &mut Random) {
        let (first, blocks) = self.range(volume, random);
        let history = &self.world.history;
        let client = handle.client();
        let op = history.invoke(client, volume, What::Zero, first, blocks);
        trace::say(|| format!("{op}: client {client} zeroes {volume}/{first}+{blocks}"));
        let done = handle.zero(first, blocks, random.one_in(3)).await;
        self.ended(op, done.map(|()| None));
    }

    pub(crate) async fn flush(&self, handle: &Handle<'_>, volume: usize) {
        let history = &self.world.history;
        let client = handle.client();
        let op = history.invoke(client, volume, What::Flush, 0, 0);
        trace::say(|| format!("{op}: client {client} flushes {volume}"));
        let done = handle.flush().await;
        self.ended(op, done.map(|()| None));
    }

    fn ended(&self, op: usize, result: Result<Option<Vec<Tag>>, Failure>) {
        trace::mix(op as u64 | u64::from(result.is_ok()) << 40);
        match result {
            Ok(shown) => {
                trace::say(|| format!("{op}: done {}", brief(shown.as_deref())));
                self.world.history.answer(op, shown);
            }
            Err(error) => {
                trace::say(|| format!("{op}: {error}"));
                self.judge(op, &error);
            }
        }
    }

    /// Errors that a client may see.
    fn judge(&self, op: usize, error: &Failure) {
        trace::count(&error.kind());
        let is_flush = self.world.history.ops.borrow()[op].what == What::Flush;
        if self.quiet || !error.has_cause(&self.world, is_flush) {
            trace::problem(format!("operation {op} failed without a cause: {error}"));
        }
    }

    async fn snapshot(&self, user: &User, random: &mut Random) {
        let snaps = &self.world.history.snaps;
        let live = snaps
            .borrow()
            .iter()
            .filter(|snap| snap.taken && !snap.deleting && is_common(snap))
            .count();
        if live >= SNAPSHOTS_MAX {
            return self.delete_snapshot(user, random).await;
        }
        let volumes = match random.below(4) {
            0 => vec![0],
            1 => vec![1],
            _ => vec![0, 1],
        };
        self.take(user, volumes, random).await;
    }

    /// Takes a snapshot by one of the procedures.
    pub(crate) async fn take(&self, user: &User, volumes: Vec<usize>, random: &mut Random) {
        let history = &self.world.history;
        let number = history.snaps.borrow().len();
        let name = format!("s{number}");
        let procedure =
            [Procedure::Barrier, Procedure::Hold, Procedure::Stamp][random.below(3) as usize];
        history.snaps.borrow_mut().push(Snap {
            name: name.clone(),
            volumes: volumes.clone(),
            procedure,
            invoked: history.now(),
            answered: NEVER,
            ..Snap::default()
        });
        trace::say(|| {
            format!(
                "client {} takes snapshot {name} of {volumes:?} by {procedure:?}",
                user.number
            )
        });
        let targets = volumes
            .iter()
            .map(|volume| SnapshotName {
                volume: volume_name(*volume),
                snapshot: name.clone(),
            })
            .collect();
        let request = AdminRequest::SnapshotCreateBy { targets, procedure };
        if !self.quiet && random.one_in(2) {
            let (host, lasts_ms) = (random.below(SERVERS as u64), random.between(1, 60));
            let late = faults::hear_late(Rc::clone(&self.world), host as usize, lasts_ms);
            tokio::task::spawn_local(late);
        }
        self.cutting.set(self.cutting.get() + 1);
        let taken = user.client.admin(request).await;
        self.cutting.set(self.cutting.get() - 1);
        let now = history.now();
        let mut snaps = history.snaps.borrow_mut();
        let snap = &mut snaps[number];
        trace::say(|| format!("snapshot {}: {taken:?}", snap.name));
        match taken {
            Ok(_) => {
                trace::count(&format!("snapshot: taken by {procedure:?}"));
                (snap.taken, snap.answered) = (true, now);
            }
            Err(ClientError::Refused(refusal)) if refusal.kind == AdminErrorKind::Conflict => {
                // Another snapshot or a resize came in between, or a fault.
                trace::count("snapshot: aborted");
                snap.refused = true;
            }
            Err(ClientError::Refused(refusal)) => {
                // `Exists`: an attempt before, whose records are not gone yet.
                trace::count(&format!("snapshot: {:?}", refusal.kind));
                let right = [AdminErrorKind::Unavailable, AdminErrorKind::Exists];
                if !right.contains(&refusal.kind) {
                    trace::problem(format!("snapshot refused without a cause: {refusal}"));
                }
            }
            Err(_) => trace::count("snapshot: unknown"),
        }
    }

    /// A snapshot that was taken, and one of its volumes.
    fn a_snapshot(&self, random: &mut Random) -> Option<(usize, usize)> {
        let snaps = self.world.history.snaps.borrow();
        let live = (0..snaps.len()).filter(|at| {
            let snap = &snaps[*at];
            snap.taken && !snap.deleting && is_common(snap)
        });
        let live: Vec<usize> = live.collect();
        let number = *live.get(random.below(live.len() as u64) as usize)?;
        let volumes = &snaps[number].volumes;
        Some((number, volumes[random.below(volumes.len() as u64) as usize]))
    }

    /// Reads a part of a snapshot that was taken.
    async fn read_snapshot(&self, user: &User, random: &mut Random) {
        let Some((number, volume)) = self.a_snapshot(random) else {
            return;
        };
        let (first, blocks) = self.range(volume, random);
        let _ = look(&self.world, user, number, volume, first, blocks).await;
    }

    async fn delete_snapshot(&self, user: &User, random: &mut Random) {
        if let Some((number, _)) = self.a_snapshot(random) {
            delete(&self.world, user, number).await;
        }
    }

    /// Makes a volume what a snapshot shows, after a look at all of it.
    async fn roll_back(&self, user: &User, random: &mut Random) {
        let Some((number, volume)) = self.a_snapshot(random) else {
            return;
        };
        let (name, blocks, _) = VOLUMES[volume];
        let seen = look(&self.world, user, number, volume, 0, blocks).await;
        let history = &self.world.history;
        let (snapshot, content) = {
            let snap = &history.snaps.borrow()[number];
            let content = (0..blocks).map_while(|block| snap.shown.get(&(volume, block)).copied());
            (snap.name.clone(), content.collect::<Rc<[Tag]>>())
        };
        if seen.is_err() {
            return;
        }
        let op = history.invoke(user.number, volume, What::Become(content), 0, blocks);
        trace::say(|| {
            format!(
                "{op}: client {} rolls {name} back to {snapshot}",
                user.number
            )
        });
        let target = SnapshotName {
            volume: name.to_owned(),
            snapshot,
        };
        let request = AdminRequest::SnapshotRollback { target };
        match user.client.admin(request).await {
            Ok(AdminReply::RolledBack(info)) => self.rolled_back(op, volume, info),
            Ok(other) => trace::problem(format!("rollback {op} was answered {other:?}")),
            Err(error) => self.not_rolled_back(op, &error),
        }
    }

    /// An owner that has not heard of it may show the old content until it has.
    fn rolled_back(&self, op: usize, volume: usize, info: RollbackInfo) {
        let history = &self.world.history;
        trace::say(|| format!("{op}: {info:?}"));
        trace::count(match info.unheard.is_empty() {
            true => "rollback: done",
            false => "rollback: not heard by all",
        });
        let invoked = history.ops.borrow()[op].invoked;
        history.snaps.borrow_mut().push(Snap {
            name: info.safety,
            volumes: vec![volume],
            invoked,
            answered: history.now(),
            taken: true,
            ..Snap::default()
        });
        if info.unheard.is_empty() {
            history.answer(op, None);
        }
    }

    fn not_rolled_back(&self, op: usize, error: &ClientError) {
        trace::say(|| format!("{op}: {error}"));
        let kind = match error {
            ClientError::Refused(refusal) => Some(refusal.kind),
            _ => None,
        };
        trace::count(&format!("rollback: failed {kind:?}"));
        let right = [
            AdminErrorKind::Unavailable,
            AdminErrorKind::Conflict,
            AdminErrorKind::NotFound,
        ];
        if kind.is_some_and(|kind| !right.contains(&kind)) {
            trace::problem(format!("rollback {op} failed without a cause: {error}"));
        }
    }

    /// Gives pages to a server, or lets the cluster decide.
    async fn move_pages(&self, user: &User, volume: usize, random: &mut Random) {
        let (name, blocks, page) = VOLUMES[volume];
        let all = u64::from(blocks / page);
        let (first, to) = (random.below(all), random.below(SERVERS as u64) as u16);
        let count = random.between(1, all - first);
        let pages = (first as u32, count as u32);
        let rebalance = random.one_in(4);
        let now = self.world.history.now();
        for host in 0..SERVERS {
            let pages = match rebalance {
                true => 0..blocks / page,
                false if host == usize::from(to) => pages.0..pages.0 + pages.1,
                false => 0..0,
            };
            pages.for_each(|page| self.world.may_own(volume, page, host, now));
        }
        let request = match rebalance {
            true => AdminRequest::VolumeRebalance {
                volume: Some(name.to_owned()),
                rate_bytes: MOVE_RATE_BYTES,
            },
            false => AdminRequest::PageMove {
                volume: name.to_owned(),
                pages: Some(pages),
                to: NodeNo(to + 1),
                rate_bytes: MOVE_RATE_BYTES,
            },
        };
        self.administer(user, "move", request).await;
    }

    async fn wish_move(&self, user: &User, volume: usize, random: &mut Random) {
        let wishes = [
            MoveWish::Pause,
            MoveWish::Run,
            MoveWish::Run,
            MoveWish::Cancel,
        ];
        let request = AdminRequest::MoveWish {
            volume: VOLUMES[volume].0.to_owned(),
            wish: wishes[random.below(4) as usize],
        };
        self.administer(user, "wish", request).await;
    }

    /// A request that changes nothing of what clients see.
    async fn administer(&self, user: &User, what: &str, request: AdminRequest) {
        trace::say(|| format!("client {}: {request:?}", user.number));
        let done = user.client.admin(request).await;
        trace::say(|| format!("client {}: {done:?}", user.number));
        let ended = match &done {
            Ok(_) => "done".to_owned(),
            Err(ClientError::Refused(refusal)) => format!("refused {:?}", refusal.kind),
            Err(_) => "unknown".to_owned(),
        };
        trace::count(&format!("{what}: {ended}"));
    }

    /// Grows a volume behind the part that is checked, or takes that back: a new epoch.
    async fn resize(&self, user: &User, volume: usize, random: &mut Random) {
        let (name, blocks, page) = VOLUMES[volume];
        let pages = random.below(3);
        let size = u64::from(blocks) + pages * u64::from(page);
        let request = AdminRequest::VolumeResize {
            name: name.to_owned(),
            size_bytes: size * BLOCK as u64,
            allow_shrink: true,
        };
        trace::say(|| format!("client {} resizes {name}", user.number));
        let done = user.client.admin(request).await;
        trace::count(match &done {
            Ok(_) => "resize: done",
            Err(ClientError::Refused(_)) => "resize: refused",
            Err(_) => "resize: unknown",
        });
    }
}

/// Whether everybody may use it: it is of volumes that stay.
fn is_common(snap: &Snap) -> bool {
    snap.volumes.iter().all(|volume| *volume < VOLUMES.len())
}

fn brief(shown: Option<&[Tag]>) -> String {
    let mut runs: Vec<(Tag, u32)> = Vec::new();
    for tag in shown.unwrap_or_default() {
        match runs.last_mut() {
            Some((last, count)) if last == tag => *count += 1,
            _ => runs.push((*tag, 1)),
        }
    }
    let runs = runs
        .iter()
        .map(|(tag, count)| format!("{}x{count}", i64::from(*tag) - 1));
    runs.collect::<Vec<_>>().join(" ")
}

/// Reads a part of a snapshot and notes what it shows; it must never change.
///
/// # Errors
/// It cannot be opened or read.
pub(crate) async fn look(
    world: &World,
    user: &User,
    number: usize,
    volume: usize,
    first: u32,
    blocks: u32,
) -> Result<(), ClientError> {
    let snapshot = world.history.snaps.borrow()[number].name.clone();
    let target = format!("{}@{snapshot}", volume_name(volume));
    let handle = user.client.open(&target);
    let shown = show(&handle.await?, volume, first, blocks).await?;
    trace::say(|| {
        format!(
            "snapshot {snapshot} {volume}/{first}+{blocks}: {}",
            brief(Some(&shown))
        )
    });
    let snap = &mut world.history.snaps.borrow_mut()[number];
    for (block, tag) in (first..).zip(shown) {
        let before = snap.shown.insert((volume, block), tag);
        if before.is_some_and(|before| before != tag) {
            trace::problem(format!(
                "snapshot {snapshot} changed: volume {volume} block {block} showed operation {}, now {}",
                i64::from(before.unwrap_or_default()) - 1,
                i64::from(tag) - 1
            ));
        }
    }
    Ok(())
}

/// Deletes a snapshot; true if the server says that it is gone.
pub(crate) async fn delete(world: &World, user: &User, number: usize) -> bool {
    let (snapshot, volumes) = {
        let snap = &mut world.history.snaps.borrow_mut()[number];
        snap.deleting = true;
        (snap.name.clone(), snap.volumes.clone())
    };
    let mut gone = true;
    for volume in volumes {
        let target = SnapshotName {
            volume: volume_name(volume),
            snapshot: snapshot.clone(),
        };
        let done = user.client.admin(AdminRequest::SnapshotDelete { target });
        gone &= match done.await {
            Ok(AdminReply::Done) => true,
            Err(ClientError::Refused(refusal)) => refusal.kind == AdminErrorKind::NotFound,
            _ => false,
        };
    }
    trace::count(match gone {
        true => "snapshot: deleted",
        false => "snapshot: delete failed",
    });
    gone
}
