//! Who this server is: `STATE/node`, written when it is first started and when it joins a cluster.
//!
//! ```text
//! line 1   "blockd-node" SP format version (decimal) SP CRC32 of the rest (8 hex digits) LF
//! rest     JSON: unique_id (32 hex digits), cluster (null or name, id, number, node_name, address,
//!          registry_made)
//! ```
//!
//! The file is replaced by writing `node.new`, fdatasync, rename, and fsync of the directory, so
//! that a crash leaves the old or the new one.

use crate::id::NodeNo;
use crate::io::host::random_u128;
use crate::io::state_dir::StateDir;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: &str = "blockd-node";
const FORMAT: u32 = 1;

/// The identity of a server, kept in its state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// 128 random bits in hex; made once.
    pub(crate) unique_id: String,
    pub(crate) cluster: Option<Membership>,
}

/// The cluster that a server belongs to, and as which node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Membership {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) number: NodeNo,
    pub(crate) node_name: String,
    /// Peer address under which the others know this node.
    pub(crate) address: String,
    /// It has had a registry, and may have acknowledged what was in it. Identities of the first
    /// builds do not say so before their next start.
    #[serde(default)]
    pub(crate) registry_made: bool,
}

impl Membership {
    /// Whether it had a registry and has none any more. It must not go on with an empty one: it would
    /// acknowledge as the server that it was, and forget what it has acknowledged.
    pub(crate) fn registry_is_lost(&self, state: &dyn StateDir) -> bool {
        self.registry_made && !state.has_registry()
    }
}

/// Why the identity cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(
        "{directory} belongs to {found}, not to {owner}: put this server's own directory back, or \
         start with an empty state directory"
    )]
    Foreign {
        directory: PathBuf,
        found: String,
        owner: String,
    },
    #[error("{path} is of format {found}, this blockd reads {FORMAT}: use a newer blockd")]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "{path} is damaged ({reason}): restore it from a copy, or start with an empty directory"
    )]
    Damaged { path: PathBuf, reason: String },
}

impl Identity {
    /// Reads the identity, or makes one in a directory that has none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub(crate) fn open(state: &dyn StateDir) -> Result<Self, IdentityError> {
        if let Some(identity) = Self::read(state)? {
            return Ok(identity);
        }
        let unique_id = random_u128().map_err(|source| IdentityError::Io {
            action: "read",
            path: PathBuf::from("/dev/urandom"),
            source,
        })?;
        let identity = Self {
            unique_id: format!("{unique_id:032x}"),
            cluster: None,
        };
        identity.save(state)?;
        Ok(identity)
    }

    /// Reads the identity; `None` if the directory has none.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub(crate) fn read(state: &dyn StateDir) -> Result<Option<Self>, IdentityError> {
        let path = state.path().join("node");
        let text = state.read("node").map_err(failed("read", path.clone()))?;
        text.map(|text| Self::parse(&path, &text)).transpose()
    }

    fn parse(path: &Path, text: &str) -> Result<Self, IdentityError> {
        let damaged = |reason: &str| IdentityError::Damaged {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let (head, body) = text.split_once('\n').ok_or_else(|| damaged("no header"))?;
        let fields: Vec<&str> = head.split(' ').collect();
        let [MAGIC, format, crc] = fields[..] else {
            return Err(damaged("no header"));
        };
        let found: u32 = format.parse().map_err(|_| damaged("no format version"))?;
        if found > FORMAT {
            return Err(IdentityError::Newer {
                path: path.to_owned(),
                found,
            });
        }
        if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(body.as_bytes())) {
            return Err(damaged("checksum mismatch"));
        }
        serde_json::from_str(body).map_err(|error| damaged(&error.to_string()))
    }

    /// Replaces the file; durable when it returns.
    ///
    /// # Errors
    /// [`IdentityError::Io`].
    pub(crate) fn save(&self, state: &dyn StateDir) -> Result<(), IdentityError> {
        let path = state.path().join("node");
        let body = serde_json::to_string(self)
            .map_err(io::Error::from)
            .map_err(failed("encode", path.clone()))?;
        let crc = crc32fast::hash(body.as_bytes());
        let text = format!("{MAGIC} {FORMAT} {crc:08x}\n{body}");
        state.replace("node", &text).map_err(failed("write", path))
    }
}

fn failed(action: &'static str, path: PathBuf) -> impl FnOnce(io::Error) -> IdentityError {
    move |source| IdentityError::Io {
        action,
        path,
        source,
    }
}

/// Marks a directory below the state directory as one of `owner`, or checks that it is: a page store
/// or registry of another server or cluster must not be served as this one's.
///
/// # Errors
/// [`IdentityError::Foreign`], or [`IdentityError::Io`].
pub(crate) fn claim(
    state: &dyn StateDir,
    directory: &str,
    owner: &str,
) -> Result<(), IdentityError> {
    let name = format!("{directory}/belongs-to");
    let path = state.path().join(&name);
    match state.read(&name) {
        Ok(Some(found)) if found.trim() == owner => Ok(()),
        Ok(Some(found)) => Err(IdentityError::Foreign {
            directory: state.path().join(directory),
            found: found.trim().chars().take(64).collect(),
            owner: owner.to_owned(),
        }),
        Ok(None) => {
            let written = state.replace(&name, &format!("{owner}\n"));
            written.map_err(failed("write", path))
        }
        Err(source) => Err(failed("read", path)(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::state_dir::Directory;

    #[test]
    fn it_is_made_once_and_read_back() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Directory(temporary.path().to_owned());
        let mut made = Identity::open(&dir).unwrap();
        assert_eq!(Identity::open(&dir).unwrap(), made);
        made.cluster = Some(Membership {
            name: "c".to_owned(),
            id: "0f".to_owned(),
            number: NodeNo(3),
            node_name: "n3".to_owned(),
            address: "127.0.0.1:10808".to_owned(),
            registry_made: false,
        });
        made.save(&dir).unwrap();
        assert_eq!(Identity::open(&dir).unwrap(), made);
    }

    /// The golden file of format 1: later versions must read it.
    #[test]
    fn format_1_is_read() {
        let body = r#"{"unique_id":"00ff","cluster":null}"#;
        let text = format!("blockd-node 1 dc0c4840\n{body}");
        let read = Identity::parse(Path::new("node"), &text);
        assert_eq!(
            format!("{:08x}", crc32fast::hash(body.as_bytes())),
            "dc0c4840"
        );
        assert_eq!(read.unwrap().unique_id, "00ff");
    }

    #[test]
    fn a_directory_of_another_owner_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        std::fs::create_dir(temporary.path().join("store")).unwrap();
        let dir = Directory(temporary.path().to_owned());
        claim(&dir, "store", "me").unwrap();
        claim(&dir, "store", "me").unwrap();
        let error = claim(&dir, "store", "you").unwrap_err().to_string();
        assert!(error.contains("belongs to me, not to you"), "{error}");
    }

    #[test]
    fn newer_and_damaged_files_are_refused_with_the_reason() {
        let parse = |text| Identity::parse(Path::new("node"), text).unwrap_err();
        assert!(matches!(
            parse("blockd-node 2 0\n{}"),
            IdentityError::Newer { found: 2, .. }
        ));
        for text in [
            "",
            "x",
            "blockd-node 1 00000000\n{}",
            "other 1 0\n{}",
            "blockd-node x 0\n",
        ] {
            assert!(
                matches!(parse(text), IdentityError::Damaged { .. }),
                "{text}"
            );
        }
    }
}
