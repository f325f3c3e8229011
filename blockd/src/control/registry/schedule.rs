//! What the scheduled snapshots of a volume have come to, in the registry.

use super::change::{ChangeError, reading};
use super::object::{Key, Object};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::control::schedule::{RuleProgress, ScheduleProgress};
use crate::id::VolumeId;
use crate::limits::REGISTRY_TEXT_BYTES_MAX;

impl RegistryState {
    /// What was done for the schedule of a volume.
    #[must_use]
    pub fn schedule_progress(&self, volume: VolumeId) -> ScheduleProgress {
        match self.get(&Key::Schedule(volume)) {
            Some(Object::Schedule(progress)) => progress.clone(),
            _ => ScheduleProgress {
                volume,
                rules: Vec::new(),
            },
        }
    }
}

/// Notes what was done for the rule `label` of a volume; rules that are no more, and snapshots that
/// are gone, are forgotten.
///
/// # Errors
/// There is no such volume.
pub fn note_schedule(
    state: &RegistryState,
    volume: VolumeId,
    label: &str,
    change: impl FnOnce(&mut RuleProgress),
) -> Result<Transaction, ChangeError> {
    state.volume(volume).ok_or(ChangeError::NoVolume(volume))?;
    let keys = [Key::Volume(volume), Key::Schedule(volume)];
    let progress = state.schedule_progress(volume);
    let mut rule = progress.rule(label);
    change(&mut rule);
    rule.retain(|id| state.snapshot(volume, id).is_some());
    if let Some(error) = &mut rule.last_error {
        let fits = (0..=REGISTRY_TEXT_BYTES_MAX.min(error.len())).rev();
        let end = fits.into_iter().find(|end| error.is_char_boundary(*end));
        error.truncate(end.unwrap_or(0));
    }
    let rules = state.settings(volume).schedule().rules;
    let others = progress.rules.into_iter().filter(|other| {
        other.label != label && rules.iter().any(|rule| rule.label() == other.label)
    });
    let progress = ScheduleProgress {
        volume,
        rules: others.chain([rule]).collect(),
    };
    let [_, key] = keys.clone();
    Ok(reading(state, &keys).put(key, Object::Schedule(progress)))
}
