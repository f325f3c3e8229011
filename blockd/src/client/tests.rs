//! The replay over mock owners that lose power, refuse and fall silent on command.
//!
//! The only oracle is promise 3: what was acknowledged before a flush that succeeded is durable,
//! and what is durable of a byte is its newest acknowledged write.

use super::*;
use crate::admin::{RouteInfo, VersionInfo, VolumeInfo};
use crate::control::registry::LeaseState;
use crate::id::{Epoch, LeaseEpoch, PageNo, RouteRun};
use crate::io::framed::{FrameStream, serve};
use crate::io::link::{Hello, Welcome};
use crate::io::wire::{VERSION, flags};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard};
use std::task::Poll;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const PAGE_BYTES: u64 = 4096;

/// What an owner does with the next change that reaches it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    Execute,
    /// Executes it, then loses power before the answer: nothing that was not flushed stays.
    ExecuteAndLose,
    Refuse(Status),
    /// Never answers.
    Hang,
}

/// Content of the pages by page and offset; a value is the first byte of a write.
type Pages = BTreeMap<(PageNo, u32), u8>;

#[derive(Default)]
struct State {
    verifier: u64,
    epoch: u32,
    script: VecDeque<Act>,
    pages: Pages,
    durable: Pages,
    /// Tags of the changes in the order of their execution, and `F` for a flush.
    executed: Vec<u8>,
    hung: u32,
    /// Leases that were renewed here; `None`: a renewal is never answered.
    renewals: Option<u32>,
    /// Spans that were begun and not ended.
    spans: BTreeSet<u64>,
}

/// One owner; two of them own the pages in turn.
#[derive(Clone)]
struct Owner {
    node: NodeNo,
    address: String,
    state: Arc<Mutex<State>>,
    /// Changes when all connections end.
    power: watch::Sender<u64>,
}

