//! From received bytes to requests with their payloads: a state machine without IO.
//!
//! The receive buffer takes many requests per receive. A small payload is copied out of it when it is complete; a large one gets a
//! buffer of its own, into which the socket is read directly. A payload is never handed on in part.

use bytes::Bytes;

use crate::connection::ConnectionError;
use crate::error::ExportError;
use crate::limits;
use crate::request::{self, Command, Headers, Request, Verdict};
use crate::wire;

/// A receive behind a large payload takes so little that the next large payload is not copied through the receive buffer.
const RECEIVE_AFTER_LARGE_BYTES: usize = 4 << 10;

/// The largest chunk of a BLOCK_STATUS reply.
const STATUS_BYTES: u32 = (limits::EXTENTS_MAX as u32 + 1) * 16;

/// A request with its payload.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) command: Command,
    pub(crate) payload: Bytes,
    /// Budget bytes that were taken for it.
    pub(crate) held_bytes: u32,
}

/// What the decoder has to say next.
#[derive(Debug)]
pub(crate) enum Step {
    /// Receive more.
    Receive,
    /// The budget gave no bytes: try again later.
    Wait,
    /// Execute this.
    Run(Job),
    /// Answer this error; the payload is skipped.
    Refuse(Request, ExportError),
    /// Read nothing more.
    End(Result<(), ConnectionError>),
}

enum State {
    Head,
    Admitted(Request, Command),
    Payload(Request, Command, Vec<u8>),
    Skip(Request, ExportError, u64),
}

/// State of the receiving side of one connection.
pub(crate) struct Decoder {
    headers: Headers,
    buffer: Vec<u8>,
    start: usize,
    state: State,
    after_large: bool,
}

/// Budget bytes that a command needs.
fn cost_bytes(request: &Request, command: Command) -> u32 {
    match command {
        Command::Read { .. } | Command::Write { .. } => request.len_bytes as u32,
        Command::Status { contexts, .. } => contexts.count_ones() * STATUS_BYTES,
        Command::StatusOf { .. } => request.payload_bytes as u32 / 4 * STATUS_BYTES,
        _ => 0,
    }
}

impl Decoder {
    pub(crate) fn new(headers: Headers) -> Self {
        Self {
            headers,
            buffer: Vec::with_capacity(limits::RECEIVE_BYTES),
            start: 0,
            state: State::Head,
            after_large: false,
        }
    }

    /// Whether a payload is expected that budget bytes were taken for.
    pub(crate) fn holds_partial_payload(&self) -> bool {
        matches!(self.state, State::Payload(..))
    }

    /// Whether the stream may end here: between two requests.
    pub(crate) fn is_between_requests(&self) -> bool {
        matches!(self.state, State::Head) && self.available().is_empty()
    }

    /// Whether what was received last is a DISC: nothing may follow it.
    pub(crate) fn has_goodbye(&self) -> bool {
        let available = self.available();
        let start = available.len().checked_sub(self.headers.request_bytes());
        let request = start.and_then(|start| request::parse(&available[start..], self.headers));
        request.is_some_and(|request| request.kind == wire::command::DISC)
    }

