//! Replies taken apart; whatever the protocol forbids in one is a failed assertion.

use super::{Asked, ExportFacts, Mode, OptionReply, Stream, be16, be32, be64, wire};

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
const DONE: u16 = 1;
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const BLOCK_STATUS_EXT: u16 = 6;
const ERROR: u16 = 0x8001;
const ERROR_OFFSET: u16 = 0x8002;
/// Error numbers that may appear in a reply.
const ERRNOS: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];
const EXTENTS_MAX: usize = 1 << 20;

/// A content chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    pub offset: u64,
    pub len_bytes: u64,
    pub is_hole: bool,
}

/// A whole reply.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// 0 for success.
    pub errno: u32,
    pub text: String,
    /// Of a READ that succeeded: all of it, holes as zeroes.
    pub data: Vec<u8>,
    pub content: Vec<Content>,
    /// Context ids and their extents: length in bytes, status.
    pub status: Vec<(u32, Vec<(u64, u64)>)>,
}

struct Chunk {
    flags: u16,
    kind: u16,
    payload: Vec<u8>,
}

fn take(stream: &mut Box<dyn Stream>, len_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes];
    let taken = stream.read_exact(&mut bytes);
    taken.unwrap_or_else(|error| panic!("{len_bytes} bytes of a reply: {error}"));
    bytes
}

/// Takes the reply to a request.
pub(super) fn receive(stream: &mut Box<dyn Stream>, mode: Mode, asked: &Asked) -> Reply {
    let mut reply = Reply::default();
    loop {
        let magic = be32(&take(stream, 4));
        if magic == SIMPLE_MAGIC {
            assert!(reply.content.is_empty() && reply.status.is_empty());
            return simple(stream, mode, asked);
        }
        let chunk = chunk(stream, mode, magic, asked);
        reply.add(&chunk, asked);
        if chunk.flags & DONE != 0 {
            reply.check(asked);
            return reply;
        }
    }
}

fn simple(stream: &mut Box<dyn Stream>, mode: Mode, asked: &Asked) -> Reply {
    let head = take(stream, 12);
    let errno = be32(&head[..4]);
    assert_eq!(be64(&head[4..]), asked.cookie, "the cookie of {asked:?}");
    assert_ne!(mode, Mode::Extended, "a simple reply to {asked:?}");
    if mode == Mode::Structured {
        assert_ne!(asked.kind, wire::READ, "READ must get chunks");
        assert_ne!(asked.kind, wire::STATUS, "BLOCK_STATUS must get chunks");
        assert_eq!(errno, 0, "an error without a text to {asked:?}");
    }
    let mut reply = Reply {
        errno,
        ..Reply::default()
    };
    check_errno(errno, asked);
    if asked.kind == wire::READ && errno == 0 {
        reply.data = take(stream, usize::try_from(asked.len_bytes).unwrap());
    }
    reply
}

/// The rest of a chunk behind its magic.
fn chunk(stream: &mut Box<dyn Stream>, mode: Mode, magic: u32, asked: &Asked) -> Chunk {
    let expected = match mode {
        Mode::Simple => SIMPLE_MAGIC,
        Mode::Structured => CHUNK_MAGIC,
        Mode::Extended => EXTENDED_MAGIC,
    };
    assert_eq!(magic, expected, "magic of a reply to {asked:?}");
    let head = take(stream, if mode == Mode::Extended { 28 } else { 16 });
    assert_eq!(be64(&head[4..12]), asked.cookie, "the cookie of {asked:?}");
    let len_bytes = match mode {
        Mode::Extended => {
            assert_eq!(be64(&head[12..20]), asked.offset, "the offset of {asked:?}");
            be64(&head[20..])
        }
        _ => u64::from(be32(&head[12..])),
    };
    assert!(len_bytes <= (65 << 20), "a chunk of {len_bytes} bytes");
    Chunk {
        flags: be16(&head[..2]),
        kind: be16(&head[2..4]),
        payload: take(stream, usize::try_from(len_bytes).unwrap()),
    }
}

impl Reply {
    fn add(&mut self, chunk: &Chunk, asked: &Asked) {
        assert_eq!(chunk.flags & !DONE, 0, "unknown reply flags");
        let payload = &chunk.payload;
        match chunk.kind {
            NONE => {
                assert!(payload.is_empty(), "NONE with a payload");
                assert_eq!(chunk.flags, DONE, "NONE without DONE");
            }
            OFFSET_DATA => self.add_content(asked, be64(&payload[..8]), &payload[8..], None),
            OFFSET_HOLE => {
                assert_eq!(payload.len(), 12);
                let len_bytes = be32(&payload[8..]);
                self.add_content(asked, be64(&payload[..8]), b"", Some(len_bytes));
            }
            BLOCK_STATUS | BLOCK_STATUS_EXT => self.add_status(chunk, asked),
            ERROR | ERROR_OFFSET => self.add_error(chunk, asked),
            kind => panic!("a chunk of type {kind:#x}"),
        }
    }

    fn add_content(&mut self, asked: &Asked, offset: u64, data: &[u8], hole: Option<u32>) {
        assert_eq!(asked.kind, wire::READ, "content for {asked:?}");
        let len_bytes = hole.map_or(data.len() as u64, u64::from);
        let content = Content {
            offset,
            len_bytes,
            is_hole: hole.is_some(),
        };
        // The one exception: a READ of nothing may get a chunk of nothing.
        assert!(len_bytes > 0 || asked.len_bytes == 0, "an empty chunk");
        assert!(offset >= asked.offset && offset + len_bytes <= asked.offset + asked.len_bytes);
        let apart = |other: &Content| {
            offset + len_bytes <= other.offset || other.offset + other.len_bytes <= offset
        };
        assert!(
            self.content.iter().all(apart),
            "chunks overlap: {content:?}"
        );
        self.content.push(content);
        self.data
            .resize(usize::try_from(asked.len_bytes).unwrap(), 0);
        let at = usize::try_from(offset - asked.offset).unwrap();
        self.data[at..at + data.len()].copy_from_slice(data);
    }