impl Owner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Loses what was not flushed, and all connections.
    fn lose_power(&self) {
        let mut state = self.state();
        state.verifier += 1;
        state.pages = state.durable.clone();
        state.spans.clear();
        self.power.send_replace(state.verifier);
    }

    fn script(&self, acts: &[Act]) {
        self.state().script.extend(acts);
    }

    fn take_executed(&self) -> String {
        let executed = std::mem::take(&mut self.state().executed);
        String::from_utf8(executed).unwrap()
    }

    fn durable(&self, page: u32) -> Option<char> {
        let state = self.state();
        state
            .durable
            .get(&(PageNo(page), 0))
            .copied()
            .map(char::from)
    }

    fn change(&self, request: &Frame) -> (Act, Frame) {
        let mut state = self.state();
        if request.epoch != Epoch(state.epoch) {
            let mut stale = request.refuse(Status::Stale, "another epoch");
            stale.epoch = Epoch(state.epoch);
            return (Act::Execute, stale);
        }
        if request.flags & flags::SPAN != 0 && !state.spans.contains(&request.aux) {
            return (Act::Execute, request.refuse(Status::Held, "never begun"));
        }
        let act = state.script.pop_front().unwrap_or(Act::Execute);
        match act {
            Act::Refuse(status) => return (act, request.refuse(status, "as scripted")),
            Act::Hang => state.hung += 1,
            Act::Execute | Act::ExecuteAndLose => {
                let data = request.payload.clone().into_bytes();
                let tag = data.first().copied().unwrap_or(b'0');
                let key = (request.page, request.offset_bytes);
                state.pages.insert(key, tag);
                state.executed.push(tag);
            }
        }
        (act, request.answer(Status::Ok, Bytes::new().into()))
    }

    async fn answer(self, owners: Arc<Vec<Owner>>, request: Frame) -> Frame {
        let mut reply = match request.kind {
            Kind::Admin => {
                if self.is_silent(&request) {
                    std::future::pending().await
                }
                request.answer(Status::Ok, encode_control(&self.admin(&owners, &request)))
            }
            Kind::Write | Kind::Zero => {
                let (act, reply) = self.change(&request);
                match act {
                    Act::Hang => std::future::pending().await,
                    Act::ExecuteAndLose => self.lose_power(),
                    Act::Execute | Act::Refuse(_) => {}
                }
                reply
            }
            Kind::Flush => {
                let mut state = self.state();
                state.durable = state.pages.clone();
                state.executed.push(b'F');
                request.answer(Status::Ok, Bytes::new().into())
            }
            Kind::SpanBegin if !self.state().spans.insert(request.aux) => {
                request.refuse(Status::Malformed, "begun already")
            }
            Kind::SpanEnd => {
                self.state().spans.remove(&request.aux);
                request.answer(Status::Ok, Bytes::new().into())
            }
            _ => request.answer(Status::Ok, Bytes::new().into()),
        };
        reply.aux = self.state().verifier;
        reply
    }

    fn is_silent(&self, request: &Frame) -> bool {
        let asked = decode_control(request.payload.clone()).unwrap();
        let mut state = self.state();
        match (&asked, &mut state.renewals) {
            (AdminRequest::LeaseRenew { .. }, Some(count)) => *count += 1,
            (AdminRequest::LeaseRenew { .. }, None) => return true,
            _ => {}
        }
        false
    }

    fn admin(&self, owners: &[Owner], request: &Frame) -> AdminReply {
        match decode_control(request.payload.clone()).unwrap() {
            AdminRequest::Open { .. } => AdminReply::Open(open_info(owners)),
            AdminRequest::LeaseAcquire { volume, holder } => AdminReply::Lease(LeaseInfo {
                volume: "v".to_owned(),
                volume_id: volume,
                epoch: LeaseEpoch(1),
                state: LeaseState::Held(holder),
            }),
            AdminRequest::LeaseRenew { .. } => AdminReply::Done,
            _ => AdminReply::Version(VersionInfo {
                server: "mock".to_owned(),
                protocol: VERSION,
                node: self.node,
            }),
        }
    }

    async fn connection(self, owners: Arc<Vec<Owner>>, stream: TcpStream) {
        let mut power = self.power.subscribe();
        power.mark_unchanged();
        let mut frames = FrameStream::new(stream);
        let hello = frames.next().await.unwrap().unwrap();
        let _said: Hello = decode_control(hello.payload.clone()).unwrap();
        let welcome = Welcome {
            version: VERSION,
            cluster_id: None,
            node: self.node,
            verifier: self.state().verifier,
        };
        let welcome = hello.answer(Status::Ok, encode_control(&welcome));
        frames.send(welcome).await.unwrap();
        let served = serve(frames, |request| {
            self.clone().answer(Arc::clone(&owners), request)
        });
        tokio::select! {
            biased;
            _ = power.changed() => {}
            _ = served => {}
        }
    }
}

/// Four pages of 4 KiB: 0 and 2 of the first owner, 1 and 3 of the second.
fn open_info(owners: &[Owner]) -> OpenInfo {
    let epoch = Epoch(owners[0].state().epoch);
    let run = |page: u32| RouteRun {
        first_page: page,
        page_count: 1,
        owner: owners[page as usize % 2].node,
    };
    let volume = VolumeInfo {
        id: VolumeId(1),
        name: "v".to_owned(),
        size_bytes: 4 * PAGE_BYTES,
        page_blocks: 8,
        epoch,
        format: None,
        created_unix_s: 0,
        owners: owners.iter().map(|owner| owner.node).collect(),
        allocated_bytes: None,
        snapshot_count: 0,
    };
    OpenInfo {
        snapshot: None,
        size_bytes: volume.size_bytes,
        route: RouteInfo {
            volume: volume.name.clone(),
            epoch,
            page_blocks: volume.page_blocks,
            page_count: 4,
            runs: (0..4).map(run).collect(),
            table_crc: 0,
        },
        nodes: owners
            .iter()
            .map(|owner| (owner.node, owner.address.clone()))
            .collect(),
        volume,
    }
}

