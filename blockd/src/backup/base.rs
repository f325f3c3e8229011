//! Whether a volume shows what a stream rests on.

use super::diff::Changes;
use super::error::BackupError;
use super::pieces;
use crate::admin::AdminErrorKind;
use crate::client::{Client, ClientError, Volume};

/// Fails unless the volume has the bytes of its snapshot `from`, or nothing at all without one. What
/// was rewritten with what it had is no difference.
pub(super) async fn check_base(
    client: &Client,
    volume: &Volume,
    from: Option<&str>,
) -> Result<(), BackupError> {
    let name = volume.name();
    let base = match from {
        None => None,
        Some(from) => Some(open_base(client, name, from).await?),
    };
    let since = match from {
        None => None,
        Some(from) => Some(volume.since(from).await?),
    };
    let mut changes = Changes::new(volume, since);
    while let Some(range) = changes.next().await? {
        for (offset, len) in pieces(range.offset_bytes, range.len_bytes) {
            if let Some(at) = first_difference(volume, base.as_ref(), offset, len).await? {
                return BackupError::refused(different(name, from, at));
            }
        }
    }
    Ok(())
}

fn different(name: &str, from: Option<&str>, at: u64) -> String {
    match from {
        None => format!(
            "volume {name} has data at byte {at}, and the stream is a full one, for an empty volume: \
             import it with --create into a new one"
        ),
        Some(from) => format!(
            "volume {name} has been changed since {name}@{from}, first at byte {at}, and the stream \
             rests on that snapshot: `blockctl snapshot rollback {name}@{from}` first"
        ),
    }
}

async fn open_base(client: &Client, name: &str, from: &str) -> Result<Volume, BackupError> {
    match client.open(&format!("{name}@{from}")).await {
        Err(ClientError::Refused(refusal)) if refusal.kind == AdminErrorKind::NotFound => {
            BackupError::refused(format!(
                "{}, on which the stream rests: import the streams before it first",
                refusal.message
            ))
        }
        opened => Ok(opened?),
    }
}

/// The first byte of the range that is not as in the base; behind its end, and without one, the base
/// has zeros.
async fn first_difference(
    volume: &Volume,
    base: Option<&Volume>,
    offset: u64,
    len: u32,
) -> Result<Option<u64>, ClientError> {
    let here = volume.read(offset, len).await?;
    let known = base.map_or(0, Volume::size_bytes).saturating_sub(offset);
    let known = u32::try_from(known.min(u64::from(len))).unwrap_or(len);
    let there = match base {
        Some(base) if known > 0 => base.read(offset, known).await?,
        _ => bytes::Bytes::new(),
    };
    let there = there.iter().chain(std::iter::repeat(&0));
    let at = here
        .iter()
        .zip(there)
        .position(|(here, there)| here != there);
    Ok(at.map(|at| offset + at as u64))
}
