//! Faults planted in the program, and the seed that catches each.

use crate::driver::attempt;
use crate::machine::Medium;
use crate::run::{ALL_FAULTS, Options};
use blockd::planted::Plant;
use std::process::ExitCode;

/// Plant and the seed that catches it. The others of [`Plant::ALL`] are not caught yet.
pub(crate) const CAUGHT: &[(Plant, u64)] = &[
    (Plant::AcknowledgeBeforeLog, 4),
    (Plant::CommitWithoutTicket, 6),
    (Plant::SkipSync, 2),
    (Plant::HoldNothing, 86),
    (Plant::ParkNothing, 72),
    (Plant::SpanIgnoresHold, 55),
    (Plant::SkipReplay, 31),
    (Plant::SkipChecksum, 5),
    (Plant::HalfSpan, 8),
    (Plant::SkipTrim, 1),
    (Plant::SkipQuiet, 6),
    (Plant::SweepLive, 2),
    (Plant::SweepPending, 60),
    (Plant::LeakSnapshot, 2),
    (Plant::FlushOneOwner, 10),
    (Plant::KeepPending, 8),
    (Plant::CutValidRecords, 2),
    (Plant::TakenBeforeSync, 33),
    (Plant::SkipSlabSync, 2),
    (Plant::ReuseFreedAtOnce, 8),
    (Plant::KeepVerifier, 9),
    (Plant::ReplayBackwards, 20),
    (Plant::HoldForever, 146),
    (Plant::EarlyCut, 40),
    (Plant::SkipEpochCheck, 6),
    (Plant::FlipBeforeTail, 130),
    (Plant::ReadBehindMark, 174),
];
/// A change of the program changes all runs: so many seeds from the named one on are tried.
const TRIES: u64 = 200;

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
    let options = |seed| Options {
        seed,
        ops,
        mask: ALL_FAULTS,
        both: false,
        log: false,
    };
    for (_, seed) in CAUGHT {
        let without = attempt(template, options(*seed));
        if !without.problems.is_empty() {
            println!(
                "seed {seed} fails without a planted fault: {:?}",
                without.problems
            );
            failed = true;
        }
    }
    for (plant, seed) in CAUGHT {
        if let Err(text) = set(*plant) {
            println!("{text}");
            return ExitCode::from(2);
        }
        let caught = (*seed..seed + TRIES).find_map(|seed| {
            let with = attempt(template, options(seed));
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
