//! The servers of a run: started, killed, cut off and started again, all on one thread.

use crate::faults::Trap;
use crate::history::{History, Loss, Moment};
use crate::machine::{Death, Incarnation, Medium, SharedMedium, SimClock, SimState, lock};
use crate::net::{Net, address};
use crate::random::Random;
use crate::trace;
use blockd::io::environment::Environment;
use blockd::node::Server;
use blockd::node::config::ConfigFile;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::LocalSet;
use tokio::time::{Instant, interval};

/// Servers of a cluster.
pub(crate) const SERVERS: usize = 3;
/// Client hosts.
pub(crate) const CLIENTS: usize = 4;

/// Servers that may own a page, each from a moment on.
type Owners = Vec<(Moment, usize)>;

/// One server's place.
pub(crate) struct Slot {
    pub medium: SharedMedium,
    pub clock: Arc<SimClock>,
    incarnation: Arc<Incarnation>,
    tasks: Option<LocalSet>,
    server: Rc<RefCell<Option<Rc<Server>>>>,
    /// It could not start: why.
    refused: Rc<RefCell<Option<String>>>,
    paused_until: Option<Instant>,
    down_since: Option<Instant>,
    /// Times that its log was found cut, and whether it has lost power since the last one.
    cuts: u32,
    lost_power: bool,
}

pub(crate) struct World {
    pub net: Arc<Net>,
    pub history: History,
    pub slots: RefCell<Vec<Slot>>,
    pub users: LocalSet,
    pub stopping: Cell<bool>,
    /// Which servers may own which page of which volume.
    pub owners: RefCell<BTreeMap<(usize, u32), Owners>>,
    /// What becomes of the owners of the next change over several pages.
    pub span_trap: Cell<Option<Trap>>,
    /// They were these.
    pub trapped: RefCell<BTreeSet<usize>>,
    /// Somebody is to take a snapshot now.
    pub wants_snapshot: Cell<bool>,
}

impl World {
    /// A world of these media; nothing runs yet. Needs a runtime.
    #[must_use]
    pub(crate) fn new(media: Vec<Medium>, seed: u64) -> Rc<Self> {
        let start = Instant::now();
        let slots = media.into_iter().enumerate().map(|(host, mut medium)| {
            medium.arm(Random::new(seed, 100 + host as u64));
            let incarnation = Incarnation::new(host);
            incarnation.die(Death::Process);
            incarnation.take_death();
            Slot {
                medium: Arc::new(Mutex::new(medium)),
                clock: Arc::new(SimClock {
                    start,
                    offset_ms: AtomicI64::new(0),
                }),
                incarnation,
                tasks: None,
                server: Rc::default(),
                refused: Rc::default(),
                paused_until: None,
                down_since: None,
                cuts: 0,
                lost_power: false,
            }
        });
        Rc::new(Self {
            net: Net::new(SERVERS + CLIENTS + 1, Random::new(seed, 1)),
            history: History::default(),
            slots: RefCell::new(slots.collect()),
            users: LocalSet::new(),
            stopping: Cell::new(false),
            owners: RefCell::default(),
            span_trap: Cell::default(),
            trapped: RefCell::default(),
            wants_snapshot: Cell::default(),
        })
    }

