//! Renaming: within a directory and between two, over what is there, in exchange for it, leaving a whiteout.

use super::create::{Content, Decided, NewNode};
use super::draft::Draft;
use super::search::Found;
use super::{
    INODE_CREDITS, add_subdirectory, check_may_add, check_may_take, check_name, remove_subdirectory,
};
use crate::ext4::error::{FsError, Refusal};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::{self, Kind};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use std::collections::HashSet;
use std::sync::Arc;
use tokio::sync::RwLockWriteGuard;

/// A whiteout: a character device 0, 0.
const WHITEOUT_MODE: u16 = 0o20000;

/// What is to happen at the two names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// What is at the new name goes.
    Replace,
    /// Nothing must be at the new name.
    NoReplace,
    /// The two change places.
    Exchange,
    /// As `Replace`, or with `no_replace` as `NoReplace`, and a whiteout of this owner stays at the old name.
    Whiteout {
        no_replace: bool,
        uid: u32,
        gid: u32,
    },
}

impl RenameMode {
    fn keeps_target(self) -> bool {
        matches!(
            self,
            Self::NoReplace
                | Self::Whiteout {
                    no_replace: true,
                    ..
                }
        )
    }
}

type Guard<'a> = RwLockWriteGuard<'a, InodeState>;

/// The one or two directories, locked, and their drafts.
struct Directories<'f, 'g> {
    from: (Guard<'g>, Draft<'f>),
    /// `None`: it is the same.
    to: Option<(Guard<'g>, Draft<'f>)>,
}

impl<'f, 'g> Directories<'f, 'g> {
    fn from(&mut self) -> &mut Draft<'f> {
        &mut self.from.1
    }

    fn to(&mut self) -> &mut Draft<'f> {
        match &mut self.to {
            Some((_, draft)) => draft,
            None => &mut self.from.1,
        }
    }

    fn target_state(&mut self) -> &mut InodeState {
        match &mut self.to {
            Some((guard, _)) => guard,
            None => &mut self.from.0,
        }
    }

    fn needs(&self) -> (u32, u32) {
        let of = |(_, draft): &(Guard<'_>, Draft<'_>)| (draft.credits(), draft.promise());
        let (from, to) = (of(&self.from), self.to.as_ref().map_or((0, 0), of));
        (from.0 + to.0, from.1 + to.1)
    }

    /// Counts the subdirectories that come and go.
    fn count(&mut self, moved: &Both<'_, '_>, mode: RenameMode) {
        let moves = self.to.is_some();
        let replaced = moved.target.as_ref().filter(|target| target.is_directory());
        if moves && moved.source.is_directory() {
            remove_subdirectory(&mut self.from.0.raw);
            add_subdirectory(&mut self.target_state().raw);
        }
        match (replaced, mode) {
            (Some(_), RenameMode::Exchange) if moves => {
                remove_subdirectory(&mut self.target_state().raw);
                add_subdirectory(&mut self.from.0.raw);
            }
            (None, _) | (_, RenameMode::Exchange) => {}
            (Some(_), _) => remove_subdirectory(&mut self.target_state().raw),
        }
    }

    async fn apply(self, handle: &mut Handle) -> Result<(), FsError> {
        for (mut guard, draft) in std::iter::once(self.from).chain(self.to) {
            draft.apply(handle, &mut guard).await?;
        }
        Ok(())
    }
}

/// An inode that gets another place, or loses its last: locked, with the draft of what changes inside it.
struct Moved<'f, 'g> {
    state: Guard<'g>,
    inside: Option<Draft<'f>>,
}

impl<'f, 'g> Moved<'f, 'g> {
    async fn lock(cell: &'g InodeCell) -> Self {
        let (state, inside) = (cell.write().await, None);
        Self { state, inside }
    }

    fn is_directory(&self) -> bool {
        self.state.raw.is_directory()
    }

    /// What an entry for it says.
    fn names(&self) -> (u32, u8) {
        let kind = self.state.raw.kind();
        (self.state.raw.number(), kind.map_or(0, |kind| kind as u8))
    }

