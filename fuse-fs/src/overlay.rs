//! A private layer of memory over a snapshot: what is written to it stays in this process.
//!
//! The kernel replays a journal by writing, and a snapshot cannot be written. Under a private view
//! the replay lands here, is read back from here, and is gone with the last close.

use crate::backend::{Answer, BackendError, Extent, OpenTarget, TargetName};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Unit of the layer.
pub const GRANULE_BYTES: u64 = 4096;
/// Memory that the layer of one snapshot may take; a replay writes less than the journal holds.
pub const LIMIT_BYTES: u64 = 512 << 20;

/// The layer has no room for a write, of which nothing was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room for {wanted_bytes} more bytes in a private layer of {limit_bytes} bytes")]
pub struct Full {
    pub wanted_bytes: u64,
    pub limit_bytes: u64,
}

/// Granules that were written, by index; the others show what is below.
#[derive(Debug)]
pub struct Overlay {
    granules: HashMap<u64, Box<[u8]>>,
    limit_bytes: u64,
}

/// The part of one granule that a range of bytes covers.
struct Part {
    granule: u64,
    /// Offset inside the granule.
    start: usize,
    len: usize,
    /// Offset inside the range.
    from: usize,
}

/// The parts that `len` bytes at `offset_bytes` consist of, in order.
fn parts(offset_bytes: u64, len: usize) -> impl Iterator<Item = Part> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let at = offset_bytes + from as u64;
        let start = (at % GRANULE_BYTES) as usize;
        let part = Part {
            granule: at / GRANULE_BYTES,
            start,
            len: (GRANULE_BYTES as usize - start).min(len - from),
            from,
        };
        from += part.len;
        (part.len > 0).then_some(part)
    })
}