    /// Starts a server; it answers when it has recovered.
    pub(crate) fn start(&self, host: usize) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[host];
        if slot.tasks.is_some() {
            return;
        }
        trace::say(|| format!("start {host}"));
        let at = self.history.now();
        self.history.starts.borrow_mut().push((host, at));
        slot.incarnation = Incarnation::new(host);
        slot.server = Rc::default();
        slot.refused = Rc::default();
        slot.down_since = None;
        slot.paused_until = None;
        let environment = Environment {
            network: self.net.of(Arc::clone(&slot.incarnation)),
            clock: Arc::clone(&slot.clock) as _,
            state: Arc::new(SimState::new(
                Arc::clone(&slot.medium),
                Arc::clone(&slot.incarnation),
            )),
        };
        let file = ConfigFile {
            listen: Some(address(host).to_string()),
            nbd_listen: Some(Vec::new()),
            log_bytes: Some(1 << 20),
            ..ConfigFile::default()
        };
        let config = file.resolve(format!("/sim/{host}").into());
        let (server, refused) = (Rc::clone(&slot.server), Rc::clone(&slot.refused));
        let tasks = LocalSet::new();
        tasks.spawn_local(async move {
            let control = tokio::runtime::Handle::current();
            let started = match config {
                Ok(config) => Server::start(config, environment, control).await,
                Err(error) => return *refused.borrow_mut() = Some(error.to_string()),
            };
            match started {
                Ok(started) => *server.borrow_mut() = Some(Rc::new(started)),
                Err(error) => {
                    trace::say(|| format!("server {host} refuses to start: {error}"));
                    *refused.borrow_mut() = Some(error.to_string());
                }
            }
        });
        slot.tasks = Some(tasks);
    }

    /// Ends a server where it stands.
    pub(crate) fn kill(&self, host: usize, death: Death) {
        let slots = self.slots.borrow_mut();
        slots[host].incarnation.die(death);
        drop(slots);
        self.reap(host);
    }

    /// Runs something in the tasks of a server, if it has any: it dies with them.
    pub(crate) fn within(&self, host: usize, task: impl Future<Output = ()> + 'static) {
        if let Some(tasks) = &self.slots.borrow()[host].tasks {
            tasks.spawn_local(task);
        }
    }

    /// Notes the cuts of the last starts; before the history is judged.
    pub(crate) fn note_cuts(&self) {
        let mut slots = self.slots.borrow_mut();
        let all = slots.iter_mut().enumerate();
        all.for_each(|(host, slot)| self.note_cut(host, slot));
    }

    /// If the last start has cut the log, what was not flushed may be gone since then. That needs a
    /// cause: power was lost, or the disk has damaged data.
    fn note_cut(&self, host: usize, slot: &mut Slot) {
        let medium = lock(&slot.medium);
        if medium.cuts() <= slot.cuts {
            return;
        }
        slot.cuts = medium.cuts();
        trace::count("state: log cut at a start");
        if !slot.lost_power && !medium.damaged {
            trace::problem(format!("server {host} cut its log without a cause"));
        }
        // A start that ended before it had cut all is followed by one that finds the rest.
        slot.lost_power &= slot.server.borrow().is_none();
        let starts = self.history.starts.borrow();
        let last = starts.iter().rev().find(|(started, _)| *started == host);
        let at = last.map_or(0, |(_, at)| *at);
        let loss = Loss { node: host, at };
        self.history.losses.borrow_mut().push(loss);
    }

    /// Buries a server that has died.
    fn reap(&self, host: usize) {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[host];
        let Some(death) = slot.incarnation.take_death() else {
            return;
        };
        trace::say(|| format!("server {host} dies: {death:?}"));
        self.note_cut(host, slot);
        let tasks = slot.tasks.take();
        slot.server = Rc::default();
        slot.down_since = Some(Instant::now());
        slot.lost_power |= death != Death::Process;
        lock(&slot.medium).die(death);
        drop(slots);
        drop(tasks);
        self.net.die(host, death != Death::Process);
        if let Death::Power(_) = death {
            let at = self.history.now();
            self.history
                .losses
                .borrow_mut()
                .push(Loss { node: host, at });
        }
    }

    /// Lets a server do nothing for a while.
    pub(crate) fn pause(&self, host: usize, until: Instant) {
        self.slots.borrow_mut()[host].paused_until = Some(until);
    }

    /// A server may own a page from this moment on.
    pub(crate) fn may_own(&self, volume: usize, page: u32, host: usize, from: Moment) {
        let mut owners = self.owners.borrow_mut();
        let owners = owners.entry((volume, page)).or_default();
        if owners.iter().all(|(_, known)| *known != host) {
            owners.push((from, host));
        }
    }

    #[must_use]
    pub(crate) fn is_paused(&self, host: usize) -> bool {
        let until = self.slots.borrow()[host].paused_until;
        until.is_some_and(|until| until > Instant::now())
    }

    #[must_use]
    pub(crate) fn server(&self, host: usize) -> Option<Rc<Server>> {
        self.slots.borrow()[host].server.borrow().clone()
    }

    #[must_use]
    pub(crate) fn refusal(&self, host: usize) -> Option<String> {
        self.slots.borrow()[host].refused.borrow().clone()
    }

    /// How long a server has been down; `None` if it runs.
    #[must_use]
    pub(crate) fn down_ms(&self, host: usize) -> Option<u64> {
        let since = self.slots.borrow()[host].down_since;
        since.map(|since| u64::try_from(since.elapsed().as_millis()).unwrap_or_default())
    }

    #[must_use]
    pub(crate) fn medium(&self, host: usize) -> SharedMedium {
        Arc::clone(&self.slots.borrow()[host].medium)
    }

    /// Whether a fault has damaged data: then a server may say so.
    #[must_use]
    pub(crate) fn is_damaged(&self) -> bool {
        (0..SERVERS).any(|host| lock(&self.medium(host)).damaged)
    }

    /// Whether a store may have failed.
    #[must_use]
    pub(crate) fn has_failed_disks(&self) -> bool {
        (0..SERVERS).any(|host| lock(&self.medium(host)).has_failed)
    }

    /// Whether a server has died and is not buried yet: nothing of it reaches anybody.
    #[must_use]
    pub(crate) fn is_dead(&self, host: usize) -> bool {
        self.slots.borrow()[host].incarnation.is_dead()
    }

    /// Whether a server may have lost what was not flushed.
    #[must_use]
    pub(crate) fn has_lost(&self) -> bool {
        !self.history.losses.borrow().is_empty()
    }

    fn poll_slot(&self, host: usize, cx: &mut std::task::Context<'_>) {
        let tasks = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[host];
            match slot.paused_until {
                Some(until) if until > Instant::now() && !slot.incarnation.is_dead() => None,
                _ => {
                    slot.paused_until = None;
                    slot.tasks.take()
                }
            }
        };
        if let Some(mut tasks) = tasks {
            let _ = Pin::new(&mut tasks).poll(cx);
            self.slots.borrow_mut()[host].tasks = Some(tasks);
        }
        self.reap(host);
    }
}

/// Runs everything until `main` has ended.
pub(crate) async fn run<T>(world: Rc<World>, main: impl Future<Output = T>) -> T {
    let users = Rc::clone(&world);
    let mut main = pin!(users.users.run_until(main));
    let mut ticks = interval(Duration::from_millis(20));
    poll_fn(move |cx| {
        // A server that died by an operation of its registry's file is buried at the next tick.
        while ticks.poll_tick(cx).is_ready() {}
        for host in 0..SERVERS {
            world.poll_slot(host, cx);
        }
        main.as_mut().poll(cx)
    })
    .await
}