    fn add_status(&mut self, chunk: &Chunk, asked: &Asked) {
        assert_eq!(asked.kind, wire::STATUS, "a status for {asked:?}");
        let (head_bytes, each_bytes) = match chunk.kind {
            BLOCK_STATUS => (4, 8),
            _ => (8, 16),
        };
        let (head, extents) = chunk.payload.split_at(head_bytes);
        assert_eq!(extents.len() % each_bytes, 0);
        let extents: Vec<(u64, u64)> = extents
            .chunks_exact(each_bytes)
            .map(|extent| match extent.split_at(each_bytes / 2) {
                (len, status) if each_bytes == 8 => (be32(len).into(), be32(status).into()),
                (len, status) => (be64(len), be64(status)),
            })
            .collect();
        if head_bytes == 8 {
            let count = be32(&head[4..]) as usize;
            assert!(count == 0 || count == extents.len(), "descriptor count");
        }
        let id = be32(&head[..4]);
        assert!(
            self.status.iter().all(|(other, _)| *other != id),
            "context {id} twice"
        );
        self.status.push((id, extents));
    }

    fn add_error(&mut self, chunk: &Chunk, asked: &Asked) {
        let payload = &chunk.payload;
        let text_end = 6 + usize::from(be16(&payload[4..6]));
        let rest_bytes = if chunk.kind == ERROR { 0 } else { 8 };
        assert_eq!(payload.len(), text_end + rest_bytes, "length of an error");
        assert!(text_end <= 6 + 4096);
        self.errno = be32(&payload[..4]);
        self.text = String::from_utf8(payload[6..text_end].to_vec()).unwrap();
        assert!(!self.text.is_empty(), "an error without text to {asked:?}");
        assert_ne!(self.errno, 0, "an error of no error");
        check_errno(self.errno, asked);
    }

    /// What holds for the reply as a whole.
    fn check(&self, asked: &Asked) {
        if self.errno != 0 {
            return;
        }
        if asked.kind == wire::READ {
            let total: u64 = self.content.iter().map(|content| content.len_bytes).sum();
            assert_eq!(total, asked.len_bytes, "the content covers the range");
            let is_whole = self.content.len() <= 1;
            assert!(
                asked.flags & wire::DF == 0 || is_whole,
                "fragments in spite of DF"
            );
        }
        if asked.kind == wire::STATUS {
            assert!(!self.status.is_empty(), "a success without a status");
            self.status
                .iter()
                .for_each(|(_, extents)| check_extents(extents, asked));
        }
    }
}

fn check_extents(extents: &[(u64, u64)], asked: &Asked) {
    assert!(!extents.is_empty() && extents.len() <= EXTENTS_MAX);
    assert!(extents.iter().all(|(len, _)| *len > 0), "an empty extent");
    let unmerged = extents.windows(2).any(|pair| pair[0].1 == pair[1].1);
    assert!(!unmerged, "neighbours of equal status: {extents:?}");
    let (_, before) = extents.split_last().unwrap();
    let before_bytes: u64 = before.iter().map(|(len, _)| len).sum();
    // The payload form has its length in the payload.
    if asked.flags & wire::PAYLOAD_LEN == 0 {
        assert!(
            before_bytes < asked.len_bytes,
            "more extents than asked for"
        );
        if asked.flags & wire::REQ_ONE != 0 {
            assert!(
                extents.len() == 1 && extents[0].0 <= asked.len_bytes,
                "REQ_ONE"
            );
        }
    }
}

fn check_errno(errno: u32, asked: &Asked) {
    assert!(
        errno == 0 || ERRNOS.contains(&errno),
        "errno {errno} to {asked:?}"
    );
    let is_fast_zero = asked.kind == wire::ZEROES && asked.flags & wire::FAST_ZERO != 0;
    assert!(
        errno != wire::ENOTSUP || is_fast_zero,
        "ENOTSUP to {asked:?}"
    );
}

/// Puts INFO replies together; each item at most once, EXPORT always there.
pub(super) fn export_facts(infos: &[OptionReply]) -> ExportFacts {
    let mut facts = ExportFacts::default();
    let mut seen = vec![];
    for info in infos {
        assert_eq!(info.kind, wire::REP_INFO);
        let (item, data) = (be16(&info.data[..2]), &info.data[2..]);
        assert!(!seen.contains(&item), "info {item} twice");
        seen.push(item);
        let text = || Some(String::from_utf8(data.to_vec()).unwrap());
        match item {
            0 => {
                assert_eq!(data.len(), 10);
                (facts.size_bytes, facts.flags) = (be64(&data[..8]), be16(&data[8..]));
            }
            1 => facts.name = text(),
            2 => facts.description = text(),
            3 => {
                assert_eq!(data.len(), 12);
                facts.block_bytes = Some([0, 4, 8].map(|at| be32(&data[at..at + 4])));
            }
            unknown => panic!("info {unknown}"),
        }
    }
    assert!(seen.contains(&0), "INFO_EXPORT is always sent");
    facts
}

/// Id and name of a context.
pub(super) fn context(reply: &OptionReply) -> (u32, String) {
    assert_eq!(reply.kind, wire::REP_META);
    let name = String::from_utf8(reply.data[4..].to_vec()).unwrap();
    (be32(&reply.data[..4]), name)
}
