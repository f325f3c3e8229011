//! Metadata contexts and extended headers: an export with three contexts and 1 TiB, under raw bytes and under real clients.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use bytes::Bytes;
use nbd_server::{
    Export, ExportEntry, ExportError, ExportInfo, Exports, Extent, Listener, MetaContext, NbdErrno,
    OpenError, Peer, ReadPart, ReadReply, ServeOptions, Server, Shutdown, ZeroFlags, limits,
    serve_connection,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::LocalSet;

const SIZE: u64 = 1 << 40;
const ACK: u32 = 1;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;
const EXT_HEADER_REQD: u32 = 0x8000_000a;
const LIST: u32 = 9;
const SET: u32 = 10;

/// 64 KiB of data, then a hole; the second 4 KiB are inherited; the second 32 KiB differ from `snap`.
#[derive(Clone)]
struct Layered;

impl Layered {
    fn runs(context: &MetaContext) -> Vec<(u64, u32)> {
        match context {
            MetaContext::Allocation => vec![(64 << 10, 0), (SIZE, Extent::HOLE | Extent::ZERO)],
            MetaContext::AllocationDepth => {
                vec![(4 << 10, 1), (8 << 10, 2), (64 << 10, 1), (SIZE, 0)]
            }
            MetaContext::DirtyBitmap(_) => {
                vec![(32 << 10, 0), (64 << 10, Extent::DIRTY), (SIZE, 0)]
            }
        }
    }
}

impl Export for Layered {
    fn info(&self) -> ExportInfo {
        ExportInfo::new(SIZE)
    }

    fn contexts(&self) -> Vec<MetaContext> {
        let bitmaps = (0..70).map(|index| MetaContext::DirtyBitmap(format!("s{index}").into()));
        let named = [
            MetaContext::Allocation,
            MetaContext::AllocationDepth,
            MetaContext::DirtyBitmap("snap".into()),
        ];
        named.into_iter().chain(bitmaps).collect()
    }

    async fn read(&self, _offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        Ok(ReadReply::One(ReadPart::Hole(len)))
    }

    async fn write(&self, _offset: u64, _data: Bytes, _fua: bool) -> Result<(), ExportError> {
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    async fn trim(&self, _offset: u64, len: u64, _fua: bool) -> Result<(), ExportError> {
        assert_eq!(len, SIZE);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        _offset: u64,
        len: u64,
        _flags: ZeroFlags,
    ) -> Result<(), ExportError> {
        assert_eq!(len, SIZE);
        Err(ExportError::new(NbdErrno::NoSpc, "no space for zeroes"))
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    async fn block_status(
        &self,
        context: &MetaContext,
        offset: u64,
        _len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        let mut at = offset;
        let mut extents = Vec::new();
        for (end, flags) in Self::runs(context) {
            if end > at {
                extents.push(Extent {
                    len: end - at,
                    flags,
                });
                at = end;
            }
        }
        Ok(extents)
    }
}

impl Exports for Layered {
    type Export = Self;

    async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        Ok(vec![ExportEntry {
            name: "vol".to_owned(),
            description: "layers".to_owned(),
        }])
    }

    async fn open(&self, name: &str, _peer: &Peer) -> Result<Self, OpenError> {
        match name {
            "vol" | "alias" => Ok(Self),
            _ => Err(OpenError::Unknown("only vol is here".into())),
        }
    }
}

/// A client that says anything.
struct Raw(DuplexStream);

impl Raw {
    async fn greeted() -> Self {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        tokio::task::spawn_local(serve_connection(
            server,
            Peer::default(),
            Layered,
            ServeOptions::default(),
        ));
        client.read_exact(&mut [0; 18]).await.unwrap();
        client.write_all(&[0, 0, 0, 3]).await.unwrap();
        Self(client)
    }

    async fn take(&mut self, len_bytes: u64) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes as usize];
        self.0.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    /// The last reply to an option, and the payloads of those before.
    async fn option(&mut self, option: u32, data: &[u8]) -> (u32, Vec<Vec<u8>>) {
        let head = [
            b"IHAVEOPT",
            &option.to_be_bytes()[..],
            &(data.len() as u32).to_be_bytes(),
        ];
        self.0
            .write_all(&[&head.concat(), data].concat())
            .await
            .unwrap();
        let mut before = Vec::new();
        loop {
            let head = self.take(20).await;
            let payload = self.take(u64::from(number(&head[16..]))).await;
            match number(&head[12..16]) {
                kind if kind == ACK || kind >= 1 << 31 => {
                    assert!(
                        kind == ACK || !payload.is_empty(),
                        "an error must have a text"
                    );
                    return (kind, before);
                }
                _ => before.push(payload),
            }
        }
    }

    async fn opened(contexts: &[&str]) -> Self {
        let mut raw = Self::greeted().await;
        assert_eq!(raw.option(11, b"").await.0, ACK);
        assert_eq!(raw.option(SET, &meta("vol", contexts)).await.0, ACK);
        assert_eq!(raw.option(7, b"\0\0\0\x03vol\0\0").await.0, ACK);
        raw
    }

    async fn send(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64, payload: &[u8]) {
        let head = [
            &0x21e4_1c71u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            b"cookie!!",
            &offset.to_be_bytes(),
            &len_bytes.to_be_bytes(),
            payload,
        ];
        self.0.write_all(&head.concat()).await.unwrap();
    }

    /// Types and payloads of the chunks of the next reply.
    async fn chunks(&mut self, offset: u64) -> Vec<(u16, Vec<u8>)> {
        let mut chunks = Vec::new();
        loop {
            let head = self.take(32).await;
            assert_eq!(head[..4], 0x6e8a_278cu32.to_be_bytes());
            assert_eq!(&head[8..16], b"cookie!!");
            assert_eq!(head[16..24], offset.to_be_bytes());
            assert_eq!(head[24..28], [0; 4]);
            let payload = self.take(u64::from(number(&head[28..]))).await;
            chunks.push((u16::from_be_bytes([head[6], head[7]]), payload));
            if head[5] & 1 != 0 {
                return chunks;
            }
        }
    }

    /// Context ids with their extents.
    async fn status(
        &mut self,
        flags: u16,
        offset: u64,
        len_bytes: u64,
        payload: &[u8],
    ) -> Vec<(u32, Vec<(u64, u64)>)> {
        self.send(7, flags, offset, len_bytes, payload).await;
        let wide = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
        let chunk = |(kind, payload): (u16, Vec<u8>)| {
            assert_eq!(kind, 6);
            let extents: Vec<_> = payload[8..]
                .chunks_exact(16)
                .map(|extent| (wide(&extent[..8]), wide(&extent[8..])))
                .collect();
            assert_eq!(number(&payload[4..8]) as usize, extents.len());
            (number(&payload), extents)
        };
        self.chunks(offset).await.into_iter().map(chunk).collect()
    }

    /// Number of the error that the next reply is.
    async fn error(&mut self, offset: u64) -> u32 {
        let chunks = self.chunks(offset).await;
        assert!(chunks.len() == 1 && chunks[0].0 & 0x8000 != 0, "{chunks:?}");
        assert!(chunks[0].1.len() > 6, "an error must have a text");
        number(&chunks[0].1)
    }
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
    let queries_bytes: Vec<u8> = queries.iter().flat_map(|query| text(query)).collect();
    [
        text(name),
        (queries.len() as u32).to_be_bytes().to_vec(),
        queries_bytes,
    ]
    .concat()
}

fn subset(len_bytes: u64, ids: &[u32]) -> Vec<u8> {
    let ids = ids.iter().flat_map(|id| id.to_be_bytes());
    len_bytes.to_be_bytes().into_iter().chain(ids).collect()
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

const ALL: [&str; 3] = [
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:snap",
];

#[test]
fn groups_list_and_only_names_select() {
    run(async {
        let mut raw = Raw::greeted().await;
        assert_eq!(
            raw.option(LIST, &meta("vol", &[])).await.0,
            INVALID,
            "before STRUCTURED_REPLY"
        );
        assert_eq!(
            raw.option(SET, &meta("vol", &[])).await.0,
            INVALID,
            "before STRUCTURED_REPLY"
        );
        assert_eq!(raw.option(8, b"").await.0, ACK);
        for (queries, listed, selected) in [
            (&[][..], 73, 0),
            (&["base:"], 1, 0),
            (&["qemu:"], 72, 0),
            (&["qemu:dirty-bitmap:"], 71, 0),
            (&["qemu:dirty-bitmap:snap", "other:x", "no colon"], 1, 1),
            (&ALL, 3, 3),
        ] {
            let (end, contexts) = raw.option(LIST, &meta("vol", queries)).await;
            assert_eq!((end, contexts.len()), (ACK, listed), "{queries:?}");
            assert!(contexts.iter().all(|context| context[..4] == [0; 4]));
            let (end, contexts) = raw.option(SET, &meta("vol", queries)).await;
            assert_eq!((end, contexts.len()), (ACK, selected), "{queries:?}");
            let mut ids: Vec<_> = contexts.iter().map(|context| number(context)).collect();
            ids.dedup();
            assert_eq!(ids.len(), selected, "ids must differ");
        }
        let many: Vec<String> = (0..70)
            .map(|index| format!("qemu:dirty-bitmap:s{index}"))
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(raw.option(SET, &meta("vol", &many)).await.0, TOO_BIG);
        assert_eq!(raw.option(SET, &meta("other", &ALL)).await.0, UNKNOWN);
    });
}

#[test]
fn a_selection_is_replaced_even_by_a_failure_and_holds_for_its_export_only() {
    run(async {
        for (last, name) in [
            (meta("other", &ALL), "vol"),
            (b"\0".to_vec(), "vol"),
            (vec![0; limits::OPTION_BYTES as usize + 1], "vol"),
            (meta("alias", &ALL), "vol"),
        ] {
            let mut raw = Raw::greeted().await;
            raw.option(11, b"").await;
            assert_eq!(raw.option(SET, &meta("vol", &ALL)).await.0, ACK);
            raw.option(SET, &last).await;
            let go = [&[0, 0, 0, name.len() as u8], name.as_bytes(), &[0, 0]].concat();
            let (end, infos) = raw.option(7, &go).await;
            assert_eq!((end, infos[0][10] & 0x10), (ACK, 0), "BLOCK_STATUS_PAYLOAD");
            raw.send(7, 0, 0, 4096, b"").await;
            assert_eq!(raw.error(0).await, 22);
        }
    });
}

#[test]
fn extended_headers_include_structured_replies() {
    run(async {
        let mut raw = Raw::greeted().await;
        assert_eq!(raw.option(11, b"x").await.0, INVALID);
        assert_eq!(raw.option(8, b"").await.0, ACK);
        assert_eq!(raw.option(11, b"").await.0, ACK);
        assert_eq!(raw.option(8, b"").await.0, EXT_HEADER_REQD);
        assert_eq!(raw.option(SET, &meta("vol", &ALL)).await.0, ACK);
        let (_, info) = raw.option(6, b"\0\0\0\x03vol\0\0").await;
        let (_, go) = raw.option(7, b"\0\0\0\x03vol\0\0").await;
        assert_eq!(info, go);
        assert_eq!(
            go[0][10..],
            [0x15, 0xed],
            "with DF and BLOCK_STATUS_PAYLOAD"
        );
        let mut by_name = Raw::greeted().await;
        by_name.option(11, b"").await;
        by_name
            .0
            .write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x03vol")
            .await
            .unwrap();
        assert_eq!(
            by_name.0.read(&mut [0]).await.unwrap(),
            0,
            "EXPORT_NAME is not allowed"
        );
    });
}

#[test]
fn every_selected_context_answers_in_a_chunk_of_its_own() {
    run(async {
        let mut raw = Raw::opened(&ALL).await;
        let (kib, hole) = (1 << 10, 3);
        let all = raw.status(0, 0, SIZE, b"").await;
        let rest = SIZE - 64 * kib;
        assert_eq!(all[0], (1, vec![(64 * kib, 0), (rest, hole)]));
        assert_eq!(
            all[1],
            (
                2,
                vec![(4 * kib, 1), (4 * kib, 2), (56 * kib, 1), (rest, 0)]
            )
        );
        assert_eq!(all[2], (3, vec![(32 * kib, 0), (32 * kib, 1), (rest, 0)]));
        assert_eq!(all.len(), 3);
        let one = raw.status(8, 6 * kib, 30 * kib, b"").await;
        let expected = [
            (1, vec![(30 * kib, 0)]),
            (2, vec![(2 * kib, 2)]),
            (3, vec![(26 * kib, 0)]),
        ];
        assert_eq!(one, expected);
        let some = raw.status(0x20, 0, 16, &subset(SIZE, &[3, 1])).await;
        assert_eq!(some, [all[0].clone(), all[2].clone()]);
        let one = raw.status(0x28, 40 * kib, 12, &subset(4096, &[3])).await;
        assert_eq!(one, [(3, vec![(4096, 1)])]);
    });
}

#[test]
fn bad_block_status_payloads_are_consumed_and_refused() {
    run(async {
        let mut raw = Raw::opened(&ALL).await;
        for payload in [
            subset(512, &[]),
            subset(512, &[4]),
            subset(512, &[0]),
            subset(512, &[1, 1]),
            subset(512, &[1, 2, 3, 1]),
            subset(0, &[1]),
            subset(SIZE + 1, &[1]),
            subset(u64::MAX, &[1]),
            vec![0; 4],
            vec![0; 13],
            vec![0; 100_000],
        ] {
            raw.send(7, 0x20, 0, payload.len() as u64, &payload).await;
            assert_eq!(raw.error(0).await, 22, "{} bytes", payload.len());
        }
        for kind in [0, 3, 4, 5, 6, 9] {
            raw.send(kind, 0x20, 0, 512, &[1; 512]).await;
            assert_eq!(raw.error(0).await, 22, "type {kind} with a payload");
        }
        assert_eq!(raw.status(0, 0, 1, b"").await.len(), 3);
    });
}

#[test]
fn requests_have_64_bit_lengths() {
    run(async {
        let mut raw = Raw::opened(&[]).await;
        for kind in [4, 5] {
            raw.send(kind, 0, 0, SIZE, b"").await;
            assert_eq!(raw.chunks(0).await, [(0, vec![])], "type {kind}");
        }
        raw.send(6, 0, 0, SIZE, b"").await;
        assert_eq!(raw.error(0).await, 28, "the export's own error");
        raw.send(6, 0x10, 0, 512, b"").await;
        assert_eq!(raw.error(0).await, 22, "FAST_ZERO was not advertised");
        for (kind, flags, errno) in [(0, 0, 22), (0, 4, 75), (4, 0, 22), (5, 0, 22), (6, 0, 28)] {
            raw.send(kind, flags, 4096, SIZE, b"").await;
            assert_eq!(raw.error(4096).await, errno, "type {kind} past the end");
        }
        for flags in [0, 0x20] {
            raw.send(1, flags, SIZE - 512, 512, &[1; 512]).await;
            assert_eq!(raw.chunks(SIZE - 512).await, [(0, vec![])]);
        }
        raw.send(0, 0, 0, 64 << 20, b"").await;
        assert_eq!(
            raw.chunks(0).await,
            [(2, [&[0; 8][..], &(64u32 << 20).to_be_bytes()].concat())]
        );
        raw.send(1, 0x20, 0, 1 << 33, b"").await;
        assert_eq!(
            raw.0.read(&mut [0]).await.unwrap(),
            0,
            "8 GiB of payload cannot be skipped"
        );
    });
}

fn client(program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout")
        .arg("20")
        .arg(program)
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// Runs a test against a server on a unix socket, whose path it is given.
fn served(test: impl FnOnce(String) + Send + 'static) {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind_unix(&path).unwrap();
        let (sender, shutdown) = Shutdown::new();
        let options = ServeOptions {
            shutdown,
            ..ServeOptions::default()
        };
        let server = tokio::task::spawn_local(Server::new(Layered, options).run(vec![listener]));
        let path = path.to_str().unwrap().to_owned();
        tokio::task::spawn_blocking(|| test(path)).await.unwrap();
        sender.give();
        server.await.unwrap();
    });
}

#[test]
fn libnbd_reads_every_context() {
    served(|path| {
        let uri = format!("nbd+unix:///vol?socket={path}");
        let map = |context: &str| {
            let text = client("nbdinfo", &[&format!("--map={context}"), &uri]);
            let field = |line: &str| {
                line.split_whitespace()
                    .take(3)
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            text.lines().take(3).map(field).collect::<Vec<_>>()
        };
        assert_eq!(map("base:allocation")[0], "0 65536 0");
        assert_eq!(
            map("qemu:allocation-depth"),
            ["0 4096 1", "4096 4096 2", "8192 57344 1"]
        );
        assert_eq!(
            map("qemu:dirty-bitmap:snap")[..2],
            ["0 32768 0", "32768 32768 1"]
        );
        let list = client(
            "nbdinfo",
            &["--list", "--json", &format!("nbd+unix:///?socket={path}")],
        );
        assert!(
            list.contains("qemu:dirty-bitmap:s69") && list.contains("layers"),
            "{list}"
        );
    });
}

#[test]
fn qemu_reads_allocation_and_dirty_bitmap_with_extended_headers() {
    served(|path| {
        let options = format!("driver=nbd,export=vol,server.type=unix,server.path={path}");
        let dirty = format!("{options},x-dirty-bitmap=qemu:dirty-bitmap:snap");
        let allocation = client(
            "qemu-img",
            &["map", "--output=json", "--image-opts", &options],
        );
        assert!(
            allocation.contains(&format!("\"start\": 65536, \"length\": {}", SIZE - 65536)),
            "{allocation}"
        );
        // QEMU shows a dirty range as a hole that is not data.
        let dirty = client(
            "qemu-img",
            &["map", "--output=json", "--image-opts", &dirty],
        );
        let run = dirty
            .lines()
            .find(|line| line.contains("\"start\": 32768, \"length\": 32768"));
        assert!(
            run.is_some_and(|line| line.contains("\"data\": false")),
            "{dirty}"
        );
        let trace = client(
            "qemu-io",
            &["-T", "nbd_*", "--image-opts", &options, "-c", "map"],
        );
        assert!(
            trace.contains("option reply 11 (extended headers), type 1 "),
            "{trace}"
        );
        let list = client("qemu-nbd", &["--list", "-k", &path]);
        assert!(
            list.contains("qemu:dirty-bitmap:snap") && list.contains("layers"),
            "{list}"
        );
    });
}
