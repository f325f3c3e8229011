//! Starting the daemon of an attachment, or finding the one that runs.

use crate::failure::Failure;
use blockd::attach::{
    AttachError, AttachErrorKind, ControlReply, ControlRequest, Record, Spec, StateDir, Status,
    VolumeKey, ask, key_of, open,
};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

/// Pause before a daemon that another command is just starting is asked again.
const POLL: Duration = Duration::from_millis(50);

/// Attaches, or finds the attachment that is there already.
pub(super) async fn attach(dir: &StateDir, spec: Spec) -> Result<Status, Failure> {
    let deadline = Instant::now() + spec.open_timeout;
    let key = match resolve(&spec).await {
        Ok(key) => key,
        Err(error) => return running_without_servers(dir, &spec, error).await,
    };
    loop {
        if dir.is_served(&key)? {
            match status(dir, &key, &spec).await {
                Ok(status) => return Ok(agreed(&spec, status)?),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => sleep(POLL).await,
            }
            continue;
        }
        match start(dir, &key, &spec).await {
            Err(error) if error.kind == AttachErrorKind::Served && Instant::now() < deadline => {}
            started => return Ok(started?),
        }
    }
}

async fn resolve(spec: &Spec) -> Result<VolumeKey, AttachError> {
    let (client, volume) = open(spec).await?;
    Ok(key_of(&client, &volume))
}

async fn status(dir: &StateDir, key: &VolumeKey, spec: &Spec) -> Result<Status, AttachError> {
    let socket = dir.control_socket(key);
    match ask(&socket, &ControlRequest::Status, spec.open_timeout).await? {
        ControlReply::Status(status) => Ok(*status),
        _ => Err(AttachError::new(
            AttachErrorKind::System,
            "the daemon answered something else than its status",
        )),
    }
}

/// No server answers: what runs already for this name and these servers is still the answer.
async fn running_without_servers(
    dir: &StateDir,
    spec: &Spec,
    error: AttachError,
) -> Result<Status, Failure> {
    if error.kind != AttachErrorKind::Unreachable {
        return Err(error.into());
    }
    let is_meant = |record: &&Record| {
        let known = &record.spec;
        known.target == spec.target && spec.servers.iter().all(|one| known.servers.contains(one))
    };
    let records = dir.list()?;
    let Some(record) = records.iter().find(is_meant) else {
        return Err(error.into());
    };
    match status(dir, &record.key, spec).await {
        Ok(status) => Ok(agreed(spec, status)?),
        Err(_) => Err(error.into()),
    }
}

/// What runs must be what is asked for.
fn agreed(spec: &Spec, status: Status) -> Result<Status, AttachError> {
    let place = status.device.as_ref().or(status.socket.as_ref());
    let place = place.map(|path| path.display().to_string());
    let place = place.unwrap_or_default();
    let different = if spec.socket != status.socket {
        Some("in another place")
    } else if spec.device.is_some() && spec.device != status.device {
        Some("as another device")
    } else if spec.read_only && !status.read_only {
        Some("for writing")
    } else if !spec.read_only && status.read_only && !spec.target.contains('@') {
        Some("read-only")
    } else if spec.exclusive && !status.exclusive {
        Some("without --exclusive")
    } else {
        None
    };
    let Some(different) = different else {
        return Ok(status);
    };
    let volume = &status.volume;
    let text = format!(
        "{volume} is attached here already, at {place}, {different}; `blockctl detach {volume}` first"
    );
    Err(AttachError::new(AttachErrorKind::Conflict, text))
}

/// Runs the daemon and waits until it works or has said why it does not.
async fn start(dir: &StateDir, key: &VolumeKey, spec: &Spec) -> Result<Status, AttachError> {
    let log = dir.log(key);
    let mut child = spawn(dir, key, spec)
        .map_err(|error| AttachError::system("starting the daemon of the attachment", &error))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        let read = BufReader::new(stdout).read_line(&mut line).await;
        read.map_err(|error| AttachError::system("waiting for the daemon", &error))?;
    }
    let outcome: Result<Result<Status, AttachError>, _> = serde_json::from_str(&line);
    outcome.unwrap_or_else(|_| {
        let text = format!("the daemon ended without a word; see {}", log.display());
        Err(AttachError::new(AttachErrorKind::System, text))
    })
}

fn spawn(dir: &StateDir, key: &VolumeKey, spec: &Spec) -> io::Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.log(key))?;
    let root = dir.path().parent().unwrap_or(dir.path());
    let mut command = std::process::Command::new(std::env::current_exe()?);
    // systemd's last round of kills at shutdown passes over a root process whose name starts so.
    command.arg0("@blockctl");
    command
        .args(["attachment", "serve", "--runtime-dir"])
        .arg(root);
    command
        .stdin(Stdio::from(specification(spec)?))
        .stdout(Stdio::piped())
        .stderr(log);
    Command::from(command).spawn()
}

/// The specification as a file that the daemon reads from its start.
fn specification(spec: &Spec) -> io::Result<File> {
    use std::io::Seek as _;
    let mut file = tempfile::tempfile()?;
    file.write_all(&serde_json::to_vec(spec)?)?;
    file.rewind()?;
    Ok(file)
}
