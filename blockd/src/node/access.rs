//! Who asks for administration, and what that one may do.
//!
//! The peer protocol and the unix socket are for administrators. Over TCP the HTTP face knows its
//! callers by tokens, of which the configuration has the SHA-256 only.

use crate::admin::{AdminError, AdminErrorKind, Effect};
use crate::control::registry::{NameError, check_name};
use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use serde::Deserialize;
use std::fmt;

/// What a caller may do; each includes those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Look.
    #[default]
    ReadOnly,
    /// Everything that takes nothing away for good.
    Operator,
    /// Everything.
    Admin,
}

impl Role {
    /// The most that it may do.
    fn limit(self) -> Effect {
        match self {
            Self::ReadOnly => Effect::Reads,
            Self::Operator => Effect::Changes,
            Self::Admin => Effect::Destroys,
        }
    }

    fn needed_for(effect: Effect) -> Self {
        match effect {
            Effect::Reads => Self::ReadOnly,
            Effect::GoesOn | Effect::Changes => Self::Operator,
            Effect::Destroys => Self::Admin,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "read-only",
            Self::Operator => "operator",
            Self::Admin => "admin",
        })
    }
}

/// One that asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name of its token, if it has one.
    pub(crate) name: Option<String>,
    /// Its address, or `unix`.
    pub(crate) from: String,
    pub(crate) role: Role,
}

impl Caller {
    /// One whose way here is open to administrators only.
    pub(crate) fn admin(from: impl fmt::Display) -> Self {
        Self {
            name: None,
            from: from.to_string(),
            role: Role::Admin,
        }
    }

    /// Who it is, in a word.
    pub(crate) fn who(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.from)
    }

    /// Refuses what the role does not include.
    pub(crate) fn check(&self, effect: Effect) -> Result<(), AdminError> {
        if effect <= self.role.limit() {
            return Ok(());
        }
        let (who, role, needed) = (self.who(), self.role, Role::needed_for(effect));
        Err(AdminError {
            kind: AdminErrorKind::Forbidden,
            message: format!("{who} is {role}: this needs the role {needed}"),
        })
    }
}

/// A table `http_access` of the configuration, as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessToken {
    /// Who has the token; the audit log names it.
    pub name: String,
    /// What that one may do.
    pub role: Role,
    /// SHA-256 of the token, in hexadecimal digits.
    pub token_sha256: String,
}

/// What is wrong with a token's table.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("name {0:?}: {1}")]
    Name(String, NameError),
    #[error(
        "token_sha256 of {0}: give the 64 hexadecimal digits that `printf %s TOKEN | sha256sum` prints"
    )]
    Digest(String),
    #[error("{0} and {1} have the same token: give each its own, so that it is known who asks")]
    Shared(String, String),
}

type Digest = [u8; SHA256_OUTPUT_LEN];

/// Everybody who has a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens(Vec<(Digest, String, Role)>);

impl Tokens {
    /// Checks the tables.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn new(tables: &[AccessToken]) -> Result<Self, TokenError> {
        let mut tokens: Vec<(Digest, String, Role)> = Vec::with_capacity(tables.len());
        for table in tables {
            let name = table.name.clone();
            check_name(&name).map_err(|error| TokenError::Name(name.clone(), error))?;
            let digest =
                parse(&table.token_sha256).ok_or_else(|| TokenError::Digest(name.clone()))?;
            if let Some((_, other, _)) = tokens.iter().find(|(known, ..)| *known == digest) {
                return Err(TokenError::Shared(other.clone(), name));
            }
            tokens.push((digest, name, table.role));
        }
        Ok(Self(tokens))
    }

    /// Whether nobody has one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose token it is. Digests are compared: how long that takes tells nothing of a token.
    pub(crate) fn find(&self, token: &str) -> Option<(&str, Role)> {
        let wanted = digest(&SHA256, token.as_bytes());
        let mut known = self.0.iter();
        let found = known.find(|(digest, ..)| digest == wanted.as_ref());
        found.map(|(_, name, role)| (name.as_str(), *role))
    }
}

fn parse(hex: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    if !hex.is_ascii() || hex.len() != 2 * digest.len() {
        return None;
    }
    for (index, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of `abc` (FIPS 180-2, appendix B.1).
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn table(name: &str, token_sha256: &str) -> AccessToken {
        AccessToken {
            name: name.to_owned(),
            role: Role::Operator,
            token_sha256: token_sha256.to_owned(),
        }
    }

    #[test]
    fn a_token_is_known_by_its_digest() {
        let tokens = Tokens::new(&[table("alice", ABC)]).unwrap();
        assert_eq!(tokens.find("abc"), Some(("alice", Role::Operator)));
        for other in ["", "ab", "abcd", ABC] {
            assert_eq!(tokens.find(other), None, "{other}");
        }
    }

    #[test]
    fn tables_that_name_nobody_are_refused() {
        for digest in [
            "",
            "abc",
            &ABC[1..],
            &format!("{ABC}0"),
            &ABC.replace('b', "g"),
        ] {
            let refused = Tokens::new(&[table("alice", digest)]);
            assert_eq!(refused, Err(TokenError::Digest("alice".to_owned())));
        }
        let nameless = Tokens::new(&[table("", ABC)]);
        assert!(matches!(nameless, Err(TokenError::Name(..))));
        let shared = Tokens::new(&[table("alice", ABC), table("bob", &ABC.to_uppercase())]);
        assert!(matches!(shared, Err(TokenError::Shared(..))));
    }

    #[test]
    fn each_role_includes_the_smaller_ones() {
        let effects = [
            Effect::Reads,
            Effect::GoesOn,
            Effect::Changes,
            Effect::Destroys,
        ];
        for (role, allowed) in [(Role::ReadOnly, 1), (Role::Operator, 3), (Role::Admin, 4)] {
            let caller = Caller {
                role,
                ..Caller::admin("unix")
            };
            let may = |effect: &&Effect| caller.check(**effect).is_ok();
            assert_eq!(effects.iter().filter(may).count(), allowed, "{role}");
        }
    }
}
