//! The process of one attachment: opens the volume, gives it its place, answers `blockctl`, and takes the place down.

use super::control::{self, Asked, ControlReply, ControlRequest};
use super::error::{AttachError, AttachErrorKind};
use super::exclusive;
use super::leg::Leg;
use super::place::Place;
use super::process::{self, Ready};
use super::proxy::left_by;
use super::record::{Lock, Record, Spec, StateDir, VolumeKey};
use super::status::{Meter, ServerStatus, Status};
use crate::client::{Client, ClientError, ClientOptions, Lease, Volume};
use crate::io::host::unix_ms;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// How often the servers are asked for the size: `volume resize` reaches the device within it.
const RESIZE_POLL: Duration = Duration::from_secs(1);
/// Control requests that may wait.
const ASKED: usize = 16;
/// How long the last answer may take to leave before the process ends.
const LAST_WORD: Duration = Duration::from_millis(100);
/// How long a detach waits for servers.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// Runs an attachment to its end. Says through `ready` when it works, or why it does not.
///
/// # Errors
/// It was never made. What happens later goes to the log and to `attachment status`.
pub async fn run(spec: Spec, dir: &StateDir, ready: Ready) -> Result<(), AttachError> {
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            match Daemon::start(spec, dir).await {
                Ok((daemon, listener)) => {
                    let told = ready.tell(&Ok(daemon.status()));
                    told.map_err(|error| AttachError::system("telling that it works", &error))?;
                    daemon.serve(listener).await
                }
                Err(error) => {
                    let _ = ready.tell(&Err(error.clone()));
                    Err(error)
                }
            }
        })
        .await
}

struct Daemon {
    dir: StateDir,
    record: Record,
    client: Client,
    leg: Leg,
    place: Place,
    lease: Option<Lease>,
    /// For its drop.
    _lock: Lock,
}

impl Daemon {
    async fn start(spec: Spec, dir: &StateDir) -> Result<(Self, UnixListener), AttachError> {
        process::harden();
        let (client, volume) = open(&spec).await?;
        let key = key_of(&client, &volume);
        let lock = dir.try_lock(&key)?.ok_or_else(|| {
            let text = format!("{} is attached on this host already", spec.target);
            AttachError::new(AttachErrorKind::Served, text)
        })?;
        let mut before = dir.load(&key)?;
        let takes_over = before.as_ref().is_some_and(|dead| left_by(dead).is_some());
        let lease = match &mut before {
            Some(dead) if takes_over && dead.spec.exclusive => {
                let lease = exclusive::acquire_again(&client, &volume, dead).await?;
                (dead.pid, dead.lease_epoch) = (std::process::id(), Some(lease.info().epoch));
                dir.save(dead)?;
                Some(lease)
            }
            before if !takes_over && spec.exclusive => {
                Some(exclusive::acquire(&client, &volume, before.as_ref()).await?)
            }
            _ => None,
        };
        let meter = Rc::new(Meter::default());
        let leg = Leg::new(volume, spec.read_only, meter);
        let mut record = Record::new(key, spec, unix_ms());
        record.lease_epoch = lease.as_ref().map(|lease| lease.info().epoch);
        let listener = control::listen(&dir.control_socket(&record.key))?;
        let place = match Place::make(&client, &leg, &mut record, before.as_ref(), dir).await {
            Ok(place) => place,
            Err(error) => {
                // Whatever was recorded before is still what the kernel has.
                let _ = match &before {
                    Some(before) => dir.save(before),
                    None => dir.remove(&record.key),
                };
                if let Some(lease) = lease.filter(|_| !takes_over) {
                    let _ = lease.release().await;
                }
                return Err(error);
            }
        };
        let daemon = Self {
            dir: dir.clone(),
            record,
            client,
            leg,
            place,
            lease,
            _lock: lock,
        };
        daemon.dir.save(&daemon.record)?;
        Ok((daemon, listener))
    }

    fn status(&self) -> Status {
        let mut status = Status::of_record(&self.record);
        status.exclusive &= self.lease.is_some();
        let (counts, state) = self.leg.meter().counts(Instant::now());
        let servers = self.client.servers().into_iter().enumerate();
        status.state = state;
        status.counts = counts;
        status.link = self.place.link();
        status.size_bytes = self.leg.volume().size_bytes();
        status.read_only = self.leg.is_read_only();
        status.owners = self.leg.volume().owners();
        let again = |owner: &crate::client::OwnerState| owner.connections.saturating_sub(1);
        status.counts.reconnects = status.owners.iter().map(again).sum();
        status.servers = servers
            .map(|(index, address)| ServerStatus {
                address,
                in_use: index == 0,
            })
            .collect();
        status
    }

