//! Names of clusters, nodes, volumes and snapshots.

use crate::limits::NAME_CHARS_MAX;
use serde::{Deserialize, Serialize};

/// Why a text is no name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum NameError {
    /// Nothing there.
    #[error("the name is empty: give 1 to {NAME_CHARS_MAX} characters")]
    Empty,
    /// Over the limit; carries the length in bytes.
    #[error("the name has {0} bytes: give {NAME_CHARS_MAX} at the most")]
    TooLong(usize),
    /// Could be taken for an option or a hidden file.
    #[error("the name starts with '{0}': start it with a letter, a digit or '_'")]
    BadStart(char),
    /// A character that is not allowed.
    #[error("the name contains {0:?}: use only letters A-Z and a-z, digits, '.', '_' and '-'")]
    BadCharacter(char),
    /// More than one `@`, or nothing on a side of it.
    #[error("write a snapshot as VOLUME@SNAPSHOT, with one '@'")]
    NotASnapshot,
    /// No unique id.
    #[error("a unique id has 32 hexadecimal digits")]
    UniqueId,
}

/// Checks the name of a cluster, node, volume or snapshot.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let first = name.chars().next().ok_or(NameError::Empty)?;
    if name.len() > NAME_CHARS_MAX {
        return Err(NameError::TooLong(name.len()));
    }
    if matches!(first, '-' | '.') {
        return Err(NameError::BadStart(first));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.chars()
        .find(|c| !allowed(*c))
        .map_or(Ok(()), |c| Err(NameError::BadCharacter(c)))
}

/// Splits `VOL` or `VOL@SNAP` into the volume's and, if given, the snapshot's name; both checked.
///
/// # Errors
/// What is wrong with it.
pub fn split_volume_name(text: &str) -> Result<(&str, Option<&str>), NameError> {
    let (volume, snapshot) = match text.split_once('@') {
        Some((volume, snapshot)) => (volume, Some(snapshot)),
        None => (text, None),
    };
    if snapshot.is_some_and(|s| s.is_empty() || s.contains('@') || volume.is_empty()) {
        return Err(NameError::NotASnapshot);
    }
    check_name(volume)?;
    snapshot.map_or(Ok(()), check_name)?;
    Ok((volume, snapshot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_refused_for_what_is_wrong() {
        let long = "x".repeat(NAME_CHARS_MAX + 1);
        let cases: &[(&str, Result<(), NameError>)] = &[
            ("a", Ok(())),
            ("Vol_1.img-2", Ok(())),
            ("_x", Ok(())),
            (&long[1..], Ok(())),
            ("", Err(NameError::Empty)),
            (&long, Err(NameError::TooLong(NAME_CHARS_MAX + 1))),
            ("-rf", Err(NameError::BadStart('-'))),
            ("..", Err(NameError::BadStart('.'))),
            ("a/b", Err(NameError::BadCharacter('/'))),
            ("a b", Err(NameError::BadCharacter(' '))),
            ("a\0", Err(NameError::BadCharacter('\0'))),
            ("\u{e4}", Err(NameError::BadCharacter('\u{e4}'))),
            ("a@b", Err(NameError::BadCharacter('@'))),
        ];
        for (name, want) in cases {
            assert_eq!(&check_name(name), want, "{name:?}");
        }
    }

    #[test]
    fn a_snapshot_is_written_with_one_at() {
        assert_eq!(split_volume_name("vm1"), Ok(("vm1", None)));
        assert_eq!(split_volume_name("vm1@daily"), Ok(("vm1", Some("daily"))));
        for bad in ["vm1@", "@daily", "@", "a@b@c"] {
            assert_eq!(
                split_volume_name(bad),
                Err(NameError::NotASnapshot),
                "{bad}"
            );
        }
        assert_eq!(split_volume_name("vm1@-x"), Err(NameError::BadStart('-')));
        assert_eq!(split_volume_name(""), Err(NameError::Empty));
    }
}
