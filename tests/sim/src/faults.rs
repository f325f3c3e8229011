//! What goes wrong in a run, chosen by the seed: each fault begins when so many operations were
//! called, and ends by itself.

use crate::machine::{Death, lock};
use crate::random::Random;
use crate::trace;
use crate::world::{CLIENTS, SERVERS, World};
use blockd::limits::SPAN_GRACE_MS;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Kill,
    Power,
    PowerAll,
    DieAtOperation,
    CutOneWay,
    Cut,
    Clog,
    Isolate,
    Reset,
    DiskError,
    DiskSlow,
    DiskFull,
    LoseWrite,
    Misdirect,
    Rot,
    ClockJump,
    Pause,
    /// A part of the slab cannot be read until it is written again.
    ReadError,
    /// The owners of a change over several pages die while they execute it, are asked for a snapshot as
    /// soon as they are back, and hear late what clients say.
    DieUnheard,
    /// The owners of a change over several pages lose the connections to all clients while they execute it,
    /// are asked for a snapshot at once, and hear of the clients a moment later.
    LoseSpan,
}

impl Kind {
    pub(crate) const ALL: [Kind; 20] = [
        Kind::Kill,
        Kind::Power,
        Kind::PowerAll,
        Kind::DieAtOperation,
        Kind::CutOneWay,
        Kind::Cut,
        Kind::Clog,
        Kind::Isolate,
        Kind::Reset,
        Kind::DiskError,
        Kind::DiskSlow,
        Kind::DiskFull,
        Kind::LoseWrite,
        Kind::Misdirect,
        Kind::Rot,
        Kind::ClockJump,
        Kind::Pause,
        Kind::ReadError,
        Kind::DieUnheard,
        Kind::LoseSpan,
    ];
    /// So many are drawn together; what came later has a stream of its own and leaves the rest of a run
    /// as it was.
    const DRAWN_TOGETHER: usize = 17;

    /// What the disk has taken is lost, or another than was written.
    fn damages(self) -> bool {
        matches!(self, Kind::LoseWrite | Kind::Misdirect | Kind::Rot)
    }
}

/// What becomes of the owners of the next change over several pages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Trap {
    /// Each dies after some disk operations: a number from which those follow.
    Death(u64),
    /// They lose its client.
    Loss,
}

/// Microseconds after the call of a change within which its client is lost.
const LOST_WITHIN_US: u64 = 6_000;

/// A fault to come.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub kind: Kind,
    /// Operations called before it begins, in 1/1000 of the run.
    pub at: u64,
    pub host: usize,
    pub other: usize,
    pub lasts_ms: u64,
    pub number: u64,
}

/// The faults of a seed; `mask` has a bit for each kind that is allowed.
#[must_use]
pub(crate) fn plan(seed: u64, mask: u32) -> Vec<Fault> {
    let mut random = Random::new(seed, 2);
    if random.one_in(12) {
        return Vec::new();
    }
    let likely = random.between(2, 6);
    let kinds: Vec<Kind> = Kind::ALL
        .into_iter()
        .take(Kind::DRAWN_TOGETHER)
        .filter(|_| random.one_in(likely))
        .collect();
    let count = random.between(1, 8);
    let mut faults: Vec<Fault> = (0..count)
        .filter_map(|_| {
            let chosen = random.below(kinds.len() as u64) as usize;
            Some(Fault {
                at: random.between(10, 900),
                host: random.below(SERVERS as u64) as usize,
                other: random.below((SERVERS + CLIENTS) as u64) as usize,
                lasts_ms: match random.below(10) {
                    0 => random.between(8_000, 40_000),
                    1..4 => random.between(1_000, 8_000),
                    _ => random.between(1, 900),
                },
                number: random.next_u64(),
                kind: *kinds.get(chosen)?,
            })
        })
        .collect();
    faults.extend(read_errors(seed));
    faults.extend(in_a_span(seed, 7, Kind::DieUnheard, (500, 3_000)));
    let away_ms = (50, SPAN_GRACE_MS * 2 / 3);
    faults.extend(in_a_span(seed, 9, Kind::LoseSpan, away_ms));
    faults.retain(|fault| mask >> fault.kind as u32 & 1 == 1);
    // On a full disk nothing says that a flush was: DESIGN.md, "Known and not mended".
    let was_full = |host| {
        faults
            .iter()
            .any(|f| f.kind == Kind::DiskFull && f.host == host)
    };
    let full: Vec<bool> = (0..SERVERS).map(was_full).collect();
    faults.retain(|fault| !(fault.kind.damages() && full[fault.host]));
    faults.sort_by_key(|fault| fault.at);
    faults
}

