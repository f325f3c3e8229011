//! Connections to the servers, and what their errors mean to `blockctl`.

use crate::failure::Failure;
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest};
use blockd::backup::BackupError;
use blockd::client::{Client, ClientError, ClientOptions, Volume};
use bytes::Bytes;
use std::time::Duration;

/// A connection to a group of servers, for the time of one command.
pub(crate) struct Session {
    client: Client,
}

impl Session {
    /// `deadline` bounds the connecting, each request and each IO.
    pub(crate) async fn connect(servers: &[String], deadline: Duration) -> Result<Self, Failure> {
        let options = ClientOptions {
            io_deadline: deadline,
            admin_deadline: deadline,
        };
        let client = Client::connect(servers, options).await?;
        Ok(Self { client })
    }

    /// Asks one server; a refusal is a failure.
    pub(crate) async fn ask(&self, request: AdminRequest) -> Result<AdminReply, Failure> {
        match self.client.admin(request).await? {
            AdminReply::Refused(refusal) => Err(ClientError::Refused(refusal).into()),
            reply => Ok(reply),
        }
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) async fn open(&self, volume: &str) -> Result<Target, Failure> {
        let volume = self.client.open(volume).await?;
        Ok(Target { volume })
    }
}

/// An open volume that is being filled.
pub(crate) struct Target {
    volume: Volume,
}

impl Target {
    pub(crate) async fn write(&self, offset_bytes: u64, data: Bytes) -> Result<(), Failure> {
        Ok(self.volume.write(offset_bytes, data).await?)
    }

    pub(crate) async fn flush(&self) -> Result<(), Failure> {
        Ok(self.volume.flush().await?)
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Client(error) => error.into(),
            BackupError::Refused(message) => Self::Refused {
                kind: AdminErrorKind::Conflict,
                message,
            },
            BackupError::Stream(_)
            | BackupError::Io { .. }
            | BackupError::Damaged(_)
            | BackupError::Archive(_) => Self::Stream(error.to_string()),
            BackupError::Partly { source, aftermath } => Self::Partly {
                source: Box::new((*source).into()),
                aftermath,
            },
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable { .. } => Self::Unreachable(error.to_string()),
            ClientError::Refused(refusal) => Self::Refused {
                kind: refusal.kind,
                message: refusal.message,
            },
            ClientError::Io { .. } | ClientError::Fenced { .. } => {
                Self::VolumeIo(error.to_string())
            }
            ClientError::Leased(_) => Self::Refused {
                kind: AdminErrorKind::Conflict,
                message: error.to_string(),
            },
        }
    }
}
