//! Scheduled snapshots with retention: which to take and which to delete, from the schedule, what was
//! done, what exists, and the time.
//!
//! Due times are fixed points of UTC and stand in the names, so a server that takes over the work
//! neither takes one twice nor leaves one out. After a pause only the newest due time is made up
//! for. Deleted is only what the schedule itself took, and that nobody has renamed.

use super::calendar::Date;
use crate::id::{SnapshotId, VolumeId};
use crate::limits::{SCHEDULE_KEEP_MAX, SCHEDULE_RETRY_S, SCHEDULE_RULES_MAX};
use serde::{Deserialize, Serialize};
use std::fmt;

const MINUTE_S: u64 = 60;
const HOUR_S: u64 = 3600;
const DAY_S: u64 = 86_400;
const YEAR_S: u64 = 366 * DAY_S;
/// 1970-01-05 was a Monday.
const FIRST_MONDAY_S: u64 = 4 * DAY_S;

/// Why a text is no schedule.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScheduleError {
    #[error(
        "{0:?} is no rule: write `every 15m keep 8`, `hourly keep 24`, `daily at 02:30 keep 7`, \
         `weekly keep 4` or `monthly keep 12`, several with commas, or `none`"
    )]
    Rule(String),
    #[error("{0:?} is no period: write a number from 1 and s, m, h or d, up to 366d")]
    Period(String),
    #[error("{0:?} is no time of day (UTC): write HH:MM")]
    Time(String),
    #[error("{0:?} is no number of snapshots to keep: write 1 to {SCHEDULE_KEEP_MAX}")]
    Keep(String),
    #[error("two rules are {0:?}: write one")]
    Twice(String),
    #[error("{0} rules: write {SCHEDULE_RULES_MAX} at the most")]
    TooMany(usize),
}

/// The due times of a rule. `minute` is that of the day.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Period {
    /// Multiples of so many seconds since 1970.
    Every {
        seconds: u64,
    },
    Hourly,
    Daily {
        minute: u16,
    },
    /// On Mondays.
    Weekly {
        minute: u16,
    },
    /// On the first of the month.
    Monthly {
        minute: u16,
    },
}

/// Take one at each due time of the period, keep the newest `keep`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rule {
    pub period: Period,
    pub keep: u32,
}

/// The rules of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Schedule {
    /// Seconds since 1970 when it was set; due times up to then are not its own.
    pub since_unix_s: u64,
    pub rules: Vec<Rule>,
}

/// What was done for one rule.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RuleProgress {
    /// [`Rule::label`]
    pub label: String,
    /// Due time of the newest snapshot that was taken; 0: none.
    pub last_due_unix_s: u64,
    /// When it last failed; 0 if the last one was taken.
    pub failed_unix_s: u64,
    /// What failed last, if nothing was taken since.
    pub last_error: Option<String>,
    /// The snapshots that it took and that exist, oldest first.
    pub taken: Vec<SnapshotId>,
    /// Those that could not be deleted; tried again after the next snapshot.
    pub kept: Vec<SnapshotId>,
}

/// What was done for a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScheduleProgress {
    pub volume: VolumeId,
    pub rules: Vec<RuleProgress>,
}

/// Something to do now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ScheduleAction {
    Take {
        label: String,
        due_unix_s: u64,
        name: String,
    },
    Delete {
        label: String,
        id: SnapshotId,
        name: String,
    },
}

impl Period {
    /// The word in names and lists: `hourly`, or the length as in `15m`.
    fn label(self) -> String {
        match self {
            Self::Every { seconds } => {
                let units = [(DAY_S, 'd'), (HOUR_S, 'h'), (MINUTE_S, 'm'), (1, 's')];
                let whole = units
                    .into_iter()
                    .find(|(unit, _)| seconds.is_multiple_of(*unit));
                let (unit, letter) = whole.unwrap_or((1, 's'));
                format!("{}{letter}", seconds / unit)
            }
            Self::Hourly => "hourly".to_owned(),
            Self::Daily { .. } => "daily".to_owned(),
            Self::Weekly { .. } => "weekly".to_owned(),
            Self::Monthly { .. } => "monthly".to_owned(),
        }
    }

    /// The latest due time up to `now`; 0 before the first one.
    fn latest(self, now_unix_s: u64) -> u64 {
        let offset = u64::from(self.minute()) * MINUTE_S;
        let now = now_unix_s.saturating_sub(offset);
        let start = match self {
            Self::Every { seconds } => now - now % seconds.max(1),
            Self::Hourly => now - now % HOUR_S,
            Self::Daily { .. } => now - now % DAY_S,
            Self::Weekly { .. } => {
                let since = now.saturating_sub(FIRST_MONDAY_S);
                FIRST_MONDAY_S + since - since % (7 * DAY_S)
            }
            Self::Monthly { .. } => now - now % DAY_S - (Date::of(now).day - 1) * DAY_S,
        };
        start + offset
    }

