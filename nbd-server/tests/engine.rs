//! The connection engine over an in-process pipe and paused time: order, limits, drain and stalled clients.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use nbd_server::{
    Budget, ConnectionError, Export, ExportEntry, ExportError, ExportInfo, Exports, Extent,
    MetaContext, OpenError, Peer, ReadReply, ServeOptions, Shutdown, ShutdownSender, ZeroFlags,
    limits, serve_connection, serve_transmission,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::watch;
use tokio::task::{JoinHandle, LocalSet};

type Ended = JoinHandle<Result<(), ConnectionError>>;

/// What an export saw.
#[derive(Default)]
struct Seen {
    started: u32,
    running_max: u32,
    running: u32,
    written_bytes: u64,
    flushes: u32,
}

/// Writes wait for the gate; everything else is ready at once.
#[derive(Clone)]
struct Gated {
    seen: Rc<RefCell<Seen>>,
    gate: watch::Receiver<bool>,
}

impl Export for Gated {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(1 << 30)
    }

    async fn read(&self, _offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        Ok(Bytes::from(vec![7; len as usize]).into())
    }

    async fn write(&self, _offset: u64, data: Bytes, _fua: bool) -> Result<(), ExportError> {
        let mut gate = self.gate.clone();
        {
            let mut seen = self.seen.borrow_mut();
            seen.started += 1;
            seen.running += 1;
            seen.running_max = seen.running_max.max(seen.running);
        }
        gate.wait_for(|open| *open)
            .await
            .map_err(|_| ExportError::io("the gate is gone"))?;
        let mut seen = self.seen.borrow_mut();
        seen.running -= 1;
        seen.written_bytes += data.len() as u64;
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.seen.borrow_mut().flushes += 1;
        Ok(())
    }

    async fn trim(&self, _offset: u64, _len: u64, _fua: bool) -> Result<(), ExportError> {
        Ok(())
    }

    async fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> Result<(), ExportError> {
        Ok(())
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    async fn block_status(
        &self,
        _context: &MetaContext,
        _offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        Ok(vec![Extent::allocation(len, false, false)])
    }
}

impl Exports for Gated {
    type Export = Self;

    async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        Err(OpenError::Policy("the list is private".into()))
    }

    async fn open(&self, name: &str, _peer: &Peer) -> Result<Self, OpenError> {
        match name {
            "draining" => Err(OpenError::Shutdown("this server is going down".into())),
            _ => Ok(self.clone()),
        }
    }
}

struct Bench {
    seen: Rc<RefCell<Seen>>,
    gate: watch::Sender<bool>,
    exports: Gated,
}

impl Bench {
    fn new() -> Self {
        let seen = Rc::<RefCell<Seen>>::default();
        let (gate, receiver) = watch::channel(false);
        Self {
            seen: Rc::clone(&seen),
            gate,
            exports: Gated {
                seen,
                gate: receiver,
            },
        }
    }

    fn connect(&self, options: &ServeOptions) -> (DuplexStream, Ended) {
        let (client, server) = tokio::io::duplex(16 << 10);
        (
            client,
            tokio::task::spawn_local(serve_connection(
                server,
                Peer::default(),
                self.exports.clone(),
                options.clone(),
            )),
        )
    }

    async fn open(&self, options: &ServeOptions) -> (DuplexStream, Ended) {
        let (mut client, ended) = self.connect(options);
        client
            .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0")
            .await
            .unwrap();
        client.read_exact(&mut [0; 28]).await.unwrap();
        (client, ended)
    }
}

fn request(kind: u16, cookie: u64, len_bytes: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&len_bytes.to_be_bytes());
    bytes
}

fn write(cookie: u64, len_bytes: u32) -> Vec<u8> {
    [request(1, cookie, len_bytes), vec![1; len_bytes as usize]].concat()
}

/// Cookie of the next simple reply, which must be a success.
async fn reply(client: &mut DuplexStream) -> u64 {
    let mut head = [0; 16];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..8], *b"\x67\x44\x66\x98\0\0\0\0");
    u64::from_be_bytes(head[8..].try_into().unwrap())
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

