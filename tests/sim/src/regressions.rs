//! Seeds that found a fault of the program or of a checker, with what it was.
//!
//! A change of the program changes what a seed does, so what holds a fix is the test that came with it;
//! these runs look once more where the fault was.

/// Seed and story.
pub(crate) const SEEDS: &[(u64, &str)] = &[
    (
        984_543_000_011,
        "the sweep of pending snapshots compared wall clocks of two servers",
    ),
    (
        984_543_000_465,
        "stamp was held to channels past the program",
    ),
    (
        984_543_000_593,
        "stamp was held to channels past the program",
    ),
    (
        984_543_001_296,
        "stamp was held to channels past the program",
    ),
    (
        984_543_001_406,
        "stamp was held to channels past the program",
    ),
    (
        62,
        "a kill while a snapshot was deleted left its space until the next start",
    ),
    (
        227,
        "a reset while a snapshot was deleted left its space until the next start",
    ),
    (
        984_543_000_197,
        "a cut while a snapshot was deleted left its space until the next start",
    ),
    (
        124,
        "an era that no snapshot keeps, split while the disk was full, kept old versions",
    ),
    (
        984_543_000_110,
        "an era that no snapshot keeps kept old versions",
    ),
    (
        984_543_000_157,
        "an era that no snapshot keeps kept old versions",
    ),
    (
        984_543_000_294,
        "an era that no snapshot keeps kept old versions",
    ),
    (
        984_543_000_340,
        "an era that no snapshot keeps kept old versions",
    ),
    (
        984_543_000_678,
        "an era that no snapshot keeps, after isolation, kept old versions",
    ),
    (
        984_543_000_710,
        "an era that no snapshot keeps kept old versions",
    ),
    (
        984_543_000_778,
        "an era that no snapshot keeps kept old versions",
    ),
    (
        984_543_000_880,
        "an era that no snapshot keeps, split on slow disks, kept old versions",
    ),
    (
        986_000_000_023,
        "a client sent again what a page had before it came to the server that lost power",
    ),
    (
        986_000_000_048,
        "two rollbacks of one second took the same name for their safety snapshots",
    ),
    (
        986_000_000_039,
        "the second of two rollbacks at once hid the first from an owner: a page move never ended",
    ),
    (
        346,
        "a page move took a snapshot in front of an earlier one, and the store stopped",
    ),
    (
        986_000_000_488,
        "a page move took a snapshot in front of an earlier one, and the store stopped",
    ),
    (
        987_000_000_415,
        "a replay sent one half of a change that was under way, and a snapshot had it",
    ),
    (
        990_000_001_763,
        "a flush was held to a change that was not answered when it was called",
    ),
    (
        11_447_001_290,
        "a TRIM of a hole shared its era with the next write, and a snapshot by stamp had both",
    ),
    (
        990_000_014_301,
        "a page move placed an abandoned snapshot behind later ones that its sender had not taken yet",
    ),
    (
        995_000_005_292,
        "a page move placed an abandoned snapshot behind later ones that its sender had not taken yet",
    ),
    (
        990_000_002_960,
        "a rollback and a change over several pages waited for each other for a minute",
    ),
    (
        997_000_000_448,
        "a killed server cut its log where the disk had lost a write, and no client heard of it",
    ),
    (
        999_000_002_899,
        "a write after a rollback left a version below it that no view showed and nobody freed",
    ),
    (
        999_000_004_887,
        "a write after a rollback left a version below it that no view showed and nobody freed",
    ),
    (
        1_003_000_001_610,
        "a start that died while it cut the log was taken for a cut without a cause",
    ),
    (
        1_003_000_005_157,
        "a rollback was answered before it was durable, and after a loss of power what was before was served",
    ),
    (
        20_005_188,
        "a server whose store had failed began the same page move again and again without a pause",
    ),
    (
        2_200_000_000_115,
        "of two flushes at once on one NBD connection only one told that writes were lost, the other one was answered",
    ),
    (
        50_003_234,
        "a server whose registry's disk had failed asked whose its pages were again and again without a pause",
    ),
    (
        2_200_000_000_002,
        "an owner that was killed between two parts of a span came back without its gate, and a snapshot had half",
    ),
    (
        2_300_000_000_261,
        "what a dead server would have answered was taken for an answer",
    ),
    (
        80_001_289,
        "after a start a volume whose store waited for a table was opened with the size 0",
    ),
    (
        80_304_655,
        "a server that could not read what was not flushed was started for ever, and the run did not come to its end",
    ),
    (
        2_700_000_000_069,
        "a sweep that met a part of the slab that could not be read was not tried again before a restart",
    ),
    (
        74_891_000_542,
        "a version that moved in after its snapshot was dropped was filed below an older one, and lost",
    ),
];