    /// The first due time after `now`.
    fn next(self, now_unix_s: u64) -> u64 {
        let latest = self.latest(now_unix_s);
        match self {
            // The first of the month that follows: no month is longer than 31 days.
            Self::Monthly { .. } => self.latest(latest + 31 * DAY_S),
            _ => latest + self.seconds(),
        }
    }

    fn seconds(self) -> u64 {
        match self {
            Self::Every { seconds } => seconds,
            Self::Hourly => HOUR_S,
            Self::Daily { .. } => DAY_S,
            Self::Weekly { .. } => 7 * DAY_S,
            Self::Monthly { .. } => 31 * DAY_S,
        }
    }

    fn minute(self) -> u16 {
        match self {
            Self::Every { .. } | Self::Hourly => 0,
            Self::Daily { minute } | Self::Weekly { minute } | Self::Monthly { minute } => minute,
        }
    }
}

impl Rule {
    /// What tells the rule from the others of its volume, and stands in the names.
    #[must_use]
    pub fn label(&self) -> String {
        self.period.label()
    }

    /// The next due time after `now`, in seconds since 1970.
    #[must_use]
    pub fn next(&self, now_unix_s: u64) -> u64 {
        self.period.next(now_unix_s)
    }

    /// As in `auto-hourly-2026-11-29T18-00`.
    fn name(&self, due_unix_s: u64) -> String {
        let date = Date::of(due_unix_s);
        let mut name = format!(
            "{}{}-{:02}-{:02}T{:02}-{:02}",
            self.prefix(),
            date.year,
            date.month,
            date.day,
            date.hour,
            date.minute
        );
        if !self.period.seconds().is_multiple_of(MINUTE_S) {
            name.push_str(&format!("-{:02}", date.second));
        }
        name
    }

    fn prefix(&self) -> String {
        format!("auto-{}-", self.label())
    }

    fn plan(
        &self,
        since_unix_s: u64,
        progress: &RuleProgress,
        existing: &[(SnapshotId, String)],
        now_unix_s: u64,
    ) -> Vec<ScheduleAction> {
        let due = self.period.latest(now_unix_s);
        // A last one far in the future is of a clock that was wrong.
        let is_new = due > progress.last_due_unix_s
            || progress.last_due_unix_s > now_unix_s + self.period.seconds();
        let may_try = now_unix_s >= progress.failed_unix_s + SCHEDULE_RETRY_S
            || progress.failed_unix_s > now_unix_s;
        let take = (due > since_unix_s && is_new && may_try).then(|| ScheduleAction::Take {
            label: self.label(),
            due_unix_s: due,
            name: self.name(due),
        });
        take.into_iter()
            .chain(self.surplus(progress, existing))
            .collect()
    }

    fn surplus(
        &self,
        progress: &RuleProgress,
        existing: &[(SnapshotId, String)],
    ) -> Vec<ScheduleAction> {
        let own = existing
            .iter()
            .filter(|(id, name)| progress.taken.contains(id) && name.starts_with(&self.prefix()));
        let own: Vec<_> = own.collect();
        let surplus = own.len().saturating_sub(self.keep as usize);
        let delete = own[..surplus]
            .iter()
            .filter(|(id, _)| !progress.kept.contains(id));
        let delete = delete.map(|(id, name)| ScheduleAction::Delete {
            label: self.label(),
            id: *id,
            name: name.clone(),
        });
        delete.collect()
    }
}

impl Schedule {
    /// # Errors
    /// What is no rule, with what is possible.
    pub fn parse(text: &str, now_unix_s: u64) -> Result<Self, ScheduleError> {
        let rules: Vec<Rule> = match text.trim() {
            "none" => Vec::new(),
            rules => rules.split(',').map(parse_rule).collect::<Result<_, _>>()?,
        };
        if rules.len() > SCHEDULE_RULES_MAX {
            return Err(ScheduleError::TooMany(rules.len()));
        }
        let labels: Vec<String> = rules.iter().map(Rule::label).collect();
        match (1..labels.len()).find(|at| labels[..*at].contains(&labels[*at])) {
            Some(twice) => Err(ScheduleError::Twice(labels[twice].clone())),
            None => Ok(Self {
                since_unix_s: now_unix_s,
                rules,
            }),
        }
    }

