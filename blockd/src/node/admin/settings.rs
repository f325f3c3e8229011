//! Settings of a volume: set and get.

use super::{Answer, catch_up, no_volume};
use crate::admin::{AdminError, AdminReply, SettingsInfo};
use crate::control::registry::settings::change_setting;
use crate::control::registry::{RegistryState, Setting, VolumeRecord};
use crate::node::Member;

pub(super) async fn set(member: &Member, name: &str, key: &str, value: &str) -> Answer {
    let setting = Setting::parse(key, value)?;
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
    Ok(AdminReply::Settings(info(&state, volume)))
}

fn info(state: &RegistryState, volume: &VolumeRecord) -> SettingsInfo {
    let values = state.settings(volume.id).values().into_iter();
    SettingsInfo {
        volume: volume.name.clone(),
        settings: values.map(|(key, value)| (key.to_owned(), value)).collect(),
    }
}
