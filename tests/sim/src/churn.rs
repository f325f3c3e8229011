//! A small volume that is created, used, snapshot and deleted, again and again under load.
//!
//! No name is used twice: what was asked under an old one may still be carried out.

use crate::handle::Handle;
use crate::random::Random;
use crate::trace;
use crate::workload::{Load, User, VOLUMES, delete, geometry, look, volume_name};
use crate::world::CLIENTS;
use blockd::admin::{AdminRequest, VolumeCreate};
use blockd::client::Volume;
use blockd::id::NodeNo;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::sleep;

/// Volumes of a run at the most: their numbers fit what blocks are filled with.
const VOLUMES_MAX: usize = 200;

/// Until all operations of the run are called.
pub(crate) async fn run(load: Rc<Load>) {
    let user = User::connect(&load.world, CLIENTS).await;
    let mut random = Random::new(load.seed, 8);
    for volume in VOLUMES.len()..VOLUMES_MAX {
        if load.called.get() >= load.ops {
            break;
        }
        live(&load, &user, volume, &mut random).await;
    }
    load.finished.set(load.finished.get() + 1);
}

/// The life of one volume.
async fn live(load: &Load, user: &User, volume: usize, random: &mut Random) {
    let name = volume_name(volume);
    let Some(opened) = create(load, user, volume).await else {
        trace::count("volume: not created");
        return sleep(Duration::from_millis(200)).await;
    };
    trace::count("volume: created");
    for _ in 0..random.between(10, 60) {
        operate(load, user, volume, &opened, random).await;
    }
    for number in snapshots(load, volume) {
        delete(&load.world, user, number).await;
    }
    trace::say(|| format!("client {} deletes volume {name}", user.number));
    let deleted = user.client.admin(AdminRequest::VolumeDelete { name }).await;
    trace::count(match deleted {
        Ok(_) => "volume: deleted",
        Err(_) => "volume: left to the end",
    });
}

async fn create(load: &Load, user: &User, volume: usize) -> Option<Volume> {
    let (blocks, page_blocks) = geometry(volume);
    let create = AdminRequest::VolumeCreate(VolumeCreate {
        name: volume_name(volume),
        size_bytes: u64::from(blocks) * 512,
        servers: Vec::new(),
        page_blocks,
        format: None,
    });
    trace::say(|| {
        format!(
            "client {} creates volume {}",
            user.number,
            volume_name(volume)
        )
    });
    user.client.admin(create).await.ok()?;
    let opened = user.client.open(&volume_name(volume)).await.ok()?;
    for run in opened.info().route.runs {
        for page in run.first_page..run.first_page + run.page_count {
            let NodeNo(node) = run.owner;
            load.world.may_own(volume, page, usize::from(node) - 1, 0);
        }
    }
    Some(opened)
}

async fn operate(load: &Load, user: &User, volume: usize, opened: &Volume, random: &mut Random) {
    let handle = Handle::Direct(user.number, opened);
    match random.below(20) {
        0..10 => load.write(&handle, volume, random).await,
        10..15 => load.read(&handle, volume, random).await,
        15 => load.zero(&handle, volume, random).await,
        16 => load.flush(&handle, volume).await,
        17 => load.take(user, vec![volume], random).await,
        _ => {
            let known = snapshots(load, volume);
            let Some(number) = known.get(random.below(known.len() as u64) as usize) else {
                return;
            };
            match random.one_in(2) {
                true => drop(delete(&load.world, user, *number).await),
                false => {
                    drop(look(&load.world, user, *number, volume, 0, geometry(volume).0).await)
                }
            }
        }
    }
}

/// Snapshots of a volume that were taken and not deleted.
fn snapshots(load: &Load, volume: usize) -> Vec<usize> {
    let snaps = load.world.history.snaps.borrow();
    let live = (0..snaps.len()).filter(|at| {
        let snap = &snaps[*at];
        snap.volumes == [volume] && snap.taken && !snap.deleting
    });
    live.collect()
}
