//! The control socket of an attachment: one request and one answer a connection, each a line of JSON.

use super::error::{AttachError, AttachErrorKind};
use super::status::Status;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Bytes of one line: a status with many servers is far below.
const LINE_BYTES: u64 = 1 << 20;
/// How long a client may take to say what it wants.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlRequest {
    Status,
    /// Flushes, gives the device back and ends the daemon; `force` also under users.
    Detach {
        force: bool,
    },
    /// Asks this server first from now on.
    Move {
        to: String,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlReply {
    Status(Box<Status>),
    Done,
    Refused(AttachError),
}

/// A request that waits for its answer.
pub(super) struct Asked {
    pub(super) request: ControlRequest,
    pub(super) answer: oneshot::Sender<ControlReply>,
}

/// Listens at `path`, for this user only; what a dead daemon left there is replaced.
pub(super) fn listen(path: &Path) -> Result<UnixListener, AttachError> {
    let failed = |error: io::Error| AttachError::system(path.display(), &error);
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, private).map_err(failed)?;
    Ok(listener)
}

/// Hands every request to `asked`, for ever.
pub(super) async fn serve(listener: UnixListener, asked: mpsc::Sender<Asked>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(answer(stream, asked.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "control socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: UnixStream, asked: mpsc::Sender<Asked>) {
    let reply = match timeout(REQUEST_DEADLINE, read_line(&mut stream)).await {
        Ok(Ok(request)) => {
            let (answer, answered) = oneshot::channel();
            let _ = asked.send(Asked { request, answer }).await;
            answered.await.ok()
        }
        Ok(Err(error)) => Some(ControlReply::Refused(AttachError::new(
            AttachErrorKind::Invalid,
            format!("not a request: {error}"),
        ))),
        Err(_) => None,
    };
    if let Some(reply) = reply
        && let Err(error) = write_line(&mut stream, &reply).await
    {
        tracing::debug!(%error, "control client went away");
    }
}

/// Asks the daemon at `path`.
///
/// # Errors
/// It does not answer, or refuses.
pub async fn ask(
    path: &Path,
    request: &ControlRequest,
    patience: Duration,
) -> Result<ControlReply, AttachError> {
    let talk = async {
        let mut stream = UnixStream::connect(path).await?;
        write_line(&mut stream, request).await?;
        read_line(&mut stream).await
    };
    match timeout(patience, talk).await {
        Ok(Ok(ControlReply::Refused(error))) => Err(error),
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(error)) => Err(AttachError::system(path.display(), &error)),
        Err(_) => Err(AttachError::new(
            AttachErrorKind::Unreachable,
            format!(
                "the daemon at {} did not answer within {patience:?}",
                path.display()
            ),
        )),
    }
}

async fn write_line<T: Serialize>(stream: &mut UnixStream, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

async fn read_line<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<T> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream.take(LINE_BYTES));
    reader.read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask_once(line: &'static [u8]) -> ControlReply {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        let listener = listen(&path).unwrap();
        let (sender, mut asked) = mpsc::channel(1);
        let local = tokio::task::LocalSet::new();
        local.spawn_local(serve(listener, sender));
        local.spawn_local(async move {
            while let Some(Asked { answer, .. }) = asked.recv().await {
                let _ = answer.send(ControlReply::Done);
            }
        });
        local
            .run_until(async {
                let mut stream = UnixStream::connect(&path).await.unwrap();
                stream.write_all(line).await.unwrap();
                read_line(&mut stream).await.unwrap()
            })
            .await
    }

    #[tokio::test]
    async fn a_request_is_answered_and_nonsense_is_refused() {
        let done = ask_once(b"{\"move\":{\"to\":\"b\"}}\n").await;
        assert!(matches!(done, ControlReply::Done), "{done:?}");
        let refused = ask_once(b"{\"fly\":{}}\n").await;
        assert!(matches!(refused, ControlReply::Refused(_)), "{refused:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_is_gone_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.sock");
        drop(listen(&path).unwrap());
        let asked = ask(&path, &ControlRequest::Status, REQUEST_DEADLINE).await;
        assert_eq!(asked.unwrap_err().kind, AttachErrorKind::System);
    }
}
