//! The owner of moving pages: it copies them while it serves, and hands them over (S003-19).
//!
//! 1. The pages are noted in a file, the batch in the registry; from then on changes are noted.
//! 2. All chunks are copied; then, in passes, what changed meanwhile, until little is left.
//! 3. Changes of these pages are held, those that began have ended, and the last tail is copied with
//!    the list of snapshots. The new owner makes it durable. The hold ends here at its deadline.
//! 4. Reads are held, too, and the flip is proposed. From now on this server answers nothing of the
//!    pages until it knows, by a transaction of its own if need be, whether they are its own.

use super::order::{MoveOrder, MovedData};
use super::pace::Pace;
use super::{Held, Trouble};
use crate::control::registry::moves::{
    FlipSpec, begin_batch, change_snapshot_owners, fail_move, flip_batch, release_batch,
};
use crate::control::registry::{ChangeError, MoveBatch, RegistryState, SnapshotState};
use crate::data::error::DataError;
use crate::data::moving::{ChunkNo, Hold, Moving};
use crate::data::owner::VolumeState;
use crate::data::page_store::Exported;
use crate::id::{Epoch, NodeNo, PageNo, VolumeId};
use crate::io::wire::{Frame, flags};
use crate::limits::{
    MOVE_BATCH_IDLE_BYTES, MOVE_BATCH_MAX_BYTES, MOVE_BATCH_MIN_BYTES, MOVE_BATCH_PAGES,
    MOVE_BUSY_RATE_BYTES, MOVE_FRAME_BYTES, MOVE_FRAMES_IN_FLIGHT, MOVE_HOLD_MAX_MS,
    MOVE_READS_AHEAD, MOVE_TAIL_CHUNKS, MOVE_TURNS_MAX, MOVE_UNSETTLED_BYTES,
};
use crate::node::registry::UpdateError;
use crate::node::{Member, fault};
use crate::planted::{Plant, planted};
use bytes::Bytes;
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use std::cell::Cell;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

/// A batch that is being copied.
struct Copying<'a> {
    member: &'a Member,
    verifier: u64,
    volume: VolumeId,
    batch: MoveBatch,
    attempt: u64,
    /// Under which the pages are this server's.
    epoch: Epoch,
    moving: Rc<Moving>,
    pace: Pace,
    bytes: Cell<u64>,
}

/// Moves the first pages of `next` to their new owner, or fewer: as many as one batch is to have.
pub(super) async fn move_batch(
    member: &Member,
    verifier: u64,
    volume: VolumeId,
    next: MoveBatch,
) -> Result<(), Trouble> {
    let _turn = member.moves.turn.acquire().await;
    let state = member.owner().volume(volume).ok_or(DataError::Gone)?;
    let registry = member.registry.state();
    let newest = registry.volume(volume).map(|volume| volume.epoch);
    if newest != Some(state.table().epoch) {
        let text = "this server does not go by the newest routing table of the volume yet";
        return Err(Trouble::Later(text.to_owned()));
    }
    let rate_bytes = registry
        .page_move(volume)
        .map_or(0, |record| record.rate_bytes);
    let batch = sized(member, volume, next, rate_bytes);
    member
        .moves
        .mark(volume, Some(batch.first_page..batch.end()))
        .await?;
    state.moving.begin(batch.first_page..batch.end());
    let build = |state: &RegistryState| begin_batch(state, volume, batch);
    let record = match member.registry.update(build).await {
        Ok(record) => record,
        Err(error) => {
            settle(member, &state, None).await;
            return Err(error.into());
        }
    };
    fault::point("move-begun");
    let copying = Copying {
        member,
        verifier,
        volume,
        batch,
        attempt: record.attempt,
        epoch: state.table().epoch,
        moving: Rc::clone(&state.moving),
        pace: Pace::new(record.rate_bytes, member.owner().served()),
        bytes: Cell::new(0),
    };
    let copied = copying.run().await;
    settle(member, &state, Some(record.attempt)).await;
    if let Err(Trouble::Fatal(why)) = &copied {
        let build = |state: &RegistryState| fail_move(state, volume, record.attempt, why);
        member.registry.update(build).await?;
    }
    copied
}

