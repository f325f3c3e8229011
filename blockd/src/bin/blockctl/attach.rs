//! `attach`, `detach` and `attachment`: volumes as devices or sockets of this host.

mod args;
mod start;
mod tab;
mod text;

pub(crate) use args::{Attach, AttachmentVerb, Detach};
pub(crate) use tab::TabError;

use crate::args::{Cli, Noun};
use crate::failure::Failure;
use crate::output::print;
use blockd::attach::{
    AttachError, AttachErrorKind, ControlReply, ControlRequest, Ready, Record, Spec, StateDir,
    Status, ask,
};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// How often, and for how long in all, a daemon that ends is waited for.
const ENDING_POLL: Duration = Duration::from_millis(50);
const ENDING_POLLS: u32 = 40;

/// `blockctl attach`.
pub(crate) async fn attach(cli: &Cli, args: &Attach) -> Result<(), Failure> {
    if args.all {
        return attach_all(cli, args).await;
    }
    let status = match (args.tab, &args.target) {
        (true, Some(target)) => {
            attach_line(cli, args, &tab::line_of(&args.tab_file, target)?).await
        }
        _ => attach_one(cli, args, args).await,
    };
    let Some(status) = status? else {
        return Ok(());
    };
    if cli.json {
        return print(&json!(status).to_string());
    }
    print(&text::place(&status))
}

/// Every line is tried; the last failure is that of the command.
async fn attach_all(cli: &Cli, args: &Attach) -> Result<(), Failure> {
    let (mut all, mut last) = (Vec::new(), Ok(()));
    for line in tab::read(&args.tab_file)?.iter().filter(|line| line.auto) {
        match attach_line(cli, args, line).await {
            Ok(status) => all.extend(status),
            Err(failure) => {
                eprintln!("blockctl: {}: {failure}", line.target);
                last = Err(failure);
            }
        }
    }
    match cli.json {
        true => print(&json!(all).to_string())?,
        false => print(&text::list(&all))?,
    }
    last
}

/// `outer` is the command that named the tab file: what it says of this host holds.
async fn attach_line(
    cli: &Cli,
    outer: &Attach,
    line: &tab::TabLine,
) -> Result<Option<Status>, Failure> {
    let command = line.command(cli)?;
    let Noun::Attach(args) = &command.noun else {
        return Ok(None);
    };
    attach_one(&command, args, outer).await
}

/// `None` once an attachment in the foreground has ended.
async fn attach_one(cli: &Cli, args: &Attach, outer: &Attach) -> Result<Option<Status>, Failure> {
    let dir = StateDir::open(outer.runtime.dir())?;
    let spec = args.spec(cli)?;
    if outer.foreground {
        start_log();
        blockd::attach::run(spec, &dir, Ready::Notify).await?;
        return Ok(None);
    }
    start::attach(&dir, spec).await.map(Some)
}

/// `blockctl detach`.
pub(crate) async fn detach(cli: &Cli, args: &Detach) -> Result<(), Failure> {
    let dir = StateDir::open(args.runtime.dir())?;
    let record = dir.find(&args.name)?;
    if dir.is_served(&record.key)? {
        let force = args.force;
        control(cli, &dir, &record, &ControlRequest::Detach { force }).await?;
    } else {
        blockd::attach::detach_unserved(&record, args.force).await?;
        dir.remove(&record.key)?;
    }
    if cli.json {
        return print(&json!({"done": true}).to_string());
    }
    print(&format!("{} is detached", record.spec.target))
}

