//! One connection that is fed with any bytes, in pieces of any size, over an export that is always
//! ready. Shared by the fuzz targets and by the tests of the crate, which replay the seeds.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use nbd_server::{
    ConnectionError, Export, ExportEntry, ExportError, ExportInfo, Exports, Extent, MetaContext,
    OpenError, Peer, ReadPart, ReadReply, ServeOptions, ZeroFlags, serve_connection,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Size of the export in bytes.
pub const SIZE: u64 = 1 << 20;
/// Name of the export.
pub const NAME: &str = "disk";
/// Blocks that are all zero are sent as holes.
const BLOCK_BYTES: usize = 4096;
/// Paused time: a connection that waits for anything has hung.
const HUNG: Duration = Duration::from_secs(24 * 3600);

/// What the server said, how the connection ended, and the export afterwards.
pub struct Outcome {
    pub said: Vec<u8>,
    pub ended: Result<(), ConnectionError>,
    pub disk: Vec<u8>,
}

/// Feeds a connection with `sent` in pieces of these sizes (in turn; none means at once), then
/// closes it.
pub fn run(sent: &[u8], pieces: &[usize]) -> Outcome {
    let disk = Disk(Rc::new(RefCell::new(vec![0; SIZE as usize])));
    let (said, ended) = serve(disk.clone(), sent, pieces, usize::MAX);
    let disk = disk.0.take();
    Outcome { said, ended, disk }
}

/// Feeds a connection; what it said (it breaks after so many bytes) and how it ended.
pub fn serve(
    exports: impl Exports,
    sent: &[u8],
    pieces: &[usize],
    breaks_at: usize,
) -> (Vec<u8>, Result<(), ConnectionError>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let said = Rc::<RefCell<Vec<u8>>>::default();
    let feed = Feed {
        left: sent.to_vec(),
        pieces: pieces.to_vec(),
        turn: 0,
        said: Rc::clone(&said),
        breaks_at,
    };
    let served = serve_connection(feed, Peer::default(), exports, ServeOptions::default());
    let ended = runtime.block_on(async { tokio::time::timeout(HUNG, served).await });
    (said.take(), ended.expect("the connection hangs"))
}

/// The client's side: everything to send is there, everything said is kept. Every third turn it is
/// not ready, unless everything goes at once.
struct Feed {
    left: Vec<u8>,
    pieces: Vec<usize>,
    turn: usize,
    said: Rc<RefCell<Vec<u8>>>,
    breaks_at: usize,
}

impl Feed {
    /// Bytes of the next piece.
    fn piece(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        if self.pieces.is_empty() {
            return Poll::Ready(usize::MAX);
        }
        self.turn += 1;
        if self.turn.is_multiple_of(3) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.pieces[self.turn % self.pieces.len()].max(1))
    }
}

impl AsyncRead for Feed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let piece = ready!(self.piece(cx));
        let step = piece.min(buffer.remaining()).min(self.left.len());
        buffer.put_slice(&self.left[..step]);
        self.left.drain(..step);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Feed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let piece = ready!(self.piece(cx));
        let room = self.breaks_at - self.said.borrow().len();
        let step = piece.min(room).min(bytes.len());
        if step == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.said.borrow_mut().extend_from_slice(&bytes[..step]);
        Poll::Ready(Ok(step))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// An export of [`SIZE`] bytes in memory.
#[derive(Clone)]
pub struct Disk(pub Rc<RefCell<Vec<u8>>>);

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    offset as usize..(offset + len) as usize
}

/// Lengths of the parts of a range that lie in one block each.
fn blocks(offset: u64, len: u64) -> impl Iterator<Item = u64> {
    let (mut at, end) = (offset, offset + len);
    std::iter::from_fn(move || {
        let next = ((at / BLOCK_BYTES as u64 + 1) * BLOCK_BYTES as u64).min(end);
        let step = next - at;
        at = next;
        (step > 0).then_some(step)
    })
}

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            fast_zero: true,
            ..ExportInfo::new(SIZE)
        }
    }

    fn description(&self) -> String {
        "a disk of bytes".to_owned()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        let disk = self.0.borrow();
        let mut at = offset;
        let part = |len: u64| {
            let data = &disk[range(at, len)];
            at += len;
            match data.iter().all(|byte| *byte == 0) {
                true => ReadPart::Hole(data.len() as u32),
                false => ReadPart::Data(Bytes::copy_from_slice(data)),
            }
        };
        let parts = blocks(offset, u64::from(len)).map(part).collect();
        Ok(ReadReply::Parts(parts))
    }

    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), ExportError> {
        let range = range(offset, data.len() as u64);
        self.0.borrow_mut()[range].copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64, _fua: bool) -> Result<(), ExportError> {
        self.0.borrow_mut()[range(offset, len)].fill(0);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> Result<(), ExportError> {
        self.trim(offset, len, false).await
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    fn contexts(&self) -> Vec<MetaContext> {
        vec![
            MetaContext::Allocation,
            MetaContext::DirtyBitmap("b".into()),
        ]
    }

    async fn block_status(
        &self,
        _context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        let disk = self.0.borrow();
        let mut at = offset;
        let extent = |len: u64| {
            let is_zero = disk[range(at, len)].iter().all(|byte| *byte == 0);
            at += len;
            Extent::allocation(len, is_zero, is_zero)
        };
        Ok(blocks(offset, len).map(extent).collect())
    }
}

impl Exports for Disk {
    type Export = Self;

    async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        Ok(vec![ExportEntry {
            name: NAME.to_owned(),
            description: self.description(),
        }])
    }

    async fn open(&self, name: &str, _peer: &Peer) -> Result<Self, OpenError> {
        match name {
            NAME => Ok(self.clone()),
            _ => Err(OpenError::Unknown("there is no such disk".into())),
        }
    }
}