fn read_errors(seed: u64) -> Vec<Fault> {
    let mut random = Random::new(seed, 6);
    let count = match random.one_in(4) {
        true => random.between(1, 4),
        false => 0,
    };
    let fault = |_| Fault {
        kind: Kind::ReadError,
        at: random.between(200, 900),
        host: random.below(SERVERS as u64) as usize,
        other: 0,
        lasts_ms: 0,
        number: random.next_u64(),
    };
    (0..count).map(fault).collect()
}

/// A fault in the middle of a change over several pages, in a quarter of the runs; `stream` is that of its numbers.
fn in_a_span(seed: u64, stream: u64, kind: Kind, lasts_ms: (u64, u64)) -> Option<Fault> {
    let mut random = Random::new(seed, stream);
    random.one_in(4).then(|| Fault {
        kind,
        at: random.between(100, 900),
        host: random.below(SERVERS as u64) as usize,
        other: 0,
        lasts_ms: random.between(lasts_ms.0, lasts_ms.1),
        number: random.next_u64(),
    })
}

fn death(number: u64) -> Death {
    let keeps = [0, 40, 128, 220, 255];
    match number % 8 {
        0..3 => Death::Process,
        other => Death::Power(keeps[other as usize - 3]),
    }
}

/// Lets a fault happen, and waits for its end.
pub(crate) async fn happen(world: Rc<World>, fault: Fault) {
    if fault.number.is_multiple_of(3) {
        sleep(Duration::from_millis(fault.number / 3 % 200)).await;
    }
    if world.stopping.get() {
        return;
    }
    trace::count(&format!("fault: {:?}", fault.kind));
    trace::say(|| format!("fault {fault:?}"));
    trace::mix(fault.kind as u64 + 900);
    let (host, other) = (fault.host, fault.other);
    let medium = world.medium(host);
    let power = Death::Power([0, 40, 128, 220, 255][fault.number as usize % 5]);
    let lasts = sleep(Duration::from_millis(fault.lasts_ms));
    match fault.kind {
        Kind::Kill => world.kill(host, Death::Process),
        Kind::Power => world.kill(host, power),
        Kind::PowerAll => (0..SERVERS).for_each(|host| world.kill(host, power)),
        Kind::DieAtOperation => {
            let number = fault.number / 8;
            let faults = &mut lock(&medium).faults;
            match number.is_multiple_of(2) {
                true => faults.die_in = Some((number % 120, death(fault.number))),
                false => faults.die_after_slab_write = Some((number % 24, death(fault.number))),
            }
        }
        Kind::CutOneWay | Kind::Cut | Kind::Clog => {
            let both = fault.kind != Kind::CutOneWay;
            world.net.set_cut(host, other, true);
            if both {
                world.net.set_cut(other, host, true);
            }
            match fault.kind {
                Kind::Clog => sleep(Duration::from_millis(fault.lasts_ms % 300)).await,
                _ => lasts.await,
            }
            world.net.set_cut(host, other, false);
            world.net.set_cut(other, host, false);
            if fault.kind == Kind::Cut && fault.number.is_multiple_of(2) {
                world.net.reset(host, Some(other));
            }
        }
        Kind::Isolate => {
            let others = || (0..SERVERS).filter(|other| *other != host);
            for other in others() {
                world.net.set_cut(host, other, true);
                world.net.set_cut(other, host, true);
            }
            lasts.await;
            for other in others() {
                world.net.set_cut(host, other, false);
                world.net.set_cut(other, host, false);
            }
        }
        Kind::Reset if fault.number.is_multiple_of(2) => {
            trace::count("fault: Reset that one side hears of late");
            world.net.set_cut(other, host, true);
            sleep(Duration::from_millis(fault.number / 6 % 100)).await;
            world.net.lose(other, host, fault.lasts_ms);
            world.net.set_cut(other, host, false);
        }
        Kind::Reset => world.net.reset(host, (host != other).then_some(other)),
        Kind::DiskError => lock(&medium).faults.fail_in = Some(fault.number % 60),
        Kind::DiskSlow => {
            let before = std::mem::replace(&mut lock(&medium).faults.latency_ms, (20, 400));
            lasts.await;
            lock(&medium).faults.latency_ms = before;
        }
        Kind::DiskFull => {
            lock(&medium).faults.full = true;
            lasts.await;
            lock(&medium).faults.full = false;
        }
        Kind::LoseWrite => lock(&medium).faults.lose_in = Some(fault.number % 40),
        Kind::Misdirect => lock(&medium).faults.misdirect_in = Some(fault.number % 40),
        Kind::Rot => {
            if lock(&medium).rot() {
                trace::count("fault: bit flipped");
            }
        }
        Kind::ClockJump => {
            let jump = i64::try_from(fault.number % 240_000).unwrap_or_default() - 120_000;
            let clock = std::sync::Arc::clone(&world.slots.borrow()[host].clock);
            clock.offset_ms.fetch_add(jump, Ordering::Relaxed);
        }
        Kind::ReadError => lock(&medium).fail_reads(fault.number),
        Kind::DieUnheard => die_unheard_in_a_span(&world, &fault).await,
        Kind::LoseSpan => lose_a_span(&world, &fault).await,
        Kind::Pause => {
            let until = Instant::now() + Duration::from_millis(fault.lasts_ms);
            world.pause(host, until);
        }
    }
}

