//! Settings of a volume: what its operator chose instead of the defaults.
//!
//! A setting that has its default value is not stored. The record is a list of variants, so that new
//! settings come at the end of [`Setting`] and older records stay readable.

use super::change::{ChangeError, reading};
use super::object::{Key, Object};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::control::schedule::{Schedule, ScheduleError};
use crate::id::VolumeId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The keys that `volume set` knows, in the order in which they are shown.
pub const SETTING_KEYS: [&str; 2] = ["procedure", "snapshots"];

/// Why a key or value is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SettingError {
    /// No such key.
    #[error("there is no setting {0:?}: the settings of a volume are {list}", list = SETTING_KEYS.join(", "))]
    UnknownKey(String),
    /// No value of `procedure`.
    #[error("{0:?} is no snapshot procedure: give barrier, hold or stamp")]
    Procedure(String),
    /// No value of `snapshots`.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// How a snapshot of the volume is taken (S003-45).
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Procedure {
    /// Completions of later writes wait until every owner has marked its log; nothing is held.
    #[default]
    Barrier,
    /// Writes are held until every owner is ready (document 003, FIG. 7).
    Hold,
    /// Writes are told apart by time stamps of hybrid logical clocks (FIG. 8).
    Stamp,
}

impl Procedure {
    /// The word that users write.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::Hold => "hold",
            Self::Stamp => "stamp",
        }
    }
}

impl fmt::Display for Procedure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Procedure {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let all = [Self::Barrier, Self::Hold, Self::Stamp];
        let found = all.into_iter().find(|procedure| procedure.name() == text);
        found.ok_or_else(|| SettingError::Procedure(text.to_owned()))
    }
}

/// One setting with its value. New ones go to the end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Setting {
    /// `procedure`
    Procedure(Procedure),
    /// `snapshots`
    Snapshots(Schedule),
}

impl Setting {
    /// `now_unix_s` is when it is set, in seconds since 1970.
    ///
    /// # Errors
    /// The key or the value is none; the error lists what is possible.
    pub fn parse(key: &str, value: &str, now_unix_s: u64) -> Result<Self, SettingError> {
        match key {
            "procedure" => Ok(Self::Procedure(value.parse()?)),
            "snapshots" => Ok(Self::Snapshots(Schedule::parse(value, now_unix_s)?)),
            _ => Err(SettingError::UnknownKey(key.to_owned())),
        }
    }

    /// The word before the value.
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Self::Procedure(_) => "procedure",
            Self::Snapshots(_) => "snapshots",
        }
    }

    fn is_default(&self) -> bool {
        match self {
            Self::Procedure(procedure) => *procedure == Procedure::default(),
            Self::Snapshots(schedule) => schedule.rules.is_empty(),
        }
    }
}

/// The settings of one volume that differ from the defaults, in the order of their keys.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeSettings {
    /// The volume.
    pub volume: VolumeId,
    /// Each key once.
    pub settings: Vec<Setting>,
}

impl VolumeSettings {
    /// The procedure of its snapshots.
    #[must_use]
    pub fn procedure(&self) -> Procedure {
        let mut found = self.settings.iter().filter_map(|setting| match setting {
            Setting::Procedure(procedure) => Some(*procedure),
            Setting::Snapshots(_) => None,
        });
        found.next().unwrap_or_default()
    }

    /// The schedule of its snapshots.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        let mut found = self.settings.iter().filter_map(|setting| match setting {
            Setting::Snapshots(schedule) => Some(schedule.clone()),
            Setting::Procedure(_) => None,
        });
        found.next().unwrap_or_default()
    }

    /// Every key with its value.
    #[must_use]
    pub fn values(&self) -> Vec<(&'static str, String)> {
        vec![
            ("procedure", self.procedure().to_string()),
            ("snapshots", self.schedule().to_string()),
        ]
    }

    fn with(&self, setting: &Setting) -> Self {
        let others = self.settings.iter();
        let others = others.filter(|other| other.key() != setting.key());
        let new = Some(setting).filter(|setting| !setting.is_default());
        let mut settings: Vec<Setting> = others.chain(new).cloned().collect();
        settings.sort_by_key(|setting| SETTING_KEYS.iter().position(|key| *key == setting.key()));
        Self {
            volume: self.volume,
            settings,
        }
    }
}

impl RegistryState {
    /// The settings of a volume, those of a new one if nothing was set.
    #[must_use]
    pub fn settings(&self, volume: VolumeId) -> VolumeSettings {
        match self.get(&Key::VolumeSettings(volume)) {
            Some(Object::VolumeSettings(settings)) => settings.clone(),
            _ => VolumeSettings {
                volume,
                settings: Vec::new(),
            },
        }
    }
}

/// Changes one setting of a volume.
///
/// # Errors
/// There is no such volume.
pub fn change_setting(
    state: &RegistryState,
    volume: VolumeId,
    setting: &Setting,
) -> Result<Transaction, ChangeError> {
    state.volume(volume).ok_or(ChangeError::NoVolume(volume))?;
    let keys = [Key::Volume(volume), Key::VolumeSettings(volume)];
    let settings = state.settings(volume).with(setting);
    let [_, key] = keys.clone();
    Ok(reading(state, &keys).put(key, Object::VolumeSettings(settings)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> VolumeSettings {
        VolumeSettings {
            volume: VolumeId(7),
            settings: Vec::new(),
        }
    }

    /// S003-45: the procedure is a setting of the volume.
    #[test]
    fn a_setting_replaces_the_former_one_and_a_default_is_not_stored() {
        assert_eq!(none().procedure(), Procedure::Barrier);
        let hold = none().with(&Setting::parse("procedure", "hold", 0).unwrap());
        assert_eq!(hold.procedure(), Procedure::Hold);
        let stamp = hold.with(&Setting::Procedure(Procedure::Stamp));
        assert_eq!(stamp.values()[0], ("procedure", "stamp".to_owned()));
        assert_eq!(stamp.with(&Setting::Procedure(Procedure::Barrier)), none());
    }

    #[test]
    fn errors_list_what_is_possible() {
        let error = |key, value| Setting::parse(key, value, 0).unwrap_err().to_string();
        assert_eq!(
            error("colour", "red"),
            "there is no setting \"colour\": the settings of a volume are procedure, snapshots"
        );
        assert_eq!(
            error("procedure", "Hold"),
            "\"Hold\" is no snapshot procedure: give barrier, hold or stamp"
        );
    }

    #[test]
    fn the_record_is_as_it_was_first_stored() {
        let hold = none().with(&Setting::Procedure(Procedure::Hold));
        let bytes = postcard::to_allocvec(&hold).unwrap();
        assert_eq!(bytes, [7, 1, 0, 1]);
        assert_eq!(postcard::from_bytes::<VolumeSettings>(&bytes), Ok(hold));
        let daily = Setting::parse("snapshots", "daily at 02:30 keep 7", 9).unwrap();
        let bytes = postcard::to_allocvec(&none().with(&daily)).unwrap();
        assert_eq!(bytes, [7, 1, 1, 9, 1, 2, 150, 1, 7]);
    }
}
