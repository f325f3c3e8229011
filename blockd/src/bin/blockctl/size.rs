//! Sizes and durations as people write them, and sizes as people read them.

use blockd::id::BLOCK_BYTES;
use std::time::Duration;

/// Why a size or a duration was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("a size is a number with a unit, like 4GiB, 512MiB, 10G, 1.5TiB, or plain bytes")]
    NotANumber,
    #[error(
        "unknown unit '{0}'; use B, K, M, G, T, P (or KiB ... PiB) for powers of 1024, KB ... PB for powers of 1000"
    )]
    UnknownUnit(String),
    #[error("a size cannot be negative")]
    Negative,
    #[error("a size of zero makes no sense; the smallest is 512 bytes")]
    Zero,
    #[error("larger than 2^64 - 1 bytes")]
    Overflow,
    #[error("not a whole number of bytes")]
    Fraction,
    #[error("{bytes} bytes is not a multiple of 512; the next sizes are {below} and {above} bytes")]
    NotBlocks {
        bytes: u64,
        below: u64,
        above: String,
    },
    #[error("a duration is a whole number with a unit: 500ms, 30s, 2m or 1h, above zero")]
    NotADuration,
}

/// Bytes of a volume: positive and a multiple of the block of 512 bytes.
pub(crate) fn parse_volume_size(text: &str) -> Result<u64, SizeError> {
    let bytes = parse_bytes(text)?;
    if bytes == 0 {
        return Err(SizeError::Zero);
    }
    let below = bytes - bytes % BLOCK_BYTES;
    if below == bytes {
        return Ok(bytes);
    }
    let above = below.checked_add(BLOCK_BYTES);
    Err(SizeError::NotBlocks {
        bytes,
        below,
        above: above.map_or_else(|| "(none)".to_owned(), |above| above.to_string()),
    })
}

/// Exact: `1.5TiB` is counted in integers, and a fraction of a byte is refused.
fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err(SizeError::Negative);
    }
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') {
        return Err(SizeError::NotANumber);
    }
    let unit_bytes = unit_bytes(unit.trim_start())?;
    let whole: u128 = whole.parse().map_err(|_| SizeError::Overflow)?;
    let bytes = whole
        .checked_mul(unit_bytes)
        .and_then(|bytes| u64::try_from(bytes).ok())
        .ok_or(SizeError::Overflow)?;
    bytes
        .checked_add(fraction_bytes(fraction, unit_bytes)?)
        .ok_or(SizeError::Overflow)
}

/// The bytes of `0.fraction` units, which must be whole.
fn fraction_bytes(fraction: &str, unit_bytes: u128) -> Result<u64, SizeError> {
    let digits = fraction.trim_end_matches('0');
    if digits.is_empty() {
        return Ok(0);
    }
    // 2^50 bytes have at most 50 binary, hence 50 decimal places; no unit needs more than 18 here.
    if digits.len() > 18 {
        return Err(SizeError::Fraction);
    }
    let numerator: u128 = digits.parse().map_err(|_| SizeError::NotANumber)?;
    let denominator = digits.bytes().fold(1u128, |power, _| power * 10);
    let scaled = numerator * unit_bytes;
    if !scaled.is_multiple_of(denominator) {
        return Err(SizeError::Fraction);
    }
    u64::try_from(scaled / denominator).map_err(|_| SizeError::Overflow)
}

fn unit_bytes(unit: &str) -> Result<u128, SizeError> {
    let lower = unit.to_ascii_lowercase();
    let (prefix, base) = match lower.as_str() {
        "" | "b" => return Ok(1),
        _ if lower.ends_with("ib") => (&lower[..lower.len() - 2], 1024u128),
        _ if lower.ends_with('b') => (&lower[..lower.len() - 1], 1000),
        _ => (lower.as_str(), 1024),
    };
    let power = match prefix {
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return Err(SizeError::UnknownUnit(unit.to_owned())),
    };
    Ok(base.pow(power))
}

/// `500ms`, `30s`, `2m`, `1h`; a plain number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, SizeError> {
    let text = text.trim();
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let ms_per_unit: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(SizeError::NotADuration),
    };
    let count: u64 = number.parse().map_err(|_| SizeError::NotADuration)?;
    let ms = count.checked_mul(ms_per_unit).filter(|ms| *ms > 0);
    ms.map(Duration::from_millis).ok_or(SizeError::NotADuration)
}