impl Overlay {
    /// An empty layer that holds at most `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            granules: HashMap::new(),
            limit_bytes,
        }
    }

    /// Memory taken by granules.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.granules.len() as u64 * GRANULE_BYTES
    }

    /// Indexes of the granules that a write covers in part and that the layer lacks: at most two,
    /// whose bytes below [`Overlay::write`] needs. Granules never leave, so this only gets shorter.
    #[must_use]
    pub fn missing(&self, offset_bytes: u64, len: usize) -> Vec<u64> {
        parts(offset_bytes, len)
            .filter(|part| part.len < GRANULE_BYTES as usize)
            .map(|part| part.granule)
            .filter(|granule| !self.granules.contains_key(granule))
            .collect()
    }

    /// Takes `data`; `below` holds, by index, the bytes of the granules that are [`Overlay::missing`].
    /// What `below` does not reach is zeros.
    ///
    /// # Errors
    /// [`Full`]; nothing is changed then.
    pub fn write(
        &mut self,
        offset_bytes: u64,
        data: &[u8],
        below: &HashMap<u64, Bytes>,
    ) -> Result<(), Full> {
        let new = parts(offset_bytes, data.len())
            .filter(|part| !self.granules.contains_key(&part.granule));
        let wanted_bytes = new.count() as u64 * GRANULE_BYTES;
        if wanted_bytes > self.limit_bytes.saturating_sub(self.used_bytes()) {
            let limit_bytes = self.limit_bytes;
            return Err(Full {
                wanted_bytes,
                limit_bytes,
            });
        }
        for part in parts(offset_bytes, data.len()) {
            let fresh = || granule_of(below.get(&part.granule));
            let granule = self.granules.entry(part.granule).or_insert_with(fresh);
            let to = granule.get_mut(part.start..part.start + part.len);
            let from = data.get(part.from..part.from + part.len);
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// `below`, the bytes at `offset_bytes`, with what was written laid over them.
    #[must_use]
    pub fn lay_over(&self, offset_bytes: u64, below: Bytes) -> Bytes {
        let len = below.len();
        if !parts(offset_bytes, len).any(|part| self.granules.contains_key(&part.granule)) {
            return below;
        }
        let mut data = Vec::from(below);
        for part in parts(offset_bytes, len) {
            let granule = self.granules.get(&part.granule);
            let from = granule.and_then(|granule| granule.get(part.start..part.start + part.len));
            let to = data.get_mut(part.from..part.from + part.len);
            if let (Some(to), Some(from)) = (to, from) {
                to.copy_from_slice(from);
            }
        }
        data.into()
    }
}

/// A granule that starts as `below`; the last one of a volume may be short.
fn granule_of(below: Option<&Bytes>) -> Box<[u8]> {
    let mut granule = vec![0; GRANULE_BYTES as usize];
    for (to, from) in granule.iter_mut().zip(below.into_iter().flatten()) {
        *to = *from;
    }
    granule.into()
}

/// A snapshot that can be written, for as long as it is open.
pub struct OverlaidSnapshot {
    name: TargetName,
    snapshot: Arc<dyn OpenTarget>,
    overlay: Mutex<Overlay>,
}

impl OverlaidSnapshot {
    /// `snapshot` never changes, so that what is read below it before a lock is taken stays true.
    #[must_use]
    pub fn new(name: TargetName, snapshot: Arc<dyn OpenTarget>, limit_bytes: u64) -> Self {
        Self {
            name,
            snapshot,
            overlay: Mutex::new(Overlay::new(limit_bytes)),
        }
    }

    /// A panic elsewhere leaves whole granules behind.
    fn overlay(&self) -> MutexGuard<'_, Overlay> {
        self.overlay.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of the snapshot in `granule`.
    async fn below(&self, granule: u64) -> Result<Bytes, BackendError> {
        let start = granule * GRANULE_BYTES;
        let len = self.snapshot.size_bytes().saturating_sub(start);
        let len = u32::try_from(len.min(GRANULE_BYTES)).unwrap_or_default();
        self.snapshot.read(start, len).await
    }

    fn full(&self, full: Full) -> BackendError {
        let name = &self.name;
        BackendError::new(
            libc::ENOSPC,
            format!("{name}: {full}; its journal cannot be replayed in memory"),
        )
    }
}

impl OpenTarget for OverlaidSnapshot {
    fn size_bytes(&self) -> u64 {
        self.snapshot.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Answer<'_, Bytes> {
        Box::pin(async move {
            let below = self.snapshot.read(offset_bytes, len_bytes).await?;
            Ok(self.overlay().lay_over(offset_bytes, below))
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Answer<'_, ()> {
        Box::pin(async move {
            let missing = self.overlay().missing(offset_bytes, data.len());
            let mut below = HashMap::new();
            for granule in missing {
                below.insert(granule, self.below(granule).await?);
            }
            let written = self.overlay().write(offset_bytes, &data, &below);
            written.map_err(|full| self.full(full))
        })
    }

    /// The kernel then writes zeros, or leaves a discard undone.
    fn zero(&self, _: u64, _: u64, _: bool) -> Answer<'_, ()> {
        let message = "a private layer frees nothing";
        Box::pin(std::future::ready(Err(BackendError::new(
            libc::EOPNOTSUPP,
            message,
        ))))
    }

    /// Nothing here is meant to last.
    fn flush(&self) -> Answer<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn extents(&self, _offset_bytes: u64, len_bytes: u64) -> Answer<'_, Vec<Extent>> {
        let hole = false;
        Box::pin(std::future::ready(Ok(vec![Extent { len_bytes, hole }])))
    }

    fn refresh(&self) -> Answer<'_, ()> {
        self.snapshot.refresh()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: usize = GRANULE_BYTES as usize;

    /// Bytes that never change; whatever would change them is a failed test.
    struct Frozen(Bytes);

    impl OpenTarget for Frozen {
        fn size_bytes(&self) -> u64 {
            self.0.len() as u64
        }

        fn is_read_only(&self) -> bool {
            true
        }

        fn read(&self, offset_bytes: u64, len_bytes: u32) -> Answer<'_, Bytes> {
            let start = offset_bytes as usize;
            let data = self.0.slice(start..start + len_bytes as usize);
            Box::pin(std::future::ready(Ok(data)))
        }

        fn write(&self, _: u64, _: Bytes) -> Answer<'_, ()> {
            panic!("a write reached the snapshot")
        }

        fn zero(&self, _: u64, _: u64, _: bool) -> Answer<'_, ()> {
            panic!("a discard reached the snapshot")
        }

        fn flush(&self) -> Answer<'_, ()> {
            panic!("a flush reached the snapshot")
        }

        fn extents(&self, _: u64, _: u64) -> Answer<'_, Vec<Extent>> {
            panic!("holes of the snapshot are not those of the layer")
        }

        fn refresh(&self) -> Answer<'_, ()> {
            Box::pin(std::future::ready(Ok(())))
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_multi_thread().build();
        runtime.unwrap().block_on(future)
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8).collect()
    }

    fn overlaid(below: &[u8], limit_bytes: u64) -> OverlaidSnapshot {
        let frozen = Arc::new(Frozen(Bytes::copy_from_slice(below)));
        OverlaidSnapshot::new(TargetName::parse("v@s").unwrap(), frozen, limit_bytes)
    }

    #[test]
    fn a_range_is_cut_at_granules() {
        let cut: Vec<_> = parts(GRANULE_BYTES - 10, G + 20)
            .map(|part| (part.granule, part.start, part.len, part.from))
            .collect();
        assert_eq!(cut, [(0, G - 10, 10, 0), (1, 0, G, 10), (2, 0, 10, G + 10)]);
        assert_eq!(parts(7, 0).count(), 0);
    }

    #[test]
    fn only_partly_written_granules_need_what_is_below() {
        let mut overlay = Overlay::new(LIMIT_BYTES);
        assert_eq!(overlay.missing(GRANULE_BYTES - 1, G + 2), [0, 2]);
        assert!(overlay.missing(GRANULE_BYTES, 2 * G).is_empty());
        overlay.write(0, &bytes(G), &HashMap::new()).unwrap();
        assert_eq!(overlay.missing(GRANULE_BYTES - 1, G + 2), [2]);
    }

    #[test]
    fn writes_of_any_shape_read_back_as_on_a_plain_file() {
        let mut model = bytes(5 * G + 100);
        let target = overlaid(&model, LIMIT_BYTES);
        let writes = [
            (0, 1),
            (G - 1, 2),
            (10, 512),
            (G, 3 * G),
            (2 * G + 7, G),
            (5 * G + 50, 50),
        ];
        for (number, (offset, len)) in writes.into_iter().enumerate() {
            let data = vec![number as u8 | 0x80; len];
            model[offset..offset + len].copy_from_slice(&data);
            run(target.write(offset as u64, data.into())).unwrap();
            for (offset, len) in [(0, model.len()), (G - 3, 7), (3, 1)] {
                let read = run(target.read(offset as u64, len as u32)).unwrap();
                assert!(read == model[offset..offset + len]);
            }
        }
    }

    #[test]
    fn a_full_layer_refuses_whole_writes_and_keeps_what_it_has() {
        let below = bytes(8 * G);
        let target = overlaid(&below, 2 * GRANULE_BYTES);
        run(target.write(0, vec![1; G].into())).unwrap();
        let error = run(target.write(GRANULE_BYTES, vec![2; 2 * G].into())).unwrap_err();
        assert_eq!(error.errno, libc::ENOSPC);
        assert!(error.message.contains("v@s") && error.message.contains("8192"));
        let read = run(target.read(0, 3 * G as u32)).unwrap();
        assert!(read[..G] == vec![1; G] && read[G..] == below[G..3 * G]);
        run(target.write(5, vec![3; G].into())).unwrap();
        run(target.write(0, vec![4; 2 * G].into())).unwrap();
        assert_eq!(target.overlay().used_bytes(), 2 * GRANULE_BYTES);
    }

    #[test]
    fn nothing_but_reads_reaches_the_snapshot() {
        let target = overlaid(&bytes(2 * G), LIMIT_BYTES);
        run(target.write(3, bytes(G).into())).unwrap();
        run(target.flush()).unwrap();
        let refused = run(target.zero(0, GRANULE_BYTES, false)).unwrap_err();
        assert_eq!(refused.errno, libc::EOPNOTSUPP);
        let hole = false;
        let len_bytes = 2 * GRANULE_BYTES;
        let runs = run(target.extents(0, len_bytes)).unwrap();
        assert_eq!(runs, [Extent { len_bytes, hole }]);
        assert!(!target.is_read_only());
    }
}
