//! Why a command failed: what a person reads, what a program reads, and the exit code.

use crate::attach::TabError;
use blockd::admin::AdminErrorKind;
use blockd::attach::AttachError;
use std::path::PathBuf;

/// Everything that ends a command other than success.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// No server answered.
    #[error(
        "{0}\n  is `blockd serve` running there? name other servers with --servers or BLOCKD_SERVERS"
    )]
    Unreachable(String),
    /// A server understood the request and said no.
    #[error("{message}")]
    Refused {
        kind: AdminErrorKind,
        message: String,
    },
    /// Reading or writing the volume itself failed.
    #[error("{0}")]
    VolumeIo(String),
    #[error("{what} was answered by a reply that blockctl {version} does not expect; compare with `blockctl version`", version = env!("CARGO_PKG_VERSION"))]
    UnexpectedReply { what: &'static str },
    #[error("{what} {path}: {source}", path = path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{tool} is not installed here; it comes with the package {package} (apt-get install {package})"
    )]
    MissingTool {
        tool: &'static str,
        package: &'static str,
    },
    #[error("{tool} failed: {reason}")]
    Tool { tool: String, reason: String },
    #[error("{0}")]
    Attach(#[from] AttachError),
    #[error("{0}")]
    Tab(#[from] TabError),
    #[error("interrupted")]
    Interrupted,
    /// A stream or an archive is not as it must be.
    #[error("{0}")]
    Stream(String),
    /// It went wrong after something was changed.
    #[error("{source}; {aftermath}")]
    Partly {
        source: Box<Failure>,
        aftermath: String,
    },
    /// `volume create --format` went wrong after the volume existed.
    #[error("no {format} filesystem on volume {volume}: {source}; {aftermath}")]
    Format {
        volume: String,
        format: &'static str,
        source: Box<Failure>,
        aftermath: String,
    },
}

impl Failure {
    /// 1: refused or failed; 3: nobody able to answer was reached, so trying again may help.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable(_)
            | Self::Refused {
                kind: AdminErrorKind::Unavailable,
                ..
            } => 3,
            Self::Attach(error) if error.kind.may_pass() => 3,
            Self::Partly { source, .. } => source.exit_code(),
            _ => 1,
        }
    }

    /// The `kind` of `--json` errors: part of the documented output.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "unreachable",
            Self::Refused { kind, .. } => kind.name(),
            Self::Attach(error) => error.kind.name(),
            Self::VolumeIo(_) => "io",
            Self::UnexpectedReply { .. } => "unexpected_reply",
            Self::File { .. } | Self::Tab(_) => "file",
            Self::MissingTool { .. } => "missing_tool",
            Self::Tool { .. } => "tool",
            Self::Interrupted => "interrupted",
            Self::Stream(_) => "stream",
            Self::Partly { source, .. } => source.kind(),
            Self::Format { .. } => "format",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_by_itself_exits_with_3() {
        let refused = |kind| Failure::Refused {
            kind,
            message: "no".to_owned(),
        };
        assert_eq!(Failure::Unreachable("x".to_owned()).exit_code(), 3);
        assert_eq!(refused(AdminErrorKind::Unavailable).exit_code(), 3);
        assert_eq!(refused(AdminErrorKind::NotFound).exit_code(), 1);
        assert_eq!(Failure::Interrupted.exit_code(), 1);
    }

    #[test]
    fn a_failed_format_tells_why_and_what_became_of_the_volume() {
        let failure = Failure::Format {
            volume: "demo".to_owned(),
            format: "ext4",
            source: Box::new(Failure::Interrupted),
            aftermath: "the volume was deleted again".to_owned(),
        };
        assert_eq!(
            failure.to_string(),
            "no ext4 filesystem on volume demo: interrupted; the volume was deleted again"
        );
    }
}