async fn die_unheard_in_a_span(world: &World, fault: &Fault) {
    let is_down = |host: &usize| world.down_ms(*host).is_some();
    world.span_trap.set(Some(Trap::Death(fault.number)));
    let Some(hosts) = trapped(world, |hosts| hosts.iter().any(is_down)).await else {
        return;
    };
    cut_clients(world, &hosts, true);
    let heard = Instant::now() + Duration::from_millis(fault.lasts_ms);
    while hosts.iter().any(is_down) && Instant::now() < heard {
        tick().await;
    }
    world.wants_snapshot.set(true);
    sleep_until(heard).await;
    cut_clients(world, &hosts, false);
}

async fn lose_a_span(world: &World, fault: &Fault) {
    world.span_trap.set(Some(Trap::Loss));
    let Some(hosts) = trapped(world, |hosts| !hosts.is_empty()).await else {
        return;
    };
    sleep(Duration::from_micros(fault.number % LOST_WITHIN_US)).await;
    cut_clients(world, &hosts, true);
    for host in &hosts {
        (SERVERS..SERVERS + CLIENTS).for_each(|client| world.net.reset(client, Some(*host)));
    }
    world.wants_snapshot.set(true);
    sleep(Duration::from_millis(fault.lasts_ms)).await;
    cut_clients(world, &hosts, false);
}

async fn tick() {
    sleep(Duration::from_millis(1)).await;
}

/// Waits for the servers that a trap has caught, and for what is to become of them; `None` at the end of the run.
async fn trapped(
    world: &World,
    is_done: impl Fn(&BTreeSet<usize>) -> bool,
) -> Option<BTreeSet<usize>> {
    while !is_done(&world.trapped.borrow()) {
        if world.stopping.get() {
            return None;
        }
        tick().await;
    }
    Some(world.trapped.take())
}

/// Whether servers hear nothing of what the clients say.
fn cut_clients(world: &World, hosts: &BTreeSet<usize>, cut: bool) {
    for client in SERVERS..SERVERS + CLIENTS {
        let each = hosts.iter();
        each.for_each(|host| world.net.set_cut(client, *host, cut));
    }
}

/// What other servers say comes late to one, what clients say does not: so it has executed more than
/// they when a snapshot reaches it.
pub(crate) async fn hear_late(world: Rc<World>, host: usize, lasts_ms: u64) {
    let cut = |cut| {
        let others = (0..SERVERS).filter(|other| *other != host);
        others.for_each(|other| world.net.set_cut(other, host, cut));
    };
    cut(true);
    sleep(Duration::from_millis(lasts_ms)).await;
    cut(false);
}

/// Refusals to start after which the operator mends the disk that cannot be read: a server reads what was
/// not flushed when it starts.
const REFUSALS: u32 = 8;

/// The operator: starts servers that are down, and those again whose disk failed.
pub(crate) async fn operate(world: Rc<World>, seed: u64) {
    let mut random = Random::new(seed, 3);
    let mut wait_ms = [0; SERVERS];
    let mut refusals = [0; SERVERS];
    loop {
        sleep(Duration::from_millis(50)).await;
        for (host, wait_ms) in wait_ms.iter_mut().enumerate() {
            if let Some(down_ms) = world.down_ms(host) {
                if down_ms >= *wait_ms || world.stopping.get() {
                    *wait_ms = match random.below(8) {
                        0 => random.between(3_000, 12_000),
                        1..4 => random.between(300, 3_000),
                        _ => random.below(300),
                    };
                    world.start(host);
                }
            } else if lock(&world.medium(host)).failed && random.one_in(20) {
                trace::count("operator: restart after a disk error");
                world.kill(host, Death::Process);
            } else if world.refusal(host).is_some() && !world.stopping.get() {
                trace::count("operator: restart of a server that refused to start");
                refusals[host] += 1;
                if refusals[host] % REFUSALS == 0 {
                    lock(&world.medium(host)).heal_reads();
                }
                world.kill(host, Death::Process);
            }
        }
    }
}