/// `4 GiB`, `1.5 TiB`, `512 B`: three digits at most behind a rounding to one decimal.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = u128::from(bytes) * 10;
    let mut unit = "B";
    for next in UNITS {
        tenths = (tenths + 512) / 1024;
        unit = next;
        if tenths < 10_240 {
            break;
        }
    }
    match tenths % 10 {
        0 => format!("{} {unit}", tenths / 10),
        rest => format!("{}.{rest} {unit}", tenths / 10),
    }
}

/// How long ago, in the largest unit that fits: `5 s`, `3 min`, `2 h`, `9 d`.
pub(crate) fn human_age(age_s: u64) -> String {
    match age_s {
        0..=59 => format!("{age_s} s"),
        60..=3_599 => format!("{} min", age_s / 60),
        3_600..=86_399 => format!("{} h", age_s / 3_600),
        _ => format!("{} d", age_s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_unless_they_end_in_a_plain_b() {
        for (text, bytes) in [
            ("512", 512),
            ("512B", 512),
            ("1k", 1 << 10),
            ("512MiB", 512 << 20),
            ("4GiB", 4 << 30),
            ("4 GiB", 4 << 30),
            ("10G", 10 << 30),
            ("1.5TiB", 3 << 39),
            ("1.50t", 3 << 39),
            ("2P", 2 << 50),
            ("64KB", 64_000),
            ("10gb", 10_000_000_000),
            ("0.5K", 512),
        ] {
            assert_eq!(parse_volume_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_say_what_is_wrong() {
        assert_eq!(parse_volume_size("0"), Err(SizeError::Zero));
        assert_eq!(parse_volume_size("0.0GiB"), Err(SizeError::Zero));
        assert_eq!(parse_volume_size("-4GiB"), Err(SizeError::Negative));
        for text in ["", " ", "GiB", ".5G", "5.", "1.2.3G", "4,5G", "+4G", "nan"] {
            let error = parse_volume_size(text);
            assert!(
                matches!(
                    error,
                    Err(SizeError::NotANumber | SizeError::UnknownUnit(_))
                ),
                "{text}: {error:?}"
            );
        }
        assert_eq!(
            parse_volume_size("4Gi"),
            Err(SizeError::UnknownUnit("Gi".to_owned()))
        );
        assert_eq!(
            parse_volume_size("4E"),
            Err(SizeError::UnknownUnit("E".to_owned()))
        );
        assert_eq!(parse_volume_size("0.3B"), Err(SizeError::Fraction));
        assert_eq!(
            parse_volume_size("0.0000000000000000001G"),
            Err(SizeError::Fraction)
        );
    }

    #[test]
    fn the_largest_size_is_the_last_block_below_2_to_64() {
        let last = u64::MAX - 511;
        assert_eq!(parse_volume_size(&last.to_string()), Ok(last));
        for text in [
            "18446744073709551616",
            "16384P",
            "99999999999999999999999999999999999999999",
            "18446744073709551615.9K",
        ] {
            assert_eq!(parse_volume_size(text), Err(SizeError::Overflow), "{text}");
        }
        let error = parse_volume_size("18446744073709551615").unwrap_err();
        assert!(error.to_string().ends_with("and (none) bytes"), "{error}");
    }

    #[test]
    fn a_size_that_is_no_multiple_of_a_block_names_its_neighbours() {
        let error = parse_volume_size("1000").unwrap_err();
        assert_eq!(
            error.to_string(),
            "1000 bytes is not a multiple of 512; the next sizes are 512 and 1024 bytes"
        );
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        for text in ["", "s", "0s", "-1s", "1.5s", "1d", "99999999999999999999m"] {
            assert_eq!(parse_duration(text), Err(SizeError::NotADuration), "{text}");
        }
    }

    #[test]
    fn people_read_at_most_one_decimal() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (4 << 30, "4 GiB"),
            (3 << 39, "1.5 TiB"),
            ((1 << 30) - 1, "1 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_bytes(bytes), text, "{bytes}");
        }
        assert_eq!(human_age(59), "59 s");
        assert_eq!(human_age(60), "1 min");
        assert_eq!(human_age(7_200), "2 h");
        assert_eq!(human_age(864_000), "10 d");
    }
}