/// Two owners and the volume over them.
async fn bench() -> (Owner, Owner, Volume) {
    let mut listeners = vec![];
    let mut owners = vec![];
    for number in 1..=2 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        owners.push(Owner {
            node: NodeNo(number),
            address: listener.local_addr().unwrap().to_string(),
            state: Arc::new(Mutex::new(State {
                verifier: 1,
                epoch: 1,
                ..State::default()
            })),
            power: watch::Sender::new(0),
        });
        listeners.push(listener);
    }
    let owners = Arc::new(owners);
    for (listener, owner) in listeners.into_iter().zip(owners.iter().cloned()) {
        let owners = Arc::clone(&owners);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(owner.clone().connection(Arc::clone(&owners), stream));
            }
        });
    }
    let servers = [owners[0].address.clone()];
    let options = ClientOptions {
        io_deadline: Duration::from_secs(10),
        ..ClientOptions::default()
    };
    let client = Client::connect(&servers, options).await.unwrap();
    let volume = client.open("v").await.unwrap();
    (owners[0].clone(), owners[1].clone(), volume)
}

async fn write(volume: &Volume, page: u64, tag: char) {
    let data = Bytes::from(vec![tag as u8; 512]);
    volume.write(page * PAGE_BYTES, data).await.unwrap();
}

/// Promise 3: acknowledged, unflushed writes are sent again in the order of their issue, before
/// anything newer, and only then does the flush succeed.
#[tokio::test]
async fn lost_writes_are_sent_again_in_order_before_anything_else() {
    let (first, _second, volume) = bench().await;
    write(&volume, 0, 'a').await;
    write(&volume, 2, 'b').await;
    write(&volume, 0, 'c').await;
    volume.flush().await.unwrap();
    write(&volume, 0, 'd').await;
    write(&volume, 0, 'e').await;
    write(&volume, 2, 'f').await;
    assert_eq!(first.take_executed(), "abcFdef");
    first.lose_power();
    write(&volume, 0, 'g').await;
    assert_eq!(first.take_executed(), "defg");
    first.lose_power();
    volume.flush().await.unwrap();
    let executed = first.take_executed();
    assert!(executed.ends_with("defgF"), "{executed}");
    assert_eq!((first.durable(0), first.durable(2)), (Some('g'), Some('f')));
    first.lose_power();
    write(&volume, 0, 'h').await;
    let executed = first.take_executed();
    assert_eq!(executed.trim_matches('h'), "", "flushed changes are kept");
}

/// An owner loses power while it executes one part of a change over two owners, or cannot execute
/// it now, or has a newer table: the change is whole on both when it is acknowledged, the owners
/// are asked again only if they may have forgotten the span, and it is ended on both.
#[tokio::test]
async fn a_part_that_failed_in_flight_is_sent_again() {
    let (first, second, volume) = bench().await;
    let unavailable = Act::Refuse(Status::Unavailable);
    for (act, tag) in [
        (Act::ExecuteAndLose, 'x'),
        (unavailable, 'y'),
        (Act::Execute, 'z'),
    ] {
        write(&volume, 3, 'o').await;
        second.script(&[act]);
        if act == Act::Execute {
            first.state().epoch = 2;
            second.state().epoch = 2;
        }
        let data = Bytes::from(vec![tag as u8; 2 * PAGE_BYTES as usize]);
        volume.write(0, data).await.unwrap();
        volume.flush().await.unwrap();
        assert_eq!(
            (first.durable(0), second.durable(1)),
            (Some(tag), Some(tag))
        );
        assert_eq!(second.durable(3), Some('o'), "lost with the part");
        for owner in [&first, &second] {
            assert!(owner.state().spans.is_empty(), "{act:?}: a span goes on");
        }
    }
}

/// A user gives its operation up in the middle of the replay that it has begun: the next operation
/// replays everything, and nothing newer goes before it.
#[tokio::test]
async fn a_replay_that_was_cancelled_is_begun_again() {
    let (first, _second, volume) = bench().await;
    for (page, tag) in [(0, 'a'), (2, 'b'), (0, 'c')] {
        write(&volume, page, tag).await;
    }
    first.lose_power();
    first.take_executed();
    first.script(&[Act::Execute, Act::Hang]);
    let given_up = volume.read(0, 512);
    tokio::select! {
        biased;
        found = given_up => panic!("read {found:?} in the middle of a replay"),
        () = async { while first.state().hung == 0 { tokio::task::yield_now().await; } } => {}
    }
    assert_eq!(first.take_executed(), "a");
    write(&volume, 2, 'd').await;
    let executed = first.take_executed();
    assert!(
        executed.starts_with("abc") && executed.ends_with('d'),
        "{executed}"
    );
    volume.flush().await.unwrap();
    assert_eq!((first.durable(0), first.durable(2)), (Some('c'), Some('d')));
}

