//! Names that come to what exists, and names that go: link, unlink, rmdir.

use super::draft::Draft;
use super::{
    INODE_CREDITS, MAX_LINKS, check_may_add, check_may_take, check_name, remove_subdirectory,
};
use crate::ext4::error::{FsError, Refusal};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::{FLAG_APPEND, FLAG_IMMUTABLE, Kind};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use std::sync::Arc;

impl Filesystem {
    /// Gives a file that is no directory one more name.
    ///
    /// # Errors
    /// [`Refusal::Exists`], [`Refusal::NotPermitted`], [`Refusal::TooManyLinks`], [`Refusal::NotFound`] if it was
    /// removed, [`Refusal::NameTooLong`]; [`FsError::NoSpace`].
    pub async fn link(
        &self,
        file: &InodeCell,
        parent: &InodeCell,
        name: &[u8],
    ) -> Result<(), FsError> {
        check_name(name)?;
        self.check_writable()?;
        // A directory's lock must not be waited for inside another directory's: it may be above.
        let kind = file.read().await.raw.kind();
        let kind = kind
            .filter(|kind| *kind != Kind::Directory)
            .ok_or(Refusal::NotPermitted)?;
        let mut directory = parent.write().await;
        let mut draft = Draft::of(self, &directory)?;
        if draft.find(name).await?.is_some() {
            return Err(Refusal::Exists.into());
        }
        check_may_add(&directory)?;
        let mut state = file.write().await;
        check_link(&state)?;
        draft.add(name, file.number(), kind as u8).await?;
        let credits = draft.credits() + INODE_CREDITS;
        let mut handle = self.begin(credits, draft.promise()).await?;
        draft.apply(&mut handle, &mut directory).await?;
        let links = state.raw.links() + 1;
        state.raw.set_links(links);
        state.raw.set_ctime(self.now());
        handle.put_inode(&mut state).await?;
        let _ = handle.finish();
        Ok(())
    }

    /// Takes a name from a file that is no directory. Without any name the file is an orphan: whoever had it open
    /// last calls [`Filesystem::free_orphan`] with what is returned.
    ///
    /// # Errors
    /// [`Refusal::NotFound`], [`Refusal::IsDirectory`], [`Refusal::NotPermitted`].
    pub async fn unlink(&self, parent: &InodeCell, name: &[u8]) -> Result<Arc<InodeCell>, FsError> {
        check_name(name)?;
        self.check_writable()?;
        let mut directory = parent.write().await;
        let mut draft = Draft::of(self, &directory)?;
        let found = draft.find(name).await?.ok_or(Refusal::NotFound)?;
        let cell = self
            .named(parent.number(), found.block, found.inode)
            .await?;
        if cell.number() == parent.number() {
            return Err(draft.corrupt(found.block, "a name leads to its own directory"));
        }
        let mut state = cell.write().await;
        check_may_take(&directory, &state)?;
        if state.raw.is_directory() {
            return Err(Refusal::IsDirectory.into());
        }
        draft.remove(found.block, name).await?;
        let credits = draft.credits() + INODE_CREDITS;
        let mut handle = self.begin(credits, 0).await?;
        draft.apply(&mut handle, &mut directory).await?;
        self.drop_name(&mut handle, &mut state).await?;
        let _ = handle.finish();
        drop(state);
        Ok(cell)
    }

    /// Removes an empty directory; it is an orphan, as in [`Self::unlink`].
    ///
    /// # Errors
    /// [`Refusal::NotFound`], [`Refusal::NotDirectory`], [`Refusal::NotEmpty`], [`Refusal::NotPermitted`].
    pub async fn remove_directory(
        &self,
        parent: &InodeCell,
        name: &[u8],
    ) -> Result<Arc<InodeCell>, FsError> {
        check_name(name)?;
        self.check_writable()?;
        let mut directory = parent.write().await;
        let mut draft = Draft::of(self, &directory)?;
        let found = draft.find(name).await?.ok_or(Refusal::NotFound)?;
        let cell = self
            .named(parent.number(), found.block, found.inode)
            .await?;
        if cell.number() == parent.number() {
            return Err(draft.corrupt(found.block, "a name leads to its own directory"));
        }
        let mut state = cell.write().await;
        check_may_take(&directory, &state)?;
        self.check_empty(&state).await?;
        draft.remove(found.block, name).await?;
        let credits = draft.credits() + INODE_CREDITS;
        let mut handle = self.begin(credits, 0).await?;
        remove_subdirectory(&mut directory.raw);
        draft.apply(&mut handle, &mut directory).await?;
        self.drop_directory(&mut handle, &mut state).await?;
        let _ = handle.finish();
        drop(state);
        Ok(cell)
    }

    /// # Errors
    /// [`Refusal::NotDirectory`], [`Refusal::NotEmpty`].
    pub(super) async fn check_empty(&self, directory: &InodeState) -> Result<(), FsError> {
        match Draft::of(self, directory)?.is_empty().await? {
            true => Ok(()),
            false => Err(Refusal::NotEmpty.into()),
        }
    }

    /// One name of a file went.
    pub(super) async fn drop_name(
        &self,
        handle: &mut Handle,
        file: &mut InodeState,
    ) -> Result<(), FsError> {
        file.raw.set_links(file.raw.links().saturating_sub(1));
        file.raw.set_ctime(self.now());
        match file.raw.links() {
            0 => handle.orphan_add(file).await,
            _ => handle.put_inode(file).await,
        }
    }

    /// The name of a directory went.
    pub(super) async fn drop_directory(
        &self,
        handle: &mut Handle,
        directory: &mut InodeState,
    ) -> Result<(), FsError> {
        directory.raw.set_links(0);
        directory.raw.set_ctime(self.now());
        handle.orphan_add(directory).await
    }
}

fn check_link(file: &InodeState) -> Result<(), Refusal> {
    match file.raw.links() {
        0 => Err(Refusal::NotFound),
        _ if file.raw.has_flag(FLAG_IMMUTABLE | FLAG_APPEND) => Err(Refusal::NotPermitted),
        links if links >= MAX_LINKS => Err(Refusal::TooManyLinks),
        _ => Ok(()),
    }
}
