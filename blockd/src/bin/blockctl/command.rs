//! What each noun and verb asks of the servers.

use crate::args::{
    Cli, ClusterVerb, Format, IoVerb, NodeVerb, Noun, RouteVerb, SnapshotVerb, VolumeCreateArgs,
    VolumeVerb,
};
use crate::failure::Failure;
use crate::format::{Mkfs, copy_data};
use crate::interrupt::Interrupt;
use crate::output::{print, reply_json, reply_text};
use crate::session::Session;
use crate::{
    archive, attach, backup, documents, lease, lineage, mount, moves, network, page_map, progress,
    scrub, settings,
};
use blockd::admin::{
    AdminErrorKind, AdminReply, AdminRequest, SnapshotDetails, SnapshotName, VolumeClone,
    VolumeCreate,
};
use blockd::control::snapshot::Procedure;
use serde_json::json;
use std::fs::File;
use std::time::Instant;

/// Runs one command to its end.
pub(crate) async fn run(cli: &Cli) -> Result<(), Failure> {
    match &cli.noun {
        Noun::Cluster(verb) => ask_and_print(cli, cluster_request(verb)).await,
        Noun::Node(NodeVerb::Drain(args)) => moves::drain(cli, args).await,
        Noun::Node(NodeVerb::Undrain { node }) => moves::undrain(cli, *node).await,
        Noun::Node(verb) => ask_and_print(cli, node_request(verb)).await,
        Noun::Page(verb) => moves::page(cli, verb).await,
        Noun::Move(verb) => moves::moves(cli, verb).await,
        Noun::Network(verb) => network::run(cli, verb).await,
        Noun::Subnet(verb) => network::run_subnet(cli, verb).await,
        Noun::Volume(verb) => run_volume(cli, verb).await,
        Noun::Snapshot(verb) => run_snapshot(cli, verb).await,
        Noun::Route(RouteVerb::Show { volume }) => moves::show_route(cli, volume).await,
        Noun::Lease(verb) => lease::run(cli, verb).await,
        Noun::Io(IoVerb::Holds { .. }) => ask_and_print(cli, AdminRequest::HoldList).await,
        Noun::Version => ask_and_print(cli, AdminRequest::Version).await,
        Noun::Attach(args) => attach::attach(cli, args).await,
        Noun::Detach(args) => attach::detach(cli, args).await,
        Noun::Attachment(verb) => attach::attachment(cli, verb).await,
        Noun::Mount(args) => {
            check_openable(cli, &args.target).await?;
            Err(mount::mount(&cli.servers, args))
        }
        Noun::Grow { dir } => Err(mount::grow(dir, cli.json)),
        Noun::Umount { dir, options } => Err(mount::umount(dir, options)),
        Noun::Completion { shell } => documents::completion(*shell),
        Noun::Man { dir } => documents::man_pages(dir),
    }
}

/// A mount can only say that it failed; the servers say why they refuse.
async fn check_openable(cli: &Cli, target: &str) -> Result<(), Failure> {
    let (volume, snapshot) = match target.split_once('@') {
        None => (target.to_owned(), None),
        Some((volume, snapshot)) => (volume.to_owned(), Some(snapshot.to_owned())),
    };
    let Ok(session) = connect(cli).await else {
        return Ok(());
    };
    match session.ask(AdminRequest::Open { volume, snapshot }).await {
        Err(
            refused @ Failure::Refused {
                kind: AdminErrorKind::Conflict,
                ..
            },
        ) => Err(refused),
        _ => Ok(()),
    }
}

