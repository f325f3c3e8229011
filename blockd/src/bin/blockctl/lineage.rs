//! `blockctl volume flatten`: asks again and again until the clone needs its parent no more.

use crate::args::Cli;
use crate::command::{connect, print_reply};
use crate::failure::Failure;
use crate::progress;
use crate::session::Session;
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, VolumeDetails};
use std::time::Duration;

const PAUSE: Duration = Duration::from_millis(300);

pub(crate) async fn flatten(cli: &Cli, name: &str, no_wait: bool) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let mut volume = go_on(&session, name).await?;
    let bar = progress::count("copying pages", 0);
    while !no_wait && volume.origin.is_some() {
        if let Some(flatten) = volume.flatten {
            bar.set_length(flatten.pages_total);
            bar.set_position(flatten.pages_done);
        }
        tokio::time::sleep(PAUSE).await;
        volume = match go_on(&session, name).await {
            // Somebody else's question, or the servers' own sweep, has ended it.
            Err(Failure::Refused {
                kind: AdminErrorKind::Conflict,
                ..
            }) => details(&session, name).await?,
            gone_on => gone_on?,
        };
    }
    bar.finish_and_clear();
    print_reply(cli, &AdminReply::VolumeDetails(volume))
}

async fn go_on(session: &Session, name: &str) -> Result<VolumeDetails, Failure> {
    let name = name.to_owned();
    of(session.ask(AdminRequest::VolumeFlatten { name }).await?)
}

async fn details(session: &Session, name: &str) -> Result<VolumeDetails, Failure> {
    let name = name.to_owned();
    of(session.ask(AdminRequest::VolumeDetails { name }).await?)
}

fn of(reply: AdminReply) -> Result<VolumeDetails, Failure> {
    match reply {
        AdminReply::VolumeDetails(volume) => Ok(volume),
        _ => Err(Failure::UnexpectedReply { what: "a volume" }),
    }
}