#[test]
fn replies_leave_in_the_order_of_completion() {
    run(async {
        let bench = Bench::new();
        let (mut client, ended) = bench.open(&ServeOptions::default()).await;
        client
            .write_all(
                &[
                    write(1, 4096),
                    request(3, 2, 0),
                    write(3, 512),
                    request(3, 4, 0),
                ]
                .concat(),
            )
            .await
            .unwrap();
        assert_eq!((reply(&mut client).await, reply(&mut client).await), (2, 4));
        bench.gate.send_replace(true);
        let mut late = [reply(&mut client).await, reply(&mut client).await];
        late.sort_unstable();
        assert_eq!(late, [1, 3]);
        client.write_all(&request(2, 0, 0)).await.unwrap();
        ended.await.unwrap().unwrap();
    });
}

#[test]
fn no_more_requests_are_started_than_the_limit_allows() {
    run(async {
        let bench = Bench::new();
        let (client, _ended) = bench.open(&ServeOptions::default()).await;
        let (mut receive, mut send) = tokio::io::split(client);
        let total = u64::from(limits::IN_FLIGHT_MAX) * 3;
        let sender = tokio::task::spawn_local(async move {
            for cookie in 0..total {
                send.write_all(&write(cookie, 512)).await.unwrap();
            }
            send
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(bench.seen.borrow().started, limits::IN_FLIGHT_MAX);
        bench.gate.send_replace(true);
        for _ in 0..total {
            receive.read_exact(&mut [0; 16]).await.unwrap();
        }
        sender.await.unwrap();
        assert_eq!(bench.seen.borrow().running_max, limits::IN_FLIGHT_MAX);
        assert_eq!(bench.seen.borrow().written_bytes, total * 512);
    });
}

#[test]
fn payload_bytes_in_flight_stay_within_the_budget() {
    run(async {
        let bench = Bench::new();
        let options = ServeOptions {
            budget: Budget::new(0),
            ..ServeOptions::default()
        };
        let whole_bytes = options.budget.free_bytes();
        let (mut first, _first_ended) = bench.open(&options).await;
        let (mut second, _second_ended) = bench.open(&options).await;
        let half = limits::PAYLOAD_BYTES / 2;
        for cookie in 0..2 {
            first.write_all(&write(cookie, half)).await.unwrap();
        }
        let sender = tokio::task::spawn_local(async move {
            second.write_all(&write(9, half)).await.unwrap();
            assert_eq!(reply(&mut second).await, 9);
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(
            (bench.seen.borrow().started, options.budget.free_bytes()),
            (2, 0)
        );
        bench.gate.send_replace(true);
        sender.await.unwrap();
        assert_eq!(reply(&mut first).await + reply(&mut first).await, 1);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(options.budget.free_bytes(), whole_bytes);
    });
}

#[test]
fn a_client_that_stalls_is_dropped_only_when_others_wait() {
    run(async {
        let bench = Bench::new();
        bench.gate.send_replace(true);
        let options = ServeOptions {
            budget: Budget::new(0),
            ..ServeOptions::default()
        };
        let (mut greedy, greedy_ended) = bench.open(&options).await;
        greedy
            .write_all(&request(1, 1, limits::PAYLOAD_BYTES))
            .await
            .unwrap();
        greedy.write_all(&[1; 1000]).await.unwrap();
        tokio::time::sleep(limits::STALL_DEADLINE * 10).await;
        assert!(!greedy_ended.is_finished(), "nobody waits for its bytes");
        let (mut honest, _honest_ended) = bench.open(&options).await;
        honest.write_all(&write(2, 4096)).await.unwrap();
        assert_eq!(reply(&mut honest).await, 2);
        assert!(
            !greedy_ended.is_finished(),
            "a small write waits for nobody"
        );
        honest.write_all(&write(3, 1 << 20)).await.unwrap();
        assert_eq!(reply(&mut honest).await, 3);
        assert!(matches!(
            greedy_ended.await.unwrap(),
            Err(ConnectionError::Stalled(_))
        ));
        assert_eq!(
            bench.seen.borrow().written_bytes,
            4096 + (1 << 20),
            "the partial payload must not be applied"
        );
    });
}

#[test]
fn a_client_that_does_not_read_its_replies_is_bounded_and_dropped_when_others_wait() {
    run(async {
        let bench = Bench::new();
        let options = ServeOptions {
            budget: Budget::new(0),
            ..ServeOptions::default()
        };
        let (mut greedy, greedy_ended) = bench.open(&options).await;
        for cookie in 0..100 {
            greedy
                .write_all(&request(0, cookie, limits::PAYLOAD_BYTES / 4))
                .await
                .unwrap();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(options.budget.free_bytes(), 0);
        let (mut honest, _honest_ended) = bench.open(&options).await;
        honest.write_all(&request(0, 2, 1 << 20)).await.unwrap();
        assert_eq!(reply(&mut honest).await, 2);
        assert!(matches!(
            greedy_ended.await.unwrap(),
            Err(ConnectionError::Stalled(_))
        ));
    });
}

#[test]
fn a_client_that_drips_is_dropped_when_others_wait_and_one_that_is_merely_slow_is_not() {
    run(async {
        for (step_bytes, survives) in [(1, false), (limits::PAYLOAD_BYTES / 400, true)] {
            let bench = Bench::new();
            bench.gate.send_replace(true);
            let options = ServeOptions {
                budget: Budget::new(0),
                ..ServeOptions::default()
            };
            let (mut slow, slow_ended) = bench.open(&options).await;
            let sender = tokio::task::spawn_local(async move {
                slow.write_all(&request(1, 1, limits::PAYLOAD_BYTES))
                    .await?;
                let mut left_bytes = limits::PAYLOAD_BYTES;
                while left_bytes > 0 {
                    let bytes = left_bytes.min(step_bytes);
                    slow.write_all(&vec![1; bytes as usize]).await?;
                    left_bytes -= bytes;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                slow.read_exact(&mut [0; 16]).await
            });
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (mut honest, _honest_ended) = bench.open(&options).await;
            honest.write_all(&write(2, 1 << 20)).await.unwrap();
            assert_eq!(reply(&mut honest).await, 2);
            assert_eq!(sender.await.unwrap().is_ok(), survives);
            if !survives {
                let ended = slow_ended.await.unwrap();
                assert!(matches!(ended, Err(ConnectionError::Stalled(_))));
            }
        }
    });
}

/// Writes that fill the limit of a connection, and more that wait to be started.
fn many_writes() -> Vec<u8> {
    let count = u64::from(limits::IN_FLIGHT_MAX) + 12;
    (1..=count).flat_map(|cookie| write(cookie, 512)).collect()
}

#[test]
fn waiting_writes_are_dropped_when_the_client_is_gone() {
    run(async {
        let cut_off = [write(1, 4096), write(2, 100_000), request(1, 3, 4096)].concat();
        for sent in [write(1, 4096), cut_off, many_writes()] {
            let bench = Bench::new();
            let (mut client, ended) = bench.open(&ServeOptions::default()).await;
            client.write_all(&sent).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(bench.seen.borrow().running > 0);
            drop(client);
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(ended.is_finished(), "its client is gone");
            bench.gate.send_replace(true);
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(bench.seen.borrow().written_bytes, 0);
        }
    });
}

#[test]
fn writes_before_a_goodbye_run_to_their_end() {
    run(async {
        for (sent, total_bytes) in [(write(1, 4096), 4096), (many_writes(), 140 * 512)] {
            let bench = Bench::new();
            let (mut client, ended) = bench.open(&ServeOptions::default()).await;
            let goodbye = request(2, 0, 0);
            client.write_all(&[sent, goodbye].concat()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            client.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(!ended.is_finished());
            bench.gate.send_replace(true);
            ended.await.unwrap().unwrap();
            assert_eq!(bench.seen.borrow().written_bytes, total_bytes);
        }
    });
}

fn with_shutdown() -> (ShutdownSender, ServeOptions) {
    let (sender, shutdown) = Shutdown::new();
    let options = ServeOptions {
        shutdown,
        ..ServeOptions::default()
    };
    (sender, options)
}

#[test]
fn a_drain_answers_everything_that_was_read_and_nothing_after() {
    run(async {
        let bench = Bench::new();
        let (sender, options) = with_shutdown();
        let (client, ended) = bench.open(&options).await;
        let (mut receive, mut send) = tokio::io::split(client);
        send.write_all(&many_writes()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(bench.seen.borrow().started, limits::IN_FLIGHT_MAX);
        sender.give();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let late = write(999, 512);
        send.write_all(&[late, vec![7; 10_000]].concat())
            .await
            .unwrap();
        assert!(!ended.is_finished());
        bench.gate.send_replace(true);
        let mut replies = Vec::new();
        receive.read_to_end(&mut replies).await.unwrap();
        let answered = replies.chunks_exact(16);
        assert!(answered.clone().all(|reply| reply[4..8] == [0; 4]));
        assert_eq!(
            answered.count(),
            140,
            "all that was read, not what came after"
        );
        assert_eq!(bench.seen.borrow().written_bytes, 140 * 512);
        assert!(!ended.is_finished(), "the client has not closed yet");
        drop((receive, send));
        ended.await.unwrap().unwrap();
    });
}

#[test]
fn a_drained_connection_does_not_wait_for_its_client_for_ever() {
    run(async {
        let bench = Bench::new();
        let (sender, options) = with_shutdown();
        let (mut client, ended) = bench.open(&options).await;
        sender.give();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        tokio::time::sleep(limits::DRAIN_GRACE * 2).await;
        assert!(ended.is_finished());
        drop(client);
    });
}

/// Closes as OpenSSL does: at once, but asked again it waits for the peer. One that was `asked` before does not close.
struct ShutOnce {
    stream: DuplexStream,
    asked: bool,
}

impl AsyncRead for ShutOnce {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for ShutOnce {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match std::mem::replace(&mut self.asked, true) {
            true => Poll::Pending,
            false => Pin::new(&mut self.stream).poll_shutdown(cx),
        }
    }
}

#[test]
fn a_stream_that_does_not_close_at_once_ends_after_the_grace() {
    run(async {
        for (asked, drains) in [(false, true), (true, true), (true, false)] {
            let bench = Bench::new();
            let (sender, options) = with_shutdown();
            let (mut client, stream) = tokio::io::duplex(16 << 10);
            let stream = ShutOnce { stream, asked };
            let served = serve_transmission(stream, bench.exports.clone(), options);
            let ended = tokio::task::spawn_local(served);
            tokio::time::sleep(Duration::from_secs(1)).await;
            match drains {
                true => sender.give(),
                false => client.write_all(&request(2, 0, 0)).await.unwrap(),
            }
            tokio::time::sleep(limits::DRAIN_GRACE / 2).await;
            client.write_all(&request(3, 1, 0)).await.unwrap();
            assert!(!ended.is_finished());
            tokio::time::sleep(limits::DRAIN_GRACE).await;
            assert!(ended.is_finished());
            ended.await.unwrap().unwrap();
        }
    });
}

#[test]
fn a_client_that_is_gone_during_the_drain_has_its_waiting_writes_dropped() {
    run(async {
        for (sent, written) in [
            (write(1, 512), 0),
            ([write(1, 512), request(2, 2, 0)].concat(), 512),
        ] {
            let bench = Bench::new();
            let (sender, options) = with_shutdown();
            let (mut client, ended) = bench.open(&options).await;
            client.write_all(&sent).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            sender.give();
            tokio::time::sleep(Duration::from_secs(1)).await;
            drop(client);
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(ended.is_finished(), written == 0);
            bench.gate.send_replace(true);
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(ended.is_finished());
            assert_eq!(
                bench.seen.borrow().written_bytes,
                written,
                "after DISC writes are kept"
            );
        }
    });
}

#[test]
fn a_handshake_during_the_drain_is_told_so() {
    run(async {
        let bench = Bench::new();
        let (sender, options) = with_shutdown();
        let (mut client, ended) = bench.connect(&options);
        let (mut by_name, by_name_ended) = bench.connect(&options);
        let (mut silent, silent_ended) = bench.connect(&options);
        tokio::time::sleep(Duration::from_secs(1)).await;
        sender.give();
        client
            .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0")
            .await
            .unwrap();
        let mut reply = [0; 38];
        client.read_exact(&mut reply).await.unwrap();
        assert_eq!(reply[30..34], 0x8000_0007u32.to_be_bytes());
        client
            .write_all(b"IHAVEOPT\0\0\0\x02\0\0\0\0")
            .await
            .unwrap();
        ended.await.unwrap().unwrap();
        by_name
            .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0")
            .await
            .unwrap();
        let refused = by_name_ended.await.unwrap();
        assert!(
            matches!(refused, Err(ConnectionError::ExportName(text)) if text.contains("going down"))
        );
        let sent = silent.read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!(sent, 18, "one that says nothing is closed");
        silent_ended.await.unwrap().unwrap();
    });
}

#[test]
fn a_handshake_has_a_deadline() {
    run(async {
        let bench = Bench::new();
        let (_client, ended) = bench.connect(&ServeOptions::default());
        assert!(
            matches!(ended.await.unwrap(), Err(ConnectionError::HandshakeDeadline(deadline)) if deadline == limits::HANDSHAKE_DEADLINE)
        );
    });
}

#[test]
fn refusals_to_list_and_open_carry_their_reason() {
    run(async {
        let bench = Bench::new();
        let (mut client, _ended) = bench.connect(&ServeOptions::default());
        client
            .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0")
            .await
            .unwrap();
        client
            .write_all(b"IHAVEOPT\0\0\0\x07\0\0\0\x0e\0\0\0\x08draining\0\0")
            .await
            .unwrap();
        client.read_exact(&mut [0; 18]).await.unwrap();
        for (kind, text) in [
            (0x8000_0002u32, "the list is private"),
            (0x8000_0007, "this server is going down"),
        ] {
            let mut head = [0; 20];
            client.read_exact(&mut head).await.unwrap();
            assert_eq!(head[12..16], kind.to_be_bytes());
            let mut message = vec![0; text.len()];
            client.read_exact(&mut message).await.unwrap();
            assert_eq!(message, text.as_bytes());
        }
    });
}

/// The future is `Send` where the implementor's are: this only has to compile.
#[test]
fn an_export_with_send_futures_can_be_served_by_a_multi_thread_runtime() {
    #[derive(Clone)]
    struct Zeroes;
    impl Export for Zeroes {
        fn info(&self) -> ExportInfo {
            ExportInfo::new(1 << 20)
        }
        async fn read(&self, _offset: u64, len: u32) -> Result<ReadReply, ExportError> {
            Ok(ReadReply::One(nbd_server::ReadPart::Hole(len)))
        }
        async fn write(&self, _offset: u64, _data: Bytes, _fua: bool) -> Result<(), ExportError> {
            Ok(())
        }
        async fn flush(&self) -> Result<(), ExportError> {
            Ok(())
        }
        async fn trim(&self, _offset: u64, _len: u64, _fua: bool) -> Result<(), ExportError> {
            Ok(())
        }
        async fn write_zeroes(
            &self,
            _offset: u64,
            _len: u64,
            _flags: ZeroFlags,
        ) -> Result<(), ExportError> {
            Ok(())
        }
        async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
            Ok(())
        }
        async fn block_status(
            &self,
            _context: &MetaContext,
            _offset: u64,
            len: u64,
        ) -> Result<Vec<Extent>, ExportError> {
            Ok(vec![Extent::allocation(len, true, true)])
        }
    }
    impl Exports for Zeroes {
        type Export = Self;
        async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
            Ok(Vec::new())
        }
        async fn open(&self, _name: &str, _peer: &Peer) -> Result<Self, OpenError> {
            Ok(self.clone())
        }
    }
    fn spawnable<F: Future + Send + 'static>(future: F) -> F {
        future
    }
    run(async {
        let (mut client, server) = tokio::io::duplex(1 << 10);
        let served = tokio::task::spawn_local(spawnable(serve_connection(
            server,
            Peer::default(),
            Zeroes,
            ServeOptions::default(),
        )));
        client
            .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0")
            .await
            .unwrap();
        served.await.unwrap().unwrap();
    });
}
