//! The exclusive writer lease of a volume: who alone may write, fenced by a lease epoch.
//!
//! ```text
//!              acquire (epoch + 1)                close (epoch + 1)
//!     Free ------------------------> Held ----------------------------> Closed
//!      ^                              |  ^                                |  |
//!      |          withdraw            |  |       acquire (epoch + 1)      |  |
//!      |<-----------------------------+  +--------------------------------+  |
//!      |                          open                                       |
//!      +---------------------------------------------------------------------+
//! ```
//!
//! While it is held, only changes that carry its epoch are executed; while it is closed, none; while
//! it is free, those that carry no epoch. Nobody is told that he holds it, and nothing is opened,
//! before every owner of the volume has confirmed the epoch and has no older change in flight. So
//! each kind of writer ends everywhere before the next begins anywhere.
//!
//! Time is not a matter of this file: `control::lease` says when a lease has expired.

use super::change::{ChangeError, reading};
use super::object::{Key, Object};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::control::calendar::utc;
use crate::id::{LeaseEpoch, VolumeId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who holds a lease, as it said when it acquired it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct LeaseHolder {
    /// Chosen at random by the holder: tells it from every other one.
    pub id: u64,
    /// The newest try of its acquire; only this one may give it back as never granted.
    pub attempt: u64,
    /// Host on which the holder runs.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// What it does with the volume, as in "attach /dev/nbd0".
    pub purpose: String,
    /// Milliseconds without a renewal after which it counts as dead.
    pub ttl_ms: u64,
    /// Milliseconds since 1970 at the acquire; shown, never compared.
    pub since_unix_ms: u64,
}

/// Why a lease is not held any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseEnd {
    /// By its holder.
    Released,
    /// It was not renewed in time.
    Expired,
    /// By an operator.
    Broken,
}

/// Who may change the volume.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseState {
    /// Everybody without a lease.
    Free,
    /// The holder alone.
    Held(LeaseHolder),
    /// Nobody, until all owners have confirmed the end of this lease.
    Closed(LeaseHolder, LeaseEnd),
}

/// The lease of a volume.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Grows whenever the lease is acquired or closed; 0 if it never was.
    pub epoch: LeaseEpoch,
    /// Who may change the volume.
    pub state: LeaseState,
}

impl LeaseRecord {
    fn never_held(volume: VolumeId) -> Self {
        Self {
            volume,
            epoch: LeaseEpoch(0),
            state: LeaseState::Free,
        }
    }

    /// The holder, while it is held.
    #[must_use]
    pub fn holder(&self) -> Option<&LeaseHolder> {
        match &self.state {
            LeaseState::Held(holder) => Some(holder),
            LeaseState::Free | LeaseState::Closed(..) => None,
        }
    }

    fn next(&self, state: LeaseState) -> Result<Self, ChangeError> {
        let epoch = self.epoch.0.checked_add(1);
        Ok(Self {
            volume: self.volume,
            epoch: LeaseEpoch(epoch.ok_or(ChangeError::NumbersUsedUp("lease epoch"))?),
            state,
        })
    }
}

impl fmt::Display for LeaseHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = utc(self.since_unix_ms);
        let Self {
            host, pid, purpose, ..
        } = self;
        write!(f, "{host} (process {pid}, {purpose}) since {since}")
    }
}

impl fmt::Display for LeaseEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Broken => "broken",
        })
    }
}

impl RegistryState {
    /// The lease of a volume; free at epoch 0 if it was never acquired.
    #[must_use]
    pub fn lease(&self, volume: VolumeId) -> LeaseRecord {
        match self.get(&Key::Lease(volume)) {
            Some(Object::Lease(record)) => record.clone(),
            _ => LeaseRecord::never_held(volume),
        }
    }
}

