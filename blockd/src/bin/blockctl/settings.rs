//! `blockctl volume set` and `volume get`: the settings of a volume.

use crate::args::Cli;
use crate::command::{connect, print_reply};
use crate::failure::Failure;
use crate::output::{facts, table};
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, SettingsInfo};
use blockd::control::calendar::utc;

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

/// The settings, and below them how each rule of the schedule is doing.
pub(crate) fn settings_text(settings: &SettingsInfo) -> String {
    let values = settings.settings.iter();
    let lines: Vec<_> = values
        .map(|(key, value)| (key.as_str(), value.clone()))
        .collect();
    let shows_schedule = lines.iter().any(|(key, _)| *key == "snapshots");
    if settings.schedule.is_empty() || !shows_schedule {
        return facts(&lines);
    }
    let rows = settings.schedule.iter().map(|rule| {
        let last = rule.last_unix_s.map(|due| utc(due * 1000));
        vec![
            rule.rule.clone(),
            utc(rule.next_unix_s * 1000),
            last.unwrap_or_else(|| "-".to_owned()),
            rule.snapshot_count.to_string(),
            rule.last_error.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    });
    let header = ["RULE", "NEXT", "LAST", "SNAPSHOTS", "LAST ERROR"];
    format!("{}\n\n{}", facts(&lines), table(&header, &[3], rows))
}
