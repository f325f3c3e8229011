//! One run: start, work under faults, stop the faults, everything must become clean, check.

use crate::check;
use crate::churn;
use crate::entry::Entry;
use crate::faults::{self, Kind};
use crate::history::{NEVER, What};
use crate::machine::{Death, Incarnation, Medium, lock};
use crate::net::address;
use crate::random::{Random, seed_kernel};
use crate::trace::{self, Summary};
use crate::watch;
use crate::workload::{Load, User, VOLUMES, delete, geometry, look, show};
use crate::world::{CLIENTS, SERVERS, World, run};
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, SnapshotName, VolumeCreate};
use blockd::client::{Client, ClientError, ClientOptions, IoErrorKind};
use blockd::control::registry::MoveWish;
use blockd::id::NodeNo;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// What to run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub seed: u64,
    pub ops: u64,
    /// A bit for each kind of fault that may happen.
    pub mask: u32,
    pub log: bool,
}

/// All kinds of faults.
pub(crate) const ALL_FAULTS: u32 = (1 << Kind::ALL.len()) - 1;
/// Within this time after the faults nothing may be left of them.
const CLEAN: Duration = Duration::from_secs(180);

fn runtime() -> tokio::runtime::Runtime {
    let built = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    match built {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime: {error}"),
    }
}

/// A cluster with its volumes, as three stopped servers leave it: every run begins with it.
#[must_use]
pub(crate) fn template() -> Vec<Medium> {
    seed_kernel(0);
    let runtime = runtime();
    let media = runtime.block_on(async {
        let world = World::new(vec![Medium::default(); SERVERS], 0);
        let main = found(Rc::clone(&world));
        run(Rc::clone(&world), main).await;
        for host in 0..SERVERS {
            world.kill(host, Death::Process);
        }
        let media = (0..SERVERS).map(|host| lock(&world.medium(host)).clone());
        media.collect()
    });
    drop(runtime);
    media
}

async fn found(world: Rc<World>) {
    for host in 0..SERVERS {
        world.start(host);
    }
    sleep(Duration::from_millis(10)).await;
    let network = world.net.of(Incarnation::new(SERVERS));
    let servers = [address(0).to_string()];
    let client = Client::connect_over(network, &servers, ClientOptions::default()).await;
    let client = client.unwrap_or_else(|error| panic!("template: {error}"));
    let name = "sim".to_owned();
    let mut requests = vec![AdminRequest::ClusterDefine { name }];
    requests.extend((1..SERVERS).map(|host| AdminRequest::NodeDefine {
        address: address(host).to_string(),
        name: None,
        online: true,
    }));
    requests.extend(VOLUMES.map(|(name, blocks, page_blocks)| {
        AdminRequest::VolumeCreate(VolumeCreate {
            name: name.to_owned(),
            size_bytes: u64::from(blocks) * 512,
            servers: Vec::new(),
            page_blocks,
            format: None,
        })
    }));
    for request in requests {
        let done = client.admin(request.clone()).await;
        done.unwrap_or_else(|error| panic!("template: {request:?}: {error}"));
    }
    for host in 0..SERVERS {
        if let Some(server) = world.server(host) {
            let stopped = server.stop().await;
            stopped.unwrap_or_else(|error| panic!("template: {error}"));
        }
    }
}

/// Runs a seed.
#[must_use]
pub(crate) fn seed(template: &[Medium], options: Options) -> Summary {
    seed_kernel(options.seed);
    let runtime = runtime();
    let problems = runtime.block_on(async {
        trace::begin(options.log);
        let world = World::new(template.to_vec(), options.seed);
        let main = whole(Rc::clone(&world), options);
        run(Rc::clone(&world), main).await
    });
    problems.into_iter().for_each(trace::problem);
    // What is left of the run is not worth the time of its destruction: the process ends.
    std::mem::forget(runtime);
    trace::end()
}

