//! `stats`: asks a mount what it has done.

use super::adapter::STATS_XATTR;
use crate::error::FuseFsError;
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::Path;

/// Bytes of an answer: the kernel's limit for an attribute.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// Prints the statistics of the mount on `dir`.
///
/// # Errors
/// [`FuseFsError::NotMounted`] if none of ours is there.
pub fn run(dir: &Path, json: bool) -> Result<(), FuseFsError> {
    let system = |source| FuseFsError::System {
        what: "reading the statistics",
        source,
    };
    let mut answer = vec![0; MAX_ANSWER_BYTES];
    let length = match rustix::fs::getxattr(dir, STATS_XATTR, &mut answer) {
        Ok(length) => length,
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {
            return Err(FuseFsError::NotMounted {
                dir: dir.to_owned(),
            });
        }
        Err(error) => return Err(system(error.into())),
    };
    let stats = serde_json::from_slice(&answer[..length]);
    let stats: Value = stats.map_err(|error| system(error.into()))?;
    let text = if json {
        stats.to_string() + "\n"
    } else {
        table(&stats)
    };
    io::stdout().write_all(text.as_bytes()).map_err(system)
}

fn table(stats: &Value) -> String {
    let columns = [
        "count",
        "errors",
        "answered_at_once",
        "mean_us",
        "p50_below_us",
        "p99_below_us",
        "max_us",
    ];
    let mut text = format!("{:<12}", "");
    for column in columns {
        let _ = write!(text, " {column:>16}");
    }
    text.push('\n');
    for (name, operation) in stats["operations"].as_object().into_iter().flatten() {
        let _ = write!(text, "{name:<12}");
        for column in columns {
            let _ = write!(text, " {:>16}", operation[column].to_string());
        }
        text.push('\n');
    }
    let filesystem = stats["filesystem"].as_object();
    let values = stats.as_object().into_iter().chain(filesystem).flatten();
    for (name, value) in values {
        if !value.is_object() {
            let _ = writeln!(text, "{name} {value}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_for_each_kind() {
        let operation = json!({"count": 3, "errors": 0, "mean_us": 1.5});
        let filesystem = json!({"commits": 4});
        let text = table(
            &json!({"mounted_s": 9, "operations": {"read": operation}, "filesystem": filesystem}),
        );
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[1].starts_with("read  ") && lines[1].contains(" 1.5 "),
            "{text}"
        );
        assert_eq!(lines[2..], ["mounted_s 9", "commits 4"]);
    }
}
