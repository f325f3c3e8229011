//! What a snapshot consists of, without its data (S003-30): its pages with owners and checksums.
//!
//! The page map is text, one JSON object a line:
//!
//! ```text
//! {"format":"blockd page map","version":1,"volume":..,"snapshot":..,"size_bytes":..,"page_bytes":..,
//!  "checksum":"crc32","checksum_bytes":65536}
//! {"page":11,"owner":3,"crc32":["89abcdef",null,...]}       each page that has data, in order
//! {"page_count":..,"crc32":".."}                            the last line
//! ```
//!
//! A page has a checksum for each `checksum_bytes` of it, up to the last one with data; `null` where
//! nothing is allocated, which reads as zeros. The checksum in the last line is that of all lines
//! before it with their ends, so a map that was cut off is noticed.

use super::diff::{Changed, Changes};
use super::error::BackupError;
use super::export::{Piece, Sink, read_ranges};
use crate::client::{ClientError, Volume};
use crate::id::{BLOCK_BYTES, NodeNo, PageNo};
use futures_util::stream::{self, Stream, TryStreamExt};
use serde_json::{Value, json};
use std::io::Write;
use std::pin::pin;

const CHECKSUM_BYTES: u64 = 64 << 10;

/// What a page map says in its last line, and how long it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageMap {
    pub page_count: u64,
    pub map_bytes: u64,
}

/// Writes the page map of the snapshot `volume` to `out`; `progress` gets the bytes of the volume that
/// are done.
///
/// # Errors
/// The servers, or `out`.
pub async fn page_map(
    volume: &Volume,
    out: impl Write + Send + 'static,
    progress: impl Fn(u64),
) -> Result<PageMap, BackupError> {
    let info = volume.info();
    let page_bytes = u64::from(info.volume.page_blocks) * BLOCK_BYTES;
    let checksum_bytes = CHECKSUM_BYTES.min(page_bytes);
    let mut lines = Lines::start(out);
    lines
        .put(&json!({
            "format": "blockd page map",
            "version": 1,
            "volume": info.volume.name,
            "snapshot": volume.name().split_once('@').map(|(_, name)| name),
            "size_bytes": info.size_bytes,
            "page_bytes": page_bytes,
            "checksum": "crc32",
            "checksum_bytes": checksum_bytes,
        }))
        .await?;
    let mut page = Page::default();
    let mut page_count = 0;
    let ranges = aligned(Changes::new(volume, None), checksum_bytes, info.size_bytes);
    let mut reads = pin!(read_ranges(volume, ranges));
    while let Some(piece) = reads.try_next().await? {
        let end = piece.end();
        let Piece::Data(offset, data) = piece else {
            continue;
        };
        let checksum_len = usize::try_from(checksum_bytes).unwrap_or(usize::MAX);
        for (at, bytes) in (0u64..).zip(data.chunks(checksum_len)) {
            let at = offset + at * checksum_bytes;
            if page.number != at / page_bytes {
                page_count += page.write(&mut lines, volume).await?;
                page = Page::of(at / page_bytes);
            }
            page.note(at % page_bytes / checksum_bytes, crc32fast::hash(bytes));
        }
        progress(end);
    }
    page_count += page.write(&mut lines, volume).await?;
    let map_bytes = lines.finish(page_count).await?;
    Ok(PageMap {
        page_count,
        map_bytes,
    })
}

/// The ranges, widened to multiples of `unit` and without what an earlier one covers.
fn aligned<'a>(
    changes: Changes<'a>,
    unit: u64,
    size_bytes: u64,
) -> impl Stream<Item = Result<Changed, ClientError>> + 'a {
    let begin = (changes, 0u64);
    stream::try_unfold(begin, move |(mut changes, mut covered)| async move {
        while let Some(range) = changes.next().await? {
            let start = (range.offset_bytes / unit * unit).max(covered);
            let end = (range.end().div_ceil(unit) * unit).min(size_bytes);
            covered = covered.max(end);
            if start < end {
                let range = Changed {
                    offset_bytes: start,
                    len_bytes: end - start,
                    zero: false,
                };
                return Ok::<_, ClientError>(Some((range, (changes, covered))));
            }
        }
        Ok(None)
    })
}

/// A page whose checksums come in order.
#[derive(Default)]
struct Page {
    number: u64,
    checksums: Vec<Value>,
}

impl Page {
    fn of(number: u64) -> Self {
        Self {
            number,
            checksums: Vec::new(),
        }
    }

    fn note(&mut self, index: u64, crc: u32) {
        let index = usize::try_from(index).unwrap_or_default();
        self.checksums.resize(index, Value::Null);
        self.checksums.push(format!("{crc:08x}").into());
    }

    /// Pages written: one, or none if it has no data.
    async fn write(&self, lines: &mut Lines, volume: &Volume) -> Result<u64, BackupError> {
        if self.checksums.is_empty() {
            return Ok(0);
        }
        lines
            .put(&json!({
                "page": self.number,
                "owner": owner(volume, self.number),
                "crc32": self.checksums,
            }))
            .await?;
        Ok(1)
    }
}

fn owner(volume: &Volume, page: u64) -> Option<NodeNo> {
    let page = PageNo(u32::try_from(page).ok()?);
    volume.owner_of(page)
}

struct Lines {
    sink: Sink,
    crc: crc32fast::Hasher,
}

impl Lines {
    fn start(out: impl Write + Send + 'static) -> Self {
        Self {
            sink: Sink::start(out),
            crc: crc32fast::Hasher::new(),
        }
    }

    async fn put(&mut self, line: &Value) -> Result<(), BackupError> {
        let line = format!("{line}\n");
        self.crc.update(line.as_bytes());
        self.sink.put(line.into()).await
    }

    async fn finish(mut self, page_count: u64) -> Result<u64, BackupError> {
        let crc = format!("{:08x}", self.crc.clone().finalize());
        self.put(&json!({"page_count": page_count, "crc32": crc}))
            .await?;
        self.sink.finish().await
    }
}
