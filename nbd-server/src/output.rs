//! Reply bytes on their way to the socket: small pieces gathered in one buffer, payloads by reference, many replies per `writev`.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use crate::limits;

/// Data of at most so many bytes is copied next to its header, which is cheaper than a slice of its own.
const COPY_BYTES: usize = 256;
/// The gathered small pieces are moved to the front of their buffer when so many bytes of it are spent.
const COMPACT_BYTES: usize = 64 << 10;
/// Source of zeroes for clients that do not understand holes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What becomes free when replies are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Budget bytes that the replies held.
    pub(crate) held_bytes: u64,
    /// Requests that are answered.
    pub(crate) replies: u32,
}

enum Body {
    /// The next bytes of `small`.
    Small,
    Data(Bytes),
    Zeroes,
}

struct Segment {
    body: Body,
    left_bytes: usize,
    frees: Sent,
}

/// Queue of reply bytes in order.
#[derive(Default)]
pub(crate) struct Output {
    small: Vec<u8>,
    small_start: usize,
    segments: VecDeque<Segment>,
    left_bytes: usize,
}

impl Output {
    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Bytes that are queued.
    pub(crate) fn left_bytes(&self) -> usize {
        self.left_bytes
    }

    /// Whether so much is queued that it should leave before more is made.
    pub(crate) fn is_much(&self) -> bool {
        self.left_bytes >= limits::SEND_BYTES
    }

    /// Appends bytes by copying.
    pub(crate) fn put_small(&mut self, bytes: &[u8]) {
        if self.small_start >= COMPACT_BYTES {
            self.small.drain(..self.small_start);
            self.small_start = 0;
        }
        self.small.extend_from_slice(bytes);
        match self.segments.back_mut() {
            Some(Segment {
                body: Body::Small,
                left_bytes,
                ..
            }) => {
                *left_bytes += bytes.len();
                self.left_bytes += bytes.len();
            }
            _ => self.put_segment(Body::Small, bytes.len()),
        }
    }

    /// Appends bytes by reference.
    pub(crate) fn put_data(&mut self, data: Bytes) {
        match data.len() {
            0 => {}
            1..=COPY_BYTES => self.put_small(&data),
            len_bytes => self.put_segment(Body::Data(data), len_bytes),
        }
    }

    /// Appends zeroes.
    pub(crate) fn put_zeroes(&mut self, len_bytes: u32) {
        if len_bytes > 0 {
            self.put_segment(Body::Zeroes, len_bytes as usize);
        }
    }

    fn put_segment(&mut self, body: Body, left_bytes: usize) {
        self.left_bytes += left_bytes;
        self.segments.push_back(Segment {
            body,
            left_bytes,
            frees: Sent::default(),
        });
    }

    /// Ends a reply; what it frees is reported when its last byte is sent.
    pub(crate) fn end_reply(&mut self, held_bytes: u64) {
        if let Some(last) = self.segments.back_mut() {
            last.frees.held_bytes += held_bytes;
            last.frees.replies += 1;
        }
    }

    /// Drops everything that is queued (the peer is gone).
    pub(crate) fn discard(&mut self) -> Sent {
        let mut sent = Sent::default();
        self.segments
            .drain(..)
            .for_each(|segment| sent.add(segment.frees));
        self.small.clear();
        self.small_start = 0;
        self.left_bytes = 0;
        sent
    }

    /// One vectored write; ready at once when nothing is queued.
    pub(crate) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Sent>> {
        if self.is_empty() {
            return Poll::Ready(Ok(Sent::default()));
        }
        let mut slices = [IoSlice::new(&[]); limits::WRITE_SLICES];
        let count = self.fill(&mut slices);
        let written = ready!(Pin::new(stream).poll_write_vectored(cx, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        Poll::Ready(Ok(self.advance(written)))
    }

    /// Fills slices from the front of the queue and returns how many.
    fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let (mut count, mut small_start) = (0, self.small_start);
        for segment in &self.segments {
            let mut left_bytes = segment.left_bytes;
            while left_bytes > 0 {
                let Some(slot) = slices.get_mut(count) else {
                    return count;
                };
                let bytes = match &segment.body {
                    Body::Small => &self.small[small_start..small_start + left_bytes],
                    Body::Data(data) => &data[..],
                    Body::Zeroes => &ZEROES[..left_bytes.min(ZEROES.len())],
                };
                if matches!(segment.body, Body::Small) {
                    small_start += bytes.len();
                }
                *slot = IoSlice::new(bytes);
                left_bytes -= bytes.len();
                count += 1;
            }
        }
        count
    }

    /// Removes sent bytes from the front.
    fn advance(&mut self, mut sent_bytes: usize) -> Sent {
        self.left_bytes -= sent_bytes;
        let mut sent = Sent::default();
        while sent_bytes > 0 {
            let Some(front) = self.segments.front_mut() else {
                break;
            };
            let step = sent_bytes.min(front.left_bytes);
            match &mut front.body {
                Body::Small => self.small_start += step,
                Body::Data(data) => data.advance(step),
                Body::Zeroes => {}
            }
            front.left_bytes -= step;
            sent_bytes -= step;
            if front.left_bytes == 0 {
                sent.add(front.frees);
                self.segments.pop_front();
            }
        }
        if self.small_start == self.small.len() {
            self.small.clear();
            self.small_start = 0;
        }
        sent
    }

    /// Everything that is queued, as one vector.
    #[cfg(test)]
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut slices = vec![IoSlice::new(&[]); 4096];
        let count = self.fill(&mut slices);
        slices[..count]
            .iter()
            .flat_map(|slice| slice.to_vec())
            .collect()
    }
}

impl Sent {
    pub(crate) fn add(&mut self, other: Sent) {
        self.held_bytes += other.held_bytes;
        self.replies += other.replies;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Put {
        Small(Vec<u8>),
        Data(Vec<u8>),
        Zeroes(u32),
        End(u64),
    }

    fn put() -> impl Strategy<Value = Put> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..40).prop_map(Put::Small),
            proptest::collection::vec(any::<u8>(), 0..600).prop_map(Put::Data),
            (0u32..200_000).prop_map(Put::Zeroes),
            (0u64..1000).prop_map(Put::End),
        ]
    }

    proptest! {
        #[test]
        fn what_is_put_comes_out_in_order_however_it_is_cut(puts in proptest::collection::vec(put(), 0..40), step in 1usize..100_000) {
            let (mut output, mut expected, mut frees) = (Output::default(), Vec::new(), Sent::default());
            for put in puts {
                match put {
                    Put::Small(bytes) => { output.put_small(&bytes); expected.extend(bytes); }
                    Put::Data(bytes) => { expected.extend(&bytes); output.put_data(bytes.into()); }
                    Put::Zeroes(len) => { output.put_zeroes(len); expected.resize(expected.len() + len as usize, 0); }
                    Put::End(held_bytes) if !output.is_empty() => {
                        output.end_reply(held_bytes);
                        frees.add(Sent { held_bytes, replies: 1 });
                    }
                    Put::End(_) => {}
                }
            }
            let (mut got, mut freed) = (Vec::new(), Sent::default());
            while !output.is_empty() {
                let mut slices = [IoSlice::new(&[]); 3];
                let count = output.fill(&mut slices);
                let part: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).take(step).collect();
                freed.add(output.advance(part.len()));
                got.extend(part);
            }
            prop_assert!(got == expected);
            prop_assert_eq!((freed, output.left_bytes), (frees, 0));
        }
    }
}