    async fn serve(mut self, listener: UnixListener) -> Result<(), AttachError> {
        let mut end = Signals::listen().map_err(|error| AttachError::system("signals", &error))?;
        let (asked, mut requests) = mpsc::channel(ASKED);
        tokio::task::spawn_local(control::serve(listener, asked));
        let volume = self.leg.volume().clone();
        tokio::task::spawn_local(watch_size(volume));
        let mut ticks = interval(RESIZE_POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(asked) = requests.recv() => {
                    if self.answer(asked).await {
                        break;
                    }
                }
                () = end.received() => match self.detach(false).await {
                    Ok(()) => break,
                    Err(error) => tracing::warn!("signal ignored: {error}"),
                },
                () = self.place.gone() => {
                    tracing::warn!("the device was taken down by somebody else");
                    self.place.remove_link();
                    self.forget()?;
                    break;
                }
                reason = exclusive::lost(self.lease.as_ref()) => {
                    tracing::error!("no longer the only writer, every write fails: {reason}");
                    self.leg.meter().failed(format!("no longer the only writer: {reason}"));
                    self.lease = None;
                }
                _ = ticks.tick() => self.place.resize(self.leg.volume().size_bytes()).await,
            }
        }
        sleep(LAST_WORD).await;
        Ok(())
    }

    /// Whether the attachment has ended.
    async fn answer(&mut self, asked: Asked) -> bool {
        let done = match asked.request {
            ControlRequest::Status => Ok(ControlReply::Status(Box::new(self.status()))),
            ControlRequest::Move { to } => {
                let moved = self.move_to(&to).await;
                moved.map(|()| ControlReply::Status(Box::new(self.status())))
            }
            ControlRequest::Detach { force } => {
                let detached = self.detach(force).await;
                let ended = detached.is_ok();
                let reply = detached.map_or_else(ControlReply::Refused, |()| ControlReply::Done);
                let _ = asked.answer.send(reply);
                return ended;
            }
        };
        let _ = asked
            .answer
            .send(done.unwrap_or_else(ControlReply::Refused));
        false
    }

    async fn move_to(&mut self, server: &str) -> Result<(), AttachError> {
        self.client.prefer(server, self.leg.volume()).await?;
        if let Some(first) = self.client.servers().first() {
            self.place.move_to(first).await?;
        }
        self.leg.meter().moved();
        self.record.spec.servers = self.client.servers();
        self.dir.save(&self.record)
    }

    /// Takes the place down and forgets the attachment; refuses while somebody uses the place.
    async fn detach(&mut self, force: bool) -> Result<(), AttachError> {
        if !force && self.record.device.is_some() {
            self.servers_answer().await?;
        }
        self.place.take_down(force).await?;
        let flushed = timeout(self.record.spec.open_timeout, self.leg.volume().flush()).await;
        if let Some(lease) = self.lease.take()
            && let Err(error) = lease.release().await
        {
            tracing::warn!("the lease is not released, it expires: {error}");
        }
        self.forget()?;
        let reason = match flushed {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "a server does not answer".to_owned(),
        };
        tracing::warn!("detached, but what was not flushed may not survive a power cut: {reason}");
        Ok(())
    }

    /// Before the kernel writes out its cache, which would hold up everything while servers are away.
    async fn servers_answer(&self) -> Result<(), AttachError> {
        match timeout(FLUSH_LIMIT, self.leg.volume().flush()).await {
            Ok(Err(ClientError::Fenced { .. })) | Ok(Ok(())) => Ok(()),
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => "no answer".to_owned(),
                };
                let text = format!(
                    "what is cached cannot be written, the servers fail: {reason}; wait for them, or give it up with --force"
                );
                Err(AttachError::new(AttachErrorKind::Unreachable, text))
            }
        }
    }

    fn forget(&self) -> Result<(), AttachError> {
        self.dir.remove(&self.record.key)
    }
}

/// Connects to the group and opens the volume.
///
/// # Errors
/// Nobody answers, or there is no such volume.
pub async fn open(spec: &Spec) -> Result<(Client, Volume), AttachError> {
    let options = ClientOptions {
        io_deadline: spec.dead_timeout,
        admin_deadline: spec.open_timeout,
    };
    let client = Client::connect(&spec.servers, options).await?;
    let volume = client.open(&spec.target).await?;
    Ok((client, volume))
}

/// Which volume of which cluster this is.
#[must_use]
pub fn key_of(client: &Client, volume: &Volume) -> VolumeKey {
    let info = volume.info();
    VolumeKey {
        cluster_id: client.cluster_id().unwrap_or_default(),
        volume: info.volume.id,
        snapshot: info.snapshot,
    }
}

/// Asks the servers for the size, again and again.
async fn watch_size(volume: Volume) {
    let mut ticks = interval(RESIZE_POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said: Option<String> = None;
    loop {
        ticks.tick().await;
        match volume.refresh().await {
            Ok(()) => said = None,
            Err(ClientError::Unreachable { .. }) => {}
            Err(error) if said.as_ref() == Some(&error.to_string()) => {}
            Err(error) => {
                tracing::warn!("the size is not known any more: {error}");
                said = Some(error.to_string());
            }
        }
    }
}

/// The signals that ask the process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