async fn whole(world: Rc<World>, options: Options) -> Vec<String> {
    let plan = faults::plan(options.seed, options.mask);
    let mut random = Random::new(options.seed, 4);
    prepare(&world, &mut random);
    (0..SERVERS).for_each(|host| world.start(host));
    let besides = random.below(4);
    let load = Rc::new(Load {
        world: Rc::clone(&world),
        seed: options.seed,
        ops: options.ops,
        called: Cell::new(0),
        finished: Cell::new(0),
        quiet: plan.is_empty(),
        think_ms: [0, 4, 30][random.below(3) as usize],
        hot_blocks: [48, 256, 2048][random.below(3) as usize].max(256),
        cutting: Cell::new(0),
        rollbacks: besides & 1 != 0,
        moves: besides & 2 != 0,
    });
    let lanes = random.between(1, 3);
    let entering = entering(options.seed);
    for number in 0..CLIENTS {
        let load = Rc::clone(&load);
        tokio::task::spawn_local(async move {
            let mut user = User::connect(&load.world, number).await;
            let enters = entering >> number & 1 == 1;
            user.entry = enters.then(|| Rc::new(Entry::new(Rc::clone(&load.world), number)));
            learn_owners(&load.world, &user);
            for lane in 0..lanes {
                tokio::task::spawn_local(Rc::clone(&load).lane(user.clone(), lane));
            }
        });
    }
    let churns = Random::new(options.seed, 7).one_in(3);
    if churns {
        tokio::task::spawn_local(churn::run(Rc::clone(&load)));
    }
    tokio::task::spawn_local(watch::holds(Rc::clone(&world)));
    tokio::task::spawn_local(watch::registries(Rc::clone(&world)));
    tokio::task::spawn_local(faults::operate(Rc::clone(&world), options.seed));
    let mut due = plan.into_iter().peekable();
    let bound = Instant::now() + Duration::from_secs(900);
    while load.finished.get() < lanes * CLIENTS as u64 + u64::from(churns) {
        while let Some(fault) =
            due.next_if(|fault| fault.at * options.ops <= load.called.get() * 1000)
        {
            tokio::task::spawn_local(faults::happen(Rc::clone(&world), fault));
        }
        if Instant::now() > bound {
            return vec!["not every request was answered within 900 s".to_owned()];
        }
        sleep(Duration::from_millis(3)).await;
    }
    trace::mix(load.called.get());
    calm(&world).await;
    let end = finish(&world, &mut random);
    let mut found = match timeout(Duration::from_secs(900), end).await {
        Ok(found) => found,
        Err(_) => vec!["the run does not come to its end".to_owned()],
    };
    world.note_cuts();
    let owners = world.owners.borrow();
    found.extend(check::all(&world.history, &|volume, block| {
        let page = block / geometry(volume).1;
        owners.get(&(volume, page)).cloned().unwrap_or_default()
    }));
    found
}

/// The clients that go through one server, a bit for each: some of half of the runs.
fn entering(seed: u64) -> u64 {
    let mut random = Random::new(seed, 5);
    match random.one_in(2) {
        true => random.between(1, (1 << CLIENTS) - 1),
        false => 0,
    }
}

