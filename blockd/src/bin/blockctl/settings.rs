//! `blockctl volume set` and `volume get`: the settings of a volume.

use crate::args::Cli;
use crate::command::{connect, print_reply};
use crate::failure::Failure;
use crate::output::facts;
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, SettingsInfo};
use serde_json::{Map, Value};

pub(crate) async fn set(cli: &Cli, name: &str, key: &str, value: &str) -> Result<(), Failure> {
    let request = AdminRequest::VolumeSet {
        name: name.to_owned(),
        key: key.to_owned(),
        value: value.to_owned(),
    };
    print_reply(cli, &connect(cli).await?.ask(request).await?)
}

pub(crate) async fn get(cli: &Cli, name: &str, key: Option<&str>) -> Result<(), Failure> {
    let name = name.to_owned();
    let reply = connect(cli)
        .await?
        .ask(AdminRequest::VolumeGet { name })
        .await?;
    let AdminReply::Settings(mut settings) = reply else {
        return Err(Failure::UnexpectedReply { what: "settings" });
    };
    if let Some(key) = key {
        keep(&mut settings, key)?;
    }
    print_reply(cli, &AdminReply::Settings(settings))
}

fn keep(settings: &mut SettingsInfo, key: &str) -> Result<(), Failure> {
    let keys: Vec<_> = settings
        .settings
        .iter()
        .map(|(key, _)| key.clone())
        .collect();
    settings.settings.retain(|(known, _)| known == key);
    match settings.settings.is_empty() {
        false => Ok(()),
        true => Err(Failure::Refused {
            kind: AdminErrorKind::Invalid,
            message: format!(
                "there is no setting {key:?}: the settings of a volume are {}",
                keys.join(", ")
            ),
        }),
    }
}

/// The settings stand beside the volume's name, each under its key.
pub(crate) fn settings_json(settings: &SettingsInfo) -> Value {
    let mut object = Map::new();
    object.insert("volume".to_owned(), settings.volume.clone().into());
    for (key, value) in &settings.settings {
        object.insert(key.clone(), value.clone().into());
    }
    Value::Object(object)
}

pub(crate) fn settings_text(settings: &SettingsInfo) -> String {
    let lines: Vec<_> = settings
        .settings
        .iter()
        .map(|(key, value)| (key.as_str(), value.clone()))
        .collect();
    facts(&lines)
}
