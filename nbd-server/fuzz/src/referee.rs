//! Judges what a server said to a stream of bytes, by the protocol alone: each reply belongs to an
//! option or a request, each gets exactly one final reply, and data is what was written.

use super::session::{NAME, Outcome, SIZE};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;
const FUA: u16 = 1;
const DF: u16 = 4;
const PAYLOAD_LEN: u16 = 32;
const ACK: u32 = 1;
const ERRNOS: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];

/// Bytes that are consumed from the front.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(front)
    }

    fn number(&mut self, len: usize) -> Option<u64> {
        let bytes = self.take(len)?.iter();
        Some(bytes.fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn u16(&mut self) -> Option<u16> {
        self.number(2).map(|number| number as u16)
    }

    fn u32(&mut self) -> Option<u32> {
        self.number(4).map(|number| number as u32)
    }

    fn ends(&self, why: &str) {
        assert!(self.0.is_empty(), "{} bytes more: {why}", self.0.len());
    }
}

/// The form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

/// Fails unless everything that was said is an answer to what was sent.
pub fn judge(sent: &[u8], outcome: &Outcome) {
    let (mut sent, mut said) = (Cursor(sent), Cursor(&outcome.said));
    assert_eq!(said.take(16), Some(&b"NBDMAGICIHAVEOPT"[..]));
    assert_eq!(said.u16(), Some(3));
    let mut disk = vec![0; SIZE as usize];
    match handshake(&mut sent, &mut said) {
        Some(mode) => transmission(mode, &mut sent, &mut said, &mut disk),
        None => said.ends("no transmission"),
    }
    assert!(disk == outcome.disk, "the disk is not what was written");
}

/// Follows the options; the mode if an export was opened.
fn handshake(sent: &mut Cursor<'_>, said: &mut Cursor<'_>) -> Option<Mode> {
    let flags = sent.u32()?;
    if flags & !3 != 0 {
        return None;
    }
    let mut mode = Mode::Simple;
    loop {
        if sent.take(8)? != b"IHAVEOPT" {
            return None;
        }
        let option = sent.u32()?;
        let len = sent.u32()? as usize;
        let data = sent.take(len)?;
        if option == 1 && said.0.is_empty() {
            return None;
        }
        if option == 1 {
            assert_eq!(data, NAME.as_bytes());
            assert_eq!(said.number(8), Some(SIZE));
            let padding = if flags & 2 == 0 { 124 } else { 0 };
            said.take(2 + padding)?;
            return Some(mode);
        }
        let kind = replies(option, said)?;
        match (option, kind) {
            (2, _) => return None,
            (5, ACK) => panic!("STARTTLS without certificates"),
            (7, ACK) => return Some(mode),
            (8, ACK) if mode == Mode::Simple => mode = Mode::Structured,
            (11, ACK) => mode = Mode::Extended,
            _ => {}
        }
    }
}

/// Takes the replies to one option; the type of the final one. `None`: the server had enough.
fn replies(option: u32, said: &mut Cursor<'_>) -> Option<u32> {
    loop {
        let magic = said.number(8)?;
        assert_eq!(magic, 0x0003_e889_0455_65a9);
        assert_eq!(said.u32(), Some(option), "a reply to another option");
        let kind = said.u32().expect("a whole reply");
        let len = said.u32().expect("a whole reply") as usize;
        let data = said.take(len).expect("a whole reply");
        if kind >> 31 == 1 {
            let text = std::str::from_utf8(data).expect("a text");
            assert!(!text.is_empty() && kind & 0xffff <= 10 && kind & 0xffff > 0);
            return Some(kind);
        }
        assert!((1..=4).contains(&kind), "a reply of type {kind}");
        if kind == ACK {
            return Some(kind);
        }
    }
}

struct Request<'a> {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    len: u64,
    payload: &'a [u8],
}

impl Request<'_> {
    /// Nothing is wrong with it at all.
    fn is_plain(&self, mode: Mode) -> bool {
        let wanted = if mode == Mode::Extended && self.kind == WRITE {
            PAYLOAD_LEN
        } else {
            0
        };
        let end = self.offset.checked_add(self.len);
        let within = end.is_some_and(|end| end <= SIZE) && self.len > 0;
        let known = [READ, WRITE, TRIM, ZEROES].contains(&self.kind);
        self.flags & !FUA == wanted && (known && within || self.kind == FLUSH)
    }
}

