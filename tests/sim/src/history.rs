//! What clients asked and were answered, in one order.

use blockd::control::registry::settings::Procedure;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// A moment: the number of an event. Never by a clock.
pub(crate) type Moment = u64;
/// An answer that never came, or said that the outcome is unknown.
pub(crate) const NEVER: Moment = u64::MAX;
/// Bytes of a block.
pub(crate) const BLOCK: usize = 512;

/// The content of a block: which operation wrote it; 0: zeros.
pub(crate) type Tag = u32;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Write,
    Zero,
    /// What each block showed.
    Read(Vec<Tag>),
    Flush,
    /// The volume becomes what a snapshot shows: the content of every block.
    Become(Rc<[Tag]>),
}

/// One operation on a volume.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub client: usize,
    pub volume: usize,
    pub what: What,
    pub first: u32,
    pub blocks: u32,
    pub invoked: Moment,
    /// `NEVER` if it failed: it may have been executed, or may yet be.
    pub answered: Moment,
}

/// One snapshot of one or more volumes, at one point in time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snap {
    pub name: String,
    pub volumes: Vec<usize>,
    pub procedure: Procedure,
    pub invoked: Moment,
    pub answered: Moment,
    /// Answered with success.
    pub taken: bool,
    /// Answered that there is none.
    pub refused: bool,
    pub deleting: bool,
    /// What its blocks show, as far as they were read.
    pub shown: BTreeMap<(usize, u32), Tag>,
}

/// A node has lost power, or has cut its log over damaged data: what was not flushed may be gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    pub node: usize,
    pub at: Moment,
}

/// Everything that the checkers know.
#[derive(Default)]
pub(crate) struct History {
    pub ops: RefCell<Vec<Op>>,
    pub snaps: RefCell<Vec<Snap>>,
    pub losses: RefCell<Vec<Loss>>,
    /// When each server was started.
    pub starts: RefCell<Vec<(usize, Moment)>>,
    /// Clients that go through one server: which, and how often it had been started by then.
    pub entries: RefCell<BTreeMap<usize, (usize, usize)>>,
    moment: Cell<Moment>,
}

/// The first number of a client that goes through one server.
const ENTRIES: usize = 100;

impl History {
    /// The next moment.
    pub(crate) fn now(&self) -> Moment {
        self.moment.set(self.moment.get() + 1);
        self.moment.get()
    }

    /// A new client that goes through this server; gives its number.
    pub(crate) fn enter(&self, host: usize) -> usize {
        let starts = self.starts.borrow();
        let runs = starts.iter().filter(|(started, _)| *started == host);
        let mut entries = self.entries.borrow_mut();
        let client = ENTRIES + entries.len();
        entries.insert(client, (host, runs.count()));
        client
    }

    /// Notes an operation before anything of it is sent; gives its number.
    pub(crate) fn invoke(
        &self,
        client: usize,
        volume: usize,
        what: What,
        first: u32,
        blocks: u32,
    ) -> usize {
        let op = Op {
            client,
            volume,
            what,
            first,
            blocks,
            invoked: self.now(),
            answered: NEVER,
        };
        self.ops.borrow_mut().push(op);
        self.ops.borrow().len() - 1
    }

    /// Whether who asked for a snapshot of this name was refused; `None`: nobody asked.
    pub(crate) fn is_refused(&self, name: &str) -> Option<bool> {
        let snaps = self.snaps.borrow();
        let snap = snaps.iter().find(|snap| snap.name == name)?;
        Some(snap.refused)
    }

    /// Notes its success.
    pub(crate) fn answer(&self, op: usize, shown: Option<Vec<Tag>>) {
        let now = self.now();
        let op = &mut self.ops.borrow_mut()[op];
        op.answered = now;
        if let Some(shown) = shown {
            op.what = What::Read(shown);
        }
    }
}

fn word(volume: usize, block: u32, tag: Tag) -> u64 {
    (u64::from(tag) << 32 | (volume as u64) << 24 | u64::from(block)) ^ 0xb10c_da7a_5eed_c0de
}

/// The bytes that operation `tag` writes.
#[must_use]
pub(crate) fn fill(volume: usize, first: u32, blocks: u32, tag: Tag) -> Vec<u8> {
    let mut data = Vec::with_capacity(blocks as usize * BLOCK);
    for block in first..first + blocks {
        let word = word(volume, block, tag).to_le_bytes();
        for _ in 0..BLOCK / 8 {
            data.extend_from_slice(&word);
        }
    }
    data
}

/// Which operation wrote a block.
///
/// # Errors
/// Bytes that nobody ever wrote there.
pub(crate) fn decode(volume: usize, block: u32, data: &[u8]) -> Result<Tag, String> {
    let first: [u8; 8] = data[..8].try_into().unwrap_or_default();
    if data.chunks_exact(8).any(|chunk| chunk != first) {
        return Err(format!("block {block} of volume {volume} is a mixture"));
    }
    let found = u64::from_le_bytes(first);
    let tag = ((found ^ 0xb10c_da7a_5eed_c0de) >> 32) as Tag;
    match found {
        0 => Ok(0),
        _ if found == word(volume, block, tag) && tag > 0 => Ok(tag),
        _ => Err(format!(
            "block {block} of volume {volume} shows {found:#x}, which belongs elsewhere"
        )),
    }
}
