//! Tests of scheduled snapshots: the grammar, due times, and runs through time.

use super::*;
use std::collections::BTreeMap;

const NOW: u64 = 1_795_977_000; // 2026-11-29 18:30:00 UTC, a Sunday

fn schedule(text: &str) -> Schedule {
    Schedule::parse(text, NOW).unwrap()
}

#[test]
fn a_schedule_is_written_as_it_is_read() {
    for (text, shown) in [
        ("none", "none"),
        (
            "every 1h keep 24, daily keep 7",
            "every 1h keep 24, daily keep 7",
        ),
        (
            " every 90s keep 1 ,weekly at 23:59 keep 4",
            "every 90s keep 1, weekly at 23:59 keep 4",
        ),
        ("every 120m keep 2", "every 2h keep 2"),
        (
            "hourly keep 24,monthly at 02:30 keep 1000",
            "hourly keep 24, monthly at 02:30 keep 1000",
        ),
    ] {
        assert_eq!(schedule(text).to_string(), shown);
        assert_eq!(schedule(shown), schedule(text));
    }
    for (text, words) in [
        ("", "is no rule"),
        ("hourly", "is no rule"),
        ("yearly keep 3", "every 15m keep 8"),
        ("hourly at 01:00 keep 3", "is no rule"),
        ("every 0s keep 3", "is no period"),
        ("every 367d keep 3", "is no period"),
        ("every 99999999999999999999d keep 3", "is no period"),
        ("every h keep 3", "is no period"),
        ("every 1\u{e9} keep 3", "is no period"),
        ("daily at 24:00 keep 3", "is no time of day"),
        ("daily at 1:00 keep 3", "is no time of day"),
        ("daily keep 0", "1 to 1000"),
        ("daily keep 1001", "1 to 1000"),
        (
            "daily keep 3, daily at 12:00 keep 3",
            "two rules are \"daily\"",
        ),
        ("every 60m keep 3, every 1h keep 4", "two rules are \"1h\""),
        (&["every 1s keep 1"; 9].join(","), "9 rules"),
    ] {
        let error = Schedule::parse(text, NOW).unwrap_err().to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn due_times_are_fixed_points_of_utc() {
    let due = |text: &str, now: u64| {
        let rule = schedule(text).rules[0];
        let latest = rule.period.latest(now);
        (rule.name(latest), rule.name(rule.next(now)))
    };
    for (text, latest, next) in [
        (
            "every 1h keep 1",
            "auto-1h-2026-11-29T18-00",
            "auto-1h-2026-11-29T19-00",
        ),
        (
            "hourly keep 1",
            "auto-hourly-2026-11-29T18-00",
            "auto-hourly-2026-11-29T19-00",
        ),
        (
            "every 7s keep 1",
            "auto-7s-2026-11-29T18-29-54",
            "auto-7s-2026-11-29T18-30-01",
        ),
        (
            "daily keep 1",
            "auto-daily-2026-11-29T00-00",
            "auto-daily-2026-11-30T00-00",
        ),
        (
            "daily at 18:31 keep 1",
            "auto-daily-2026-11-28T18-31",
            "auto-daily-2026-11-29T18-31",
        ),
        (
            "weekly at 04:00 keep 1",
            "auto-weekly-2026-11-23T04-00",
            "auto-weekly-2026-11-30T04-00",
        ),
        (
            "monthly at 12:05 keep 1",
            "auto-monthly-2026-11-01T12-05",
            "auto-monthly-2026-12-01T12-05",
        ),
    ] {
        assert_eq!(due(text, NOW), (latest.to_owned(), next.to_owned()));
    }
    // The first of every month over a leap year, and nothing breaks at the beginning of time.
    let monthly = schedule("monthly keep 1").rules[0];
    let mut at = 1_704_067_200;
    for month in 1..=24 {
        let date = Date::of(at);
        assert_eq!(
            (date.month, date.day, date.hour),
            ((month - 1) % 12 + 1, 1, 0)
        );
        assert_eq!(monthly.period.latest(at), at);
        assert!(monthly.period.latest(at - 1) < at);
        at = monthly.next(at);
    }
    for text in ["hourly", "daily at 23:00", "weekly", "monthly at 01:00"] {
        schedule(&format!("{text} keep 1")).rules[0]
            .period
            .latest(0);
    }
}

/// A volume with a schedule, as servers would run it.
struct World {
    schedule: Schedule,
    progress: ScheduleProgress,
    existing: BTreeMap<SnapshotId, String>,
    next: u32,
}

impl World {
    fn new(text: &str) -> Self {
        Self {
            schedule: schedule(text),
            progress: ScheduleProgress {
                volume: VolumeId(1),
                rules: Vec::new(),
            },
            existing: BTreeMap::new(),
            next: 1,
        }
    }

    fn create(&mut self, name: &str) -> SnapshotId {
        let taken = self.existing.values().any(|other| other == name);
        assert!(!taken, "{name} is taken twice");
        let id = SnapshotId(self.next);
        self.next += 1;
        self.existing.insert(id, name.to_owned());
        id
    }

    fn note(&mut self, label: &str, change: impl FnOnce(&mut RuleProgress)) {
        let mut rule = self.progress.rule(label);
        change(&mut rule);
        rule.retain(|id| self.existing.contains_key(&id));
        self.progress.rules.retain(|other| other.label != label);
        self.progress.rules.push(rule);
    }

    fn plan(&self, now: u64) -> Vec<ScheduleAction> {
        let existing: Vec<_> = self.existing.clone().into_iter().collect();
        self.schedule.plan(&self.progress, &existing, now)
    }

    fn run(&mut self, now: u64) {
        for action in self.plan(now) {
            match action {
                ScheduleAction::Take {
                    label,
                    due_unix_s,
                    name,
                } => {
                    let id = self.create(&name);
                    self.note(&label, |rule| rule.taken(due_unix_s, id));
                }
                ScheduleAction::Delete { label, id, .. } => {
                    self.existing.remove(&id);
                    self.note(&label, |_| {});
                }
            }
        }
    }

    fn names(&self) -> Vec<&str> {
        self.existing.values().map(String::as_str).collect()
    }
}

/// A day of ticks: one an hour and one a day, the newest are kept, and what others took stays.
#[test]
fn the_newest_are_kept_and_nothing_else_is_deleted() {
    let mut world = World::new("every 1h keep 3, daily keep 2");
    world.create("mine");
    world.create("auto-1h-2020-01-01T00-00");
    for minute in 0..3 * 24 * 60 {
        world.run(NOW + minute * 60);
    }
    assert_eq!(
        world.names(),
        [
            "mine",
            "auto-1h-2020-01-01T00-00",
            "auto-daily-2026-12-01T00-00",
            "auto-daily-2026-12-02T00-00",
            "auto-1h-2026-12-02T16-00",
            "auto-1h-2026-12-02T17-00",
            "auto-1h-2026-12-02T18-00",
        ]
    );
}

#[test]
fn a_new_schedule_begins_with_its_next_due_time() {
    let world = World::new("hourly keep 3");
    assert!(world.plan(NOW + 1799).is_empty());
    assert_eq!(world.plan(NOW + 1800).len(), 1);
}

#[test]
fn after_a_pause_one_is_made_up_for() {
    let mut world = World::new("hourly keep 10");
    world.run(NOW + 1800);
    world.run(NOW + 8 * 3600);
    world.run(NOW + 8 * 3600 + 1);
    assert_eq!(
        world.names(),
        [
            "auto-hourly-2026-11-29T19-00",
            "auto-hourly-2026-11-30T02-00"
        ]
    );
}

/// Leaders whose clocks differ, and one that dies between the snapshot and the note of it.
#[test]
fn a_change_of_leader_neither_doubles_nor_skips() {
    let mut world = World::new("hourly keep 100");
    for minute in 0..600u64 {
        let skew = [0, 50, 5][minute as usize % 3];
        world.run(NOW + minute * 60 + skew);
    }
    assert_eq!(world.names().len(), 10);
    let mut world = World::new("hourly keep 3");
    let [ScheduleAction::Take { name, .. }] = &world.plan(NOW + 1800)[..] else {
        panic!("nothing is due");
    };
    world.create(&name.clone());
    let [ScheduleAction::Take { name: again, .. }] = &world.plan(NOW + 1801)[..] else {
        panic!("it is not asked for again");
    };
    assert_eq!(again, name, "the next leader finds it by its name");
}

#[test]
fn a_clock_that_was_far_ahead_is_no_end() {
    let mut world = World::new("hourly keep 3");
    world.run(NOW + YEAR_S);
    world.run(NOW + 1800);
    assert_eq!(world.names().last(), Some(&"auto-hourly-2026-11-29T19-00"));
}

#[test]
fn what_failed_is_tried_again_but_not_at_once() {
    let mut world = World::new("hourly keep 3");
    let due = NOW + 1800;
    world.note("hourly", |rule| rule.failed(due, "no majority".to_owned()));
    assert!(world.plan(due + SCHEDULE_RETRY_S - 1).is_empty());
    world.run(due + SCHEDULE_RETRY_S);
    assert_eq!(world.names(), ["auto-hourly-2026-11-29T19-00"]);
    assert_eq!(world.progress.rule("hourly").last_error, None);
}

/// One that cannot be deleted, as it is protected or has clones, stops nothing; one that was renamed
/// is somebody's own.
#[test]
fn refused_and_renamed_snapshots_stay() {
    let mut world = World::new("hourly keep 1");
    for hour in 0..3 {
        let due = NOW + 1800 + hour * 3600;
        for action in world.plan(due) {
            if let ScheduleAction::Take {
                label,
                due_unix_s,
                name,
            } = action
            {
                let id = world.create(&name);
                world.note(&label, |rule| rule.taken(due_unix_s, id));
            }
        }
    }
    world.existing.insert(SnapshotId(2), "precious".to_owned());
    let due = NOW + 1800 + 2 * 3600;
    let [ScheduleAction::Delete { id, .. }] = &world.plan(due)[..] else {
        panic!("{:?}", world.plan(due));
    };
    let id = *id;
    assert_eq!(id, SnapshotId(1));
    world.note("hourly", |rule| rule.refused(id, "protected".to_owned()));
    assert!(world.plan(due).is_empty());
    assert_eq!(
        world.progress.rule("hourly").last_error.as_deref(),
        Some("protected")
    );
    let actions = world.plan(due + 3600);
    assert!(
        matches!(&actions[..], [ScheduleAction::Take { .. }]),
        "{actions:?}"
    );
}
