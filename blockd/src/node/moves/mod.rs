//! Page moves on a server: it takes the steps that are its duty (S003-12, S003-19).
//!
//! Nothing is remembered of a move but the registry's record and the file of what is being handed
//! over: a server that restarts, or was away, finds its duty in the record. Pages that the registry
//! gives to somebody else are dropped by the sweep, whoever left them here and why.

mod order;
mod pace;
mod plan;
mod source;
mod target;

pub(super) use plan::{Loads, plan};
pub(super) use source::change_owners;
pub(crate) use target::answer;

use super::handover_file::{self, HandoverFileError};
use super::identity::Membership;
use super::registry::{RegistryError, UpdateError};
use super::{Member, ServeError, fault, serve};
use crate::admin::HoldInfo;
use crate::control::registry::moves::{adopt_batch, drop_batch, duty, finish_move};
use crate::control::registry::routes::{owner, owners};
use crate::control::registry::{
    ChangeError, Duty, MoveBatch, MovePhase, MoveRecord, RegistryState,
};
use crate::data::error::DataError;
use crate::data::page_store::StoreError;
use crate::id::{Epoch, PageNo, TicketId, VolumeId};
use crate::io::environment::Environment;
use crate::io::hlc::Hlc;
use crate::io::link::Peers;
use crate::io::state_dir::StateDir;
use crate::limits::{MOVE_AGAIN_MS, MOVE_RETRY_MS, MOVE_TICK_MS};
use pace::Clients;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use target::Arrivals;
use tokio::sync::Semaphore;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};

/// Pages dropped or adopted before other tasks get a turn.
const PAGES_OF_TURN: usize = 16;

/// What this server keeps of moves besides the registry.
pub(crate) struct Moves {
    arrivals: Arrivals,
    /// Whether clients ask this server while pages leave or arrive.
    clients: Clients,
    /// Volumes of which this server takes a step now.
    busy: RefCell<HashSet<VolumeId>>,
    /// Why the last step of a volume failed.
    trouble: RefCell<HashMap<VolumeId, String>>,
    /// One batch is copied at a time.
    turn: Semaphore,
    /// Moved data has connections of its own: it must not delay orders, nor forwarded requests.
    peers: Arc<Peers>,
    state: Arc<dyn StateDir>,
    file: tokio::sync::Mutex<BTreeMap<VolumeId, Range<u32>>>,
    /// Pages that may have been handed over before the start.
    doubted: BTreeMap<VolumeId, Range<u32>>,
    /// What of a volume's pages is held now.
    holds: RefCell<BTreeMap<VolumeId, Held>>,
    /// What the registry said of a volume when it was swept last.
    swept: RefCell<HashMap<VolumeId, (Epoch, u64)>>,
}

/// Requests for moving pages that wait, and why.
struct Held {
    attempt: u64,
    pages: Range<u32>,
    since: Instant,
    /// When it ends by itself; none while the registry must say whose the pages are.
    deadline: Option<Instant>,
}

/// Why a step of a move did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// It may succeed later.
    #[error("{0}")]
    Later(String),
    /// The move or the volume is another one by now, as somebody wished.
    #[error("{0}")]
    Overtaken(String),
    /// The move fails.
    #[error("{0}")]
    Fatal(String),
}

impl From<DataError> for Trouble {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Unavailable(_) | DataError::Stale(_) | DataError::Gone => {
                Self::Later(error.to_string())
            }
            _ => Self::Fatal(error.to_string()),
        }
    }
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        DataError::from(error).into()
    }
}

impl From<RegistryError> for Trouble {
    fn from(error: RegistryError) -> Self {
        Self::Later(error.to_string())
    }
}

impl From<HandoverFileError> for Trouble {
    fn from(error: HandoverFileError) -> Self {
        Self::Fatal(error.to_string())
    }
}

impl From<UpdateError<ChangeError>> for Trouble {
    fn from(error: UpdateError<ChangeError>) -> Self {
        match error {
            UpdateError::Registry(error) => error.into(),
            UpdateError::Refused(ChangeError::Route(error)) => Self::Fatal(error.to_string()),
            UpdateError::Refused(error) => Self::Overtaken(error.to_string()),
        }
    }
}