/// As many of the pages as one batch is to have, by their number, their data and the rate.
fn sized(member: &Member, volume: VolumeId, next: MoveBatch, rate_bytes: u64) -> MoveBatch {
    let asked = (member.moves.clients).ask(member.owner().served(), Instant::now());
    let rate_bytes = match rate_bytes {
        0 if asked => MOVE_BUSY_RATE_BYTES,
        0 => MOVE_BATCH_IDLE_BYTES,
        rate => rate,
    };
    let most_bytes = rate_bytes.clamp(MOVE_BATCH_MIN_BYTES, MOVE_BATCH_MAX_BYTES);
    let held = member.owner().store.shown_pages(volume);
    let most = next.page_count.min(MOVE_BATCH_PAGES);
    let mut bytes = 0;
    let range = PageNo(next.first_page)..PageNo(next.first_page.saturating_add(most));
    for (page, page_bytes) in held.range(range) {
        bytes += page_bytes;
        if bytes > most_bytes {
            let page_count = (page.0 - next.first_page).max(1);
            return MoveBatch { page_count, ..next };
        }
    }
    MoveBatch {
        page_count: most,
        ..next
    }
}

/// Finds out whose the pages are, however the attempt ended, and lets requests go on: a flip that
/// is not known to be executed can never be once the batch is released.
pub(super) async fn settle(member: &Member, state: &VolumeState, attempt: Option<u64>) {
    let volume = state.id;
    loop {
        let known = match attempt {
            None => member
                .registry
                .barrier()
                .await
                .map(drop)
                .map_err(UpdateError::from),
            Some(attempt) => {
                let build = |state: &RegistryState| release_batch(state, volume, attempt);
                member.registry.update(build).await.map(drop)
            }
        };
        match known {
            Ok(()) | Err(UpdateError::Refused(_)) => break,
            Err(UpdateError::Registry(error)) => {
                tracing::warn!(%volume, %error, "whose the pages are is not known yet");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    member.publish();
    state.moving.end();
    member.moves.holds.borrow_mut().remove(&volume);
    if let Err(error) = member.moves.mark(volume, None).await {
        tracing::warn!(%volume, %error, "pages are doubted again after a restart");
    }
}

impl Copying<'_> {
    async fn run(&self) -> Result<(), Trouble> {
        self.order(MoveOrder::Begin {
            first_page: self.batch.first_page,
            page_count: self.batch.page_count,
            history: self.member.owner().store.history(self.volume),
        })
        .await?;
        self.join_snapshots().await?;
        self.ship(self.all_chunks(), true).await?;
        fault::point("move-copied");
        for turn in 0..MOVE_TURNS_MAX {
            self.shorten_tail().await?;
            if self.hand_over(turn + 1 == MOVE_TURNS_MAX).await? {
                return Ok(());
            }
            self.order(MoveOrder::Settle).await?;
            sleep(Duration::from_millis(20)).await;
        }
        let text = "changes of the pages did not stop for long enough to hand them over";
        Err(Trouble::Later(text.to_owned()))
    }

    fn all_chunks(&self) -> Vec<ChunkNo> {
        let store = &self.member.owner().store;
        let held = store.shown_pages(self.volume);
        let pages = held.range(PageNo(self.batch.first_page)..PageNo(self.batch.end()));
        let chunks = pages.flat_map(|(page, _)| {
            let chunks = store.page_chunks(self.volume, *page);
            chunks.into_iter().map(|chunk| (*page, chunk))
        });
        chunks.collect()
    }

    /// The new owner counts as one of the snapshots that it has been told of.
    async fn join_snapshots(&self) -> Result<(), Trouble> {
        let (volume, to) = (self.volume, self.batch.to);
        Ok(change_owners(self.member, volume, to, true).await?)
    }

    /// Copies what changed, in passes, until little is left. A tail that does not get less at the rate of
    /// the move is copied without it, as otherwise the hold would have to last for all of it.
    async fn shorten_tail(&self) -> Result<(), Trouble> {
        let (mut before, mut at_pace) = (usize::MAX, true);
        loop {
            let now = self.moving.dirty_chunks();
            match before <= now {
                _ if now <= MOVE_TAIL_CHUNKS => break,
                true if at_pace => (before, at_pace) = (usize::MAX, false),
                true => break,
                false => {
                    before = now;
                    self.ship(self.moving.take_dirty(), at_pace).await?;
                }
            }
        }
        self.order(MoveOrder::Settle).await?;
        self.ship(self.moving.take_dirty(), at_pace).await
    }

    /// Hands the pages over, if what is left takes no longer than a hold may last. `true`: they
    /// belong to the new owner.
    async fn hand_over(&self, over_pending: bool) -> Result<bool, Trouble> {
        if !over_pending && self.is_being_snapshot() {
            return Ok(false);
        }
        let deadline = Instant::now() + Duration::from_millis(MOVE_HOLD_MAX_MS);
        self.hold(Hold::Changes, Some(deadline));
        if timeout_at(deadline, self.moving.quiet()).await.is_err() {
            self.hold(Hold::Nothing, None);
            return Ok(false);
        }
        let snapshots = self.member.owner().store.snapshots(self.volume);
        let known = snapshots.clone();
        let tail = match planted(Plant::FlipBeforeTail) {
            true => Default::default(),
            false => self.moving.take_dirty(),
        };
        let sealing = async {
            self.ship(tail, false).await?;
            self.order(MoveOrder::Seal { snapshots }).await
        };
        // What was sent is not given up: a message that is still under way could overtake a later one.
        let mut sealing = pin!(sealing);
        let in_time = tokio::select! {
            sealed = &mut sealing => sealed.map(|()| true)?,
            () = sleep_until(deadline) => {
                self.hold(Hold::Nothing, None);
                sealing.await?;
                false
            }
        };
        if !in_time {
            return Ok(false);
        }
        fault::point("move-sealed");
        self.hold(Hold::Everything, None);
        let spec = FlipSpec {
            attempt: self.attempt,
            epoch: self.epoch,
            snapshots: known,
            over_pending,
            verifier: self.verifier,
            bytes: self.bytes.get(),
        };
        self.flip(&spec).await
    }

    fn hold(&self, hold: Hold, deadline: Option<Instant>) {
        self.moving.hold(hold);
        let mut holds = self.member.moves.holds.borrow_mut();
        let since = holds.remove(&self.volume).map(|held| held.since);
        if hold != Hold::Nothing {
            let held = Held {
                attempt: self.attempt,
                pages: self.batch.first_page..self.batch.end(),
                since: since.unwrap_or_else(Instant::now),
                deadline,
            };
            holds.insert(self.volume, held);
        }
    }

    fn is_being_snapshot(&self) -> bool {
        let state = self.member.registry.state();
        let mut all = state.snapshots(self.volume);
        all.any(|snapshot| snapshot.state == SnapshotState::Pending)
    }

    async fn flip(&self, spec: &FlipSpec) -> Result<bool, Trouble> {
        let build = |state: &RegistryState| flip_batch(state, self.volume, spec);
        match self.member.registry.update(build).await {
            Ok(record) => {
                fault::point("move-flipped");
                tracing::info!(volume = %self.volume, phase = ?record.phase, "pages handed over");
                Ok(true)
            }
            // Nothing was proposed: the pages are this server's.
            Err(UpdateError::Refused(ChangeError::SnapshotState(..))) => {
                self.hold(Hold::Nothing, None);
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Copies chunks. Returns when the new owner has answered for all of them.
    async fn ship(
        &self,
        chunks: impl IntoIterator<Item = ChunkNo>,
        at_pace: bool,
    ) -> Result<(), Trouble> {
        let mut sending = Sending::default();
        let (mut parcel, mut unsettled) = (Parcel::default(), 0);
        let ahead = stream::iter(chunks).map(|at| async move { (at, self.export(at, None).await) });
        let mut ahead = pin!(ahead.buffered(MOVE_READS_AHEAD));
        while let Some((at, exported)) = sending.beside(ahead.next()).await? {
            let mut exported = exported?;
            sending.beside(yield_now()).await?;
            if !parcel.takes(&exported) {
                sending.add(self.send(std::mem::take(&mut parcel))).await?;
            }
            while let Some(next) = exported.next {
                // A long chain goes piece by piece, none before the one in front of it.
                parcel.add(exported);
                sending.add(self.send(std::mem::take(&mut parcel))).await?;
                sending.finish().await?;
                exported = self.export(at, Some(next)).await?;
            }
            parcel.add(exported);
            if parcel.bytes >= MOVE_FRAME_BYTES {
                unsettled += parcel.bytes;
                if at_pace {
                    let served = self.member.owner().served();
                    sending.beside(self.pace.wait(parcel.bytes, served)).await?;
                }
                sending.add(self.send(std::mem::take(&mut parcel))).await?;
            }
            if at_pace && unsettled >= MOVE_UNSETTLED_BYTES {
                // The new owner's device works meanwhile, and little is left for the seal.
                sending.add(self.order(MoveOrder::Settle)).await?;
                unsettled = 0;
            }
        }
        sending.add(self.send(parcel)).await?;
        sending.finish().await
    }

    async fn export(&self, at: ChunkNo, from: Option<u32>) -> Result<Exported, Trouble> {
        let store = &self.member.owner().store;
        let exported = store.export_chunk(self.volume, at, from).await?;
        self.bytes
            .set(self.bytes.get() + exported.data.len() as u64);
        Ok(exported)
    }

    async fn send(&self, parcel: Parcel) -> Result<(), Trouble> {
        if parcel.head.chunks.is_empty() {
            return Ok(());
        }
        self.check_current()?;
        let frame = parcel.head.frame(self.volume, self.attempt, parcel.data);
        self.call(frame).await
    }

    /// Fails if the batch was released, or the routing table is another one.
    fn check_current(&self) -> Result<(), Trouble> {
        let state = self.member.registry.state();
        let record = state.page_move(self.volume);
        let is_copying = record.is_some_and(|record| {
            record.attempt == self.attempt && record.batch() == Some(self.batch)
        });
        let epoch = state.volume(self.volume).map(|volume| volume.epoch);
        match is_copying && epoch == Some(self.epoch) {
            true => Ok(()),
            false => Err(Trouble::Overtaken("the batch was given up".to_owned())),
        }
    }

    async fn order(&self, order: MoveOrder) -> Result<(), Trouble> {
        self.call(order.frame(self.volume, self.attempt)).await
    }

    async fn call(&self, frame: Frame) -> Result<(), Trouble> {
        let to: NodeNo = self.batch.to;
        let address = self.member.group.address(to);
        let address = address.ok_or_else(|| Trouble::Fatal(format!("node {to} is not defined")))?;
        let reply = self.member.moves.peers.call(&address, frame).await;
        let reply = reply.map_err(|error| Trouble::Later(format!("node {to}: {error}")))?;
        if reply.flags & flags::ASKED != 0 {
            self.pace.target_is_asked(Instant::now());
        }
        match DataError::of_reply(&reply) {
            None => Ok(()),
            Some(DataError::Unavailable(why)) => Err(Trouble::Later(format!("node {to}: {why}"))),
            Some(error) => Err(Trouble::Fatal(format!("node {to}: {error}"))),
        }
    }
}

type Message<'a> = Pin<Box<dyn Future<Output = Result<(), Trouble>> + 'a>>;

/// Messages that wait for an answer.
#[derive(Default)]
struct Sending<'a>(FuturesUnordered<Message<'a>>);

impl<'a> Sending<'a> {
    /// Sends one more; waits while there are too many.
    async fn add(
        &mut self,
        message: impl Future<Output = Result<(), Trouble>> + 'a,
    ) -> Result<(), Trouble> {
        self.0.push(Box::pin(message));
        while self.0.len() > MOVE_FRAMES_IN_FLIGHT
            && let Some(sent) = self.0.next().await
        {
            sent?;
        }
        Ok(())
    }

    /// Waits for something while the messages go on.
    async fn beside<T>(&mut self, wanted: impl Future<Output = T>) -> Result<T, Trouble> {
        let mut wanted = pin!(wanted);
        loop {
            tokio::select! {
                biased;
                Some(sent) = self.0.next() => sent?,
                found = &mut wanted => return Ok(found),
            }
        }
    }

    async fn finish(&mut self) -> Result<(), Trouble> {
        while let Some(sent) = self.0.next().await {
            sent?;
        }
        Ok(())
    }
}

/// Chunks that travel in one message.
#[derive(Default)]
struct Parcel {
    head: MovedData,
    data: Vec<Bytes>,
    bytes: usize,
}

impl Parcel {
    /// Versions are placed by snapshots, so all of a message go with one list of them.
    fn takes(&self, exported: &Exported) -> bool {
        self.head.chunks.is_empty() || self.head.snapshots == exported.snapshots
    }

    fn add(&mut self, exported: Exported) {
        self.head.snapshots = exported.snapshots;
        self.bytes += exported.data.len() + 64;
        self.head.chunks.push(exported.moved);
        self.data.push(exported.data.into());
    }
}

/// Adds a server to the owners of snapshots, or takes it away, some at a time.
pub(in crate::node) async fn change_owners(
    member: &Member,
    volume: VolumeId,
    node: NodeNo,
    is_owner: bool,
) -> Result<(), UpdateError<ChangeError>> {
    loop {
        let build = |state: &RegistryState| -> Result<_, ChangeError> {
            let change = change_snapshot_owners(state, volume, node, is_owner);
            let is_last = change.is_none();
            Ok((change.unwrap_or_default(), is_last))
        };
        if member.registry.update(build).await? {
            return Ok(());
        }
    }
}