/// Gives the lease to `holder`, under a new epoch; repeated for the same holder, under the same.
/// It may not act on it before all owners have confirmed the epoch.
///
/// # Errors
/// There is no such volume, or another one holds the lease.
pub fn acquire(
    state: &RegistryState,
    volume: VolumeId,
    holder: &LeaseHolder,
) -> Result<(Transaction, LeaseRecord), ChangeError> {
    let now = lease_of_known(state, volume)?;
    let record = match &now.state {
        LeaseState::Held(held) if held.id == holder.id => LeaseRecord {
            state: LeaseState::Held(LeaseHolder {
                since_unix_ms: held.since_unix_ms,
                ..holder.clone()
            }),
            ..now
        },
        LeaseState::Held(_) => return Err(leased(state, volume, &now)),
        LeaseState::Free | LeaseState::Closed(..) => now.next(LeaseState::Held(holder.clone()))?,
    };
    Ok((replacing(state, &record), record))
}

/// Takes back a lease that was never granted: nobody has written under its epoch.
///
/// # Errors
/// The record is not that of this attempt any more.
pub fn withdraw(
    state: &RegistryState,
    attempted: &LeaseRecord,
) -> Result<Transaction, ChangeError> {
    if state.lease(attempted.volume) != *attempted {
        return Err(ChangeError::LeaseNotHeld(attempted.volume, attempted.epoch));
    }
    let free = LeaseRecord {
        state: LeaseState::Free,
        ..attempted.clone()
    };
    Ok(replacing(state, &free))
}

/// Ends the lease of this epoch: nobody may write until [`open`] or the next [`acquire`].
///
/// # Errors
/// It is not held at this epoch.
pub fn close(
    state: &RegistryState,
    volume: VolumeId,
    epoch: LeaseEpoch,
    why: LeaseEnd,
) -> Result<(Transaction, LeaseRecord), ChangeError> {
    let now = lease_of_known(state, volume)?;
    let held = now.holder().filter(|_| now.epoch == epoch);
    let holder = held
        .ok_or(ChangeError::LeaseNotHeld(volume, epoch))?
        .clone();
    let record = now.next(LeaseState::Closed(holder, why))?;
    Ok((replacing(state, &record), record))
}

/// Lets everybody write again, after all owners have confirmed the epoch of the closed lease.
///
/// # Errors
/// It is not closed at this epoch.
pub fn open(
    state: &RegistryState,
    volume: VolumeId,
    epoch: LeaseEpoch,
) -> Result<Transaction, ChangeError> {
    let now = lease_of_known(state, volume)?;
    if !matches!(now.state, LeaseState::Closed(..)) || now.epoch != epoch {
        return Err(ChangeError::LeaseNotHeld(volume, epoch));
    }
    let free = LeaseRecord {
        state: LeaseState::Free,
        ..now
    };
    Ok(replacing(state, &free))
}

/// Refuses what would take data from under the holder of a lease.
///
/// # Errors
/// The lease is held.
pub(super) fn check_not_held(state: &RegistryState, volume: VolumeId) -> Result<(), ChangeError> {
    let now = state.lease(volume);
    match now.holder() {
        None => Ok(()),
        Some(_) => Err(leased(state, volume, &now)),
    }
}

fn lease_of_known(state: &RegistryState, volume: VolumeId) -> Result<LeaseRecord, ChangeError> {
    let known = state.volume(volume);
    known.ok_or(ChangeError::NoVolume(volume))?;
    Ok(state.lease(volume))
}

fn leased(state: &RegistryState, volume: VolumeId, now: &LeaseRecord) -> ChangeError {
    let name = state.volume(volume).map(|volume| volume.name.clone());
    let holder = now.holder().map(ToString::to_string);
    ChangeError::Leased(name.unwrap_or_default(), holder.unwrap_or_default())
}

fn replacing(state: &RegistryState, record: &LeaseRecord) -> Transaction {
    let keys = [Key::Volume(record.volume), Key::Lease(record.volume)];
    let [_, lease] = keys.clone();
    reading(state, &keys).put(lease, Object::Lease(record.clone()))
}
