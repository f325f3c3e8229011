//! What clients do meanwhile: w1 to the first server and, once that is acknowledged or a read has
//! shown it, w2 to the last one; or a span over both.

use super::{Fault, Gate, Stamp, World};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Load {
    Writes,
    Spans,
}

/// How far the client's write to a server is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Write {
    NotIssued,
    Waiting,
    /// It passed the gate, and is not in the log.
    Executing,
    Executed(Logged),
    Acknowledged(Logged),
}

/// Where it is in the log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Logged {
    /// `None`: it was logged before the server stamped writes.
    stamp: Option<Stamp>,
    /// Behind the mark.
    behind: bool,
}

impl Write {
    /// The server has restarted: what is in its log comes before whatever it stamps from now on.
    pub(super) fn forget_stamp(&mut self) {
        if let Self::Executed(logged) | Self::Acknowledged(logged) = self {
            logged.stamp = None;
        }
    }

    /// Whether a part that is made now has it.
    pub(super) fn is_in(self, cut: Option<Stamp>) -> bool {
        match self {
            Self::Executed(logged) | Self::Acknowledged(logged) => logged
                .stamp
                .is_none_or(|stamp| cut.is_none_or(|cut| stamp < cut)),
            _ => false,
        }
    }
}

/// A request over the first and the last server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Span {
    /// Whose gates it has passed and keeps open.
    open: [bool; 2],
    /// A part was sent: nothing is given back any more.
    sending: bool,
    executed: [bool; 2],
}

impl Span {
    /// Server 0 is the first, any other the last: spans are enumerated with two.
    pub(super) fn is_open(&self, at: usize) -> bool {
        self.open[at.min(1)]
    }

    pub(super) fn is_executed(&self, at: usize) -> bool {
        self.executed[at.min(1)]
    }

    /// The server died: it knows nothing of the span, which agrees again.
    pub(super) fn lost(&mut self, at: usize) {
        self.open[at.min(1)] = false;
    }
}

impl World {
    pub(super) fn load_successors(&self, next: &mut Vec<World>) {
        match self.load {
            Load::Writes => {
                for at in [0, self.servers.len() - 1] {
                    self.write_successors(at, next);
                }
            }
            Load::Spans => (0..2).for_each(|at| self.span_successors(at, next)),
        }
    }

    fn write_successors(&self, at: usize, next: &mut Vec<World>) {
        let server = &self.servers[at];
        let is_held = server.gate == Some(Gate::All);
        match server.write {
            Write::NotIssued if at == 0 => {
                next.push(self.after(|w| w.issue(at, is_held)));
            }
            Write::NotIssued if self.is_w1_known() => {
                next.push(self.after(|w| {
                    w.hear(0);
                    w.issue(at, is_held);
                }));
            }
            Write::Waiting if !is_held => {
                next.push(self.after(|w| w.servers[at].write = Write::Executing));
            }
            Write::Executing => next.push(self.after(|w| w.execute(at))),
            Write::Executed(logged) if !(logged.behind && server.parking) => {
                next.push(self.after(|w| w.servers[at].write = Write::Acknowledged(logged)));
            }
            _ => {}
        }
    }

    /// Whether the first write was acknowledged, or a read shows it.
    fn is_w1_known(&self) -> bool {
        match self.servers[0].write {
            Write::Acknowledged(_) => true,
            Write::Executed(logged) => {
                let is_parked = logged.behind && self.servers[0].parking;
                !is_parked || self.fault == Fault::ReadsNotParked
            }
            _ => false,
        }
    }

    /// The reply of a server carries its clock to the client.
    fn hear(&mut self, at: usize) {
        if self.fault != Fault::ClockNotCarried {
            self.heard = self.heard.max(self.servers[at].clock);
        }
    }

    /// The request carries the client's clock to the server.
    fn issue(&mut self, at: usize, is_held: bool) {
        let server = &mut self.servers[at];
        server.clock = server.clock.max(self.heard);
        server.write = if is_held {
            Write::Waiting
        } else {
            Write::Executing
        };
    }

    fn execute(&mut self, at: usize) {
        let server = &mut self.servers[at];
        server.clock += 1;
        let stamp = server.stamping.then_some(Stamp(server.clock));
        let behind = server.parking;
        server.write = Write::Executed(Logged { stamp, behind });
    }

    fn span_successors(&self, at: usize, next: &mut Vec<World>) {
        let span = self.span;
        let is_done = span.executed == [true, true];
        if !is_done && !span.open[at] && !span.executed[at] {
            let refused = self.servers[at].gate.is_some() && self.fault != Fault::SpansLetIn;
            if !refused {
                next.push(self.after(|w| w.span.open[at] = true));
            } else if !span.sending && span.open != [false, false] {
                next.push(self.after(|w| w.span.open = [false, false]));
            }
        }
        let may_send = span.sending || span.open == [true, true];
        if may_send && span.open[at] && !span.executed[at] {
            next.push(self.after(|w| {
                w.span.sending = true;
                w.span.executed[at] = true;
            }));
        }
        // It ends at each server when that one hears of it.
        if is_done && span.open[at] {
            next.push(self.after(|w| w.span.open[at] = false));
        }
    }
}