    /// Where to receive into, and at most how many bytes: 0 only while received requests wait.
    pub(crate) fn receive_target(&mut self) -> (&mut Vec<u8>, usize) {
        if let State::Payload(request, _, data) = &mut self.state {
            let left_bytes = request.payload_bytes as usize - data.len();
            return (data, left_bytes);
        }
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.buffer.capacity() - self.buffer.len() < limits::SMALL_PAYLOAD_BYTES as usize
        {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        let room_bytes = limits::RECEIVE_BYTES - self.buffer.len();
        let max_bytes = if self.after_large && self.buffer.is_empty() {
            RECEIVE_AFTER_LARGE_BYTES
        } else {
            room_bytes
        };
        (&mut self.buffer, max_bytes)
    }

    fn available(&self) -> &[u8] {
        &self.buffer[self.start..]
    }

    /// The next step. `admit` judges a request; `take` takes budget bytes.
    pub(crate) fn next(
        &mut self,
        admit: impl Fn(&Request) -> Verdict,
        mut take: impl FnMut(u32) -> bool,
    ) -> Step {
        loop {
            let step = match &self.state {
                State::Head => self.read_head(&admit),
                State::Admitted(request, command) => self.begin(*request, *command, &mut take),
                State::Payload(..) => self.fill_payload(),
                State::Skip(..) => self.skip(),
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    fn read_head(&mut self, admit: impl Fn(&Request) -> Verdict) -> Option<Step> {
        let head_bytes = self.headers.request_bytes();
        let Some(head) = self.available().get(..head_bytes) else {
            return Some(Step::Receive);
        };
        let Some(request) = request::parse(head, self.headers) else {
            return Some(Step::End(Err(ConnectionError::RequestMagic)));
        };
        self.start += head_bytes;
        self.state = match admit(&request) {
            Verdict::Run(command) => State::Admitted(request, command),
            Verdict::Refuse(error) => State::Skip(request, error, request.payload_bytes),
            Verdict::Goodbye => return Some(Step::End(Ok(()))),
            Verdict::Hopeless => {
                return Some(Step::End(Err(ConnectionError::PayloadTooLarge(
                    request.payload_bytes,
                ))));
            }
        };
        None
    }

    fn begin(
        &mut self,
        request: Request,
        command: Command,
        take: &mut impl FnMut(u32) -> bool,
    ) -> Option<Step> {
        let payload_bytes = request.payload_bytes as usize;
        let is_small = payload_bytes <= limits::SMALL_PAYLOAD_BYTES as usize;
        if is_small && self.available().len() < payload_bytes {
            return Some(Step::Receive);
        }
        let held_bytes = cost_bytes(&request, command);
        if !take(held_bytes) {
            return Some(Step::Wait);
        }
        self.after_large = !is_small;
        if !is_small {
            self.state = State::Payload(request, command, Vec::with_capacity(payload_bytes));
            return None;
        }
        let payload = Bytes::copy_from_slice(&self.available()[..payload_bytes]);
        self.start += payload_bytes;
        self.state = State::Head;
        Some(Step::Run(Job {
            request,
            command,
            payload,
            held_bytes,
        }))
    }

    fn fill_payload(&mut self) -> Option<Step> {
        let State::Payload(request, command, data) = &mut self.state else {
            return None;
        };
        let (request, command) = (*request, *command);
        let received = &self.buffer[self.start..];
        let payload_bytes = request.payload_bytes as usize;
        let step = received.len().min(payload_bytes - data.len());
        data.extend_from_slice(&received[..step]);
        self.start += step;
        if data.len() < payload_bytes {
            return Some(Step::Receive);
        }
        let payload = Bytes::from(std::mem::take(data));
        self.state = State::Head;
        Some(Step::Run(Job {
            request,
            command,
            payload,
            held_bytes: payload_bytes as u32,
        }))
    }

    fn skip(&mut self) -> Option<Step> {
        let available_bytes = self.available().len();
        let State::Skip(_, _, left_bytes) = &mut self.state else {
            return None;
        };
        let step = available_bytes.min(*left_bytes as usize);
        *left_bytes -= step as u64;
        self.start += step;
        if *left_bytes > 0 {
            return Some(Step::Receive);
        }
        match std::mem::replace(&mut self.state, State::Head) {
            State::Skip(request, error, _) => Some(Step::Refuse(request, error)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::export::{ExportInfo, MetaContext};
    use crate::request::Agreement;
    use crate::wire;

    fn encode(
        kind: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        payload: Result<&[u8], u32>,
    ) -> Vec<u8> {
        let len_bytes = payload.map_or_else(|len_bytes| len_bytes, |data| data.len() as u32);
        let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len_bytes.to_be_bytes());
        bytes.extend_from_slice(payload.unwrap_or_default());
        bytes
    }

    fn admit(request: &Request) -> Verdict {
        request::admit(
            request,
            &ExportInfo::new(1 << 20),
            &Agreement {
                headers: Headers::Structured,
                contexts: [MetaContext::Allocation].into(),
            },
        )
    }

    /// Feeds the stream in pieces of these sizes and lists the steps as text.
    fn decode(stream: &[u8], pieces: &[usize]) -> Vec<String> {
        let (mut decoder, mut rest, mut steps, mut turn) =
            (Decoder::new(Headers::Structured), stream, Vec::new(), 0);
        loop {
            match decoder.next(admit, |_| true) {
                Step::Receive if rest.is_empty() => return steps,
                Step::Receive => {
                    let (target, max_bytes) = decoder.receive_target();
                    assert!(max_bytes > 0);
                    let step = pieces[turn % pieces.len()].min(max_bytes).min(rest.len());
                    target.extend_from_slice(&rest[..step]);
                    rest = &rest[step..];
                    turn += 1;
                    assert!(decoder.buffer.capacity() <= limits::RECEIVE_BYTES);
                }
                Step::End(end) => {
                    steps.push(format!("end {end:?}"));
                    return steps;
                }
                Step::Run(job) => {
                    let sum: u64 = job.payload.iter().map(|byte| u64::from(*byte)).sum();
                    steps.push(format!(
                        "{:?} {:?} {} {sum}",
                        job.request,
                        job.command,
                        job.payload.len()
                    ));
                }
                step => steps.push(format!("{step:?}")),
            }
        }
    }

    #[test]
    fn a_refused_write_is_skipped_and_the_next_request_is_seen() {
        let refused = encode(1, 0, 1, 1 << 40, Ok(&[0x55; 100_000]));
        let stream = [refused, encode(3, 0, 2, 0, Err(0))].concat();
        let steps = decode(&stream, &[70_000]);
        assert!(
            steps[0].contains("NoSpc") && steps[1].contains("Flush"),
            "{steps:?}"
        );
    }

    #[test]
    fn without_budget_nothing_of_a_large_payload_is_taken_in() {
        let mut decoder = Decoder::new(Headers::Structured);
        let (buffer, _) = decoder.receive_target();
        buffer.extend_from_slice(&encode(1, 0, 1, 0, Ok(&[1; 100_000])));
        assert!(matches!(decoder.next(admit, |_| false), Step::Wait));
        assert!(
            matches!(decoder.next(admit, |_| false), Step::Wait)
                && !decoder.holds_partial_payload()
        );
        assert!(
            matches!(decoder.next(admit, |bytes| bytes == 100_000), Step::Run(job) if job.payload.len() == 100_000)
        );
    }

    #[test]
    fn a_wrong_magic_ends_the_stream_after_what_came_before() {
        let mut stream = encode(0, 0, 1, 0, Err(512));
        stream.extend_from_slice(&[0; 28]);
        let steps = decode(&stream, &[7]);
        assert!(
            steps.len() == 2 && steps[1].contains("RequestMagic"),
            "{steps:?}"
        );
    }

    proptest! {
        #[test]
        fn requests_do_not_depend_on_how_the_stream_is_cut(
            requests in proptest::collection::vec((0u16..9, 0u16..20, 0u64..(1 << 21), 0usize..200_000), 1..12),
            pieces in proptest::collection::vec(1usize..90_000, 1..8),
        ) {
            let mut stream = Vec::new();
            for (index, (kind, flags, offset, len)) in requests.iter().enumerate() {
                let payload = vec![index as u8; *len];
                let payload = if *kind == 1 { Ok(&payload[..]) } else { Err(*len as u32) };
                stream.extend(encode(*kind, *flags, index as u64, *offset, payload));
            }
            let whole = decode(&stream, &[usize::MAX]);
            let expected = requests.iter().position(|request| request.0 == 2).map_or(requests.len(), |at| at + 1);
            prop_assert_eq!(whole.len(), expected);
            prop_assert_eq!(whole, decode(&stream, &pieces));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), piece in 1usize..300) {
            decode(&bytes, &[piece]);
        }
    }
}
