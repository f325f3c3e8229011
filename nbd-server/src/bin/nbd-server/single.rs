//! The list of exports of this program: one.

use std::borrow::Cow;
use std::rc::Rc;

use nbd_server::{Export, ExportEntry, Exports, OpenError, Peer};

/// One export under one name, or under every name.
#[derive(Clone)]
pub(crate) struct Single<E> {
    name: Option<Rc<str>>,
    export: E,
}

impl<E: Export> Single<E> {
    pub(crate) fn new(name: Option<String>, export: E) -> Self {
        Self {
            name: name.map(Rc::from),
            export,
        }
    }
}

impl<E: Export> Exports for Single<E> {
    type Export = E;

    async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        let name = self.name.as_deref().unwrap_or_default().to_owned();
        Ok(vec![ExportEntry {
            name,
            description: self.export.description(),
        }])
    }

    async fn open(&self, name: &str, _peer: &Peer) -> Result<E, OpenError> {
        match self.name.as_deref() {
            Some(own) if own != name && !name.is_empty() => Err(OpenError::Unknown(Cow::Owned(
                format!("there is no export `{name}` here, only `{own}`"),
            ))),
            _ => Ok(self.export.clone()),
        }
    }
}
