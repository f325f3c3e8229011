//! Why an attachment was not made, changed or found; travels as JSON from the daemon to the command.

use crate::admin::AdminErrorKind;
use crate::client::ClientError;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::io;

/// A kind for programs and a sentence for people, like an [`crate::admin::AdminError`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AttachError {
    pub kind: AttachErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachErrorKind {
    /// No server was reached.
    Unreachable,
    /// A server said no.
    Refused(AdminErrorKind),
    /// The volume is attached here in another way, or another host has it.
    Conflict,
    /// Its daemon runs already.
    Served,
    /// The device or socket is used by somebody.
    Busy,
    /// Nothing of this name is attached here.
    NotAttached,
    /// This user may not do it.
    Permission,
    /// The kernel has no nbd.
    NoModule,
    /// What was asked for makes no sense.
    Invalid,
    /// The system refused something.
    System,
}

impl AttachErrorKind {
    /// The name in `--json` errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Refused(kind) => kind.name(),
            Self::Conflict | Self::Served => "conflict",
            Self::Busy => "busy",
            Self::NotAttached => "not_attached",
            Self::Permission => "permission",
            Self::NoModule => "no_module",
            Self::Invalid => "invalid",
            Self::System => "system",
        }
    }

    /// Whether nobody able to answer was reached, so that trying again may help.
    #[must_use]
    pub fn may_pass(self) -> bool {
        matches!(
            self,
            Self::Unreachable | Self::Refused(AdminErrorKind::Unavailable)
        )
    }
}

impl AttachError {
    pub fn new(kind: AttachErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// A system call that failed at `what`.
    pub fn system(what: impl Display, error: &io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::PermissionDenied => AttachErrorKind::Permission,
            _ => AttachErrorKind::System,
        };
        Self::new(kind, format!("{what}: {error}"))
    }
}

impl From<ClientError> for AttachError {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Unreachable { .. } => Self::new(AttachErrorKind::Unreachable, message),
            ClientError::Refused(refusal) => {
                Self::new(AttachErrorKind::Refused(refusal.kind), refusal.message)
            }
            ClientError::Leased(_) => Self::new(AttachErrorKind::Conflict, message),
            ClientError::Io { .. } | ClientError::Fenced { .. } => {
                Self::new(AttachErrorKind::System, message)
            }
        }
    }
}