async fn run_volume(cli: &Cli, verb: &VolumeVerb) -> Result<(), Failure> {
    let request = match verb {
        VolumeVerb::Create(args) => return create_volume(cli, args).await,
        VolumeVerb::Delete { name, force } => return delete_volume(cli, name, *force).await,
        VolumeVerb::Set { name, key, value } => {
            return settings::set(cli, name, key, value).await;
        }
        VolumeVerb::Get { name, key } => return settings::get(cli, name, key.as_deref()).await,
        VolumeVerb::List => AdminRequest::VolumeList,
        VolumeVerb::Show { name } => return show_volume(cli, name).await,
        VolumeVerb::Scrub(args) => return scrub::run(cli, args).await,
        VolumeVerb::Rebalance(args) => return moves::rebalance(cli, args).await,
        VolumeVerb::Clone {
            source,
            name,
            offline,
        } => AdminRequest::VolumeClone(VolumeClone {
            source: source.clone(),
            name: name.clone(),
            offline: *offline,
        }),
        VolumeVerb::Flatten { name, no_wait } => {
            return lineage::flatten(cli, name, *no_wait).await;
        }
        VolumeVerb::Offline { target } => set_offline(target, true),
        VolumeVerb::Online { target } => set_offline(target, false),
        VolumeVerb::Resize {
            name,
            size,
            allow_shrink,
        } => AdminRequest::VolumeResize {
            name: name.clone(),
            size_bytes: *size,
            allow_shrink: *allow_shrink,
        },
        VolumeVerb::Rename { name, new_name } => AdminRequest::VolumeRename {
            name: name.clone(),
            new_name: new_name.clone(),
        },
    };
    ask_and_print(cli, request).await
}

/// The volume with its last scrub, and the move of its pages.
async fn show_volume(cli: &Cli, name: &str) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let name = name.to_owned();
    let reply = session.ask(AdminRequest::VolumeDetails { name }).await?;
    let AdminReply::VolumeDetails(volume) = &reply else {
        return print_reply(cli, &reply);
    };
    let last = scrub::last(&session, &volume.info.name).await;
    let moving = moves::moving(&session, &volume.info.name).await;
    if !cli.json {
        let text = reply_text(&reply);
        let (last, moving) = (
            scrub::last_text(last.as_ref()),
            moves::moving_text(moving.as_ref()),
        );
        return print(&format!("{text}\n{last}{moving}"));
    }
    let mut json = reply_json(&reply);
    json["scrub"] = blockd::admin::json::scrub(last.as_ref());
    json["move"] = moving
        .as_ref()
        .map_or(serde_json::Value::Null, blockd::admin::json::page_move);
    print(&json.to_string())
}

async fn run_snapshot(cli: &Cli, verb: &SnapshotVerb) -> Result<(), Failure> {
    match verb {
        SnapshotVerb::Create {
            targets,
            procedure,
            metadata_only,
            offline,
        } => {
            let request = create_request(targets, *procedure);
            match metadata_only {
                Some(file) => page_map::create(cli, request, file).await,
                None => {
                    let offline = if *offline { &targets[..] } else { &[] };
                    create_snapshots(cli, request, offline).await
                }
            }
        }
        SnapshotVerb::List { volume } => {
            let volume = volume.clone();
            ask_and_print(cli, AdminRequest::SnapshotDetails { volume }).await
        }
        SnapshotVerb::Diff(args) => backup::diff(cli, args).await,
        SnapshotVerb::Export(args) => backup::export(cli, args).await,
        SnapshotVerb::Import(args) => backup::import(cli, args).await,
        SnapshotVerb::Archive(args) => archive::archive(cli, args).await,
        SnapshotVerb::Restore(args) => archive::restore(cli, args).await,
        SnapshotVerb::Archives { url } => archive::archives(cli, url).await,
        SnapshotVerb::ArchiveVerify { url } => archive::verify(cli, url).await,
        SnapshotVerb::Rename { target, new_name } => {
            let (target, new_name) = (target.clone(), new_name.clone());
            ask_and_print(cli, AdminRequest::SnapshotRename { target, new_name }).await
        }
        SnapshotVerb::Rollback { target } => {
            let target = target.clone();
            ask_and_print(cli, AdminRequest::SnapshotRollback { target }).await
        }
        SnapshotVerb::Protect { target } => protect(cli, target, true).await,
        SnapshotVerb::Unprotect { target } => protect(cli, target, false).await,
        SnapshotVerb::Delete { target } => {
            let busy = progress::spinner("deleting the snapshot");
            let target = target.clone();
            let reply = connect(cli)
                .await?
                .ask(AdminRequest::SnapshotDelete { target })
                .await;
            busy.finish_and_clear();
            print_reply(cli, &reply?)
        }
    }
}

