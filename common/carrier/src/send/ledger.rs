//! What is still to do, what is on its way, and what is done: survives the
//! connections of one transfer.
//!
//! Work is taken from the front of the files to their back, with what has to be
//! done again first. What is on its way is answered in the order in which it
//! went, so what is done needs no map of chunks, only a place in the file.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex},
    time::{Duration, Instant},
};

use super::{
    SendError,
    coverage::Coverage,
    walk::{Piece, Walk},
};
use crate::{
    control::Control,
    disk::Source,
    protocol::{BLOCK, COMPARE, Hash, Head, Kind, Malformed, Nonce, VIRGIN},
    sync::{locked, wait},
};

/// Most bytes on their way.
const WINDOW: u64 = 16 * 1024 * 1024;
/// Most pieces on their way.
const PIECES: usize = 1024;
/// How often a chunk that arrived wrong is sent again.
const RESENDS: u8 = 3;
/// Most bytes made zero by one request: what a disk does well within the time
/// after which a transfer counts as stalled.
const ZERO: u64 = 256 * 1024 * 1024;
/// The same for a device, which has to write or to read them all.
const ZERO_DEVICE: u64 = 16 * 1024 * 1024;

/// What is to be done about a piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Send it.
    Data,
    /// Ask whether it is there.
    Check,
    /// Have it made zero.
    Zero,
    /// Have the file finished.
    Finish,
}

/// A piece of a file and what is to be done about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) task: Task,
    pub(super) file: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// It is data here, and counts as such.
    pub(super) data: bool,
    /// What it hashes to here, once it was read.
    pub(super) hash: Hash,
    resends: u8,
}

impl Item {
    /// A part of it, from `skip` on.
    pub(super) fn part(&self, task: Task, skip: u64, len: u64) -> Self {
        Self {
            task,
            offset: self.offset + skip,
            len,
            ..*self
        }
    }

    fn weight(&self) -> u64 {
        match self.task {
            Task::Data | Task::Check => self.len,
            Task::Zero | Task::Finish => 0,
        }
    }
}

/// What the destination said about a file when it was opened.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Opened(pub(super) u8);

impl Opened {
    pub(super) fn is_virgin(self) -> bool {
        self.0 & VIRGIN != 0
    }

    fn is_compared(self) -> bool {
        self.0 & COMPARE != 0
    }

    pub(super) fn zero_at_once(self) -> u64 {
        if self.0 & BLOCK != 0 {
            ZERO_DEVICE
        } else {
            ZERO
        }
    }
}

/// The next thing to do.
pub(super) enum Take {
    /// This, of a file that was opened like that.
    Item(Item, Opened),
    /// Nothing yet.
    Wait,
    /// Nothing any more: all is done.
    Done,
}

/// The answer does not end the transfer well.
pub(super) enum Unsettled {
    /// It was no answer to what was asked.
    Malformed(Malformed),
    /// It cannot go on.
    Failed(SendError),
}

/// The ledger of one transfer.
pub(super) struct Ledger<'a> {
    sources: &'a [Source],
    control: &'a Control,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    epoch: Option<Nonce>,
    /// What is there already is asked about before it is sent.
    check: bool,
    opened: Vec<Opened>,
    coverage: Vec<Coverage>,
    walk: Walk,
    again: VecDeque<Item>,
    under_way: VecDeque<Item>,
    weight: u64,
    done: u64,
    reused: u64,
    finishing: bool,
    progressed: Instant,
}

