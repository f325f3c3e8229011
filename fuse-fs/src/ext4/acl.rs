//! Access control lists of POSIX: as ext4 keeps them, as programs exchange them, and what they mean for the mode.
//!
//! ```text
//! ext4:     u32 1, entries: u16 tag, u16 permissions, and u32 id for a named user or group only
//! programs: u32 2, entries: u16 tag, u16 permissions, u32 id (0xffffffff without one)
//! ```

use crate::ext4::bytes::{le16, le32};

const STORED_VERSION: u32 = 1;
const EXCHANGED_VERSION: u32 = 2;
const VERSION_BYTES: usize = 4;
const SHORT_BYTES: usize = 4;
const LONG_BYTES: usize = 8;
const NO_ID: u32 = u32::MAX;
const ALL: u16 = 7;

/// Whom an entry is for. The order is that of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Tag {
    Owner = 0x01,
    User = 0x02,
    Group = 0x04,
    NamedGroup = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

impl Tag {
    fn of(number: u16) -> Option<Self> {
        let all = [
            Self::Owner,
            Self::User,
            Self::Group,
            Self::NamedGroup,
            Self::Mask,
            Self::Other,
        ];
        all.into_iter().find(|tag| *tag as u16 == number)
    }

    fn has_id(self) -> bool {
        matches!(self, Self::User | Self::NamedGroup)
    }
}

/// One entry; `id` counts for a named user or group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AclEntry {
    pub tag: Tag,
    /// Read 4, write 2, execute 1.
    pub permissions: u16,
    pub id: u32,
}

/// A list in its order: owner, users, group, named groups, mask, others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl(Vec<AclEntry>);

/// Bytes that are no list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAcl;

impl Acl {
    /// Reads what ext4 keeps.
    ///
    /// # Errors
    /// [`NoAcl`]
    pub fn from_stored(bytes: &[u8]) -> Result<Self, NoAcl> {
        if bytes.len() < VERSION_BYTES || le32(bytes, 0) != STORED_VERSION {
            return Err(NoAcl);
        }
        let (mut at, mut entries) = (VERSION_BYTES, Vec::new());
        while at < bytes.len() {
            let tag = Tag::of(le16(bytes, at)).ok_or(NoAcl)?;
            let length = if tag.has_id() {
                LONG_BYTES
            } else {
                SHORT_BYTES
            };
            if at + length > bytes.len() {
                return Err(NoAcl);
            }
            entries.push(entry(&bytes[at..at + length], tag));
            at += length;
        }
        Self(entries).valid()
    }

