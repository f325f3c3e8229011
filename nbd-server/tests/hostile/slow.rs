//! An export that takes its time, so that replies come in any order, and clients that leave.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use nbd_server::{
    Export, ExportEntry, ExportError, ExportInfo, Exports, Extent, MetaContext, OpenError, Peer,
    ReadReply, ZeroFlags,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::fuzz::referee::{Mode, judge_unordered};
use crate::fuzz::session::{Disk, SIZE, serve};
use crate::streams::{modes, opening, request};

/// Each request has a part of the export of its own, so that their order does not matter.
const SLOT_BYTES: u64 = 8192;
const SLOTS: u64 = SIZE / SLOT_BYTES;

#[derive(Clone)]
struct Slow {
    disk: Disk,
    delays_ms: Rc<[u64]>,
    turn: Rc<Cell<usize>>,
}

impl Slow {
    fn new(disk: &[u8], delays_ms: &[u64]) -> Self {
        Self {
            disk: Disk(Rc::new(RefCell::new(disk.to_vec()))),
            delays_ms: delays_ms.into(),
            turn: Rc::default(),
        }
    }

    async fn wait(&self) {
        let turn = self.turn.get();
        self.turn.set(turn + 1);
        match self.delays_ms[turn % self.delays_ms.len()] {
            0 => {}
            delay => tokio::time::sleep(Duration::from_millis(delay)).await,
        }
    }
}

impl Export for Slow {
    fn info(&self) -> ExportInfo {
        self.disk.info()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        self.wait().await;
        self.disk.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ExportError> {
        self.wait().await;
        self.disk.write(offset, data, fua).await
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.wait().await;
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), ExportError> {
        self.wait().await;
        self.disk.trim(offset, len, fua).await
    }

    async fn write_zeroes(&self, at: u64, len: u64, flags: ZeroFlags) -> Result<(), ExportError> {
        self.wait().await;
        self.disk.write_zeroes(at, len, flags).await
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        self.wait().await;
        self.disk.cache(offset, len).await
    }

    fn contexts(&self) -> Vec<MetaContext> {
        self.disk.contexts()
    }

    async fn block_status(
        &self,
        context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        self.wait().await;
        self.disk.block_status(context, offset, len).await
    }
}

impl Exports for Slow {
    type Export = Self;

    async fn list(&self, peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        self.disk.list(peer).await
    }

    async fn open(&self, name: &str, peer: &Peer) -> Result<Self, OpenError> {
        self.disk.open(name, peer).await.map(|_| self.clone())
    }
}

/// What a slot is asked: command, where in it, how much.
type Ask = (u16, u64, u64);

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let kinds = prop_oneof![Just(0u16), Just(0), Just(1), Just(1), 3u16..8];
    let one = (kinds, 0..SLOT_BYTES, 1..SLOT_BYTES);
    vec(one, 1..SLOTS as usize)
}

/// The requests, one a slot; cookies tell the slots.
fn stream(mode: Mode, asks: &[Ask]) -> Vec<u8> {
    let requests = asks.iter().enumerate().map(|(slot, (kind, start, len))| {
        let slot = slot as u64;
        let len = (*len).min(SLOT_BYTES - start);
        let data = vec![slot as u8 ^ 0x5a; len as usize];
        let body = if *kind == 1 { Err(&data[..]) } else { Ok(len) };
        request(
            mode,
            (*kind, 0),
            slot << 32 | 7,
            slot * SLOT_BYTES + start,
            body,
        )
    });
    requests.flatten().collect()
}

fn pattern() -> Vec<u8> {
    (0..SIZE)
        .map(|at| (at / SLOT_BYTES + at % 251) as u8)
        .collect()
}

fn delays() -> impl Strategy<Value = Vec<u64>> {
    vec(prop_oneof![1 => Just(0u64), 2 => 0u64..9], 1..20)
}

/// Bytes of the answers to the handshake, which is the same for every client of a mode.
fn greeting_bytes(mode: Mode) -> usize {
    let slow = Slow::new(&pattern(), &[0]);
    serve(slow, &opening(mode), &[], usize::MAX).0.len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_request_is_answered_once_in_any_order(
        mode in modes(), asks in asks(), delays in delays(), pieces in vec(1usize..30_000, 0..5),
    ) {
        let goodbye = request(mode, (2, 0), 0, 0, Ok(0));
        let (opening, requests) = (opening(mode), stream(mode, &asks));
        let slow = Slow::new(&pattern(), &delays);
        let sent = [&opening[..], &requests, &goodbye].concat();
        let (said, ended) = serve(slow.clone(), &sent, &pieces, usize::MAX);
        ended.unwrap();
        let mut model = pattern();
        judge_unordered(mode, &requests, &said[greeting_bytes(mode)..], &mut model, true);
        prop_assert!(*slow.disk.0.borrow() == model, "the disk is not what was written");
    }

    #[test]
    fn clients_that_leave_get_at_most_one_reply_each(
        mode in modes(), asks in asks(), delays in delays(), pieces in vec(1usize..30_000, 0..5),
        sent_end in any::<Index>(), said_end in any::<Index>(), breaks: bool,
    ) {
        let (opening, requests) = (opening(mode), stream(mode, &asks));
        let requests = &requests[..sent_end.index(requests.len())];
        let greeting_bytes = greeting_bytes(mode);
        let breaks_at = match breaks {
            true => greeting_bytes + said_end.index(100_000),
            false => usize::MAX,
        };
        let slow = Slow::new(&pattern(), &delays);
        let sent = [&opening[..], requests].concat();
        let (said, _) = serve(slow, &sent, &pieces, breaks_at);
        let mut model = pattern();
        judge_unordered(mode, requests, &said[greeting_bytes..], &mut model, false);
    }
}
