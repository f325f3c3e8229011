//! Changes of a volume: all or nothing over several pages, and sent again when an owner lost them.

use super::replay::Change;
use super::volume::{Opened, TryError, Volume, failed};
use super::{ClientError, IoErrorKind};
use crate::data::forward::{self, PartIo};
use crate::data::router::Part;
use crate::data::span::Span;
use crate::limits::CLIENT_REPLAY_BYTES;
use crate::planted::{Plant, planted};
use futures_util::future::join_all;
use std::sync::atomic::{AtomicBool, Ordering};

/// A change in the replay buffer; withdrawn when dropped before it was acknowledged.
struct Issued<'a> {
    volume: &'a Volume,
    number: u64,
    acknowledged: AtomicBool,
}

impl Issued<'_> {
    fn acknowledge(&self, executed: Vec<Part>) {
        self.acknowledged.store(true, Ordering::Relaxed);
        let mut replay = self.volume.replay_buffer();
        replay.acknowledged(self.number, executed);
    }
}

impl Drop for Issued<'_> {
    fn drop(&mut self) {
        if !self.acknowledged.load(Ordering::Relaxed) {
            self.volume.replay_buffer().withdrawn(self.number);
        }
    }
}

impl Volume {
    pub(super) async fn change(
        &self,
        what: &'static str,
        offset: u64,
        change: Change,
        fua: bool,
    ) -> Result<(), ClientError> {
        let len = change.len_bytes();
        if self.is_read_only() {
            return Err(failed(what, offset, len, IoErrorKind::ReadOnly));
        }
        self.check_range(what, offset, len)?;
        if self.replay_buffer().buffered_bytes() > CLIENT_REPLAY_BYTES {
            self.flush().await?;
        }
        let io = io_of(&change, fua);
        let issued = Issued {
            volume: self,
            number: self.replay_buffer().issued(offset, change),
            acknowledged: AtomicBool::new(false),
        };
        let mut span = None;
        let mut patience = self.patience(what, offset, len);
        loop {
            match self.try_change(offset, len, &io, &mut span, &issued).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    span.as_mut().map(Span::give_back);
                    patience.after(self, error).await?;
                }
            }
        }
    }

    /// One try; the change is acknowledged before a replay can begin.
    async fn try_change(
        &self,
        offset: u64,
        len: u64,
        io: &PartIo,
        span: &mut Option<Span>,
        issued: &Issued<'_>,
    ) -> Result<(), TryError> {
        let _order = self.shared.order.read().await;
        let executed = self.send_change(offset, len, io, span, None).await?;
        issued.acknowledge(executed);
        Ok(())
    }

    /// Gives the parts with those who executed them.
    async fn send_change(
        &self,
        offset: u64,
        len: u64,
        io: &PartIo,
        span: &mut Option<Span>,
        replaying: Option<u64>,
    ) -> Result<Vec<Part>, TryError> {
        let opened = self.opened();
        let parts: Vec<Part> = opened.table.parts(offset, len).collect();
        if span.is_some() || opened.table.spans_pages(offset, len) {
            let peers = &self.shared.client.shared.peers;
            let new = || Span::new(peers, &opened.table, offset, len);
            let span = span.get_or_insert_with(new);
            self.advance(&opened, span, io, replaying).await?;
            return Ok(parts);
        }
        for part in &parts {
            let table = &opened.table;
            let mut request = forward::request(table.volume, table.epoch, part, io, None);
            request.set_lease(self.shared.lease.epoch());
            self.call(&opened, part.owner, request, replaying).await?;
        }
        Ok(parts)
    }

    /// One try of a change over several pages (S003-33): the owners that have not agreed are asked,
    /// then what is left to do is sent, until a turn fails.
    async fn advance(
        &self,
        opened: &Opened,
        span: &mut Span,
        io: &PartIo,
        replaying: Option<u64>,
    ) -> Result<(), TryError> {
        let table = &opened.table;
        span.progress.after_losses(self.replay_buffer().losses());
        span.progress.route(table);
        self.begin_span(opened, span, replaying).await?;
        let parts = span.progress.send();
        for parts in parts.chunks(io.turn_parts(table.page_bytes())) {
            self.send_turn(opened, parts, span, io, replaying).await?;
        }
        Ok(())
    }

    async fn send_turn(
        &self,
        opened: &Opened,
        parts: &[(usize, Part)],
        span: &mut Span,
        io: &PartIo,
        replaying: Option<u64>,
    ) -> Result<(), TryError> {
        let (table, id) = (&opened.table, Some(span.id));
        let tries = parts.iter().map(async |(_, part)| {
            let mut request = forward::request(table.volume, table.epoch, part, io, id);
            request.set_lease(self.shared.lease.epoch());
            self.call(opened, part.owner, request, replaying).await
        });
        let mut ended = Ok(());
        for ((index, part), result) in parts.iter().zip(join_all(tries).await) {
            match result {
                Ok(_) => span.progress.done(*index),
                Err(_) if planted(Plant::HalfSpan) => span.progress.done(*index),
                Err(error) => {
                    if matches!(&error, TryError::Forward(error) if error.ends_span()) {
                        span.progress.lost(part.owner);
                    }
                    ended = Err(error);
                }
            }
        }
        ended
    }

    async fn begin_span(
        &self,
        opened: &Opened,
        span: &mut Span,
        replaying: Option<u64>,
    ) -> Result<(), TryError> {
        let wanted = span.progress.to_begin().into_iter();
        let links = wanted.map(async |node| Ok((node, self.link(opened, node, replaying).await?)));
        let (table, lease) = (&opened.table, self.shared.lease.epoch());
        span.begin(table, lease, join_all(links).await).await
    }

    /// Sends the unflushed changes that were lost again, in order, with nothing else in flight.
    pub(super) async fn replay(&self) -> Result<(), TryError> {
        let _order = self.shared.order.write().await;
        let (losses, changes) = {
            let replay = self.replay_buffer();
            if replay.losses() == replay.made_good() {
                return Ok(());
            }
            (replay.losses(), replay.changes())
        };
        tracing::warn!(changes = changes.len(), volume = %self.shared.name, "replaying");
        let mut changes = changes;
        if planted(Plant::ReplayBackwards) {
            changes.reverse();
        }
        if planted(Plant::SkipReplay) {
            changes.clear();
        }
        for (number, (offset, change)) in changes {
            let (len, io) = (change.len_bytes(), io_of(&change, false));
            let replaying = Some(losses);
            let parts = self
                .send_change(offset, len, &io, &mut None, replaying)
                .await?;
            self.replay_buffer().executed_again(number, offset, parts);
        }
        self.replay_buffer().replayed(losses);
        Ok(())
    }
}

/// A replay needs no `fua`: whoever wants its changes durable flushes.
fn io_of(change: &Change, fua: bool) -> PartIo {
    match change {
        Change::Write(data) => PartIo::Write {
            data: data.clone(),
            fua,
        },
        Change::Zero { keep_allocated, .. } => PartIo::Zero {
            keep_allocated: *keep_allocated,
            fua,
        },
    }
}