impl Moves {
    pub(super) fn open(
        environment: &Environment,
        hlc: &Arc<Hlc>,
        membership: &Membership,
    ) -> Result<Self, ServeError> {
        let cluster_id = Some(membership.id.clone());
        let doubted = handover_file::read(&*environment.state)?;
        Ok(Self {
            arrivals: Arrivals::default(),
            clients: Clients::default(),
            busy: RefCell::default(),
            trouble: RefCell::default(),
            turn: Semaphore::new(1),
            peers: serve::peers(environment, hlc, cluster_id, membership.number)?,
            state: Arc::clone(&environment.state),
            file: tokio::sync::Mutex::new(doubted.clone()),
            holds: RefCell::default(),
            doubted,
            swept: RefCell::default(),
        })
    }

    /// What carries moved data.
    pub(super) fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// Pages that may have been handed over before the start.
    pub(super) fn doubted(&self) -> BTreeMap<VolumeId, Range<u32>> {
        self.doubted.clone()
    }

    /// Why the last step of a volume failed here.
    pub(super) fn trouble(&self, volume: VolumeId) -> Option<String> {
        self.trouble.borrow().get(&volume).cloned()
    }

    /// What waits on this server for a move of pages.
    pub(super) fn holds(&self, member: &Member) -> Vec<HoldInfo> {
        let now = Instant::now();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let holds = self.holds.borrow();
        let info = |(volume, held): (&VolumeId, &Held)| HoldInfo {
            volume: *volume,
            server: member.number(),
            ticket: TicketId(held.attempt),
            coordinator: member.number(),
            reason: format!(
                "pages {} to {} change their owner: {}",
                held.pages.start,
                held.pages.end.saturating_sub(1),
                match held.deadline {
                    Some(_) => "changes of them wait",
                    None => "requests for them wait until the registry says whose they are",
                }
            ),
            age_ms: ms(now.duration_since(held.since)),
            left_ms: held
                .deadline
                .map(|deadline| ms(deadline.saturating_duration_since(now))),
            waiting: member
                .owner()
                .volume(*volume)
                .map_or(0, |volume| volume.moving.waiting()),
            parked: 0,
        };
        holds.iter().map(info).collect()
    }

    fn note(&self, volume: VolumeId, trouble: Option<Trouble>) {
        let mut all = self.trouble.borrow_mut();
        match trouble {
            Some(trouble) => all.insert(volume, trouble.to_string()),
            None => all.remove(&volume),
        };
    }

    /// Notes which pages of a volume are being handed over; durable when it returns.
    async fn mark(
        &self,
        volume: VolumeId,
        pages: Option<Range<u32>>,
    ) -> Result<(), HandoverFileError> {
        let mut file = self.file.lock().await;
        let mut next = file.clone();
        match pages {
            Some(pages) => next.insert(volume, pages),
            None => next.remove(&volume),
        };
        let state = Arc::clone(&self.state);
        let device = self.state.device();
        let work = move || handover_file::write(&*state, &next).map(|()| next);
        match device.run(work).await {
            Ok(written) => *file = written?,
            Err(error) => tracing::error!(%error, "the handover file was not written"),
        }
        Ok(())
    }
}

/// Whether this server is the owner of a page, by the table that it goes by or by the newest one that it
/// has heard of.
fn owns(member: &Member, volume: VolumeId, page: PageNo) -> bool {
    let known = member.owner().volume(volume);
    let me = Some(member.number());
    let registry = member.registry.state();
    known.is_some_and(|known| known.table().owner(page) == me)
        || registry
            .volume(volume)
            .is_some_and(|volume| owner(&volume.routes, page.0) == me)
}

/// Takes steps for ever.
pub(crate) async fn run(member: Rc<Member>, verifier: u64) {
    tokio::task::spawn_local(plan::drain(Rc::clone(&member)));
    for (volume, pages) in member.moves.doubted() {
        member.moves.busy.borrow_mut().insert(volume);
        let held = Held {
            attempt: 0,
            pages,
            since: Instant::now(),
            deadline: None,
        };
        member.moves.holds.borrow_mut().insert(volume, held);
        tokio::task::spawn_local(clear_doubt(Rc::clone(&member), volume));
    }
    let mut states = member.registry.watch();
    loop {
        look(&member, verifier);
        let tick = Duration::from_millis(MOVE_TICK_MS);
        if let Ok(Err(_)) = timeout(tick, states.changed()).await {
            return;
        }
        states.borrow_and_update();
    }
}

