//! The handle's side of pages that move between stores, and of what a store holds.

use super::engine::{Engine, Fetched, Step};
use super::error::StoreError;
use super::history::History;
use super::shell::PageStore;
use super::transfer::{Exported, MovedChunk};
use crate::id::{Epoch, PageNo, SnapshotId, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

impl PageStore {
    /// Pages that hold versions, with the bytes of their data.
    #[must_use]
    pub fn held_pages(&self, volume: VolumeId) -> BTreeMap<PageNo, u64> {
        self.runner.engine.borrow().held_pages(volume)
    }

    /// See [`Engine::shown_pages`].
    #[must_use]
    pub fn shown_pages(&self, volume: VolumeId) -> BTreeMap<PageNo, u64> {
        self.runner.engine.borrow().shown_pages(volume)
    }

    /// See [`Engine::history`].
    #[must_use]
    pub fn history(&self, volume: VolumeId) -> History {
        self.runner.engine.borrow().history(volume)
    }

    /// Gives a volume of which nothing is held here the history of another store.
    pub async fn adopt_history(
        &self,
        volume: VolumeId,
        history: &History,
    ) -> Result<(), StoreError> {
        self.runner
            .attempt(|engine, _| engine.adopt_history(volume, history))
            .await?;
        self.runner.after_change();
        Ok(())
    }

    /// See [`Engine::page_chunks`].
    #[must_use]
    pub fn page_chunks(&self, volume: VolumeId, page: PageNo) -> BTreeSet<u16> {
        self.runner.engine.borrow().page_chunks(volume, page)
    }

    /// See [`Engine::export_chunk`].
    pub async fn export_chunk(
        &self,
        volume: VolumeId,
        at: (PageNo, u16),
        from: Option<u32>,
    ) -> Result<Exported, StoreError> {
        let export = |engine: &mut Engine<_>, fetched: &[Fetched]| {
            engine.export_chunk(volume, at, from, fetched)
        };
        self.runner.attempt(export).await
    }

    /// Takes in a piece of a chunk; `order` are the sender's snapshots, oldest first. The page
    /// must not be served meanwhile.
    pub async fn take_in(
        &self,
        volume: VolumeId,
        order: &[SnapshotId],
        moved: &MovedChunk,
        mut data: &[u8],
    ) -> Result<(), StoreError> {
        let at @ (page, chunk) = (moved.page, moved.chunk);
        if moved.is_first {
            let dropped =
                |engine: &mut Engine<_>, _: &[Fetched]| engine.drop_chunk(volume, page, chunk);
            self.runner.attempt(dropped).await?;
        }
        for version in &moved.versions {
            let (bytes, rest) = data.split_at(version.data_bytes().min(data.len()));
            data = rest;
            self.runner
                .attempt(|engine, _| engine.take_in(volume, at, order, version, bytes))
                .await?;
        }
        self.runner.after_change();
        Ok(())
    }

    /// Frees a page with all its versions, if `wanted` still says so at that moment.
    pub async fn drop_page(
        &self,
        volume: VolumeId,
        page: PageNo,
        wanted: impl Fn() -> bool,
    ) -> Result<(), StoreError> {
        let dropped = |engine: &mut Engine<_>, _: &[Fetched]| match wanted() {
            true => engine.drop_page(volume, page),
            false => Ok(Step::Done(())),
        };
        self.runner.attempt(dropped).await?;
        self.runner.after_change();
        Ok(())
    }

    /// Says that a page belongs to this server since an epoch, for a scan of all stores.
    pub async fn adopt_page(
        &self,
        volume: VolumeId,
        page: PageNo,
        epoch: Epoch,
    ) -> Result<(), StoreError> {
        self.runner
            .attempt(|engine, _| engine.adopt_page(volume, page, epoch))
            .await?;
        self.runner.after_change();
        self.sweep_turned();
        Ok(())
    }

    /// Forgets a volume of which nothing is held but names of snapshots, if `wanted` still says so.
    pub async fn forget_empty_volume(
        &self,
        volume: VolumeId,
        wanted: impl Fn() -> bool,
    ) -> Result<(), StoreError> {
        let forgot = |engine: &mut Engine<_>, _: &[Fetched]| match wanted() {
            true => engine.forget_empty_volume(volume),
            false => Ok(Step::Done(())),
        };
        self.runner.attempt(forgot).await?;
        self.runner.after_change();
        Ok(())
    }
}
