//! Faults that the simulator plants to see whether it finds them. In a shipped program every one is
//! the constant `false`: they exist only with the feature `planted-faults` (package `blockd-sim`).

/// A mutation of one decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Plant {
    /// An owner executes requests of any epoch, also for pages that it does not own.
    SkipEpochCheck = 1,
    /// A write is answered before it is in the log.
    AcknowledgeBeforeLog,
    /// A snapshot is committed although an owner has not taken its part.
    CommitWithoutTicket,
    /// The write verifier does not change when power was lost.
    KeepVerifier,
    /// A freed chunk is used again before the record that frees it is durable.
    ReuseFreedAtOnce,
    /// The slab is changed by records that are not durable.
    SlabBeforeLog,
    /// A flush is answered without a sync.
    SkipSync,
    /// A participant of a snapshot is ready and holds no writes.
    HoldNothing,
    /// The completions behind a mark are not parked.
    ParkNothing,
    /// Reads show what lies behind a mark.
    ReadBehindMark,
    /// The time of a cut is the earliest of the participants' clocks.
    EarlyCut,
    /// Spans do not ask the hold gate.
    SpanIgnoresHold,
    /// Changes are replayed in the wrong order.
    ReplayBackwards,
    /// Lost changes are not sent again.
    SkipReplay,
    /// The sweep drops snapshots that are pending.
    SweepPending,
    /// The sweep drops snapshots that are in use.
    SweepLive,
    /// Recovery cuts the last valid record.
    CutValidRecords,
    /// What is read is not verified.
    SkipChecksum,
    /// A part of a span that failed counts as done.
    HalfSpan,
    /// A flush asks one owner only.
    FlushOneOwner,
    /// A participant does not wait for the writes that execute.
    SkipQuiet,
    /// A hold does not end at its deadline.
    HoldForever,
    /// A pending snapshot whose coordinator died stays.
    KeepPending,
    /// The space of a deleted snapshot stays.
    LeakSnapshot,
    /// A connection goes on executing when its requester has a new one.
    KeepOldConnection,
    /// A checkpoint is written before the slab is synced.
    SkipSlabSync,
    /// Trims are answered and not carried out.
    SkipTrim,
    /// A participant answers `taken` before its record is durable.
    TakenBeforeSync,
    /// Pages get their new owner before the last changes of them are there.
    FlipBeforeTail,
    /// An entry server acknowledges a write over several pages after the first of them.
    EntryHalfSpan,
    /// A flush of an entry server forgets what write verifier the other owners had.
    EntryForgetsVerifier,
    /// The sweep leaves volumes that are deleted.
    SweepKeepsVolumes,
    /// What the disk cannot read is taken for zeros.
    UnreadableIsZero,
    /// An owner that restarts forgets the spans that were under way.
    ForgetSpans,
    /// An owner forgets the spans of a connection that it loses.
    ForgetLostSpans,
}

impl Plant {
    /// Every one.
    pub const ALL: &[Plant] = &[
        Plant::SkipEpochCheck,
        Plant::AcknowledgeBeforeLog,
        Plant::CommitWithoutTicket,
        Plant::KeepVerifier,
        Plant::ReuseFreedAtOnce,
        Plant::SlabBeforeLog,
        Plant::SkipSync,
        Plant::HoldNothing,
        Plant::ParkNothing,
        Plant::ReadBehindMark,
        Plant::EarlyCut,
        Plant::SpanIgnoresHold,
        Plant::ReplayBackwards,
        Plant::SkipReplay,
        Plant::SweepPending,
        Plant::SweepLive,
        Plant::CutValidRecords,
        Plant::SkipChecksum,
        Plant::HalfSpan,
        Plant::FlushOneOwner,
        Plant::SkipQuiet,
        Plant::HoldForever,
        Plant::KeepPending,
        Plant::LeakSnapshot,
        Plant::KeepOldConnection,
        Plant::SkipSlabSync,
        Plant::SkipTrim,
        Plant::TakenBeforeSync,
        Plant::FlipBeforeTail,
        Plant::EntryHalfSpan,
        Plant::EntryForgetsVerifier,
        Plant::SweepKeepsVolumes,
        Plant::UnreadableIsZero,
        Plant::ForgetSpans,
        Plant::ForgetLostSpans,
    ];
}

#[cfg(feature = "planted-faults")]
static ACTIVE: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// Whether this fault is planted.
#[cfg(feature = "planted-faults")]
#[must_use]
pub fn planted(plant: Plant) -> bool {
    ACTIVE.load(std::sync::atomic::Ordering::Relaxed) == plant as u8
}

/// Whether this fault is planted: never.
#[cfg(not(feature = "planted-faults"))]
#[must_use]
#[inline(always)]
pub const fn planted(_: Plant) -> bool {
    false
}

/// Plants one fault in this process.
#[cfg(feature = "planted-faults")]
pub fn plant(plant: Plant) {
    ACTIVE.store(plant as u8, std::sync::atomic::Ordering::Relaxed);
}
