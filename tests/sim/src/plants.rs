//! Faults planted in the program, and the seed that catches each.

use crate::driver::attempt;
use crate::faults::Kind;
use crate::machine::Medium;
use crate::run::{ALL_FAULTS, Options};
use blockd::planted::Plant;
use std::process::ExitCode;

/// Faults of one kind, if a plant needs many of it.
const RESETS: u32 = 1 << Kind::Reset as u32;

/// Plant, the seed that catches it, and the kinds of faults of that run.
pub(crate) const CAUGHT: &[(Plant, u64, u32)] = &[
    (Plant::AcknowledgeBeforeLog, 4, ALL_FAULTS),
    (Plant::CommitWithoutTicket, 6, ALL_FAULTS),
    (Plant::SkipSync, 2, ALL_FAULTS),
    (Plant::HoldNothing, 102, ALL_FAULTS),
    (Plant::ParkNothing, 142, ALL_FAULTS),
    (Plant::SpanIgnoresHold, 147, ALL_FAULTS),
    (Plant::SkipReplay, 31, ALL_FAULTS),
    (Plant::SkipChecksum, 5, ALL_FAULTS),
    (Plant::HalfSpan, 12, ALL_FAULTS),
    (Plant::SkipTrim, 1, ALL_FAULTS),
    (Plant::SkipQuiet, 35, ALL_FAULTS),
    (Plant::SweepLive, 2, ALL_FAULTS),
    (Plant::SweepPending, 146, ALL_FAULTS),
    (Plant::LeakSnapshot, 2, ALL_FAULTS),
    (Plant::FlushOneOwner, 20, ALL_FAULTS),
    (Plant::KeepPending, 8, ALL_FAULTS),
    (Plant::CutValidRecords, 2, ALL_FAULTS),
    (Plant::TakenBeforeSync, 368, ALL_FAULTS),
    (Plant::SkipSlabSync, 2, ALL_FAULTS),
    (Plant::ReuseFreedAtOnce, 8, ALL_FAULTS),
    (Plant::KeepVerifier, 10, ALL_FAULTS),
    (Plant::ReplayBackwards, 26, ALL_FAULTS),
    (Plant::HoldForever, 479, ALL_FAULTS),
    (Plant::EarlyCut, 136, ALL_FAULTS),
    (Plant::SkipEpochCheck, 66, ALL_FAULTS),
    (Plant::FlipBeforeTail, 422, ALL_FAULTS),
    (Plant::ReadBehindMark, 1532, ALL_FAULTS),
    (Plant::KeepOldConnection, 853, RESETS),
    (Plant::SlabBeforeLog, 106, ALL_FAULTS),
    (Plant::EntryHalfSpan, 1, ALL_FAULTS),
    (Plant::EntryForgetsVerifier, 429, ALL_FAULTS),
    (Plant::SweepKeepsVolumes, 26, ALL_FAULTS),
    (Plant::UnreadableIsZero, 4, ALL_FAULTS),
    (Plant::ForgetSpans, 440, ALL_FAULTS),
    (Plant::ForgetLostSpans, 431, ALL_FAULTS),
];
/// A change of the program changes all runs: so many seeds from the named one on are tried.
const TRIES: u64 = 600;

/// Every name that can be planted.
pub(crate) fn names() -> impl Iterator<Item = (String, Plant)> {
    Plant::ALL
        .iter()
        .map(|plant| (format!("{plant:?}"), *plant))
}

/// Plants a fault in this process.
///
/// # Errors
/// There is none of this name, or this program was built without them.
pub(crate) fn plant(name: &str) -> Result<(), String> {
    let known = names().find(|(known, _)| known == name);
    let Some((_, plant)) = known else {
        let names: Vec<String> = names().map(|(name, _)| name).collect();
        return Err(format!(
            "no planted fault {name:?}; there are {}",
            names.join(", ")
        ));
    };
    set(plant)
}

#[cfg(feature = "plants")]
fn set(plant: Plant) -> Result<(), String> {
    blockd::planted::plant(plant);
    Ok(())
}

#[cfg(not(feature = "plants"))]
fn set(plant: Plant) -> Result<(), String> {
    Err(format!("{plant:?}: build with --features plants"))
}

/// Every planted fault is caught by its seed, and nothing is reported without it.
pub(crate) fn check_all(template: &[Medium], ops: u64) -> ExitCode {
    let mut failed = false;
    let options = |seed, mask| Options {
        seed,
        ops,
        mask,
        log: false,
    };
    for (_, seed, mask) in CAUGHT {
        let without = attempt(template, options(*seed, *mask));
        if !without.problems.is_empty() {
            println!(
                "seed {seed} fails without a planted fault: {:?}",
                without.problems
            );
            failed = true;
        }
    }
    for (plant, seed, mask) in CAUGHT {
        if let Err(text) = set(*plant) {
            println!("{text}");
            return ExitCode::from(2);
        }
        let caught = (*seed..seed + TRIES).find_map(|seed| {
            let with = attempt(template, options(seed, *mask));
            Some((seed, with.problems.into_iter().next()?))
        });
        match caught {
            Some((seed, text)) => println!("{plant:?} is caught by seed {seed}: {text}"),
            None => {
                println!("{plant:?} is NOT caught by {TRIES} seeds from {seed} on");
                failed = true;
            }
        }
    }
    match failed {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}
