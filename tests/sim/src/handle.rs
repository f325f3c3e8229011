//! A volume as a lane uses it: by the client library, or through one server.

use crate::entry::{Connection, EntryError, Request};
use crate::history::BLOCK;
use crate::world::World;
use blockd::admin::AdminErrorKind;
use blockd::client::{ClientError, IoErrorKind, Volume};
use blockd::data::error::DataError;
use bytes::Bytes;
use std::fmt;
use std::rc::Rc;

pub(crate) enum Handle<'a> {
    Direct(usize, &'a Volume),
    Entry(Rc<Connection>),
}

/// Why an operation failed.
#[derive(Debug)]
pub(crate) enum Failure {
    Client(ClientError),
    Entry(EntryError),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<EntryError> for Failure {
    fn from(error: EntryError) -> Self {
        Self::Entry(error)
    }
}

fn bytes(block: u32) -> u64 {
    u64::from(block) * BLOCK as u64
}

impl Handle<'_> {
    /// Who the checkers take its user for.
    pub(crate) fn client(&self) -> usize {
        match self {
            Self::Direct(client, _) => *client,
            Self::Entry(connection) => connection.client(),
        }
    }

    pub(crate) async fn read(&self, first: u32, blocks: u32) -> Result<Vec<u8>, Failure> {
        let (at, len) = (bytes(first), blocks * BLOCK as u32);
        Ok(match self {
            Self::Direct(_, volume) => volume.read(at, len).await?.into(),
            Self::Entry(connection) => connection.call(Request::Read(at, len)).await?,
        })
    }

    pub(crate) async fn write(&self, first: u32, data: Bytes, fua: bool) -> Result<(), Failure> {
        let at = bytes(first);
        match self {
            Self::Direct(_, volume) if fua => volume.write_through(at, data).await?,
            Self::Direct(_, volume) => volume.write(at, data).await?,
            Self::Entry(connection) => drop(connection.call(Request::Write(at, data, fua)).await?),
        }
        Ok(())
    }

    pub(crate) async fn zero(&self, first: u32, blocks: u32, keep: bool) -> Result<(), Failure> {
        let (at, len) = (bytes(first), bytes(blocks));
        match self {
            Self::Direct(_, volume) => volume.zero(at, len, keep).await?,
            Self::Entry(connection) => drop(connection.call(Request::Zero(at, len, keep)).await?),
        }
        Ok(())
    }

    pub(crate) async fn flush(&self) -> Result<(), Failure> {
        match self {
            Self::Direct(_, volume) => volume.flush().await?,
            Self::Entry(connection) => drop(connection.call(Request::Flush).await?),
        }
        Ok(())
    }
}

impl Failure {
    /// Its kind, to be counted.
    pub(crate) fn kind(&self) -> String {
        match self {
            Self::Client(ClientError::Io { reason, .. }) => format!("client error: {reason:?}"),
            Self::Client(ClientError::Refused(refusal)) => {
                format!("client error: refused {:?}", refusal.kind)
            }
            Self::Client(ClientError::Unreachable { .. }) => "client error: unreachable".into(),
            Self::Client(ClientError::Leased(_)) => "client error: leased".into(),
            Self::Client(ClientError::Fenced { .. }) => "client error: fenced".into(),
            Self::Entry(EntryError::Refused(error)) => format!("entry error: {:?}", error.status()),
            Self::Entry(EntryError::Lost) => "entry error: the connection ended".into(),
            Self::Entry(EntryError::Overtaken) => "entry error: flush overtaken".into(),
        }
    }

    /// Whether the faults of this run explain it.
    pub(crate) fn has_cause(&self, world: &World, is_flush: bool) -> bool {
        let damaged = || world.is_damaged() || world.has_failed_disks();
        match self {
            Self::Client(ClientError::Io { reason, .. }) => match reason {
                IoErrorKind::NoSpace | IoErrorKind::Deadline => true,
                IoErrorKind::Damaged => damaged(),
                _ => false,
            },
            Self::Client(ClientError::Refused(refusal)) => {
                refusal.kind == AdminErrorKind::Unavailable
            }
            Self::Client(error) => matches!(error, ClientError::Unreachable { .. }),
            Self::Entry(EntryError::Refused(error)) => match error {
                DataError::NoSpace | DataError::Unavailable(_) => true,
                DataError::Damaged(_) => damaged() || (is_flush && world.has_lost()),
                _ => false,
            },
            Self::Entry(EntryError::Lost | EntryError::Overtaken) => true,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(error) => write!(f, "{error}"),
            Self::Entry(EntryError::Refused(error)) => write!(f, "through a server: {error}"),
            Self::Entry(error) => write!(f, "through a server: {error:?}"),
        }
    }
}