async fn protect(cli: &Cli, target: &SnapshotName, protected: bool) -> Result<(), Failure> {
    let target = target.clone();
    ask_and_print(cli, AdminRequest::SnapshotProtect { target, protected }).await
}

fn set_offline(target: &str, offline: bool) -> AdminRequest {
    let target = target.to_owned();
    AdminRequest::SetOffline { target, offline }
}

fn cluster_request(verb: &ClusterVerb) -> AdminRequest {
    match verb {
        ClusterVerb::Define { name } => AdminRequest::ClusterDefine { name: name.clone() },
        ClusterVerb::Status => AdminRequest::ClusterStatus,
    }
}

fn node_request(verb: &NodeVerb) -> AdminRequest {
    match verb {
        NodeVerb::List | NodeVerb::Drain(_) | NodeVerb::Undrain { .. } => AdminRequest::NodeList,
        NodeVerb::Forget { node } => AdminRequest::NodeForget { node: *node },
        NodeVerb::Define {
            address,
            name,
            online,
        } => AdminRequest::NodeDefine {
            address: address.clone(),
            name: name.clone(),
            online: *online,
        },
    }
}

/// The filesystem is made in a file first: what can fail without a volume fails without one.
async fn create_volume(cli: &Cli, args: &VolumeCreateArgs) -> Result<(), Failure> {
    let mut interrupt = Interrupt::listen()?;
    let filesystem = match args.format {
        Some(format) => Some((format, Mkfs::find(format)?.run(args.size)?)),
        None => None,
    };
    let session = connect(cli).await?;
    let request = AdminRequest::VolumeCreate(VolumeCreate {
        name: args.name.clone(),
        size_bytes: args.size,
        servers: args.servers.clone(),
        page_blocks: args.page_blocks,
        format: args.format.map(|format| format.name().to_owned()),
    });
    let mut reply = session.ask(request).await?;
    if let Some((format, file)) = filesystem {
        let filled = tokio::select! {
            filled = fill_volume(&session, &args.name, &file) => filled,
            () = interrupt.wait() => Err(Failure::Interrupted),
        };
        if let Err(failure) = filled {
            return Err(undo_create(&session, &args.name, format, failure).await);
        }
        let name = args.name.clone();
        reply = session.ask(AdminRequest::VolumeShow { name }).await?;
    }
    print_reply(cli, &reply)
}

async fn fill_volume(session: &Session, name: &str, file: &File) -> Result<(), Failure> {
    let bar = progress::bytes("writing the filesystem");
    let target = session.open(name).await?;
    let copied = copy_data(file, &target, &bar).await;
    bar.finish_and_clear();
    copied
}

/// A volume that was to have a filesystem and has none is taken away again.
async fn undo_create(session: &Session, name: &str, format: Format, failure: Failure) -> Failure {
    let request = AdminRequest::VolumeDelete {
        name: name.to_owned(),
    };
    let aftermath = match session.ask(request).await {
        Ok(_) => "the volume was deleted again".to_owned(),
        Err(error) => format!(
            "the volume could not be deleted again ({error}); \
             try `blockctl volume delete {name}`"
        ),
    };
    Failure::Format {
        volume: name.to_owned(),
        format: format.name(),
        source: Box::new(failure),
        aftermath,
    }
}