/// The next whole request; `None` when nothing that may be answered follows.
fn next_request<'a>(mode: Mode, sent: &mut Cursor<'a>) -> Option<Request<'a>> {
    let magic = if mode == Mode::Extended {
        0x21e4_1c71
    } else {
        0x2560_9513
    };
    if sent.u32()? != magic {
        return None;
    }
    let (flags, kind) = (sent.u16()?, sent.u16()?);
    let (cookie, offset) = (sent.number(8)?, sent.number(8)?);
    let len = sent.number(if mode == Mode::Extended { 8 } else { 4 })?;
    let has_payload = kind == WRITE || mode == Mode::Extended && flags & PAYLOAD_LEN != 0;
    let payload_len = if has_payload { len } else { 0 };
    let payload = sent.take(usize::try_from(payload_len).ok()?)?;
    (kind != DISC).then_some(Request {
        flags,
        kind,
        cookie,
        offset,
        len,
        payload,
    })
}

/// What came back for one request.
#[derive(Default)]
struct Answer {
    errno: u32,
    data: Vec<u8>,
    covered: u64,
}

/// The export answers at once, so replies come in the order of the requests.
fn transmission(mode: Mode, sent: &mut Cursor<'_>, said: &mut Cursor<'_>, disk: &mut [u8]) {
    while let Some(request) = next_request(mode, sent) {
        if said.0.is_empty() {
            // Too large to be skipped: the server closes and answers nothing more.
            assert!(
                request.payload.len() > 128 << 20,
                "a request without a reply"
            );
            return;
        }
        let mut answer = Answer::default();
        while !message(mode, &request, said, &mut answer) {}
        apply(mode, &request, &answer, disk);
    }
    said.ends("replies to requests that were not made");
}

