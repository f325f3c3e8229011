//! Points in time as dates of UTC, and back (Howard Hinnant's `civil_from_days`).

const DAY_S: u64 = 86_400;

/// A second of UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    pub year: u64,
    /// From 1.
    pub month: u64,
    /// From 1.
    pub day: u64,
    pub hour: u64,
    pub minute: u64,
    pub second: u64,
}

impl Date {
    /// The date of so many seconds since 1970.
    #[must_use]
    pub fn of(unix_s: u64) -> Self {
        let (days, of_day) = (unix_s / DAY_S + 719_468, unix_s % DAY_S);
        let (era, of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let month = (from_march + 2) % 12 + 1;
        Self {
            year: year_of_era + era * 400 + u64::from(month <= 2),
            month,
            day: of_year - (153 * from_march + 2) / 5 + 1,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        }
    }
}

/// Day and time of day in UTC, `2026-11-21` and `13:11:01`.
fn day_and_time(unix_ms: u64) -> (String, String) {
    let Date {
        year,
        month,
        day,
        hour,
        minute,
        second,
    } = Date::of(unix_ms / 1000);
    (
        format!("{year}-{month:02}-{day:02}"),
        format!("{hour:02}:{minute:02}:{second:02}"),
    )
}

/// A point in time as `2026-11-21 13:11:01 UTC`.
#[must_use]
pub fn utc(unix_ms: u64) -> String {
    let (day, time) = day_and_time(unix_ms);
    format!("{day} {time} UTC")
}

/// A point in time as `2026-11-21T13:11:01.999Z`.
#[must_use]
pub fn rfc3339(unix_ms: u64) -> String {
    let (day, time) = day_and_time(unix_ms);
    format!("{day}T{time}.{:03}Z", unix_ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::{rfc3339, utc};

    #[test]
    fn points_in_time_are_read_by_people() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_266_661_999), "2026-11-21 13:11:01 UTC");
        assert_eq!(utc(4_107_542_399_000), "2100-02-28 23:59:59 UTC");
        assert_eq!(rfc3339(1_795_266_661_009), "2026-11-21T13:11:01.009Z");
    }
}
