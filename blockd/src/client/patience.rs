//! Whether a request of the client library is tried again, and what must happen before.

use super::volume::{TryError, Volume, failed};
use super::{ClientError, IoErrorKind};
use crate::admin::AdminErrorKind;
use crate::data::error::DataError;
use crate::data::forward::ForwardError;
use crate::io::link::LinkError;
use crate::limits::FORWARD_RETRY_MS;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The patience with one request.
pub(super) struct Patience {
    deadline: Instant,
    /// What it is, its offset and length in bytes.
    request: (&'static str, u64, u64),
}

impl Patience {
    pub(super) fn new(patience: Duration, request: (&'static str, u64, u64)) -> Self {
        Self {
            deadline: Instant::now() + patience,
            request,
        }
    }

    /// Returns when the request may be tried again.
    ///
    /// # Errors
    /// The error of the request, when another try is hopeless or too late.
    pub(super) async fn after(
        &mut self,
        volume: &Volume,
        error: TryError,
    ) -> Result<(), ClientError> {
        let (what, offset, len) = self.request;
        let pause = match &error {
            TryError::Lost => match volume.replay().await {
                Ok(()) => Ok(Duration::ZERO),
                Err(TryError::Lost) => Ok(Duration::from_millis(FORWARD_RETRY_MS)),
                Err(TryError::Forward(error)) => self.pause(volume, &error).await?,
            },
            TryError::Forward(error) => self.pause(volume, error).await?,
        };
        let pause = pause.map_err(|kind| failed(what, offset, len, kind))?;
        if Instant::now() + pause >= self.deadline {
            tracing::warn!(?error, "gave up");
            return Err(failed(what, offset, len, IoErrorKind::Deadline));
        }
        sleep(pause).await;
        Ok(())
    }

    async fn pause(
        &self,
        volume: &Volume,
        error: &ForwardError,
    ) -> Result<Result<Duration, IoErrorKind>, ClientError> {
        let retry = Duration::from_millis(FORWARD_RETRY_MS);
        let error = match error {
            ForwardError::Link(LinkError::Lost { .. }) => return Ok(Ok(retry)),
            ForwardError::Link(_) => return Ok(Ok(5 * retry)),
            ForwardError::Data(error) => error,
        };
        Ok(match error {
            DataError::Held => Ok(Duration::from_millis(1)),
            DataError::Unavailable(_) => Ok(retry),
            DataError::Stale(_) => {
                self.refresh(volume).await?;
                Ok(retry)
            }
            DataError::NoSpace => Err(IoErrorKind::NoSpace),
            DataError::ReadOnly => Err(IoErrorKind::ReadOnly),
            DataError::Leased(reason) => {
                volume.shared.lease.lose(reason);
                return Err(self.fenced(reason));
            }
            DataError::OutOfRange => Err(IoErrorKind::OutOfRange),
            DataError::Gone => Err(IoErrorKind::Gone),
            DataError::Damaged(_) | DataError::Malformed(_) => {
                tracing::error!(%error, volume = %volume.shared.name, "request failed");
                Err(IoErrorKind::Damaged)
            }
        })
    }

    fn fenced(&self, reason: &str) -> ClientError {
        let (what, offset_bytes, len_bytes) = self.request;
        ClientError::Fenced {
            what,
            offset_bytes,
            len_bytes,
            reason: reason.to_owned(),
        }
    }

    async fn refresh(&self, volume: &Volume) -> Result<(), ClientError> {
        let in_time = Instant::now() < self.deadline;
        match volume.refresh().await {
            Err(ClientError::Unreachable { .. }) if in_time => Ok(()),
            Err(ClientError::Refused(refusal))
                if in_time && refusal.kind == AdminErrorKind::Unavailable =>
            {
                Ok(())
            }
            other => other,
        }
    }
}