/// Finds out whose pages are that were being handed over before the start.
async fn clear_doubt(member: Rc<Member>, volume: VolumeId) {
    let confirmed = loop {
        match member.registry.barrier().await {
            Ok(state) => break state,
            Err(error) => {
                tracing::warn!(%volume, %error, "pages are held: whose are they?");
                sleep(Duration::from_millis(MOVE_RETRY_MS)).await;
            }
        }
    };
    member.publish();
    let copying = confirmed.page_move(volume).filter(
        |record| matches!(record.phase, MovePhase::Copying(batch) if batch.from == member.number()),
    );
    if let Some(state) = member.owner().volume(volume) {
        source::settle(&member, &state, copying.map(|record| record.attempt)).await;
    }
    member.moves.busy.borrow_mut().remove(&volume);
}

/// Begins every step that is this server's to take.
fn look(member: &Rc<Member>, verifier: u64) {
    let state = member.registry.state();
    // First: what has arrived is this server's before it is no arrival any more.
    member.publish();
    member.moves.arrivals.tidy(&state);
    let waiting = state.page_moves().filter(|record| {
        duty(&state, record, member.number()) != Duty::Nothing
            && member.moves.busy.borrow_mut().insert(record.volume)
    });
    let volumes: Vec<VolumeId> = waiting.map(|record| record.volume).collect();
    for volume in volumes {
        let member = Rc::clone(member);
        tokio::task::spawn_local(async move {
            let taken = take_steps(&member, verifier, volume).await;
            let pause_ms = match &taken {
                Ok(()) => 0,
                Err(Trouble::Overtaken(why)) => {
                    tracing::info!(%volume, why, "a page move went another way");
                    MOVE_AGAIN_MS
                }
                Err(error) => {
                    tracing::warn!(%volume, %error, "a step of a page move failed");
                    MOVE_RETRY_MS
                }
            };
            let trouble = taken.err();
            let trouble = trouble.filter(|error| !matches!(error, Trouble::Overtaken(_)));
            member.moves.note(volume, trouble);
            sleep(Duration::from_millis(pause_ms)).await;
            member.moves.busy.borrow_mut().remove(&volume);
        });
    }
}

/// Takes step after step while they are this server's.
async fn take_steps(member: &Member, verifier: u64, volume: VolumeId) -> Result<(), Trouble> {
    loop {
        let state = member.registry.barrier().await?;
        member.publish();
        let Some(record) = state.page_move(volume) else {
            return Ok(());
        };
        match duty(&state, record, member.number()) {
            Duty::Nothing => return Ok(()),
            Duty::Begin(next) => source::move_batch(member, verifier, volume, next).await?,
            Duty::Copy(_) => give_up_lost(member, record).await,
            Duty::Adopt(batch, epoch) => adopt(member, volume, batch, epoch).await?,
            Duty::Drop(batch) => drop_pages(member, volume, batch).await?,
            Duty::Finish => {
                let build = |state: &RegistryState| finish_move(state, volume);
                member.registry.update(build).await?;
            }
        }
    }
}

/// What changed in a batch that was copied before a restart is not known any more.
async fn give_up_lost(member: &Member, record: &MoveRecord) {
    if let Some(state) = member.owner().volume(record.volume) {
        source::settle(member, &state, Some(record.attempt)).await;
    }
}

/// Makes durable that the batch is this server's; then its former owner may drop it.
async fn adopt(
    member: &Member,
    volume: VolumeId,
    batch: MoveBatch,
    epoch: Epoch,
) -> Result<(), Trouble> {
    fault::point("move-adopting");
    let store = &member.owner().store;
    let held = store.held_pages(volume).into_keys();
    let pages = held.filter(|page| batch.has(page.0));
    for (turn, page) in pages.enumerate() {
        store.adopt_page(volume, page, epoch).await?;
        if turn % PAGES_OF_TURN == PAGES_OF_TURN - 1 {
            yield_now().await;
        }
    }
    store.flush().await?;
    let build = |state: &RegistryState| adopt_batch(state, volume, batch);
    member.registry.update(build).await?;
    Ok(())
}