/// Judges replies in any order to requests that do not touch each other's ranges. Each is answered
/// once; with `all` none is left out. A connection that broke may cut the last message.
pub fn judge_unordered(mode: Mode, sent: &[u8], said: &[u8], disk: &mut [u8], all: bool) {
    let (mut sent, mut said) = (Cursor(sent), Cursor(said));
    let mut open: Vec<(Request<'_>, Answer)> = vec![];
    while let Some(request) = next_request(mode, &mut sent) {
        open.push((request, Answer::default()));
    }
    while let Some(head) = said.0.first_chunk::<16>() {
        if !all && !has_whole_message(mode, &open, said.0) {
            return;
        }
        let index = open.iter().position(|(request, _)| is_for(request, head));
        let index = index.expect("a reply to a request that waits for one");
        let (request, answer) = &mut open[index];
        if message(mode, request, &mut said, answer) {
            let (request, answer) = open.swap_remove(index);
            apply(mode, &request, &answer, disk);
        }
    }
    assert!(
        !all || open.is_empty() && said.0.is_empty(),
        "{} wait",
        open.len()
    );
}

/// The cookie is at the same place in every form.
fn is_for(request: &Request<'_>, head: &[u8; 16]) -> bool {
    head[8..] == request.cookie.to_be_bytes()
}

fn has_whole_message(mode: Mode, open: &[(Request<'_>, Answer)], said: &[u8]) -> bool {
    let number = |at: usize, len: usize| Cursor(said.get(at..)?).number(len);
    let whole = match (mode, said[0]) {
        (Mode::Extended, _) => number(24, 8).map(|len| 32 + len),
        (_, 0x66) => number(16, 4).map(|len| 20 + len),
        _ => {
            let head = said.first_chunk().expect("a head");
            let request = open.iter().find(|(request, _)| is_for(request, head));
            let has_data = request.is_some_and(|(request, _)| request.kind == READ);
            let is_error = said[4..8] != [0; 4];
            Some(
                16 + if has_data && !is_error {
                    request.map_or(0, |(request, _)| request.len)
                } else {
                    0
                },
            )
        }
    };
    whole.is_some_and(|whole| whole <= said.len() as u64)
}

/// Takes one message; whether it is the last one for its request.
fn message(mode: Mode, request: &Request<'_>, said: &mut Cursor<'_>, answer: &mut Answer) -> bool {
    match said.u32().expect("a whole reply") {
        0x6744_6698 => {
            assert_ne!(mode, Mode::Extended);
            simple(mode, request, said, answer);
            return true;
        }
        0x668e_33ef => assert_eq!(mode, Mode::Structured),
        0x6e8a_278c => assert_eq!(mode, Mode::Extended),
        magic => panic!("a reply with magic {magic:#x}"),
    }
    chunk(mode, request, said, answer)
}

fn simple(mode: Mode, request: &Request<'_>, said: &mut Cursor<'_>, answer: &mut Answer) {
    answer.errno = said.u32().expect("a whole reply");
    assert_eq!(said.number(8), Some(request.cookie));
    let has_data = request.kind == READ && answer.errno == 0;
    assert!(mode == Mode::Simple || !has_data);
    if has_data {
        let data = said.take(request.len as usize);
        answer.data = data.expect("all of the data").to_vec();
        answer.covered = request.len;
    }
}

/// Takes a chunk behind its magic; whether it is the last one.
fn chunk(mode: Mode, request: &Request<'_>, said: &mut Cursor<'_>, answer: &mut Answer) -> bool {
    let flags = said.u16().expect("a whole chunk");
    let kind = said.u16().expect("a whole chunk");
    assert_eq!(said.number(8), Some(request.cookie));
    if mode == Mode::Extended {
        assert_eq!(said.number(8), Some(request.offset));
    }
    let len = said.number(if mode == Mode::Extended { 8 } else { 4 });
    let len = usize::try_from(len.expect("a whole chunk")).expect("a length");
    let mut payload = Cursor(said.take(len).expect("a whole chunk"));
    match kind {
        0 => assert!(flags == 1),
        1 | 2 => content(request, kind, &mut payload, answer),
        5 | 6 => assert_eq!(request.kind, STATUS),
        0x8001 | 0x8002 => answer.errno = error(kind, &mut payload),
        _ => panic!("a chunk of type {kind}"),
    }
    assert!(kind == 5 || kind == 6 || payload.0.is_empty());
    flags == 1
}

fn content(request: &Request<'_>, kind: u16, payload: &mut Cursor<'_>, answer: &mut Answer) {
    assert_eq!(request.kind, READ);
    let offset = payload.number(8).expect("an offset");
    assert_eq!(offset, request.offset + answer.covered, "chunks in order");
    match kind {
        1 => {
            answer.data.extend_from_slice(payload.0);
            answer.covered += payload.0.len() as u64;
            payload.0 = b"";
        }
        _ => {
            let hole = payload.u32().expect("the length of a hole");
            answer.data.resize(answer.data.len() + hole as usize, 0);
            answer.covered += u64::from(hole);
        }
    }
}

fn error(kind: u16, payload: &mut Cursor<'_>) -> u32 {
    let errno = payload.u32().expect("an error number");
    let len = payload.u16().expect("the length of a text");
    let text = payload.take(usize::from(len)).expect("a text");
    assert!(!text.is_empty() && std::str::from_utf8(text).is_ok());
    assert!(kind == 0x8001 || payload.number(8).is_some());
    errno
}

/// Compares the answer with the disk and does to it what was asked.
fn apply(mode: Mode, request: &Request<'_>, answer: &Answer, disk: &mut [u8]) {
    let errno = answer.errno;
    assert!(errno == 0 || ERRNOS.contains(&errno), "errno {errno}");
    assert!(
        errno == 0 || !request.is_plain(mode),
        "a plain request got {errno}"
    );
    if errno != 0 || request.kind == FLUSH || request.kind == STATUS {
        return;
    }
    let end = request.offset.checked_add(request.len);
    assert!(end.is_some_and(|end| end <= SIZE), "a success out of range");
    let range = request.offset as usize..(request.offset + request.len) as usize;
    match request.kind {
        READ => {
            assert!(answer.covered == request.len && answer.data == disk[range]);
            assert!(mode != Mode::Simple || request.flags & DF == 0);
        }
        WRITE => disk[range].copy_from_slice(request.payload),
        TRIM | ZEROES => disk[range].fill(0),
        5 => {}
        kind => panic!("a success of command {kind}"),
    }
}
