//! `blockctl lease`: who alone may write a volume.

use crate::args::{Cli, LeaseVerb};
use crate::command::{ask_and_print, connect};
use crate::failure::Failure;
use crate::output::{ago, table};
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, LeaseInfo};
use blockd::control::registry::LeaseHolder;

pub(crate) async fn run(cli: &Cli, verb: &LeaseVerb) -> Result<(), Failure> {
    match verb {
        LeaseVerb::List => ask_and_print(cli, AdminRequest::LeaseList).await,
        LeaseVerb::Show { volume } => {
            let volume = volume.clone();
            ask_and_print(cli, AdminRequest::LeaseShow { volume }).await
        }
        LeaseVerb::Break { volume, force } => {
            if !force {
                return Err(warning(cli, volume).await?);
            }
            let volume = volume.clone();
            ask_and_print(cli, AdminRequest::LeaseBreak { volume }).await
        }
    }
}

/// What breaking it would do, to whom.
async fn warning(cli: &Cli, volume: &str) -> Result<Failure, Failure> {
    let session = connect(cli).await?;
    let volume = volume.to_owned();
    let AdminReply::Lease(lease) = session.ask(AdminRequest::LeaseShow { volume }).await? else {
        return Err(Failure::UnexpectedReply { what: "a lease" });
    };
    let message = format!(
        "{lease}\n  breaking it makes every later write of the holder fail: a filesystem that it has \
         mounted stops with errors,\n  and what it has not written yet is lost. Stop the holder \
         instead if it can be reached; if it is gone, say --force"
    );
    Ok(Failure::Refused {
        kind: AdminErrorKind::Conflict,
        message,
    })
}

pub(crate) fn leases_text(leases: &[LeaseInfo], now_ms: u64) -> String {
    let rows = leases.iter().map(|lease| {
        let (state, holder, ended) = lease.parts();
        let of_holder =
            |text: fn(&LeaseHolder) -> String| holder.map_or_else(|| "-".to_owned(), text);
        vec![
            lease.volume.clone(),
            ended.map_or_else(|| state.to_owned(), |why| format!("{state} ({why})")),
            of_holder(|holder| holder.host.clone()),
            of_holder(|holder| holder.pid.to_string()),
            of_holder(|holder| holder.purpose.clone()),
            holder.map_or_else(
                || "-".to_owned(),
                |holder| ago(holder.since_unix_ms, now_ms),
            ),
            lease.epoch.to_string(),
        ]
    });
    let header = [
        "VOLUME", "STATE", "HOST", "PID", "PURPOSE", "SINCE", "EPOCH",
    ];
    table(&header, &[3, 6], rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::admin::json;
    use blockd::control::registry::{LeaseEnd, LeaseState};
    use blockd::id::{LeaseEpoch, VolumeId};
    use serde_json::Value;

    fn lease(state: LeaseState) -> LeaseInfo {
        LeaseInfo {
            volume: "demo".to_owned(),
            volume_id: VolumeId(7),
            epoch: LeaseEpoch(3),
            state,
        }
    }

    fn holder() -> LeaseHolder {
        LeaseHolder {
            id: 0xff,
            attempt: 1,
            host: "h1".to_owned(),
            pid: 42,
            purpose: "attach /dev/nbd0".to_owned(),
            ttl_ms: 15_000,
            since_unix_ms: 0,
        }
    }

    #[test]
    fn a_lease_names_its_holder() {
        let held = lease(LeaseState::Held(holder()));
        let closed = lease(LeaseState::Closed(holder(), LeaseEnd::Broken));
        assert_eq!(
            leases_text(&[held.clone(), closed], 5_000),
            "VOLUME  STATE            HOST  PID  PURPOSE           SINCE    EPOCH\n\
             demo    held             h1     42  attach /dev/nbd0  5 s ago      3\n\
             demo    closed (broken)  h1     42  attach /dev/nbd0  5 s ago      3"
        );
        let json = json::lease(&held);
        assert_eq!(json["holder_id"], "00000000000000ff");
        assert_eq!(json["state"], "held");
        assert_eq!(json["pid"], 42);
        assert_eq!(json::lease(&lease(LeaseState::Free))["host"], Value::Null);
    }
}