    async fn apply(mut self, fs: &Filesystem, handle: &mut Handle) -> Result<(), FsError> {
        if let Some(draft) = self.inside.take() {
            // Another place is no change of what is in the directory.
            let mtime = self.state.raw.mtime();
            draft.apply(handle, &mut self.state).await?;
            self.state.raw.set_mtime(mtime);
        }
        self.state.raw.set_ctime(fs.now());
        handle.put_inode(&mut self.state).await
    }
}

/// What the two names lead to.
struct Cells {
    source: Arc<InodeCell>,
    target: Option<Arc<InodeCell>>,
}

impl Cells {
    /// Locks them, the lower number first.
    async fn lock<'f>(&self) -> Both<'f, '_> {
        match &self.target {
            Some(target) if target.number() < self.source.number() => {
                let target = Some(Moved::lock(target).await);
                let source = Moved::lock(&self.source).await;
                Both { source, target }
            }
            Some(target) => {
                let source = Moved::lock(&self.source).await;
                let target = Some(Moved::lock(target).await);
                Both { source, target }
            }
            None => Both {
                source: Moved::lock(&self.source).await,
                target: None,
            },
        }
    }
}

/// What the two names lead to, locked.
struct Both<'f, 'g> {
    source: Moved<'f, 'g>,
    target: Option<Moved<'f, 'g>>,
}

impl Both<'_, '_> {
    fn credits(&self) -> u32 {
        let inside = |moved: &Moved<'_, '_>| moved.inside.as_ref().map_or(0, Draft::credits);
        inside(&self.source) + self.target.as_ref().map_or(0, inside)
    }
}

