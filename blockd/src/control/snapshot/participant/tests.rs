use super::*;

const T: TicketId = TicketId(7);
const S: SnapshotId = SnapshotId(3);
const E: Epoch = Epoch(5);
const I: u64 = 11;
const NOW: Stamp = Stamp(1300);
const READY: Output = Output::Reply(
    T,
    Answer::Ready {
        held: 0,
        incarnation: I,
    },
);
const EXPIRED: Output = Output::Reply(T, Answer::Expired);
const UNKNOWN: Output = Output::Reply(T, Answer::Unknown);
const DROP: Output = Output::Drop { snapshot: S };
const QUIET: ParticipantEvent = ParticipantEvent::Quiet { ticket: T, held: 0 };
const STAMPING: ParticipantEvent = ParticipantEvent::Stamping {
    ticket: T,
    now: Some(NOW),
};
const SYNCED: ParticipantEvent = ParticipantEvent::Synced {
    ticket: T,
    synced: true,
};

fn by(procedure: Procedure, epoch: Epoch) -> ParticipantEvent {
    order(Order::PrepareBy(Preparation {
        procedure,
        coordinator: NodeNo(2),
        snapshot: S,
        epoch,
        hold_max_ms: 100,
        park_max_ms: 50,
    }))
}

fn order(order: Order) -> ParticipantEvent {
    ParticipantEvent::Order(T, order)
}

fn take() -> ParticipantEvent {
    order(Order::Take { incarnation: I })
}

fn take_at(at: Stamp) -> ParticipantEvent {
    let incarnation = I;
    order(Order::TakeAt { incarnation, at })
}

fn made(made: bool) -> ParticipantEvent {
    let (ticket, snapshot) = (T, S);
    ParticipantEvent::Made {
        ticket,
        snapshot,
        made,
    }
}

fn close(gate: Gate) -> Output {
    Output::Close { ticket: T, gate }
}

fn make(at: Option<Stamp>, park: bool) -> Output {
    Output::Make {
        ticket: T,
        snapshot: S,
        at,
        park,
    }
}

/// Runs a table of (time, event, expected outputs).
fn run(p: &mut Participant, table: &[(u64, ParticipantEvent, &[Output])]) {
    for (row, (now, event, want)) in table.iter().enumerate() {
        assert_eq!(p.step(*now, *event), *want, "row {row}: {event:?}");
    }
}

/// S003-36, 37: ready only when nothing executes, with the number of writes held; S003-28: they go
/// on when the part is in the log, before it is durable.
#[test]
fn fig_7_holds_drains_takes_and_releases() {
    let quiet = ParticipantEvent::Quiet { ticket: T, held: 2 };
    let ready = Output::Reply(
        T,
        Answer::Ready {
            held: 2,
            incarnation: I,
        },
    );
    let sync = Output::Sync { ticket: T };
    let taken = Output::Reply(T, Answer::Taken);
    run(
        &mut Participant::new(E, I),
        &[
            (1, by(Procedure::Hold, E), &[close(Gate::All)]),
            (3, quiet, &[ready]),
            (4, take(), &[make(None, false)]),
            (6, made(true), &[Output::Open, sync]),
            (7, take(), &[]),
            (8, SYNCED, &[taken]),
            (9, take(), &[taken]),
            (10, order(Order::Release), &[DROP, EXPIRED]),
            (11, take(), &[EXPIRED]),
        ],
    );
}

/// The first version's prepare is one of `hold`.
#[test]
fn an_older_coordinator_gets_a_hold() {
    let prepare = Order::Prepare {
        snapshot: S,
        epoch: E,
        hold_max_ms: 100,
    };
    run(
        &mut Participant::new(E, I),
        &[
            (1, order(prepare), &[close(Gate::All)]),
            (3, QUIET, &[READY]),
        ],
    );
}

/// The log is marked before `ready`, nothing but spans waits, and at take everything goes before
/// the disk is asked.
#[test]
fn a_barrier_marks_before_it_is_ready_and_parks_until_take() {
    let sync = Output::Sync { ticket: T };
    let taken = Output::Reply(T, Answer::Taken);
    run(
        &mut Participant::new(E, I),
        &[
            (1, by(Procedure::Barrier, E), &[close(Gate::Wide)]),
            (80, QUIET, &[make(None, true)]),
            (90, made(true), &[READY]),
            (139, take(), &[Output::Open, sync]),
            (9000, SYNCED, &[taken]),
            (9001, order(Order::Release), &[DROP, EXPIRED]),
        ],
    );
}

/// U-08: the parked completions go at the participant's own deadline, counted from the mark.
#[test]
fn a_barrier_expires_after_its_mark_and_drops_it() {
    let mut p = Participant::new(E, I);
    run(
        &mut p,
        &[
            (1, by(Procedure::Barrier, E), &[close(Gate::Wide)]),
            (80, QUIET, &[make(None, true)]),
            (90, made(true), &[READY]),
            (140, ParticipantEvent::Tick, &[]),
            (141, ParticipantEvent::Tick, &[Output::Open, DROP]),
            (142, take(), &[EXPIRED]),
        ],
    );
    assert_eq!(p.deadline_ms(), None);
}