impl<'a> Ledger<'a> {
    pub(super) fn new(sources: &'a [Source], control: &'a Control, resume: bool) -> Self {
        let state = State {
            epoch: None,
            check: resume,
            opened: Vec::new(),
            coverage: Vec::new(),
            walk: Walk::default(),
            again: VecDeque::new(),
            under_way: VecDeque::new(),
            weight: 0,
            done: 0,
            reused: 0,
            finishing: false,
            progressed: Instant::now(),
        };
        Self {
            sources,
            control,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// A connection begins. In another epoch than the last one's nothing that
    /// was acknowledged counts any more; but it is asked about, not sent again.
    pub(super) fn begin(&self, epoch: Nonce, opened: Vec<Opened>) {
        let state = &mut *locked(&self.state);
        if state.epoch == Some(epoch) {
            // What is on no connection any more goes first on this one.
            while let Some(item) = state.under_way.pop_back() {
                state.again.push_front(item);
            }
        } else {
            state.check |= state.epoch.is_some();
            state.epoch = Some(epoch);
            state.coverage.clear();
            state
                .coverage
                .resize_with(self.sources.len(), Coverage::default);
            state.walk = Walk::default();
            state.again.clear();
            state.under_way.clear();
            (state.done, state.reused, state.finishing) = (0, 0, false);
            state.opened = opened;
        }
        state.weight = 0;
    }

    /// The next thing to do, at the latest after so long. The caller commits
    /// what it made of it before it asks again.
    pub(super) fn take(&self, patience: Duration) -> Result<Take, SendError> {
        let mut state = locked(&self.state);
        if state.is_full() {
            state = wait(&self.changed, state, patience);
        }
        if state.is_full() {
            return Ok(Take::Wait);
        }
        if let Some(item) = self.next(&mut state)? {
            return Ok(Take::Item(item, state.opened[usize::from(item.file)]));
        }
        if state.under_way.is_empty() {
            if state.finishing {
                return Ok(Take::Done);
            }
            return self.finish(&mut state);
        }
        drop(wait(&self.changed, state, patience));
        Ok(Take::Wait)
    }

    /// What has to be done again, or the next piece of the files.
    fn next(&self, state: &mut State) -> Result<Option<Item>, SendError> {
        if let Some(item) = state.again.pop_front() {
            return Ok(Some(item));
        }
        if state.finishing {
            return Ok(None);
        }
        let chunk = self.control.chunk();
        while let Some((file, piece)) = state.walk.next(self.sources, chunk, &state.opened)? {
            let opened = state.opened[usize::from(file)];
            let (task, range, data) = match piece {
                Piece::Hole(range) if opened.is_virgin() => {
                    state.cover(file, range)?;
                    continue;
                }
                Piece::Hole(range) => (Task::Zero, range, false),
                Piece::Data(range) if state.is_asked_about(opened) => (Task::Check, range, true),
                Piece::Data(range) => (Task::Data, range, true),
            };
            return Ok(Some(Item {
                task,
                file,
                offset: range.start,
                len: range.end - range.start,
                data,
                hash: 0,
                resends: 0,
            }));
        }
        Ok(None)
    }

    /// Everything is verified: has the files finished, once they are covered.
    fn finish(&self, state: &mut State) -> Result<Take, SendError> {
        for (file, source) in self.sources.iter().enumerate() {
            if !state.coverage[file].is_all(source.len) {
                return Err(SendError::bug("a file is not covered at its end", file));
            }
        }
        let finishes = self.sources.iter().zip(0..).map(|(source, file)| Item {
            task: Task::Finish,
            file,
            offset: 0,
            len: source.len,
            data: false,
            hash: 0,
            resends: 0,
        });
        state.again.extend(finishes);
        state.finishing = true;
        Ok(Take::Wait)
    }

    /// These are on their way, in this order.
    pub(super) fn commit(&self, items: &[Item]) {
        let mut state = locked(&self.state);
        state.weight += items.iter().map(Item::weight).sum::<u64>();
        state.under_way.extend(items);
    }

    /// A piece of a virgin file is zero: nothing needs to go.
    pub(super) fn settle_zero(&self, item: &Item) -> Result<(), SendError> {
        let mut state = locked(&self.state);
        self.settle_item(&mut state, item)
    }

    /// An answer arrived.
    pub(super) fn settle(&self, answer: &Head, hash: Hash) -> Result<(), Unsettled> {
        let mut state = locked(&self.state);
        let wrong = |what| Err(Unsettled::Malformed(Malformed(what)));
        let Some(mut item) = state.under_way.pop_front() else {
            return wrong("an answer to nothing");
        };
        let asked = (item.file, item.offset, item.len);
        let fits = match item.task {
            Task::Data | Task::Check => answer.kind == Kind::Hash,
            Task::Zero => answer.kind == Kind::Zeroed,
            Task::Finish => answer.kind == Kind::Finished,
        };
        if !fits || (answer.file, answer.offset, answer.len) != asked {
            // It is not lost: it goes again on the next connection.
            state.under_way.push_front(item);
            return wrong("an answer to something else");
        }
        state.weight -= item.weight();
        let equal = hash == item.hash || !matches!(item.task, Task::Data | Task::Check);
        if equal {
            if item.task == Task::Check && item.data {
                state.reused += item.len;
            }
            self.settle_item(&mut state, &item)
                .map_err(Unsettled::Failed)?;
        } else {
            self.again(&mut state, &mut item)?;
        }
        self.changed.notify_all();
        Ok(())
    }

    fn again(&self, state: &mut State, item: &mut Item) -> Result<(), Unsettled> {
        let file = usize::from(item.file);
        if state.opened[file].is_compared() {
            return Err(Unsettled::Failed(SendError::Differs { file }));
        }
        if item.task == Task::Data {
            if item.resends == RESENDS {
                let offset = item.offset;
                return Err(Unsettled::Failed(SendError::Corrupt { file, offset }));
            }
            item.resends += 1;
        }
        item.task = Task::Data;
        state.again.push_back(*item);
        Ok(())
    }

    fn settle_item(&self, state: &mut State, item: &Item) -> Result<(), SendError> {
        if item.task != Task::Finish {
            state.cover(item.file, item.offset..item.offset + item.len)?;
        }
        if item.data {
            state.done += item.len;
        }
        state.progressed = Instant::now();
        self.control.advance(state.done, state.reused);
        Ok(())
    }

    /// It is us who wait, not the other side.
    pub(super) fn excuse(&self) {
        locked(&self.state).progressed = Instant::now();
    }

    /// How long there has been no progress.
    pub(super) fn idle(&self) -> Duration {
        locked(&self.state).progressed.elapsed()
    }

    /// When there was progress last.
    pub(super) fn progressed(&self) -> Instant {
        locked(&self.state).progressed
    }

    /// How many bytes were not sent because they were there.
    pub(super) fn reused(&self) -> u64 {
        locked(&self.state).reused
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.weight >= WINDOW || self.under_way.len() >= PIECES
    }

    fn is_asked_about(&self, opened: Opened) -> bool {
        opened.is_compared() || (self.check && !opened.is_virgin())
    }

    fn cover(&mut self, file: u16, range: crate::extents::Range) -> Result<(), SendError> {
        let file = usize::from(file);
        if !self.coverage[file].add(range) {
            return Err(SendError::bug("a range was counted twice", file));
        }
        Ok(())
    }
}
