//! The audit log, `STATE/audit.log`: one line of JSON for each change that was asked for, by whatever
//! way, done or refused.
//!
//! ```text
//! {"time": "2026-11-21T13:11:01.999Z", "who": "alice", "from": "10.0.0.7:41022", "role": "admin",
//!  "request": {"volume_delete": {"name": "data"}}, "outcome": "done", "message": null, "took_ms": 3.1}
//! ```
//!
//! `who` is the name of the token, else the address; `outcome` is `done` or the kind of the error.
//! The lines are written behind the answers, in their order: a disk that hangs or fails costs lines,
//! and a warning, and never delays a request.

use super::access::Caller;
use crate::admin::{AdminError, AdminRequest};
use crate::control::calendar::rfc3339;
use crate::limits::{AUDIT_BYTES_MAX, AUDIT_LINES_WAITING, AUDIT_REQUEST_BYTES_MAX};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::{spawn_blocking, spawn_local};

/// The file's name in the state directory; the one before it has `.1` behind that.
pub(super) const AUDIT_FILE: &str = "audit.log";

/// Where lines for the log are handed in.
pub(crate) struct AuditLog(mpsc::Sender<String>);

/// What became of a request.
pub(super) struct Outcome<'a> {
    pub(super) unix_ms: u64,
    pub(super) caller: &'a Caller,
    pub(super) request: &'a AdminRequest,
    pub(super) error: Option<&'a AdminError>,
    pub(super) took: Duration,
}

impl AuditLog {
    /// Needs a tokio `LocalSet`.
    pub(super) fn start(path: PathBuf) -> Self {
        let (lines, waiting) = mpsc::channel(AUDIT_LINES_WAITING);
        spawn_local(write_all(path, waiting));
        Self(lines)
    }

    /// Hands a line in.
    pub(super) fn note(&self, outcome: &Outcome<'_>) {
        if let Err(error) = self.0.try_send(outcome.line()) {
            tracing::warn!(%error, "a line of the audit log is lost");
        }
    }
}

impl Outcome<'_> {
    fn line(&self) -> String {
        let line = json!({
            "time": rfc3339(self.unix_ms),
            "who": self.caller.who(),
            "from": self.caller.from,
            "role": self.caller.role.to_string(),
            "request": shortened(self.request),
            "outcome": self.error.map_or("done", |error| error.kind.name()),
            "message": self.error.map(|error| &error.message),
            "took_ms": (self.took.as_secs_f64() * 1e6).round() / 1e3,
        });
        format!("{line}\n")
    }
}

/// A request that would fill the log is told by its beginning, as a text.
fn shortened(request: &AdminRequest) -> Value {
    let value = json!(request);
    let mut text = value.to_string();
    if text.len() <= AUDIT_REQUEST_BYTES_MAX {
        return value;
    }
    text.truncate(text.floor_char_boundary(AUDIT_REQUEST_BYTES_MAX));
    Value::String(format!("{text}..."))
}

async fn write_all(path: PathBuf, mut lines: mpsc::Receiver<String>) {
    while let Some(line) = lines.recv().await {
        let to = path.clone();
        let written = spawn_blocking(move || append(&to, &line, AUDIT_BYTES_MAX)).await;
        if let Err(error) = written.map_err(io::Error::other).flatten() {
            tracing::warn!(path = %path.display(), %error, "a line of the audit log is lost");
        }
    }
}

fn append(path: &Path, line: &str, bytes_max: u64) -> io::Result<()> {
    let bytes = fs::metadata(path).map_or(0, |file| file.len());
    if bytes > 0 && bytes + line.len() as u64 > bytes_max {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    let mut options = File::options();
    let mut file = options.create(true).append(true).mode(0o600).open(path)?;
    file.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::AdminErrorKind;

    #[test]
    fn a_full_log_begins_anew_and_the_one_before_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AUDIT_FILE);
        for number in 0..5 {
            append(&path, &format!("line {number}\n"), 14).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "line 4\n");
        let before = fs::read_to_string(dir.path().join("audit.log.1")).unwrap();
        assert_eq!(before, "line 2\nline 3\n");
    }

    #[test]
    fn a_line_says_who_did_what_and_what_came_of_it() {
        let error = AdminError {
            kind: AdminErrorKind::NotFound,
            message: "there is no volume \"a\"".to_owned(),
        };
        let mut request = AdminRequest::VolumeDelete {
            name: "a".to_owned(),
        };
        let outcome = |request: &AdminRequest| {
            let line = Outcome {
                unix_ms: 1_795_266_661_999,
                caller: &Caller::admin("unix"),
                request,
                error: Some(&error),
                took: Duration::from_micros(3_100),
            };
            serde_json::from_str::<Value>(line.line().trim_end()).unwrap()
        };
        let line = outcome(&request);
        assert_eq!(line["time"], "2026-11-21T13:11:01.999Z");
        assert_eq!(line["request"], json!({"volume_delete": {"name": "a"}}));
        assert_eq!(
            (&line["who"], &line["outcome"]),
            (&json!("unix"), &json!("not_found"))
        );
        assert_eq!(line["took_ms"], 3.1);
        request = AdminRequest::VolumeDelete {
            name: "a".repeat(1 << 20),
        };
        assert!(outcome(&request).to_string().len() < 2 * AUDIT_REQUEST_BYTES_MAX);
    }
}
