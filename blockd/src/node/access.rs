//! Who asks for administration, and what that one may do.
//!
//! The peer protocol is for administrators.

use crate::admin::{AdminError, AdminErrorKind, Effect};
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

#[cfg(test)]
mod tests {
    use super::*;

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