/// The volume was resized while an owner lost power: the replay is refused as stale, the table is
/// read anew, and the replay goes on to its end.
#[tokio::test]
async fn a_replay_under_an_old_table_refreshes_and_goes_on() {
    let (first, second, volume) = bench().await;
    write(&volume, 0, 'a').await;
    write(&volume, 1, 'b').await;
    first.lose_power();
    for owner in [&first, &second] {
        owner.state().epoch = 2;
    }
    volume.flush().await.unwrap();
    assert_eq!(
        (first.durable(0), second.durable(1)),
        (Some('a'), Some('b'))
    );
    assert_eq!(volume.info().route.epoch, Epoch(2));
}

/// An owner that loses power again during the replay, and another one with it: all is sent again
/// until one replay finds no further loss.
#[tokio::test]
async fn losses_during_a_replay_are_made_good_too() {
    let (first, second, volume) = bench().await;
    for (page, tag) in [(0, 'a'), (1, 'b'), (2, 'c'), (3, 'd'), (1, 'e')] {
        write(&volume, page, tag).await;
    }
    first.lose_power();
    first.script(&[Act::Execute, Act::ExecuteAndLose]);
    second.script(&[
        Act::Execute,
        Act::ExecuteAndLose,
        Act::Refuse(Status::Unavailable),
    ]);
    volume.flush().await.unwrap();
    let durable = [
        first.durable(0),
        second.durable(1),
        first.durable(2),
        second.durable(3),
    ];
    assert_eq!(durable, [Some('a'), Some('e'), Some('c'), Some('d')]);
}

/// Polls a future once.
async fn once<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(Pin::new(&mut *future).poll(cx))).await
}

/// A user gives a write over two owners up, at every moment: no owner keeps the span.
#[tokio::test]
async fn a_span_that_is_given_up_at_any_moment_ends_everywhere() {
    let (first, second, volume) = bench().await;
    let mut most_open = 0;
    for polls in 0.. {
        let data = Bytes::from(vec![b'x'; 1024]);
        let mut writing = Box::pin(volume.write(PAGE_BYTES - 512, data));
        let mut written = false;
        for _ in 0..polls {
            written = once(&mut writing).await.is_ready();
            if written {
                break;
            }
            tokio::task::yield_now().await;
        }
        let open = [&first, &second].map(|owner| owner.state().spans.len());
        most_open = most_open.max(open.iter().sum());
        drop(writing);
        // Behind whatever was sent over the same connections.
        write(&volume, 0, 'a').await;
        write(&volume, 1, 'b').await;
        for owner in [&first, &second] {
            assert!(
                owner.state().spans.is_empty(),
                "given up after {polls} polls"
            );
        }
        if written {
            break;
        }
    }
    assert_eq!(most_open, 2, "never given up while both owners had it");
}

/// A server that falls silent does not cost the lease, however patient the client is else.
#[tokio::test]
async fn a_lease_is_renewed_at_the_next_server_when_one_is_silent() {
    let (silent, second, _) = bench().await;
    second.state().renewals = Some(0);
    let servers = [silent.address.clone(), second.address.clone()];
    let options = ClientOptions {
        admin_deadline: Duration::from_secs(3600),
        ..ClientOptions::default()
    };
    let client = Client::connect(&servers, options).await.unwrap();
    let volume = client.open("v").await.unwrap();
    let holder = HolderText::this_process("test");
    let ttl = Duration::from_secs(2);
    let lease = volume.acquire_exclusive(holder, ttl).await.unwrap();
    let renewed = async {
        while second.state().renewals < Some(2) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(30), renewed).await.unwrap();
    assert_eq!(lease.why_lost(), None);
}