impl Filesystem {
    /// Gives what `name` in `from` leads to the name `new_name` in `to`. What lost its last name is returned, as by
    /// [`Filesystem::unlink`].
    ///
    /// # Errors
    /// [`Refusal::NotFound`], [`Refusal::Exists`], [`Refusal::NotDirectory`], [`Refusal::IsDirectory`],
    /// [`Refusal::NotEmpty`], [`Refusal::Invalid`] of a directory into itself, [`Refusal::TooManyLinks`],
    /// [`Refusal::NotPermitted`], [`Refusal::NameTooLong`]; [`FsError::NoSpace`].
    pub async fn rename(
        &self,
        from: &InodeCell,
        name: &[u8],
        to: &InodeCell,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<Option<Arc<InodeCell>>, FsError> {
        check_name(name)?;
        check_name(new_name)?;
        self.check_writable()?;
        if from.number() == to.number() {
            let guard = from.write().await;
            let draft = Draft::of(self, &guard)?;
            let directories = Directories {
                from: (guard, draft),
                to: None,
            };
            return self
                .rename_locked(directories, &Paths::default(), name, new_name, mode)
                .await;
        }
        let _topology = self.topology().lock().await;
        let paths = Paths {
            from: self.path_up(from).await?,
            to: self.path_up(to).await?,
        };
        let (first, second) = if paths.to_is_locked_first(from, to) {
            (to, from)
        } else {
            (from, to)
        };
        let first = first.write().await;
        let second = second.write().await;
        let (source, target) = match first.raw.number() == from.number() {
            true => (first, second),
            false => (second, first),
        };
        let (source_draft, target_draft) = (Draft::of(self, &source)?, Draft::of(self, &target)?);
        let directories = Directories {
            from: (source, source_draft),
            to: Some((target, target_draft)),
        };
        self.rename_locked(directories, &paths, name, new_name, mode)
            .await
    }

    /// The directory and those above it. They stay that while no directory is moved.
    async fn path_up(&self, directory: &InodeCell) -> Result<Vec<u32>, FsError> {
        let mut path = vec![directory.number()];
        let mut seen = HashSet::from([directory.number()]);
        let mut above = self.parent(directory).await?;
        while path.last() != Some(&above.number()) {
            path.push(above.number());
            if above.number() == inode::ROOT {
                break;
            }
            if !seen.insert(above.number()) {
                let state = above.read().await;
                return Err(Draft::of(self, &state)?.corrupt(0, "it is inside itself"));
            }
            above = self.parent(&above).await?;
        }
        Ok(path)
    }

    async fn rename_locked(
        &self,
        mut directories: Directories<'_, '_>,
        paths: &Paths,
        name: &[u8],
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<Option<Arc<InodeCell>>, FsError> {
        let source = directories
            .from()
            .find(name)
            .await?
            .ok_or(Refusal::NotFound)?;
        let target = directories.to().find(new_name).await?;
        match (target, mode) {
            (Some(_), mode) if mode.keeps_target() => return Err(Refusal::Exists.into()),
            (None, RenameMode::Exchange) => return Err(Refusal::NotFound.into()),
            (Some(target), _) if target.inode == source.inode => return Ok(None),
            _ => {}
        }
        paths.check(source, target, mode)?;
        let cells = self.cells(&mut directories, source, target).await?;
        let mut moved = cells.lock().await;
        self.check_rename(&mut directories, &moved, mode).await?;
        let names = Names { name, new_name };
        draft_names(&mut directories, &moved, names, mode).await?;
        if directories.to.is_some() {
            let (from, to) = (directories.from().number(), directories.to().number());
            self.draft_parent(&mut moved.source, to).await?;
            if let (Some(target), RenameMode::Exchange) = (&mut moved.target, mode) {
                self.draft_parent(target, from).await?;
            }
        }
        self.apply_rename(directories, moved, name, mode).await?;
        Ok(cells.target.filter(|_| mode != RenameMode::Exchange))
    }

    async fn cells(
        &self,
        directories: &mut Directories<'_, '_>,
        source: Found,
        target: Option<Found>,
    ) -> Result<Cells, FsError> {
        let (from, to) = (directories.from().number(), directories.to().number());
        let own = |found: &Found| found.inode == from || found.inode == to;
        if own(&source) || target.as_ref().is_some_and(own) {
            let problem = "a name leads to its own directory";
            return Err(directories.from().corrupt(source.block, problem));
        }
        let target = match target {
            Some(found) => Some(self.named(to, found.block, found.inode).await?),
            None => None,
        };
        let source = self.named(from, source.block, source.inode).await?;
        Ok(Cells { source, target })
    }

    async fn check_rename(
        &self,
        directories: &mut Directories<'_, '_>,
        moved: &Both<'_, '_>,
        mode: RenameMode,
    ) -> Result<(), FsError> {
        let moves = directories.to.is_some();
        let enters = moved.source.is_directory();
        check_may_take(&directories.from.0, &moved.source.state)?;
        check_may_add(directories.target_state())?;
        let Some(target) = &moved.target else {
            if enters && moves {
                self.check_subdirectory(&directories.target_state().raw)?;
            }
            return Ok(());
        };
        check_may_take(directories.target_state(), &target.state)?;
        match (enters, target.is_directory(), mode) {
            (true, false, RenameMode::Exchange) if moves => {
                Ok(self.check_subdirectory(&directories.target_state().raw)?)
            }
            (false, true, RenameMode::Exchange) if moves => {
                Ok(self.check_subdirectory(&directories.from.0.raw)?)
            }
            (_, _, RenameMode::Exchange) | (false, false, _) => Ok(()),
            (true, false, _) => Err(Refusal::NotDirectory.into()),
            (false, true, _) => Err(Refusal::IsDirectory.into()),
            (true, true, _) => self.check_empty(&target.state).await,
        }
    }

    /// A directory that comes into another gets another "..".
    async fn draft_parent<'f>(
        &'f self,
        moved: &mut Moved<'f, '_>,
        parent: u32,
    ) -> Result<(), FsError> {
        if moved.is_directory() {
            let mut inside = Draft::of(self, &moved.state)?;
            inside.set_parent(parent).await?;
            moved.inside = Some(inside);
        }
        Ok(())
    }

    async fn apply_rename(
        &self,
        mut directories: Directories<'_, '_>,
        moved: Both<'_, '_>,
        name: &[u8],
        mode: RenameMode,
    ) -> Result<(), FsError> {
        let whiteout = self.decide_whiteout(&directories.from.0, mode).await?;
        let new = whiteout.as_ref();
        let (credits, blocks) = directories.needs();
        let credits =
            credits + moved.credits() + INODE_CREDITS * 2 + new.map_or(0, Decided::credits);
        let blocks = blocks + new.map_or(0, Decided::promise);
        let mut handle = self.begin(credits, blocks).await?;
        if let Some(whiteout) = whiteout {
            let number = self.make(&mut handle, &whiteout).await?.number();
            let kind = Kind::CharDevice as u8;
            point(directories.from(), name, number, kind).await?;
        }
        directories.count(&moved, mode);
        directories.apply(&mut handle).await?;
        let Both { source, target } = moved;
        source.apply(self, &mut handle).await?;
        match target {
            Some(target) if mode == RenameMode::Exchange => target.apply(self, &mut handle).await?,
            Some(mut target) if target.is_directory() => {
                self.drop_directory(&mut handle, &mut target.state).await?;
            }
            Some(mut target) => self.drop_name(&mut handle, &mut target.state).await?,
            None => {}
        }
        let _ = handle.finish();
        Ok(())
    }

    /// Decides the inode that stays at the old name, if one does.
    async fn decide_whiteout(
        &self,
        directory: &InodeState,
        mode: RenameMode,
    ) -> Result<Option<Decided<'static>>, FsError> {
        let RenameMode::Whiteout { uid, gid, .. } = mode else {
            return Ok(None);
        };
        let (major, minor) = (0, 0);
        let node = NewNode {
            mode: WHITEOUT_MODE,
            umask: 0,
            uid,
            gid,
            content: Content::Device { major, minor },
        };
        let decided = self.decide(directory, &node, Kind::CharDevice).await?;
        Ok(Some(decided))
    }
}