/// Drops the batch, which has another owner by now.
async fn drop_pages(member: &Member, volume: VolumeId, batch: MoveBatch) -> Result<(), Trouble> {
    fault::point("move-dropping");
    let store = &member.owner().store;
    let shown = store.shown_pages(volume).into_keys();
    for page in shown.filter(|page| batch.has(page.0)) {
        // Clones that stay here keep what they have in the page, or below it.
        for clone in clones_with(member, volume, page)? {
            store.copy_up(clone, page).await?;
        }
        drop_all(member, volume, std::iter::once(page)).await?;
        yield_now().await;
    }
    let state = member.registry.state();
    let owns_pages = state
        .volume(volume)
        .is_some_and(|volume| owners(&volume.routes).contains_key(&member.number()));
    if !owns_pages {
        change_owners(member, volume, member.number(), false).await?;
        forget(member, volume).await?;
    }
    let build = |state: &RegistryState| drop_batch(state, volume, batch);
    member.registry.update(build).await?;
    Ok(())
}

/// Drops pages as long as they are neither this server's nor on their way to it.
async fn drop_all(
    member: &Member,
    volume: VolumeId,
    pages: impl Iterator<Item = PageNo>,
) -> Result<(), StoreError> {
    for (turn, page) in pages.enumerate() {
        let is_foreign = || !owns(member, volume, page) && !member.moves.arrivals.has(volume, page);
        let store = &member.owner().store;
        store.drop_page(volume, page, is_foreign).await?;
        if turn % PAGES_OF_TURN == PAGES_OF_TURN - 1 {
            yield_now().await;
        }
    }
    Ok(())
}

/// Clones of a volume of which this server has this page. None can come: pages of a volume do not
/// move while it is cloned, and a clone is made where the pages of its volume are.
fn clones_with(
    member: &Member,
    parent: VolumeId,
    page: PageNo,
) -> Result<Vec<VolumeId>, DataError> {
    let state = member.registry.state();
    let clones = state.origins().filter(|origin| origin.parent == parent);
    let clones = clones.map(|origin| origin.volume);
    let clones: Vec<VolumeId> = clones.filter(|clone| owns(member, *clone, page)).collect();
    let is_settled = |clone: &VolumeId| {
        let state = member.owner().volume(*clone);
        state.is_some_and(|state| state.is_settled())
    };
    match clones.iter().all(is_settled) {
        true => Ok(clones),
        false => Err(DataError::Unavailable(
            "a clone is still being made here".to_owned(),
        )),
    }
}

/// Forgets a volume of which this server has neither pages nor any on their way.
async fn forget(member: &Member, volume: VolumeId) -> Result<(), StoreError> {
    let is_foreign = || {
        let state = member.owner().volume(volume);
        let owns_any = state.is_some_and(|state| state.table().owners().contains(&member.number()));
        !owns_any && !member.moves.arrivals.has_any(volume)
    };
    let store = &member.owner().store;
    store.forget_empty_volume(volume, is_foreign).await
}

/// Drops pages that the registry gives to somebody else: what a crash left of a move (S003-19).
pub(super) async fn sweep(member: &Member) {
    for volume in member.owner().store.volumes() {
        if let Err(error) = sweep_volume(member, volume).await {
            tracing::warn!(%volume, %error, "pages of other servers are not dropped");
        }
    }
}

async fn sweep_volume(member: &Member, volume: VolumeId) -> Result<(), Trouble> {
    let moves = &member.moves;
    let seen = |state: &RegistryState| {
        let epoch = state.volume(volume)?.epoch;
        Some((epoch, state.page_move(volume)?.attempt))
    };
    let Some(now) = seen(&member.registry.state()) else {
        return Ok(());
    };
    if moves.swept.borrow().get(&volume) == Some(&now)
        || moves.busy.borrow().contains(&volume)
        || moves.arrivals.has_any(volume)
    {
        return Ok(());
    }
    let state = member.registry.barrier().await?;
    member.publish();
    let arrives = |page: PageNo, record: &MoveRecord| match record.phase {
        MovePhase::Copying(batch) => batch.to == member.number() && batch.has(page.0),
        _ => false,
    };
    let (Some(now), Some(record)) = (seen(&state), state.page_move(volume)) else {
        return Ok(());
    };
    if record
        .batch()
        .is_some_and(|batch| batch.from == member.number())
    {
        return Ok(());
    }
    let held = member.owner().store.held_pages(volume).into_keys();
    let foreign: Vec<PageNo> = held
        .filter(|page| !owns(member, volume, *page) && !arrives(*page, record))
        .collect();
    if !foreign.is_empty() {
        tracing::info!(%volume, pages = foreign.len(), "dropping pages of other servers");
    }
    drop_all(member, volume, foreign.into_iter()).await?;
    if record.batch().is_none() {
        forget(member, volume).await?;
        moves.swept.borrow_mut().insert(volume, now);
    }
    Ok(())
}
