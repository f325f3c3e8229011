//! The leg between a block client of this host and the servers: a volume of the client library as an NBD export.
//!
//! A request that finds no server waits in it and is repeated until the dead timeout, so that the
//! loss of a server is a pause for the kernel or QEMU. Writes that are not flushed are kept and
//! sent again by `client::Volume`.

use super::status::Meter;
use crate::client::{ClientError, IoErrorKind, Volume};
use crate::io::wire::Run;
use bytes::Bytes;
use nbd_server::{
    Export, ExportEntry, ExportError, ExportInfo, Exports, Extent, MetaContext, NbdErrno,
    OpenError, Peer, ReadPart, ReadReply, ZeroFlags,
};
use std::rc::Rc;

/// One attached volume; clones share it.
#[derive(Clone)]
pub(super) struct Leg {
    volume: Volume,
    read_only: bool,
    meter: Rc<Meter>,
}

impl Leg {
    pub(super) fn new(volume: Volume, read_only: bool, meter: Rc<Meter>) -> Self {
        let read_only = read_only || volume.is_read_only();
        Self {
            volume,
            read_only,
            meter,
        }
    }

    pub(super) fn volume(&self) -> &Volume {
        &self.volume
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    async fn count<T>(
        &self,
        request: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ExportError> {
        let _waiting = self.meter.begin();
        request.await.map_err(|error| {
            tracing::error!(volume = self.volume.name(), %error, "request failed");
            self.meter.failed(error.to_string());
            refuse(&error)
        })
    }
}

impl Export for Leg {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(self.volume.size_bytes());
        info.read_only = self.read_only;
        // Nothing but ranges is sent for zeroes, however long they are.
        info.fast_zero = true;
        info
    }

    fn description(&self) -> String {
        format!("volume {}, attached on this host", self.volume.name())
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        let runs = self.count(self.volume.read_runs(offset, len)).await?;
        self.meter.read(u64::from(len));
        let parts = runs.into_iter().map(|run| match run {
            Run::Data(data) => ReadPart::Data(data),
            Run::Hole(len_bytes) => ReadPart::Hole(len_bytes),
        });
        Ok(ReadReply::Parts(parts.collect()))
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ExportError> {
        let len_bytes = data.len() as u64;
        let write = async {
            match fua {
                true => self.volume.write_through(offset, data).await,
                false => self.volume.write(offset, data).await,
            }
        };
        self.count(write).await?;
        self.meter.written(len_bytes);
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.count(self.volume.flush()).await
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), ExportError> {
        let flags = ZeroFlags {
            fua,
            ..ZeroFlags::default()
        };
        self.write_zeroes(offset, len, flags).await
    }

    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), ExportError> {
        let zero = async {
            self.volume.zero(offset, len, flags.no_hole).await?;
            // Rare, and a flush vouches for more than was asked.
            match flags.fua {
                true => self.volume.flush().await,
                false => Ok(()),
            }
        };
        self.count(zero).await
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    async fn block_status(
        &self,
        _context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        let extents = self.count(self.volume.extents(offset, len)).await?;
        let extent =
            |run: crate::client::Extent| Extent::allocation(run.len_bytes, run.hole, run.hole);
        Ok(extents.into_iter().map(extent).collect())
    }
}

/// The exports of `--socket`: the volume under its name and as the default.
#[derive(Clone)]
pub(super) struct LegExports(pub(super) Leg);

impl Exports for LegExports {
    type Export = Leg;

    async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        Ok(vec![ExportEntry {
            name: self.0.volume.name().to_owned(),
            description: self.0.description(),
        }])
    }

    async fn open(&self, name: &str, _peer: &Peer) -> Result<Leg, OpenError> {
        let only = self.0.volume.name();
        match name.is_empty() || name == only {
            true => Ok(self.0.clone()),
            false => Err(OpenError::Unknown(
                format!("this socket has {only:?} only, not {name:?}").into(),
            )),
        }
    }
}

fn refuse(error: &ClientError) -> ExportError {
    let errno = match error {
        ClientError::Io { reason, .. } => match reason {
            IoErrorKind::OutOfRange => NbdErrno::Inval,
            IoErrorKind::ReadOnly => NbdErrno::Perm,
            IoErrorKind::NoSpace => NbdErrno::NoSpc,
            IoErrorKind::Damaged
            | IoErrorKind::Deadline
            | IoErrorKind::Gone
            | IoErrorKind::OlderServer => NbdErrno::Io,
        },
        // A filesystem must stop at once when somebody else has become the writer.
        ClientError::Fenced { .. }
        | ClientError::Leased(_)
        | ClientError::Unreachable { .. }
        | ClientError::Refused(_) => NbdErrno::Io,
    };
    ExportError::new(errno, error.to_string())
}
