//! The names of a directory, from a cookie on.
//!
//! A cookie tells the place of a name in the order by which names are listed, whatever else comes and goes:
//! ```text
//! 0 the beginning, 1 behind ".", 2 behind "..", else
//! bits 32..63 the name's hash (without its lowest bit), 8..32 CRC-32C of the name, 0..8 3 and how many before it share both
//! ```

use super::draft::Draft;
use super::search::{Hasher, Position};
use crate::ext4::crc::{START, crc32c};
use crate::ext4::dir;
use crate::ext4::error::FsError;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::Kind;
use crate::ext4::inode_cell::InodeCell;

const BEHIND_DOT: u64 = 1;
const BEHIND_DOTDOT: u64 = 2;
const FIRST_ORDINAL: u64 = 3;
const ORDINALS: u64 = 1 << 8;

/// One name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub inode: u32,
    /// `None`: the filesystem does not store kinds.
    pub kind: Option<Kind>,
    pub name: Vec<u8>,
    /// Listing goes on behind this name.
    pub cookie: u64,
}

impl Filesystem {
    /// The names behind `cookie`, in the order of their cookies: about `limit`, none only at the end.
    ///
    /// # Errors
    /// [`crate::ext4::error::Refusal::NotDirectory`]; what is wrong with the directory; the device's.
    pub async fn list(
        &self,
        directory: &InodeCell,
        cookie: u64,
        limit: usize,
    ) -> Result<Vec<Listed>, FsError> {
        let state = directory.read().await;
        let draft = match Draft::of(self, &state) {
            // One that was removed has no names, and is listed as long as it is open.
            Err(FsError::Refused(crate::ext4::error::Refusal::NotFound)) => return Ok(Vec::new()),
            draft => draft?,
        };
        let mut listed = Vec::new();
        draft.list_dots(cookie, &mut listed).await?;
        draft.list_names(cookie, limit, &mut listed).await?;
        Ok(listed)
    }
}

impl Draft<'_> {
    async fn list_dots(&self, cookie: u64, listed: &mut Vec<Listed>) -> Result<(), FsError> {
        let dots = [
            (b".".to_vec(), self.number(), BEHIND_DOT),
            (b"..".to_vec(), self.parent().await?, BEHIND_DOTDOT),
        ];
        for (name, inode, behind) in dots {
            if cookie < behind {
                let kind = Some(Kind::Directory);
                listed.push(Listed {
                    inode,
                    kind,
                    name,
                    cookie: behind,
                });
            }
        }
        Ok(())
    }

    async fn list_names(
        &self,
        cookie: u64,
        limit: usize,
        listed: &mut Vec<Listed>,
    ) -> Result<(), FsError> {
        let hasher = self.hasher().await?;
        let mut position = self.seek((cookie >> 32 << 1) as u32).await?;
        loop {
            let mut names = Vec::new();
            let more = self
                .collect(&mut position, hasher, cookie, limit, &mut names)
                .await?;
            names.sort_unstable_by(|one, other| {
                (one.cookie, &one.name).cmp(&(other.cookie, &other.name))
            });
            number(&mut names);
            listed.extend(names.into_iter().filter(|name| name.cookie > cookie));
            if !more || listed.len() >= limit {
                return Ok(());
            }
        }
    }

    /// The names of a leaf, and of those behind it that share its last hash; of all leaves, without an index.
    /// Whether there are more leaves.
    async fn collect(
        &self,
        position: &mut Position,
        hasher: Hasher<'_>,
        cookie: u64,
        limit: usize,
        names: &mut Vec<Listed>,
    ) -> Result<bool, FsError> {
        loop {
            self.collect_leaf(self.block_at(position)?, hasher, cookie, names)
                .await?;
            let next = self.next_hash(position)?;
            let linear = matches!(position, Position::Linear(_));
            if linear {
                keep_first(names, limit);
            }
            if !self.advance(position).await? {
                return Ok(false);
            }
            if !linear && next.is_some_and(|hash| hash & 1 == 0) {
                return Ok(true);
            }
        }
    }

    async fn collect_leaf(
        &self,
        block: u64,
        hasher: Hasher<'_>,
        cookie: u64,
        names: &mut Vec<Listed>,
    ) -> Result<(), FsError> {
        let bytes = self.leaf(block).await?;
        for slot in dir::slots(&bytes, self.stores_kinds()) {
            let entry = slot.map_err(|problem| self.corrupt(block, problem))?.entry;
            if entry.inode == 0 || entry.name == b"." || entry.name == b".." {
                continue;
            }
            let place = place(hasher.of(entry.name), entry.name);
            if place | (ORDINALS - 1) > cookie {
                names.push(Listed {
                    inode: entry.inode,
                    kind: Kind::of_number(entry.kind),
                    name: entry.name.to_vec(),
                    cookie: place,
                });
            }
        }
        Ok(())
    }
}

/// A cookie without its lowest byte.
fn place(hash: u32, name: &[u8]) -> u64 {
    let minor = u64::from(crc32c(START, name) >> 8);
    u64::from(hash >> 1) << 32 | minor << 8
}

/// Gives sorted names that share a place their ordinals.
fn number(names: &mut [Listed]) {
    let (mut place, mut ordinal) = (u64::MAX, FIRST_ORDINAL);
    for name in names {
        ordinal = if name.cookie == place {
            (ordinal + 1).min(ORDINALS - 1)
        } else {
            FIRST_ORDINAL
        };
        place = name.cookie;
        name.cookie = place | ordinal;
    }
}

/// Bounds what is kept of a long list: the first in order, more than will be asked for.
fn keep_first(names: &mut Vec<Listed>, limit: usize) {
    let keep = limit.saturating_add(ORDINALS as usize);
    if names.len() >= keep.saturating_mul(2) {
        names.sort_unstable_by(|one, other| {
            (one.cookie, &one.name).cmp(&(other.cookie, &other.name))
        });
        names.truncate(keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &[u8], cookie: u64) -> Listed {
        Listed {
            inode: 12,
            kind: None,
            name: name.to_vec(),
            cookie,
        }
    }

    #[test]
    fn names_of_one_place_have_cookies_of_their_own() {
        let mut names = vec![
            listed(b"a", 256),
            listed(b"b", 512),
            listed(b"c", 512),
            listed(b"d", 768),
        ];
        number(&mut names);
        let cookies: Vec<u64> = names.iter().map(|name| name.cookie).collect();
        assert_eq!(cookies, [256 + 3, 512 + 3, 512 + 4, 768 + 3]);
    }

    #[test]
    fn no_name_has_the_cookie_of_the_beginning_or_a_negative_one() {
        for hash in [0, 2, 0xffff_fffc] {
            let cookie = place(hash, b"name") | FIRST_ORDINAL;
            assert!(cookie > BEHIND_DOTDOT && i64::try_from(cookie).is_ok());
        }
    }
}