    /// What ext4 keeps.
    #[must_use]
    pub fn to_stored(&self) -> Vec<u8> {
        let mut bytes = STORED_VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend((entry.tag as u16).to_le_bytes());
            bytes.extend(entry.permissions.to_le_bytes());
            if entry.tag.has_id() {
                bytes.extend(entry.id.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads what a program sets; `None`, a list without entries, takes the list away.
    ///
    /// # Errors
    /// [`NoAcl`]
    pub fn from_exchanged(bytes: &[u8]) -> Result<Option<Self>, NoAcl> {
        if bytes.len() < VERSION_BYTES || le32(bytes, 0) != EXCHANGED_VERSION {
            return Err(NoAcl);
        }
        let entries = bytes[VERSION_BYTES..].chunks(LONG_BYTES);
        let entries = entries.map(|bytes| {
            let tag = Tag::of(le16(bytes, 0)).filter(|_| bytes.len() == LONG_BYTES);
            Ok(entry(bytes, tag.ok_or(NoAcl)?))
        });
        match entries.collect::<Result<Vec<_>, _>>()? {
            none if none.is_empty() => Ok(None),
            entries => Self(entries).valid().map(Some),
        }
    }

    /// Whether a program means to take the list away.
    #[must_use]
    pub fn is_without_entries(bytes: &[u8]) -> bool {
        bytes.len() <= VERSION_BYTES
    }

    /// What a program gets.
    #[must_use]
    pub fn to_exchanged(&self) -> Vec<u8> {
        let mut bytes = EXCHANGED_VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend((entry.tag as u16).to_le_bytes());
            bytes.extend(entry.permissions.to_le_bytes());
            bytes.extend(entry.id.to_le_bytes());
        }
        bytes
    }

    /// In order, the three that every list has once, and a mask if somebody is named.
    fn valid(self) -> Result<Self, NoAcl> {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let ordered = self.0.is_sorted_by_key(|entry| entry.tag);
        let permissions = self.0.iter().all(|entry| entry.permissions <= ALL);
        let ids = self
            .0
            .iter()
            .all(|entry| !entry.tag.has_id() || entry.id != NO_ID);
        let once = [Tag::Owner, Tag::Group, Tag::Other]
            .into_iter()
            .all(|tag| count(tag) == 1);
        let named = count(Tag::User) + count(Tag::NamedGroup) > 0;
        let masked = count(Tag::Mask) == 1 || (count(Tag::Mask) == 0 && !named);
        if ordered && permissions && ids && once && masked {
            Ok(self)
        } else {
            Err(NoAcl)
        }
    }

    /// Whether the mode says all that the list does.
    #[must_use]
    pub fn is_mode(&self) -> bool {
        let plain = |entry: &AclEntry| matches!(entry.tag, Tag::Owner | Tag::Group | Tag::Other);
        self.0.iter().all(plain)
    }

    /// The permission bits of a file with this list: those of the group are the mask's, if there is one.
    #[must_use]
    pub fn mode(&self) -> u16 {
        let of = |tag| {
            self.0
                .iter()
                .find(|entry| entry.tag == tag)
                .map(|entry| entry.permissions)
        };
        let class = |tag| of(tag).unwrap_or(0);
        class(Tag::Owner) << 6
            | of(Tag::Mask).unwrap_or_else(|| class(Tag::Group)) << 3
            | class(Tag::Other)
    }

    /// The list of a file whose mode is changed.
    #[must_use]
    pub fn with_mode(mut self, mode: u16) -> Self {
        self.set_classes(|_, class| class, mode);
        self
    }

    /// The list of a file that is made with `mode` in a directory that has this default list, and the permission
    /// bits of its mode.
    #[must_use]
    pub fn inherited(mut self, mode: u16) -> (Self, u16) {
        self.set_classes(|permissions, class| permissions & class, mode);
        let mode = self.mode();
        (self, mode)
    }

    /// Sets the entries that stand for the three classes of a mode.
    fn set_classes(&mut self, change: impl Fn(u16, u16) -> u16, mode: u16) {
        let masked = self.0.iter().any(|entry| entry.tag == Tag::Mask);
        for entry in &mut self.0 {
            let class = match entry.tag {
                Tag::Owner => mode >> 6,
                Tag::Mask => mode >> 3,
                Tag::Group if !masked => mode >> 3,
                Tag::Other => mode,
                _ => continue,
            };
            entry.permissions = change(entry.permissions, class & ALL);
        }
    }
}

fn entry(bytes: &[u8], tag: Tag) -> AclEntry {
    let id = if tag.has_id() { le32(bytes, 4) } else { NO_ID };
    let permissions = le16(bytes, 2);
    AclEntry {
        tag,
        permissions,
        id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(Tag, u16, u32)]) -> Acl {
        let entries = entries.iter().map(|(tag, permissions, id)| AclEntry {
            tag: *tag,
            permissions: *permissions,
            id: *id,
        });
        Acl(entries.collect())
    }

    fn full() -> Acl {
        list(&[
            (Tag::Owner, 7, NO_ID),
            (Tag::User, 6, 1000),
            (Tag::User, 4, 70_000),
            (Tag::Group, 5, NO_ID),
            (Tag::NamedGroup, 3, 50),
            (Tag::Mask, 6, NO_ID),
            (Tag::Other, 1, NO_ID),
        ])
    }

    #[test]
    fn both_forms_are_read_as_they_are_written() {
        let acl = full();
        assert_eq!(acl.to_stored().len(), 4 + 4 * 4 + 3 * 8);
        assert_eq!(Acl::from_stored(&acl.to_stored()), Ok(acl.clone()));
        assert_eq!(Acl::from_exchanged(&acl.to_exchanged()), Ok(Some(acl)));
        assert_eq!(Acl::from_exchanged(&2_u32.to_le_bytes()), Ok(None));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let missing = list(&[(Tag::Owner, 7, NO_ID), (Tag::Other, 1, NO_ID)]);
        let unmasked = list(&[
            (Tag::Owner, 7, NO_ID),
            (Tag::User, 7, 5),
            (Tag::Group, 7, NO_ID),
            (Tag::Other, 1, NO_ID),
        ]);
        let disordered = list(&[
            (Tag::Group, 7, NO_ID),
            (Tag::Owner, 7, NO_ID),
            (Tag::Other, 1, NO_ID),
        ]);
        let wide = list(&[
            (Tag::Owner, 8, NO_ID),
            (Tag::Group, 7, NO_ID),
            (Tag::Other, 1, NO_ID),
        ]);
        for wrong in [missing, unmasked, disordered, wide] {
            assert_eq!(Acl::from_exchanged(&wrong.to_exchanged()), Err(NoAcl));
            assert_eq!(Acl::from_stored(&wrong.to_stored()), Err(NoAcl));
        }
        let bytes = full().to_exchanged();
        for length in [0, 3, 5, bytes.len() - 1] {
            assert_eq!(
                Acl::from_exchanged(&bytes[..length]),
                Err(NoAcl),
                "{length}"
            );
        }
        for length in 0..full().to_stored().len() {
            assert_eq!(
                Acl::from_stored(&full().to_stored()[..length]),
                Err(NoAcl),
                "{length}"
            );
        }
    }

    #[test]
    fn the_mode_is_owner_mask_and_others() {
        assert_eq!(full().mode(), 0o761);
        assert!(!full().is_mode());
        let changed = full().with_mode(0o640);
        assert_eq!(changed.mode(), 0o640);
        assert_eq!(changed.0[3].permissions, 5, "the group itself stays");
    }

    /// As `setfacl -d` and `touch` show it with the kernel's ext4.
    #[test]
    fn a_new_file_gets_what_the_default_and_its_mode_allow() {
        let (acl, mode) = full().inherited(0o666);
        assert_eq!(mode, 0o660);
        assert_eq!(acl.0[0].permissions, 6);
        assert_eq!(acl.0[5].permissions, 6);
        let plain = list(&[
            (Tag::Owner, 7, NO_ID),
            (Tag::Group, 5, NO_ID),
            (Tag::Other, 5, NO_ID),
        ]);
        let (acl, mode) = plain.inherited(0o640);
        assert_eq!((mode, acl.is_mode()), (0o640, true));
    }
}