/// What is above two directories, themselves included; empty for one.
#[derive(Default)]
struct Paths {
    from: Vec<u32>,
    to: Vec<u32>,
}

impl Paths {
    fn to_is_locked_first(&self, from: &InodeCell, to: &InodeCell) -> bool {
        let above = self.from.contains(&to.number());
        let below = self.to.contains(&from.number());
        above || (!below && to.number() < from.number())
    }

    /// No directory comes into itself.
    fn check(&self, source: Found, target: Option<Found>, mode: RenameMode) -> Result<(), Refusal> {
        let target_is_above = target.is_some_and(|target| self.from.contains(&target.inode));
        match mode {
            _ if self.to.contains(&source.inode) => Err(Refusal::Invalid),
            RenameMode::Exchange if target_is_above => Err(Refusal::Invalid),
            _ if target_is_above => Err(Refusal::NotEmpty),
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Copy)]
struct Names<'a> {
    name: &'a [u8],
    new_name: &'a [u8],
}

/// Changes the names in the drafts.
async fn draft_names(
    directories: &mut Directories<'_, '_>,
    moved: &Both<'_, '_>,
    names: Names<'_>,
    mode: RenameMode,
) -> Result<(), FsError> {
    let Names { name, new_name } = names;
    let (number, kind) = moved.source.names();
    match &moved.target {
        Some(_) => point(directories.to(), new_name, number, kind).await?,
        None => drop(directories.to().add(new_name, number, kind).await?),
    }
    match (&moved.target, mode) {
        (Some(target), RenameMode::Exchange) => {
            let (number, kind) = target.names();
            point(directories.from(), name, number, kind).await
        }
        // The whiteout's number is not known yet.
        (_, RenameMode::Whiteout { .. }) => {
            point(
                directories.from(),
                name,
                inode::ROOT,
                Kind::CharDevice as u8,
            )
            .await
        }
        _ => {
            // Looked for again: the new name may have moved it to another leaf.
            let from = directories.from();
            let found = from.find(name).await?.ok_or(Refusal::NotFound)?;
            from.remove(found.block, name).await
        }
    }
}

/// Lets a name that is there lead to another inode.
async fn point(draft: &mut Draft<'_>, name: &[u8], inode: u32, kind: u8) -> Result<(), FsError> {
    let found = draft.find(name).await?.ok_or(Refusal::NotFound)?;
    draft.point(found.block, name, inode, kind).await
}