/// S003-40 to 42: nothing but spans waits, writes are stamped from ready on, and the part is what
/// was stamped before the coordinator's time.
#[test]
fn fig_8_stamps_from_ready_to_take() {
    let ready = Answer::ReadyAt {
        incarnation: I,
        now: NOW,
    };
    let sync = Output::Sync { ticket: T };
    let at = Stamp(1370);
    run(
        &mut Participant::new(E, I),
        &[
            (1, by(Procedure::Stamp, E), &[close(Gate::Wide)]),
            (2, QUIET, &[Output::StampWrites { ticket: T }]),
            (2, STAMPING, &[Output::Reply(T, ready)]),
            (3, take(), &[UNKNOWN]),
            (4, take_at(at), &[make(Some(at), false)]),
            (5, made(true), &[Output::Open, sync]),
            (6, SYNCED, &[Output::Reply(T, Answer::Taken)]),
        ],
    );
}

#[test]
fn a_take_after_the_deadline_is_expired_whether_or_not_a_tick_came() {
    for (tick, procedure) in [
        (false, Procedure::Hold),
        (true, Procedure::Hold),
        (true, Procedure::Stamp),
    ] {
        let mut p = Participant::new(E, I);
        p.step(0, by(procedure, E));
        p.step(1, QUIET);
        if procedure == Procedure::Stamp {
            p.step(1, STAMPING);
        }
        assert_eq!(p.step(100, ParticipantEvent::Tick), []);
        if tick {
            assert_eq!(p.step(101, ParticipantEvent::Tick), [Output::Open]);
            assert_eq!(p.step(102, take()), [EXPIRED]);
        } else {
            assert_eq!(p.step(102, take()), [Output::Open, EXPIRED]);
        }
        let again = p.step(103, by(procedure, E));
        assert_eq!(again, [EXPIRED], "a ticket is decided once");
    }
}

#[test]
fn a_part_that_is_made_too_late_is_dropped() {
    let mut p = Participant::new(E, I);
    p.step(0, by(Procedure::Hold, E));
    p.step(0, QUIET);
    p.step(1, take());
    assert!(p.is_making(T));
    assert_eq!(p.step(101, made(true)), [Output::Open, DROP, EXPIRED]);
}

/// S003-38: a part that was not ready takes nothing.
#[test]
fn a_take_before_ready_expires_the_ticket() {
    let mut p = Participant::new(E, I);
    p.step(0, by(Procedure::Barrier, E));
    p.step(0, QUIET);
    assert_eq!(p.step(1, take()), [Output::Open, EXPIRED]);
    assert!(!p.is_making(T));
}

#[test]
fn a_part_that_cannot_be_made_or_synced_is_failed() {
    let failed = Output::Reply(T, Answer::Failed);
    let mut p = Participant::new(E, I);
    p.step(0, by(Procedure::Barrier, E));
    p.step(0, QUIET);
    assert_eq!(p.step(1, made(false)), [Output::Open, failed]);
    let mut p = Participant::new(E, I);
    p.step(0, by(Procedure::Barrier, E));
    p.step(0, QUIET);
    p.step(0, made(true));
    p.step(1, take());
    let synced = ParticipantEvent::Synced {
        ticket: T,
        synced: false,
    };
    assert_eq!(p.step(2, synced), [failed]);
    assert_eq!(p.step(3, take()), [EXPIRED]);
}

/// S003-34: another epoch refuses; a volume has one ticket at a time.
#[test]
fn refusals() {
    let mut p = Participant::new(E, I);
    assert_eq!(p.step(0, take()), [UNKNOWN]);
    let other_epoch = Output::Reply(T, Answer::OtherEpoch(E));
    assert_eq!(p.step(0, by(Procedure::Barrier, Epoch(4))), [other_epoch]);
    p.step(0, by(Procedure::Barrier, E));
    let ParticipantEvent::Order(_, other) = by(Procedure::Hold, E) else {
        panic!("an order");
    };
    let busy = Output::Reply(TicketId(8), Answer::Busy);
    let asked = ParticipantEvent::Order(TicketId(8), other);
    assert_eq!(p.step(1, asked), [busy]);
    let moved = ParticipantEvent::EpochChanged(Epoch(6));
    assert_eq!(p.step(2, moved), [Output::Open]);
}

#[test]
fn a_take_for_a_hold_before_the_restart_does_not_take_a_later_one() {
    let mut p = Participant::new(E, I + 1);
    p.step(0, by(Procedure::Barrier, E));
    assert_eq!(p.step(1, take()), [UNKNOWN]);
}

#[test]
fn a_prepare_behind_its_release_does_not_hold() {
    let mut p = Participant::new(E, I);
    assert_eq!(p.step(0, order(Order::Release)), [EXPIRED]);
    assert_eq!(p.step(1, by(Procedure::Hold, E)), [EXPIRED]);
    assert_eq!(p.deadline_ms(), None);
}

#[test]
fn the_hold_and_the_memory_are_bounded() {
    let mut p = Participant::new(E, I);
    let prepare = Order::Prepare {
        snapshot: S,
        epoch: E,
        hold_max_ms: u64::MAX,
    };
    p.step(0, order(prepare));
    assert_eq!(p.deadline_ms(), Some(SNAPSHOT_HOLD_CAP_MS));
    for ticket in 0..1000 {
        p.step(0, ParticipantEvent::Order(TicketId(ticket), Order::Release));
    }
    assert_eq!(p.decided.len(), SNAPSHOT_TICKETS_KEPT);
}