/// `blockctl attachment ...`.
pub(crate) async fn attachment(cli: &Cli, verb: &AttachmentVerb) -> Result<(), Failure> {
    match verb {
        AttachmentVerb::List { runtime } => list(cli, &StateDir::open(runtime.dir())?).await,
        AttachmentVerb::Status { name, runtime } => {
            let dir = StateDir::open(runtime.dir())?;
            let status = status_of(cli, &dir, &dir.find(name)?).await?;
            show(cli, &status.ok_or_else(|| not_attached(name))?)
        }
        AttachmentVerb::Move { name, to, runtime } => {
            let dir = StateDir::open(runtime.dir())?;
            let record = dir.find(name)?;
            let to = to.clone();
            let reply = control(cli, &dir, &record, &ControlRequest::Move { to }).await?;
            match reply {
                ControlReply::Status(status) if cli.json => print(&json!(status).to_string()),
                ControlReply::Status(status) => print(&text::moved(&status)),
                _ => Err(unexpected()),
            }
        }
        AttachmentVerb::Name { device, runtime } => {
            let dir = StateDir::open(runtime.dir())?;
            let target = blockd::attach::name_of(&dir, device)?;
            match cli.json {
                true => print(&json!({"volume": target}).to_string()),
                false => print(&target),
            }
        }
        AttachmentVerb::Serve { runtime } => serve(&StateDir::open(runtime.dir())?).await,
    }
}

/// The daemon that `start` runs: its specification comes on standard input.
async fn serve(dir: &StateDir) -> Result<(), Failure> {
    start_log();
    let spec: Spec = serde_json::from_reader(std::io::stdin().lock()).map_err(|error| {
        let text = format!("the specification on standard input: {error}");
        AttachError::new(AttachErrorKind::Invalid, text)
    })?;
    let left = rustix::process::setsid()
        .map_err(std::io::Error::from)
        .and_then(|_| std::env::set_current_dir("/"));
    left.map_err(|error| AttachError::system("leaving the terminal", &error))?;
    Ok(blockd::attach::run(spec, dir, Ready::Pipe).await?)
}

async fn list(cli: &Cli, dir: &StateDir) -> Result<(), Failure> {
    let mut all = Vec::new();
    for record in dir.list()? {
        all.extend(status_of(cli, dir, &record).await?);
    }
    if cli.json {
        return print(&json!(all).to_string());
    }
    print(&text::list(&all))
}

/// What the daemon says, or the record if there is no daemon; nothing if it was detached meanwhile.
async fn status_of(cli: &Cli, dir: &StateDir, record: &Record) -> Result<Option<Status>, Failure> {
    let mut ended = None;
    for _ in 0..ENDING_POLLS {
        if !dir.is_served(&record.key)? {
            let left = dir.load(&record.key)?;
            return Ok(left.as_ref().map(Status::of_record));
        }
        match control(cli, dir, record, &ControlRequest::Status).await {
            Ok(ControlReply::Status(status)) => return Ok(Some(*status)),
            Ok(_) => return Err(unexpected()),
            // Its socket is gone a moment before its lock when it ends just now.
            Err(failure) => ended = Some(failure),
        }
        tokio::time::sleep(ENDING_POLL).await;
    }
    Err(ended.unwrap_or_else(unexpected))
}

async fn control(
    cli: &Cli,
    dir: &StateDir,
    record: &Record,
    request: &ControlRequest,
) -> Result<ControlReply, Failure> {
    if !dir.is_served(&record.key)? {
        let text = format!(
            "the daemon of {target} is gone; `blockctl attach {target}` starts it again",
            target = record.spec.target
        );
        return Err(AttachError::new(AttachErrorKind::NotAttached, text).into());
    }
    let socket = dir.control_socket(&record.key);
    Ok(ask(&socket, request, cli.timeout).await?)
}

fn show(cli: &Cli, status: &Status) -> Result<(), Failure> {
    match cli.json {
        true => print(&json!(status).to_string()),
        false => print(&text::status(status)),
    }
}

fn not_attached(name: &str) -> Failure {
    let text = format!("{name} is not attached here any more");
    AttachError::new(AttachErrorKind::NotAttached, text).into()
}

fn unexpected() -> Failure {
    Failure::UnexpectedReply {
        what: "a request to the daemon of the attachment",
    }
}

/// The daemon's log goes to its standard error: a file, or systemd's journal.
fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("BLOCKD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
}

/// An absolute path, also of something that is not there yet.
fn absolute(path: &Path) -> Result<std::path::PathBuf, Failure> {
    Ok(std::path::absolute(path).map_err(|error| AttachError::system(path.display(), &error))?)
}