    /// What is to do now. `existing` are the committed snapshots of the volume, oldest first.
    #[must_use]
    pub fn plan(
        &self,
        progress: &ScheduleProgress,
        existing: &[(SnapshotId, String)],
        now_unix_s: u64,
    ) -> Vec<ScheduleAction> {
        let rules = self.rules.iter();
        let plans = rules.map(|rule| {
            let done = progress.rule(&rule.label());
            rule.plan(self.since_unix_s, &done, existing, now_unix_s)
        });
        plans.flatten().collect()
    }
}

fn parse_rule(text: &str) -> Result<Rule, ScheduleError> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let unknown = || ScheduleError::Rule(text.trim().to_owned());
    let (period, keep) = match words[..] {
        ["every", period, "keep", keep] => (parse_every(period)?, keep),
        ["hourly", "keep", keep] => (Period::Hourly, keep),
        [word, "keep", keep] => (at(word, 0).ok_or_else(unknown)?, keep),
        [word, "at", time, "keep", keep] => {
            let minute = parse_time(time)?;
            (at(word, minute).ok_or_else(unknown)?, keep)
        }
        _ => return Err(unknown()),
    };
    let number = keep
        .parse()
        .ok()
        .filter(|n| (1..=SCHEDULE_KEEP_MAX).contains(n));
    let keep = number.ok_or_else(|| ScheduleError::Keep(keep.to_owned()))?;
    Ok(Rule { period, keep })
}

fn at(word: &str, minute: u16) -> Option<Period> {
    match word {
        "daily" => Some(Period::Daily { minute }),
        "weekly" => Some(Period::Weekly { minute }),
        "monthly" => Some(Period::Monthly { minute }),
        _ => None,
    }
}

fn parse_every(text: &str) -> Result<Period, ScheduleError> {
    let wrong = || ScheduleError::Period(text.to_owned());
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => MINUTE_S,
        Some('h') => HOUR_S,
        Some('d') => DAY_S,
        _ => return Err(wrong()),
    };
    let number: Option<u64> = text[..text.len() - 1].parse().ok();
    let seconds = number.and_then(|number| number.checked_mul(unit));
    let seconds = seconds.filter(|seconds| (1..=YEAR_S).contains(seconds));
    seconds
        .map(|seconds| Period::Every { seconds })
        .ok_or_else(wrong)
}

fn parse_time(text: &str) -> Result<u16, ScheduleError> {
    let time = text.split_once(':').and_then(|(hour, minute)| {
        let two_digits = hour.len() == 2 && minute.len() == 2;
        let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
        (two_digits && hour < 24 && minute < 60).then_some(hour * 60 + minute)
    });
    time.ok_or_else(|| ScheduleError::Time(text.to_owned()))
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if matches!(self.period, Period::Every { .. }) {
            f.write_str("every ")?;
        }
        f.write_str(&self.label())?;
        match self.period.minute() {
            0 => {}
            minute => write!(f, " at {:02}:{:02}", minute / 60, minute % 60)?,
        }
        write!(f, " keep {}", self.keep)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rules.is_empty() {
            return f.write_str("none");
        }
        let rules: Vec<String> = self.rules.iter().map(Rule::to_string).collect();
        f.write_str(&rules.join(", "))
    }
}

impl ScheduleProgress {
    /// What was done for the rule of this label.
    #[must_use]
    pub fn rule(&self, label: &str) -> RuleProgress {
        let known = self.rules.iter().find(|rule| rule.label == label);
        known.cloned().unwrap_or_else(|| RuleProgress {
            label: label.to_owned(),
            ..RuleProgress::default()
        })
    }
}

impl RuleProgress {
    /// The snapshot of this due time is there.
    pub fn taken(&mut self, due_unix_s: u64, id: SnapshotId) {
        self.last_due_unix_s = due_unix_s;
        self.failed_unix_s = 0;
        self.last_error = None;
        self.kept.clear();
        if !self.taken.contains(&id) {
            self.taken.push(id);
        }
    }

    /// None could be taken.
    pub fn failed(&mut self, now_unix_s: u64, error: String) {
        self.failed_unix_s = now_unix_s;
        self.last_error = Some(error);
    }

    /// A snapshot could not be deleted.
    pub fn refused(&mut self, id: SnapshotId, error: String) {
        self.kept.push(id);
        self.last_error = Some(error);
    }

    /// Forgets the snapshots that are gone.
    pub fn retain(&mut self, exists: impl Fn(SnapshotId) -> bool) {
        self.taken.retain(|id| exists(*id));
        self.kept.retain(|id| exists(*id));
    }
}

#[cfg(test)]
mod tests;
