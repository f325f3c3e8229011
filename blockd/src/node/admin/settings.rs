//! Settings of a volume: set and get.

use super::{Answer, catch_up, no_volume};
use crate::admin::{AdminError, AdminReply, ScheduleInfo, SettingsInfo};
use crate::control::registry::settings::change_setting;
use crate::control::registry::{RegistryState, Setting, VolumeRecord};
use crate::control::schedule::Rule;
use crate::node::Member;

pub(super) async fn set(member: &Member, name: &str, key: &str, value: &str) -> Answer {
    let setting = Setting::parse(key, value, member.clock.unix_ms() / 1000)?;
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let volume = state.volume_by_name(name).ok_or_else(|| no_volume(name))?;
        Ok((change_setting(state, volume.id, &setting)?, ()))
    };
    member.registry.update(build).await?;
    get(member, name).await
}

pub(super) async fn get(member: &Member, name: &str) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let volume = state.volume_by_name(name).ok_or_else(|| no_volume(name))?;
    let now_unix_s = member.clock.unix_ms() / 1000;
    Ok(AdminReply::Settings(info(&state, volume, now_unix_s)))
}

fn info(state: &RegistryState, volume: &VolumeRecord, now_unix_s: u64) -> SettingsInfo {
    let settings = state.settings(volume.id);
    let values = settings.values().into_iter();
    let rules = settings.schedule().rules;
    SettingsInfo {
        volume: volume.name.clone(),
        settings: values.map(|(key, value)| (key.to_owned(), value)).collect(),
        schedule: rules
            .iter()
            .map(|rule| schedule_info(state, volume, rule, now_unix_s))
            .collect(),
    }
}

fn schedule_info(
    state: &RegistryState,
    volume: &VolumeRecord,
    rule: &Rule,
    now_unix_s: u64,
) -> ScheduleInfo {
    let done = state.schedule_progress(volume.id).rule(&rule.label());
    let there = |id: &&_| state.snapshot(volume.id, **id).is_some();
    ScheduleInfo {
        rule: rule.to_string(),
        next_unix_s: rule.next(now_unix_s),
        last_unix_s: Some(done.last_due_unix_s).filter(|due| *due > 0),
        snapshot_count: done.taken.iter().filter(there).count() as u64,
        last_error: done.last_error,
    }
}