fn prepare(world: &World, random: &mut Random) {
    if random.one_in(2) {
        world
            .net
            .set_delay(random.between(10, 200), random.between(1, 40));
        trace::count("fault: late messages");
    }
    for host in 0..SERVERS {
        let medium = world.medium(host);
        let mut medium = lock(&medium);
        medium.faults.latency_ms = [(0, 0), (1, 3), (1, 20)][random.below(3) as usize];
        medium.faults.cold_one_in = [0, 0, 3][random.below(3) as usize];
        let skew = random.below(10_000);
        let clock = &world.slots.borrow()[host].clock;
        let skew = i64::try_from(skew).unwrap_or_default() - 5_000;
        clock
            .offset_ms
            .store(skew, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Ends all faults.
async fn calm(world: &Rc<World>) {
    trace::say(|| "the faults stop".to_owned());
    world.stopping.set(true);
    // Faults that go on end by themselves; their ends would heal only.
    world.net.heal();
    world.net.set_delay(0, 0);
    for host in 0..SERVERS {
        let medium = world.medium(host);
        let mut medium = lock(&medium);
        let damaged = medium.damaged;
        medium.heal_reads();
        medium.faults = crate::machine::DiskFaults::default();
        medium.damaged = damaged;
        let failed = medium.failed;
        drop(medium);
        world.pause(host, Instant::now());
        if failed || world.refusal(host).is_some() {
            world.kill(host, Death::Process);
        }
    }
    sleep(Duration::from_secs(1)).await;
}

async fn finish(world: &Rc<World>, random: &mut Random) -> Vec<String> {
    resume_moves(&User::connect(world, CLIENTS).await).await;
    if let Some(text) = become_clean(world, false).await {
        return vec![text];
    }
    if random.one_in(3) {
        // The sweep looks at everything.
        sleep(Duration::from_secs(25)).await;
    }
    let user = User::connect(world, CLIENTS).await;
    let mut found = read_all(world, &user).await;
    let mut again = User::connect(world, CLIENTS).await;
    if random.one_in(2) && found.is_empty() {
        for volume in 0..VOLUMES.len() {
            let history = &world.history;
            let op = history.invoke(user.number, volume, What::Flush, 0, 0);
            match user.volumes[volume].flush().await {
                Ok(()) => history.answer(op, None),
                Err(error) => found.push(format!("a flush of a clean cluster: {error}")),
            }
        }
        trace::count("end: all servers lose power after a flush");
        let keep = Death::Power([0, 128][random.below(2) as usize]);
        (0..SERVERS).for_each(|host| world.kill(host, keep));
        if let Some(text) = become_clean(world, false).await {
            return vec![text];
        }
        again = User::connect(world, CLIENTS).await;
        found.extend(read_all(world, &again).await);
    }
    found.extend(look_at_snapshots(world, &again).await);
    if found.is_empty() {
        found.extend(delete_all(world, &again).await);
    }
    found
}

/// Moves that somebody paused go on.
async fn resume_moves(user: &User) {
    for (name, ..) in VOLUMES {
        let (volume, wish) = (name.to_owned(), MoveWish::Run);
        // Refused if there is none.
        let _ = user
            .client
            .admin(AdminRequest::MoveWish { volume, wish })
            .await;
    }
}

/// Waits until nothing is left of the faults; says what is.
async fn become_clean(world: &World, empty: bool) -> Option<String> {
    let until = Instant::now() + CLEAN;
    loop {
        let mut left = String::new();
        for host in 0..SERVERS {
            if let Some(text) = world.refusal(host) {
                return Some(format!("server {host} refuses to start: {text}"));
            }
            let Some(server) = world.server(host) else {
                left = format!("server {host} does not run");
                continue;
            };
            let seen = server.inspect();
            if !seen.has_leader
                || seen.held + seen.executing + seen.unfinished_snapshots + seen.moves > 0
                || (empty && (seen.usage.allocated_bytes > 0 || seen.usage.slots_used > 0))
            {
                left = format!("server {host} has {seen:?}");
            }
        }
        if left.is_empty() {
            return None;
        }
        if Instant::now() > until {
            return Some(format!(
                "not clean {} s after the faults: {left}",
                CLEAN.as_secs()
            ));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

fn excused(world: &World, error: &ClientError) -> bool {
    let damaged = matches!(
        error,
        ClientError::Io {
            reason: IoErrorKind::Damaged,
            ..
        }
    );
    damaged && world.is_damaged()
}

/// Every block of every volume once more.
async fn read_all(world: &World, user: &User) -> Vec<String> {
    let mut found = Vec::new();
    for (volume, (_, blocks, page)) in VOLUMES.iter().enumerate() {
        for first in (0..*blocks).step_by(*page as usize) {
            let history = &world.history;
            let op = history.invoke(user.number, volume, What::Read(Vec::new()), first, *page);
            match show(&user.volumes[volume], volume, first, *page).await {
                Ok(shown) => history.answer(op, Some(shown)),
                Err(error) if excused(world, &error) => trace::count("end: damage is told"),
                Err(error) => found.push(format!("a read of a clean cluster: {error}")),
            }
        }
    }
    found
}

/// Every block of every snapshot that shall exist; those that shall not must not.
async fn look_at_snapshots(world: &World, user: &User) -> Vec<String> {
    let mut found = Vec::new();
    let count = world.history.snaps.borrow().len();
    for number in 0..count {
        let snap = world.history.snaps.borrow()[number].clone();
        if snap.deleting || snap.volumes.iter().any(|volume| *volume >= VOLUMES.len()) {
            continue;
        }
        let mut exists = 0;
        for volume in &snap.volumes {
            let (name, blocks, page) = VOLUMES[*volume];
            let opened = user.client.open(&format!("{name}@{}", snap.name)).await;
            exists += usize::from(opened.is_ok());
            if opened.is_err() {
                continue;
            }
            for first in (0..blocks).step_by(page as usize) {
                match look(world, user, number, *volume, first, page).await {
                    Ok(()) => {}
                    Err(error) if excused(world, &error) => trace::count("end: damage is told"),
                    Err(error) => found.push(format!("snapshot {}: {error}", snap.name)),
                }
            }
        }
        let name = &snap.name;
        if exists > 0 && exists < snap.volumes.len() {
            found.push(format!(
                "snapshot {name} exists for some of its volumes only"
            ));
        }
        if snap.taken && exists == 0 {
            found.push(format!("snapshot {name} was taken and is gone"));
        }
        if snap.refused && exists > 0 {
            found.push(format!("snapshot {name} was refused and exists"));
        }
        if !snap.taken && exists > 0 {
            trace::count("end: a snapshot of unknown outcome exists");
            world.history.snaps.borrow_mut()[number].answered = NEVER - 1;
        }
    }
    found
}

/// Deletes the snapshots that are left: those of what volumes were before rollbacks whose answer was
/// lost, and those of unknown outcome that came late.
async fn delete_strangers(world: &World, user: &User) -> Result<(), String> {
    let told = |error: ClientError| format!("snapshots of a clean cluster: {error}");
    let list = AdminRequest::SnapshotList { volume: None };
    let AdminReply::Snapshots(left) = user.client.admin(list).await.map_err(told)? else {
        return Err("snapshots are not listed".to_owned());
    };
    for left in left {
        let refused = world.history.is_refused(&left.name);
        if refused.unwrap_or(!left.name.starts_with("before-rollback-")) {
            return Err(format!(
                "{}@{} is there, and nobody took it",
                left.volume, left.name
            ));
        }
        let target = SnapshotName {
            volume: left.volume,
            snapshot: left.name,
        };
        let delete = AdminRequest::SnapshotDelete { target };
        user.client.admin(delete).await.map_err(told)?;
    }
    Ok(())
}

/// Deletes everything; nothing may be left in the stores.
async fn delete_all(world: &World, user: &User) -> Vec<String> {
    let count = world.history.snaps.borrow().len();
    for number in 0..count {
        delete(world, user, number).await;
    }
    if let Err(text) = delete_strangers(world, user).await {
        return vec![text];
    }
    if let Some(text) = become_clean(world, false).await {
        return vec![text];
    }
    for number in 0..VOLUMES.len() {
        let until = Instant::now() + CLEAN;
        loop {
            match space(user, number).await {
                Ok(None) => break,
                _ if world.is_damaged() => break,
                // Parts of snapshots that were aborted while their owner was away are swept.
                Ok(Some(_)) if Instant::now() < until => sleep(Duration::from_secs(2)).await,
                Ok(Some(text)) => return vec![text],
                Err(error) => return vec![format!("the space of a volume: {error}")],
            }
        }
    }
    if let Err(text) = delete_volumes(world, user).await {
        return vec![text];
    }
    match become_clean(world, true).await {
        Some(_) if world.is_damaged() => Vec::new(),
        Some(text) => vec![format!("space leaks: {text}")],
        None => Vec::new(),
    }
}

/// Deletes all volumes, also those that others did not come to delete.
async fn delete_volumes(world: &World, user: &User) -> Result<(), String> {
    let told = |error: ClientError| format!("volumes of a clean cluster: {error}");
    let list = user.client.admin(AdminRequest::VolumeList).await;
    let AdminReply::Volumes(volumes) = list.map_err(told)? else {
        return Err("volumes are not listed".to_owned());
    };
    let until = Instant::now() + CLEAN;
    for volume in volumes {
        let delete = AdminRequest::VolumeDelete { name: volume.name };
        loop {
            match user.client.admin(delete.clone()).await {
                Ok(_) => break,
                // A snapshot whose outcome nobody was told may be taken as late as now.
                Err(ClientError::Refused(refusal))
                    if refusal.kind == AdminErrorKind::Conflict && Instant::now() < until =>
                {
                    delete_strangers(world, user).await?;
                    sleep(Duration::from_secs(1)).await;
                }
                Err(error) => return Err(told(error)),
            }
        }
    }
    Ok(())
}

/// Without snapshots a volume takes exactly the space of the sub-blocks that have data.
async fn space(user: &User, number: usize) -> Result<Option<String>, ClientError> {
    const SUB_BLOCK: u64 = 4096;
    let (name, blocks, _) = VOLUMES[number];
    let request = AdminRequest::VolumeShow {
        name: name.to_owned(),
    };
    let AdminReply::Volume(info) = user.client.admin(request).await? else {
        return Ok(Some(format!("volume {name} is not shown")));
    };
    let extents = user.volumes[number]
        .extents(0, u64::from(blocks) * 512)
        .await?;
    let (mut at, mut data) = (0, 0);
    for extent in extents {
        let end = at + extent.len_bytes;
        if !extent.hole {
            data += end.div_ceil(SUB_BLOCK) * SUB_BLOCK - at / SUB_BLOCK * SUB_BLOCK;
        }
        at = end;
    }
    Ok((info.allocated_bytes != Some(data)).then(|| {
        let told = info.allocated_bytes;
        format!("volume {name} has {data} bytes of data and is said to take {told:?}")
    }))
}

/// Notes which server owns which page, as a client learns it.
pub(crate) fn learn_owners(world: &World, user: &User) {
    for (number, volume) in user.volumes.iter().enumerate() {
        for run in volume.info().route.runs {
            for page in run.first_page..run.first_page + run.page_count {
                let NodeNo(node) = run.owner;
                world.may_own(number, page, usize::from(node) - 1, 0);
            }
        }
    }
}
