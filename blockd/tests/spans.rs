//! Changes over several pages that were under way when the store stopped (S003-33).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use blockd::data::page_store::{OpenMark, PageAt, PageStore};
use blockd::id::{Epoch, PageNo, VolumeId};
use bytes::Bytes;
use common::{LOG_BYTES, open, session};
use std::rc::Rc;

const VOLUME: VolumeId = VolumeId(3);
const OTHER: VolumeId = VolumeId(4);

fn interrupted(store: &PageStore, volume: VolumeId) -> Vec<u64> {
    let spans = store.interrupted_spans(volume);
    spans.iter().map(|(span, _)| *span).collect()
}

/// Rounds of writes that take more than the whole log, so that what is only in the log is not there any more.
async fn turn_the_log(store: &PageStore) {
    for round in 0..2 * LOG_BYTES / 4096 {
        let at = PageAt {
            volume: VOLUME,
            page: PageNo(0),
            offset_bytes: u32::try_from(round % 64 * 4096).unwrap(),
            len_bytes: 4096,
        };
        let data = Bytes::from(vec![u8::try_from(round % 251).unwrap(); 4096]);
        store.write(at, data, Epoch(1)).await.unwrap();
    }
    store.flush().await.unwrap();
}

/// Lets the task that notes ends have its turn.
async fn settle() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

async fn begin(store: &PageStore, volume: VolumeId, span: u64) -> Rc<OpenMark> {
    store.begin_span(volume, span).await.unwrap()
}

#[test]
fn a_span_is_interrupted_if_it_had_begun_and_not_ended() {
    let dir = tempfile::tempdir().unwrap();
    session(async {
        let store = open(dir.path());
        let (one, two) = (
            begin(&store, VOLUME, 1).await,
            begin(&store, VOLUME, 2).await,
        );
        let again = begin(&store, VOLUME, 2).await;
        let other = begin(&store, OTHER, 1).await;
        drop((one, two));
        settle().await;
        assert_eq!(interrupted(&store, VOLUME), [0; 0], "the second goes on");
        std::mem::forget((again, other));
    });
    session(async {
        let store = open(dir.path());
        assert_eq!(interrupted(&store, VOLUME), [2]);
        settle().await;
        assert_eq!(interrupted(&store, VOLUME), [0; 0], "nobody had its mark");
        assert_eq!(interrupted(&store, OTHER), [1]);
    });
}

#[test]
fn an_interrupted_span_outlives_the_log_that_has_its_record() {
    let dir = tempfile::tempdir().unwrap();
    session(async {
        let store = open(dir.path());
        std::mem::forget(begin(&store, VOLUME, u64::MAX).await);
        turn_the_log(&store).await;
    });
    session(async {
        let store = open(dir.path());
        let spans = store.interrupted_spans(VOLUME);
        assert_eq!(spans[0].0, u64::MAX);
        turn_the_log(&store).await;
        store.close().await.unwrap();
        std::mem::forget(spans);
    });
    session(async {
        let store = open(dir.path());
        assert_eq!(interrupted(&store, VOLUME), [u64::MAX]);
        settle().await;
        turn_the_log(&store).await;
    });
    session(async { assert_eq!(interrupted(&open(dir.path()), VOLUME), [0; 0]) });
}

#[test]
fn a_deleted_volume_has_no_spans() {
    let dir = tempfile::tempdir().unwrap();
    session(async {
        let store = open(dir.path());
        turn_the_log(&store).await;
        std::mem::forget(begin(&store, VOLUME, 5).await);
        store.delete_volume(VOLUME).await.unwrap();
    });
    session(async { assert_eq!(interrupted(&open(dir.path()), VOLUME), [0; 0]) });
}