/// With `force` the snapshots go first, one by one: each frees what only it holds.
async fn delete_volume(cli: &Cli, name: &str, force: bool) -> Result<(), Failure> {
    let session = connect(cli).await?;
    if force {
        delete_snapshots_of(&session, name).await?;
    }
    let busy = progress::spinner("deleting the volume");
    let name = name.to_owned();
    let reply = session.ask(AdminRequest::VolumeDelete { name }).await;
    busy.finish_and_clear();
    print_reply(cli, &reply?)
}

async fn delete_snapshots_of(session: &Session, volume: &str) -> Result<(), Failure> {
    let snapshots = snapshots_of(session, volume).await?;
    check_deletable(&snapshots)?;
    let bar = progress::count("deleting snapshots", snapshots.len() as u64);
    for snapshot in snapshots {
        let target = SnapshotName {
            volume: snapshot.info.volume,
            snapshot: snapshot.info.name,
        };
        session.ask(AdminRequest::SnapshotDelete { target }).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Nothing is deleted if something must stay.
fn check_deletable(snapshots: &[SnapshotDetails]) -> Result<(), Failure> {
    let is_kept = |snapshot: &&SnapshotDetails| snapshot.protected || !snapshot.clones.is_empty();
    let Some(kept) = snapshots.iter().find(is_kept) else {
        return Ok(());
    };
    let name = format!("{}@{}", kept.info.volume, kept.info.name);
    let why = if kept.protected {
        format!("is protected; `blockctl snapshot unprotect {name}` first")
    } else {
        let clones = kept.clones.join(", ");
        format!("has clones ({clones}); `blockctl volume flatten` or delete them first")
    };
    Err(Failure::Refused {
        kind: AdminErrorKind::Conflict,
        message: format!("nothing was deleted: snapshot {name} {why}"),
    })
}

async fn snapshots_of(session: &Session, volume: &str) -> Result<Vec<SnapshotDetails>, Failure> {
    let request = AdminRequest::SnapshotDetails {
        volume: Some(volume.to_owned()),
    };
    match session.ask(request).await? {
        AdminReply::SnapshotDetails(snapshots) => Ok(snapshots),
        _ => Err(Failure::UnexpectedReply {
            what: "a list of snapshots",
        }),
    }
}

fn create_request(targets: &[SnapshotName], procedure: Option<Procedure>) -> AdminRequest {
    let targets = targets.to_vec();
    match procedure {
        None => AdminRequest::SnapshotCreate { targets },
        Some(procedure) => AdminRequest::SnapshotCreateBy { targets, procedure },
    }
}

/// `took_ms` is the time from request to reply, without connecting.
async fn create_snapshots(
    cli: &Cli,
    request: AdminRequest,
    offline: &[SnapshotName],
) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let started = Instant::now();
    let reply = session.ask(request).await?;
    let took_ms = (started.elapsed().as_secs_f64() * 1e6).round() / 1e3;
    for target in offline {
        let name = format!("{}@{}", target.volume, target.snapshot);
        session.ask(set_offline(&name, true)).await?;
    }
    let snapshots = match &reply {
        AdminReply::Snapshots(_) => reply_json(&reply),
        _ => serde_json::Value::Null,
    };
    if cli.json {
        return print(&json!({"took_ms": took_ms, "snapshots": snapshots}).to_string());
    }
    print(&format!("{}\ntaken in {took_ms:.1} ms", reply_text(&reply)))
}

pub(crate) async fn ask_and_print(cli: &Cli, request: AdminRequest) -> Result<(), Failure> {
    let reply = connect(cli).await?.ask(request).await?;
    print_reply(cli, &reply)
}

pub(crate) async fn connect(cli: &Cli) -> Result<Session, Failure> {
    Session::connect(&cli.servers, cli.timeout).await
}

pub(crate) fn print_reply(cli: &Cli, reply: &AdminReply) -> Result<(), Failure> {
    if cli.json {
        print(&reply_json(reply).to_string())
    } else {
        print(&reply_text(reply))
    }
}
