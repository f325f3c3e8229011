//! Leases: acquire, renew, release, break, list, show.

use super::{Answer, catch_up, no_volume, refused};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, LeaseInfo};
use crate::control::registry::{
    ChangeError, LeaseEnd, LeaseHolder, LeaseRecord, LeaseState, RegistryState, lease,
};
use crate::data::error::DataError;
use crate::id::{LeaseEpoch, VolumeId};
use crate::io::host::random_u64;
use crate::limits::{LEASE_TTL_MAX_MS, LEASE_TTL_MIN_MS};
use crate::node::Member;
use crate::node::lease::{LeaseOrder, confirmed, open, order};
use crate::node::registry::UpdateError;

/// Makes `holder` the only writer, once all owners of the volume have confirmed it.
pub(super) async fn acquire(member: &Member, volume: VolumeId, mut holder: LeaseHolder) -> Answer {
    check_ttl(holder.ttl_ms)?;
    let random = random_u64();
    holder.attempt =
        random.map_err(|error| refused(AdminErrorKind::Internal, error.to_string()))?;
    let build = |state: &RegistryState| lease::acquire(state, volume, &holder);
    let record = match member.registry.update(build).await {
        Err(UpdateError::Refused(ChangeError::Leased(..))) => {
            let state = member.registry.state();
            return Ok(AdminReply::LeaseConflict(info(
                &state,
                &state.lease(volume),
            )));
        }
        made => made?,
    };
    if let Err(reason) = confirmed(member, &record).await {
        give_back(member, &record).await;
        let name = name_of(&member.registry.state(), volume);
        let text = format!(
            "volume {name} was not leased: all servers that own pages of it must agree, and {reason}"
        );
        return Err(refused(AdminErrorKind::Unavailable, text));
    }
    renew(member, volume, record.epoch).await?;
    Ok(AdminReply::Lease(info(&member.registry.state(), &record)))
}

fn check_ttl(ttl_ms: u64) -> Result<(), AdminError> {
    if (LEASE_TTL_MIN_MS..=LEASE_TTL_MAX_MS).contains(&ttl_ms) {
        return Ok(());
    }
    let text = format!(
        "a lease of {ttl_ms} ms: its time to live is {LEASE_TTL_MIN_MS} to {LEASE_TTL_MAX_MS} ms"
    );
    Err(refused(AdminErrorKind::Invalid, text))
}

/// It was never granted; if this fails it expires.
async fn give_back(member: &Member, record: &LeaseRecord) {
    let build = |state: &RegistryState| Ok::<_, ChangeError>((lease::withdraw(state, record)?, ()));
    if let Err(error) = member.registry.update(build).await {
        tracing::info!(volume = %record.volume, %error, "lease not given back");
    }
}

/// Tells the registry's leader that the holder lives; `Conflict` if it is the holder no more.
pub(super) async fn renew(member: &Member, volume: VolumeId, epoch: LeaseEpoch) -> Answer {
    let renewed = match member.registry.status().leader {
        None => Err(DataError::Unavailable(
            "no leader of the registry is known".to_owned(),
        )),
        Some(leader) if leader == member.number() => {
            member.leases.heard(member, volume, epoch).await
        }
        Some(leader) => {
            let request = order(volume, LeaseOrder::Renewed(epoch));
            let reply = member.send(leader, request).await?;
            DataError::of_reply(&reply).map_or(Ok(()), Err)
        }
    };
    match renewed {
        Ok(()) => Ok(AdminReply::Done),
        Err(DataError::Leased(text)) => Err(refused(AdminErrorKind::Conflict, text)),
        Err(error) => Err(refused(AdminErrorKind::Unavailable, error.to_string())),
    }
}

/// Ends the lease of this epoch; the reply says whether the volume is open to others already.
pub(super) async fn release(member: &Member, volume: VolumeId, epoch: LeaseEpoch) -> Answer {
    let build = |state: &RegistryState| lease::close(state, volume, epoch, LeaseEnd::Released);
    match member.registry.update(build).await {
        Ok(_) | Err(UpdateError::Refused(ChangeError::LeaseNotHeld(..))) => {
            end(member, volume).await
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes the lease from its holder, whose later writes are refused.
pub(super) async fn break_lease(member: &Member, volume: &str) -> Answer {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let id = id_of(state, volume)?;
        let now = state.lease(id);
        if now.holder().is_none() {
            return Err(refused(
                AdminErrorKind::Conflict,
                format!("{}: nothing to break", info(state, &now)),
            ));
        }
        Ok(lease::close(state, id, now.epoch, LeaseEnd::Broken)?)
    };
    let closed = member.registry.update(build).await?;
    tracing::warn!(state = ?closed.state, "lease broken");
    end(member, closed.volume).await
}

/// Opens the volume if its lease is closed; what does not succeed now the leader tries again.
async fn end(member: &Member, volume: VolumeId) -> Answer {
    let record = member.registry.state().lease(volume);
    if matches!(record.state, LeaseState::Closed(..))
        && let Err(reason) = open(member, &record).await
    {
        tracing::info!(%volume, reason, "the volume stays closed for now");
    }
    let state = member.registry.state();
    Ok(AdminReply::Lease(info(&state, &state.lease(volume))))
}

pub(super) async fn list(member: &Member) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let of_interest = state
        .leases()
        .filter(|record| record.state != LeaseState::Free);
    Ok(AdminReply::Leases(
        of_interest.map(|record| info(&state, record)).collect(),
    ))
}

pub(super) async fn show(member: &Member, volume: &str) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let record = state.lease(id_of(&state, volume)?);
    Ok(AdminReply::Lease(info(&state, &record)))
}

fn id_of(state: &RegistryState, volume: &str) -> Result<VolumeId, AdminError> {
    let record = state.volume_by_name(volume);
    record.map_or_else(|| Err(no_volume(volume)), |record| Ok(record.id))
}

fn name_of(state: &RegistryState, volume: VolumeId) -> String {
    let record = state.volume(volume);
    record.map_or_else(|| format!("number {volume}"), |record| record.name.clone())
}

fn info(state: &RegistryState, record: &LeaseRecord) -> LeaseInfo {
    LeaseInfo {
        volume: name_of(state, record.volume),
        volume_id: record.volume,
        epoch: record.epoch,
        state: record.state.clone(),
    }
}
